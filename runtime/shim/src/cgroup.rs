//! The few things the shim does to cgroups: kill what is in one, make and remove one for an exec
//! session, and learn of memory kills. Making and limiting containers' cgroups is the agent's.

use linux::process::pidfd;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Deepest tree below a container that is looked at; a container may nest its own.
const MAX_DEPTH: usize = 16;
/// Rounds of killing; one is enough where the kernel can freeze or kill a whole cgroup.
const MAX_ROUNDS: usize = 50;

/// Moves the calling process into a cgroup. It must have one thread.
///
/// v1 has a file for single threads besides the one for processes: moving oneself through it
/// spares the kernel's lock against forks, which costs a millisecond or more per hierarchy.
pub(crate) fn join(dir: &Path) -> io::Result<()> {
    let open = |name: &str| File::options().write(true).open(dir.join(name));
    let mut file = match open("tasks") {
        Err(e) if e.kind() == io::ErrorKind::NotFound => open("cgroup.procs")?,
        other => other?,
    };
    file.write_all(b"0")
}

/// Every process in the cgroup and below it, in the shim's PID namespace.
pub(crate) fn processes(dir: &Path) -> Vec<i32> {
    let mut pids = Vec::new();
    collect(dir, MAX_DEPTH, &mut pids);
    pids
}

fn collect(dir: &Path, depth: usize, pids: &mut Vec<i32>) {
    if let Ok(text) = std::fs::read_to_string(dir.join("cgroup.procs")) {
        // 0 stands for a process of another PID namespace's parent: not ours to touch.
        pids.extend(
            text.lines()
                .filter_map(|l| l.parse::<i32>().ok())
                .filter(|pid| *pid > 1),
        );
    }
    if depth == 0 {
        return;
    }
    let Ok(entries) = std::fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), depth - 1, pids);
        }
    }
}

/// The directory whose processes are all of a container's: the freezer's on v1 (it can stop them
/// while they are killed), the only one on v2.
pub(crate) fn tracking_dir(dirs: &[PathBuf]) -> Option<&PathBuf> {
    dirs.iter()
        .find(|dir| dir.join("freezer.state").exists())
        .or_else(|| dirs.first())
}

/// Kill everything in the cgroup. Nothing can escape by forking: v2 has cgroup.kill, on v1 the
/// processes are frozen while the signal is sent; without either it is repeated until empty.
pub(crate) fn kill_all(dir: &Path) {
    if std::fs::write(dir.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    let freezer = dir.join("freezer.state");
    let frozen = std::fs::write(&freezer, "FROZEN").is_ok();
    for _ in 0..if frozen { 1 } else { MAX_ROUNDS } {
        let pids = processes(dir);
        for pid in &pids {
            let _ = pidfd::kill(*pid, 9);
        }
        if pids.is_empty() {
            break;
        }
    }
    if frozen {
        let _ = std::fs::write(&freezer, "THAWED");
    }
}

/// Remove a cgroup of an exec session. What still runs in it (a daemon it started) belongs to
/// the container and moves up.
pub(crate) fn remove_session(dir: &Path) {
    for _ in 0..MAX_ROUNDS {
        match std::fs::remove_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
            Ok(()) | Err(_) => return,
        }
        let Some(parent) = dir.parent() else { return };
        for pid in processes(dir) {
            let _ = std::fs::write(parent.join("cgroup.procs"), pid.to_string());
        }
    }
}

/// A watch on memory kills in a container's cgroup.
#[derive(Debug)]
pub(crate) struct OomWatch {
    file: PathBuf,
    /// Becomes readable when something may have happened.
    pub(crate) wake: Option<OwnedFd>,
    /// Kills already told.
    pub(crate) seen: u64,
    /// v1 tells before it kills, so the count must be looked at again a little later.
    pub(crate) early: bool,
    /// Keeps the v1 notification alive.
    _control: Option<std::fs::File>,
}

impl OomWatch {
    /// Watch the memory cgroup among `dirs`; none when there is none.
    pub(crate) fn new(dirs: &[PathBuf]) -> Option<Self> {
        let v2 = dirs
            .iter()
            .map(|dir| dir.join("memory.events"))
            .find(|file| file.exists());
        if let Some(file) = v2 {
            let wake = linux::event::watch_modify(&file).ok();
            let seen = kills(&file);
            return Some(Self {
                file,
                wake,
                seen,
                early: false,
                _control: None,
            });
        }
        let dir = dirs
            .iter()
            .find(|dir| dir.join("memory.oom_control").exists())?;
        let file = dir.join("memory.oom_control");
        let (wake, control) = match notify_v1(dir, &file) {
            Ok((wake, control)) => (Some(wake), Some(control)),
            Err(error) => {
                eprintln!("cannot watch {}: {error}", file.display());
                (None, None)
            }
        };
        let seen = kills(&file);
        Some(Self {
            file,
            wake,
            seen,
            early: true,
            _control: control,
        })
    }

    /// Kills so far.
    pub(crate) fn count(&self) -> u64 {
        kills(&self.file)
    }
}

fn notify_v1(dir: &Path, file: &Path) -> io::Result<(OwnedFd, std::fs::File)> {
    let wake = linux::event::eventfd()?;
    let control = std::fs::File::open(file)?;
    std::fs::write(
        dir.join("cgroup.event_control"),
        format!("{} {}", wake.as_raw_fd(), control.as_raw_fd()),
    )?;
    Ok((wake, control))
}

fn kills(file: &Path) -> u64 {
    std::fs::read_to_string(file).map_or(0, |text| parse_kills(&text))
}

/// `oom_kill N` in memory.events (v2) and memory.oom_control (v1).
fn parse_kills(text: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_kills_are_counted_on_both_versions() {
        assert_eq!(
            parse_kills("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"),
            3
        );
        assert_eq!(
            parse_kills("low 0\nhigh 0\nmax 9\noom 2\noom_kill 1\noom_group_kill 0\n"),
            1
        );
        assert_eq!(parse_kills(""), 0);
    }
}
