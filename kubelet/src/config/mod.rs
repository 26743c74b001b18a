//! Configuration: flags and files in, one resolved [`Config`] out.
//!
//! Precedence, as with the stock kubelet: defaults, then `--config`, then the drop-ins of
//! `--config-dir` in name order, then flags. Everything is read as a tree of values first,
//! checked against [`schema`] (so that a wrong or unknown field is named with its file, path and
//! value), and only then resolved. No task, no channel; nothing here talks to the apiserver.
//! Forbidden outside this module: reading a configuration file, or asking again whether a value
//! is sane.

pub mod check;
pub mod duration;
mod eviction;
pub mod flags;
pub mod host;
pub mod load;
pub mod resolve;
pub mod schema;
mod shown;
mod tree;

pub use check::Problem;
pub use flags::{FlagError, Flags};
pub use load::{ConfigError, load};

use crate::images::access::Verification;
use k8s_openapi::api::core::v1::Taint;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Which cgroup naming is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CgroupDriver {
    /// Directories made by us: `kubepods/burstable/pod<uid>`.
    #[default]
    Cgroupfs,
    /// Slices and scopes: `kubepods-burstable-pod<uid>.slice`.
    Systemd,
}

/// Who may use the HTTPS API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AuthorizationMode {
    /// The apiserver is asked (SubjectAccessReview).
    #[default]
    Webhook,
    /// Everybody who is authenticated.
    AlwaysAllow,
}

/// The HTTPS API and its neighbours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerConfig {
    /// Whether the HTTPS API is served (`enableServer`).
    pub enabled: bool,
    /// Where the HTTPS API listens.
    pub address: SocketAddr,
    /// Where plain `/healthz` listens; port 0 is off.
    pub healthz: SocketAddr,
    /// Where the read-only port listens (plain HTTP, nobody is asked who they are); port 0 is
    /// off.
    pub read_only: SocketAddr,
    /// Serving certificate (PEM chain); empty: self-signed, kept in `cert_dir`.
    pub tls_cert_file: PathBuf,
    /// Key of `tls_cert_file`.
    pub tls_key_file: PathBuf,
    /// Only TLS 1.3 (`tlsMinVersion: VersionTLS13`).
    pub tls13_only: bool,
    /// Authorities of client certificates (PEM bundle); empty: no client certificates.
    pub client_ca_file: PathBuf,
    /// Requests without credentials are `system:anonymous` instead of 401.
    pub anonymous: bool,
    /// Bearer tokens are shown to the apiserver (TokenReview).
    pub token_review: bool,
    /// How long a TokenReview answer is believed.
    pub token_ttl: Duration,
    /// Authorization.
    pub authorization: AuthorizationMode,
    /// How long "allowed" is believed.
    pub allowed_ttl: Duration,
    /// How long "denied" is believed.
    pub denied_ttl: Duration,
    /// Logs, exec and the like are served (`enableDebuggingHandlers`).
    pub debugging_handlers: bool,
    /// Files below `/var/log` are served (`enableSystemLogHandler`).
    pub system_logs: bool,
    /// The verbosity of the log can be changed (`enableDebugFlagsHandler`).
    pub debug_flags: bool,
    /// Profiles are served (`enableProfilingHandler`).
    pub profiling: bool,
    /// A streaming connection without traffic is closed after this long.
    pub streaming_idle_timeout: Duration,
}

/// Image pulling and collecting.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageSettings {
    /// Pulls started per second on average; 0 is no limit.
    pub registry_qps: u32,
    /// Pulls started at once before `registry_qps` holds.
    pub registry_burst: u32,
    /// Pulls at the same time. The stock default is one (`serializeImagePulls`); here it is one
    /// only when the file says so.
    pub max_parallel_pulls: usize,
    /// Unused images younger than this stay.
    pub minimum_gc_age: Duration,
    /// Unused images older than this go; zero is never.
    pub maximum_gc_age: Duration,
    /// Disk use in percent at which images are collected.
    pub gc_high_percent: u8,
    /// Disk use in percent at which collecting stops.
    pub gc_low_percent: u8,
    /// Images listed in the Node's status; negative is all.
    pub status_max_images: i32,
    /// Registry host to mirrors tried before it (URLs, in order).
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// Registry hosts spoken to without TLS, or with any certificate.
    pub insecure: Vec<String>,
    /// A registry that has mirrors is never asked itself.
    pub only_mirrors: bool,
    /// Configuration of programs that give credentials, and the directory they are in.
    pub credential_providers: Option<(PathBuf, PathBuf)>,
    /// When a pod's credentials are asked for although its image is there.
    pub verification: Verification,
}

/// A threshold such as `100Mi` or `10%`.
#[derive(Debug, Clone, PartialEq)]
pub enum Threshold {
    /// An amount (bytes, inodes, processes).
    Amount(u64),
    /// A share of the capacity, 0.0…1.0.
    Share(f64),
}

/// Everything the agent was told, checked and complete.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Name of the Node object (lower case).
    pub node_name: String,
    /// Host name of the machine, as the Hostname address and label.
    pub host_name: String,
    /// The node's addresses, the primary first; never empty.
    pub node_ips: Vec<IpAddr>,
    /// How to reach the apiserver; empty: there is none ([`Config::is_standalone`]).
    pub kubeconfig: PathBuf,
    /// Where the kubelet keeps its files (`pods/<uid>/…`).
    pub root_dir: PathBuf,
    /// Where serving certificates made here are kept.
    pub cert_dir: PathBuf,
    /// Container logs, `<ns>_<name>_<uid>/<container>/<n>.log` below it.
    pub pod_logs_dir: PathBuf,
    /// State of our runtime (images, sandboxes, containers).
    pub runtime_root: PathBuf,
    /// Volatile state of our runtime (sockets, network namespaces).
    pub runtime_run_dir: PathBuf,
    /// Network configuration lists.
    pub cni_conf_dir: PathBuf,
    /// Network plugins.
    pub cni_bin_dirs: Vec<PathBuf>,
    /// The `pod-shim` program; empty: beside our own executable.
    pub shim_path: PathBuf,
    /// Static pod manifests: a directory or a file; empty: none.
    pub static_pod_path: PathBuf,
    /// Longest time between two looks at `static_pod_path`.
    pub file_check_frequency: Duration,
    /// Static pod manifests behind a URL; empty: none.
    pub static_pod_url: String,
    /// Headers of requests for `static_pod_url`; values may be secrets.
    pub static_pod_url_headers: BTreeMap<String, Vec<String>>,
    /// Time between two requests for `static_pod_url`.
    pub http_check_frequency: Duration,

    /// Whether the Node object is made when it is missing.
    pub register_node: bool,
    /// Taints of a Node made by us.
    pub register_with_taints: Vec<Taint>,
    /// Labels of the Node (`--node-labels`).
    pub node_labels: BTreeMap<String, String>,
    /// `spec.providerID`, empty for none.
    pub provider_id: String,
    /// `external`: a cloud controller sets addresses; the Node starts with its taint.
    pub external_cloud_provider: bool,
    /// How often the Node's status is computed.
    pub node_status_update_frequency: Duration,
    /// How often the Node's status is sent though nothing changed.
    pub node_status_report_frequency: Duration,
    /// Life of the Lease; it is renewed four times as often.
    pub node_lease_duration: Duration,

    /// Name servers of pods with `ClusterFirst`.
    pub cluster_dns: Vec<IpAddr>,
    /// Domain of the cluster, without dots at the ends; empty for none.
    pub cluster_domain: String,
    /// The node's resolver file; empty: pods get none of it.
    pub resolv_conf: PathBuf,
    /// Host ports' bridge hairpin and the like are the network plugin's; kept for `/configz`.
    pub pod_cidr: String,

    /// Pods this node takes.
    pub max_pods: u32,
    /// Ids of a pod with users of its own.
    pub ids_per_pod: u32,
    /// Processes per pod; -1 is no limit.
    pub pod_pids_limit: i64,
    /// Longest time between two looks at a pod nothing happened to.
    pub sync_frequency: Duration,
    /// Longest back-off of a crashing container.
    pub crash_loop_max: Duration,
    /// Unsafe sysctls allowed: names, or prefixes ending in `*`.
    pub allowed_unsafe_sysctls: Vec<String>,
    /// Pods without a seccomp profile get RuntimeDefault.
    pub seccomp_default: bool,
    /// Memory killer takes single processes, not the whole container (cgroup v2).
    pub single_process_oom_kill: bool,
    /// How long calls to the runtime may last.
    pub runtime_request_timeout: Duration,

    /// Our cgroup, e.g. `/`; QoS cgroups are made below it.
    pub cgroup_root: String,
    /// Naming of cgroups.
    pub cgroup_driver: CgroupDriver,
    /// Whether there is a QoS tree at all.
    pub cgroups_per_qos: bool,
    /// Whether CPU limits are enforced.
    pub cpu_cfs_quota: bool,
    /// Period of CPU quotas.
    pub cpu_cfs_quota_period: Duration,
    /// Whether allocatable is enforced on `kubepods` (`enforceNodeAllocatable: [pods]`).
    pub enforce_pods_allocatable: bool,
    /// Reserved for Kubernetes daemons: resource name to quantity as written.
    pub kube_reserved: BTreeMap<String, String>,
    /// Reserved for the system: resource name to quantity as written.
    pub system_reserved: BTreeMap<String, String>,
    /// Hard eviction thresholds by signal (`memory.available`).
    pub eviction_hard: BTreeMap<String, Threshold>,
    /// Soft eviction thresholds by signal.
    pub eviction_soft: BTreeMap<String, Threshold>,
    /// Grace of soft thresholds by signal.
    pub eviction_soft_grace: BTreeMap<String, Duration>,
    /// By signal, how much more than its threshold must be free before it is dealt with.
    pub eviction_minimum_reclaim: BTreeMap<String, Threshold>,
    /// Whether pods' limits on the node's disk are enforced.
    pub local_storage_isolation: bool,
    /// How long a pressure condition stays after the pressure.
    pub eviction_transition_period: Duration,
    /// Longest grace of an eviction by a soft threshold, seconds.
    pub eviction_max_pod_grace_s: i64,
    /// Wanted oom_score_adj of the agent itself.
    pub oom_score_adj: i32,
    /// Refuse to start on cgroup v1 when the file says so itself.
    pub fail_cgroup_v1: bool,
    /// Refuse to start while swap is on.
    pub fail_swap_on: bool,

    /// Log size in bytes at which a container log is rotated.
    pub container_log_max_size: u64,
    /// Log files kept per container, the open one included.
    pub container_log_max_files: u32,
    /// A rotated log is compressed when it has been there for this long.
    pub container_log_monitor_interval: Duration,

    /// Events per second on average; 0 is no limit.
    pub event_qps: u32,
    /// Events at once.
    pub event_burst: u32,
    /// Feature gates as given.
    pub feature_gates: BTreeMap<String, bool>,
    /// Images.
    pub images: ImageSettings,
    /// HTTPS API.
    pub server: ServerConfig,
    /// Log lines are JSON objects.
    pub log_json: bool,
    /// How much is logged: 0…10, as klog's `-v`.
    pub verbosity: u8,
    /// The effective KubeletConfiguration, for `/configz`.
    pub effective: serde_json::Value,
    /// What the start-up log should say once: fields without effect here, deprecated flags.
    pub notes: BTreeSet<String>,
}

impl Config {
    /// Whether there is no apiserver: only static pods are run (`--kubeconfig` is not given).
    pub fn is_standalone(&self) -> bool {
        self.kubeconfig.as_os_str().is_empty()
    }
}
