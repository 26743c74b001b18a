//! Messages and plain values.

use crate::controller::CreateVolume;
use crate::driver::Driver;
use crate::model::{Access, Capability, CapacityRange, Mode, Source};
use crate::node::{Ailment, Severity};
use crate::parameters::Map;
use crate::store::{SnapshotRecord, VolumeRecord};
use proto::csi::v1;
use proto::csi::v1::volume_capability::{AccessType, access_mode};
use std::collections::HashMap;
use tonic::Status;

pub(super) fn map(map: HashMap<String, String>) -> Map {
    map.into_iter().collect()
}

pub(super) fn range(range: Option<v1::CapacityRange>) -> Result<CapacityRange, Status> {
    Ok(optional_range(range)?.unwrap_or_default())
}

pub(super) fn optional_range(
    range: Option<v1::CapacityRange>,
) -> Result<Option<CapacityRange>, Status> {
    let Some(range) = range else { return Ok(None) };
    let bytes =
        |bytes: i64| u64::try_from(bytes).map_err(|_| Status::out_of_range("a size is below zero"));
    let limit = bytes(range.limit_bytes)?;
    Ok(Some(CapacityRange {
        required: bytes(range.required_bytes)?,
        limit: (limit != 0).then_some(limit),
    }))
}

/// Entries on a page; 0 for all.
pub(super) fn entries(most: i32) -> Result<usize, Status> {
    usize::try_from(most).map_err(|_| Status::invalid_argument("max_entries is below zero"))
}

pub(super) fn capabilities(
    capabilities: Vec<v1::VolumeCapability>,
) -> Result<Vec<Capability>, Status> {
    capabilities.into_iter().map(capability).collect()
}

pub(super) fn capability(capability: v1::VolumeCapability) -> Result<Capability, Status> {
    let access = match capability.access_type {
        Some(AccessType::Block(_)) => Access::Block,
        Some(AccessType::Mount(mount)) => Access::Mount {
            fstype: mount.fs_type,
            options: mount.mount_flags,
            group: group(&mount.volume_mount_group)?,
        },
        None => {
            return Err(Status::invalid_argument(
                "the capability names neither block nor mount",
            ));
        }
    };
    let mode = capability.access_mode.map_or(0, |mode| mode.mode);
    let mode = access_mode::Mode::try_from(mode)
        .map_err(|_| Status::invalid_argument("the access mode is not known"))?;
    let mode = match mode {
        access_mode::Mode::Unknown => {
            return Err(Status::invalid_argument("the access mode is missing"));
        }
        access_mode::Mode::SingleNodeWriter => Mode::SingleNodeWriter,
        access_mode::Mode::SingleNodeReaderOnly => Mode::SingleNodeReader,
        access_mode::Mode::SingleNodeSingleWriter => Mode::SingleNodeSingleWriter,
        access_mode::Mode::SingleNodeMultiWriter => Mode::SingleNodeMultiWriter,
        access_mode::Mode::MultiNodeReaderOnly
        | access_mode::Mode::MultiNodeSingleWriter
        | access_mode::Mode::MultiNodeMultiWriter => Mode::MultiNode,
    };
    Ok(Capability { access, mode })
}

fn group(group: &str) -> Result<Option<u32>, Status> {
    if group.is_empty() {
        return Ok(None);
    }
    let number = group
        .parse()
        .map_err(|_| Status::invalid_argument("volume_mount_group is no number of a group"))?;
    Ok(Some(number))
}

pub(super) fn create_volume(request: v1::CreateVolumeRequest) -> Result<CreateVolume, Status> {
    let mut wanted = CreateVolume {
        name: request.name,
        range: range(request.capacity_range)?,
        capabilities: capabilities(request.volume_capabilities)?,
        parameters: map(request.parameters),
        mutable: map(request.mutable_parameters),
        places: places(request.accessibility_requirements),
        ..CreateVolume::default()
    };
    use v1::volume_content_source::Type;
    match request.volume_content_source.map(|source| source.r#type) {
        None => {}
        Some(None) => return Err(Status::invalid_argument("the content source is empty")),
        Some(Some(Type::Snapshot(snapshot))) => wanted.snapshot = Some(snapshot.snapshot_id),
        Some(Some(Type::Volume(volume))) => wanted.volume = Some(volume.volume_id),
    }
    Ok(wanted)
}

/// Where something must be reachable. What is only preferred changes nothing: there is one place.
pub(super) fn places(requirement: Option<v1::TopologyRequirement>) -> Vec<Map> {
    let requisite = requirement.map(|requirement| requirement.requisite);
    let segments = requisite.into_iter().flatten();
    segments.map(|topology| map(topology.segments)).collect()
}

pub(super) fn topology(driver: &Driver) -> v1::Topology {
    v1::Topology {
        segments: HashMap::from([(driver.topology_key(), driver.config.node.clone())]),
    }
}

/// Sizes are below 2^63 by construction.
pub(super) fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

pub(super) fn volume(driver: &Driver, record: &VolumeRecord) -> v1::Volume {
    use v1::volume_content_source::{SnapshotSource, Type, VolumeSource};
    let source = record.source.as_ref().map(|source| match source {
        Source::Snapshot(id) => Type::Snapshot(SnapshotSource {
            snapshot_id: id.to_string(),
        }),
        Source::Volume(id) => Type::Volume(VolumeSource {
            volume_id: id.to_string(),
        }),
    });
    v1::Volume {
        capacity_bytes: signed(record.capacity_bytes),
        volume_id: record.id.to_string(),
        volume_context: HashMap::new(),
        content_source: source.map(|source| v1::VolumeContentSource {
            r#type: Some(source),
        }),
        accessible_topology: vec![topology(driver)],
    }
}

pub(super) fn snapshot(driver: &Driver, record: &SnapshotRecord) -> v1::Snapshot {
    v1::Snapshot {
        size_bytes: signed(record.size_bytes),
        snapshot_id: record.id.to_string(),
        source_volume_id: record.source.to_string(),
        creation_time: Some(time(record.sequence)),
        ready_to_use: true,
        group_snapshot_id: record
            .group
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        accessible_topology: vec![topology(driver)],
    }
}

/// Nanoseconds since 1970.
pub(super) fn time(nanoseconds: u64) -> prost_types::Timestamp {
    const SECOND: u64 = 1_000_000_000;
    prost_types::Timestamp {
        seconds: signed(nanoseconds / SECOND),
        nanos: i32::try_from(nanoseconds % SECOND).unwrap_or(0),
    }
}

pub(super) fn health(id: String, ailments: Vec<Ailment>) -> v1::VolumeHealth {
    let entry = |ailment: Ailment| {
        let status = match ailment.severity {
            Severity::Degraded => v1::VolumeHealthErrorType::Degraded,
            Severity::Inaccessible => v1::VolumeHealthErrorType::Inaccessible,
            Severity::DataLoss => v1::VolumeHealthErrorType::DataLoss,
        };
        v1::volume_health::VolumeHealthEntry {
            status: status.into(),
            reason: ailment.reason.to_owned(),
            message: ailment.message,
        }
    };
    v1::VolumeHealth {
        volume_id: id,
        health_statuses: ailments.into_iter().map(entry).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_below_zero_are_refused() {
        let below = |required_bytes, limit_bytes| {
            range(Some(v1::CapacityRange {
                required_bytes,
                limit_bytes,
            }))
        };
        assert!(below(-1, 0).is_err());
        assert!(below(1, -1).is_err());
        assert_eq!(below(1, 0).unwrap().limit, None);
    }

    #[test]
    fn a_time_keeps_its_nanoseconds() {
        let time = time(1_700_000_000_123_456_789);
        assert_eq!((time.seconds, time.nanos), (1_700_000_000, 123_456_789));
    }
}
