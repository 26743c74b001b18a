//! How one container is brought to its end: preStop hook, then the stop signal, then SIGKILL, all
//! before one deadline.

use super::{Action, KillContainer, KillReason, PlanInput, PodPlan, PreStop};
use crate::pod::hooks;
use crate::pod::spec::{self, ContainerKind, RestartPolicy};
use crate::pod::state::{SECOND_NS, Step};
use k8s_openapi::api::core::v1::Pod;
use runtime::service::ContainerStatus;
use std::time::Duration;

/// Why and until when a container has to go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Doom {
    /// When SIGKILL is due, nanoseconds since the epoch.
    pub(super) deadline_ns: i64,
    /// Why.
    pub(super) reason: KillReason,
    /// Whether its signal may be sent already; until then it waits, but not beyond the deadline.
    pub(super) turn: bool,
}

/// The deadline of an ending that begins now.
pub fn deadline_ns(now_ns: i64, grace_s: u64) -> i64 {
    let grace_s = i64::try_from(grace_s).unwrap_or(i64::MAX);
    now_ns.saturating_add(grace_s.saturating_mul(SECOND_NS))
}

/// Plans the next step of one container's end.
pub(super) fn kill(
    input: &PlanInput<'_>,
    instance: &ContainerStatus,
    doom: Doom,
    plan: &mut PodPlan,
) {
    let notes = input.steps.kills.get(&instance.id);
    let deadline_ns = notes.map_or(doom.deadline_ns, |k| k.deadline_ns.min(doom.deadline_ns));
    let left_ns = deadline_ns.saturating_sub(input.now_ns).max(0);
    let left = Duration::from_nanos(u64::try_from(left_ns).unwrap_or(0));
    let name = &instance.config.name;
    if !left.is_zero() && !notes.is_some_and(|k| k.step != Step::Idle) {
        let hook = notes.map_or(&Step::Idle, |k| &k.hook);
        let hooked = *hook == Step::Done || hooks::pre_stop(input.pod, name).is_none();
        if !hooked && hook.is_due(input.now_ns) {
            plan.actions.push(Action::PreStop(PreStop {
                id: instance.id.clone(),
                container: name.clone(),
                deadline_ns,
                limit: left,
                reason: doom.reason,
            }));
        }
        if !hooked || !doom.turn {
            plan.wake_at(Some(deadline_ns));
            return;
        }
    }
    let shorter = notes.is_some_and(|k| k.step.is_running() && deadline_ns < k.deadline_ns);
    if shorter || notes.is_none_or(|k| k.step.is_due(input.now_ns)) {
        plan.actions.push(Action::KillContainer(KillContainer {
            id: instance.id.clone(),
            container: name.clone(),
            deadline_ns,
            grace: left,
            reason: doom.reason,
        }));
    }
    plan.wake_at(notes.and_then(|k| k.step.retry_at_ns()));
}

/// What users read when a container is killed.
pub fn words(pod: &Pod, container: &str, reason: KillReason) -> String {
    let spec = pod.spec.as_ref();
    let found = spec.and_then(|s| spec::container(s, container));
    let sidecar = found
        .as_ref()
        .is_some_and(|f| f.kind == ContainerKind::Sidecar);
    let (subject, why) = match reason {
        KillReason::PodEnds => return format!("Stopping container {container}"),
        KillReason::PostStart => return "FailedPostStartHook".to_owned(),
        KillReason::RestartAll => return "killing".to_owned(),
        KillReason::Resize => return format!("Container {container} resize requires restart"),
        KillReason::Liveness => (sidecar, "failed liveness probe"),
        KillReason::Startup => (sidecar, "failed startup probe"),
        KillReason::SpecChanged => (sidecar, "definition changed"),
    };
    if subject {
        return format!("Init container {container} {why}");
    }
    let own = found.and_then(|f| f.spec.restart_policy.clone());
    let never = match own {
        Some(own) => own == "Never",
        None => spec.is_some_and(|s| spec::restart_policy(s) == RestartPolicy::Never),
    };
    if never && reason != KillReason::SpecChanged {
        format!("Container {container} {why}")
    } else {
        format!("Container {container} {why}, will be restarted")
    }
}
