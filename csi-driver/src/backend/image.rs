//! Image files: made, filled, grown.

use crate::error::DriverError;
use crate::model::Provision;
use crate::store::sync_dir;
use linux::blockfile;
use linux::failpoint::step;
use linux::fs;
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Makes a directory of our own with an empty image in it. Neither may be there yet.
///
/// # Errors
/// [`DriverError::Io`]; `EEXIST` when something is there.
pub fn create(dir: &Path, image: &Path) -> Result<File, DriverError> {
    create_dir(dir)?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    step();
    let file = rustix::fs::open(image, flags, Mode::from_raw_mode(0o600))
        .map_err(DriverError::io("create", image.display()))?;
    step();
    Ok(File::from(file))
}

/// Makes a directory of our own, which may not be there yet.
///
/// # Errors
/// [`DriverError::Io`]; `EEXIST` when something is there.
pub fn create_dir(dir: &Path) -> Result<(), DriverError> {
    step();
    rustix::fs::mkdir(dir, Mode::from_raw_mode(0o700))
        .map_err(DriverError::io("make directory", dir.display()))?;
    step();
    Ok(())
}

/// Opens an image for reading and writing, and sees that it is a file.
///
/// # Errors
/// [`DriverError::Io`].
pub fn open(image: &Path) -> Result<File, DriverError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = rustix::fs::open(image, flags, Mode::empty())
        .map_err(DriverError::io("open", image.display()))?;
    let file = File::from(file);
    let meta = file
        .metadata()
        .map_err(DriverError::io("inspect", image.display()))?;
    if !meta.is_file() {
        let error = std::io::Error::from_raw_os_error(22);
        return Err(DriverError::io("use as an image", image.display())(error));
    }
    Ok(file)
}

/// Makes an image this long: with all its blocks when it is thick, with holes when it is thin.
/// One that is longer stays.
///
/// # Errors
/// [`DriverError::Io`]; `ENOSPC` when the pool is full.
pub fn extend(
    file: &File,
    image: &Path,
    bytes: u64,
    provision: Provision,
) -> Result<(), DriverError> {
    step();
    match provision {
        Provision::Thick => blockfile::allocate(file.as_fd(), bytes)
            .map_err(DriverError::io("allocate", image.display()))?,
        Provision::Thin => {
            let length = file
                .metadata()
                .map_err(DriverError::io("inspect", image.display()))?
                .len();
            if length < bytes {
                file.set_len(bytes)
                    .map_err(DriverError::io("extend", image.display()))?;
            }
        }
    }
    step();
    Ok(())
}

/// Copies the data of one image into another, sharing blocks where the pool can.
///
/// # Errors
/// [`DriverError::Io`]; `ECANCELED` when `go_on` said no between two pieces.
pub fn fill(
    from: &File,
    to: &File,
    image: &Path,
    share: bool,
    go_on: impl FnMut() -> bool,
) -> Result<(), DriverError> {
    step();
    if share {
        blockfile::share_blocks(from.as_fd(), to.as_fd())
            .map_err(DriverError::io("share blocks with", image.display()))?;
    } else {
        let length = from
            .metadata()
            .map_err(DriverError::io("inspect the source of", image.display()))?
            .len();
        to.set_len(length)
            .map_err(DriverError::io("extend", image.display()))?;
        blockfile::copy_data(from, to, go_on)
            .map_err(DriverError::io("copy to", image.display()))?;
    }
    step();
    Ok(())
}

/// Makes an image and the directory it is in last.
///
/// # Errors
/// [`DriverError::Io`].
pub fn settle(file: &File, dir: &Path) -> Result<(), DriverError> {
    step();
    file.sync_all()
        .map_err(DriverError::io("sync the image in", dir.display()))?;
    settle_dir(dir)
}

/// Makes a directory and its entry last.
///
/// # Errors
/// [`DriverError::Fs`] or [`DriverError::Io`].
pub fn settle_dir(dir: &Path) -> Result<(), DriverError> {
    sync_dir(dir)?;
    if let Some(parent) = dir.parent() {
        sync_dir(parent)?;
    }
    step();
    Ok(())
}

/// Bytes of blocks a file has.
///
/// # Errors
/// [`DriverError::Io`].
pub fn allocated_bytes(file: &File, image: &Path) -> Result<u64, DriverError> {
    let meta = file
        .metadata()
        .map_err(DriverError::io("inspect", image.display()))?;
    Ok(meta.blocks().saturating_mul(512))
}

/// Whether there is anything at a path.
///
/// # Errors
/// When it cannot be told.
pub fn exists(path: &Path) -> Result<bool, DriverError> {
    path.try_exists()
        .map_err(DriverError::io("look for", path.display()))
}

/// Makes the directory something is mounted on, or sees that it is there.
///
/// # Errors
/// [`DriverError::Fs`].
pub fn ensure_mount_dir(path: &Path) -> Result<(), DriverError> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o750)) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::EXIST) if path.is_dir() => Ok(()),
        Err(rustix::io::Errno::NOENT) => Ok(fs::create_dirs(path, 0o750)?),
        Err(e) => Err(DriverError::io("make directory", path.display())(e)),
    }
}

/// Makes the file a device is mounted on, or sees that it is there.
///
/// # Errors
/// [`DriverError::Io`].
pub fn ensure_mount_file(path: &Path) -> Result<(), DriverError> {
    if let Some(parent) = path.parent() {
        fs::create_dirs(parent, 0o750)?;
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    match rustix::fs::open(path, flags, Mode::from_raw_mode(0o600)) {
        Ok(_) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(e) => Err(DriverError::io("create", path.display())(e)),
    }
}
