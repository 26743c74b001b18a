//! The states of a pod on this node, and what the worker remembers of unfinished steps. Values
//! only; the transitions are in [`super::plan`].

use runtime::service::{ContainerId, SandboxId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Nanoseconds in a second.
pub const SECOND_NS: i64 = 1_000_000_000;
/// First CrashLoopBackOff delay.
const BACKOFF_FIRST_NS: i64 = 10 * SECOND_NS;
/// A container that ran this long starts its back-off anew.
const BACKOFF_RESET_NS: i64 = 600 * SECOND_NS;

/// Where a pod is in its life. It only moves forward.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Lifecycle {
    /// It shall run.
    #[default]
    Syncing,
    /// Its containers are being ended, for good.
    Terminating(Terminating),
    /// No process of it is left and its resources are given back; dead containers are kept for
    /// their logs until the API object goes.
    Terminated(Cause),
    /// Nothing of it is left on the node and the apiserver was told.
    Finished,
}

/// An ending in progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminating {
    /// Why; the first cause stays.
    pub cause: Cause,
    /// Seconds of grace; it may shrink, never grow.
    pub grace_s: u64,
    /// When SIGKILL is due, nanoseconds since the epoch; it may come closer, never move away.
    pub deadline_ns: i64,
}

/// Why a pod ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// All its containers ended and none shall run again, or an init container failed for good;
    /// or the apiserver already held a terminal phase.
    Completed,
    /// Deleted through the API, or unknown to it.
    Deleted,
    /// The node ends it: deadline, admission, eviction. Phase `Failed` with these words.
    Failed {
        /// CamelCase word for `status.reason`.
        reason: String,
        /// Sentence for `status.message`.
        message: String,
    },
}

/// A step that is tried until it succeeds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Step {
    /// Not tried, or to be done again.
    #[default]
    Idle,
    /// In flight; after a failure, which users go on seeing until it succeeds.
    Running {
        /// The failure before this try.
        before: Option<Failure>,
    },
    /// Done.
    Done,
    /// Failed; try again at the time given.
    Failed(Failure),
}

impl Step {
    /// Whether it is time to start it.
    pub fn is_due(&self, now_ns: i64) -> bool {
        match self {
            Self::Idle => true,
            Self::Running { .. } | Self::Done => false,
            Self::Failed(f) => f.retry_at_ns <= now_ns,
        }
    }

    /// Whether it is in flight.
    pub fn is_running(&self) -> bool {
        matches!(self, Self::Running { .. })
    }

    /// When it has to be tried again, if it failed.
    pub fn retry_at_ns(&self) -> Option<i64> {
        match self {
            Self::Failed(f) => Some(f.retry_at_ns),
            Self::Idle | Self::Running { .. } | Self::Done => None,
        }
    }

    /// Brings the next try of a failed step to this time.
    pub fn retry_at(&mut self, at_ns: i64) {
        if let Self::Failed(failure) = self {
            failure.retry_at_ns = at_ns;
        }
    }

    /// The failure users should see: kept while the next try is in flight.
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Failed(f) => Some(f),
            Self::Running { before } => before.as_ref(),
            Self::Idle | Self::Done => None,
        }
    }

    /// Takes off: in flight, remembering the failure before.
    pub fn begin(&mut self) {
        *self = Self::Running {
            before: self.failure().cloned(),
        };
    }

    /// Consecutive failures so far.
    pub fn failures(&self) -> u32 {
        self.failure().map_or(0, |f| f.failures)
    }
}

/// The last failure of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Waiting reason users see, `ErrImagePull`.
    pub reason: String,
    /// Waiting message users see.
    pub message: String,
    /// Nanoseconds since the epoch.
    pub retry_at_ns: i64,
    /// Consecutive failures.
    pub failures: u32,
}

/// What the worker has under way or done. Lost with the agent, and rebuilt by doing again:
/// every step is idempotent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Steps {
    /// Volumes set up.
    pub volumes: Step,
    /// The newest sandbox being made.
    pub sandbox: Step,
    /// Images by container name; taken (`Idle` again) by each start.
    pub images: BTreeMap<String, Step>,
    /// Container starts by container name.
    pub starts: BTreeMap<String, Step>,
    /// Kills under way or failed.
    pub kills: BTreeMap<ContainerId, Kill>,
    /// Dead containers being removed.
    pub container_removals: BTreeMap<ContainerId, Step>,
    /// Sandboxes stopped or being stopped.
    pub sandbox_stops: BTreeMap<SandboxId, Step>,
    /// Sandboxes being removed.
    pub sandbox_removals: BTreeMap<SandboxId, Step>,
    /// Volumes and pod cgroup given back.
    pub teardown: Step,
    /// Pod directories and logs removed.
    pub purge: Step,
    /// The final report and DELETE at the apiserver.
    pub farewell: Step,
    /// Cgroups brought to what was granted; `Idle` again when they are.
    pub resize: Step,
}

impl Steps {
    /// Steps that may have waited for an object of the API are due at once.
    pub fn retry_now(&mut self) {
        for step in std::iter::once(&mut self.volumes).chain(self.starts.values_mut()) {
            step.retry_at(0);
        }
    }
}

/// The end of one container that is under way.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Kill {
    /// When SIGKILL is due, nanoseconds since the epoch.
    pub deadline_ns: i64,
    /// Its preStop hook: runs once, and counts as done however it went.
    pub hook: Step,
    /// Signal and end.
    pub step: Step,
    /// Users were told.
    pub told: bool,
    /// It ends to start anew with other resources, whatever its restart policy says.
    pub for_resize: bool,
}

/// What is kept on disk of an ending, so that a new agent goes on with it: it grants the grace
/// that is left, and runs no hook again that has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndingNote {
    /// The ending.
    pub ending: Terminating,
    /// Instances whose preStop hook has ended.
    pub hooked: BTreeSet<ContainerId>,
}

/// Results of probes, by container instance.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Health {
    /// Readiness; absent means no result yet.
    pub ready: BTreeMap<ContainerId, bool>,
    /// Startup probe passed (or there is none and it runs).
    pub started: BTreeMap<ContainerId, bool>,
    /// Instances that failed their liveness or startup probe.
    pub unhealthy: BTreeMap<ContainerId, UnhealthyKind>,
}

impl Health {
    /// Forgets instances that are gone.
    pub fn retain(&mut self, alive: &BTreeSet<ContainerId>) {
        self.ready.retain(|id, _| alive.contains(id));
        self.started.retain(|id, _| alive.contains(id));
        self.unhealthy.retain(|id, _| alive.contains(id));
    }
}

/// What condemned a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnhealthyKind {
    /// Liveness.
    Liveness,
    /// Startup.
    Startup,
    /// Not a probe: its postStart hook failed.
    PostStart,
}

/// Bounds of the restart back-off of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackoffLimits {
    /// First delay.
    pub first_ns: i64,
    /// Greatest delay.
    pub max_ns: i64,
}

impl Default for BackoffLimits {
    fn default() -> Self {
        Self::up_to(Duration::from_secs(300))
    }
}

impl BackoffLimits {
    /// From 10 s, or from the maximum if that is less.
    pub fn up_to(max: Duration) -> Self {
        let max_ns = i64::try_from(max.as_nanos()).unwrap_or(i64::MAX);
        Self {
            first_ns: BACKOFF_FIRST_NS.min(max_ns),
            max_ns,
        }
    }
}

/// Restart back-off of one container: 10 s, doubled up to the node's limit, forgotten after a run
/// of 10 min. Kept in the annotations of the instance it let start, so that a new agent goes on
/// with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CrashBackoff {
    delay_ns: i64,
    last_restart_ns: i64,
}

impl CrashBackoff {
    /// As it was recorded with an instance started at `last_restart_ns`.
    pub fn recorded(delay_ns: i64, last_restart_ns: i64) -> Self {
        Self {
            delay_ns: delay_ns.max(0),
            last_restart_ns,
        }
    }

    /// When a container that ended at `finished_ns` may run again; none means at once.
    pub fn wait_until(this: Option<&Self>, finished_ns: i64, now_ns: i64) -> Option<i64> {
        let backoff = this?;
        if finished_ns.saturating_sub(backoff.last_restart_ns) > BACKOFF_RESET_NS {
            return None;
        }
        let until = finished_ns.saturating_add(backoff.delay_ns);
        (until > now_ns).then_some(until)
    }

    /// The back-off after one more restart, of a container that ended at `finished_ns`.
    pub fn after_restart(
        this: Option<&Self>,
        finished_ns: i64,
        now_ns: i64,
        limits: BackoffLimits,
    ) -> Self {
        let delay_ns = match this {
            Some(b) if finished_ns.saturating_sub(b.last_restart_ns) <= BACKOFF_RESET_NS => {
                b.delay_ns.saturating_mul(2).min(limits.max_ns)
            }
            Some(_) | None => limits.first_ns,
        };
        Self {
            delay_ns,
            last_restart_ns: now_ns,
        }
    }

    /// The delay in nanoseconds, for the record.
    pub fn delay_ns(&self) -> i64 {
        self.delay_ns
    }

    /// The delay in seconds, for messages.
    pub fn delay_seconds(&self) -> i64 {
        self.delay_ns / SECOND_NS
    }
}

/// Delay before a failed step is tried again: 1 s doubled, at most 15 s (a missing ConfigMap
/// that appears shall not be waited for much longer than that).
pub fn retry_delay_ns(failures: u32) -> i64 {
    let seconds = 1_i64 << failures.saturating_sub(1).min(4);
    seconds.min(15) * SECOND_NS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crash_back_off_starts_at_ten_seconds_doubles_to_five_minutes_and_resets() {
        let limits = BackoffLimits::default();
        let mut now = 0;
        let mut backoff = None;
        assert_eq!(
            CrashBackoff::wait_until(backoff.as_ref(), now, now),
            None,
            "first restart"
        );
        let mut waits = Vec::new();
        for _ in 0..8 {
            backoff = Some(CrashBackoff::after_restart(
                backoff.as_ref(),
                now,
                now,
                limits,
            ));
            // It ends at once.
            let until = CrashBackoff::wait_until(backoff.as_ref(), now, now).unwrap();
            waits.push((until - now) / SECOND_NS);
            now = until;
        }
        assert_eq!(waits, [10, 20, 40, 80, 160, 300, 300, 300]);
        let good_run = now + 601 * SECOND_NS;
        assert_eq!(
            CrashBackoff::wait_until(backoff.as_ref(), good_run, good_run),
            None
        );
        let fresh = CrashBackoff::after_restart(backoff.as_ref(), good_run, good_run, limits);
        assert_eq!(fresh.delay_seconds(), 10);
        let short = BackoffLimits::up_to(Duration::from_secs(4));
        let first = CrashBackoff::after_restart(None, 0, 0, short);
        let second = CrashBackoff::after_restart(Some(&first), 0, 0, short);
        assert_eq!((first.delay_seconds(), second.delay_seconds()), (4, 4));
    }

    #[test]
    fn retries_of_steps_slow_down_to_a_bound() {
        let delays: Vec<_> = (1..8).map(|n| retry_delay_ns(n) / SECOND_NS).collect();
        assert_eq!(delays, [1, 2, 4, 8, 15, 15, 15]);
    }
}
