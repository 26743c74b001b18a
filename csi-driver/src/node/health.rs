//! What is wrong with volumes and with the pool (the health RPCs of CSI 1.13). Looked at when
//! asked; nothing is changed.

use crate::backend::mounts::Mounts;
use crate::backend::{grow, image};
use crate::driver::{Driver, check_name};
use crate::error::{DriverError, chain};
use crate::model::{Kind, Provision};
use crate::store::VolumeRecord;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// It works, but may soon not.
    Degraded,
    /// It does not work now.
    Inaccessible,
    /// Bytes are gone.
    DataLoss,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ailment {
    /// How bad it is.
    pub severity: Severity,
    /// A word for programs.
    pub reason: &'static str,
    /// A sentence for people.
    pub message: String,
}

impl Driver {
    /// What is wrong with a volume; nothing when it is well.
    ///
    /// # Errors
    /// [`DriverError::NotFound`].
    pub fn volume_health(&self, id: &str) -> Result<Vec<Ailment>, DriverError> {
        check_name("the volume's id", id)?;
        let volume = self.volume(id)?;
        self.ailments(&volume)
    }

    /// As [`Driver::volume_health`], of a record.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn ailments(&self, volume: &VolumeRecord) -> Result<Vec<Ailment>, DriverError> {
        let mut found = Vec::new();
        let lost = |reason, message| Ailment {
            severity: Severity::DataLoss,
            reason,
            message,
        };
        let path = if volume.kind.has_image() {
            self.pool.image(&volume.id)
        } else {
            self.pool.data(&volume.id)
        };
        if !image::exists(&path)? {
            found.push(lost("Missing", format!("{} is missing", path.display())));
            return Ok(found);
        }
        if let Kind::Filesystem(filesystem) = volume.kind {
            let uuid = volume.filesystem_uuid.as_deref();
            let id = volume.id.as_str();
            let outcome = image::open(&path)
                .and_then(|file| grow::expect(&file, &path, id, filesystem, uuid));
            match outcome {
                Ok(_) => {}
                Err(error @ DriverError::Damaged { .. }) => {
                    found.push(lost("WrongContent", error.to_string()));
                }
                Err(error) => found.push(Ailment {
                    severity: Severity::Inaccessible,
                    reason: "Unreadable",
                    message: chain(&error),
                }),
            }
        }
        found.extend(self.read_only(volume)?);
        if volume.provision == Provision::Thin && self.pool.room(&self.store)?.is_low() {
            found.push(Ailment {
                severity: Severity::Degraded,
                reason: "PoolLow",
                message: "the pool has run low and the volume has no blocks of its own".to_owned(),
            });
        }
        Ok(found)
    }

    /// A filesystem turns read-only by itself when it met an error.
    fn read_only(&self, volume: &VolumeRecord) -> Result<Option<Ailment>, DriverError> {
        let Kind::Filesystem(_) = volume.kind else {
            return Ok(None);
        };
        let mounts = Mounts::read(self.pool.root())?;
        let of_volume = mounts.of(&volume.id);
        let writable_mount = of_volume
            .iter()
            .find(|entry| !crate::backend::mounts::is_read_only(entry));
        let turned = writable_mount.filter(|entry| {
            entry.has_super_option("ro")
                || entry.has_super_option("emergency_ro")
                || entry.has_super_option("shutdown")
        });
        Ok(turned.map(|entry| Ailment {
            severity: Severity::Inaccessible,
            reason: "ReadOnly",
            message: format!(
                "the filesystem at {} met an error and takes no writes",
                entry.mount_point.display()
            ),
        }))
    }

    /// What is wrong with the pool; nothing when it is well.
    ///
    /// # Errors
    /// Never: a pool that does not answer is an ailment.
    pub fn storage_health(&self) -> Vec<Ailment> {
        match self.pool.room(&self.store) {
            Err(error) => vec![Ailment {
                severity: Severity::Inaccessible,
                reason: "PoolUnreachable",
                message: chain(&error),
            }],
            Ok(room) if room.is_low() => vec![Ailment {
                severity: Severity::Degraded,
                reason: "PoolLow",
                message: format!(
                    "the pool has {} bytes left and none to give away",
                    room.free
                ),
            }],
            Ok(_) => Vec::new(),
        }
    }
}
