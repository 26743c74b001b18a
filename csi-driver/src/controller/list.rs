//! Lists, single answers and capacity.

use crate::driver::{Driver, check_name};
use crate::error::DriverError;
use crate::model::{Capability, Provision};
use crate::parameters::{self, Map};
use crate::plan::{self, Page};
use crate::store::{SnapshotRecord, State, VolumeRecord};

/// Which snapshots are asked for.
#[derive(Debug, Clone, Default)]
pub struct SnapshotFilter {
    /// Only this one.
    pub id: String,
    /// Only those of this volume.
    pub volume: String,
}

/// For what capacity is asked.
#[derive(Debug, Clone, Default)]
pub struct CapacityQuestion {
    /// Of a class.
    pub parameters: Map,
    /// Ways the volumes will be used.
    pub capabilities: Vec<Capability>,
    /// Where.
    pub place: Option<Map>,
}

/// What there is room for, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Altogether.
    pub available: u64,
    /// In one volume at most.
    pub largest: u64,
    /// In one volume at least.
    pub smallest: u64,
}

impl Driver {
    /// Volumes in the order of their creation.
    ///
    /// # Errors
    /// [`DriverError::BadToken`].
    pub fn list_volumes(
        &self,
        most: usize,
        token: &str,
    ) -> Result<Page<VolumeRecord>, DriverError> {
        let mut all = self.store.volumes.all();
        all.retain(|volume| volume.state == State::Ready);
        plan::page(all, most, token)
    }

    /// One volume.
    ///
    /// # Errors
    /// [`DriverError::NotFound`].
    pub fn get_volume(&self, id: &str) -> Result<VolumeRecord, DriverError> {
        check_name("the volume's id", id)?;
        self.volume(id)
    }

    /// Snapshots in the order of their creation.
    ///
    /// # Errors
    /// [`DriverError::BadToken`].
    pub fn list_snapshots(
        &self,
        filter: &SnapshotFilter,
        most: usize,
        token: &str,
    ) -> Result<Page<SnapshotRecord>, DriverError> {
        let mut all = self.store.snapshots.all();
        let fits = |wanted: &str, has: &str| wanted.is_empty() || wanted == has;
        all.retain(|snapshot| {
            snapshot.state == State::Ready
                && fits(&filter.id, snapshot.id.as_str())
                && fits(&filter.volume, snapshot.source.as_str())
        });
        plan::page(all, most, token)
    }

    /// One snapshot.
    ///
    /// # Errors
    /// [`DriverError::NotFound`].
    pub fn get_snapshot(&self, id: &str) -> Result<SnapshotRecord, DriverError> {
        check_name("the snapshot's id", id)?;
        self.snapshot(id)
    }

    /// What a class has room for on this node.
    ///
    /// # Errors
    /// [`DriverError::Parameter`], or when the pool does not answer.
    pub fn capacity(&self, question: &CapacityQuestion) -> Result<Capacity, DriverError> {
        let class = parameters::class(&question.parameters)?;
        let places: Vec<Map> = question.place.clone().into_iter().collect();
        if !plan::is_reachable(&places, &self.topology_key(), &self.config.node) {
            return Ok(Capacity::default());
        }
        let default = self.config.default_filesystem;
        let smallest = if question.capabilities.is_empty() {
            plan::GRAIN_BYTES
        } else {
            match plan::choose_kind(&class, &question.capabilities, default) {
                Ok(kind) => kind.min_bytes(),
                // No volume can be used so: there is room for none.
                Err(_) => return Ok(Capacity::default()),
            }
        };
        let room = self.pool.room(&self.store)?;
        let available = room.available(class.provision);
        let largest = match class.provision {
            Provision::Thick => available.min(plan::MAX_BYTES),
            Provision::Thin => plan::MAX_BYTES.min(available),
        };
        Ok(Capacity {
            available,
            largest: largest / plan::GRAIN_BYTES * plan::GRAIN_BYTES,
            smallest,
        })
    }

    /// Why a volume cannot be used in one of these ways; none when it can.
    ///
    /// # Errors
    /// [`DriverError::NotFound`].
    pub fn why_not(
        &self,
        id: &str,
        capabilities: &[Capability],
        parameters: &Map,
        mutable: &Map,
    ) -> Result<Option<String>, DriverError> {
        check_name("the volume's id", id)?;
        if capabilities.is_empty() {
            return Err(DriverError::invalid("volume capabilities are missing"));
        }
        let volume = self.volume(id)?;
        parameters::class(parameters)?;
        parameters::mutable(mutable)?;
        let unsupported = capabilities
            .iter()
            .find_map(|capability| plan::unsupported(capability, volume.kind));
        Ok(unsupported)
    }
}
