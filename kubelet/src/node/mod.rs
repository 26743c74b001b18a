//! The Node object: registration, status, Lease, and the watch of what others write to it.
//!
//! [`Node::run`] is three tasks in one: [`lease`] (the heartbeat), [`status`] (register and
//! report) and [`watch`] (pod CIDRs, deletion). They share a [`NodeHandle`], which everybody may
//! read. Forbidden: any other writer of the Node; waiting for anything but the apiserver here.

pub mod capacity;
pub mod conditions;
pub mod csi_node;
pub mod lease;
pub mod machine;
pub mod notify;
pub mod object;
mod register;
mod status;
mod watch;

use crate::api::Clients;
use crate::config::Config;
use crate::eviction::thresholds::Pressure;
use capacity::Amounts;
use k8s_openapi::api::core::v1::Node as NodeObject;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use machine::Machine;
use runtime::service::{ImageService, RuntimeService};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use tokio::sync::watch as channel;
use tokio_util::sync::CancellationToken;

/// What others may know of the node. Cheap to clone; clones see the same node.
#[derive(Debug, Clone)]
pub struct NodeHandle {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    node: channel::Sender<Option<Arc<NodeObject>>>,
    troubles: channel::Sender<BTreeMap<&'static str, String>>,
    pressures: channel::Sender<BTreeSet<Pressure>>,
    volumes_in_use: channel::Sender<Vec<String>>,
    capacity: Amounts,
    allocatable: Amounts,
    host_ips: Vec<IpAddr>,
}

impl NodeHandle {
    /// A handle with nothing registered yet; capacity is that of `machine`.
    pub fn new(config: &Config, machine: &Machine) -> Self {
        let nodefs = machine::filesystem(&config.root_dir);
        let capacity = capacity::capacity(machine, &nodefs, config.max_pods);
        let allocatable = capacity::allocatable(&capacity, config);
        Self {
            inner: Arc::new(Inner {
                node: channel::Sender::new(None),
                troubles: channel::Sender::new(BTreeMap::new()),
                pressures: channel::Sender::new(BTreeSet::new()),
                volumes_in_use: channel::Sender::new(Vec::new()),
                capacity,
                allocatable,
                host_ips: config.node_ips.clone(),
            }),
        }
    }

    /// The Node as last seen; none before registration and after its deletion.
    pub fn node(&self) -> Option<Arc<NodeObject>> {
        self.inner.node.borrow().clone()
    }

    /// Changes of [`NodeHandle::node`].
    pub fn subscribe(&self) -> channel::Receiver<Option<Arc<NodeObject>>> {
        self.inner.node.subscribe()
    }

    /// What the machine has.
    pub fn capacity(&self) -> &Amounts {
        &self.inner.capacity
    }

    /// What pods may use.
    pub fn allocatable(&self) -> &Amounts {
        &self.inner.allocatable
    }

    /// The node's addresses, primary first: `status.hostIPs` of pods.
    pub fn host_ips(&self) -> &[IpAddr] {
        &self.inner.host_ips
    }

    /// Pod address ranges given to this node; empty until the controller manager did.
    pub fn pod_cidrs(&self) -> Vec<String> {
        let node = self.node();
        let spec = node.as_ref().and_then(|n| n.spec.as_ref());
        let many = spec.and_then(|s| s.pod_cidrs.clone()).unwrap_or_default();
        if many.is_empty() {
            return spec.and_then(|s| s.pod_cidr.clone()).into_iter().collect();
        }
        many
    }

    /// Labels of the Node as the apiserver has them.
    pub fn labels(&self) -> BTreeMap<String, String> {
        let node = self.node();
        node.and_then(|n| n.metadata.labels.clone())
            .unwrap_or_default()
    }

    /// An owner reference to the Node, once it has a UID.
    pub fn owner_reference(&self) -> Option<OwnerReference> {
        let node = self.node()?;
        Some(OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: node.metadata.name.clone()?,
            uid: node.metadata.uid.clone()?,
            ..OwnerReference::default()
        })
    }

    /// Says that a part of the agent does not work (none: it does again). The node is not Ready
    /// while any part is in trouble.
    pub fn set_trouble(&self, part: &'static str, trouble: Option<String>) {
        self.inner.troubles.send_if_modified(|all| match trouble {
            Some(text) if all.get(part) != Some(&text) => {
                all.insert(part, text);
                true
            }
            Some(_) => false,
            None => all.remove(part).is_some(),
        });
    }

    /// Says what the node runs short of.
    pub fn set_pressures(&self, pressures: BTreeSet<Pressure>) {
        self.inner.pressures.send_if_modified(|known| {
            let changed = *known != pressures;
            *known = pressures;
            changed
        });
    }

    /// What the node runs short of.
    pub fn pressures(&self) -> BTreeSet<Pressure> {
        self.inner.pressures.borrow().clone()
    }

    /// Says which attached volumes the node uses: they are not to be detached under it.
    pub fn set_volumes_in_use(&self, volumes: Vec<String>) {
        self.inner.volumes_in_use.send_if_modified(|known| {
            let changed = *known != volumes;
            *known = volumes;
            changed
        });
    }

    /// Attached volumes the node uses.
    pub fn volumes_in_use(&self) -> Vec<String> {
        self.inner.volumes_in_use.borrow().clone()
    }

    fn subscribe_volumes(&self) -> channel::Receiver<Vec<String>> {
        self.inner.volumes_in_use.subscribe()
    }

    fn subscribe_pressures(&self) -> channel::Receiver<BTreeSet<Pressure>> {
        self.inner.pressures.subscribe()
    }

    fn troubles(&self) -> Vec<String> {
        self.inner.troubles.borrow().values().cloned().collect()
    }

    fn subscribe_troubles(&self) -> channel::Receiver<BTreeMap<&'static str, String>> {
        self.inner.troubles.subscribe()
    }

    /// Takes a Node seen, unless a newer one of the same UID is known already.
    pub(crate) fn learn(&self, node: NodeObject) {
        let version = |n: &NodeObject| {
            let text = n.metadata.resource_version.as_deref();
            text.and_then(|t| t.parse::<u64>().ok())
        };
        self.inner.node.send_if_modified(|known| {
            let older = known.as_ref().is_some_and(|k| {
                k.metadata.uid == node.metadata.uid && version(k) >= version(&node)
            });
            if older {
                return false;
            }
            *known = Some(Arc::new(node));
            true
        });
    }

    fn forget(&self) {
        self.inner
            .node
            .send_if_modified(|known| known.take().is_some());
    }
}

/// The node's tasks, not started yet.
#[derive(Debug)]
pub struct Node<R> {
    runtime: Arc<R>,
    config: Arc<Config>,
    clients: Clients,
    handle: NodeHandle,
    machine: Arc<Machine>,
}

impl<R: RuntimeService + ImageService> Node<R> {
    /// Looks at the machine and prepares the tasks. The handle can be used at once.
    pub fn new(runtime: Arc<R>, config: Arc<Config>, clients: Clients) -> (Self, NodeHandle) {
        let machine = Arc::new(machine::machine());
        let handle = NodeHandle::new(&config, &machine);
        let node = Self {
            runtime,
            config,
            clients,
            handle: handle.clone(),
            machine,
        };
        (node, handle)
    }

    /// Registers, reports, renews and watches until told to stop.
    pub async fn run(self, stop: CancellationToken) {
        let reporter = status::Reporter {
            runtime: Arc::clone(&self.runtime),
            config: Arc::clone(&self.config),
            clients: self.clients.clone(),
            handle: self.handle.clone(),
            machine: self.machine,
            registered: false,
            sent_at: None,
        };
        let lease = lease::run(
            Arc::clone(&self.config),
            self.clients.clone(),
            self.handle.clone(),
            stop.clone(),
        );
        let watch = watch::run(
            self.runtime,
            self.config,
            self.clients,
            self.handle,
            stop.clone(),
        );
        tokio::join!(reporter.run(stop), lease, watch);
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use crate::config::{Flags, load};

    /// A handle of a node that is not registered.
    pub(crate) fn handle() -> NodeHandle {
        let flags = Flags {
            hostname_override: Some("n1".to_owned()),
            node_ips: vec![[10, 0, 0, 1].into()],
            ..Flags::default()
        };
        NodeHandle::new(&load(&flags).unwrap(), &Machine::default())
    }
}

#[cfg(test)]
mod tests {
    use super::testing::handle;
    use super::*;
    use k8s_openapi::api::core::v1::NodeSpec;

    fn node(uid: &str, version: &str, cidr: &str) -> NodeObject {
        let mut node = NodeObject::default();
        node.metadata.name = Some("n1".to_owned());
        node.metadata.uid = Some(uid.to_owned());
        node.metadata.resource_version = Some(version.to_owned());
        node.spec = Some(NodeSpec {
            pod_cidr: Some(cidr.to_owned()),
            ..NodeSpec::default()
        });
        node
    }

    #[test]
    fn an_older_sight_of_the_node_is_not_believed() {
        let handle = handle();
        assert!(handle.owner_reference().is_none());
        handle.learn(node("a", "5", "10.0.1.0/24"));
        handle.learn(node("a", "4", ""));
        assert_eq!(handle.pod_cidrs(), ["10.0.1.0/24"]);
        handle.learn(node("b", "3", "10.0.2.0/24"));
        assert_eq!(handle.owner_reference().unwrap().uid, "b");
        handle.forget();
        assert!(handle.pod_cidrs().is_empty());
    }

    #[test]
    fn troubles_come_and_go() {
        let handle = handle();
        handle.set_trouble("pods", Some("the pod watch has not synced".to_owned()));
        assert_eq!(handle.troubles(), ["the pod watch has not synced"]);
        handle.set_trouble("pods", None);
        assert!(handle.troubles().is_empty());
    }
}
