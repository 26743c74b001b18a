//! The engine's face: what a kubelet (or the CRI socket) may ask of it, in our own types.
//!
//! CRI-shaped on purpose: one may serve these traits by our own engine ([`crate::Engine`]), by
//! [`crate::fake`], or later by a foreign CRI runtime. Nothing here knows a Pod object.
//! All operations are idempotent: repeating one that succeeded succeeds; removing or stopping
//! what is not there succeeds.

pub use linux::cgroup::{Details as CgroupDetails, DeviceIo, Pressure, Stall};
pub use pod_shim::protocol::{Propagation, UserNamespace};

mod image;
mod sandbox;

pub use image::{FsUsage, ImageConfig, ImageService, ImageStatus, Pulled, RegistryAuth};
pub use sandbox::{SandboxConfig, SandboxState, SandboxStatus};

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Makes an id newtype over a string.
macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl $name {
            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl From<&str> for $name {
            fn from(s: &str) -> Self {
                Self(s.to_owned())
            }
        }
    };
}

id_type!(
    /// A sandbox (the pod's namespaces): 64 hex digits.
    SandboxId
);
id_type!(
    /// A container: 64 hex digits.
    ContainerId
);
id_type!(
    /// An image: `sha256:` and the digest of its configuration.
    ImageId
);

/// Whose namespace is used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NamespaceMode {
    /// Shared by the pod's containers.
    #[default]
    Pod,
    /// One per container (PID only).
    Container,
    /// The node's.
    Node,
    /// That of the given container (PID of ephemeral containers).
    Target(ContainerId),
}

/// Contents of the pod's resolv.conf.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsConfig {
    /// `nameserver` lines.
    pub servers: Vec<String>,
    /// `search` list.
    pub searches: Vec<String>,
    /// `options` words.
    pub options: Vec<String>,
}

/// A host port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// Port in the pod.
    pub container_port: u16,
    /// Port on the node.
    pub host_port: u16,
    /// Address on the node, any when empty.
    pub host_ip: String,
}

/// Limits of a cgroup. `None` leaves the kernel's default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// cpu.shares (v1 units, 2…262144); converted to a weight on v2.
    pub cpu_shares: Option<u64>,
    /// CFS quota in microseconds; negative is unlimited.
    pub cpu_quota_us: Option<i64>,
    /// CFS period in microseconds.
    pub cpu_period_us: Option<u64>,
    /// Memory limit in bytes.
    pub memory_limit_bytes: Option<i64>,
    /// Limit on processes.
    pub pids_limit: Option<i64>,
    /// `cpuset.cpus`.
    pub cpuset_cpus: Option<String>,
    /// `cpuset.mems`.
    pub cpuset_mems: Option<String>,
    /// Huge page limits in bytes by page size (`2MB`, `1GB`).
    pub hugepage_limits: BTreeMap<String, u64>,
    /// v2 only: any other file of the cgroup (`memory.oom.group` → `1`).
    pub unified: BTreeMap<String, String>,
    /// Memory requested in bytes. Nothing enforces it; it is kept so that a changed request can
    /// be told from an unchanged one. `None`: made before this was recorded.
    #[serde(default)]
    pub memory_request_bytes: Option<i64>,
}

impl Resources {
    /// These limits after an update: what `new` does not name stays.
    #[must_use]
    pub fn updated_by(&self, new: Self) -> Self {
        let mut hugepage_limits = self.hugepage_limits.clone();
        hugepage_limits.extend(new.hugepage_limits);
        let mut unified = self.unified.clone();
        unified.extend(new.unified);
        Self {
            cpu_shares: new.cpu_shares.or(self.cpu_shares),
            cpu_quota_us: new.cpu_quota_us.or(self.cpu_quota_us),
            cpu_period_us: new.cpu_period_us.or(self.cpu_period_us),
            memory_limit_bytes: new.memory_limit_bytes.or(self.memory_limit_bytes),
            pids_limit: new.pids_limit.or(self.pids_limit),
            cpuset_cpus: new.cpuset_cpus.or_else(|| self.cpuset_cpus.clone()),
            cpuset_mems: new.cpuset_mems.or_else(|| self.cpuset_mems.clone()),
            hugepage_limits,
            unified,
            memory_request_bytes: new.memory_request_bytes.or(self.memory_request_bytes),
        }
    }
}

/// A mount asked for by the kubelet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Path in the container.
    pub container_path: String,
    /// Path on the host (for an image mount: unused).
    pub host_path: PathBuf,
    /// Path beneath `host_path` that must not leave it (subPath); none mounts all.
    pub sub_path: Option<String>,
    /// Read-only.
    pub readonly: bool,
    /// Recursive read-only.
    pub recursive_readonly: bool,
    /// Propagation.
    pub propagation: Propagation,
    /// Mount an image's content instead of a host path.
    pub image: Option<ImageId>,
}

/// Seccomp choice.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SeccompProfile {
    /// The runtime's default profile.
    RuntimeDefault,
    /// No filter.
    #[default]
    Unconfined,
    /// A profile file on the node (absolute path).
    Localhost(PathBuf),
}

/// Privileges of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSecurity {
    /// All capabilities, all devices, no masks, writable /sys and cgroups.
    pub privileged: bool,
    /// Capabilities added, without `CAP_`; `ALL` for all.
    pub add_capabilities: Vec<String>,
    /// Capabilities dropped; `ALL` for all.
    pub drop_capabilities: Vec<String>,
    /// uid; wins over `run_as_username` and the image's USER.
    pub run_as_user: Option<i64>,
    /// gid.
    pub run_as_group: Option<i64>,
    /// User name from the image's passwd.
    pub run_as_username: Option<String>,
    /// Supplementary groups (fsGroup included by the kubelet).
    pub supplemental_groups: Vec<i64>,
    /// `Strict` ignores the image's group file; default merges.
    pub supplemental_groups_strict: bool,
    /// Read-only root filesystem.
    pub readonly_rootfs: bool,
    /// no_new_privs (allowPrivilegeEscalation: false).
    pub no_new_privs: bool,
    /// Masked paths; empty with `privileged` or procMount Unmasked.
    pub masked_paths: Vec<String>,
    /// Read-only paths.
    pub readonly_paths: Vec<String>,
    /// Seccomp.
    pub seccomp: SeccompProfile,
}

/// What a container shall be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerConfig {
    /// Name within the pod.
    pub name: String,
    /// How many instances of it came before (the restart count).
    pub attempt: u32,
    /// Image to run, as resolved by [`ImageService::status`] or `pull`.
    pub image: String,
    /// The image as the user wrote it.
    pub user_image: String,
    /// Replaces the image's ENTRYPOINT when not empty.
    pub command: Vec<String>,
    /// Replaces the image's CMD when not empty (or when `command` is set).
    pub args: Vec<String>,
    /// Replaces the image's WORKDIR when not empty.
    pub working_dir: String,
    /// Added to and overriding the image's ENV.
    pub env: Vec<(String, String)>,
    /// Mounts.
    pub mounts: Vec<Mount>,
    /// Host devices (host path, container path, permissions `rwm`).
    pub devices: Vec<(PathBuf, String, String)>,
    /// Labels, kept and returned.
    pub labels: BTreeMap<String, String>,
    /// Annotations, kept and returned.
    pub annotations: BTreeMap<String, String>,
    /// Log path relative to the sandbox's log directory; empty discards.
    pub log_path: String,
    /// Rotation of that log: bytes, files.
    pub log_max_bytes: u64,
    /// Log files kept.
    pub log_max_files: u32,
    /// Keep stdin open.
    pub stdin: bool,
    /// Close stdin after the first attach.
    pub stdin_once: bool,
    /// Terminal.
    pub tty: bool,
    /// PID namespace, overriding the sandbox's (`Target`).
    pub pid: Option<NamespaceMode>,
    /// cgroup limits.
    pub resources: Resources,
    /// oom_score_adj.
    pub oom_score_adj: i32,
    /// Privileges.
    pub security: ContainerSecurity,
    /// Signal name that stops it (`SIGTERM`), overriding the image's.
    pub stop_signal: Option<String>,
}

/// State of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContainerState {
    /// Recorded, not started.
    Created,
    /// Its first process runs.
    Running {
        /// Nanoseconds since the epoch.
        started_at_ns: i64,
        /// Process id in the agent's PID namespace.
        pid: i32,
    },
    /// It ended, and this is how.
    Exited {
        /// Nanoseconds since the epoch; 0 when it never started.
        started_at_ns: i64,
        /// Nanoseconds since the epoch.
        finished_at_ns: i64,
        /// Exit code.
        exit_code: i32,
        /// Signal that killed it.
        signal: Option<i32>,
        /// `Completed`, `Error`, `OOMKilled`, `StartError`, `ContainerStatusUnknown`.
        reason: String,
        /// More words for people.
        message: String,
    },
}

/// A container as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// Its id.
    pub id: ContainerId,
    /// Its sandbox.
    pub sandbox_id: SandboxId,
    /// What it was asked to be.
    pub config: ContainerConfig,
    /// State.
    pub state: ContainerState,
    /// Nanoseconds since the epoch.
    pub created_at_ns: i64,
    /// The image's id (config digest).
    pub image_id: ImageId,
    /// What users see as imageID: a repo digest, or the config digest.
    pub image_ref: String,
    /// Absolute path of the log.
    pub log_path: PathBuf,
    /// uid, gid and groups of the first process as resolved.
    pub user: Option<(u32, u32, Vec<u32>)>,
    /// Resources in force.
    pub resources: Resources,
}

/// News from the engine. Delivery may lag and drop (broadcast); on `Lagged` re-read by listing.
#[derive(Debug, Clone)]
pub enum RuntimeEvent {
    /// Something about this sandbox or one of its containers changed: look again.
    Changed {
        /// Pod UID.
        pod_uid: String,
        /// Sandbox.
        sandbox: SandboxId,
        /// Container, when one changed.
        container: Option<ContainerId>,
        /// What happened.
        kind: RuntimeEventKind,
    },
}

/// Kinds of news.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuntimeEventKind {
    /// A sandbox became ready.
    SandboxReady,
    /// A sandbox ended or lost its shim.
    SandboxGone,
    /// A container started.
    Started,
    /// A container ended.
    Exited,
    /// A process in a container was killed for memory; the container goes on.
    Oom,
}

/// Input and output of an exec or attach session: plain pipe or pty ends, non-blocking use is
/// the caller's business (tokio `AsyncFd` / `pipe::Sender`).
#[derive(Debug)]
pub struct StreamSession {
    /// Session id for [`RuntimeService::resize_tty`] and [`RuntimeService::kill_exec`].
    pub id: String,
    /// Write end for stdin (with a tty: the master side).
    pub stdin: Option<std::os::fd::OwnedFd>,
    /// Read end of stdout (with a tty: the master side).
    pub stdout: Option<std::os::fd::OwnedFd>,
    /// Read end of stderr; none with a tty.
    pub stderr: Option<std::os::fd::OwnedFd>,
    /// Resolves with the exit code when the process ended; for attach when the container ended.
    pub exit: tokio::sync::oneshot::Receiver<i32>,
}

/// What to run in a container.
#[derive(Debug, Clone, Default)]
pub struct ExecRequest {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Terminal.
    pub tty: bool,
    /// Connect stdin.
    pub stdin: bool,
    /// Connect stdout.
    pub stdout: bool,
    /// Connect stderr.
    pub stderr: bool,
}

/// What a finished exec produced.
#[derive(Debug, Clone, Default)]
pub struct ExecOutput {
    /// Exit code.
    pub exit_code: i32,
    /// Output, cut at the limit given.
    pub stdout: Vec<u8>,
    /// Error output, cut likewise.
    pub stderr: Vec<u8>,
}

/// Usage of one cgroup.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CgroupStats {
    /// When it was read, nanoseconds since the epoch.
    pub time_ns: i64,
    /// CPU time used, nanoseconds.
    pub cpu_usage_ns: u64,
    /// Memory in use, page cache included.
    pub memory_usage_bytes: u64,
    /// Usage less inactive file cache.
    pub memory_working_set_bytes: u64,
    /// Anonymous memory.
    pub memory_rss_bytes: u64,
    /// Page faults.
    pub page_faults: u64,
    /// Major page faults.
    pub major_page_faults: u64,
    /// Limit in force, none without one.
    pub memory_limit_bytes: Option<u64>,
    /// Inactive file cache.
    pub memory_inactive_file_bytes: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Swap in use.
    pub swap_usage_bytes: u64,
    /// Swap that may be used, none without a limit.
    pub swap_limit_bytes: Option<u64>,
    /// Standing still for want of CPU, memory and IO, where the kernel tells (cgroup v2).
    pub pressure: Option<[Pressure; 3]>,
}

/// Where a container is on the node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContainerPlace {
    /// Its cgroup below the cgroup root.
    pub cgroup: String,
    /// Directories with what it wrote to its own root filesystem.
    pub writable: Vec<PathBuf>,
}

/// Why the engine refused. The class decides retry and the reason users see.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct RuntimeError {
    /// Class.
    pub kind: RuntimeErrorKind,
    /// One sentence, the whole cause chain included.
    pub message: String,
}

/// Classes of engine errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuntimeErrorKind {
    /// No such sandbox, container or image.
    NotFound,
    /// The request can never work as it is (names the field).
    Invalid,
    /// The entrypoint could not be started (`StartError`, 127/126/128); the container is recorded
    /// as exited.
    StartFailed,
    /// The network plugin refused or is missing.
    Network,
    /// A registry refused, or the image does not exist there.
    ImagePull,
    /// Wrong container state for this.
    Conflict,
    /// The deadline passed.
    Timeout,
    /// Kernel or disk refused.
    System,
}

/// Result of an engine call.
pub type Result<T> = std::result::Result<T, RuntimeError>;

/// Sandboxes and containers.
pub trait RuntimeService: Send + Sync + 'static {
    /// Makes the sandbox: record, shim, namespaces, network. On failure everything made is undone
    /// (or owed and finished later).
    fn run_sandbox(
        &self,
        config: SandboxConfig,
    ) -> impl Future<Output = Result<SandboxStatus>> + Send;
    /// Stops its containers, releases its network. Idempotent.
    fn stop_sandbox(&self, id: &SandboxId) -> impl Future<Output = Result<()>> + Send;
    /// Stops and forgets it with its containers, files and records. Idempotent.
    fn remove_sandbox(&self, id: &SandboxId) -> impl Future<Output = Result<()>> + Send;
    /// All sandboxes known (from memory, cheap).
    fn list_sandboxes(&self) -> Vec<SandboxStatus>;
    /// The sandboxes of one pod (from memory, cheap). Asked often: an implementation that holds
    /// many pods should not copy all of them.
    fn list_pod_sandboxes(&self, pod_uid: &str) -> Vec<SandboxStatus> {
        let mut all = self.list_sandboxes();
        all.retain(|s| s.config.uid == pod_uid);
        all
    }
    /// Records a container, prepares its writable layer and cgroup.
    fn create_container(
        &self,
        sandbox: &SandboxId,
        config: ContainerConfig,
    ) -> impl Future<Output = Result<ContainerId>> + Send;
    /// Starts a created container.
    fn start_container(&self, id: &ContainerId) -> impl Future<Output = Result<()>> + Send;
    /// Stop signal, then SIGKILL after `grace`. Returns when it has exited. A later call with a
    /// shorter grace shortens the wait of the first.
    fn stop_container(
        &self,
        id: &ContainerId,
        grace: Duration,
    ) -> impl Future<Output = Result<()>> + Send;
    /// Kills if need be, then removes record, writable layer and cgroup. The log stays.
    fn remove_container(&self, id: &ContainerId) -> impl Future<Output = Result<()>> + Send;
    /// All containers known (from memory, cheap), optionally of one sandbox.
    fn list_containers(&self, sandbox: Option<&SandboxId>) -> Vec<ContainerStatus>;
    /// One container.
    fn container_status(&self, id: &ContainerId) -> Option<ContainerStatus>;
    /// Changes limits of a live container.
    fn update_resources(
        &self,
        id: &ContainerId,
        resources: Resources,
    ) -> impl Future<Output = Result<()>> + Send;
    /// Starts a process in a running container.
    fn exec(
        &self,
        id: &ContainerId,
        request: ExecRequest,
    ) -> impl Future<Output = Result<StreamSession>> + Send;
    /// Runs a command to its end; at `timeout` kills all it started and returns
    /// [`RuntimeErrorKind::Timeout`]. Output beyond `limit` bytes is read and dropped.
    fn exec_sync(
        &self,
        id: &ContainerId,
        command: Vec<String>,
        timeout: Duration,
        limit: usize,
    ) -> impl Future<Output = Result<ExecOutput>> + Send;
    /// Kills an exec session.
    fn kill_exec(&self, session: &str) -> impl Future<Output = Result<()>> + Send;
    /// Connects to the running container's own streams.
    fn attach(
        &self,
        id: &ContainerId,
        stdin: bool,
    ) -> impl Future<Output = Result<StreamSession>> + Send;
    /// Sets a terminal's size (session id, or container id for attach).
    fn resize_tty(
        &self,
        session: &str,
        width: u16,
        height: u16,
    ) -> impl Future<Output = Result<()>> + Send;
    /// Connects to a TCP port on the loopback of a sandbox's network, IPv4 before IPv6 (with the
    /// node's network: on the node's). Refused with [`RuntimeErrorKind::Network`].
    fn connect(
        &self,
        sandbox: &SandboxId,
        port: u16,
    ) -> impl Future<Output = Result<tokio::net::TcpStream>> + Send;
    /// Makes (or updates) a cgroup below the root, e.g. the QoS tree and pod cgroups.
    fn ensure_cgroup(&self, path: &str, resources: &Resources) -> Result<()>;
    /// CPU quota, period and memory limit of a cgroup as the kernel has them, `-1` for unlimited;
    /// none when it does not exist.
    fn cgroup_limits(&self, path: &str) -> Option<Resources>;
    /// Kills what is in it and removes it with its children. Idempotent.
    fn remove_cgroup(&self, path: &str) -> impl Future<Output = Result<()>> + Send;
    /// Names of child cgroups (`pod<uid>` below a QoS class), for orphan clean-up.
    fn list_cgroups(&self, path: &str) -> Vec<String>;
    /// Usage of a cgroup below the root, or of a container.
    fn cgroup_stats(&self, path: &str) -> Option<CgroupStats>;
    /// Usage of a container.
    fn container_stats(&self, id: &ContainerId) -> Option<CgroupStats>;
    /// Counters and limits of a cgroup below the root that only thorough readers ask for.
    fn cgroup_details(&self, _path: &str) -> Option<CgroupDetails> {
        None
    }
    /// Where a container is; none when it is unknown.
    fn container_place(&self, _id: &ContainerId) -> Option<ContainerPlace> {
        None
    }
    /// News from now on.
    fn events(&self) -> tokio::sync::broadcast::Receiver<RuntimeEvent>;
    /// Whether the network is ready; else why not (for the Node's Ready condition).
    fn network_ready(&self) -> std::result::Result<(), String>;
    /// Tells the pod CIDRs once the Node has them (for plugins that need it).
    fn set_pod_cidrs(&self, cidrs: &[String]);
}
