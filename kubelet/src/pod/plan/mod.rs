//! What to do next about one pod. Pure: no clock, no IO, no channel; the same input gives the
//! same plan.
//!
//! [`plan`] is asked again after anything changed. It looks at all there is, never at what just
//! happened, so a lost or repeated event does no harm. Actions already in flight are in
//! [`Steps`] and are not asked for twice.

mod end;
mod keep;
pub mod kill;
mod resize;
mod sync;
#[cfg(test)]
mod tests;

use crate::observe::PodObservation;
use crate::pod::resize::tracker::ResizeView;
use crate::pod::spec;
use crate::pod::state::{Cause, CrashBackoff, Health, Lifecycle, Steps, Terminating};
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use runtime::service::{ContainerId, SandboxId};
use std::collections::BTreeMap;
use std::time::Duration;

/// All a plan depends on.
#[derive(Debug, Clone, Copy)]
pub struct PlanInput<'a> {
    /// Newest desired object.
    pub pod: &'a Pod,
    /// The apiserver no longer has the pod (or never had it).
    pub gone: bool,
    /// State so far.
    pub lifecycle: &'a Lifecycle,
    /// What the runtime holds.
    pub observed: &'a PodObservation,
    /// Steps under way.
    pub steps: &'a Steps,
    /// Probe results.
    pub health: &'a Health,
    /// Restart back-off by container name.
    pub backoffs: &'a BTreeMap<String, CrashBackoff>,
    /// The node ends the pod for the sake of others.
    pub ended: Option<&'a Cause>,
    /// Seconds it has for that; none for what its spec says.
    pub ended_grace_s: Option<u64>,
    /// Cgroup limits: granted and given.
    pub resize: ResizeView<'a>,
    /// When this node first took the pod up, nanoseconds since the epoch.
    pub start_time_ns: i64,
    /// Now, nanoseconds since the epoch.
    pub now_ns: i64,
}

impl<'a> PlanInput<'a> {
    /// The pod's spec; an orphan has an empty one.
    fn spec(&self) -> Option<&'a PodSpec> {
        self.pod.spec.as_ref()
    }
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodPlan {
    /// State from now on.
    pub lifecycle: Lifecycle,
    /// Actions to start now, side by side.
    pub actions: Vec<Action>,
    /// Why containers without a process wait, by container name.
    pub waiting: BTreeMap<String, Waiting>,
    /// Look again at this time even if nothing happens, nanoseconds since the epoch.
    pub wake_at_ns: Option<i64>,
}

impl PodPlan {
    /// Brings the next look forward.
    fn wake_at(&mut self, at_ns: Option<i64>) {
        self.wake_at_ns = match (self.wake_at_ns, at_ns) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
    }
}

/// Words of a waiting container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// `CrashLoopBackOff` and the like.
    pub reason: String,
    /// For people.
    pub message: String,
}

/// Why a container is killed while its pod goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KillReason {
    /// Its pod ends.
    PodEnds,
    /// Its liveness probe failed.
    Liveness,
    /// Its startup probe failed.
    Startup,
    /// Its image changed in the spec.
    SpecChanged,
    /// Its postStart hook failed.
    PostStart,
    /// It was granted other resources and its policy wants a new start for them.
    Resize,
    /// Another container ended so that all start anew.
    RestartAll,
}

/// One thing to do. Each is idempotent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Set up volumes.
    PrepareVolumes,
    /// Make the cgroup and the sandbox.
    RunSandbox {
        /// Sandboxes before it.
        attempt: u32,
    },
    /// End a sandbox and give its network back.
    StopSandbox(SandboxId),
    /// Forget a sandbox and its containers.
    RemoveSandbox(SandboxId),
    /// Have the image of a container.
    EnsureImage {
        /// Container name.
        container: String,
    },
    /// Create and start an instance.
    StartContainer(StartContainer),
    /// Run the preStop hook of an instance that will be stopped.
    PreStop(PreStop),
    /// Stop an instance.
    KillContainer(KillContainer),
    /// Bring the pod's cgroups to what was granted.
    Resize,
    /// Forget a dead instance.
    RemoveContainer(ContainerId),
    /// Give volumes and the pod cgroup back.
    Teardown,
    /// Remove the pod's directories and logs.
    Purge,
    /// Report for the last time and confirm the deletion at the apiserver.
    Farewell,
}

/// A start: see [`Action::StartContainer`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartContainer {
    /// Container name.
    pub container: String,
    /// Sandbox to put it in.
    pub sandbox: SandboxId,
    /// Instances before it.
    pub attempt: u32,
    /// Round of the pod it begins or joins.
    pub round: u32,
    /// A half-made instance to remove first.
    pub replaces: Option<ContainerId>,
    /// When the instance before ended, if there was one: counts for the back-off.
    pub predecessor_finished_ns: Option<i64>,
}

/// A hook: see [`Action::PreStop`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreStop {
    /// Instance.
    pub id: ContainerId,
    /// Container name.
    pub container: String,
    /// When SIGKILL is due, nanoseconds since the epoch.
    pub deadline_ns: i64,
    /// What is left until then.
    pub limit: Duration,
    /// Why it will be stopped.
    pub reason: KillReason,
}

/// A kill: see [`Action::KillContainer`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KillContainer {
    /// Instance.
    pub id: ContainerId,
    /// Container name.
    pub container: String,
    /// When SIGKILL is due, nanoseconds since the epoch.
    pub deadline_ns: i64,
    /// What is left until then.
    pub grace: Duration,
    /// Why.
    pub reason: KillReason,
}

/// Decides.
pub fn plan(input: &PlanInput<'_>) -> PodPlan {
    let lifecycle = advance(input);
    match &lifecycle {
        Lifecycle::Syncing => sync::plan(input),
        Lifecycle::Terminating(ending) => end::plan(input, ending),
        Lifecycle::Terminated(cause) => end::plan_removal(input, cause),
        Lifecycle::Finished => PodPlan {
            lifecycle,
            ..PodPlan::default()
        },
    }
}

/// Steps from running to ending, and ratchets an ending. Nothing leads back.
fn advance(input: &PlanInput<'_>) -> Lifecycle {
    let deletion = spec::deletion_grace_seconds(input.pod)
        .or_else(|| input.gone.then(|| spec::grace_seconds(input.pod)));
    match input.lifecycle {
        Lifecycle::Syncing => {
            if let Some(grace_s) = deletion {
                Lifecycle::Terminating(Terminating {
                    cause: Cause::Deleted,
                    grace_s,
                    deadline_ns: kill::deadline_ns(input.now_ns, grace_s),
                })
            } else if let Some(cause) = input
                .ended
                .cloned()
                .or_else(|| overdue(input))
                .or_else(|| sync::verdict(input))
            {
                let own = spec::grace_seconds(input.pod);
                let granted = input.ended_grace_s.filter(|_| input.ended.is_some());
                let grace_s = granted.unwrap_or(own);
                Lifecycle::Terminating(Terminating {
                    cause,
                    grace_s,
                    deadline_ns: kill::deadline_ns(input.now_ns, grace_s),
                })
            } else {
                Lifecycle::Syncing
            }
        }
        Lifecycle::Terminating(ending) => {
            let mut ending = ending.clone();
            if let Some(shorter) = deletion.filter(|d| *d < ending.grace_s) {
                ending.grace_s = shorter;
                let from_now = kill::deadline_ns(input.now_ns, shorter);
                ending.deadline_ns = ending.deadline_ns.min(from_now);
            }
            Lifecycle::Terminating(ending)
        }
        Lifecycle::Terminated(cause) => Lifecycle::Terminated(cause.clone()),
        Lifecycle::Finished => Lifecycle::Finished,
    }
}

/// When `activeDeadlineSeconds` runs out, nanoseconds since the epoch.
fn deadline_ns(input: &PlanInput<'_>) -> Option<i64> {
    let seconds = input.spec()?.active_deadline_seconds?;
    Some(
        input
            .start_time_ns
            .saturating_add(seconds.saturating_mul(1_000_000_000)),
    )
}

/// The cause of death of a pod past its deadline.
fn overdue(input: &PlanInput<'_>) -> Option<Cause> {
    (deadline_ns(input)? <= input.now_ns).then(|| Cause::Failed {
        reason: "DeadlineExceeded".to_owned(),
        message: "Pod was active on the node longer than the specified deadline".to_owned(),
    })
}
