//! Who is mounted where, as the kernel says.

use crate::error::DriverError;
use crate::model::VolumeId;
use linux::failpoint::step;
use linux::loopdev::{self, LOOP_MAJOR};
use linux::mount::{self, MountAttrs, device};
use linux::mountinfo::{self, MountEntry};
use rustix::fs::{FileType, Mode, OFlags};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Mounts at one path that are taken away at most: more is not ours to understand.
const MOST_STACKED: usize = 64;

/// The mounts of this namespace at one moment.
#[derive(Debug)]
pub struct Mounts {
    entries: Vec<MountEntry>,
    /// Device number of the filesystem the pool is on.
    pool: u64,
}

impl Mounts {
    /// Reads them. `pool` is where directory volumes are.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn read(pool: &Path) -> Result<Self, DriverError> {
        let entries = mountinfo::read().map_err(DriverError::io("read", "the mount table"))?;
        let stat = rustix::fs::stat(pool).map_err(DriverError::io("inspect", pool.display()))?;
        Ok(Self {
            entries,
            pool: stat.st_dev,
        })
    }

    /// The topmost mount at exactly this path.
    #[must_use]
    pub fn top(&self, path: &Path) -> Option<&MountEntry> {
        self.entries
            .iter()
            .rev()
            .find(|entry| entry.mount_point == path)
    }

    /// All mounts of a volume.
    #[must_use]
    pub fn of(&self, id: &VolumeId) -> Vec<&MountEntry> {
        let mut found: Vec<&MountEntry> = self
            .entries
            .iter()
            .filter(|entry| self.owner(entry).as_ref() == Some(id))
            .collect();
        // What lies under another mount cannot be reached by its path.
        found.retain(|entry| self.top(&entry.mount_point) == Some(entry));
        found
    }

    /// Whose volume a mount shows; none when it is none of ours. A name that says so is not
    /// enough where bytes are at stake: then the inode behind the device is compared as well.
    #[must_use]
    pub fn owner(&self, entry: &MountEntry) -> Option<VolumeId> {
        if entry.device.0 == LOOP_MAJOR {
            return self.loop_owner(entry.device.1);
        }
        let root = entry.root.to_str()?;
        // A device node, bound: the node's name is what there is without touching the path.
        if let Some(index) = root.rsplit('/').next()?.strip_prefix("loop")
            && let Ok(index) = index.parse()
        {
            let stat = rustix::fs::stat(&entry.mount_point).ok()?;
            let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
            let same = rustix::fs::major(stat.st_rdev) == LOOP_MAJOR
                && rustix::fs::minor(stat.st_rdev) == index;
            return if is_device && same {
                self.loop_owner(index)
            } else {
                None
            };
        }
        let (before, data) = root.rsplit_once('/')?;
        let (before, id) = before.rsplit_once('/')?;
        let id = VolumeId::parse(id)?;
        if !data.starts_with("data") || !before.ends_with("/volumes") {
            return None;
        }
        let device = (rustix::fs::major(self.pool), rustix::fs::minor(self.pool));
        (device == entry.device).then_some(id)
    }

    /// The volume a loop device says it belongs to, if its file is where our volumes are.
    fn loop_owner(&self, index: u32) -> Option<VolumeId> {
        let status = loopdev::open(index).ok()?.status().ok()?;
        let id = VolumeId::parse(&status.name)?;
        (status.backing_device == self.pool).then_some(id)
    }
}

/// Whether a mount takes no writes, of its own or as its filesystem.
#[must_use]
pub fn is_read_only(entry: &MountEntry) -> bool {
    entry.options.split(',').any(|option| option == "ro")
}

/// The path as the kernel's tables show it: without symbolic links on the way. The last part
/// need not exist.
///
/// # Errors
/// [`DriverError::Invalid`] for a path that names nothing; [`DriverError::Io`].
pub fn resolve(path: &Path) -> Result<PathBuf, DriverError> {
    if let Ok(path) = path.canonicalize() {
        return Ok(path);
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(DriverError::invalid(format!(
            "{} names no file or directory",
            path.display()
        )));
    };
    match parent.canonicalize() {
        Ok(parent) => Ok(parent.join(name)),
        // Where the parent is missing nothing can be mounted.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(path.to_owned()),
        Err(e) => Err(DriverError::io("resolve", parent.display())(e)),
    }
}

/// Shows at `target` what is at `source`, and nothing below it.
///
/// # Errors
/// [`DriverError::Io`].
pub fn bind(source: &Path, target: &Path, attrs: MountAttrs) -> Result<(), DriverError> {
    let from = open_path(source)?;
    let tree = mount::clone_fd(from.as_fd(), false)
        .map_err(DriverError::io("take the mount", source.display()))?;
    mount::add_attrs(tree.as_fd(), attrs, false)
        .map_err(DriverError::io("set the attributes of", target.display()))?;
    let to = open_path(target)?;
    step();
    mount::attach(tree.as_fd(), to.as_fd()).map_err(DriverError::io("mount", target.display()))?;
    step();
    Ok(())
}

fn open_path(path: &Path) -> Result<OwnedFd, DriverError> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(DriverError::io("open", path.display()))
}

/// Takes away what of this volume is mounted at a path, however often, and sees that it is gone.
///
/// # Errors
/// [`DriverError::Precondition`] when something else is mounted there; [`DriverError::Io`] with
/// `EBUSY` when it is in use.
pub fn unmount_all(pool: &Path, id: &str, path: &Path) -> Result<(), DriverError> {
    for _ in 0..MOST_STACKED {
        let mounts = Mounts::read(pool)?;
        let Some(top) = mounts.top(path) else {
            return Ok(());
        };
        let owner = mounts.owner(top);
        if owner.as_ref().is_none_or(|owner| owner.as_str() != id) {
            return Err(DriverError::precondition(format!(
                "{} is a mount of {} and not of volume {id}",
                path.display(),
                owner.map_or_else(|| top.source.clone(), |owner| owner.to_string()),
            )));
        }
        step();
        device::unmount(path).map_err(DriverError::io("unmount", path.display()))?;
        step();
    }
    Err(DriverError::precondition(format!(
        "more than {MOST_STACKED} mounts at {}",
        path.display()
    )))
}

/// Removes the empty directory or file something was mounted on; that it is not there is fine.
/// What is in a directory stays: it was written past the volume, and somebody may miss it.
///
/// # Errors
/// [`DriverError::Precondition`] when it is not empty.
pub fn remove_mount_point(path: &Path) -> Result<(), DriverError> {
    use rustix::fs::{AtFlags, CWD, unlinkat};
    use rustix::io::Errno;
    step();
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(DriverError::io("inspect", path.display())(e)),
    };
    let removed = if meta.is_dir() {
        unlinkat(CWD, path, AtFlags::REMOVEDIR)
    } else if meta.is_file() && meta.len() == 0 {
        unlinkat(CWD, path, AtFlags::empty())
    } else {
        Err(Errno::NOTEMPTY)
    };
    match removed {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::NOTEMPTY | Errno::EXIST) => Err(DriverError::precondition(format!(
            "{} is not mounted and holds files that are not in the volume; move them away",
            path.display()
        ))),
        Err(e) => Err(DriverError::io("remove", path.display())(e)),
    }
}
