//! CreateVolumeGroupSnapshot: several volumes at one moment. All are held still before the first
//! is copied, and go on after the last.

use super::snapshot::Take;
use crate::driver::{Driver, check_name};
use crate::error::{DriverError, chain};
use crate::model::{GroupId, SnapshotId};
use crate::parameters::{self, Map};
use crate::store::{GroupRecord, SnapshotRecord, State};
use std::collections::BTreeSet;

/// Volumes in one group at most: all of them hold still until the last is copied.
const MOST_VOLUMES: usize = 128;

/// A request for a group snapshot.
#[derive(Debug, Clone, Default)]
pub struct CreateGroup {
    /// Name; asked for again, it is the same group.
    pub name: String,
    /// Ids of the volumes.
    pub volumes: Vec<String>,
    /// Of its class.
    pub parameters: Map,
}

impl Driver {
    /// Takes snapshots of several volumes at one moment, or finds those that were taken by the
    /// same request before.
    ///
    /// # Errors
    /// [`DriverError`]; nothing of the group is left then.
    pub fn create_group(
        &self,
        request: &CreateGroup,
    ) -> Result<(GroupRecord, Vec<SnapshotRecord>), DriverError> {
        check_name("the group snapshot's name", &request.name)?;
        let wanted: BTreeSet<&str> = request.volumes.iter().map(String::as_str).collect();
        if wanted.is_empty() || wanted.len() > MOST_VOLUMES {
            return Err(DriverError::invalid(format!(
                "a group has 1 to {MOST_VOLUMES} volumes"
            )));
        }
        let consistency = parameters::snapshot(&request.parameters)?;
        let id = GroupId::of(&request.name, &self.tag);
        let _guard = self.locks.take([&id])?;
        match self.store.groups.get(id.as_str()) {
            Some(existing) if existing.state == State::Ready => {
                return self.same(existing, &wanted);
            }
            Some(half_done) => self.erase_group(&half_done)?,
            None => {}
        }
        let mut takes = Vec::new();
        let mut guards = Vec::new();
        for volume in &wanted {
            let volume = self.volume(volume)?;
            let name = format!("{id}/{}", volume.id);
            let snapshot = SnapshotId::of(&name, &self.tag);
            guards.push(self.locks.take([volume.id.as_str(), snapshot.as_str()])?);
            let volume = self.volume(volume.id.as_str())?;
            takes.push(self.plan_snapshot(volume, snapshot, &name, Some(id.clone()))?);
        }
        let mut group = GroupRecord {
            id,
            name: request.name.clone(),
            state: State::Intent,
            sources: takes.iter().map(|take| take.volume.id.clone()).collect(),
            snapshots: takes.iter().map(|take| take.record.id.clone()).collect(),
            sequence: self.store.next_sequence(),
        };
        self.store.groups.put(group.clone())?;
        let taken = self.take_all(takes, consistency).and_then(|taken| {
            group.state = State::Ready;
            self.store.groups.put(group.clone())?;
            Ok(taken)
        });
        taken.map(|taken| (group.clone(), taken)).inspect_err(|_| {
            group.state = State::Intent;
            if let Err(error) = self.erase_group(&group) {
                let error = chain(&error);
                tracing::error!(group = %group.id, error, "A failed group is still there");
            }
        })
    }

    fn take_all(
        &self,
        takes: Vec<Take>,
        consistency: parameters::Consistency,
    ) -> Result<Vec<SnapshotRecord>, DriverError> {
        for take in &takes {
            self.reserve(take)?;
        }
        self.capture(takes, consistency)
    }

    /// A group and its snapshots.
    ///
    /// # Errors
    /// [`DriverError::NotFound`].
    pub fn group(&self, id: &str) -> Result<(GroupRecord, Vec<SnapshotRecord>), DriverError> {
        check_name("the group snapshot's id", id)?;
        let missing = || DriverError::not_found("group snapshot", id);
        let parsed = GroupId::parse(id).ok_or_else(missing)?;
        let group = self.store.groups.get(parsed.as_str());
        let group = group.filter(|group| group.state == State::Ready);
        let group = group.ok_or_else(missing)?;
        let snapshots = self.members(&group)?;
        Ok((group, snapshots))
    }

    fn same(
        &self,
        existing: GroupRecord,
        wanted: &BTreeSet<&str>,
    ) -> Result<(GroupRecord, Vec<SnapshotRecord>), DriverError> {
        let has: BTreeSet<&str> = existing.sources.iter().map(|id| id.as_str()).collect();
        if has == *wanted {
            let snapshots = self.members(&existing)?;
            return Ok((existing, snapshots));
        }
        Err(DriverError::Exists {
            what: "group snapshot",
            name: existing.name,
            how: "of other volumes".to_owned(),
        })
    }

    fn members(&self, group: &GroupRecord) -> Result<Vec<SnapshotRecord>, DriverError> {
        let ids = group.snapshots.iter();
        ids.map(|id| self.snapshot(id.as_str())).collect()
    }
}
