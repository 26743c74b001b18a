//! The registration of one plugin (pluginregistration v1): it says what it is, we say what came
//! of it.

use super::Handler;
use crate::volumes::csi::channel;
use proto::registration::v1::registration_client::RegistrationClient;
use proto::registration::v1::{InfoRequest, RegistrationStatus};
use std::path::Path;
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Request, Status};

/// A plugin says what it is within this.
const INFO_LIMIT: Duration = Duration::from_secs(10);
/// It hears what came of it within this.
const NOTIFY_LIMIT: Duration = Duration::from_secs(5);

/// What a plugin says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Its type, `CSIPlugin`.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Where it serves.
    pub endpoint: String,
    /// The versions of its interface it speaks.
    pub versions: Vec<String>,
}

/// Registers the plugin behind a socket.
///
/// # Errors
/// Stock's words.
pub(super) async fn register(socket: &Path, handlers: &[Box<dyn Handler>]) -> Result<Info, String> {
    let shown = socket.display();
    let mut client = RegistrationClient::new(channel(socket.to_owned()));
    let info = info(&mut client).await.map_err(|e| {
        format!("RegisterPlugin error -- failed to get plugin info using RPC GetInfo at socket {shown}, err: {e}")
    })?;
    let info = Info {
        endpoint: if info.endpoint.is_empty() {
            socket.to_string_lossy().into_owned()
        } else {
            info.endpoint
        },
        kind: info.r#type,
        name: info.name,
        versions: info.supported_versions,
    };
    let Some(handler) = handlers.iter().find(|h| h.kind() == info.kind) else {
        let error = format!(
            "RegisterPlugin error -- no handler registered for plugin type: {} at socket {shown}",
            info.kind
        );
        return refuse(&mut client, error).await;
    };
    if let Err(error) = handler.validate(&info) {
        let error = format!("RegisterPlugin error -- plugin validation failed with err: {error}");
        return refuse(&mut client, error).await;
    }
    if let Err(error) = handler.register(&info).await {
        let error = format!("RegisterPlugin error -- plugin registration failed with err: {error}");
        return refuse(&mut client, error).await;
    }
    if let Err(error) = notify(&mut client, None).await {
        handler.deregister(&info.name).await;
        return Err(format!(
            "RegisterPlugin error -- failed to send registration status at socket {shown}, err: {error}"
        ));
    }
    Ok(info)
}

async fn info(
    client: &mut RegistrationClient<Channel>,
) -> Result<proto::registration::v1::PluginInfo, String> {
    let asked = client.get_info(Request::new(InfoRequest {}));
    match tokio::time::timeout(INFO_LIMIT, asked).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(words(&status)),
        Err(_) => Err("context deadline exceeded".to_owned()),
    }
}

/// Tells the plugin that it is not wanted, and us why.
async fn refuse(client: &mut RegistrationClient<Channel>, error: String) -> Result<Info, String> {
    match notify(client, Some(&error)).await {
        Ok(()) => Err(error),
        Err(unheard) => Err(format!("{error}: {unheard}")),
    }
}

async fn notify(
    client: &mut RegistrationClient<Channel>,
    error: Option<&str>,
) -> Result<(), String> {
    let status = RegistrationStatus {
        plugin_registered: error.is_none(),
        error: error.unwrap_or_default().to_owned(),
    };
    let told = client.notify_registration_status(Request::new(status));
    match tokio::time::timeout(NOTIFY_LIMIT, told).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(status)) => Err(words(&status)),
        Err(_) => Err("context deadline exceeded".to_owned()),
    }
}

fn words(status: &Status) -> String {
    format!(
        "rpc error: code = {:?} desc = {}",
        status.code(),
        status.message()
    )
}
