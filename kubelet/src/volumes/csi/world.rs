//! Which volumes of CSI drivers this node holds, and which pods use them.
//!
//! Filled from the records on disk when the agent starts and kept in step with them. A volume's
//! stage lock is held while a driver works on it: one call at a time for each volume, any number
//! of volumes side by side.

use super::paths::{Paths, is_file_name};
use super::record::VolData;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a volume is for a driver.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct VolumeId {
    pub(crate) driver: String,
    pub(crate) handle: String,
}

impl VolumeId {
    /// Its name in the status of the Node.
    pub(crate) fn unique_name(&self) -> String {
        format!("kubernetes.io/csi/{}^{}", self.driver, self.handle)
    }
}

/// How a volume is used on this node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    /// As a filesystem.
    Mount,
    /// As a device; places of these go by the PersistentVolume's name.
    Block { name: String },
}

/// What the driver made of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Maybe staged: nobody has asked the driver since the agent began, or a call broke off.
    Unknown,
    /// Staged.
    Staged,
    /// Nothing of it is left.
    Gone,
}

/// A volume.
#[derive(Debug)]
pub(crate) struct Volume {
    pub(crate) id: VolumeId,
    pub(crate) place: Place,
    /// Held during calls.
    pub(crate) stage: tokio::sync::Mutex<Stage>,
    /// A controller attaches it: the Node's status tells that it is in use.
    attachable: AtomicBool,
    users: Mutex<BTreeSet<(String, String)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Volume {
    /// A pod uses it from now on, under this name; not when the volume is for one pod and
    /// another has it.
    fn add_user(&self, uid: &str, name: &str, for_one: bool) -> bool {
        let mut users = lock(&self.users);
        if for_one && users.iter().any(|(user, _)| user != uid) {
            return false;
        }
        users.insert((uid.to_owned(), name.to_owned()));
        true
    }

    /// A pod does not use it any more.
    pub(crate) fn remove_user(&self, uid: &str, name: &str) {
        lock(&self.users).remove(&(uid.to_owned(), name.to_owned()));
    }

    /// Whether another pod uses it.
    pub(crate) fn is_used_beside(&self, uid: &str) -> bool {
        lock(&self.users).iter().any(|(user, _)| user != uid)
    }

    /// Whether any pod uses it.
    pub(crate) fn is_used(&self) -> bool {
        !lock(&self.users).is_empty()
    }

    pub(crate) fn set_attachable(&self, attachable: bool) {
        self.attachable.store(attachable, Ordering::Release);
    }
}

/// All volumes.
#[derive(Debug, Default)]
pub(crate) struct World {
    volumes: Mutex<HashMap<(VolumeId, Place), Arc<Volume>>>,
}

impl World {
    /// The volumes the records tell of. Blocking.
    pub(crate) fn read(paths: &Paths) -> Self {
        let world = Self::default();
        for data in staged(paths) {
            world.volume(data.id(), Place::Mount);
        }
        for data in block_volumes(paths) {
            let name = data.name.clone();
            world.volume(data.id(), Place::Block { name });
        }
        for uid in names(&paths.pods()) {
            for found in Uses::of(paths, &uid).volumes {
                if let Ok(Some(data)) = found.data {
                    world
                        .volume(data.id(), found.place.clone())
                        .add_user(&uid, &found.name, false);
                }
            }
        }
        world
    }

    /// A volume, new or known.
    pub(crate) fn volume(&self, id: VolumeId, place: Place) -> Arc<Volume> {
        entry(&mut lock(&self.volumes), id, place)
    }

    /// The volume, used by a pod from now on; none when it is for one pod and another has it.
    /// In one step, so that nobody forgets it in between.
    pub(crate) fn enter(
        &self,
        id: VolumeId,
        place: Place,
        user: (&str, &str),
        for_one: bool,
    ) -> Option<Arc<Volume>> {
        let mut all = lock(&self.volumes);
        let volume = entry(&mut all, id, place);
        volume.add_user(user.0, user.1, for_one).then_some(volume)
    }

    /// Forgets a volume of which nothing is left and that nobody uses.
    pub(crate) fn forget(&self, volume: &Volume) {
        let mut all = lock(&self.volumes);
        if !volume.is_used() {
            all.remove(&(volume.id.clone(), volume.place.clone()));
        }
    }

    /// Volumes a pod uses.
    pub(crate) fn of_pod(&self, uid: &str) -> Vec<Arc<Volume>> {
        let all = lock(&self.volumes);
        let used = |v: &&Arc<Volume>| lock(&v.users).iter().any(|(user, _)| user == uid);
        all.values().filter(used).cloned().collect()
    }

    /// The pod is gone from all volumes.
    pub(crate) fn release_pod(&self, uid: &str) {
        for volume in self.of_pod(uid) {
            lock(&volume.users).retain(|(user, _)| user != uid);
        }
    }

    /// Volumes nobody uses.
    pub(crate) fn unused(&self) -> Vec<Arc<Volume>> {
        let all = lock(&self.volumes);
        all.values().filter(|v| !v.is_used()).cloned().collect()
    }

    /// What the Node's status tells to be in use.
    pub(crate) fn in_use(&self) -> Vec<String> {
        let all = lock(&self.volumes);
        let names: BTreeSet<String> = all
            .values()
            .filter(|v| v.attachable.load(Ordering::Acquire))
            .map(|v| v.id.unique_name())
            .collect();
        names.into_iter().collect()
    }

    /// Asks anew which volumes a controller attaches.
    pub(crate) fn sort_attachable(&self, attach_required: impl Fn(&str) -> bool) {
        for volume in lock(&self.volumes).values() {
            volume.set_attachable(attach_required(&volume.id.driver));
        }
    }
}

/// The volume in the map, put there when it is new.
fn entry(
    all: &mut HashMap<(VolumeId, Place), Arc<Volume>>,
    id: VolumeId,
    place: Place,
) -> Arc<Volume> {
    let key = (id.clone(), place.clone());
    let volume = all.entry(key).or_insert_with(|| {
        Arc::new(Volume {
            id,
            place,
            stage: tokio::sync::Mutex::new(Stage::Unknown),
            attachable: AtomicBool::new(true),
            users: Mutex::default(),
        })
    });
    volume.clone()
}

impl VolData {
    pub(crate) fn id(&self) -> VolumeId {
        VolumeId {
            driver: self.driver.clone(),
            handle: self.handle.clone(),
        }
    }
}

/// A volume a pod left on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Use {
    /// Its name among the pod's.
    pub(crate) name: String,
    pub(crate) place: Place,
    /// Its record: none when there is none, an error when it cannot be understood.
    pub(crate) data: Result<Option<VolData>, String>,
}

/// The volumes a pod left on disk.
#[derive(Debug, Default)]
pub(crate) struct Uses {
    pub(crate) volumes: Vec<Use>,
}

impl Uses {
    /// Looks. Never touches what is mounted. Blocking.
    pub(crate) fn of(paths: &Paths, uid: &str) -> Self {
        let dir = paths.pod_volumes(uid);
        let mounts = names(&dir).into_iter().map(|name| Use {
            data: VolData::load(&dir.join(&name)),
            place: Place::Mount,
            name,
        });
        let devices = names(&paths.pod_devices(uid)).into_iter().map(|name| Use {
            data: VolData::load(&paths.block_data(&name)),
            place: Place::Block { name: name.clone() },
            name,
        });
        Self {
            volumes: mounts.chain(devices).collect(),
        }
    }
}

fn names(dir: &Path) -> Vec<String> {
    let names = linux::fs::list_dir(dir).unwrap_or_default();
    let names = names.into_iter().filter_map(|n| n.into_string().ok());
    names.filter(|n| is_file_name(n)).collect()
}

/// Records of staged filesystems.
fn staged(paths: &Paths) -> Vec<VolData> {
    let mut found = Vec::new();
    let drivers = names(&paths.plugin());
    for driver in drivers.iter().filter(|d| *d != "volumeDevices") {
        let dir = paths.plugin().join(driver);
        for volume in names(&dir) {
            match VolData::load(&dir.join(&volume)) {
                Ok(Some(data)) if data.driver == *driver => found.push(data),
                Ok(_) => {}
                Err(error) => tracing::warn!(error, "Staged volume is not understood"),
            }
        }
    }
    found
}

/// Records of block volumes.
fn block_volumes(paths: &Paths) -> Vec<VolData> {
    let mut found = Vec::new();
    let volumes = names(&paths.devices());
    for name in volumes
        .iter()
        .filter(|n| *n != "staging" && *n != "publish")
    {
        match VolData::load(&paths.block_data(name)) {
            Ok(Some(mut data)) => {
                // Directories go by this name.
                data.name.clone_from(name);
                found.push(data);
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(error, "Block volume is not understood"),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn data(handle: &str, name: &str) -> VolData {
        VolData {
            driver: "d".to_owned(),
            handle: handle.to_owned(),
            name: name.to_owned(),
            rest: BTreeMap::new(),
        }
    }

    #[test]
    fn the_world_is_what_the_records_tell() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::new(root.path());
        let staging = paths.staging("d", "h1");
        data("h1", "").save(staging.parent().unwrap()).unwrap();
        data("h1", "pv1")
            .save(&paths.pod_volumes("u1").join("pv1"))
            .unwrap();
        data("h2", "")
            .save(paths.staging("d", "h2").parent().unwrap())
            .unwrap();
        data("h3", "pv3").save(&paths.block_data("pv3")).unwrap();
        std::fs::create_dir_all(paths.pod_devices("u2")).unwrap();
        std::os::unix::fs::symlink("/x", paths.pod_devices("u2").join("pv3")).unwrap();
        let world = World::read(&paths);
        let unused = world.unused();
        assert_eq!(unused.len(), 1);
        assert_eq!(unused[0].id.handle, "h2");
        assert_eq!(world.of_pod("u1")[0].id.handle, "h1");
        assert!(world.of_pod("u1")[0].is_used_beside("u2"));
        let block = &world.of_pod("u2")[0];
        assert_eq!(
            block.place,
            Place::Block {
                name: "pv3".to_owned()
            }
        );
        assert_eq!(
            world.in_use(),
            [
                "kubernetes.io/csi/d^h1",
                "kubernetes.io/csi/d^h2",
                "kubernetes.io/csi/d^h3"
            ]
        );
        world.sort_attachable(|_| false);
        assert!(world.in_use().is_empty());
        world.release_pod("u1");
        assert_eq!(world.unused().len(), 2);
    }
}
