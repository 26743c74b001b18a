//! NodePublishVolume and NodeUnpublishVolume.

use super::stage::{check_path, no_capability};
use crate::backend::image;
use crate::backend::mounts::{self, Mounts};
use crate::driver::{Driver, check_name};
use crate::error::DriverError;
use crate::model::{Access, Capability, Kind, Mode};
use crate::plan;
use crate::store::VolumeRecord;
use linux::mount::MountAttrs;
use std::path::{Path, PathBuf};

/// A request to show a volume to a pod.
#[derive(Debug, Clone)]
pub struct Publish {
    /// Id of the volume.
    pub volume: String,
    /// Where it was staged.
    pub staging: PathBuf,
    /// Where it shall be.
    pub target: PathBuf,
    /// For what.
    pub capability: Option<Capability>,
    /// Whether the pod may only read.
    pub read_only: bool,
}

impl Driver {
    /// Shows a staged volume at another path. Done already, it does nothing.
    ///
    /// What lies at the staging path is looked at first: after a reboot it is an empty directory
    /// of the node's own disk, and what a pod wrote there would fill that and be lost. So a volume
    /// that is not staged is staged here.
    ///
    /// # Errors
    /// [`DriverError::Precondition`] when the one path it may be at is taken.
    pub fn publish(&self, request: &Publish) -> Result<(), DriverError> {
        check_name("the volume's id", &request.volume)?;
        let target = check_path("the target path", &request.target)?;
        let capability = request.capability.as_ref();
        let capability = capability.ok_or_else(no_capability)?;
        if request.staging.as_os_str().is_empty() {
            return Err(DriverError::precondition("the staging path is missing"));
        }
        let staging = check_path("the staging path", &request.staging)?;
        let volume = self.volume(&request.volume)?;
        let _guard = self.locks.take([&volume.id])?;
        let volume = self.volume(&request.volume)?;
        if let Some(why) = plan::unsupported(capability, volume.kind) {
            return Err(DriverError::invalid(why));
        }
        self.refuse_second(&volume, capability.mode, &staging, &target)?;
        self.ensure_staged(&volume, &staging, capability)?;
        let attrs = attributes(request.read_only, capability);
        match volume.kind {
            Kind::Block => self.publish_device(&volume, &target, attrs),
            Kind::Directory | Kind::Filesystem(_) => {
                image::ensure_mount_dir(&target)?;
                if self.is_published(&volume, &target, attrs)? {
                    return Ok(());
                }
                mounts::bind(&staging, &target, attrs)
            }
        }
    }

    fn publish_device(
        &self,
        volume: &VolumeRecord,
        target: &Path,
        attrs: MountAttrs,
    ) -> Result<(), DriverError> {
        let device = self.attach(volume, false)?;
        image::ensure_mount_file(target)?;
        if self.is_published(volume, target, attrs)? {
            return Ok(());
        }
        mounts::bind(&device.path(), target, attrs)
    }

    /// Whether the target shows the volume already, and in this way.
    fn is_published(
        &self,
        volume: &VolumeRecord,
        target: &Path,
        attrs: MountAttrs,
    ) -> Result<bool, DriverError> {
        if !self.is_mounted_at(volume, target)? {
            return Ok(false);
        }
        let mounts = Mounts::read(self.pool.root())?;
        let read_only = mounts.top(target).is_some_and(mounts::is_read_only);
        if read_only == attrs.readonly {
            return Ok(true);
        }
        Err(DriverError::Exists {
            what: "volume",
            name: volume.id.to_string(),
            how: format!(
                "published at {} {}",
                target.display(),
                if read_only {
                    "for reading"
                } else {
                    "for writing"
                }
            ),
        })
    }

    /// SINGLE_NODE_SINGLE_WRITER: one path.
    fn refuse_second(
        &self,
        volume: &VolumeRecord,
        mode: Mode,
        staging: &Path,
        target: &Path,
    ) -> Result<(), DriverError> {
        match mode {
            Mode::SingleNodeSingleWriter => {}
            Mode::SingleNodeWriter
            | Mode::SingleNodeReader
            | Mode::SingleNodeMultiWriter
            | Mode::MultiNode => return Ok(()),
        }
        let mounts = Mounts::read(self.pool.root())?;
        let other = mounts.of(&volume.id).into_iter().find(|entry| {
            let at = &entry.mount_point;
            // What the kubelet makes of it for a container's subPath is not a publication.
            let sub_path = at.iter().any(|part| part == "volume-subpaths");
            at != staging && at != target && !sub_path
        });
        match other {
            None => Ok(()),
            Some(entry) => Err(DriverError::precondition(format!(
                "volume {} has a single writer and is published at {}",
                volume.id,
                entry.mount_point.display()
            ))),
        }
    }

    /// Takes a volume away from a pod, and the directory or file it was at. What is not there is
    /// away, also when nobody knows the volume any more: otherwise its pod could never go.
    ///
    /// # Errors
    /// [`DriverError::Io`] with `EBUSY` when it is in use.
    pub fn unpublish(&self, id: &str, target: &Path) -> Result<(), DriverError> {
        check_name("the volume's id", id)?;
        let target = check_path("the target path", target)?;
        let _guard = self.locks.take([id])?;
        mounts::unmount_all(self.pool.root(), id, &target)?;
        mounts::remove_mount_point(&target)
    }
}

fn attributes(read_only: bool, capability: &Capability) -> MountAttrs {
    let options = match &capability.access {
        Access::Mount { options, .. } => options.as_slice(),
        Access::Block => &[],
    };
    let has = |wanted: &str| {
        let mut words = options.iter().flat_map(|option| option.split(','));
        words.any(|option| option == wanted)
    };
    MountAttrs {
        readonly: read_only || capability.mode == Mode::SingleNodeReader || has("ro"),
        nosuid: has("nosuid"),
        nodev: has("nodev"),
        noexec: has("noexec"),
    }
}
