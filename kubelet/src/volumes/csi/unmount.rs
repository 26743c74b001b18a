//! The way back: unpublish from pods, unstage from the node. By records, so that it works for
//! pods nobody knows any more and after a kill at any point.

use super::paths::VOL_DATA;
use super::record::VolData;
use super::world::{Place, Stage, Use, Uses, Volume};
use super::{Csi, Inner, blocking, lock, text};
use crate::errors::chain;
use futures::future::join_all;
use rustix::fs::{AtFlags, CWD};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Pauses before a volume is tried to be unstaged again.
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_MOST: Duration = Duration::from_secs(122);
/// Mounts on top of each other that are taken away at one place.
const STACKED: usize = 64;

impl Csi {
    /// Unpublishes all volumes of a pod, side by side; volumes no pod uses any more are unstaged
    /// after that, which nobody waits for. Idempotent.
    ///
    /// # Errors
    /// What failed, each volume in stock's words; call again later.
    pub(crate) async fn unmount_pod(&self, uid: &str) -> Result<(), String> {
        let inner = &self.inner;
        let (paths, owned) = (inner.paths.clone(), uid.to_owned());
        let uses = blocking(move || Ok(Uses::of(&paths, &owned))).await?;
        let each = uses.volumes.into_iter().map(|found| {
            let name = found.name.clone();
            async move {
                let step = match found.place {
                    Place::Mount => "UnmountVolume.TearDown",
                    Place::Block { .. } => "UnmapVolume.UnmapPodDevice",
                };
                let done = inner.unmount(uid, found).await;
                let volume =
                    done.map_err(|e| format!("{step} failed for volume {name:?} : {e}"))?;
                if let Some(volume) = volume.filter(|v| !v.is_used()) {
                    self.release(volume);
                }
                Ok(())
            }
        });
        let failures: Vec<String> = join_all(each)
            .await
            .into_iter()
            .filter_map(Result::err)
            .collect();
        if !failures.is_empty() {
            return Err(failures.join("; "));
        }
        // What never came as far as a record.
        let volumes = inner.world.of_pod(uid);
        inner.world.release_pod(uid);
        lock(&inner.tokens).retain(|(owner, _, _), _| owner != uid);
        for volume in volumes.into_iter().filter(|v| !v.is_used()) {
            self.release(volume);
        }
        Ok(())
    }

    /// Unstages a volume nobody uses, as often as it takes; ends when somebody uses it again.
    pub(super) fn release(&self, volume: Arc<Volume>) {
        tokio::spawn(release(Arc::downgrade(&self.inner), volume));
    }
}

async fn release(inner: Weak<Inner>, volume: Arc<Volume>) {
    let mut pause = RETRY_FIRST;
    let mut said = String::new();
    loop {
        let Some(inner) = inner.upgrade() else {
            return;
        };
        let mut stage = volume.stage.lock().await;
        if volume.is_used() {
            return;
        }
        let done = match *stage {
            Stage::Gone if volume.place == Place::Mount => inner.forget_stage(&volume).await,
            Stage::Gone | Stage::Unknown | Stage::Staged => inner.unstage(&volume).await,
        };
        match done {
            Ok(()) => {
                *stage = Stage::Gone;
                inner.world.forget(&volume);
                inner.tell_in_use();
                return;
            }
            Err(error) => {
                *stage = Stage::Unknown;
                let volume = volume.id.unique_name();
                if error != said {
                    tracing::warn!(volume, error, "Volume not unstaged, trying again");
                    said = error;
                }
            }
        }
        drop(stage);
        let drivers = inner.drivers.clone();
        drop(inner);
        // A driver that comes back is asked at once.
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = drivers.changed() => {}
        }
        pause = (pause * 2).min(RETRY_MOST);
    }
}

impl Inner {
    /// Unpublishes one volume of a pod; the volume, when a driver has it.
    async fn unmount(&self, uid: &str, found: Use) -> Result<Option<Arc<Volume>>, String> {
        let data = found.data.clone()?;
        let target = match &found.place {
            Place::Mount => self.paths.target(uid, &found.name),
            Place::Block { name } => self.paths.block_publish(name).join(uid),
        };
        let Some(data) = data else {
            self.drop_unrecorded(uid, &found, &target).await?;
            return Ok(None);
        };
        let volume = self.world.volume(data.id(), found.place.clone());
        let only = volume.stage.lock().await;
        let driver = self.drivers.node(&data.driver).await.map_err(|e| {
            let step = match found.place {
                Place::Mount => "Unmounter.TearDownAt",
                Place::Block { .. } => "blockMapper.UnmapPodDevice",
            };
            format!("kubernetes.io/csi: {step} failed to get CSI client: {e}")
        })?;
        driver
            .unpublish(&data.handle, text(&target))
            .await
            .map_err(|e| match found.place {
                Place::Mount => format!("kubernetes.io/csi: Unmounter.TearDownAt failed: {e}"),
                Place::Block { .. } => {
                    format!("kubernetes.io/csi: blockMapper.unpublishVolumeForBlock failed: {e}")
                }
            })?;
        let link = self.paths.pod_devices(uid).join(&found.name);
        let place = found.place.clone();
        blocking(move || match place {
            Place::Mount => clear_mount(&target, true),
            Place::Block { .. } => {
                clear_target(&target, true)?;
                // The record goes last.
                linux::fs::remove_file(&link).map_err(|e| chain(&e))
            }
        })
        .await?;
        volume.remove_user(uid, &found.name);
        drop(only);
        Ok(Some(volume))
    }

    /// A volume without a record: no driver was ever called for it, so nothing is mounted, and
    /// empty directories are all there is. What is more is not touched.
    async fn drop_unrecorded(&self, uid: &str, found: &Use, target: &Path) -> Result<(), String> {
        let (target, link) = (
            target.to_owned(),
            self.paths.pod_devices(uid).join(&found.name),
        );
        let place = found.place.clone();
        blocking(move || {
            if is_mounted(&target)? {
                return Err(format!("{} is mounted and has no record", target.display()));
            }
            match place {
                Place::Mount => clear_mount(&target, false),
                Place::Block { .. } => {
                    clear_target(&target, false)?;
                    linux::fs::remove_file(&link).map_err(|e| chain(&e))
                }
            }
        })
        .await
    }

    async fn unstage(&self, volume: &Volume) -> Result<(), String> {
        match &volume.place {
            Place::Mount => self.unstage_filesystem(volume).await,
            Place::Block { name } => self.unstage_device(volume, name).await,
        }
    }

    async fn unstage_filesystem(&self, volume: &Volume) -> Result<(), String> {
        let id = &volume.id;
        let staging = self.paths.staging(&id.driver, &id.handle);
        let dir = staging.parent().unwrap_or(&staging).to_owned();
        if blocking(move || VolData::load(&dir)).await?.is_none() {
            return Ok(());
        }
        let failed =
            |what: &str, e: String| format!("kubernetes.io/csi: attacher.UnmountDevice {what}{e}");
        let driver = self.drivers.node(&id.driver).await;
        let driver = driver.map_err(|e| failed("failed to create newCsiDriverClient: ", e))?;
        let capabilities = driver.capabilities().await.map_err(|e| {
            failed(
                "failed to check whether STAGE_UNSTAGE_VOLUME set: ",
                e.to_string(),
            )
        })?;
        if capabilities.stage {
            let unstaged = driver.unstage(&id.handle, text(&staging)).await;
            unstaged.map_err(|e| failed("failed: ", e.to_string()))?;
        }
        blocking(move || clear_mount(&staging, true)).await
    }

    async fn unstage_device(&self, volume: &Volume, name: &str) -> Result<(), String> {
        let data = self.paths.block_data(name);
        if blocking(move || VolData::load(&data)).await?.is_none() {
            return Ok(());
        }
        let failed =
            |e: String| format!("kubernetes.io/csi: blockMapper.TearDownDevice failed: {e}");
        let driver = self.drivers.node(&volume.id.driver).await.map_err(failed)?;
        let capabilities = driver.capabilities().await;
        let capabilities = capabilities.map_err(|e| failed(e.to_string()))?;
        let staging = self.paths.block_staging(name);
        if capabilities.stage {
            let unstaged = driver.unstage(&volume.id.handle, text(&staging)).await;
            unstaged.map_err(|e| failed(e.to_string()))?;
        }
        let (publish, own) = (
            self.paths.block_publish(name),
            self.paths.block_volume(name),
        );
        let map = self.paths.block_map(name);
        let data = self.paths.block_data(name);
        blocking(move || {
            clear_target(&staging, true)?;
            remove_dir(&publish)?;
            remove_dir(&map)?;
            VolData::remove(&data)?;
            remove_dir(&data)?;
            remove_dir(&own)
        })
        .await
    }

    /// A filesystem the driver does not stage leaves nothing but, maybe, a record of an older
    /// agent.
    async fn forget_stage(&self, volume: &Volume) -> Result<(), String> {
        let staging = self.paths.staging(&volume.id.driver, &volume.id.handle);
        blocking(move || clear_mount(&staging, false)).await
    }
}

/// Whether something is mounted at exactly this path. Asks the mount table only: what is mounted
/// may hang.
pub(super) fn is_mounted(path: &Path) -> Result<bool, String> {
    Ok(mounts_at(path)? > 0)
}

fn mounts_at(path: &Path) -> Result<usize, String> {
    let table = linux::mountinfo::read().map_err(|e| format!("read the mount table: {e}"))?;
    Ok(table.iter().filter(|m| m.mount_point == path).count())
}

/// Takes away what is left at the target of a volume: drivers are to remove it, and not all do.
/// With `unmount` mounts that the driver forgot are taken down, too (the mount, never what is in
/// it). The target goes only when it is empty.
pub(super) fn clear_target(target: &Path, unmount: bool) -> Result<(), String> {
    let mounts = mounts_at(target)?;
    if mounts > 0 && !unmount {
        return Err(format!("{} is still mounted", target.display()));
    }
    for _ in 0..mounts.min(STACKED) {
        match rustix::mount::unmount(target, UnmountFlags::NOFOLLOW) {
            Ok(()) => {
                tracing::warn!(path = %target.display(), "Mount left by a driver is taken down")
            }
            Err(Errno::INVAL) => break,
            Err(e) => {
                let e = std::io::Error::from(e);
                return Err(format!("unmount {}: {e}", target.display()));
            }
        }
    }
    match rustix::fs::unlinkat(CWD, target, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => remove_dir(target),
        Err(e) => {
            let e = std::io::Error::from(e);
            Err(format!("remove {}: {e}", target.display()))
        }
    }
}

/// Takes away a mount point, the record beside it and their directory.
pub(super) fn clear_mount(mount: &Path, unmount: bool) -> Result<(), String> {
    clear_target(mount, unmount).map_err(|e| {
        format!(
            "kubernetes.io/csi: failed to remove dir [{}]: {e}",
            mount.display()
        )
    })?;
    let Some(dir) = mount.parent() else {
        return Ok(());
    };
    // The record goes last: until then it can be done again.
    linux::fs::remove_file(&dir.join(VOL_DATA)).map_err(|e| chain(&e))?;
    remove_dir(dir)
}

/// Removes an empty directory.
fn remove_dir(dir: &Path) -> Result<(), String> {
    match rustix::fs::unlinkat(CWD, dir, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => {
            let e = std::io::Error::from(e);
            Err(format!("remove {}: {e}", dir.display()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_with_files_in_it_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let mount = dir.path().join("pv/mount");
        std::fs::create_dir_all(&mount).unwrap();
        std::fs::write(mount.join("precious"), "x").unwrap();
        std::fs::write(dir.path().join("pv").join(VOL_DATA), "{}").unwrap();
        assert!(clear_mount(&mount, true).is_err());
        assert!(mount.join("precious").exists());
        assert!(dir.path().join("pv").join(VOL_DATA).exists());
        std::fs::remove_file(mount.join("precious")).unwrap();
        clear_mount(&mount, true).unwrap();
        clear_mount(&mount, true).unwrap();
        assert!(!dir.path().join("pv").exists());
        std::fs::write(dir.path().join("device"), "").unwrap();
        clear_target(&dir.path().join("device"), false).unwrap();
        assert!(!dir.path().join("device").exists());
    }
}
