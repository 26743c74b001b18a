//! Handles on processes (pidfd_open(2)), and the start time that proves a process id is still
//! the same process after the agent or the machine's counter moved on.

#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use rustix::process::{PidfdFlags, Signal};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A handle on one process; readable when it has exited.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Open a handle by process id.
    ///
    /// # Errors
    /// `ESRCH` when there is no such process.
    pub fn open(pid: i32) -> io::Result<Self> {
        Ok(Self(rustix::process::pidfd_open(
            to_pid(pid)?,
            PidfdFlags::empty(),
        )?))
    }

    /// Take over a descriptor that clone3 made.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Send a signal; 0 only asks whether the process is there.
    ///
    /// # Errors
    /// `ESRCH` when it is gone and reaped.
    pub fn send_signal(&self, signal: i32) -> io::Result<()> {
        send_signal_fd(self.0.as_fd(), signal)
    }

    /// Whether the process has exited (it may still be a zombie).
    ///
    /// # Errors
    /// Only when the poll itself fails.
    pub fn has_exited(&self) -> io::Result<bool> {
        let mut fds = [rustix::event::PollFd::new(
            &self.0,
            rustix::event::PollFlags::IN,
        )];
        let zero = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        Ok(rustix::event::poll(&mut fds, Some(&zero))? > 0)
    }

    /// Wait until the process has exited, at most `timeout`; says whether it has.
    ///
    /// # Errors
    /// Only when the poll itself fails.
    pub fn wait_exited(&self, timeout: std::time::Duration) -> io::Result<bool> {
        let deadline = std::time::Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            let left = rustix::event::Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut fds = [rustix::event::PollFd::new(
                &self.0,
                rustix::event::PollFlags::IN,
            )];
            match rustix::event::poll(&mut fds, Some(&left)) {
                Ok(n) => return Ok(n > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<PidFd> for OwnedFd {
    fn from(fd: PidFd) -> Self {
        fd.0
    }
}

/// Send a signal through a borrowed pidfd.
///
/// # Errors
/// `ESRCH` when the process is gone, `EINVAL` for a bad signal number.
pub fn send_signal_fd(fd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    if let Some(signal) = Signal::from_named_raw(signal) {
        return Ok(rustix::process::pidfd_send_signal(fd, signal)?);
    }
    // SAFETY: plain system call over integers and a null siginfo; needed for signal 0 and the
    // real-time signals, which the safe wrapper cannot express.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            fd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Send a signal by process id (only for ids read from a cgroup a moment ago).
///
/// # Errors
/// `ESRCH` when there is no such process.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    if pid <= 0 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: plain system call over two integers; a positive pid never means a group.
    if unsafe { libc::kill(pid, signal) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// When a process started, in clock ticks since boot (`/proc/<pid>/stat` field 22). The pair
/// (pid, start time) names a process for as long as the machine is up.
///
/// # Errors
/// `NotFound` when it is gone, `InvalidData` when the line cannot be understood.
pub fn start_time(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_start_time(&stat).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// The command name in brackets may itself hold brackets and spaces: fields count from the last
/// closing bracket.
fn parse_start_time(stat: &str) -> Option<u64> {
    let rest = &stat[stat.rfind(')')? + 1..];
    // After the name comes field 3, so field 22 is the 20th from here.
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitOutcome {
    /// By `exit` with this code.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
}

impl WaitOutcome {
    /// The exit code shells report: 128 + signal for a killed process.
    pub fn code(self) -> i32 {
        match self {
            WaitOutcome::Exited(code) => code,
            WaitOutcome::Signaled(signal) => 128 + signal,
        }
    }
}

/// Reap one exited child without waiting; none when no child has exited.
///
/// # Errors
/// Anything but "no children".
pub fn reap_any() -> io::Result<Option<(i32, WaitOutcome)>> {
    use rustix::process::WaitOptions;
    match rustix::process::wait(WaitOptions::NOHANG) {
        Ok(Some((pid, status))) => {
            let outcome = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => WaitOutcome::Exited(code),
                (None, Some(signal)) => WaitOutcome::Signaled(signal),
                (None, None) => WaitOutcome::Exited(255),
            };
            Ok(Some((pid.as_raw_nonzero().get(), outcome)))
        }
        Ok(None) | Err(rustix::io::Errno::CHILD) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn to_pid(pid: i32) -> io::Result<rustix::process::Pid> {
    rustix::process::Pid::from_raw(pid)
        .filter(|_| pid > 0)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_time_is_found_behind_an_odd_command_name() {
        let line = "12 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 9 9";
        assert_eq!(parse_start_time(line), Some(4242));
        assert_eq!(parse_start_time("nonsense"), None);
    }

    #[test]
    fn our_own_start_time_is_stable() {
        let pid = std::process::id() as i32;
        assert_eq!(start_time(pid).unwrap(), start_time(pid).unwrap());
    }

    #[test]
    fn a_handle_tells_that_a_child_has_exited() {
        let mut child = std::process::Command::new("/bin/cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let fd = PidFd::open(child.id() as i32).unwrap();
        assert!(!fd.has_exited().unwrap());
        fd.send_signal(libc::SIGKILL).unwrap();
        assert!(fd.wait_exited(std::time::Duration::from_secs(10)).unwrap());
        child.wait().unwrap();
        assert_eq!(
            fd.send_signal(0).unwrap_err().raw_os_error(),
            Some(libc::ESRCH)
        );
    }
}
