//! Which dead containers and old sandboxes are kept. One dead instance per container stays: it
//! is `lastState` and what `logs --previous` reads.

use super::{Action, PlanInput, PodPlan};
use crate::observe::{self, PodObservation};
use runtime::service::{ContainerId, SandboxId};
use std::collections::{BTreeMap, BTreeSet};

/// Adds the removal of what is neither the newest instance nor the newest dead one.
pub(super) fn collect(input: &PlanInput<'_>, plan: &mut PodPlan) {
    let kept = kept(input.observed);
    let mut needed: BTreeSet<&SandboxId> = BTreeSet::new();
    needed.extend(input.observed.newest_sandbox().map(|s| &s.id));
    for container in &input.observed.containers {
        let busy = observe::is_running(container)
            || input
                .steps
                .starts
                .get(&container.config.name)
                .is_some_and(|s| s.is_running());
        if busy || kept.contains(&container.id) {
            needed.insert(&container.sandbox_id);
            continue;
        }
        let removal = input.steps.container_removals.get(&container.id);
        if removal.is_none_or(|s| s.is_due(input.now_ns)) {
            plan.actions
                .push(Action::RemoveContainer(container.id.clone()));
        }
        plan.wake_at(removal.and_then(|s| s.retry_at_ns()));
    }
    for sandbox in input
        .observed
        .sandboxes
        .iter()
        .filter(|s| !needed.contains(&s.id))
    {
        let removal = input.steps.sandbox_removals.get(&sandbox.id);
        if removal.is_none_or(|s| s.is_due(input.now_ns)) {
            plan.actions.push(Action::RemoveSandbox(sandbox.id.clone()));
        }
        plan.wake_at(removal.and_then(|s| s.retry_at_ns()));
    }
}

/// The newest and the newest dead instance of each container.
fn kept(observed: &PodObservation) -> BTreeSet<ContainerId> {
    let mut newest: BTreeMap<&str, &ContainerId> = BTreeMap::new();
    let mut dead: BTreeMap<&str, &ContainerId> = BTreeMap::new();
    for container in &observed.containers {
        newest
            .entry(&container.config.name)
            .or_insert(&container.id);
        if observe::exit(container).is_some() {
            dead.entry(&container.config.name).or_insert(&container.id);
        }
    }
    newest
        .into_values()
        .chain(dead.into_values())
        .cloned()
        .collect()
}
