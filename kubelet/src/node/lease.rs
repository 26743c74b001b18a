//! The heartbeat: a Lease in `kube-node-lease`, renewed four times in its life.
//!
//! It is written with the resource version of the last answer, so that a renewal is one PUT and
//! no GET; only after a conflict or a loss is it read again. It knows nothing of the Node's
//! status, and must go on whatever else the agent is doing.

use super::NodeHandle;
use crate::api::{Clients, within};
use crate::config::Config;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::api::{Api, PostParams};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tracing::info;

/// Namespace of all node leases.
const NAMESPACE: &str = "kube-node-lease";
/// Wait after the first failure; doubled up to the renew interval.
const RETRY_FIRST: Duration = Duration::from_millis(200);

/// The Lease as we want it, on top of what is there.
fn wanted(
    current: Option<&Lease>,
    config: &Config,
    owner: Option<OwnerReference>,
    now: Timestamp,
) -> Lease {
    let mut lease = current.cloned().unwrap_or_else(|| Lease {
        metadata: ObjectMeta {
            name: Some(config.node_name.clone()),
            namespace: Some(NAMESPACE.to_owned()),
            ..ObjectMeta::default()
        },
        spec: None,
    });
    if let Some(owner) = owner
        && lease
            .metadata
            .owner_references
            .as_ref()
            .is_none_or(Vec::is_empty)
    {
        lease.metadata.owner_references = Some(vec![owner]);
    }
    let seconds = i32::try_from(config.node_lease_duration.as_secs()).unwrap_or(i32::MAX);
    let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
    spec.holder_identity = Some(config.node_name.clone());
    spec.lease_duration_seconds = Some(seconds);
    spec.renew_time = Some(MicroTime(now));
    lease
}

/// Keeps the Lease until told to stop.
pub async fn run(
    config: Arc<Config>,
    clients: Clients,
    handle: NodeHandle,
    stop: CancellationToken,
) {
    let every = config.node_lease_duration / 4;
    let api: Api<Lease> = Api::namespaced(clients.heartbeat.clone(), NAMESPACE);
    let mut current: Option<Lease> = None;
    let mut failures = 0u32;
    let mut said = String::new();
    loop {
        let wait = match renew(&api, &config, &handle, current.take(), every).await {
            Ok(lease) => {
                if failures > 0 {
                    info!(failures, "The node lease is renewed again");
                }
                failures = 0;
                said.clear();
                current = Some(lease);
                every
            }
            Err(error) => {
                failures += 1;
                clients
                    .credentials
                    .complain("renew the node lease", &error, &mut said);
                (RETRY_FIRST * 2u32.saturating_pow(failures.min(8))).min(every)
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn renew(
    api: &Api<Lease>,
    config: &Config,
    handle: &NodeHandle,
    current: Option<Lease>,
    limit: Duration,
) -> Result<Lease, kube::Error> {
    let name = &config.node_name;
    let owner = || handle.owner_reference();
    let current = match current {
        Some(lease) => lease,
        None => match within(limit, api.get_opt(name)).await? {
            Some(lease) => lease,
            None => {
                let lease = wanted(None, config, owner(), Timestamp::now());
                return within(limit, api.create(&PostParams::default(), &lease)).await;
            }
        },
    };
    let lease = wanted(Some(&current), config, owner(), Timestamp::now());
    let put = PostParams::default();
    within(limit, api.replace(name, &put, &lease)).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Flags, load};

    #[test]
    fn a_renewal_keeps_what_others_wrote() {
        let flags = Flags {
            hostname_override: Some("n1".to_owned()),
            node_ips: vec![[10, 0, 0, 1].into()],
            ..Flags::default()
        };
        let config = load(&flags).unwrap();
        let owner = OwnerReference {
            name: "n1".to_owned(),
            ..OwnerReference::default()
        };
        let now = Timestamp::UNIX_EPOCH;
        let mut first = wanted(None, &config, None, now);
        assert_eq!(
            first.spec.as_ref().unwrap().lease_duration_seconds,
            Some(40)
        );
        first.metadata.resource_version = Some("7".to_owned());
        first.spec.as_mut().unwrap().lease_transitions = Some(3);
        let second = wanted(Some(&first), &config, Some(owner), now);
        assert_eq!(second.metadata.resource_version.as_deref(), Some("7"));
        assert_eq!(second.spec.unwrap().lease_transitions, Some(3));
        assert_eq!(second.metadata.owner_references.unwrap().len(), 1);
    }
}
