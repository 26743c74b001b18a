//! What the shim knows of a container and of an exec session.
//!
//! ```text
//!  Starting ──ready, socket closed──▶ Running ──reaped──▶ Draining ──streams ended──▶ Exited
//!     └──failed or died before it executed──▶ (forgotten, the launch gets an error)
//! ```

use crate::cgroup::OomWatch;
use crate::output::{Output, Sink};
use linux::process::pidfd::WaitOutcome;
use pod_shim::protocol::{ContainerState, ExitRecord, PidNamespace, ShimError};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// A client's request that is answered later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReplyTo {
    /// The client's token.
    pub(crate) client: u64,
    /// The id of its request.
    pub(crate) request: u64,
}

/// A child that has not executed its program yet.
#[derive(Debug)]
pub(crate) struct Starting {
    /// Where its notes come in.
    pub(crate) notes: OwnedFd,
    /// Token of `notes`.
    pub(crate) token: u64,
    /// It said that all is set up.
    pub(crate) ready: bool,
    /// It said why it cannot start.
    pub(crate) failure: Option<ShimError>,
    /// Who waits.
    pub(crate) waiting: Vec<ReplyTo>,
}

/// Where a container is in its life.
#[derive(Debug)]
pub(crate) enum Phase {
    /// The child sets itself up.
    Starting(Starting),
    /// The user's program runs.
    Running,
    /// The first process is gone; its output is still being read.
    Draining(WaitOutcome),
    /// All is over and on disk.
    Exited(ExitRecord),
}

/// One container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) state_dir: PathBuf,
    pub(crate) pid_namespace: PidNamespace,
    pub(crate) cgroups: Vec<PathBuf>,
    pub(crate) cgroup_namespace: bool,
    /// Whether it lives in the pod's user namespace.
    pub(crate) user_namespace: bool,
    pub(crate) started_at_ns: i64,
    pub(crate) tty: bool,
    pub(crate) want_stdin: bool,
    pub(crate) stdin_once: bool,
    /// The only client's input ended; stdin is closed when the rest is written.
    pub(crate) stdin_closing: bool,
    pub(crate) phase: Phase,
    pub(crate) output: Output,
    /// The container's stdin, kept open for attach.
    pub(crate) stdin: Option<Sink>,
    pub(crate) oom: Option<(OomWatch, Option<u64>)>,
}

impl Container {
    /// What clients are told.
    pub(crate) fn state(&self) -> ContainerState {
        ContainerState {
            container_id: self.id.clone(),
            pid: self.pid,
            started_at_ns: self.started_at_ns,
            exit: match &self.phase {
                Phase::Exited(record) => Some(record.clone()),
                Phase::Starting(_) | Phase::Running | Phase::Draining(_) => None,
            },
        }
    }

    /// Whether its first process has not been reaped.
    pub(crate) fn is_live(&self) -> bool {
        match self.phase {
            Phase::Starting(_) | Phase::Running => true,
            Phase::Draining(_) | Phase::Exited(_) => false,
        }
    }

    /// Whether its child still sets itself up.
    pub(crate) fn is_starting(&self) -> bool {
        match self.phase {
            Phase::Starting(_) => true,
            Phase::Running | Phase::Draining(_) | Phase::Exited(_) => false,
        }
    }

    /// Whether the user's program runs.
    pub(crate) fn is_running(&self) -> bool {
        match self.phase {
            Phase::Running => true,
            Phase::Starting(_) | Phase::Draining(_) | Phase::Exited(_) => false,
        }
    }
}

/// One exec session.
#[derive(Debug)]
pub(crate) struct ExecSession {
    pub(crate) container_id: String,
    /// Who asked for it; when he is gone, nobody can hear of it and it is killed.
    pub(crate) client: u64,
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    /// None once the program runs.
    pub(crate) starting: Option<Starting>,
    /// The master side of its terminal.
    pub(crate) terminal: Option<OwnedFd>,
    /// A cgroup below the container's that holds the session and all it starts.
    pub(crate) cgroup: Option<PathBuf>,
}
