//! What a process sets on itself before it executes a program: limits, identity, privileges,
//! filters, descriptors, signals. The order is the caller's business.

#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::io;
use std::os::fd::RawFd;

/// Outcome of setting one resource limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RlimitOutcome {
    /// As asked.
    Set,
    /// The hard limit may not be raised here (no CAP_SYS_RESOURCE): both limits were cut to it.
    Clamped {
        /// The hard limit in force.
        hard: u64,
    },
}

/// Set a resource limit by its `RLIMIT_*` number. A refusal to raise the hard limit cuts the
/// request down to the present hard limit instead of failing.
///
/// # Errors
/// An unknown number, soft above hard, or any other refusal.
pub fn set_rlimit(resource: u32, soft: u64, hard: u64) -> io::Result<RlimitOutcome> {
    let wanted = libc::rlimit {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: reads one `rlimit` that lives over the call.
    if unsafe { libc::setrlimit(resource, &wanted) } == 0 {
        return Ok(RlimitOutcome::Set);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() != Some(libc::EPERM) {
        return Err(error);
    }
    let mut present = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: writes one `rlimit` that lives over the call.
    if unsafe { libc::getrlimit(resource, &mut present) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let cut = libc::rlimit {
        rlim_cur: soft.min(present.rlim_max),
        rlim_max: hard.min(present.rlim_max),
    };
    // SAFETY: as above.
    if unsafe { libc::setrlimit(resource, &cut) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(RlimitOutcome::Clamped { hard: cut.rlim_max })
}

/// Write this process's oom_score_adj.
///
/// # Errors
/// `EACCES` when it would go below what the process may choose.
pub fn set_oom_score_adj(value: i32) -> io::Result<()> {
    std::fs::write("/proc/self/oom_score_adj", value.to_string())
}

/// Receive SIGKILL when the parent dies. Cleared by a change of credentials: set it afterwards.
///
/// # Errors
/// Never in practice.
pub fn die_with_parent() -> io::Result<()> {
    prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64, 0, 0)
}

/// Whether other processes may look into this one; off while it holds the host's descriptors
/// inside a container's PID namespace (CVE-2016-9962). execve turns it on again.
///
/// # Errors
/// Never in practice.
pub fn set_dumpable(on: bool) -> io::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, u64::from(on), 0, 0)
}

/// Adopt orphaned descendants, so that they can be reaped.
///
/// # Errors
/// Never in practice.
pub fn become_subreaper() -> io::Result<()> {
    prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0)
}

/// PR_SET_NO_NEW_PRIVS: no later execve gains privileges.
///
/// # Errors
/// Never in practice.
pub fn set_no_new_privs() -> io::Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0)
}

/// Keep permitted capabilities over the change to a user other than 0.
///
/// # Errors
/// `EPERM` when locked by securebits.
pub fn keep_capabilities(on: bool) -> io::Result<()> {
    prctl(libc::PR_SET_KEEPCAPS, u64::from(on), 0, 0)
}

/// Name shown by ps for this thread (at most 15 bytes).
///
/// # Errors
/// Never in practice.
pub fn set_name(name: &std::ffi::CStr) -> io::Result<()> {
    Ok(rustix::thread::set_name(name)?)
}

/// Start a session without a controlling terminal.
///
/// # Errors
/// `EPERM` for a process group leader.
pub fn new_session() -> io::Result<()> {
    rustix::process::setsid()?;
    Ok(())
}

/// Set the file mode creation mask.
pub fn set_umask(mask: u32) {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(mask));
}

/// Leave the parent's session keyring for an empty one; kernels without keyrings are fine.
pub fn new_session_keyring() {
    // SAFETY: plain system call; a null name asks for an anonymous keyring.
    unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            1, /* KEYCTL_JOIN_SESSION_KEYRING */
            0,
        )
    };
}

/// Load a compiled filter (seccomp(2)): an array of `struct sock_filter`, 8 bytes each. Needs
/// no_new_privs or CAP_SYS_ADMIN.
///
/// # Errors
/// `EINVAL` for a bad program.
pub fn load_seccomp(program: &[u8]) -> io::Result<()> {
    let count = program.len() / size_of::<libc::sock_filter>();
    let exact = program.len().is_multiple_of(size_of::<libc::sock_filter>());
    let Some(len) = u16::try_from(count).ok().filter(|len| *len > 0 && exact) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    let filters: Vec<libc::sock_filter> = program
        .chunks_exact(8)
        .map(|c| libc::sock_filter {
            code: u16::from_le_bytes([c[0], c[1]]),
            jt: c[2],
            jf: c[3],
            k: u32::from_le_bytes([c[4], c[5], c[6], c[7]]),
        })
        .collect();
    let program = libc::sock_fprog {
        len,
        filter: filters.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies `len` filters from the array, which lives over the call.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            1u32, // SECCOMP_SET_MODE_FILTER
            0u32,
            std::ptr::from_ref(&program),
        )
    };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Put every signal back to its default action and unblock all: ignored signals and the mask
/// would survive execve. Only for a process about to execute.
pub fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: the default action is valid for any signal; refusals (KILL, STOP) are harmless.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: sigset calls over a local, initialised set.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
    }
}

/// Ignore a signal (the ignoring is inherited over execve: see [`reset_signals`]).
pub fn ignore_signal(signal: i32) {
    // SAFETY: SIG_IGN installs no handler code.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// Mark every descriptor from `first` on close-on-exec.
///
/// # Errors
/// `ENOSYS` before Linux 5.11.
pub fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: u32 = 4;
    // SAFETY: sets a flag only; no descriptor is closed here.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first as u32,
            u32::MAX,
            CLOSE_RANGE_CLOEXEC,
        )
    };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Close every descriptor but the given ones. Only for a freshly cloned child: owners of the
/// closed descriptors must not be used or dropped afterwards, so the child ends by
/// [`super::clone::exit_child`] or execve.
///
/// # Errors
/// `ENOSYS` before Linux 5.9.
pub fn close_all_except(keep: &[RawFd]) -> io::Result<()> {
    let mut keep: Vec<u32> = keep
        .iter()
        .filter_map(|fd| u32::try_from(*fd).ok())
        .collect();
    keep.sort_unstable();
    let mut first = 0u32;
    for fd in keep.into_iter().chain([u32::MAX]) {
        if fd > first {
            let last = if fd == u32::MAX { u32::MAX } else { fd - 1 };
            // SAFETY: closing is the purpose; the doc obliges the caller not to use the owners.
            let rc = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0u32) };
            if rc != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        first = fd.saturating_add(1);
    }
    Ok(())
}

/// Make `fd` the process's descriptor number `target`, without close-on-exec. Only for a cloned
/// child that is about to execute, for the numbers 0, 1 and 2.
///
/// # Errors
/// The kernel's refusal.
pub fn install_stdio(fd: std::os::fd::BorrowedFd<'_>, target: RawFd) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    assert!(
        (0..=2).contains(&target),
        "only the three standard streams are installed"
    );
    if fd.as_raw_fd() == target {
        // dup2 onto itself would leave close-on-exec set.
        // SAFETY: clears a flag on a live descriptor.
        let rc = unsafe { libc::fcntl(target, libc::F_SETFD, 0) };
        return if rc == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        };
    }
    // SAFETY: replaces a standard stream, which Rust's std treats as always open and unowned.
    if unsafe { libc::dup2(fd.as_raw_fd(), target) } >= 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Hand unused heap pages back to the kernel (glibc's malloc_trim): the shim is idle for days
/// after a burst of parsing.
pub fn trim_heap() {
    // SAFETY: no preconditions; touches free pages of the allocator only.
    unsafe { libc::malloc_trim(0) };
}

/// The current time, nanoseconds since the epoch.
pub fn now_ns() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

/// A clock that never jumps, in milliseconds, for deadlines.
pub fn monotonic_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

fn prctl(option: i32, a: u64, b: u64, c: u64) -> io::Result<()> {
    // SAFETY: the options used here take plain numbers.
    if unsafe { libc::prctl(option, a, b, c, 0) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
