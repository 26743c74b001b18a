//! The driver makes itself known to the kubelet: a socket in its plugin directory, on which the
//! kubelet asks who is there and says whether it took us (`pluginregistration.v1`).

use proto::registration::v1::registration_server::Registration;
use proto::registration::v1::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

/// Who we are, as the kubelet asks for it.
#[derive(Debug, Clone)]
pub(super) struct Registrar {
    /// Name of the driver.
    pub(super) name: String,
    /// The CSI socket, where the kubelet sees it.
    pub(super) endpoint: String,
    /// What the kubelet said last: none before it did.
    pub(super) accepted: watch::Sender<Option<bool>>,
}

#[tonic::async_trait]
impl Registration for Registrar {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: self.name.clone(),
            endpoint: self.endpoint.clone(),
            // Of the registration, not of CSI; what the standard registrar says.
            supported_versions: vec!["1.0.0".to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        if status.plugin_registered {
            tracing::info!("The kubelet registered this driver");
        } else {
            tracing::error!(error = status.error, "The kubelet refused this driver");
        }
        self.accepted.send_replace(Some(status.plugin_registered));
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
