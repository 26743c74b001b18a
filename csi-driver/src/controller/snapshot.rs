//! CreateSnapshot, and what a group of snapshots has in common with it.

use super::create::no_copies;
use super::still::Stillness;
use crate::backend::image;
use crate::driver::{Driver, check_name};
use crate::error::{DriverError, chain};
use crate::model::{GroupId, Kind, Provision, SnapshotId, VolumeId};
use crate::parameters::{self, Consistency, Map};
use crate::plan;
use crate::store::{SnapshotRecord, State, VolumeRecord};

/// A request for a snapshot.
#[derive(Debug, Clone, Default)]
pub struct CreateSnapshot {
    /// Name; asked for again, it is the same snapshot.
    pub name: String,
    /// Id of the volume.
    pub volume: String,
    /// Of its class.
    pub parameters: Map,
    /// Places where it must be reachable, any of them; none for no wish.
    pub places: Vec<Map>,
}

/// A snapshot that is to be taken.
#[derive(Debug)]
pub(super) struct Take {
    /// Of what.
    pub(super) volume: VolumeRecord,
    /// Its record, so far an intent.
    pub(super) record: SnapshotRecord,
}

impl Driver {
    /// Takes a snapshot, or finds the one that was taken by the same request before.
    ///
    /// # Errors
    /// [`DriverError`]; nothing of the snapshot is left then.
    pub fn create_snapshot(&self, request: &CreateSnapshot) -> Result<SnapshotRecord, DriverError> {
        check_name("the snapshot's name", &request.name)?;
        check_name("the source volume's id", &request.volume)?;
        let consistency = parameters::snapshot(&request.parameters)?;
        let id = SnapshotId::of(&request.name, &self.tag);
        let _guard = self.locks.take([&id])?;
        match self.store.snapshots.get(id.as_str()) {
            Some(existing) if existing.state == State::Ready => {
                return same(existing, request);
            }
            Some(half_done) => self.erase_snapshot(&half_done)?,
            None => {}
        }
        if !plan::is_reachable(&request.places, &self.topology_key(), &self.config.node) {
            let node = self.config.node.clone();
            return Err(DriverError::Elsewhere { node });
        }
        let volume = self.volume(&request.volume)?;
        let _source = self.locks.take([&volume.id])?;
        // It may have gone while nobody held it.
        let volume = self.volume(volume.id.as_str())?;
        let take = self.plan_snapshot(volume, id, &request.name, None)?;
        self.reserve(&take)?;
        let record = take.record.clone();
        match self.capture(vec![take], consistency) {
            Ok(mut taken) => Ok(taken.pop().unwrap_or(record)),
            Err(error) => {
                self.give_up(&record);
                Err(error)
            }
        }
    }

    /// The record of a snapshot that is to be taken.
    pub(super) fn plan_snapshot(
        &self,
        volume: VolumeRecord,
        id: SnapshotId,
        name: &str,
        group: Option<GroupId>,
    ) -> Result<Take, DriverError> {
        if volume.kind == Kind::Directory {
            return Err(no_copies());
        }
        let path = self.pool.image(&volume.id);
        let file = image::open(&path)?;
        let size_bytes = file
            .metadata()
            .map_err(DriverError::io("inspect", path.display()))?
            .len();
        // A copy needs blocks of its own; where they are shared, the volume needs new ones once
        // it is written.
        let reserved_bytes = if self.pool.shares_blocks() {
            self.room_to_diverge(&volume)?
        } else {
            image::allocated_bytes(&file, &path)?
        };
        let record = SnapshotRecord {
            id,
            name: name.to_owned(),
            state: State::Intent,
            source: volume.id.clone(),
            kind: volume.kind,
            size_bytes,
            filesystem_uuid: volume.filesystem_uuid.clone(),
            consistent: false,
            reserved_bytes,
            group,
            sequence: self.store.next_sequence(),
        };
        Ok(Take { volume, record })
    }

    /// Books the room and writes the intent.
    pub(super) fn reserve(&self, take: &Take) -> Result<(), DriverError> {
        let wanted = take.record.reserved_bytes;
        self.pool
            .take_room(&self.store, Provision::Thick, wanted, || {
                self.store.snapshots.put(take.record.clone())
            })
    }

    /// Takes snapshots of volumes, all at one moment.
    pub(super) fn capture(
        &self,
        takes: Vec<Take>,
        consistency: Consistency,
    ) -> Result<Vec<SnapshotRecord>, DriverError> {
        let mut files = Vec::new();
        for take in &takes {
            self.note_sharing(&take.volume)?;
            let dir = self.pool.snapshot(&take.record.id);
            let path = self.pool.snapshot_image(&take.record.id);
            let from = image::open(&self.pool.image(&take.volume.id))?;
            files.push((from, image::create(&dir, &path)?, path, dir));
        }
        let mut stills = Vec::new();
        for take in &takes {
            stills.push(Stillness::hold(self, &take.volume, consistency)?);
        }
        for (from, to, path, _) in &files {
            let go_on = || stills.iter().all(Stillness::holds);
            image::fill(from, to, path, self.pool.shares_blocks(), go_on)?;
        }
        let consistent: Vec<bool> = stills.iter().map(Stillness::is_consistent).collect();
        // All go on before any failure is told.
        let released: Vec<_> = stills.into_iter().map(Stillness::release).collect();
        released.into_iter().collect::<Result<(), _>>()?;
        let mut taken = Vec::new();
        for ((take, consistent), (_, file, _, dir)) in takes.into_iter().zip(consistent).zip(&files)
        {
            image::settle(file, dir)?;
            let mut record = take.record;
            record.state = State::Ready;
            record.consistent = consistent;
            record.reserved_bytes = 0;
            self.store.snapshots.put(record.clone())?;
            taken.push(record);
        }
        Ok(taken)
    }

    pub(super) fn give_up(&self, record: &SnapshotRecord) {
        if let Err(error) = self.erase_snapshot(record) {
            let error = chain(&error);
            tracing::error!(snapshot = %record.id, error, "A failed snapshot is still there");
        }
    }
}

fn same(existing: SnapshotRecord, request: &CreateSnapshot) -> Result<SnapshotRecord, DriverError> {
    if VolumeId::parse(&request.volume).as_ref() == Some(&existing.source) {
        return Ok(existing);
    }
    Err(DriverError::Exists {
        what: "snapshot",
        name: request.name.clone(),
        how: format!("of volume {}", existing.source),
    })
}
