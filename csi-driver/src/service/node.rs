//! Node.

use super::{Service, convert};
use crate::node::{Publish, Severity, Stage, Usage};
use proto::csi::v1;
use proto::csi::v1::node_server::Node;
use proto::csi::v1::node_service_capability::{Rpc, Type, rpc};
use proto::csi::v1::volume_usage::Unit;
use std::path::PathBuf;
use tonic::{Request, Response, Status};

/// What this node can do.
const CAPABILITIES: [rpc::Type; 7] = [
    rpc::Type::StageUnstageVolume,
    rpc::Type::GetVolumeStats,
    rpc::Type::ExpandVolume,
    rpc::Type::SingleNodeMultiWriter,
    rpc::Type::VolumeMountGroup,
    rpc::Type::GetVolumeHealth,
    rpc::Type::GetStorageHealth,
];

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Node for Service {
    async fn node_stage_volume(
        &self,
        request: Request<v1::NodeStageVolumeRequest>,
    ) -> Answer<v1::NodeStageVolumeResponse> {
        let request = request.into_inner();
        let capability = request.volume_capability.map(convert::capability);
        let wanted = Stage {
            volume: request.volume_id,
            path: request.staging_target_path.into(),
            capability: capability.transpose()?,
        };
        let id = wanted.volume.clone();
        self.run("NodeStageVolume", &id, move |driver| driver.stage(&wanted))
            .await?;
        Ok(Response::new(v1::NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(
        &self,
        request: Request<v1::NodeUnstageVolumeRequest>,
    ) -> Answer<v1::NodeUnstageVolumeResponse> {
        let request = request.into_inner();
        let path = PathBuf::from(request.staging_target_path);
        let id = request.volume_id;
        self.run("NodeUnstageVolume", &id.clone(), move |driver| {
            driver.unstage(&id, &path)
        })
        .await?;
        Ok(Response::new(v1::NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(
        &self,
        request: Request<v1::NodePublishVolumeRequest>,
    ) -> Answer<v1::NodePublishVolumeResponse> {
        let request = request.into_inner();
        let capability = request.volume_capability.map(convert::capability);
        let wanted = Publish {
            volume: request.volume_id,
            staging: request.staging_target_path.into(),
            target: request.target_path.into(),
            capability: capability.transpose()?,
            read_only: request.readonly,
        };
        let id = wanted.volume.clone();
        self.run("NodePublishVolume", &id, move |driver| {
            driver.publish(&wanted)
        })
        .await?;
        Ok(Response::new(v1::NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<v1::NodeUnpublishVolumeRequest>,
    ) -> Answer<v1::NodeUnpublishVolumeResponse> {
        let request = request.into_inner();
        let path = PathBuf::from(request.target_path);
        let id = request.volume_id;
        self.run("NodeUnpublishVolume", &id.clone(), move |driver| {
            driver.unpublish(&id, &path)
        })
        .await?;
        Ok(Response::new(v1::NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<v1::NodeGetVolumeStatsRequest>,
    ) -> Answer<v1::NodeGetVolumeStatsResponse> {
        let request = request.into_inner();
        let path = PathBuf::from(request.volume_path);
        let id = request.volume_id;
        let (bytes, inodes) = self
            .run("NodeGetVolumeStats", &id.clone(), move |driver| {
                driver.stats(&id, &path)
            })
            .await?;
        let mut all = vec![usage(bytes, Unit::Bytes)];
        all.extend(inodes.map(|inodes| usage(inodes, Unit::Inodes)));
        Ok(Response::new(v1::NodeGetVolumeStatsResponse { usage: all }))
    }

    async fn node_get_volume_health(
        &self,
        request: Request<v1::NodeGetVolumeHealthRequest>,
    ) -> Answer<v1::NodeGetVolumeHealthResponse> {
        let id = request.into_inner().volume_id;
        let health = self
            .run("NodeGetVolumeHealth", &id.clone(), move |driver| {
                Ok(convert::health(id.clone(), driver.volume_health(&id)?))
            })
            .await?;
        Ok(Response::new(v1::NodeGetVolumeHealthResponse {
            volume_health: Some(health),
        }))
    }

    async fn node_get_storage_health(
        &self,
        _: Request<v1::NodeGetStorageHealthRequest>,
    ) -> Answer<v1::NodeGetStorageHealthResponse> {
        use v1::node_get_storage_health_response::StorageBackendHealth;
        let ailments = self
            .run("NodeGetStorageHealth", "", |driver| {
                Ok(driver.storage_health())
            })
            .await?;
        let backend_health = ailments.into_iter().map(|ailment| {
            let status = match ailment.severity {
                Severity::Degraded => v1::StorageHealthErrorType::StorageDegraded,
                Severity::Inaccessible | Severity::DataLoss => {
                    v1::StorageHealthErrorType::StorageUnreachable
                }
            };
            StorageBackendHealth {
                status: status.into(),
                reason: ailment.reason.to_owned(),
                message: ailment.message,
                volume_capability: None,
            }
        });
        Ok(Response::new(v1::NodeGetStorageHealthResponse {
            backend_health: backend_health.collect(),
        }))
    }

    async fn node_expand_volume(
        &self,
        request: Request<v1::NodeExpandVolumeRequest>,
    ) -> Answer<v1::NodeExpandVolumeResponse> {
        let request = request.into_inner();
        let range = convert::range(request.capacity_range)?;
        let path = PathBuf::from(request.volume_path);
        let id = request.volume_id;
        let bytes = self
            .run("NodeExpandVolume", &id.clone(), move |driver| {
                driver.expand_node(&id, &path, range)
            })
            .await?;
        Ok(Response::new(v1::NodeExpandVolumeResponse {
            capacity_bytes: convert::signed(bytes),
        }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<v1::NodeGetCapabilitiesRequest>,
    ) -> Answer<v1::NodeGetCapabilitiesResponse> {
        let capabilities = CAPABILITIES
            .into_iter()
            .map(|kind| v1::NodeServiceCapability {
                r#type: Some(Type::Rpc(Rpc {
                    r#type: kind.into(),
                })),
            });
        Ok(Response::new(v1::NodeGetCapabilitiesResponse {
            capabilities: capabilities.collect(),
        }))
    }

    async fn node_get_info(
        &self,
        _: Request<v1::NodeGetInfoRequest>,
    ) -> Answer<v1::NodeGetInfoResponse> {
        Ok(Response::new(v1::NodeGetInfoResponse {
            node_id: self.driver.config.node.clone(),
            max_volumes_per_node: i64::from(self.driver.config.max_volumes),
            accessible_topology: Some(convert::topology(&self.driver)),
        }))
    }
}

fn usage(usage: Usage, unit: Unit) -> v1::VolumeUsage {
    v1::VolumeUsage {
        available: convert::signed(usage.available),
        total: convert::signed(usage.total),
        used: convert::signed(usage.used),
        unit: unit.into(),
    }
}
