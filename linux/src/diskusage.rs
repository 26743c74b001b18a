//! How much disk the files below a directory take, without forking `du`.
//!
//! Counts allocated blocks and inodes as `du -x` does: files with several names once, directories
//! themselves included. Never leaves the mount it starts in (`RESOLVE_NO_XDEV`, which also stops
//! at bind mounts of the same filesystem) and follows no symbolic link. Holds two descriptors,
//! however deep the tree is.

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, ResolveFlags, StatxFlags};
use rustix::io::Errno;
use std::collections::HashSet;
use std::ffi::{CStr, OsStr};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Longest path given to the kernel at once; deeper directories are reached in several steps.
const HOP_BYTES: usize = 3000;

/// What a tree takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskUsage {
    /// Allocated bytes.
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
    /// Whether all of it was looked at: false when it is greater than the budget.
    pub complete: bool,
}

/// Measures a directory, or a single file. At most `budget` entries are looked at. What vanishes
/// meanwhile counts as nothing.
///
/// # Errors
/// When `root` cannot be opened.
pub fn measure(root: &Path, budget: u64) -> io::Result<DiskUsage> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = rustix::fs::openat(CWD, root, flags, Mode::empty())?;
    let mut walk = Walk {
        usage: DiskUsage {
            complete: true,
            ..DiskUsage::default()
        },
        left: budget,
        seen: HashSet::new(),
        pending: Vec::new(),
    };
    if walk.count(top.as_fd(), c"", PathBuf::new) == Some(FileType::Directory) {
        walk.pending.push(PathBuf::new());
    }
    while let Some(path) = walk.pending.pop() {
        match walk.directory(&top, &path) {
            // Vanished, turned into something else, or another mount.
            Ok(()) | Err(Errno::NOENT | Errno::NOTDIR | Errno::XDEV | Errno::LOOP) => {}
            Err(_) => walk.usage.complete = false,
        }
    }
    Ok(walk.usage)
}

struct Walk {
    usage: DiskUsage,
    left: u64,
    /// Inodes with several names; all are on one filesystem.
    seen: HashSet<u64>,
    /// Directories still to be read, relative to the root.
    pending: Vec<PathBuf>,
}

impl Walk {
    /// Counts one entry; what it is, when it is there.
    fn count(
        &mut self,
        dir: impl AsFd,
        name: &CStr,
        path: impl FnOnce() -> PathBuf,
    ) -> Option<FileType> {
        let wanted = StatxFlags::TYPE | StatxFlags::BLOCKS | StatxFlags::INO | StatxFlags::NLINK;
        let mut at = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        if name.is_empty() {
            at |= AtFlags::EMPTY_PATH;
        }
        let found = rustix::fs::statx(dir, name, at, wanted).ok()?;
        let kind = FileType::from_raw_mode(found.stx_mode.into());
        if kind != FileType::Directory && found.stx_nlink > 1 && !self.seen.insert(found.stx_ino) {
            return Some(kind);
        }
        self.usage.inodes += 1;
        self.usage.bytes += found.stx_blocks * 512;
        if kind == FileType::Directory && !name.is_empty() {
            self.pending.push(path());
        }
        Some(kind)
    }

    fn directory(&mut self, top: &OwnedFd, path: &Path) -> Result<(), Errno> {
        let dir = open_below(top, path)?;
        let mut buffer = [MaybeUninit::<u8>::uninit(); 8192];
        let mut entries = RawDir::new(dir.as_fd(), &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            if self.left == 0 {
                self.usage.complete = false;
                self.pending.clear();
                return Ok(());
            }
            self.left -= 1;
            let full = || path.join(OsStr::from_bytes(name.to_bytes()));
            self.count(&dir, name, full);
        }
        Ok(())
    }
}

/// Opens a directory below `top` on the same mount, in steps the kernel accepts.
fn open_below(top: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let hop = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = |at: &OwnedFd, path: &Path, flags| {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        rustix::fs::openat2(at, path, flags, Mode::empty(), resolve)
    };
    let mut at: Option<OwnedFd> = None;
    let mut part = PathBuf::new();
    for component in path.components() {
        if part.as_os_str().len() + component.as_os_str().len() > HOP_BYTES {
            at = Some(open(at.as_ref().unwrap_or(top), &part, hop)?);
            part.clear();
        }
        part.push(component);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    open(at.as_ref().unwrap_or(top), &part, flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_count_once_however_many_names_they_have() {
        let dir = tempfile::tempdir().unwrap();
        let before = measure(dir.path(), 100).unwrap();
        assert_eq!((before.inodes, before.complete), (1, true));
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::fs::write(dir.path().join("a/f"), vec![1u8; 100_000]).unwrap();
        std::fs::hard_link(dir.path().join("a/f"), dir.path().join("g")).unwrap();
        std::os::unix::fs::symlink("/etc", dir.path().join("a/b/link")).unwrap();
        let after = measure(dir.path(), 100).unwrap();
        assert_eq!((after.inodes, after.complete), (5, true));
        let grown = after.bytes - before.bytes;
        assert!((100_000..200_000).contains(&grown), "{grown}");
        let file = measure(&dir.path().join("g"), 1).unwrap();
        assert_eq!(file.inodes, 1);
    }

    #[test]
    fn a_budget_ends_the_walk_and_is_told() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..10 {
            std::fs::write(dir.path().join(i.to_string()), "x").unwrap();
        }
        let cut = measure(dir.path(), 5).unwrap();
        assert!(!cut.complete && cut.inodes == 6);
        assert!(measure(&dir.path().join("none"), 5).is_err());
    }

    #[test]
    fn a_tree_deeper_than_any_path_is_measured() {
        let dir = tempfile::tempdir().unwrap();
        let name = "d".repeat(200);
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let mut at = rustix::fs::openat(CWD, dir.path(), flags, Mode::empty()).unwrap();
        let depth = 60;
        for _ in 0..depth {
            rustix::fs::mkdirat(&at, &name, Mode::RWXU).unwrap();
            at = rustix::fs::openat(&at, &name, flags, Mode::empty()).unwrap();
        }
        let found = measure(dir.path(), 1000).unwrap();
        assert_eq!((found.inodes, found.complete), (depth + 1, true));
        crate::fs::remove_tree(dir.path()).unwrap();
    }

    #[test]
    fn a_mount_below_is_not_entered() {
        let found = measure(Path::new("/proc/self"), 10);
        assert!(found.is_ok());
        // /dev has other filesystems in it (pts, shm, mqueue): none of their entries counts.
        let pts = std::fs::read_dir("/dev/pts").map_or(0, Iterator::count);
        let all = measure(Path::new("/dev"), 1_000_000).unwrap();
        let own = walkdir_same_device(Path::new("/dev"));
        assert!(all.inodes <= own + 1, "{} > {own}, pts {pts}", all.inodes);
    }

    fn walkdir_same_device(root: &Path) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let device = std::fs::metadata(root).unwrap().dev();
        let mut count = 1;
        for entry in std::fs::read_dir(root).unwrap().flatten() {
            let Ok(meta) = entry.path().symlink_metadata() else {
                continue;
            };
            if meta.is_dir() && meta.dev() == device {
                count += walkdir_same_device(&entry.path());
            } else {
                count += 1;
            }
        }
        count
    }
}
