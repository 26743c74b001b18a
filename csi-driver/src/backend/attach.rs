//! Images as loop devices. An image has one device at most: two would each have a cache of their
//! own over the same bytes.

use crate::error::DriverError;
use linux::failpoint::step;
use linux::loopdev::{self, LoopDevice, LoopOptions};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// How an image is attached.
#[derive(Debug, Clone, Copy)]
pub struct Attachment<'a> {
    /// Id of the volume; seen in `losetup`, and how a mount tells whose it is.
    pub name: &'a str,
    /// The device goes with its last mount.
    pub autoclear: bool,
    /// Past the page cache of the image.
    pub direct_io: bool,
    /// How far the kernel reads ahead; none for its own choice.
    pub read_ahead_kib: Option<u32>,
}

/// The device of an image, held open; none when it has none.
///
/// # Errors
/// [`DriverError::Io`].
pub fn find(file: &File, image: &Path) -> Result<Option<LoopDevice>, DriverError> {
    let meta = file
        .metadata()
        .map_err(DriverError::io("inspect", image.display()))?;
    let found = loopdev::find(meta.dev(), meta.ino())
        .map_err(DriverError::io("look for the device of", image.display()))?;
    Ok(found.into_iter().next())
}

/// The device of an image, held open; one is made when there is none.
///
/// # Errors
/// [`DriverError::Io`].
pub fn ensure(
    file: &File,
    image: &Path,
    attachment: Attachment<'_>,
) -> Result<LoopDevice, DriverError> {
    if let Some(device) = find(file, image)? {
        return Ok(device);
    }
    let options = LoopOptions {
        read_only: false,
        autoclear: attachment.autoclear,
        direct_io: attachment.direct_io,
        name: attachment.name,
    };
    step();
    let device = loopdev::attach(file.as_fd(), options)
        .map_err(DriverError::io("attach", image.display()))?;
    step();
    if let Some(kib) = attachment.read_ahead_kib {
        set_read_ahead(&device, kib)?;
    }
    Ok(device)
}

/// Sets how far the kernel reads ahead on a device.
///
/// # Errors
/// [`DriverError::Io`].
pub fn set_read_ahead(device: &LoopDevice, kib: u32) -> Result<(), DriverError> {
    let path = format!("/sys/block/loop{}/queue/read_ahead_kb", device.index);
    std::fs::write(&path, kib.to_string()).map_err(DriverError::io("write", path))
}
