//! Sandboxes as they are asked for and as they are.

use super::{DnsConfig, NamespaceMode, PortMapping, SandboxId, UserNamespace};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

/// What a sandbox shall be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxConfig {
    /// Pod name.
    pub name: String,
    /// Pod namespace.
    pub namespace: String,
    /// Pod UID.
    pub uid: String,
    /// How many sandboxes this pod had before.
    pub attempt: u32,
    /// Host name inside the pod.
    pub hostname: String,
    /// resolv.conf; none leaves the file to the caller's mounts.
    pub dns: Option<DnsConfig>,
    /// Directory for container logs.
    pub log_directory: PathBuf,
    /// Host ports.
    pub port_mappings: Vec<PortMapping>,
    /// Labels, kept and returned.
    pub labels: BTreeMap<String, String>,
    /// Annotations, kept and returned.
    pub annotations: BTreeMap<String, String>,
    /// Cgroup of the pod below the cgroup root, `/kubepods/burstable/pod<uid>`. Made by the
    /// kubelet through [`RuntimeService::ensure_cgroup`].
    pub cgroup_parent: String,
    /// Namespaced sysctls.
    pub sysctls: BTreeMap<String, String>,
    /// `Pod` or `Node`.
    pub network: NamespaceMode,
    /// `Pod`, `Container` or `Node`.
    pub pid: NamespaceMode,
    /// `Pod` or `Node`.
    pub ipc: NamespaceMode,
    /// RuntimeClass handler; the empty one and `ferrule` are ours, others fail.
    pub runtime_handler: String,
    /// Ids of a user namespace of its own; none for the node's users.
    #[serde(default)]
    pub user_namespace: Option<UserNamespace>,
}

/// State of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SandboxState {
    /// Its namespaces exist and its shim answers.
    Ready,
    /// Stopped, half made, or its shim is gone.
    NotReady,
}

/// A sandbox as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxStatus {
    /// Its id.
    pub id: SandboxId,
    /// What it was asked to be.
    pub config: SandboxConfig,
    /// State.
    pub state: SandboxState,
    /// Nanoseconds since the epoch.
    pub created_at_ns: i64,
    /// Addresses, first is primary; empty with the node's network.
    pub ips: Vec<IpAddr>,
    /// Process id of the shim, 0 when gone.
    pub shim_pid: i32,
    /// Pinned network namespace.
    pub netns: Option<PathBuf>,
}
