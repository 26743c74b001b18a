//! A volume that does not change while it is copied.

use crate::backend::freeze::{self, Frozen};
use crate::backend::mounts::Mounts;
use crate::backend::{attach, image};
use crate::driver::Driver;
use crate::error::DriverError;
use crate::parameters::Consistency;
use crate::store::VolumeRecord;
use std::time::Instant;

/// What a copy taken now would be.
#[derive(Debug)]
pub(super) enum Stillness {
    /// Nobody has it open.
    Unused,
    /// Writers are held.
    Frozen(Box<Frozen>),
    /// Writers go on; the copy takes no time, so it is what a power cut would leave.
    Running,
}

impl Stillness {
    /// Holds a volume still, as far as it has to be.
    ///
    /// # Errors
    /// [`DriverError::Precondition`] when it is written and cannot be held still.
    pub(super) fn hold(
        driver: &Driver,
        volume: &VolumeRecord,
        consistency: Consistency,
    ) -> Result<Self, DriverError> {
        let path = driver.pool.image(&volume.id);
        let file = image::open(&path)?;
        let share = driver.pool.shares_blocks();
        let mounts = Mounts::read(driver.pool.root())?;
        let mounted = mounts.of(&volume.id);
        // A device is no filesystem, though it is mounted where it is published.
        let mounted = mounted.first().filter(|entry| entry.mount_point.is_dir());
        if let (Some(entry), Consistency::Freeze) = (mounted, consistency) {
            let limit = if share { freeze::SHORT } else { freeze::LONG };
            let marker = driver.pool.frozen(&volume.id);
            let program = &driver.config.program;
            let frozen = Frozen::new(&entry.mount_point, marker, program, limit)?;
            return Ok(Self::Frozen(Box::new(frozen)));
        }
        let Some(device) = attach::find(&file, &path)? else {
            return Ok(Self::Unused);
        };
        if !share {
            return Err(DriverError::precondition(format!(
                "volume {} is in use, and files cannot share blocks on this pool: it cannot be \
                 copied at one moment",
                volume.id
            )));
        }
        device
            .sync()
            .map_err(DriverError::io("sync", device.path().display()))?;
        Ok(Self::Running)
    }

    /// Whether it is still so.
    pub(super) fn holds(&self) -> bool {
        match self {
            Self::Unused | Self::Running => true,
            Self::Frozen(frozen) => Instant::now() < frozen.until,
        }
    }

    /// Whether the copy is as after a clean unmount.
    pub(super) fn is_consistent(&self) -> bool {
        match self {
            Self::Unused | Self::Frozen(_) => true,
            Self::Running => false,
        }
    }

    /// Lets it change again.
    ///
    /// # Errors
    /// [`DriverError::Precondition`] when it was not held to the end: the copy is worth nothing.
    pub(super) fn release(self) -> Result<(), DriverError> {
        match self {
            Self::Unused | Self::Running => Ok(()),
            Self::Frozen(frozen) => frozen.thaw(),
        }
    }
}
