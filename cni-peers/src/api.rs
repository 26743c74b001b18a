//! The apiserver's side: the nodes as a snapshot, and this node's annotations.
//!
//! Nodes are reduced to a [`PeerNode`] as they arrive, a page at a time, so that memory is bounded
//! by the number of nodes and not by their images and conditions. Heartbeats change nothing and
//! wake nobody. When the apiserver is away the last snapshot stands.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::StreamExt;
use kube::api::{Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, Object};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::kernel::Snapshot;
use crate::node::{PeerNode, peer_node};

/// Nodes of one page: a Node is some 15 KiB on the wire.
const PAGE_NODES: u32 = 250;
/// The limit of one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Many nodes that change together make one snapshot.
const GATHER: Duration = Duration::from_millis(20);

/// The part of a Node's spec that matters here.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Vec<String>,
}

/// The part of a Node's status that matters here.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Status {
    addresses: Vec<Address>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct Address {
    #[serde(rename = "type")]
    kind: String,
    address: String,
}

type Node = Object<Spec, Status>;

/// The client of a kubeconfig, or of the pod's service account.
///
/// # Errors
/// When neither can be used; the error names the file.
pub(crate) async fn client(kubeconfig: Option<&Path>) -> Result<Client> {
    let mut config = match kubeconfig {
        Some(path) => {
            let problem = || format!("use kubeconfig {} (--kubeconfig)", path.display());
            let file = Kubeconfig::read_from(path).with_context(problem)?;
            let options = KubeConfigOptions::default();
            kube::Config::from_custom_kubeconfig(file, &options)
                .await
                .with_context(problem)?
        }
        None => kube::Config::incluster()
            .context("no --kubeconfig was given and this is no pod of a cluster")?,
    };
    config.connect_timeout = Some(REQUEST_TIMEOUT);
    // A watch is silent for up to five minutes by itself.
    config.read_timeout = Some(Duration::from_secs(330));
    Client::try_from(config).context("set up the client of the apiserver")
}

fn nodes(client: &Client) -> Api<Node> {
    let resource = ApiResource::erase::<k8s_openapi::api::core::v1::Node>(&());
    Api::all_with(client.clone(), &resource)
}

/// Follows the nodes for ever; the newest snapshot is in the channel.
pub(crate) async fn follow(client: Client, own: String, snapshots: watch::Sender<Snapshot>) {
    let config = watcher::Config::default()
        .page_size(PAGE_NODES)
        .any_semantic();
    let stream = watcher(nodes(&client), config).default_backoff();
    let mut stream = pin!(stream);
    let mut table = Table::new(own);
    let mut said = String::new();
    loop {
        // One event at least, then what comes right after it.
        let Some(event) = stream.next().await else {
            return;
        };
        table.take(event, &mut said);
        if !table.complete_and_changed() {
            continue;
        }
        let gathered = tokio::time::sleep(GATHER);
        let mut gathered = pin!(gathered);
        loop {
            tokio::select! {
                () = &mut gathered => break,
                // Cancel-safe: an event is taken or stays in the stream.
                event = stream.next() => match event {
                    Some(event) => table.take(event, &mut said),
                    None => return,
                },
            }
        }
        if let Some(snapshot) = table.snapshot() {
            snapshots.send_replace(snapshot);
        }
    }
}

/// The nodes as far as they were told.
struct Table {
    own: String,
    nodes: BTreeMap<String, Arc<PeerNode>>,
    /// The list that is being read; none between lists.
    listing: Option<BTreeMap<String, Arc<PeerNode>>>,
    complete: bool,
    changed: bool,
}

impl Table {
    fn new(own: String) -> Self {
        Self {
            own,
            nodes: BTreeMap::new(),
            listing: None,
            complete: false,
            changed: false,
        }
    }

    fn take(&mut self, event: watcher::Result<watcher::Event<Node>>, said: &mut String) {
        match event {
            Ok(watcher::Event::Init) => self.listing = Some(BTreeMap::new()),
            Ok(watcher::Event::InitApply(node)) => {
                let node = self.reduced(&node);
                if let Some(listing) = &mut self.listing {
                    listing.insert(node.name.clone(), node);
                }
            }
            Ok(watcher::Event::InitDone) => {
                let listed = self.listing.take().unwrap_or_default();
                self.changed |= !self.complete || listed != self.nodes;
                self.nodes = listed;
                self.complete = true;
                if !said.is_empty() {
                    info!("The apiserver is back");
                    said.clear();
                }
            }
            Ok(watcher::Event::Apply(node)) => {
                let node = self.reduced(&node);
                if self.nodes.get(&node.name) != Some(&node) {
                    self.nodes.insert(node.name.clone(), node);
                    self.changed = true;
                }
            }
            Ok(watcher::Event::Delete(node)) => {
                let name = node.metadata.name.unwrap_or_default();
                self.changed |= self.nodes.remove(&name).is_some();
            }
            Err(error) => {
                let text = chain(&error);
                if text != *said {
                    warn!("Cannot watch the nodes, going on with those known: {text}");
                    *said = text;
                }
            }
        }
    }

    /// The same allocation when nothing changed, so that comparing costs little.
    fn reduced(&self, node: &Node) -> Arc<PeerNode> {
        let fresh = reduce(node);
        match self.nodes.get(&fresh.name) {
            Some(known) if **known == fresh => Arc::clone(known),
            _ => {
                if let Some(complaint) = &fresh.complaint {
                    warn!("Node {}: {complaint}", fresh.name);
                }
                Arc::new(fresh)
            }
        }
    }

    fn complete_and_changed(&self) -> bool {
        self.complete && self.changed && self.listing.is_none()
    }

    fn snapshot(&mut self) -> Option<Snapshot> {
        if !self.complete_and_changed() {
            return None;
        }
        self.changed = false;
        Some(Snapshot {
            own: self.nodes.get(&self.own).cloned(),
            nodes: self.nodes.clone(),
            complete: true,
        })
    }
}

fn reduce(node: &Node) -> PeerNode {
    let empty = BTreeMap::new();
    let annotations = node.metadata.annotations.as_ref().unwrap_or(&empty);
    let mut cidrs = node.spec.pod_cidrs.clone();
    if cidrs.is_empty() {
        cidrs.extend(node.spec.pod_cidr.clone());
    }
    let addresses = node.status.as_ref().map(|s| s.addresses.as_slice());
    let internal = addresses.unwrap_or_default().iter();
    let internal = internal.filter(|address| address.kind == "InternalIP");
    let internal: Vec<IpAddr> = internal.filter_map(|a| a.address.parse().ok()).collect();
    let name = node.metadata.name.as_deref().unwrap_or_default();
    peer_node(name, annotations, &cidrs, &internal)
}

/// Sets annotations of this node, or removes those without a value.
///
/// By the status subresource, as flannel does: its right lets nobody change podCIDRs or taints.
///
/// # Errors
/// When the apiserver refuses or is away.
pub(crate) async fn annotate(
    client: &Client,
    node: &str,
    annotations: &BTreeMap<String, Option<String>>,
) -> Result<()> {
    let patch = Patch::Merge(json!({"metadata": {"annotations": annotations}}));
    let api = nodes(client);
    let params = PatchParams::default();
    let request = api.patch_status(node, &params, &patch);
    let answer = tokio::time::timeout(REQUEST_TIMEOUT, request).await;
    answer
        .context("no answer in time")
        .and_then(|answer| answer.map_err(|e| anyhow::anyhow!(chain(&e))))
        .with_context(|| format!("annotate node {node}"))?;
    Ok(())
}

/// An error with all its causes, each said once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = source.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = source.source();
    }
    text
}
