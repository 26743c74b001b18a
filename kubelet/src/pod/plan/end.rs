//! Ending a pod: kill, give back, tell, forget.

use super::kill::{self, Doom};
use super::{Action, KillReason, PlanInput, PodPlan};
use crate::observe;
use crate::pod::spec::{self, ContainerKind};
use crate::pod::state::{Cause, Lifecycle, Step, Terminating};
use runtime::service::ContainerStatus;

/// A pod whose containers have to go.
pub(super) fn plan(input: &PlanInput<'_>, ending: &Terminating) -> PodPlan {
    let mut plan = PodPlan {
        lifecycle: Lifecycle::Terminating(ending.clone()),
        ..PodPlan::default()
    };
    let starting = input.steps.starts.values().any(Step::is_running);
    let kills = end_containers(input, ending, &mut plan);
    if kills || starting || input.steps.sandbox.is_running() {
        return plan;
    }
    let stopped = stop_sandboxes(input, &mut plan);
    // Its directories are in use until the last step that writes them has ended.
    if !input.steps.volumes.is_running() && input.steps.teardown.is_due(input.now_ns) {
        plan.actions.push(Action::Teardown);
    }
    plan.wake_at(input.steps.teardown.retry_at_ns());
    if stopped && input.steps.teardown == Step::Done {
        plan.lifecycle = Lifecycle::Terminated(ending.cause.clone());
    }
    plan
}

/// Ends all containers: their hooks at once, side by side; then main and init containers, and
/// each sidecar when all main containers and all later sidecars are gone. Returns whether any
/// process is left.
fn end_containers(input: &PlanInput<'_>, ending: &Terminating, plan: &mut PodPlan) -> bool {
    let place = |c: &ContainerStatus| {
        let spec = input.spec()?;
        spec::containers(spec)
            .enumerate()
            .find(|(_, s)| s.spec.name == c.config.name)
            .map(|(index, s)| (s.kind, index))
    };
    let alive: Vec<_> = input.observed.running().map(|c| (c, place(c))).collect();
    // Who comes later in the spec and is awaited: main containers and sidecars.
    let awaited = alive.iter().filter_map(|(_, place)| *place);
    let last = awaited
        .filter(|(kind, _)| matches!(kind, ContainerKind::Main | ContainerKind::Sidecar))
        .map(|(_, index)| index)
        .max();
    for (container, place) in &alive {
        let turn = match place {
            Some((ContainerKind::Sidecar, index)) => last == Some(*index),
            Some(_) | None => true,
        };
        let doom = Doom {
            deadline_ns: ending.deadline_ns,
            reason: KillReason::PodEnds,
            turn,
        };
        kill::kill(input, container, doom, plan);
    }
    !alive.is_empty()
}

/// Stops every sandbox; whether all are stopped.
fn stop_sandboxes(input: &PlanInput<'_>, plan: &mut PodPlan) -> bool {
    let mut all = true;
    for sandbox in &input.observed.sandboxes {
        let stop = input.steps.sandbox_stops.get(&sandbox.id);
        if stop == Some(&Step::Done) {
            continue;
        }
        all = false;
        if stop.is_none_or(|s| s.is_due(input.now_ns)) {
            plan.actions.push(Action::StopSandbox(sandbox.id.clone()));
        }
        plan.wake_at(stop.and_then(Step::retry_at_ns));
    }
    all
}

/// A pod without processes: keep its dead containers for their logs until the API object goes,
/// then forget all of it.
pub(super) fn plan_removal(input: &PlanInput<'_>, cause: &Cause) -> PodPlan {
    let mut plan = PodPlan {
        lifecycle: Lifecycle::Terminated(cause.clone()),
        ..PodPlan::default()
    };
    if !input.gone && input.pod.metadata.deletion_timestamp.is_none() {
        super::keep::collect(input, &mut plan);
        return plan;
    }
    let steps = input.steps;
    for sandbox in &input.observed.sandboxes {
        let removal = steps.sandbox_removals.get(&sandbox.id);
        if removal.is_none_or(|s| s.is_due(input.now_ns)) {
            plan.actions.push(Action::RemoveSandbox(sandbox.id.clone()));
        }
        plan.wake_at(removal.and_then(Step::retry_at_ns));
    }
    // The user waits for the farewell, not for the removal of files nobody can reach any more.
    if !input.gone && steps.farewell.is_due(input.now_ns) {
        plan.actions.push(Action::Farewell);
    }
    plan.wake_at(steps.farewell.retry_at_ns());
    let told = steps.farewell == Step::Done || (input.gone && !steps.farewell.is_running());
    if !input.observed.sandboxes.is_empty() {
        return plan;
    }
    if steps.purge.is_due(input.now_ns) {
        plan.actions.push(Action::Purge);
    }
    plan.wake_at(steps.purge.retry_at_ns());
    if told && steps.purge == Step::Done {
        plan.lifecycle = Lifecycle::Finished;
    }
    debug_assert!(!input.observed.containers.iter().any(observe::is_running));
    plan
}
