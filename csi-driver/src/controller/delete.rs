//! DeleteVolume and DeleteSnapshot. What is not there is deleted.

use crate::driver::{Driver, check_name};
use crate::error::DriverError;
use crate::model::{GroupId, SnapshotId, VolumeId};

impl Driver {
    /// Removes a volume. Its snapshots and clones stay.
    ///
    /// # Errors
    /// [`DriverError::Precondition`] when it is in use or on another node.
    pub fn delete_volume(&self, id: &str) -> Result<(), DriverError> {
        check_name("the volume's id", id)?;
        let Some(id) = VolumeId::parse(id) else {
            return Ok(());
        };
        let _guard = self.locks.take([&id])?;
        match self.store.volumes.get(id.as_str()) {
            Some(volume) => self.erase_volume(&volume),
            None => self.absent(id.as_str(), id.is_of(&self.tag)),
        }
    }

    /// Removes a snapshot. Volumes made from it stay.
    ///
    /// # Errors
    /// [`DriverError::Precondition`] when it belongs to a group or is on another node.
    pub fn delete_snapshot(&self, id: &str) -> Result<(), DriverError> {
        check_name("the snapshot's id", id)?;
        let Some(id) = SnapshotId::parse(id) else {
            return Ok(());
        };
        let _guard = self.locks.take([&id])?;
        let Some(snapshot) = self.store.snapshots.get(id.as_str()) else {
            return self.absent(id.as_str(), id.is_of(&self.tag));
        };
        if let Some(group) = &snapshot.group
            && self.store.groups.get(group.as_str()).is_some()
        {
            return Err(DriverError::precondition(format!(
                "snapshot {id} belongs to group {group} and goes with it"
            )));
        }
        self.erase_snapshot(&snapshot)
    }

    /// Removes a group and its snapshots.
    ///
    /// # Errors
    /// [`DriverError`].
    pub fn delete_group(&self, id: &str) -> Result<(), DriverError> {
        check_name("the group snapshot's id", id)?;
        let Some(id) = GroupId::parse(id) else {
            return Ok(());
        };
        let Some(group) = self.store.groups.get(id.as_str()) else {
            return self.absent(id.as_str(), id.is_of(&self.tag));
        };
        let members = group.snapshots.iter().map(ToString::to_string);
        let _guard = self.locks.take(members.chain([id.to_string()]))?;
        self.erase_group(&group)
    }

    /// There is no record: gone when it was ours, and not for us to say when it was not.
    fn absent(&self, id: &str, ours: bool) -> Result<(), DriverError> {
        self.refuse_unreadable(id)?;
        if ours {
            return Ok(());
        }
        Err(DriverError::precondition(format!(
            "{id} is on another node than {}",
            self.config.node
        )))
    }
}
