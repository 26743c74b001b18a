//! NodeStageVolume and NodeUnstageVolume.

use crate::backend::attach::{self, Attachment};
use crate::backend::mounts::{self, Mounts};
use crate::backend::{grow, image};
use crate::driver::{Driver, check_name};
use crate::error::DriverError;
use crate::model::{Access, Capability, Filesystem, Kind, VolumeId};
use crate::plan;
use crate::store::VolumeRecord;
use linux::failpoint::step;
use linux::loopdev::LoopDevice;
use linux::mount::{MountAttrs, device};
use rustix::fs::{Gid, Mode};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// A request to bring a volume to this node.
#[derive(Debug, Clone)]
pub struct Stage {
    /// Id of the volume.
    pub volume: String,
    /// Where.
    pub path: PathBuf,
    /// For what.
    pub capability: Option<Capability>,
}

impl Driver {
    /// Mounts a volume where all its users on this node will have it from, or makes it a device.
    /// Done already, it does nothing.
    ///
    /// # Errors
    /// [`DriverError::Damaged`] when the bytes are not what the record says.
    pub fn stage(&self, request: &Stage) -> Result<(), DriverError> {
        check_name("the volume's id", &request.volume)?;
        let path = check_path("the staging path", &request.path)?;
        let capability = request.capability.as_ref();
        let capability = capability.ok_or_else(no_capability)?;
        let volume = self.volume(&request.volume)?;
        let _guard = self.locks.take([&volume.id])?;
        let volume = self.volume(&request.volume)?;
        if let Some(why) = plan::unsupported(capability, volume.kind) {
            return Err(DriverError::invalid(why));
        }
        self.ensure_staged(&volume, &path, capability)
    }

    /// As [`Driver::stage`], for who holds the volume.
    pub(super) fn ensure_staged(
        &self,
        volume: &VolumeRecord,
        path: &Path,
        capability: &Capability,
    ) -> Result<(), DriverError> {
        match (volume.kind, &capability.access) {
            (Kind::Block, _) => self.attach(volume, false).map(drop),
            (Kind::Directory, Access::Mount { group, .. }) => {
                image::ensure_mount_dir(path)?;
                if !self.is_mounted_at(volume, path)? {
                    let data = self.pool.data(&volume.id);
                    mounts::bind(&data, path, MountAttrs::default())?;
                }
                self.give_to_group(path, *group)
            }
            (Kind::Filesystem(filesystem), Access::Mount { options, group, .. }) => {
                image::ensure_mount_dir(path)?;
                if !self.is_mounted_at(volume, path)? {
                    self.mount(volume, filesystem, path, options)?;
                }
                self.give_to_group(path, *group)
            }
            (Kind::Directory | Kind::Filesystem(_), Access::Block) => {
                Err(DriverError::invalid("the volume has a filesystem"))
            }
        }
    }

    /// Whether exactly this volume is what a path shows.
    pub(super) fn is_mounted_at(
        &self,
        volume: &VolumeRecord,
        path: &Path,
    ) -> Result<bool, DriverError> {
        let mounts = Mounts::read(self.pool.root())?;
        let Some(top) = mounts.top(path) else {
            return Ok(false);
        };
        let owner = mounts.owner(top);
        if owner.as_ref() != Some(&volume.id) {
            return Err(DriverError::precondition(format!(
                "{} is already a mount of {}",
                path.display(),
                owner.map_or_else(|| top.source.clone(), |owner| owner.to_string()),
            )));
        }
        if volume.kind == Kind::Directory {
            return Ok(true);
        }
        // The name says so; what counts is the file behind it.
        let image = self.pool.image(&volume.id);
        let Some(device) = attach::find(&image::open(&image)?, &image)? else {
            return Err(DriverError::Damaged {
                id: volume.id.to_string(),
                what: format!("{} is mounted from another file", path.display()),
            });
        };
        let same = match volume.kind {
            Kind::Filesystem(_) => top.device.1 == device.index,
            Kind::Block | Kind::Directory => true,
        };
        if same {
            return Ok(true);
        }
        Err(DriverError::Damaged {
            id: volume.id.to_string(),
            what: format!("{} is mounted from another device", path.display()),
        })
    }

    fn mount(
        &self,
        volume: &VolumeRecord,
        filesystem: Filesystem,
        path: &Path,
        options: &[String],
    ) -> Result<(), DriverError> {
        let image = self.pool.image(&volume.id);
        let file = open_image(volume, &image)?;
        let id = volume.id.as_str();
        let uuid = volume.filesystem_uuid.as_deref();
        let found = grow::expect(&file, &image, id, filesystem, uuid)?;
        let grown = self.extend_image(volume, &file, &image)?;
        let smaller = found.bytes() + found.block_bytes <= grown;
        if smaller && filesystem == Filesystem::Ext4 && attach::find(&file, &image)?.is_none() {
            // Online it would take CAP_SYS_RESOURCE, and nobody uses it yet.
            tracing::info!(volume = id, bytes = grown, "Growing an unmounted ext4");
            grow::unmounted_ext4(&image)?;
        }
        let device = self.attach(volume, true)?;
        let mut options = options.to_vec();
        if filesystem == Filesystem::Xfs {
            // Its origin may be mounted beside it, should its UUID ever have stayed.
            options.push("nouuid".to_owned());
        }
        step();
        device::mount_device(&device.path(), path, filesystem.name(), &options)
            .map_err(DriverError::io("mount", image.display()))?;
        step();
        if smaller && filesystem == Filesystem::Xfs {
            self.grow_mounted(&device, &file, &image, path)?;
        }
        Ok(())
    }

    /// The device of a volume, held open.
    pub(super) fn attach(
        &self,
        volume: &VolumeRecord,
        autoclear: bool,
    ) -> Result<LoopDevice, DriverError> {
        let image = self.pool.image(&volume.id);
        let file = open_image(volume, &image)?;
        self.extend_image(volume, &file, &image)?;
        let attachment = Attachment {
            name: volume.id.as_str(),
            autoclear,
            direct_io: volume.mutable.direct_io.unwrap_or(true),
            read_ahead_kib: volume.mutable.read_ahead_kib,
        };
        let device = attach::ensure(&file, &image, attachment)?;
        device
            .refresh_capacity()
            .map_err(DriverError::io("refresh", device.path().display()))?;
        Ok(device)
    }

    /// Makes an image as long as was promised. Its length then, in bytes.
    pub(super) fn extend_image(
        &self,
        volume: &VolumeRecord,
        file: &File,
        image: &Path,
    ) -> Result<u64, DriverError> {
        let length = file
            .metadata()
            .map_err(DriverError::io("inspect", image.display()))?
            .len();
        if length >= volume.capacity_bytes {
            return Ok(length);
        }
        image::extend(file, image, volume.capacity_bytes, volume.provision)?;
        Ok(volume.capacity_bytes)
    }

    /// Lets a group write to a volume (VOLUME_MOUNT_GROUP): the root directory is enough, what is
    /// made in it inherits the group.
    fn give_to_group(&self, path: &Path, group: Option<u32>) -> Result<(), DriverError> {
        let Some(group) = group else { return Ok(()) };
        let stat = rustix::fs::stat(path).map_err(DriverError::io("inspect", path.display()))?;
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        let wanted = mode | Mode::RWXG | Mode::SGID;
        if stat.st_gid == group && mode == wanted {
            return Ok(());
        }
        let dir = linux::fs::open_dir(path)?;
        rustix::fs::fchown(&dir, None, Some(Gid::from_raw(group)))
            .map_err(DriverError::io("give to the group", path.display()))?;
        rustix::fs::fchmod(dir.as_fd(), wanted)
            .map_err(DriverError::io("set the mode of", path.display()))
    }

    /// Takes a volume away from this node. What is not there is away.
    ///
    /// # Errors
    /// [`DriverError::Io`] with `EBUSY` when it is in use.
    pub fn unstage(&self, id: &str, path: &Path) -> Result<(), DriverError> {
        check_name("the volume's id", id)?;
        let path = check_path("the staging path", path)?;
        let _guard = self.locks.take([id])?;
        mounts::unmount_all(self.pool.root(), id, &path)?;
        // A volume whose record is gone may still be mounted, and that is over now; a device of
        // its own it cannot have, for it was not in use when it was deleted.
        let Some(id) = VolumeId::parse(id) else {
            return Ok(());
        };
        match self.store.volumes.get(id.as_str()) {
            Some(volume) if volume.kind == Kind::Block => self.detach(&volume),
            Some(_) | None => Ok(()),
        }
    }

    fn detach(&self, volume: &VolumeRecord) -> Result<(), DriverError> {
        let image = self.pool.image(&volume.id);
        if !image::exists(&image)? {
            return Ok(());
        }
        let Some(device) = attach::find(&image::open(&image)?, &image)? else {
            return Ok(());
        };
        let mounts = Mounts::read(self.pool.root())?;
        if let Some(entry) = mounts.of(&volume.id).first() {
            return Err(DriverError::precondition(format!(
                "volume {} is still published at {}",
                volume.id,
                entry.mount_point.display()
            )));
        }
        device
            .sync()
            .map_err(DriverError::io("sync", device.path().display()))?;
        step();
        device
            .detach()
            .map_err(DriverError::io("detach", image.display()))?;
        step();
        Ok(())
    }
}

/// Opens the image of a volume; that it is missing is damage, not absence.
fn open_image(volume: &VolumeRecord, image: &Path) -> Result<File, DriverError> {
    if !image::exists(image)? {
        return Err(DriverError::Damaged {
            id: volume.id.to_string(),
            what: format!("{} is missing", image.display()),
        });
    }
    image::open(image)
}

/// A path as callers give it, as the kernel's tables show it.
pub(super) fn check_path(what: &str, path: &Path) -> Result<PathBuf, DriverError> {
    if path.as_os_str().is_empty() {
        return Err(DriverError::invalid(format!("{what} is missing")));
    }
    if !path.is_absolute() {
        return Err(DriverError::invalid(format!(
            "{what} {} is not absolute",
            path.display()
        )));
    }
    mounts::resolve(path)
}

pub(super) fn no_capability() -> DriverError {
    DriverError::invalid("the volume capability is missing")
}
