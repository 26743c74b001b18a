//! Filesystems that follow their image, mounted or not, and copies made fit for use.

use super::attach::{self, Attachment};
use super::superblock::{self, Superblock};
use super::{format, image};
use crate::error::DriverError;
use crate::model::Filesystem;
use linux::blockfile;
use linux::failpoint::step;
use linux::mount::{self, MountAttrs};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// The filesystem in an image.
///
/// # Errors
/// [`DriverError::Io`] when it cannot be read, [`DriverError::Damaged`] when there is none or it
/// is not the expected one. Nothing is changed.
pub fn expect(
    file: &File,
    path: &Path,
    id: &str,
    filesystem: Filesystem,
    uuid: Option<&str>,
) -> Result<Superblock, DriverError> {
    let damaged = |what: String| DriverError::Damaged {
        id: id.to_owned(),
        what,
    };
    let found = superblock::read(file).map_err(DriverError::io("read", path.display()))?;
    let found = found.ok_or_else(|| damaged("its image holds no filesystem".to_owned()))?;
    if found.filesystem != filesystem {
        let (is, was) = (found.filesystem.name(), filesystem.name());
        return Err(damaged(format!("its image holds {is} and not {was}")));
    }
    if let Some(uuid) = uuid
        && found.uuid != uuid
    {
        let is = &found.uuid;
        return Err(damaged(format!(
            "its image holds filesystem {is} and not {uuid}"
        )));
    }
    Ok(found)
}

/// Grows a mounted filesystem to the size of its device; `root` is any directory in it. Whether
/// there was anything to do.
///
/// # Errors
/// [`DriverError::Io`]; `EPERM` for ext4 without CAP_SYS_RESOURCE.
pub fn mounted(
    root: BorrowedFd<'_>,
    file: &File,
    path: &Path,
    device_bytes: u64,
) -> Result<bool, DriverError> {
    let found = superblock::read(file).map_err(DriverError::io("read", path.display()))?;
    let Some(found) = found.filter(|found| found.block_bytes > 0) else {
        return Ok(false);
    };
    let blocks = device_bytes / found.block_bytes;
    if blocks <= found.blocks {
        return Ok(false);
    }
    step();
    match found.filesystem {
        Filesystem::Ext4 => blockfile::grow_ext4(root, blocks),
        Filesystem::Xfs => blockfile::grow_xfs(root, blocks, u32::from(found.inode_percent)),
    }
    .map_err(DriverError::io("grow the filesystem in", path.display()))?;
    step();
    Ok(true)
}

/// Makes a copied image fit for use while nobody has it: journal replayed, a UUID of its own, as
/// large as its file.
///
/// # Errors
/// [`DriverError::Program`] or [`DriverError::Io`].
pub fn renew(filesystem: Filesystem, path: &Path, id: &str, uuid: &str) -> Result<(), DriverError> {
    match filesystem {
        Filesystem::Ext4 => {
            format::check_ext4(path)?;
            format::grow_ext4(path)?;
        }
        Filesystem::Xfs => settle_xfs(path, id)?,
    }
    format::set_uuid(filesystem, path, uuid)
}

/// Brings an ext4 that nobody uses to the size of its file.
///
/// # Errors
/// [`DriverError::Program`].
pub fn unmounted_ext4(path: &Path) -> Result<(), DriverError> {
    format::check_ext4(path)?;
    format::grow_ext4(path)
}

/// Mounts an xfs where nobody sees it: that replays its log, which the kernel leaves dirty even
/// when it freezes, and lets it grow.
fn settle_xfs(path: &Path, id: &str) -> Result<(), DriverError> {
    let file = image::open(path)?;
    let attachment = Attachment {
        name: id,
        autoclear: true,
        direct_io: false,
        read_ahead_kib: None,
    };
    let device = attach::ensure(&file, path, attachment)?;
    let options = ["nouuid".to_owned()];
    let attrs = MountAttrs {
        nosuid: true,
        nodev: true,
        noexec: true,
        ..MountAttrs::default()
    };
    let source = device.path();
    step();
    let tree = mount::filesystem("xfs", &source.to_string_lossy(), &options, attrs)
        .map_err(DriverError::io("mount for its log", path.display()))?;
    let root: OwnedFd = rustix::fs::openat(
        &tree,
        ".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(DriverError::io("open the root of", path.display()))?;
    let bytes = blockfile::device_size(device.as_fd())
        .map_err(DriverError::io("measure", source.display()))?;
    mounted(root.as_fd(), &file, path, bytes)?;
    step();
    // The mount goes with its last descriptor, then the device with its mount.
    drop((root, tree));
    device
        .sync()
        .map_err(DriverError::io("sync", source.display()))?;
    drop(device);
    step();
    Ok(())
}
