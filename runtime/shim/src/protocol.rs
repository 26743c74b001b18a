//! The wire between the agent and a `pod-shim`, and the launch specification of a container.
//!
//! Frames are a 4-byte little-endian length followed by that many bytes of JSON; at most
//! [`MAX_FRAME_BYTES`]. File descriptors travel by `SCM_RIGHTS` with the first byte of the
//! frame they belong to. Every request carries an id chosen by the client; its [`Reply`] echoes
//! it. Events carry no id and go to every connected client. On connect the shim first sends a
//! [`FromShim::Snapshot`], so that an agent that comes back learns all that happened without it.
//!
//! The protocol is versioned ([`PROTOCOL_VERSION`]) because shims outlive the agent: a newer
//! agent must understand every older version still running. Fields are only ever added, with
//! a serde default.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Version of this protocol, in every snapshot.
///
/// | version | since then a shim also understands |
/// |---|---|
/// | 1 | |
/// | 2 | `user_namespace` of a sandbox, `map_ids` and `Layers` of a mount |
pub const PROTOCOL_VERSION: u32 = 2;

/// Largest accepted frame. A launch spec with hundreds of variables and mounts stays far below.
pub const MAX_FRAME_BYTES: usize = 4 << 20;

/// A message from the agent to the shim.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ToShim {
    /// Chosen by the client, echoed in the reply.
    pub id: u64,
    /// What to do.
    pub request: Request,
}

/// What an agent may ask of a shim.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Make the pod's namespaces. First request of a new shim; repeated, it returns the same.
    Setup(SandboxSpec),
    /// Launch a container. Idempotent by container id: a second launch of a known id replies
    /// with its state.
    Launch(Box<LaunchSpec>),
    /// Send a signal to a container's init process (or, with `all`, to every process in it).
    Signal {
        /// The container.
        container_id: String,
        /// Signal number.
        signal: i32,
        /// Every process of the container, through its cgroup, instead of its first process.
        all: bool,
    },
    /// Run one more process in a running container. Up to three descriptors accompany the frame
    /// in the order stdin, stdout, stderr as `stdio` says; with `tty` none is sent and the reply
    /// carries the terminal's master side.
    Exec(Box<ExecSpec>),
    /// Kill an exec session with everything it started.
    ExecKill {
        /// As given in [`ExecSpec::exec_id`].
        exec_id: String,
    },
    /// Change the window size of a container's or exec session's terminal.
    Resize {
        /// A container id or an exec id.
        target: String,
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
    /// Write a new size and number limit for logs, or re-open them after an outside rotation.
    ReopenLog {
        /// The container.
        container_id: String,
    },
    /// Forget an exited container (its record on disk is the agent's to remove).
    Forget {
        /// The container.
        container_id: String,
    },
    /// Attach to a running container's stdio. The frame carries descriptors as `stdio` says:
    /// stdin is copied into the container's stdin (when it has one), stdout and stderr receive a
    /// copy of the output from now on. With a tty, everything comes through stdout.
    Attach {
        /// The container.
        container_id: String,
        /// Which descriptors accompany the frame.
        stdio: Stdio,
    },
    /// Unpin the namespaces, kill what still runs and exit.
    Shutdown,
}

impl Request {
    /// The first version that understands all of it. An older shim would refuse it, or leave out
    /// what it does not know.
    #[must_use]
    pub fn since(&self) -> u32 {
        let newer = match self {
            Self::Setup(sandbox) => sandbox.user_namespace.is_some(),
            Self::Launch(launch) => launch
                .mounts
                .iter()
                .any(|mount| mount.map_ids || matches!(mount.source, MountSource::Layers { .. })),
            Self::Signal { .. }
            | Self::Exec(_)
            | Self::ExecKill { .. }
            | Self::Resize { .. }
            | Self::ReopenLog { .. }
            | Self::Forget { .. }
            | Self::Attach { .. }
            | Self::Shutdown => false,
        };
        if newer { 2 } else { 1 }
    }
}

/// Which of the three standard streams are connected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stdio {
    /// stdin is connected.
    pub stdin: bool,
    /// stdout is connected.
    pub stdout: bool,
    /// stderr is connected.
    pub stderr: bool,
}

/// A message from the shim to an agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromShim {
    /// First message on every connection.
    Snapshot(Snapshot),
    /// The answer to one request.
    Reply {
        /// The request's id.
        id: u64,
        /// Its outcome.
        result: Result<Reply, ShimError>,
    },
    /// Something happened.
    Event(Event),
}

/// Answers to requests.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done, nothing to say.
    Done,
    /// Namespaces exist.
    Ready {
        /// Process id of the shim itself, in the agent's PID namespace.
        shim_pid: i32,
        /// Where the network namespace is pinned; none with the host's network.
        netns: Option<PathBuf>,
    },
    /// A container runs.
    Started(ContainerState),
    /// An exec session runs; with a tty one descriptor accompanies the frame.
    ExecStarted {
        /// Process id in the agent's PID namespace.
        pid: i32,
    },
}

/// Why a request failed. `kind` decides what the agent does and which words the user sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimError {
    /// The class of the failure.
    pub kind: ShimErrorKind,
    /// One sentence that names the operation and the object.
    pub message: String,
    /// errno, when the kernel refused.
    pub errno: Option<i32>,
}

/// Classes of shim failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShimErrorKind {
    /// The entrypoint does not exist or is no program (stock: exit code 127 / 128, `StartError`).
    CommandNotFound,
    /// The entrypoint may not be executed (126).
    CommandNotExecutable,
    /// Working directory, user, mount source or another part of the request is unusable.
    BadRequest,
    /// No such container or exec session.
    NotFound,
    /// The kernel refused an operation.
    System,
}

/// All the shim knows, sent first on every connection.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Snapshot {
    /// [`PROTOCOL_VERSION`] of the shim.
    pub version: u32,
    /// The sandbox it was set up for; none before [`Request::Setup`].
    pub sandbox_id: Option<String>,
    /// Process id of the shim.
    pub shim_pid: i32,
    /// Where the network namespace is pinned.
    pub netns: Option<PathBuf>,
    /// Every container it launched and was not told to forget.
    pub containers: Vec<ContainerState>,
}

/// State of one container as the shim sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerState {
    /// Its id.
    pub container_id: String,
    /// Process id of its first process in the agent's PID namespace.
    pub pid: i32,
    /// Nanoseconds since the epoch when it started to execute.
    pub started_at_ns: i64,
    /// Set once it exited.
    pub exit: Option<ExitRecord>,
}

/// How a container ended. Written to `<container dir>/exit.json` before anybody is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Exit code, 128 + signal when it was killed by a signal.
    pub exit_code: i32,
    /// The signal that killed it, if one did.
    pub signal: Option<i32>,
    /// The kernel killed a process of it for memory.
    pub oom_killed: bool,
    /// Nanoseconds since the epoch.
    pub finished_at_ns: i64,
    /// When it had started, nanoseconds since the epoch.
    pub started_at_ns: i64,
}

/// Unsolicited news.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// A container's first process is gone and its exit record is on disk; its log is complete.
    Exited {
        /// The container.
        container_id: String,
        /// How it ended.
        exit: ExitRecord,
    },
    /// A process in the container was killed for memory, the first process goes on.
    Oom {
        /// The container.
        container_id: String,
    },
    /// An exec session ended.
    ExecExited {
        /// As given in [`ExecSpec::exec_id`].
        exec_id: String,
        /// Exit code, 128 + signal when killed.
        exit_code: i32,
    },
}

/// A pod's namespaces.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// The sandbox's id.
    pub sandbox_id: String,
    /// Use the agent's network namespace instead of a new one.
    pub host_network: bool,
    /// Use the agent's IPC namespace.
    pub host_ipc: bool,
    /// One PID namespace for all containers, with the shim's helper as PID 1.
    pub share_pid: bool,
    /// Where to pin the new network namespace (a file path, made by the shim).
    pub netns_path: Option<PathBuf>,
    /// Host name, set in a new UTS namespace; with the host's network the host's stays.
    pub hostname: Option<String>,
    /// NIS domain name (setdomainname), normally none.
    pub domainname: Option<String>,
    /// Namespaced sysctls, `net.core.somaxconn` → `1024`, written inside the new namespaces.
    pub sysctls: BTreeMap<String, String>,
    /// oom_score_adj of the shim itself; refusal is only logged.
    pub shim_oom_score_adj: Option<i32>,
    /// Cgroup directories (one per v1 hierarchy, or one on v2) the PID-1 helper joins.
    pub helper_cgroups: Vec<PathBuf>,
    /// Ids of a user namespace that owns the pod's other namespaces; none for the agent's users.
    #[serde(default)]
    pub user_namespace: Option<UserNamespace>,
}

/// Ids of a user namespace: 0 and up inside are `first` and up on the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNamespace {
    /// First id on the node.
    pub first: u32,
    /// How many.
    pub length: u32,
}

/// Everything needed to start a container: resolved, no defaults left.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LaunchSpec {
    /// The container's id.
    pub container_id: String,
    /// Directory for `exit.json`.
    pub state_dir: PathBuf,
    /// What to run, and as whom.
    pub process: ProcessSpec,
    /// Its root filesystem.
    pub rootfs: RootfsSpec,
    /// Mounts in order, after the root filesystem.
    pub mounts: Vec<MountSpec>,
    /// Device nodes to make in `/dev`.
    pub devices: Vec<DeviceSpec>,
    /// Paths that are hidden (`/proc/kcore`, …); missing ones are skipped.
    pub masked_paths: Vec<String>,
    /// Paths that are made read-only; missing ones are skipped.
    pub readonly_paths: Vec<String>,
    /// Which PID namespace it lives in.
    pub pid_namespace: PidNamespace,
    /// Cgroup directories, one per v1 hierarchy or one on v2. They exist already.
    pub cgroups: Vec<PathBuf>,
    /// Give the container a cgroup namespace of its own.
    pub cgroup_namespace: bool,
    /// Where the log goes; none discards the output.
    pub log: Option<LogSpec>,
    /// Keep a stdin pipe open for attach.
    pub stdin: bool,
    /// Close stdin after the first attach ends.
    pub stdin_once: bool,
    /// Allocate a terminal.
    pub tty: bool,
}

/// A process: the entrypoint or an exec session.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// Program and arguments; the program is looked up in the container's PATH.
    pub argv: Vec<String>,
    /// `NAME=value`, in order.
    pub env: Vec<String>,
    /// Working directory; made when missing (for the entrypoint), must be a directory.
    pub cwd: String,
    /// User id inside the container.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Capability numbers for bounding, effective, permitted (and inheritable none). With
    /// a uid other than 0 effective and permitted are dropped on exec as the kernel does.
    pub capabilities: Vec<u8>,
    /// Capability numbers kept over exec for non-root users.
    pub ambient_capabilities: Vec<u8>,
    /// PR_SET_NO_NEW_PRIVS.
    pub no_new_privileges: bool,
    /// Compiled seccomp program (array of `struct sock_filter`, little endian), base64.
    pub seccomp: Option<String>,
    /// Resource limits: (RLIMIT_* number, soft, hard).
    pub rlimits: Vec<(u32, u64, u64)>,
    /// /proc/self/oom_score_adj; refusal by the kernel is a warning.
    pub oom_score_adj: Option<i32>,
    /// umask, stock 0o022.
    pub umask: Option<u32>,
}

/// The root filesystem.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RootfsSpec {
    /// Layer directories, topmost first.
    pub lower: Vec<PathBuf>,
    /// Writable layer.
    pub upper: PathBuf,
    /// overlayfs work directory.
    pub work: PathBuf,
    /// Remount the root read-only when all is set up.
    pub readonly: bool,
    /// Extra overlayfs options (`volatile`, `userxattr`, …).
    pub options: Vec<String>,
}

/// One mount.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MountSpec {
    /// Absolute path inside the container; resolved beneath its root, made when missing.
    pub target: String,
    /// What is mounted.
    pub source: MountSource,
    /// Read-only.
    pub readonly: bool,
    /// Read-only for every mount below it too (mount_setattr AT_RECURSIVE).
    pub recursive_readonly: bool,
    /// Propagation of a bind mount.
    pub propagation: Propagation,
    /// nosuid.
    pub nosuid: bool,
    /// nodev.
    pub nodev: bool,
    /// noexec.
    pub noexec: bool,
    /// In a user namespace: show ids of a bind mount as its users do, on disk as without one.
    #[serde(default)]
    pub map_ids: bool,
}

/// What to mount.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MountSource {
    /// Recursive bind of a host path.
    Bind {
        /// Absolute host path.
        path: PathBuf,
        /// Path beneath `path`, resolved with openat2(RESOLVE_IN_ROOT), never outside it.
        /// Missing directories are made with mode 0750 (as subPath wants).
        sub_path: Option<String>,
    },
    /// A filesystem by type: proc, sysfs, tmpfs, devpts, mqueue, cgroup2, …
    Filesystem {
        /// Type.
        fstype: String,
        /// Options for the filesystem (`size=65536k`, `mode=755`).
        options: Vec<String>,
    },
    /// What these directories show together, as an overlay (of one, a bind mount): the content
    /// of an image.
    Layers {
        /// Directories of image layers, topmost first.
        lower: Vec<PathBuf>,
        /// Where changes go, and the overlayfs work directory beside it; none for a read-only
        /// mount.
        changes: Option<(PathBuf, PathBuf)>,
        /// Path in it that is mounted, followed as if the content were the root; it must exist.
        sub_path: Option<String>,
    },
    /// `/sys/fs/cgroup` as the container should see it: its own cgroup as root
    /// (cgroup2 in its namespace, or a tmpfs with one bind per v1 hierarchy).
    Cgroup,
}

/// Propagation of a bind mount (HostToContainer = slave, Bidirectional = shared).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Propagation {
    /// rprivate.
    #[default]
    Private,
    /// rslave.
    HostToContainer,
    /// rshared.
    Bidirectional,
}

/// A device node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// Path inside the container.
    pub path: String,
    /// Host path to bind (used when mknod is not possible or type unknown).
    pub host_path: Option<PathBuf>,
    /// `c` or `b`.
    pub kind: char,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// File mode bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// The PID namespace a container lives in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PidNamespace {
    /// One of its own.
    Container,
    /// The sandbox's shared one.
    Pod,
    /// The host's.
    Host,
    /// That of another container of the pod (ephemeral containers with a target).
    Target(String),
}

/// Where output is logged (CRI log format) and when it is rotated.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LogSpec {
    /// Log file.
    pub path: PathBuf,
    /// Rotate when it would grow beyond this many bytes; 0 never.
    pub max_bytes: u64,
    /// How many files to keep, the live one included (at least 2 when rotating).
    pub max_files: u32,
}

/// One more process in a running container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExecSpec {
    /// Chosen by the client, unique in the sandbox.
    pub exec_id: String,
    /// The container.
    pub container_id: String,
    /// What to run and as whom.
    pub process: ProcessSpec,
    /// Allocate a terminal; its master side comes back with the reply.
    pub tty: bool,
    /// Which descriptors accompany the frame (without tty).
    pub stdio: Stdio,
    /// Cgroup directories of the container.
    pub cgroups: Vec<PathBuf>,
}
