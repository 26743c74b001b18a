//! Identity.

use super::Service;
use proto::csi::v1::identity_server::Identity;
use proto::csi::v1::plugin_capability::{self, service, volume_expansion};
use proto::csi::v1::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest,
    GetPluginInfoResponse, PluginCapability, ProbeRequest, ProbeResponse,
};
use std::collections::HashMap;
use tonic::{Request, Response, Status};

#[tonic::async_trait]
impl Identity for Service {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: self.driver.config.name.clone(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            manifest: HashMap::new(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        use plugin_capability::{Service, Type, VolumeExpansion};
        let services = [
            service::Type::ControllerService,
            service::Type::VolumeAccessibilityConstraints,
            service::Type::GroupControllerService,
            service::Type::SnapshotAccessibilityConstraints,
        ];
        let expansions = [
            volume_expansion::Type::Online,
            volume_expansion::Type::Offline,
        ];
        let services = services.map(|kind| {
            Type::Service(Service {
                r#type: kind.into(),
            })
        });
        let expansions = expansions.map(|kind| {
            Type::VolumeExpansion(VolumeExpansion {
                r#type: kind.into(),
            })
        });
        let all = services.into_iter().chain(expansions);
        Ok(Response::new(GetPluginCapabilitiesResponse {
            capabilities: all
                .map(|kind| PluginCapability { r#type: Some(kind) })
                .collect(),
        }))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        // The socket exists only after the pool was taken over and put right.
        Ok(Response::new(ProbeResponse { ready: Some(true) }))
    }
}
