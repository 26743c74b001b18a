//! Resources that change while a pod runs (KEP-1287, KEP-5419).
//!
//! ```text
//!  spec changes        manager: allocation       worker: actuation
//!  ─────────────▶  fits? ──yes─▶ record, grant ─▶ cgroups ─▶ status
//!                    └──no──▶ PodResizePending, asked again when room appears
//! ```
//! What is granted is the *allocation* ([`allocation`]): recorded on disk before anybody acts on
//! it, and the only resources the rest of the agent ever sees, because a worker gets its pod with
//! the allocated resources written into the spec. [`queue`] orders the requests that wait,
//! [`actuate`] plans the changes of cgroups, [`tracker`] is what a worker remembers, [`words`]
//! are the events.

pub mod actuate;
pub mod allocation;
pub mod execute;
pub mod queue;
pub mod tracker;
pub mod words;

/// `status.conditions[].type` of a request that is not granted yet.
pub const PENDING: &str = "PodResizePending";
/// `status.conditions[].type` of a granted request that is being carried out.
pub const IN_PROGRESS: &str = "PodResizeInProgress";

/// A request that cannot be granted now, or never.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingResize {
    /// Never on this node (`Infeasible`), else `Deferred`.
    pub infeasible: bool,
    /// Why.
    pub message: String,
    /// Generation of the pod that asked.
    pub generation: i64,
}

impl PendingResize {
    /// The condition's reason.
    pub fn reason(&self) -> &'static str {
        if self.infeasible {
            "Infeasible"
        } else {
            "Deferred"
        }
    }
}

/// What the manager tells a worker about requests for other resources.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ResizeNews {
    /// The request that waits, if one does.
    pub pending: Option<PendingResize>,
    /// Generation of the pod whose request was granted last by this agent.
    pub granted: Option<i64>,
}

/// A granted request that is being carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Generation of the pod that asked.
    pub generation: i64,
    /// Why it did not work so far.
    pub error: Option<String>,
}
