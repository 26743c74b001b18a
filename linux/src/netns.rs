//! Pinned network namespaces: bind mounts of a namespace file that keep it alive.
//!
//! The pod-shim pins; this module recognises and releases pins, for an agent whose shim died.

use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use std::io;
use std::path::{Path, PathBuf};

/// Filesystem type of namespace files (`NSFS_MAGIC`, magic.h).
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// A pin could not be released.
#[derive(Debug, thiserror::Error)]
pub enum UnpinError {
    /// Something that is no namespace is mounted there, or it is no empty file: not ours.
    #[error("release namespace pin {0}: it is not a namespace")]
    Foreign(PathBuf),
    /// The kernel refused.
    #[error("release namespace pin {path}")]
    Io {
        /// The pin.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Whether `path` is a live pin.
#[must_use]
pub fn is_pinned(path: &Path) -> bool {
    let Ok(found) = rustix::fs::statfs(path) else {
        return false;
    };
    u64::try_from(found.f_type) == Ok(NSFS_MAGIC)
}

/// Unmounts a pin and removes its file. One that is not there is fine; a file that is neither
/// a namespace nor empty is left alone.
///
/// # Errors
/// [`UnpinError`].
pub fn unpin(path: &Path) -> Result<(), UnpinError> {
    let io = |source: Errno| UnpinError::Io {
        path: path.to_owned(),
        source: source.into(),
    };
    // Pins can be stacked when two makers raced; each round removes one.
    while is_pinned(path) {
        match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Mounted in another namespace only (a private run directory): unlink suffices.
            Err(Errno::INVAL) => break,
            Err(e) => return Err(io(e)),
        }
    }
    match rustix::fs::lstat(path) {
        Err(Errno::NOENT) => return Ok(()),
        Err(e) => return Err(io(e)),
        Ok(stat) => {
            let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
            if kind != rustix::fs::FileType::RegularFile || stat.st_size != 0 {
                return Err(UnpinError::Foreign(path.to_owned()));
            }
        }
    }
    match rustix::fs::unlink(path) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(io(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_namespace_file_is_recognised_and_a_plain_file_is_not() {
        assert!(is_pinned(Path::new("/proc/self/ns/net")));
        assert!(!is_pinned(Path::new("/proc/self/status")));
        assert!(!is_pinned(Path::new("/nowhere")));
    }

    #[test]
    fn a_file_with_content_is_not_taken_for_a_pin() {
        let path = std::env::temp_dir().join(format!("pin-{}", std::process::id()));
        std::fs::write(&path, "data").unwrap();
        assert!(matches!(unpin(&path), Err(UnpinError::Foreign(_))));
        std::fs::write(&path, "").unwrap();
        unpin(&path).unwrap();
        assert!(!path.exists());
        unpin(&path).unwrap();
    }
}
