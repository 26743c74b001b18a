//! Makes the Node object, or brings an existing one up to date. Stays within NodeRestriction:
//! only our own Node, no taints after creation.

use super::machine::Machine;
use super::object;
use crate::api::{Clients, REQUEST_TIMEOUT, within};
use crate::config::Config;
use k8s_openapi::api::core::v1::{Node, NodeStatus};
use kube::api::{Api, Patch, PatchParams, PostParams};
use tracing::info;

/// Registers once. The Node as the apiserver has it afterwards.
pub(super) async fn register(
    clients: &Clients,
    config: &Config,
    machine: &Machine,
    status: &NodeStatus,
) -> Result<Node, kube::Error> {
    let api: Api<Node> = Api::all(clients.heartbeat.clone());
    let name = &config.node_name;
    let existing = match create(&api, config, machine, status).await {
        Created::Yes(node) => return Ok(*node),
        Created::Exists => within(REQUEST_TIMEOUT, api.get(name)).await?,
        Created::Failed(error) => return Err(error),
    };
    let Some(patch) = object::metadata_patch(&existing, config, machine) else {
        return Ok(existing);
    };
    let params = PatchParams::default();
    let patch = Patch::Strategic(&patch);
    let patched = within(REQUEST_TIMEOUT, api.patch(name, &params, &patch));
    let node = patched.await?;
    info!(node = %name, "Brought the existing Node up to date");
    Ok(node)
}

enum Created {
    Yes(Box<Node>),
    Exists,
    Failed(kube::Error),
}

async fn create(
    api: &Api<Node>,
    config: &Config,
    machine: &Machine,
    status: &NodeStatus,
) -> Created {
    if !config.register_node {
        return Created::Exists;
    }
    let node = object::node(config, machine, status.clone());
    match within(REQUEST_TIMEOUT, api.create(&PostParams::default(), &node)).await {
        Ok(node) => {
            info!(node = %config.node_name, "Registered the Node");
            Created::Yes(Box::new(node))
        }
        Err(kube::Error::Api(e)) if e.code == 409 => Created::Exists,
        Err(error) => Created::Failed(error),
    }
}
