//! What is known of a sandbox, on disk and in memory, and the states it goes through.
//!
//! ```text
//! Creating ─▶ Ready ─▶ Stopping ─▶ Stopped ─▶ Removing ─▶ (gone)
//!     └──────────┴──────────────────────┴────────▲
//! ```
//! States only ever move right. `Creating`, `Stopping` and `Removing` are half-done: whoever
//! finds one after a restart finishes it.

use crate::service::{NamespaceMode, SandboxConfig, SandboxId, SandboxState, SandboxStatus};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::path::PathBuf;

/// Version of the record's form.
pub const RECORD_VERSION: u32 = 1;

/// How far a sandbox's life is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Being made; nothing of it is used by anybody yet.
    Creating,
    /// Made.
    Ready,
    /// Its end has begun.
    Stopping,
    /// Nothing of it runs and its network is released.
    Stopped,
    /// Its files are being deleted.
    Removing,
}

impl Phase {
    /// Whether a step from here to there is one of the drawing's.
    #[must_use]
    pub fn may_become(self, next: Self) -> bool {
        next > self && (next != Self::Stopped || self == Self::Stopping)
    }
}

/// The process of a sandbox's shim, so that its number alone is never trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimProcess {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since boot (proc_pid_stat(5), field 22).
    pub start_time: u64,
}

/// A sandbox's record, `<root>/sandboxes/<id>/sandbox.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxRecord {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// Its id.
    pub id: SandboxId,
    /// How far it is.
    pub phase: Phase,
    /// What was asked.
    pub config: SandboxConfig,
    /// Nanoseconds since the epoch.
    pub created_at_ns: i64,
    /// Boot it belongs to; after another boot nothing of it can live.
    pub boot_id: String,
    /// Addresses.
    pub ips: Vec<IpAddr>,
    /// Pinned network namespace; none with the node's network.
    pub netns: Option<PathBuf>,
    /// An ADD was begun and no DEL has succeeded since.
    pub network_owed: bool,
    /// Its shim; none before it answered.
    pub shim: Option<ShimProcess>,
}

impl SandboxRecord {
    /// Whether it has a network of its own.
    #[must_use]
    pub fn has_network(&self) -> bool {
        match self.config.network {
            NamespaceMode::Pod => true,
            NamespaceMode::Node | NamespaceMode::Container | NamespaceMode::Target(_) => false,
        }
    }

    /// What callers see. `shim_alive` is the shim's connection.
    #[must_use]
    pub fn status(&self, shim_alive: bool) -> SandboxStatus {
        let ready = self.phase == Phase::Ready && shim_alive;
        SandboxStatus {
            id: self.id.clone(),
            config: self.config.clone(),
            state: if ready {
                SandboxState::Ready
            } else {
                SandboxState::NotReady
            },
            created_at_ns: self.created_at_ns,
            ips: self.ips.clone(),
            shim_pid: match (shim_alive, self.shim) {
                (true, Some(shim)) => shim.pid,
                (true, None) | (false, Some(_) | None) => 0,
            },
            netns: self.netns.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Phase::{self, Creating, Ready, Removing, Stopped, Stopping};

    const ALL: [Phase; 5] = [Creating, Ready, Stopping, Stopped, Removing];

    #[test]
    fn a_sandbox_never_goes_back_and_stops_before_it_is_stopped() {
        for from in ALL {
            for to in ALL {
                let back = to <= from;
                let skips = to == Stopped && from != Stopping;
                assert_eq!(from.may_become(to), !back && !skips, "{from:?} {to:?}");
            }
        }
    }
}
