//! Durable records, one file each, and an index of them in memory.
//!
//! A record is on the disk before the data it describes is touched, and leaves it after the data
//! has gone. A file that is no record of ours is left alone and reported. Two writers of one
//! record are kept apart by the caller ([`crate::locks`]).

mod record;

pub use record::{
    DecodeError, GroupRecord, Record, SnapshotRecord, State, VERSION, VolumeRecord, decode, encode,
};

use crate::error::DriverError;
use linux::failpoint::step;
use linux::fs::{self, Durability};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Longest record accepted: parameters are the only part that grows, and gRPC bounds those.
const MAX_RECORD_BYTES: usize = 4 << 20;

/// A file in a folder of records that is not one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// Where it is.
    pub path: PathBuf,
    /// Why it was not taken.
    pub why: String,
}

/// All records of one type.
#[derive(Debug)]
pub struct Table<R> {
    dir: PathBuf,
    rows: Mutex<BTreeMap<String, R>>,
    /// Ids whose files could not be read: they are neither there nor free.
    lost: Vec<Unreadable>,
}

impl<R: Record> Table<R> {
    /// Reads what is in `records/<folder>`, which is made when it is missing.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn open(records: &Path) -> Result<Self, DriverError> {
        let dir = records.join(R::FOLDER);
        fs::create_dirs(&dir, 0o700)?;
        Self::read(records)
    }

    /// As [`Table::open`], without making anything.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn read(records: &Path) -> Result<Self, DriverError> {
        let dir = records.join(R::FOLDER);
        let mut rows = BTreeMap::new();
        let mut lost = Vec::new();
        for name in fs::list_dir(&dir)? {
            if is_unfinished(&name) {
                continue;
            }
            let path = dir.join(&name);
            match read_record::<R>(&path) {
                Ok(record) => {
                    rows.insert(record.key().to_owned(), record);
                }
                Err(why) => lost.push(Unreadable { path, why }),
            }
        }
        Ok(Self {
            dir,
            rows: Mutex::new(rows),
            lost,
        })
    }

    /// Files that are no records.
    #[must_use]
    pub fn unreadable(&self) -> &[Unreadable] {
        &self.lost
    }

    /// The record with an id.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<R> {
        self.rows().get(key).cloned()
    }

    /// All records in the order of their creation.
    #[must_use]
    pub fn all(&self) -> Vec<R> {
        let mut all: Vec<R> = self.rows().values().cloned().collect();
        all.sort_by(|a, b| (a.sequence(), a.key()).cmp(&(b.sequence(), b.key())));
        all
    }

    /// Writes a record; after power loss it is there.
    ///
    /// # Errors
    /// When it cannot be written, or when an unreadable file has its place.
    pub fn put(&self, record: R) -> Result<(), DriverError> {
        let path = self.path(record.key());
        if let Some(lost) = self.lost.iter().find(|lost| lost.path == path) {
            return Err(DriverError::Damaged {
                id: record.key().to_owned(),
                what: format!("its record cannot be read, {}", lost.why),
            });
        }
        let bytes = encode(&record).map_err(|e| DriverError::io("encode", record.key())(e))?;
        step();
        fs::write_atomic(&path, &bytes, 0o600, Durability::PowerLoss)?;
        step();
        self.rows().insert(record.key().to_owned(), record);
        Ok(())
    }

    /// Removes a record; one that is not there is fine.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&self, key: &str) -> Result<(), DriverError> {
        step();
        fs::remove_file(&self.path(key))?;
        sync_dir(&self.dir)?;
        step();
        self.rows().remove(key);
        Ok(())
    }

    fn path(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{key}.json"))
    }

    fn rows(&self) -> MutexGuard<'_, BTreeMap<String, R>> {
        // A map is whole between any two of its operations.
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a write that was cut off leaves; the next one of the same record uses it again.
fn is_unfinished(name: &OsStr) -> bool {
    name.to_str()
        .is_some_and(|name| name.starts_with('.') && name.ends_with(".new"))
}

fn read_record<R: Record>(path: &Path) -> Result<R, String> {
    let bytes = fs::read_file(path, MAX_RECORD_BYTES).map_err(|e| crate::error::chain(&e))?;
    let record: R = decode(&bytes).map_err(|e| crate::error::chain(&e))?;
    let expected = path.file_stem().and_then(OsStr::to_str);
    if expected == Some(record.key()) {
        Ok(record)
    } else {
        Err(format!("it is the record of {}", record.key()))
    }
}

/// Makes what was created or removed in a directory last.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), DriverError> {
    let open = fs::open_dir(dir)?;
    rustix::fs::fsync(&open).map_err(DriverError::io("sync", dir.display()))
}

/// All records of a pool.
#[derive(Debug)]
pub struct Store {
    /// Volumes.
    pub volumes: Table<VolumeRecord>,
    /// Snapshots.
    pub snapshots: Table<SnapshotRecord>,
    /// Groups of snapshots.
    pub groups: Table<GroupRecord>,
    last_sequence: Mutex<u64>,
}

impl Store {
    /// Opens the records of a pool.
    ///
    /// # Errors
    /// When their folders cannot be made or read.
    pub fn open(pool: &Path) -> Result<Self, DriverError> {
        let records = pool.join("records");
        Ok(Self::with(
            Table::open(&records)?,
            Table::open(&records)?,
            Table::open(&records)?,
        ))
    }

    /// Reads the records of a pool that another process may own.
    ///
    /// # Errors
    /// When their folders cannot be read.
    pub fn read(pool: &Path) -> Result<Self, DriverError> {
        let records = pool.join("records");
        Ok(Self::with(
            Table::read(&records)?,
            Table::read(&records)?,
            Table::read(&records)?,
        ))
    }

    fn with(
        volumes: Table<VolumeRecord>,
        snapshots: Table<SnapshotRecord>,
        groups: Table<GroupRecord>,
    ) -> Self {
        let last = |sequences: Vec<u64>| sequences.into_iter().max().unwrap_or(0);
        let newest = last(volumes.all().iter().map(Record::sequence).collect())
            .max(last(snapshots.all().iter().map(Record::sequence).collect()))
            .max(last(groups.all().iter().map(Record::sequence).collect()));
        Self {
            volumes,
            snapshots,
            groups,
            last_sequence: Mutex::new(newest),
        }
    }

    /// The place in the order of creation of what is made now. Grows also when the clock is set
    /// back: a list that is being paged through must not have to look behind itself.
    pub fn next_sequence(&self) -> u64 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now = now.map_or(0, |age| u64::try_from(age.as_nanos()).unwrap_or(u64::MAX));
        let mut last = self
            .last_sequence
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *last = now.max(last.saturating_add(1));
        *last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{GroupId, NodeTag};

    fn group(name: &str) -> GroupRecord {
        GroupRecord {
            id: GroupId::of(name, &NodeTag::of("d", "n")),
            name: name.into(),
            state: State::Ready,
            sources: Vec::new(),
            snapshots: Vec::new(),
            sequence: 7,
        }
    }

    #[test]
    fn records_are_there_after_a_restart_and_gone_after_removal() {
        let pool = tempfile::tempdir().unwrap();
        let store = Store::open(pool.path()).unwrap();
        store.groups.put(group("a")).unwrap();
        store.groups.put(group("b")).unwrap();
        store.groups.remove(group("a").key()).unwrap();
        let again = Store::open(pool.path()).unwrap();
        assert_eq!(again.groups.all(), [group("b")]);
    }

    #[test]
    fn an_unreadable_record_is_kept_reported_and_never_written_over() {
        let pool = tempfile::tempdir().unwrap();
        let store = Store::open(pool.path()).unwrap();
        store.groups.put(group("a")).unwrap();
        let path = store.groups.path(group("a").key());
        std::fs::write(&path, "").unwrap();
        let again = Store::open(pool.path()).unwrap();
        assert_eq!(again.groups.unreadable()[0].path, path);
        assert!(again.groups.put(group("a")).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"");
    }

    #[test]
    fn a_record_under_another_name_is_not_believed() {
        let pool = tempfile::tempdir().unwrap();
        let store = Store::open(pool.path()).unwrap();
        store.groups.put(group("a")).unwrap();
        let (a, b) = (
            store.groups.path(group("a").key()),
            store.groups.path("g-x"),
        );
        std::fs::copy(a, b).unwrap();
        let again = Store::open(pool.path()).unwrap();
        assert_eq!(again.groups.all().len(), 1);
        assert_eq!(again.groups.unreadable().len(), 1);
    }

    #[test]
    fn the_order_of_creation_only_grows() {
        let pool = tempfile::tempdir().unwrap();
        let store = Store::open(pool.path()).unwrap();
        let mut record = group("a");
        record.sequence = u64::MAX - 5;
        store.groups.put(record).unwrap();
        let again = Store::open(pool.path()).unwrap();
        assert_eq!(again.next_sequence(), u64::MAX - 4);
        assert_eq!(again.next_sequence(), u64::MAX - 3);
    }
}
