//! GroupController.

use super::{Service, convert};
use crate::controller::CreateGroup;
use crate::driver::Driver;
use crate::store::{GroupRecord, SnapshotRecord};
use proto::csi::v1;
use proto::csi::v1::group_controller_server::GroupController;
use proto::csi::v1::group_controller_service_capability::{Rpc, Type, rpc};
use tonic::{Request, Response, Status};

#[tonic::async_trait]
impl GroupController for Service {
    async fn group_controller_get_capabilities(
        &self,
        _: Request<v1::GroupControllerGetCapabilitiesRequest>,
    ) -> Result<Response<v1::GroupControllerGetCapabilitiesResponse>, Status> {
        let kind = rpc::Type::CreateDeleteGetVolumeGroupSnapshot;
        Ok(Response::new(v1::GroupControllerGetCapabilitiesResponse {
            capabilities: vec![v1::GroupControllerServiceCapability {
                r#type: Some(Type::Rpc(Rpc {
                    r#type: kind.into(),
                })),
            }],
        }))
    }

    async fn create_volume_group_snapshot(
        &self,
        request: Request<v1::CreateVolumeGroupSnapshotRequest>,
    ) -> Result<Response<v1::CreateVolumeGroupSnapshotResponse>, Status> {
        let request = request.into_inner();
        let wanted = CreateGroup {
            name: request.name,
            volumes: request.source_volume_ids,
            parameters: convert::map(request.parameters),
        };
        let name = wanted.name.clone();
        let group = self
            .run("CreateVolumeGroupSnapshot", &name, move |driver| {
                let (group, snapshots) = driver.create_group(&wanted)?;
                Ok(message(driver, &group, &snapshots))
            })
            .await?;
        Ok(Response::new(v1::CreateVolumeGroupSnapshotResponse {
            group_snapshot: Some(group),
        }))
    }

    async fn delete_volume_group_snapshot(
        &self,
        request: Request<v1::DeleteVolumeGroupSnapshotRequest>,
    ) -> Result<Response<v1::DeleteVolumeGroupSnapshotResponse>, Status> {
        let id = request.into_inner().group_snapshot_id;
        self.run("DeleteVolumeGroupSnapshot", &id.clone(), move |driver| {
            driver.delete_group(&id)
        })
        .await?;
        Ok(Response::new(v1::DeleteVolumeGroupSnapshotResponse {}))
    }

    async fn get_volume_group_snapshot(
        &self,
        request: Request<v1::GetVolumeGroupSnapshotRequest>,
    ) -> Result<Response<v1::GetVolumeGroupSnapshotResponse>, Status> {
        let id = request.into_inner().group_snapshot_id;
        let group = self
            .run("GetVolumeGroupSnapshot", &id.clone(), move |driver| {
                let (group, snapshots) = driver.group(&id)?;
                Ok(message(driver, &group, &snapshots))
            })
            .await?;
        Ok(Response::new(v1::GetVolumeGroupSnapshotResponse {
            group_snapshot: Some(group),
        }))
    }
}

fn message(
    driver: &Driver,
    group: &GroupRecord,
    snapshots: &[SnapshotRecord],
) -> v1::VolumeGroupSnapshot {
    let snapshots = snapshots.iter();
    v1::VolumeGroupSnapshot {
        group_snapshot_id: group.id.to_string(),
        snapshots: snapshots
            .map(|snapshot| convert::snapshot(driver, snapshot))
            .collect(),
        creation_time: Some(convert::time(group.sequence)),
        ready_to_use: true,
    }
}
