//! From a pod to the engine's words: pure functions that say what a sandbox, a container and
//! their cgroups shall be.
//!
//! ```text
//! Pod, Container, LaunchContext, PodVolumes, EnvObjects, ImageStatus
//!        | sandbox::config       | container::config      | qos, resources, oom
//!        v                       v                        v
//!   SandboxConfig          ContainerConfig            Resources, cgroup paths
//! ```
//!
//! Rules and words are those of the stock kubelet v1.36. Forbidden here: clocks, the apiserver,
//! locks. IO is confined to [`files`], which writes what [`container::files`] planned.

pub mod container;
pub mod dns;
pub mod env;
pub mod env_file;
pub mod expand;
pub mod fields;
pub mod files;
pub mod hash;
pub mod hostname;
pub mod hosts;
pub mod mounts;
pub mod oom;
pub mod qos;
pub mod resources;
pub mod sandbox;
pub mod security;
pub mod service_env;

use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, Service};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use runtime::service::DnsConfig;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

/// Label: pod name.
pub const LABEL_POD_NAME: &str = "io.kubernetes.pod.name";
/// Label: pod namespace.
pub const LABEL_POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
/// Label: pod UID.
pub const LABEL_POD_UID: &str = "io.kubernetes.pod.uid";
/// Label: container name.
pub const LABEL_CONTAINER_NAME: &str = "io.kubernetes.container.name";
/// Annotation: hash of the container's spec, hexadecimal.
pub const ANNOTATION_HASH: &str = "io.kubernetes.container.hash";
/// Annotation: how many instances came before.
pub const ANNOTATION_RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
/// Annotation: the restart back-off an instance was started with, nanoseconds.
pub const ANNOTATION_BACKOFF: &str = "io.ferrule.container.backoff";
/// Annotation: the round of its pod an instance was started in, see `pod::rounds`.
pub const ANNOTATION_ROUND: &str = "io.ferrule.container.round";
/// Annotation: path of the termination message in the container.
pub const ANNOTATION_TERMINATION_PATH: &str = "io.kubernetes.container.terminationMessagePath";
/// Annotation: `File` or `FallbackToLogsOnError`.
pub const ANNOTATION_TERMINATION_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";

/// What of the node matters to a launch. Cheap to build anew when the node changes.
#[derive(Debug, Clone)]
pub struct LaunchContext {
    /// The node's name.
    pub node_name: String,
    /// The node's addresses, primary first; IPv4 and IPv6 at most once each.
    pub host_ips: Vec<IpAddr>,
    /// The Node's allocatable resources: limits of the downward API where the container has none.
    pub allocatable: BTreeMap<String, ApiQuantity>,
    /// The machine's memory in bytes.
    pub memory_capacity: i64,
    /// Cluster DNS servers.
    pub cluster_dns: Vec<IpAddr>,
    /// Cluster domain without a trailing dot; may be empty.
    pub cluster_domain: String,
    /// The node's resolver settings ([`dns::parse_resolv_conf`]); none when the configuration
    /// says `resolvConf: ""`.
    pub host_dns: Option<DnsConfig>,
    /// `/etc/hosts` of the node, for pods with its network.
    pub host_hosts: String,
    /// Cgroup of all pods below the engine's cgroup root, `/kubepods`.
    pub kubepods: String,
    /// Enforce CPU limits by CFS quota.
    pub cpu_cfs_quota: bool,
    /// CFS period, microseconds.
    pub cpu_cfs_period_us: u64,
    /// Whether the node runs cgroup v2.
    pub cgroup_v2: bool,
    /// Kill only the process chosen by the kernel, not its whole container (v2).
    pub single_process_oom_kill: bool,
    /// Limit on processes of a pod.
    pub pod_pids_limit: Option<i64>,
    /// Huge page sizes of the machine as cgroups call them (`2MB`).
    pub hugepage_sizes: Vec<String>,
    /// RuntimeDefault seccomp for those who ask for nothing.
    pub seccomp_default: bool,
    /// Root of localhost seccomp profiles (`<root-dir>/seccomp`).
    pub seccomp_root: PathBuf,
    /// Paths of this machine that are hidden from containers besides the usual ones.
    pub masked_paths: Vec<String>,
    /// The kubelet's root (`/var/lib/kubelet`).
    pub root_dir: PathBuf,
    /// Pod logs (`/var/log/pods`).
    pub pod_logs_dir: PathBuf,
    /// Rotation of a container's log, bytes.
    pub log_max_bytes: u64,
    /// Log files kept per container.
    pub log_max_files: u32,
}

impl Default for LaunchContext {
    /// The stock defaults on a node that has no name, address or capacity yet.
    fn default() -> Self {
        Self {
            node_name: String::new(),
            host_ips: Vec::new(),
            allocatable: BTreeMap::new(),
            memory_capacity: 0,
            cluster_dns: Vec::new(),
            cluster_domain: String::new(),
            host_dns: Some(DnsConfig::default()),
            host_hosts: String::new(),
            kubepods: "/kubepods".into(),
            cpu_cfs_quota: true,
            cpu_cfs_period_us: 100_000,
            cgroup_v2: false,
            single_process_oom_kill: false,
            pod_pids_limit: None,
            hugepage_sizes: Vec::new(),
            seccomp_default: false,
            seccomp_root: "/var/lib/kubelet/seccomp".into(),
            masked_paths: Vec::new(),
            root_dir: "/var/lib/kubelet".into(),
            pod_logs_dir: "/var/log/pods".into(),
            log_max_bytes: 10 << 20,
            log_max_files: 5,
        }
    }
}

/// The objects a container's environment speaks of. `None` in a map: asked for, does not exist.
#[derive(Debug, Clone, Default)]
pub struct EnvObjects {
    /// ConfigMaps of the pod's namespace by name.
    pub config_maps: BTreeMap<String, Option<Arc<ConfigMap>>>,
    /// Secrets of the pod's namespace by name.
    pub secrets: BTreeMap<String, Option<Arc<Secret>>>,
    /// Environment files by volume and path in it, or why they cannot be read.
    pub files: BTreeMap<(String, String), Result<String, String>>,
    /// All services of the cluster (only the pod's namespace and `default` are looked at).
    pub services: Vec<Arc<Service>>,
}

/// Why a pod or container cannot be launched as its spec stands.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// The configuration is wrong, or an object it needs is missing.
    #[error("{0}")]
    Config(String),
    /// A part of the container cannot be made.
    #[error("{0}")]
    Create(String),
    /// The sandbox cannot be described.
    #[error("{0}")]
    Sandbox(String),
}

impl LaunchError {
    /// The container's waiting reason users see.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Config(_) => "CreateContainerConfigError",
            Self::Create(_) => "CreateContainerError",
            Self::Sandbox(_) => "CreatePodSandboxError",
        }
    }
}

/// The pod's name, empty without one.
pub(crate) fn pod_name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

/// The pod's namespace, empty without one.
pub(crate) fn pod_namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or_default()
}

/// The pod's UID, empty without one.
pub(crate) fn pod_uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

/// Whether the pod uses the node's network.
pub(crate) fn host_network(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|s| s.host_network) == Some(true)
}

/// The pod as the stock kubelet's messages call it: `name_namespace(uid)`.
pub(crate) fn describe(pod: &Pod) -> String {
    format!("{}_{}({})", pod_name(pod), pod_namespace(pod), pod_uid(pod))
}

/// `/var/log/pods/<namespace>_<name>_<uid>`.
pub fn pod_log_directory(pod: &Pod, context: &LaunchContext) -> PathBuf {
    context.pod_logs_dir.join(format!(
        "{}_{}_{}",
        pod_namespace(pod),
        pod_name(pod),
        pod_uid(pod)
    ))
}

/// `<root-dir>/pods/<uid>`.
pub fn pod_directory(pod: &Pod, context: &LaunchContext) -> PathBuf {
    context.root_dir.join("pods").join(pod_uid(pod))
}

#[cfg(test)]
pub(crate) mod testing {
    //! Objects for tests, from JSON.
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::{Value, json};

    /// A pod `p` in `ns` with the given spec; `containers` defaults to one `c`.
    pub(crate) fn pod(mut spec: Value) -> Pod {
        if spec.get("containers").is_none() {
            spec["containers"] = json!([{"name": "c", "image": "busybox"}]);
        }
        serde_json::from_value(json!({
            "metadata": {
                "name": "p", "namespace": "ns", "uid": "u1",
                "labels": {"app": "web", "a/b": "c"},
                "annotations": {"note": "say \"hi\"\nbye"},
            },
            "spec": spec,
        }))
        .unwrap()
    }

    /// A pod of one container.
    pub(crate) fn pod_of(container: Value) -> Pod {
        pod(json!({"containers": [container]}))
    }
}
