//! The driver as a value: a pool, its records, and who works on what.
//!
//! Every operation blocks and is called from a thread that may. What may be killed at any
//! instruction is put right by [`Driver::recover`] before the first request is taken.

use crate::backend::{attach, image, mounts::Mounts};
use crate::error::{DriverError, chain};
use crate::locks::Locks;
use crate::model::{Filesystem, MAX_NAME_BYTES, NodeTag, SnapshotId, VolumeId};
use crate::pool::{Pool, PoolConfig};
use crate::store::{GroupRecord, Record, SnapshotRecord, State, Store, Unreadable, VolumeRecord};
use linux::{blockfile, fs};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

/// A device whose last mount has gone clears itself within this, or somebody we do not see has it
/// mounted: a pod's own mount namespace does.
const CLEAR_LIMIT: Duration = Duration::from_secs(2);

/// Between two looks for it.
const CLEAR_PAUSE: Duration = Duration::from_millis(5);

/// What a driver is told at its start.
#[derive(Debug, Clone)]
pub struct DriverConfig {
    /// Its name, as StorageClasses give it.
    pub name: String,
    /// The node it is on.
    pub node: String,
    /// Directory of the pool.
    pub pool: PathBuf,
    /// Filesystem of volumes for which nobody asks for one.
    pub default_filesystem: Filesystem,
    /// What the pool keeps back and promises.
    pub limits: PoolConfig,
    /// Volumes this node takes at most; 0 for as many as there is room for.
    pub max_volumes: u32,
    /// This program: it is started again to thaw what it froze.
    pub program: PathBuf,
}

/// A driver that owns its pool.
#[derive(Debug)]
pub struct Driver {
    /// What it was told.
    pub config: DriverConfig,
    pub(crate) tag: NodeTag,
    pub(crate) pool: Arc<Pool>,
    pub(crate) store: Store,
    pub(crate) locks: Locks,
    purge: SyncSender<()>,
}

impl Driver {
    /// Takes over the pool and puts right what an earlier driver left half done.
    ///
    /// # Errors
    /// When the pool is not ours or its records cannot be read.
    pub fn open(config: DriverConfig) -> Result<Self, DriverError> {
        let pool = Arc::new(Pool::open(&config.pool, config.limits)?);
        let store = Store::open(pool.root())?;
        let driver = Self {
            tag: NodeTag::of(&config.name, &config.node),
            purge: start_purger(Arc::clone(&pool))?,
            config,
            pool,
            store,
            locks: Locks::default(),
        };
        driver.recover();
        Ok(driver)
    }

    /// The key of this driver's topology: one value per node.
    #[must_use]
    pub fn topology_key(&self) -> String {
        format!("{}/node", self.config.name)
    }

    /// Files among the records that are none.
    #[must_use]
    pub fn unreadable(&self) -> Vec<Unreadable> {
        let tables = [
            self.store.volumes.unreadable(),
            self.store.snapshots.unreadable(),
            self.store.groups.unreadable(),
        ];
        tables.concat()
    }

    /// Thaws what was left frozen, takes back what nobody was told of, finishes removals. What
    /// fails is reported and met again by the next request for it.
    fn recover(&self) {
        for lost in self.unreadable() {
            let path = lost.path.display();
            tracing::error!(%path, why = lost.why, "A record cannot be read and is left alone");
        }
        self.thaw_left_over();
        for group in self.store.groups.all() {
            let outcome = match group.state {
                State::Ready => Ok(()),
                State::Intent | State::Deleting => self.erase_group(&group),
            };
            report("group", &group, outcome);
        }
        for snapshot in self.store.snapshots.all() {
            let outcome = match snapshot.state {
                State::Ready => Ok(()),
                State::Intent | State::Deleting => self.erase_snapshot(&snapshot),
            };
            report("snapshot", &snapshot, outcome);
        }
        for volume in self.store.volumes.all() {
            let outcome = match volume.state {
                State::Ready => Ok(()),
                State::Intent | State::Deleting => self.erase_volume(&volume),
            };
            report("volume", &volume, outcome);
        }
        self.wake_purger();
    }

    fn thaw_left_over(&self) {
        let Ok(mounts) = Mounts::read(self.pool.root()) else {
            return;
        };
        let names = fs::list_dir(&self.pool.root().join("frozen")).unwrap_or_default();
        for id in names
            .iter()
            .filter_map(|name| VolumeId::parse(name.to_str()?))
        {
            let mut held = false;
            for entry in mounts.of(&id) {
                let thawed = fs::open_dir(&entry.mount_point)
                    .map_err(|e| e.to_string())
                    .and_then(|dir| blockfile::thaw(dir.as_fd()).map_err(|e| e.to_string()));
                match thawed {
                    Ok(true) => {
                        tracing::warn!(volume = %id, "A filesystem was left frozen and is thawed");
                    }
                    Ok(false) => {}
                    Err(error) => {
                        held = true;
                        tracing::error!(volume = %id, %error, "A filesystem left frozen is not thawed");
                    }
                }
            }
            if held {
                // The mark stays: the next start tries again.
                continue;
            }
            let _ = fs::remove_file(&self.pool.frozen(&id));
        }
    }

    /// Takes a volume and its record away, whatever state both are in.
    pub(crate) fn erase_volume(&self, volume: &VolumeRecord) -> Result<(), DriverError> {
        if self.is_in_use(volume)? {
            return Err(DriverError::precondition(format!(
                "volume {} is staged or published",
                volume.id
            )));
        }
        if volume.state != State::Deleting {
            let mut record = volume.clone();
            record.state = State::Deleting;
            self.store.volumes.put(record)?;
        }
        let dir = self.pool.volume(&volume.id);
        self.pool.discard(&dir, self.store.next_sequence())?;
        self.store.volumes.remove(volume.key())?;
        self.wake_purger();
        Ok(())
    }

    /// Takes a snapshot and its record away, whatever state both are in.
    pub(crate) fn erase_snapshot(&self, snapshot: &SnapshotRecord) -> Result<(), DriverError> {
        if snapshot.state != State::Deleting {
            let mut record = snapshot.clone();
            record.state = State::Deleting;
            self.store.snapshots.put(record)?;
        }
        let dir = self.pool.snapshot(&snapshot.id);
        self.pool.discard(&dir, self.store.next_sequence())?;
        self.store.snapshots.remove(snapshot.key())?;
        self.wake_purger();
        Ok(())
    }

    /// Takes a group, its snapshots and their records away, whatever state all are in.
    pub(crate) fn erase_group(&self, group: &GroupRecord) -> Result<(), DriverError> {
        if group.state != State::Deleting {
            let mut record = group.clone();
            record.state = State::Deleting;
            self.store.groups.put(record)?;
        }
        for id in &group.snapshots {
            let snapshot = self.store.snapshots.get(id.as_str());
            // A snapshot that is not of this group only has a name like one.
            if let Some(snapshot) = snapshot.filter(|s| s.group.as_ref() == Some(&group.id)) {
                self.erase_snapshot(&snapshot)?;
            }
        }
        self.store.groups.remove(group.key())
    }

    /// Whether the kernel has a device or a mount of a volume.
    pub(crate) fn is_in_use(&self, volume: &VolumeRecord) -> Result<bool, DriverError> {
        if !Mounts::read(self.pool.root())?.of(&volume.id).is_empty() {
            return Ok(true);
        }
        let path = self.pool.image(&volume.id);
        if !volume.kind.has_image() || !image::exists(&path)? {
            return Ok(false);
        }
        let file = image::open(&path)?;
        let until = Instant::now() + CLEAR_LIMIT;
        while let Some(device) = attach::find(&file, &path)? {
            // Whoever lists devices has each of them open for a moment, and so keeps one that
            // would clear itself. There is no event for its end.
            let clears_itself = device.status().is_ok_and(|status| status.autoclear);
            drop(device);
            if !clears_itself || Instant::now() > until {
                return Ok(true);
            }
            std::thread::sleep(CLEAR_PAUSE);
        }
        Ok(false)
    }

    /// A volume that exists, by the id somebody gave.
    pub(crate) fn volume(&self, id: &str) -> Result<VolumeRecord, DriverError> {
        let missing = || DriverError::not_found("volume", id);
        let parsed = VolumeId::parse(id).ok_or_else(missing)?;
        let record = self.store.volumes.get(parsed.as_str());
        match record {
            Some(record) if record.state == State::Ready => Ok(record),
            Some(_) => Err(missing()),
            None => {
                self.refuse_unreadable(id)?;
                Err(missing())
            }
        }
    }

    /// A snapshot that exists, by the id somebody gave.
    pub(crate) fn snapshot(&self, id: &str) -> Result<SnapshotRecord, DriverError> {
        let missing = || DriverError::not_found("snapshot", id);
        let parsed = SnapshotId::parse(id).ok_or_else(missing)?;
        let record = self.store.snapshots.get(parsed.as_str());
        match record {
            Some(record) if record.state == State::Ready => Ok(record),
            Some(_) => Err(missing()),
            None => {
                self.refuse_unreadable(id)?;
                Err(missing())
            }
        }
    }

    /// What cannot be read is neither there nor gone.
    pub(crate) fn refuse_unreadable(&self, id: &str) -> Result<(), DriverError> {
        let name = format!("{id}.json");
        let lost = self.unreadable();
        let lost = lost
            .iter()
            .find(|lost| lost.path.file_name().is_some_and(|n| n == name.as_str()));
        match lost {
            Some(lost) => Err(DriverError::Damaged {
                id: id.to_owned(),
                what: format!("its record cannot be read, {}", lost.why),
            }),
            None => Ok(()),
        }
    }

    fn wake_purger(&self) {
        match self.purge.try_send(()) {
            // One that is waiting to run will see this entry too.
            Ok(()) | Err(TrySendError::Full(()) | TrySendError::Disconnected(())) => {}
        }
    }
}

/// A name as callers give it.
pub(crate) fn check_name(what: &str, name: &str) -> Result<(), DriverError> {
    if name.is_empty() {
        return Err(DriverError::invalid(format!("{what} is missing")));
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(DriverError::invalid(format!(
            "{what} is longer than {MAX_NAME_BYTES} bytes"
        )));
    }
    Ok(())
}

/// A thread of its own: removing a large file takes as long as it takes, and no call waits.
fn start_purger(pool: Arc<Pool>) -> Result<SyncSender<()>, DriverError> {
    let (wake, woken) = sync_channel(1);
    std::thread::Builder::new()
        .name("purge".to_owned())
        .spawn(move || {
            while woken.recv().is_ok() {
                pool.purge();
            }
        })
        .map_err(DriverError::io(
            "start",
            "the thread that empties the trash",
        ))?;
    Ok(wake)
}

fn report<R: Record>(what: &str, record: &R, outcome: Result<(), DriverError>) {
    match (record.state(), outcome) {
        (State::Ready, _) => {}
        (State::Intent | State::Deleting, Ok(())) => {
            let (id, name) = (record.key(), record.name());
            tracing::info!(what, id, name, "Half-done work is undone");
        }
        (State::Intent | State::Deleting, Err(error)) => {
            let (id, error) = (record.key(), chain(&error));
            tracing::error!(what, id, error, "Half-done work cannot be undone");
        }
    }
}
