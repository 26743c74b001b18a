//! NodeExpandVolume: image, device and filesystem grow to what was promised.

use crate::backend::{attach, grow, image};
use crate::driver::{Driver, check_name};
use crate::error::DriverError;
use crate::model::{CapacityRange, Kind};
use linux::blockfile;
use linux::loopdev::LoopDevice;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

impl Driver {
    /// Grows a volume that is staged or published at `path`. Its size then, in bytes.
    ///
    /// # Errors
    /// [`DriverError::NotFound`] when it is not there, [`DriverError::OutOfRange`] for less than
    /// it has.
    pub fn expand_node(
        &self,
        id: &str,
        path: &Path,
        range: CapacityRange,
    ) -> Result<u64, DriverError> {
        check_name("the volume's id", id)?;
        if path.as_os_str().is_empty() {
            return Err(DriverError::invalid("the volume's path is missing"));
        }
        let volume = self.volume(id)?;
        let _guard = self.locks.take([&volume.id])?;
        let path = self.found_at(&volume, path)?;
        let volume = self.promise(self.volume(id)?, range)?;
        if volume.kind == Kind::Directory {
            return Ok(volume.capacity_bytes);
        }
        let image = self.pool.image(&volume.id);
        let file = image::open(&image)?;
        self.extend_image(&volume, &file, &image)?;
        let Some(device) = attach::find(&file, &image)? else {
            return Err(DriverError::not_found("device of volume", id));
        };
        device
            .refresh_capacity()
            .map_err(DriverError::io("refresh", device.path().display()))?;
        match volume.kind {
            Kind::Filesystem(_) => self.grow_mounted(&device, &file, &image, &path)?,
            Kind::Block | Kind::Directory => {}
        }
        Ok(volume.capacity_bytes)
    }

    /// Lets the filesystem mounted at `path` have all of its device.
    pub(super) fn grow_mounted(
        &self,
        device: &LoopDevice,
        file: &File,
        image: &Path,
        path: &Path,
    ) -> Result<(), DriverError> {
        let bytes = blockfile::device_size(device.as_fd())
            .map_err(DriverError::io("measure", device.path().display()))?;
        let root = linux::fs::open_dir(path)?;
        // The mounted filesystem's superblock is the device's, and on the file only after a sync.
        rustix::fs::syncfs(&root).map_err(DriverError::io("sync", path.display()))?;
        match grow::mounted(root.as_fd(), file, image, bytes) {
            Ok(_) => Ok(()),
            Err(DriverError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::PermissionDenied =>
            {
                Err(DriverError::precondition(
                    "growing a mounted ext4 needs CAP_SYS_RESOURCE; it grows when the volume is \
                     staged the next time",
                ))
            }
            Err(error) => Err(error),
        }
    }
}
