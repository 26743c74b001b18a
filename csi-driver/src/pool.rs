//! The directory all volumes of a node are in, and what it has room for.
//!
//! ```text
//! <pool>/pool.json             shows that the directory is ours
//!        lock                  held by the one driver that may write here
//!        records/…             see `store`
//!        volumes/<id>/image    a filesystem or block volume
//!        volumes/<id>/data/    a directory volume
//!        snapshots/<id>/image
//!        frozen/<id>           a filesystem that is held still at this moment
//!        trash/<id>.<n>/       on its way out
//! ```
//!
//! The records are the ledger: what a volume was promised and has no blocks for is a debt of the
//! pool. A record is written before its data, so two requests can never be promised the same
//! room.

use crate::error::DriverError;
use crate::model::{Kind, Provision, SnapshotId, VolumeId};
use crate::plan::Room;
use crate::store::{SnapshotRecord, State, Store, VolumeRecord, sync_dir};
use linux::failpoint::step;
use linux::fs::{self, Durability};
use linux::{blockfile, fs::FsError};
use rustix::fs::{FlockOperation, Mode, OFlags};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Says what the directory is; whose content is another is not touched.
const MARKER: &[u8] = b"{\"format\": \"ferrule csi-driver pool\", \"version\": 1}\n";

/// Settings of a pool.
#[derive(Debug, Clone, Copy)]
pub struct PoolConfig {
    /// Never given away, in per cent of the pool's filesystem.
    pub reserve_percent: u64,
    /// Most that thin volumes may be promised together, in per cent of the pool's filesystem.
    pub overcommit_percent: u64,
}

/// A pool this process owns.
#[derive(Debug)]
pub struct Pool {
    root: PathBuf,
    config: PoolConfig,
    /// Whether files can share blocks here.
    shares_blocks: bool,
    /// Held while room is looked for and the record written that takes it.
    ledger: Mutex<()>,
    /// Held while trash is carried out.
    purge: Mutex<()>,
    _lock: OwnedFd,
}

impl Pool {
    /// Takes over a directory: makes what is missing and locks it.
    ///
    /// # Errors
    /// When it holds something else, another driver owns it, or it cannot be written.
    pub fn open(root: &Path, config: PoolConfig) -> Result<Self, DriverError> {
        fs::create_dirs(root, 0o700)?;
        // What the kernel shows in its tables has no symbolic links in it.
        let root = root
            .canonicalize()
            .map_err(DriverError::io("resolve", root.display()))?;
        claim(&root)?;
        let lock = lock(&root)?;
        for folder in ["volumes", "snapshots", "frozen", "trash"] {
            fs::ensure_dir(&root.join(folder), 0o700)?;
        }
        let shares_blocks = blockfile::can_share_blocks(&root)
            .map_err(DriverError::io("try files in", root.display()))?;
        Ok(Self {
            root,
            config,
            shares_blocks,
            ledger: Mutex::new(()),
            purge: Mutex::new(()),
            _lock: lock,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether files can share blocks here (reflinks).
    #[must_use]
    pub fn shares_blocks(&self) -> bool {
        self.shares_blocks
    }

    /// The directory of a volume.
    #[must_use]
    pub fn volume(&self, id: &VolumeId) -> PathBuf {
        self.root.join("volumes").join(id.as_str())
    }

    /// The image of a volume.
    #[must_use]
    pub fn image(&self, id: &VolumeId) -> PathBuf {
        self.volume(id).join("image")
    }

    /// The content of a directory volume.
    #[must_use]
    pub fn data(&self, id: &VolumeId) -> PathBuf {
        self.volume(id).join("data")
    }

    /// The directory of a snapshot.
    #[must_use]
    pub fn snapshot(&self, id: &SnapshotId) -> PathBuf {
        self.root.join("snapshots").join(id.as_str())
    }

    /// The image of a snapshot.
    #[must_use]
    pub fn snapshot_image(&self, id: &SnapshotId) -> PathBuf {
        self.snapshot(id).join("image")
    }

    /// Says on disk that a volume's filesystem is held still.
    #[must_use]
    pub fn frozen(&self, id: &VolumeId) -> PathBuf {
        self.root.join("frozen").join(id.as_str())
    }

    /// What the pool has and owes.
    ///
    /// # Errors
    /// When the filesystem does not answer.
    pub fn room(&self, store: &Store) -> Result<Room, DriverError> {
        let stat = rustix::fs::statvfs(&self.root)
            .map_err(DriverError::io("inspect", self.root.display()))?;
        let total = stat.f_blocks.saturating_mul(stat.f_frsize);
        let mut room = Room {
            total,
            free: stat.f_bavail.saturating_mul(stat.f_frsize),
            reserve: total / 100 * self.config.reserve_percent,
            overcommit_percent: self.config.overcommit_percent,
            ..Room::default()
        };
        for volume in store.volumes.all() {
            room.debt = room.debt.saturating_add(self.debt(&volume)?);
            if volume.provision == Provision::Thin {
                room.thin = room.thin.saturating_add(volume.capacity_bytes);
            }
        }
        for snapshot in store.snapshots.all() {
            room.debt = room.debt.saturating_add(self.snapshot_debt(&snapshot));
        }
        Ok(room)
    }

    /// Looks whether there is room for `wanted` more bytes and calls `take`, which writes the
    /// record that takes it; nobody else takes room meanwhile.
    ///
    /// # Errors
    /// [`DriverError::NoRoom`], or what `take` says.
    pub fn take_room(
        &self,
        store: &Store,
        provision: Provision,
        wanted: u64,
        take: impl FnOnce() -> Result<(), DriverError>,
    ) -> Result<(), DriverError> {
        let _ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        let mut available = self.room(store)?.available(provision);
        if available < wanted {
            // What lies in the trash has room that is free already.
            self.purge();
            available = self.room(store)?.available(provision);
        }
        if available < wanted {
            return Err(DriverError::NoRoom { wanted, available });
        }
        take()
    }

    /// What a volume was promised and has no blocks for, in bytes.
    fn debt(&self, volume: &VolumeRecord) -> Result<u64, DriverError> {
        match (volume.provision, volume.kind) {
            (Provision::Thin, _) => return Ok(0),
            // What it uses is not counted: that would mean to walk through it.
            (Provision::Thick, Kind::Directory) => return Ok(volume.capacity_bytes),
            (Provision::Thick, Kind::Filesystem(_) | Kind::Block) => {}
        }
        let beside = match volume.state {
            State::Deleting => return Ok(0),
            State::Intent => volume.reserved_bytes,
            State::Ready => 0,
        };
        let path = self.image(&volume.id);
        // An image that is not there yet has no blocks; one that is lost will not come back, but
        // its promise stands until somebody deletes it.
        let Ok(meta) = path.metadata() else {
            return Ok(volume.capacity_bytes.saturating_add(beside));
        };
        let allocated = meta.blocks().saturating_mul(512);
        let missing = volume.capacity_bytes.saturating_sub(allocated);
        let missing = missing.saturating_add(beside);
        if !volume.shares_blocks {
            return Ok(missing);
        }
        let image = File::open(&path).map_err(DriverError::io("open", path.display()))?;
        let shared = blockfile::shared_bytes(image.as_fd())
            .map_err(DriverError::io("list the extents of", path.display()))?;
        Ok(missing.saturating_add(shared))
    }

    fn snapshot_debt(&self, snapshot: &SnapshotRecord) -> u64 {
        match snapshot.state {
            State::Intent => {
                let meta = self.snapshot_image(&snapshot.id).metadata();
                let allocated = meta.map_or(0, |meta| meta.blocks().saturating_mul(512));
                snapshot.reserved_bytes.saturating_sub(allocated)
            }
            State::Ready | State::Deleting => 0,
        }
    }

    /// Puts a directory of ours out of sight; what is in it goes later.
    ///
    /// # Errors
    /// When it cannot be moved; that it is not there is fine.
    pub fn discard(&self, path: &Path, unique: u64) -> Result<(), DriverError> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(());
        };
        let mut target = name.to_owned();
        target.push(format!(".{unique}"));
        let trash = self.root.join("trash");
        step();
        match std::fs::rename(path, trash.join(target)) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(DriverError::io("put into the trash", path.display())(e)),
        }
        step();
        sync_dir(&trash)?;
        sync_dir(parent)
    }

    /// Carries out the trash. What cannot be removed now is tried again next time.
    pub fn purge(&self) {
        let _purge = self.purge.lock().unwrap_or_else(PoisonError::into_inner);
        let trash = self.root.join("trash");
        for name in fs::list_dir(&trash).unwrap_or_default() {
            // Only what was put there by `discard`.
            let ours = name.to_str().is_some_and(|name| {
                let id = name.split('.').next().unwrap_or_default();
                VolumeId::parse(id).is_some() || SnapshotId::parse(id).is_some()
            });
            if !ours {
                continue;
            }
            step();
            if let Err(error) = fs::remove_tree(&trash.join(&name)) {
                let error = crate::error::chain(&error);
                tracing::warn!(entry = ?name, error, "Trash cannot be carried out");
            }
        }
    }
}

/// Makes the marker, or sees that it is there.
fn claim(root: &Path) -> Result<(), DriverError> {
    let path = root.join("pool.json");
    match fs::read_file(&path, 4096) {
        Ok(content) if content == MARKER => Ok(()),
        Ok(_) => Err(DriverError::precondition(format!(
            "{} is not a pool of this driver",
            path.display()
        ))),
        Err(error) if error.is_not_found() => {
            let others = fs::list_dir(root)?;
            // A filesystem of its own has this from the beginning.
            let others: Vec<_> = others
                .iter()
                .filter(|name| *name != "lost+found" && *name != ".pool.json.new")
                .collect();
            if others.is_empty() {
                return Ok(fs::write_atomic(
                    &path,
                    MARKER,
                    0o644,
                    Durability::PowerLoss,
                )?);
            }
            Err(DriverError::precondition(format!(
                "{} is neither empty nor a pool",
                root.display()
            )))
        }
        Err(error) => Err(error.into()),
    }
}

fn lock(root: &Path) -> Result<OwnedFd, DriverError> {
    let path = root.join("lock");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::open(&path, flags, Mode::from_raw_mode(0o600))
        .map_err(DriverError::io("open", path.display()))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(DriverError::precondition(format!(
            "another driver owns the pool {}",
            root.display()
        ))),
        Err(e) => Err(FsError::Io {
            operation: "lock",
            path,
            source: e.into(),
        }
        .into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: PoolConfig = PoolConfig {
        reserve_percent: 1,
        overcommit_percent: 200,
    };

    #[test]
    fn a_directory_with_something_else_in_it_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("thesis.tex"), "x").unwrap();
        let refused = Pool::open(dir.path(), CONFIG).unwrap_err();
        assert!(refused.to_string().contains("neither empty nor a pool"));
        assert_eq!(fs::list_dir(dir.path()).unwrap(), ["thesis.tex"]);
    }

    #[test]
    fn a_pool_has_one_owner() {
        let dir = tempfile::tempdir().unwrap();
        let first = Pool::open(dir.path(), CONFIG).unwrap();
        assert!(Pool::open(dir.path(), CONFIG).is_err());
        drop(first);
        Pool::open(dir.path(), CONFIG).unwrap();
    }

    #[test]
    fn trash_is_carried_out_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let pool = Pool::open(dir.path(), CONFIG).unwrap();
        let id = VolumeId::of("a", &crate::model::NodeTag::of("d", "n"));
        std::fs::create_dir(pool.volume(&id)).unwrap();
        std::fs::write(pool.image(&id), "x").unwrap();
        std::fs::create_dir(pool.root().join("trash/foreign")).unwrap();
        pool.discard(&pool.volume(&id), 1).unwrap();
        pool.discard(&pool.volume(&id), 2).unwrap();
        pool.purge();
        assert!(!pool.volume(&id).exists());
        assert_eq!(
            fs::list_dir(&pool.root().join("trash")).unwrap(),
            ["foreign"]
        );
    }
}
