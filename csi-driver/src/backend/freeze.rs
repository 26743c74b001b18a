//! Filesystems that hold still for a moment.
//!
//! Who freezes and then dies stops every writer for ever. So a second process, this program
//! again, holds the filesystem too: it thaws when its pipe closes, which a kill does, or when the
//! time is up. A file says on disk what is frozen, for the case that both die; the next start
//! thaws that.

use crate::error::DriverError;
use linux::blockfile;
use linux::failpoint::step;
use linux::fs;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use std::io::Read as _;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Word that makes this program the second process.
pub const WATCHDOG: &str = "thaw-watchdog";

/// Longest time writers are held while blocks are shared, which takes milliseconds.
pub const SHORT: Duration = Duration::from_secs(5);

/// Longest time writers are held while data is copied.
pub const LONG: Duration = Duration::from_secs(60);

/// A filesystem that holds still while this lives.
#[derive(Debug)]
pub struct Frozen {
    filesystem: OwnedFd,
    path: PathBuf,
    marker: PathBuf,
    watchdog: Child,
    /// When the watchdog thaws.
    pub until: Instant,
    thawed: bool,
}

impl Frozen {
    /// Freezes the filesystem mounted at `path`.
    ///
    /// # Errors
    /// [`DriverError::Io`]; `EBUSY` when somebody else froze it.
    pub fn new(
        path: &Path,
        marker: PathBuf,
        program: &Path,
        limit: Duration,
    ) -> Result<Self, DriverError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let filesystem = rustix::fs::open(path, flags, Mode::empty())
            .map_err(DriverError::io("open", path.display()))?;
        let watchdog = start_watchdog(&filesystem, program, limit)?;
        let mut frozen = Self {
            filesystem,
            path: path.to_owned(),
            marker,
            watchdog,
            until: Instant::now() + limit,
            thawed: true,
        };
        fs::write_atomic(&frozen.marker, b"", 0o600, fs::Durability::Process)?;
        step();
        blockfile::freeze(frozen.filesystem.as_fd())
            .map_err(DriverError::io("freeze", path.display()))?;
        step();
        frozen.thawed = false;
        Ok(frozen)
    }

    /// Lets writers go on.
    ///
    /// # Errors
    /// [`DriverError::Precondition`] when somebody thawed it before: what was taken meanwhile is
    /// not of one moment.
    pub fn thaw(mut self) -> Result<(), DriverError> {
        self.thawed = true;
        let was_frozen = blockfile::thaw(self.filesystem.as_fd())
            .map_err(DriverError::io("thaw", self.path.display()))?;
        step();
        if was_frozen {
            return Ok(());
        }
        Err(DriverError::precondition(format!(
            "{} could not be held still for long enough",
            self.path.display()
        )))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if !self.thawed {
            // The watchdog does it too, in a moment.
            let _ = blockfile::thaw(self.filesystem.as_fd());
        }
        drop(self.watchdog.stdin.take());
        let _ = self.watchdog.wait();
        let _ = fs::remove_file(&self.marker);
    }
}

fn start_watchdog(
    filesystem: &OwnedFd,
    program: &Path,
    limit: Duration,
) -> Result<Child, DriverError> {
    let failed = || DriverError::io::<std::io::Error>("start", program.display());
    let held = filesystem.try_clone().map_err(failed())?;
    let mut child = Command::new(program)
        .args([WATCHDOG, &limit.as_millis().to_string()])
        .env_clear()
        .stdin(Stdio::piped())
        // Its standard output is the filesystem: a number that needs no agreement.
        .stdout(Stdio::from(held))
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed())?;
    // Nothing is frozen before it is there to thaw it.
    let mut ready = [0];
    let read = match child.stderr.as_mut() {
        Some(stderr) => stderr.read_exact(&mut ready),
        None => Err(std::io::ErrorKind::BrokenPipe.into()),
    };
    if let Err(error) = read {
        let _ = child.kill();
        let _ = child.wait();
        return Err(failed()(error));
    }
    Ok(child)
}

/// The second process: waits until standard input closes or the time is up, then thaws the
/// filesystem that is its standard output.
///
/// # Errors
/// When it cannot say that it is there, or cannot thaw.
pub fn run_watchdog(limit: Duration) -> std::io::Result<()> {
    let (stdin, stdout) = (std::io::stdin(), std::io::stdout());
    rustix::io::write(std::io::stderr(), b".")?;
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(left) = Timespec::try_from(left) else {
            break;
        };
        let mut fds = [PollFd::new(&stdin, PollFlags::IN)];
        match poll(&mut fds, Some(&left)) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(_) | Err(_) => break,
        }
    }
    blockfile::thaw(stdout.as_fd())?;
    Ok(())
}
