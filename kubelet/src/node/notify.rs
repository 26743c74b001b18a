//! inotify for tasks: wake up when something in a directory, or a file, changes.
//!
//! Events are only a reason to look again; what exactly happened is not told.

use inotify::{Inotify, WatchMask};
use std::io;
use std::path::Path;
use tokio::io::unix::AsyncFd;

/// Bytes of events read at once; any number of events is one wake-up.
const BUFFER: usize = 4096;

/// What changes names and contents of a directory.
const DIRECTORY: WatchMask = WatchMask::CREATE
    .union(WatchMask::CLOSE_WRITE)
    .union(WatchMask::MOVED_TO)
    .union(WatchMask::MOVED_FROM)
    .union(WatchMask::DELETE)
    .union(WatchMask::DELETE_SELF)
    .union(WatchMask::MOVE_SELF);

/// Something watched. Dropping it ends the watch.
#[derive(Debug)]
pub struct PathWatch {
    fd: AsyncFd<Inotify>,
}

impl PathWatch {
    /// Watches names and contents of a directory.
    pub fn directory(path: &Path) -> io::Result<Self> {
        Self::new(path, DIRECTORY)
    }

    /// Watches names and contents of one more directory; again is no harm.
    pub fn also(&mut self, path: &Path) -> io::Result<()> {
        let mut watches = self.fd.get_ref().watches();
        watches.add(path, DIRECTORY).map(drop)
    }

    /// Watches a directory for new names and for growing files.
    pub fn growing(path: &Path) -> io::Result<Self> {
        Self::new(
            path,
            WatchMask::CREATE | WatchMask::MODIFY | WatchMask::MOVED_TO | WatchMask::DELETE_SELF,
        )
    }

    fn new(path: &Path, mask: WatchMask) -> io::Result<Self> {
        let inotify = Inotify::init()?;
        inotify.watches().add(path, mask)?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe; the descriptor is owned and lives as long as the watch"
        )]
        let fd = AsyncFd::new(inotify)?;
        Ok(Self { fd })
    }

    /// Waits for a change since the last call (or the creation). Cancel-safe: an event that was
    /// not taken stays in the kernel's queue.
    pub async fn changed(&mut self) -> io::Result<()> {
        loop {
            let mut guard = self.fd.readable_mut().await?;
            let mut buffer = [0u8; BUFFER];
            let read = guard.try_io(|fd| {
                let events = fd.get_mut().read_events(&mut buffer)?;
                Ok(events.count())
            });
            match read {
                Ok(Ok(0)) | Err(_) => {}
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(e)) => return Err(e),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_new_file_wakes() {
        let dir = tempfile::tempdir().unwrap();
        let mut watch = PathWatch::directory(dir.path()).unwrap();
        std::fs::write(dir.path().join("10-x.conflist"), "{}").unwrap();
        watch.changed().await.unwrap();
    }
}
