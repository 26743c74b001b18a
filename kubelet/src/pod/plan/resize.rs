//! Bringing cgroups to what a pod was granted.

use super::{Action, PlanInput, PodPlan};
use runtime::service::{ContainerStatus, SandboxStatus};

/// Plans the change when a cgroup is not as granted, or when this agent does not know how the
/// pod's is.
pub(super) fn plan(input: &PlanInput<'_>, sandbox: Option<&SandboxStatus>, plan: &mut PodPlan) {
    let view = &input.resize;
    if view.wanted.is_none() || sandbox.is_none() {
        return;
    }
    let unknown = view.pod_applied.is_none();
    let differs = view
        .differing(input.observed)
        .any(|instance| !view.restarts(input.pod, instance));
    if !unknown && !differs && !view.pod_is_outdated() {
        return;
    }
    if input.steps.resize.is_due(input.now_ns) {
        plan.actions.push(Action::Resize);
    }
    plan.wake_at(input.steps.resize.retry_at_ns());
}

/// Whether an instance was killed to start anew with other resources.
pub(super) fn killed_for_resize(input: &PlanInput<'_>, instance: &ContainerStatus) -> bool {
    let kill = input.steps.kills.get(&instance.id);
    kill.is_some_and(|kill| kill.for_resize)
}
