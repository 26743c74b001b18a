//! NodeGetVolumeStats.

use super::stage::check_path;
use crate::backend::mounts::Mounts;
use crate::driver::{Driver, check_name};
use crate::error::DriverError;
use crate::model::Kind;
use crate::store::VolumeRecord;
use std::path::{Path, PathBuf};

/// What of something is used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Altogether.
    pub total: u64,
    /// Used.
    pub used: u64,
    /// Left for users.
    pub available: u64,
}

impl Driver {
    /// Bytes and inodes of a volume that is at `path`; a device has no inodes and only a size.
    ///
    /// # Errors
    /// [`DriverError::NotFound`] when it is not there.
    pub fn stats(&self, id: &str, path: &Path) -> Result<(Usage, Option<Usage>), DriverError> {
        check_name("the volume's id", id)?;
        if path.as_os_str().is_empty() {
            return Err(DriverError::invalid("the volume's path is missing"));
        }
        let volume = self.volume(id)?;
        let path = self.found_at(&volume, path)?;
        if volume.kind == Kind::Block {
            let total = volume.capacity_bytes;
            let size = Usage {
                total,
                ..Usage::default()
            };
            return Ok((size, None));
        }
        let stat =
            rustix::fs::statvfs(&path).map_err(DriverError::io("inspect", path.display()))?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        let space = Usage {
            total: bytes(stat.f_blocks),
            used: bytes(stat.f_blocks.saturating_sub(stat.f_bfree)),
            available: bytes(stat.f_bavail),
        };
        let inodes = Usage {
            total: stat.f_files,
            used: stat.f_files.saturating_sub(stat.f_ffree),
            available: stat.f_favail,
        };
        Ok((space, Some(inodes)))
    }

    /// The path, if it shows the volume.
    pub(super) fn found_at(
        &self,
        volume: &VolumeRecord,
        path: &Path,
    ) -> Result<PathBuf, DriverError> {
        let missing = || DriverError::NotFound {
            what: "volume",
            id: format!("{} at {}", volume.id, path.display()),
        };
        if !path.is_absolute() {
            return Err(missing());
        }
        let path = check_path("the volume's path", path)?;
        let mounts = Mounts::read(self.pool.root())?;
        let owner = mounts.top(&path).and_then(|top| mounts.owner(top));
        if owner.as_ref() == Some(&volume.id) {
            return Ok(path);
        }
        // A staged device has no mount of its own; the path is the directory it was staged with.
        let attached = volume.kind == Kind::Block && self.is_in_use(volume)? && path.exists();
        if attached { Ok(path) } else { Err(missing()) }
    }
}
