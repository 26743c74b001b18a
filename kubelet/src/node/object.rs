//! The Node object as this node wants it. Pure: facts in, objects and patches out.

use super::capacity::Amounts;
use super::machine::Machine;
use crate::config::Config;
use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints,
    NodeFeatures, NodeRuntimeHandler, NodeRuntimeHandlerFeatures, NodeSpec, NodeStatus,
    NodeSwapStatus, NodeSystemInfo, Taint,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use runtime::service::ImageStatus;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The Kubernetes version whose kubelet this agent stands in for, with our own as build
/// metadata: version skew checks of clients and controllers compare the first part only.
pub const KUBELET_VERSION: &str = concat!("v1.36.3+ferrule.", env!("CARGO_PKG_VERSION"));
/// What `kubectl get nodes -o wide` shows as container runtime.
pub const RUNTIME_VERSION: &str = concat!("ferrule://", env!("CARGO_PKG_VERSION"));
/// Names kept per image in the status (as the stock kubelet).
const NAMES_PER_IMAGE: usize = 5;
/// Tells the attach/detach controller that volumes of this node are its business.
const ATTACH_DETACH: &str = "volumes.kubernetes.io/controller-managed-attach-detach";
/// Tells a cloud controller which address we were given.
const PROVIDED_IP: &str = "alpha.kubernetes.io/provided-node-ip";
/// Features the scheduler and the apiserver may count on (KEP-5328). With
/// `ExtendWebSocketsToKubelet` the apiserver hands exec WebSockets through to us.
pub const DECLARED_FEATURES: &[&str] = &[
    "ExtendWebSocketsToKubelet",
    "InPlacePodLevelResourcesVerticalScaling",
    "InPlacePodVerticalScalingInitContainers",
    "RestartAllContainersOnContainerExits",
];

/// Labels the agent itself sets.
pub fn labels(config: &Config, machine: &Machine) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    let mut put = |key: &str, value: &str| labels.insert(key.to_owned(), value.to_owned());
    for prefix in ["kubernetes.io", "beta.kubernetes.io"] {
        put(&format!("{prefix}/os"), "linux");
        put(&format!("{prefix}/arch"), &machine.architecture);
    }
    put("kubernetes.io/hostname", &config.host_name);
    labels.extend(config.node_labels.clone());
    labels
}

/// Annotations the agent itself sets.
pub fn annotations(config: &Config) -> BTreeMap<String, String> {
    let mut annotations = BTreeMap::from([(ATTACH_DETACH.to_owned(), "true".to_owned())]);
    if config.external_cloud_provider {
        let ips: Vec<_> = config.node_ips.iter().map(ToString::to_string).collect();
        annotations.insert(PROVIDED_IP.to_owned(), ips.join(","));
    }
    annotations
}

/// The Node to create.
pub fn node(config: &Config, machine: &Machine, status: NodeStatus) -> Node {
    let mut taints = config.register_with_taints.clone();
    if config.external_cloud_provider {
        taints.push(Taint {
            key: "node.cloudprovider.kubernetes.io/uninitialized".to_owned(),
            value: Some("true".to_owned()),
            effect: "NoSchedule".to_owned(),
            time_added: None,
        });
    }
    let provider_id = Some(config.provider_id.clone()).filter(|p| !p.is_empty());
    Node {
        metadata: ObjectMeta {
            name: Some(config.node_name.clone()),
            labels: Some(labels(config, machine)),
            annotations: Some(annotations(config)),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec {
            provider_id,
            taints: Some(taints).filter(|t| !t.is_empty()),
            ..NodeSpec::default()
        }),
        status: Some(status),
    }
}

/// What must change in the metadata and spec of a Node that exists already; none if nothing.
/// Taints are not ours to change after creation (NodeRestriction).
pub fn metadata_patch(existing: &Node, config: &Config, machine: &Machine) -> Option<Value> {
    let differing = |have: &Option<BTreeMap<String, String>>, want: BTreeMap<String, String>| {
        let have = have.clone().unwrap_or_default();
        let differs = want.into_iter().filter(|(k, v)| have.get(k) != Some(v));
        differs.collect::<BTreeMap<_, _>>()
    };
    let labels = differing(&existing.metadata.labels, labels(config, machine));
    let annotations = differing(&existing.metadata.annotations, annotations(config));
    let has_provider = existing
        .spec
        .as_ref()
        .and_then(|s| s.provider_id.as_ref())
        .is_some_and(|p| !p.is_empty());
    let mut patch = serde_json::Map::new();
    let mut metadata = serde_json::Map::new();
    if !labels.is_empty() {
        metadata.insert("labels".to_owned(), json!(labels));
    }
    if !annotations.is_empty() {
        metadata.insert("annotations".to_owned(), json!(annotations));
    }
    if !metadata.is_empty() {
        patch.insert("metadata".to_owned(), Value::Object(metadata));
    }
    if !config.provider_id.is_empty() && !has_provider {
        patch.insert("spec".to_owned(), json!({"providerID": config.provider_id}));
    }
    (!patch.is_empty()).then_some(Value::Object(patch))
}

/// Facts the status is made of.
#[derive(Debug)]
pub struct StatusInputs<'a> {
    /// Configuration.
    pub config: &'a Config,
    /// The machine.
    pub machine: &'a Machine,
    /// Capacity.
    pub capacity: &'a Amounts,
    /// Allocatable.
    pub allocatable: &'a Amounts,
    /// Conditions with their times.
    pub conditions: Vec<NodeCondition>,
    /// Images stored.
    pub images: &'a [ImageStatus],
    /// Attached volumes the node uses.
    pub volumes_in_use: Vec<String>,
}

fn api_amounts(amounts: &Amounts) -> BTreeMap<String, ApiQuantity> {
    amounts
        .iter()
        .map(|(k, v)| (k.clone(), ApiQuantity(v.to_string())))
        .collect()
}

fn address(type_: &str, address: String) -> NodeAddress {
    NodeAddress {
        type_: type_.to_owned(),
        address,
    }
}

/// The status.
pub fn status(inputs: StatusInputs<'_>) -> NodeStatus {
    let (config, machine) = (inputs.config, inputs.machine);
    let mut addresses: Vec<_> = config
        .node_ips
        .iter()
        .map(|ip| address("InternalIP", ip.to_string()))
        .collect();
    addresses.push(address("Hostname", config.host_name.clone()));
    let handler = |name: &str| NodeRuntimeHandler {
        name: Some(name.to_owned()),
        features: Some(NodeRuntimeHandlerFeatures {
            recursive_read_only_mounts: Some(true),
            user_namespaces: Some(machine.user_namespaces),
        }),
    };
    let features = DECLARED_FEATURES.iter().map(|f| (*f).to_owned()).collect();
    NodeStatus {
        addresses: (!config.external_cloud_provider).then_some(addresses),
        capacity: Some(api_amounts(inputs.capacity)),
        allocatable: Some(api_amounts(inputs.allocatable)),
        conditions: Some(inputs.conditions),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint {
                port: i32::from(config.server.address.port()),
            }),
        }),
        node_info: Some(node_info(machine)),
        images: Some(images(inputs.images, config.images.status_max_images)),
        runtime_handlers: Some(vec![handler(""), handler("ferrule")]),
        features: Some(NodeFeatures {
            supplemental_groups_policy: Some(true),
        }),
        declared_features: Some(features),
        // Written even when empty: what was there is to go.
        volumes_in_use: Some(inputs.volumes_in_use),
        ..NodeStatus::default()
    }
}

fn node_info(machine: &Machine) -> NodeSystemInfo {
    let swap = i64::try_from(machine.swap_bytes).ok().filter(|n| *n > 0);
    NodeSystemInfo {
        architecture: machine.architecture.clone(),
        boot_id: machine.boot_id.clone(),
        container_runtime_version: RUNTIME_VERSION.to_owned(),
        kernel_version: machine.kernel_version.clone(),
        kube_proxy_version: String::new(),
        kubelet_version: KUBELET_VERSION.to_owned(),
        machine_id: machine.machine_id.clone(),
        operating_system: "linux".to_owned(),
        os_image: machine.os_image.clone(),
        swap: swap.map(|n| NodeSwapStatus { capacity: Some(n) }),
        system_uuid: machine.system_uuid.clone(),
    }
}

/// The biggest images first, at most `most` (negative: all).
fn images(stored: &[ImageStatus], most: i32) -> Vec<ContainerImage> {
    let mut stored: Vec<&ImageStatus> = stored.iter().collect();
    stored.sort_by(|a, b| b.size_bytes.cmp(&a.size_bytes).then(a.id.cmp(&b.id)));
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let one = |image: &ImageStatus| ContainerImage {
        names: Some(
            image
                .repo_digests
                .iter()
                .chain(&image.repo_tags)
                .take(NAMES_PER_IMAGE)
                .cloned()
                .collect(),
        ),
        size_bytes: i64::try_from(image.size_bytes).ok(),
    };
    stored.into_iter().take(most).map(one).collect()
}

/// Whether a status is worth sending before the report is due: anything but heartbeats differs.
pub fn differs(have: &NodeStatus, want: &NodeStatus) -> bool {
    // The server keeps what others wrote (volumesAttached, foreign conditions): compare ours.
    let timeless = |status: &NodeStatus, types: &[String]| {
        let mut status = status.clone();
        let ours = status.conditions.take().unwrap_or_default();
        let mut ours: Vec<NodeCondition> = ours
            .into_iter()
            .filter(|c| types.contains(&c.type_))
            .map(|c| NodeCondition {
                last_heartbeat_time: None,
                last_transition_time: None,
                ..c
            })
            .collect();
        ours.sort_by(|a, b| a.type_.cmp(&b.type_));
        status.conditions = Some(ours);
        status.volumes_attached = None;
        status.phase = None;
        status.config = None;
        if want.addresses.is_none() {
            status.addresses = None;
        }
        // Empty and absent are the same over the wire.
        status.images = status.images.filter(|i| !i.is_empty());
        status.volumes_in_use = status.volumes_in_use.filter(|v| !v.is_empty());
        status
    };
    let conditions = want.conditions.iter().flatten();
    let types: Vec<String> = conditions.map(|c| c.type_.clone()).collect();
    timeless(have, &types) != timeless(want, &types)
}

/// A strategic merge patch that writes our status over the server's. Addresses are replaced as a
/// whole: their merge key is not unique (kubernetes/kubernetes#79391).
pub fn status_patch(want: &NodeStatus) -> Value {
    let mut status = json!(want);
    if let Some(Value::Array(addresses)) = status.get_mut("addresses") {
        addresses.push(json!({"$patch": "replace"}));
    }
    json!({"status": status})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Flags, load};
    use jiff::Timestamp;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use runtime::service::{ImageConfig, ImageId};

    fn config(change: impl FnOnce(&mut Flags)) -> Config {
        let mut flags = Flags {
            hostname_override: Some("n1".to_owned()),
            node_ips: vec![[10, 0, 0, 1].into()],
            ..Flags::default()
        };
        change(&mut flags);
        load(&flags).unwrap()
    }

    fn status_of(config: &Config, conditions: Vec<NodeCondition>) -> NodeStatus {
        status(StatusInputs {
            config,
            machine: &Machine::default(),
            capacity: &Amounts::new(),
            allocatable: &Amounts::new(),
            conditions,
            images: &[],
            volumes_in_use: vec![],
        })
    }

    fn condition(type_: &str, status: &str, at: i64) -> NodeCondition {
        let time = Some(Time(Timestamp::from_second(at).unwrap()));
        NodeCondition {
            type_: type_.to_owned(),
            status: status.to_owned(),
            last_heartbeat_time: time.clone(),
            last_transition_time: time,
            ..NodeCondition::default()
        }
    }

    #[test]
    fn the_kubelet_version_is_read_as_1_36() {
        assert!(KUBELET_VERSION.starts_with("v1.36.3+ferrule."));
    }

    #[test]
    fn an_existing_node_gets_only_what_it_lacks() {
        let config = config(|f| {
            f.node_labels.insert("a".into(), "b".into());
        });
        let machine = Machine::default();
        let mut existing = node(&config, &machine, NodeStatus::default());
        assert_eq!(metadata_patch(&existing, &config, &machine), None);
        existing.metadata.labels.as_mut().unwrap().remove("a");
        assert_eq!(
            metadata_patch(&existing, &config, &machine),
            Some(json!({"metadata": {"labels": {"a": "b"}}}))
        );
    }

    #[test]
    fn heartbeats_and_foreign_conditions_are_no_difference() {
        let config = config(|_| {});
        let want = status_of(&config, vec![condition("Ready", "True", 5)]);
        let mut have = want.clone();
        have.conditions = Some(vec![
            condition("NetworkUnavailable", "False", 1),
            condition("Ready", "True", 1),
        ]);
        have.images = None;
        assert!(!differs(&have, &want));
        have.conditions = Some(vec![condition("Ready", "False", 1)]);
        assert!(differs(&have, &want));
    }

    #[test]
    fn addresses_are_replaced_as_a_whole() {
        let config = config(|_| {});
        let patch = status_patch(&status_of(&config, Vec::new()));
        assert_eq!(
            patch["status"]["addresses"],
            json!([
                {"type": "InternalIP", "address": "10.0.0.1"},
                {"type": "Hostname", "address": "n1"},
                {"$patch": "replace"}
            ])
        );
    }

    #[test]
    fn the_biggest_images_are_listed() {
        let image = |n: u64| ImageStatus {
            id: ImageId(format!("sha256:{n}")),
            repo_tags: vec![format!("r/i:{n}")],
            repo_digests: Vec::new(),
            size_bytes: n,
            pinned: false,
            user: String::new(),
            config: ImageConfig::default(),
        };
        let found = images(&[image(1), image(3), image(2)], 2);
        let sizes: Vec<_> = found.iter().filter_map(|i| i.size_bytes).collect();
        assert_eq!(sizes, [3, 2]);
        assert_eq!(images(&[image(1)], -1).len(), 1);
    }
}
