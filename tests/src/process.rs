//! Long-lived processes of a lab: started detached, known by pid *and* start time, so that
//! nothing is ever signalled that only inherited a number.

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Environment variable every process of a lab carries; its value is `<lab>` or
/// `<lab>/<node>`. It proves
/// ownership even when the program that started it died before it could write the record.
pub const OWNER_VARIABLE: &str = "FERRULE_LAB_OWNER";

/// A process that cannot be confused with a later one of the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since boot, field 22 of `/proc/<pid>/stat`.
    pub start_time: u64,
}

impl ProcessIdentity {
    /// The process that has this number now; `None` when there is none or it has already exited.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (state, start_time) = parse_stat(&stat)?;
        (state != 'Z' && state != 'X').then_some(Self { pid, start_time })
    }

    /// Whether it still runs.
    #[must_use]
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends a signal; `false` when the process is already gone.
    ///
    /// # Errors
    /// When the kernel refuses for another reason.
    pub fn signal(self, signal: Signal) -> Result<bool> {
        let Some(fd) = self.open()? else {
            return Ok(false);
        };
        match pidfd_send_signal(&fd, signal) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::SRCH) => Ok(false),
            Err(error) => Err(error).with_context(|| format!("signal process {}", self.pid)),
        }
    }

    /// Waits until it has exited; `false` when `limit` passed first.
    ///
    /// # Errors
    /// When the process cannot be watched.
    pub fn wait_gone(self, limit: Duration) -> Result<bool> {
        let Some(fd) = self.open()? else {
            return Ok(true);
        };
        let timeout = Timespec::try_from(limit).context("time limit out of range")?;
        let ready = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout))
            .with_context(|| format!("wait for process {}", self.pid))?;
        Ok(ready > 0)
    }

    fn open(self) -> Result<Option<rustix::fd::OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid) else {
            return Ok(None);
        };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("open process {}", self.pid));
            }
        };
        // Compared after the descriptor is held: from here on the number cannot be reused.
        Ok((Self::of(self.pid) == Some(self)).then_some(fd))
    }
}

/// State letter and start time from the text of `/proc/<pid>/stat`. The command name may hold
/// spaces and parentheses, so fields are counted from the last closing one.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let start_time = fields.nth(18)?.parse().ok()?;
    Some((state, start_time))
}

/// Processor time a process has used, from fields 14 and 15 of `/proc/<pid>/stat`; `None` when
/// there is no such process.
#[must_use]
pub fn processor_time(pid: i32) -> Option<Duration> {
    /// Ticks per second of every Linux this runs on (USER_HZ).
    const TICKS: u64 = 100;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(Duration::from_millis((user + system) * 1000 / TICKS))
}

/// Kills and waits; "already gone" is success.
///
/// # Errors
/// When a signal is refused or the process outlives `limit`.
pub fn kill(process: ProcessIdentity, limit: Duration) -> Result<()> {
    if process.signal(Signal::KILL)? {
        anyhow::ensure!(
            process.wait_gone(limit)?,
            "process {} did not exit within {limit:?} after SIGKILL",
            process.pid
        );
    }
    Ok(())
}

/// Asks to end, and kills after `grace`.
///
/// # Errors
/// As [`kill`].
pub fn stop(process: ProcessIdentity, grace: Duration) -> Result<()> {
    if process.signal(Signal::TERM)? && !process.wait_gone(grace)? {
        kill(process, Duration::from_secs(10))?;
    }
    Ok(())
}

/// What to start and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessSpec {
    /// Program file.
    pub program: PathBuf,
    /// Its arguments, without the program's name.
    pub args: Vec<String>,
    /// Variables added to the environment.
    pub env: Vec<(String, String)>,
    /// A process whose network, mount and UTS namespaces it runs in.
    pub namespaces_of: Option<i32>,
    /// Directories of cgroups it is put into before it starts.
    pub cgroups: Vec<PathBuf>,
}

impl ProcessSpec {
    /// A program with arguments, in our own namespaces.
    #[must_use]
    pub fn new(program: impl Into<PathBuf>, args: Vec<String>) -> Self {
        Self {
            program: program.into(),
            args,
            env: Vec::new(),
            namespaces_of: None,
            cgroups: Vec::new(),
        }
    }

    /// Changes whenever a running process should be replaced: other arguments, or another file
    /// under the program's name.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        use std::os::unix::fs::MetadataExt;
        let file = fs::metadata(&self.program)
            .map(|meta| format!("{}:{}:{}", meta.len(), meta.mtime(), meta.mtime_nsec()))
            .unwrap_or_default();
        format!(
            "{} {file} {:?} {:?}",
            self.program.display(),
            self.args,
            self.env
        )
    }

    fn command(&self) -> Command {
        // setsid and nsenter both end in exec: the pid we get is the program's own.
        let mut command = Command::new("setsid");
        if let Some(pid) = self.namespaces_of {
            command
                .args(["nsenter", "--target", &pid.to_string()])
                .args(["--net", "--mount", "--uts", "--"]);
        }
        if !self.cgroups.is_empty() {
            command.args(["sh", "-c", JOIN_CGROUPS_THEN_EXEC, "sh"]);
            command.arg(self.cgroups.len().to_string());
            command.args(&self.cgroups);
        }
        command.arg(&self.program).args(&self.args);
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }
}

/// Joins the N directories named after the count, then becomes the program that follows.
const JOIN_CGROUPS_THEN_EXEC: &str = "n=$1; shift; while [ $n -gt 0 ]; do \
    echo $$ > \"$1/cgroup.procs\" || exit 1; shift; n=$((n-1)); done; exec \"$@\"";

/// Starts a process that outlives us, with its output appended to `log`.
///
/// # Errors
/// When it cannot be started or is gone at once.
pub fn spawn_detached(spec: &ProcessSpec, owner: &str, log: &Path) -> Result<ProcessIdentity> {
    let out = open_log(log)?;
    let err = out.try_clone().context("duplicate the log's descriptor")?;
    let mut command = spec.command();
    command
        .env(OWNER_VARIABLE, owner)
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .current_dir("/");
    let mut child = command
        .spawn()
        .with_context(|| format!("start {}", spec.program.display()))?;
    let pid = i32::try_from(child.id()).context("process id out of range")?;
    let identity = ProcessIdentity::of(pid).with_context(|| {
        format!(
            "{} exited at once; see {}",
            spec.program.display(),
            log.display()
        )
    })?;
    // Reaps it while we live; afterwards init does.
    std::thread::spawn(move || child.wait());
    Ok(identity)
}

/// Starts a process that holds new network, mount and UTS namespaces open, and returns when they
/// exist.
///
/// # Errors
/// When the namespaces cannot be made.
pub fn spawn_namespace_holder(hostname: &str, owner: &str, log: &Path) -> Result<ProcessIdentity> {
    use std::io::{BufRead, BufReader};
    let mut child = Command::new("setsid")
        .args([
            "unshare",
            "--net",
            "--mount",
            "--uts",
            "--propagation",
            "private",
            "--",
        ])
        .args([
            "sh",
            "-c",
            "hostname \"$1\" && echo ready && exec sleep infinity",
            "sh",
            hostname,
        ])
        .env(OWNER_VARIABLE, owner)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(open_log(log)?)
        .current_dir("/")
        .spawn()
        .context("start unshare")?;
    let pid = i32::try_from(child.id()).context("process id out of range")?;
    let mut line = String::new();
    let stdout = child
        .stdout
        .take()
        .context("standard output was not piped")?;
    BufReader::new(stdout)
        .read_line(&mut line)
        .context("read from the namespace holder")?;
    anyhow::ensure!(
        line.trim() == "ready",
        "the namespaces of {hostname} cannot be made; see {}",
        log.display()
    );
    let identity = ProcessIdentity::of(pid).context("the namespace holder exited at once")?;
    std::thread::spawn(move || child.wait());
    Ok(identity)
}

fn open_log(log: &Path) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("open log {}", log.display()))
}

/// Every living process whose environment names an owner, with the owner's name. The environment
/// is the one it was started with; a program cannot lose it by accident.
#[must_use]
pub fn owned() -> Vec<(ProcessIdentity, String)> {
    let prefix = format!("{OWNER_VARIABLE}=");
    let owner = |pid: i32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
        environment.split(|byte| *byte == 0).find_map(|entry| {
            let entry = std::str::from_utf8(entry).ok()?;
            entry.strip_prefix(&prefix).map(str::to_owned)
        })
    };
    all()
        .into_iter()
        .filter_map(|process| Some((process, owner(process.pid)?)))
        .collect()
}

/// Every living process of the machine.
#[must_use]
pub fn all() -> Vec<ProcessIdentity> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(ProcessIdentity::of)
        .collect()
}

/// Retries `attempt` until it gives a value, `limit` passes, or `abort` names a reason to stop.
/// For the few things that have no event to wait for, such as a server's first answer.
///
/// # Errors
/// When the limit passes or `abort` returns an error; the last failure is part of the message.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut abort: impl FnMut() -> Result<()>,
    mut attempt: impl FnMut() -> Result<T>,
) -> Result<T> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(50);
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() > limit => {
                return Err(error).with_context(|| format!("waited {limit:?} for {what}"));
            }
            Err(_) => abort()?,
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(500));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_name_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let stat = "12 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        assert_eq!(parse_stat(stat), Some(('S', 4242)));
    }

    #[test]
    fn a_process_is_itself_and_not_another_of_the_same_number() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let me = ProcessIdentity::of(pid).unwrap();
        assert!(me.is_alive());
        let other = ProcessIdentity {
            start_time: me.start_time + 1,
            ..me
        };
        assert!(!other.is_alive());
        assert!(!other.signal(Signal::CONT).unwrap());
    }

    #[test]
    fn a_killed_process_is_waited_for_by_event() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = ProcessIdentity::of(i32::try_from(child.id()).unwrap()).unwrap();
        kill(process, Duration::from_secs(5)).unwrap();
        assert!(!process.is_alive());
        child.wait().unwrap();
    }
}
