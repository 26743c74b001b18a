//! What is known of a container, on disk and in memory, and the states it goes through.
//!
//! ```text
//! Creating ─▶ Created ─▶ Running ─▶ Exited ─▶ Removing ─▶ (gone)
//!     └──────────┴──────────────────────▲────────▲
//! ```
//! The record on disk says `Creating`, `Created`, `Exited` or `Removing`. That a container runs,
//! and since when, is known to its shim; how it ended is in the shim's `exit.json`. So a start
//! costs no write here, and there is one truth for each fact.

use crate::service::{
    ContainerConfig, ContainerId, ContainerState, ContainerStatus, ImageId, Resources, SandboxId,
};
use pod_shim::protocol::{ExitRecord, LaunchSpec};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Version of the record's form.
pub const RECORD_VERSION: u32 = 1;

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Nanoseconds since the epoch; 0 when it never started.
    pub started_at_ns: i64,
    /// Nanoseconds since the epoch.
    pub finished_at_ns: i64,
    /// Exit code.
    pub exit_code: i32,
    /// Signal that killed it.
    pub signal: Option<i32>,
    /// One word for the API.
    pub reason: String,
    /// For people.
    pub message: String,
}

impl Exit {
    /// From what the shim saw.
    #[must_use]
    pub fn from_record(record: &ExitRecord) -> Self {
        let reason = match (record.oom_killed, record.exit_code) {
            (true, _) => "OOMKilled",
            (false, 0) => "Completed",
            (false, _) => "Error",
        };
        Self {
            started_at_ns: record.started_at_ns,
            finished_at_ns: record.finished_at_ns,
            exit_code: record.exit_code,
            signal: record.signal,
            reason: reason.to_owned(),
            message: String::new(),
        }
    }

    /// Of a container whose shim went without leaving word. `killed` says that we ended it.
    #[must_use]
    pub fn unknown(started_at_ns: i64, now_ns: i64, killed: bool) -> Self {
        let (reason, message) = if killed {
            ("Error", "")
        } else {
            (
                "ContainerStatusUnknown",
                "the container's shim ended before it could record the exit",
            )
        };
        Self {
            started_at_ns,
            finished_at_ns: now_ns,
            exit_code: 137,
            signal: None,
            reason: reason.to_owned(),
            message: message.to_owned(),
        }
    }

    /// Of a container that could not be started, whatever for: the code people know from the
    /// stock runtime.
    #[must_use]
    pub fn start_error(now_ns: i64, message: &str) -> Self {
        Self {
            started_at_ns: 0,
            finished_at_ns: now_ns,
            exit_code: 128,
            signal: None,
            reason: "StartError".to_owned(),
            message: message.to_owned(),
        }
    }
}

/// How far a container's life is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Being made.
    Creating,
    /// Made, not started.
    Created,
    /// Its first process runs (never on disk).
    Running {
        /// Nanoseconds since the epoch.
        started_at_ns: i64,
        /// Process id.
        pid: i32,
    },
    /// It ended.
    Exited(Exit),
    /// Its files are being deleted; how it had ended, if it had.
    Removing(Option<Exit>),
}

impl Phase {
    fn rank(&self) -> u8 {
        match self {
            Self::Creating => 0,
            Self::Created => 1,
            Self::Running { .. } => 2,
            Self::Exited(_) => 3,
            Self::Removing(_) => 4,
        }
    }

    /// Whether a step from here to there is one of the drawing's.
    #[must_use]
    pub fn may_become(&self, next: &Self) -> bool {
        match self {
            Self::Creating => matches!(next, Self::Created | Self::Removing(_)),
            Self::Created | Self::Running { .. } | Self::Exited(_) | Self::Removing(_) => {
                next.rank() > self.rank()
            }
        }
    }
}

/// A container's record, `<root>/containers/<id>/container.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// Its id.
    pub id: ContainerId,
    /// Its sandbox.
    pub sandbox_id: SandboxId,
    /// How far it is.
    pub phase: Phase,
    /// What was asked.
    pub config: ContainerConfig,
    /// Nanoseconds since the epoch.
    pub created_at_ns: i64,
    /// The image.
    pub image_id: ImageId,
    /// The image as users see it.
    pub image_ref: String,
    /// Absolute path of the log.
    pub log_path: PathBuf,
    /// uid, gid, groups.
    pub user: Option<(u32, u32, Vec<u32>)>,
    /// Limits in force.
    pub resources: Resources,
    /// Its cgroup below the root.
    pub cgroup: String,
    /// Signal that asks it to stop.
    pub stop_signal: i32,
    /// How it is launched, but for its seccomp program, which is compiled when needed.
    pub launch: LaunchSpec,
}

impl ContainerRecord {
    /// What callers see.
    #[must_use]
    pub fn status(&self) -> ContainerStatus {
        let state = match &self.phase {
            Phase::Creating | Phase::Created | Phase::Removing(None) => ContainerState::Created,
            Phase::Running { started_at_ns, pid } => ContainerState::Running {
                started_at_ns: *started_at_ns,
                pid: *pid,
            },
            Phase::Exited(exit) | Phase::Removing(Some(exit)) => ContainerState::Exited {
                started_at_ns: exit.started_at_ns,
                finished_at_ns: exit.finished_at_ns,
                exit_code: exit.exit_code,
                signal: exit.signal,
                reason: exit.reason.clone(),
                message: exit.message.clone(),
            },
        };
        ContainerStatus {
            id: self.id.clone(),
            sandbox_id: self.sandbox_id.clone(),
            config: self.config.clone(),
            state,
            created_at_ns: self.created_at_ns,
            image_id: self.image_id.clone(),
            image_ref: self.image_ref.clone(),
            log_path: self.log_path.clone(),
            user: self.user.clone(),
            resources: self.resources.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phases() -> Vec<Phase> {
        vec![
            Phase::Creating,
            Phase::Created,
            Phase::Running {
                started_at_ns: 1,
                pid: 2,
            },
            Phase::Exited(Exit::unknown(1, 2, true)),
            Phase::Removing(None),
        ]
    }

    #[test]
    fn a_container_never_goes_back() {
        for (i, from) in phases().iter().enumerate() {
            for to in phases().iter().take(i + 1) {
                assert!(!from.may_become(to), "{from:?} -> {to:?}");
            }
        }
    }

    #[test]
    fn a_half_made_container_can_only_be_finished_or_removed() {
        let allowed: Vec<bool> = phases()
            .iter()
            .map(|to| Phase::Creating.may_become(to))
            .collect();
        assert_eq!(allowed, [false, true, false, false, true]);
    }

    #[test]
    fn reasons_follow_from_the_exit_record() {
        let mut record = ExitRecord {
            exit_code: 0,
            signal: None,
            oom_killed: false,
            finished_at_ns: 2,
            started_at_ns: 1,
        };
        assert_eq!(Exit::from_record(&record).reason, "Completed");
        record.exit_code = 3;
        assert_eq!(Exit::from_record(&record).reason, "Error");
        record.oom_killed = true;
        assert_eq!(Exit::from_record(&record).reason, "OOMKilled");
    }
}
