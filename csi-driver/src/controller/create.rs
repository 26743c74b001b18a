//! CreateVolume: empty, from a snapshot, or from another volume.

use super::still::Stillness;
use crate::backend::{format, grow, image};
use crate::driver::{Driver, check_name};
use crate::error::{DriverError, chain};
use crate::locks::Guard;
use crate::model::{
    Capability, CapacityRange, Filesystem, Kind, Provision, SnapshotId, Source, VolumeId,
};
use crate::parameters::{self, Consistency, Map};
use crate::plan;
use crate::store::{SnapshotRecord, State, VolumeRecord};
use std::fs::File;
use std::path::Path;

/// A request for a volume.
#[derive(Debug, Clone, Default)]
pub struct CreateVolume {
    /// Name; asked for again, it is the same volume.
    pub name: String,
    /// Wanted size.
    pub range: CapacityRange,
    /// Ways it will be used.
    pub capabilities: Vec<Capability>,
    /// Of its class.
    pub parameters: Map,
    /// What can be changed later.
    pub mutable: Map,
    /// Id of the snapshot it starts as.
    pub snapshot: Option<String>,
    /// Id of the volume it starts as.
    pub volume: Option<String>,
    /// Places where it must be reachable, any of them; none for no wish.
    pub places: Vec<Map>,
}

/// What a new volume starts as.
enum Origin {
    Snapshot(SnapshotRecord),
    Volume(VolumeRecord),
}

impl Origin {
    fn kind(&self) -> Kind {
        match self {
            Self::Snapshot(snapshot) => snapshot.kind,
            Self::Volume(volume) => volume.kind,
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Snapshot(snapshot) => snapshot.size_bytes,
            Self::Volume(volume) => volume.capacity_bytes,
        }
    }
}

impl Driver {
    /// Makes a volume, or finds the one that was made by the same request before.
    ///
    /// # Errors
    /// [`DriverError`]; nothing of the volume is left then.
    pub fn create_volume(&self, request: &CreateVolume) -> Result<VolumeRecord, DriverError> {
        check_name("the volume's name", &request.name)?;
        let class = parameters::class(&request.parameters)?;
        let mutable = parameters::mutable(&request.mutable)?;
        let source = self.source_of(request)?;
        // What is wrong with the request itself is said before anything is looked for.
        plan::choose_kind(
            &class,
            &request.capabilities,
            self.config.default_filesystem,
        )?;
        let id = VolumeId::of(&request.name, &self.tag);
        let mut guard = vec![self.locks.take([&id])?];
        let existing = self.store.volumes.get(id.as_str());
        if let Some(existing) = &existing
            && existing.state == State::Ready
        {
            let kind = self.kind_for(request, &class, Some(existing.kind))?;
            return same(existing, request, kind, source.as_ref());
        }
        if !plan::is_reachable(&request.places, &self.topology_key(), &self.config.node) {
            let node = self.config.node.clone();
            return Err(DriverError::Elsewhere { node });
        }
        if let Some(existing) = existing {
            self.erase_volume(&existing)?;
        }
        let origin = self.origin(source.as_ref(), &mut guard)?;
        let kind = self.kind_for(request, &class, origin.as_ref().map(Origin::kind))?;
        let capacity_bytes = size(request.range, kind, origin.as_ref())?;
        let record = VolumeRecord {
            id,
            name: request.name.clone(),
            state: State::Intent,
            kind,
            provision: class.provision,
            capacity_bytes,
            parameters: parameters::essential(&request.parameters),
            mutable,
            filesystem_uuid: match kind {
                Kind::Filesystem(_) => Some(format::new_uuid()?),
                Kind::Directory | Kind::Block => None,
            },
            shares_blocks: source.is_some() && self.pool.shares_blocks(),
            reserved_bytes: self.room_for_origin(origin.as_ref())?,
            source,
            sequence: self.store.next_sequence(),
        };
        self.make(record, origin.as_ref())
    }

    /// Books the room, writes the intent, makes the data, and only then says that it is there.
    fn make(
        &self,
        mut record: VolumeRecord,
        origin: Option<&Origin>,
    ) -> Result<VolumeRecord, DriverError> {
        let wanted = record.capacity_bytes.saturating_add(record.reserved_bytes);
        self.pool
            .take_room(&self.store, record.provision, wanted, || {
                self.store.volumes.put(record.clone())
            })?;
        let made = self.make_data(&record, origin).and_then(|()| {
            record.state = State::Ready;
            record.reserved_bytes = 0;
            self.store.volumes.put(record.clone())
        });
        match made {
            Ok(()) => Ok(record),
            Err(error) => {
                record.state = State::Intent;
                if let Err(error) = self.erase_volume(&record) {
                    let error = chain(&error);
                    tracing::error!(volume = %record.id, error, "A failed volume is still there");
                }
                Err(error)
            }
        }
    }

    fn make_data(&self, record: &VolumeRecord, origin: Option<&Origin>) -> Result<(), DriverError> {
        let dir = self.pool.volume(&record.id);
        if record.kind == Kind::Directory {
            let data = self.pool.data(&record.id);
            image::create_dir(&dir)?;
            image::create_dir(&data)?;
            let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(&data, open)
                .map_err(DriverError::io("set the mode of", data.display()))?;
            return image::settle_dir(&dir);
        }
        let path = self.pool.image(&record.id);
        let file = image::create(&dir, &path)?;
        if let Some(origin) = origin {
            self.fill(origin, &file, &path)?;
        }
        image::extend(&file, &path, record.capacity_bytes, record.provision)?;
        if let (Kind::Filesystem(filesystem), Some(uuid)) = (record.kind, &record.filesystem_uuid) {
            match origin {
                None => format::make(filesystem, &path, uuid)?,
                Some(_) => grow::renew(filesystem, &path, record.id.as_str(), uuid)?,
            }
        }
        image::settle(&file, &dir)
    }

    fn fill(&self, origin: &Origin, file: &File, path: &Path) -> Result<(), DriverError> {
        let share = self.pool.shares_blocks();
        match origin {
            Origin::Snapshot(snapshot) => {
                let from = self.pool.snapshot_image(&snapshot.id);
                image::fill(&image::open(&from)?, file, path, share, || true)
            }
            Origin::Volume(volume) => {
                let from = image::open(&self.pool.image(&volume.id))?;
                self.note_sharing(volume)?;
                let still = Stillness::hold(self, volume, Consistency::Freeze)?;
                image::fill(&from, file, path, share, || still.holds())?;
                still.release()
            }
        }
    }

    /// Room a source needs because its blocks are shared from now on, in bytes: each write to
    /// them takes a new one.
    fn room_for_origin(&self, origin: Option<&Origin>) -> Result<u64, DriverError> {
        match origin {
            Some(Origin::Volume(volume)) => self.room_to_diverge(volume),
            // A snapshot is never written.
            Some(Origin::Snapshot(_)) | None => Ok(0),
        }
    }

    pub(super) fn room_to_diverge(&self, volume: &VolumeRecord) -> Result<u64, DriverError> {
        if !self.pool.shares_blocks() || volume.provision == Provision::Thin {
            return Ok(0);
        }
        let path = self.pool.image(&volume.id);
        image::allocated_bytes(&image::open(&path)?, &path)
    }

    /// Remembers, before it is so, that a volume's blocks are shared.
    pub(super) fn note_sharing(&self, volume: &VolumeRecord) -> Result<(), DriverError> {
        if volume.shares_blocks || !self.pool.shares_blocks() {
            return Ok(());
        }
        let mut record = volume.clone();
        record.shares_blocks = true;
        self.store.volumes.put(record)
    }

    fn source_of(&self, request: &CreateVolume) -> Result<Option<Source>, DriverError> {
        match (&request.snapshot, &request.volume) {
            (None, None) => Ok(None),
            (Some(id), None) => SnapshotId::parse(id)
                .map(|id| Some(Source::Snapshot(id)))
                .ok_or_else(|| DriverError::not_found("snapshot", id)),
            (None, Some(id)) => VolumeId::parse(id)
                .map(|id| Some(Source::Volume(id)))
                .ok_or_else(|| DriverError::not_found("volume", id)),
            (Some(_), Some(_)) => Err(DriverError::invalid("a volume has one source")),
        }
    }

    /// The source, held for as long as it is read.
    fn origin(
        &self,
        source: Option<&Source>,
        guard: &mut Vec<Guard>,
    ) -> Result<Option<Origin>, DriverError> {
        match source {
            None => Ok(None),
            Some(Source::Snapshot(id)) => {
                guard.push(self.locks.take([id])?);
                Ok(Some(Origin::Snapshot(self.snapshot(id.as_str())?)))
            }
            Some(Source::Volume(id)) => {
                guard.push(self.locks.take([id])?);
                let volume = self.volume(id.as_str())?;
                if volume.kind == Kind::Directory {
                    return Err(no_copies());
                }
                Ok(Some(Origin::Volume(volume)))
            }
        }
    }

    /// What the volume is; without a wish it is what its source is.
    fn kind_for(
        &self,
        request: &CreateVolume,
        class: &parameters::ClassParameters,
        source: Option<Kind>,
    ) -> Result<Kind, DriverError> {
        let default = match source {
            Some(Kind::Filesystem(filesystem)) => filesystem,
            Some(Kind::Directory | Kind::Block) | None => self.config.default_filesystem,
        };
        plan::choose_kind(class, &request.capabilities, default)
    }
}

pub(super) fn no_copies() -> DriverError {
    DriverError::precondition("a volume of type dir can neither be cloned nor have snapshots")
}

/// The volume that is there, if it is what was asked for.
fn same(
    existing: &VolumeRecord,
    request: &CreateVolume,
    kind: Kind,
    source: Option<&Source>,
) -> Result<VolumeRecord, DriverError> {
    let parameters = parameters::essential(&request.parameters);
    match plan::difference(existing, kind, request.range, &parameters, source) {
        None => Ok(existing.clone()),
        Some(how) => Err(DriverError::Exists {
            what: "volume",
            name: request.name.clone(),
            how,
        }),
    }
}

fn size(range: CapacityRange, kind: Kind, origin: Option<&Origin>) -> Result<u64, DriverError> {
    let Some(origin) = origin else {
        return plan::choose_size(range, kind.min_bytes());
    };
    if origin.kind() != kind {
        let (is, wanted) = (origin.kind().name(), kind.name());
        return Err(DriverError::invalid(format!(
            "the source is {is}, the volume would be {wanted}"
        )));
    }
    let source = origin.bytes();
    if range.required != 0 && range.required < source {
        let required = range.required;
        return Err(DriverError::OutOfRange {
            what: format!("the source has {source} bytes, {required} are too few"),
        });
    }
    let smallest = source.max(kind.min_bytes());
    let range = CapacityRange {
        required: range.required.max(smallest),
        ..range
    };
    plan::choose_size(range, smallest)
}

impl Default for Filesystem {
    /// What everybody's kernel mounts.
    fn default() -> Self {
        Self::Ext4
    }
}
