//! Controller.

use super::{Service, convert};
use crate::controller::{CapacityQuestion, CreateSnapshot, SnapshotFilter};
use proto::csi::v1;
use proto::csi::v1::controller_server::Controller;
use proto::csi::v1::controller_service_capability::{self, rpc};
use tonic::{Request, Response, Status};

/// What this controller can do.
const CAPABILITIES: [rpc::Type; 13] = [
    rpc::Type::CreateDeleteVolume,
    rpc::Type::ListVolumes,
    rpc::Type::GetCapacity,
    rpc::Type::CreateDeleteSnapshot,
    rpc::Type::ListSnapshots,
    rpc::Type::CloneVolume,
    rpc::Type::ExpandVolume,
    rpc::Type::GetVolume,
    rpc::Type::SingleNodeMultiWriter,
    rpc::Type::ModifyVolume,
    rpc::Type::GetSnapshot,
    rpc::Type::GetVolumeHealth,
    rpc::Type::ListVolumeHealth,
];

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Controller for Service {
    async fn create_volume(
        &self,
        request: Request<v1::CreateVolumeRequest>,
    ) -> Answer<v1::CreateVolumeResponse> {
        let wanted = convert::create_volume(request.into_inner())?;
        let name = wanted.name.clone();
        let volume = self
            .run("CreateVolume", &name, move |driver| {
                let record = driver.create_volume(&wanted)?;
                Ok(convert::volume(driver, &record))
            })
            .await?;
        Ok(Response::new(v1::CreateVolumeResponse {
            volume: Some(volume),
        }))
    }

    async fn delete_volume(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Answer<v1::DeleteVolumeResponse> {
        let id = request.into_inner().volume_id;
        self.run("DeleteVolume", &id.clone(), move |driver| {
            driver.delete_volume(&id)
        })
        .await?;
        Ok(Response::new(v1::DeleteVolumeResponse {}))
    }

    async fn controller_publish_volume(
        &self,
        _: Request<v1::ControllerPublishVolumeRequest>,
    ) -> Answer<v1::ControllerPublishVolumeResponse> {
        Err(Status::unimplemented("local volumes are not attached"))
    }

    async fn controller_unpublish_volume(
        &self,
        _: Request<v1::ControllerUnpublishVolumeRequest>,
    ) -> Answer<v1::ControllerUnpublishVolumeResponse> {
        Err(Status::unimplemented("local volumes are not attached"))
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<v1::ValidateVolumeCapabilitiesRequest>,
    ) -> Answer<v1::ValidateVolumeCapabilitiesResponse> {
        let request = request.into_inner();
        let asked = convert::capabilities(request.volume_capabilities.clone())?;
        let parameters = convert::map(request.parameters.clone());
        let mutable = convert::map(request.mutable_parameters.clone());
        let id = request.volume_id.clone();
        let why_not = self
            .run("ValidateVolumeCapabilities", &id.clone(), move |driver| {
                driver.why_not(&id, &asked, &parameters, &mutable)
            })
            .await?;
        use v1::validate_volume_capabilities_response::Confirmed;
        Ok(Response::new(match why_not {
            Some(message) => v1::ValidateVolumeCapabilitiesResponse {
                confirmed: None,
                message,
            },
            None => v1::ValidateVolumeCapabilitiesResponse {
                confirmed: Some(Confirmed {
                    volume_context: request.volume_context,
                    volume_capabilities: request.volume_capabilities,
                    parameters: request.parameters,
                    mutable_parameters: request.mutable_parameters,
                }),
                message: String::new(),
            },
        }))
    }

    async fn list_volumes(
        &self,
        request: Request<v1::ListVolumesRequest>,
    ) -> Answer<v1::ListVolumesResponse> {
        let request = request.into_inner();
        let most = convert::entries(request.max_entries)?;
        let answer = self
            .run("ListVolumes", "", move |driver| {
                let page = driver.list_volumes(most, &request.starting_token)?;
                let entries = page.entries.iter();
                let entries = entries.map(|record| v1::list_volumes_response::Entry {
                    volume: Some(convert::volume(driver, record)),
                    status: None,
                });
                Ok(v1::ListVolumesResponse {
                    entries: entries.collect(),
                    next_token: page.next.unwrap_or_default(),
                })
            })
            .await?;
        Ok(Response::new(answer))
    }

    async fn controller_list_volume_health(
        &self,
        request: Request<v1::ControllerListVolumeHealthRequest>,
    ) -> Answer<v1::ControllerListVolumeHealthResponse> {
        let request = request.into_inner();
        let most = convert::entries(request.max_entries)?;
        let answer = self
            .run("ControllerListVolumeHealth", "", move |driver| {
                let page = driver.list_volumes(most, &request.starting_token)?;
                let mut entries = Vec::new();
                for volume in page.entries {
                    let ailments = driver.ailments(&volume)?;
                    entries.push(convert::health(volume.id.to_string(), ailments));
                }
                Ok(v1::ControllerListVolumeHealthResponse {
                    entries,
                    next_token: page.next.unwrap_or_default(),
                })
            })
            .await?;
        Ok(Response::new(answer))
    }

    async fn controller_get_volume_health(
        &self,
        request: Request<v1::ControllerGetVolumeHealthRequest>,
    ) -> Answer<v1::ControllerGetVolumeHealthResponse> {
        let id = request.into_inner().volume_id;
        let health = self
            .run("ControllerGetVolumeHealth", &id.clone(), move |driver| {
                Ok(convert::health(id.clone(), driver.volume_health(&id)?))
            })
            .await?;
        Ok(Response::new(v1::ControllerGetVolumeHealthResponse {
            volume_health: Some(health),
        }))
    }

    async fn get_capacity(
        &self,
        request: Request<v1::GetCapacityRequest>,
    ) -> Answer<v1::GetCapacityResponse> {
        let request = request.into_inner();
        let question = CapacityQuestion {
            parameters: convert::map(request.parameters),
            capabilities: convert::capabilities(request.volume_capabilities)?,
            place: request
                .accessible_topology
                .map(|topology| convert::map(topology.segments)),
        };
        let capacity = self
            .run("GetCapacity", "", move |driver| driver.capacity(&question))
            .await?;
        Ok(Response::new(v1::GetCapacityResponse {
            available_capacity: convert::signed(capacity.available),
            maximum_volume_size: Some(convert::signed(capacity.largest)),
            minimum_volume_size: Some(convert::signed(capacity.smallest)),
        }))
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<v1::ControllerGetCapabilitiesRequest>,
    ) -> Answer<v1::ControllerGetCapabilitiesResponse> {
        use controller_service_capability::{Rpc, Type};
        let capabilities = CAPABILITIES
            .into_iter()
            .map(|kind| v1::ControllerServiceCapability {
                r#type: Some(Type::Rpc(Rpc {
                    r#type: kind.into(),
                })),
            });
        Ok(Response::new(v1::ControllerGetCapabilitiesResponse {
            capabilities: capabilities.collect(),
        }))
    }

    async fn create_snapshot(
        &self,
        request: Request<v1::CreateSnapshotRequest>,
    ) -> Answer<v1::CreateSnapshotResponse> {
        let request = request.into_inner();
        let wanted = CreateSnapshot {
            name: request.name,
            volume: request.source_volume_id,
            parameters: convert::map(request.parameters),
            places: convert::places(request.accessibility_requirements),
        };
        let name = wanted.name.clone();
        let snapshot = self
            .run("CreateSnapshot", &name, move |driver| {
                let record = driver.create_snapshot(&wanted)?;
                Ok(convert::snapshot(driver, &record))
            })
            .await?;
        Ok(Response::new(v1::CreateSnapshotResponse {
            snapshot: Some(snapshot),
        }))
    }

    async fn delete_snapshot(
        &self,
        request: Request<v1::DeleteSnapshotRequest>,
    ) -> Answer<v1::DeleteSnapshotResponse> {
        let id = request.into_inner().snapshot_id;
        self.run("DeleteSnapshot", &id.clone(), move |driver| {
            driver.delete_snapshot(&id)
        })
        .await?;
        Ok(Response::new(v1::DeleteSnapshotResponse {}))
    }

    async fn list_snapshots(
        &self,
        request: Request<v1::ListSnapshotsRequest>,
    ) -> Answer<v1::ListSnapshotsResponse> {
        let request = request.into_inner();
        let most = convert::entries(request.max_entries)?;
        let filter = SnapshotFilter {
            id: request.snapshot_id,
            volume: request.source_volume_id,
        };
        let answer = self
            .run("ListSnapshots", "", move |driver| {
                let page = driver.list_snapshots(&filter, most, &request.starting_token)?;
                let entries = page.entries.iter();
                let entries = entries.map(|record| v1::list_snapshots_response::Entry {
                    snapshot: Some(convert::snapshot(driver, record)),
                });
                Ok(v1::ListSnapshotsResponse {
                    entries: entries.collect(),
                    next_token: page.next.unwrap_or_default(),
                })
            })
            .await?;
        Ok(Response::new(answer))
    }

    async fn get_snapshot(
        &self,
        request: Request<v1::GetSnapshotRequest>,
    ) -> Answer<v1::GetSnapshotResponse> {
        let id = request.into_inner().snapshot_id;
        let snapshot = self
            .run("GetSnapshot", &id.clone(), move |driver| {
                let record = driver.get_snapshot(&id)?;
                Ok(convert::snapshot(driver, &record))
            })
            .await?;
        Ok(Response::new(v1::GetSnapshotResponse {
            snapshot: Some(snapshot),
        }))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<v1::ControllerExpandVolumeRequest>,
    ) -> Answer<v1::ControllerExpandVolumeResponse> {
        let request = request.into_inner();
        let range = convert::optional_range(request.capacity_range)?;
        let id = request.volume_id;
        let (bytes, node_expansion_required) = self
            .run("ControllerExpandVolume", &id.clone(), move |driver| {
                driver.expand_controller(&id, range)
            })
            .await?;
        Ok(Response::new(v1::ControllerExpandVolumeResponse {
            capacity_bytes: convert::signed(bytes),
            node_expansion_required,
        }))
    }

    async fn controller_get_volume(
        &self,
        request: Request<v1::ControllerGetVolumeRequest>,
    ) -> Answer<v1::ControllerGetVolumeResponse> {
        let id = request.into_inner().volume_id;
        let volume = self
            .run("ControllerGetVolume", &id.clone(), move |driver| {
                let record = driver.get_volume(&id)?;
                Ok(convert::volume(driver, &record))
            })
            .await?;
        Ok(Response::new(v1::ControllerGetVolumeResponse {
            volume: Some(volume),
            status: Some(v1::controller_get_volume_response::VolumeStatus::default()),
        }))
    }

    async fn controller_modify_volume(
        &self,
        request: Request<v1::ControllerModifyVolumeRequest>,
    ) -> Answer<v1::ControllerModifyVolumeResponse> {
        let request = request.into_inner();
        let mutable = convert::map(request.mutable_parameters);
        let id = request.volume_id;
        self.run("ControllerModifyVolume", &id.clone(), move |driver| {
            driver.modify_volume(&id, &mutable)
        })
        .await?;
        Ok(Response::new(v1::ControllerModifyVolumeResponse {}))
    }
}
