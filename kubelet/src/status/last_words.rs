//! What is left of containers when their pod is over, and how much they may say. Pure.

use super::containers::unknown;
use crate::pod::spec::{self, ContainerKind};
use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, PodSpec, PodStatus};

/// Bytes of termination messages a whole pod may have, shared evenly by its containers.
const POD_MAX: usize = 12 * 1024;

/// Gives every container that should have ended an end: those of a pod that was initialised, and
/// the init containers up to the last that was begun. Nobody knows how they ended.
pub(super) fn settle(spec: &PodSpec, status: &mut PodStatus) {
    if is_initialized(spec, status) {
        close(status.container_statuses.iter_mut().flatten());
    }
    if let Some(inits) = &mut status.init_container_statuses {
        let begun = inits
            .iter()
            .rposition(|s| !waits(s) || ended_before(s).is_some());
        let count = begun.map_or(1, |last| last + 1).min(inits.len());
        close(inits.iter_mut().take(count));
    }
}

fn close<'a>(statuses: impl Iterator<Item = &'a mut ContainerStatus>) {
    for status in statuses.filter(|s| ended(s).is_none()) {
        status.state = Some(unknown(None));
    }
}

/// Whether the main containers had their turn.
fn is_initialized(spec: &PodSpec, status: &PodStatus) -> bool {
    let mains = status.container_statuses.iter().flatten();
    let mut inits = spec::containers(spec).filter(|c| c.kind != ContainerKind::Main);
    let Some(last) = inits.by_ref().last() else {
        return true;
    };
    if mains
        .into_iter()
        .any(|s| !waits(s) || ended_before(s).is_some())
    {
        return true;
    }
    let statuses = status.init_container_statuses.as_deref();
    let own = statuses.and_then(|all| all.iter().find(|s| s.name == last.spec.name));
    own.is_some_and(|s| match last.kind {
        ContainerKind::Sidecar => s.started == Some(true) && ended(s).is_none() && !waits(s),
        ContainerKind::Init | ContainerKind::Main | ContainerKind::Ephemeral => {
            ended(s) == Some(0) || ended_before(s) == Some(0)
        }
    })
}

fn waits(status: &ContainerStatus) -> bool {
    let state = status.state.as_ref();
    state.is_none_or(|s| s.running.is_none() && s.terminated.is_none())
}

fn exit_code(state: Option<&ContainerState>) -> Option<i32> {
    Some(state?.terminated.as_ref()?.exit_code)
}

fn ended(status: &ContainerStatus) -> Option<i32> {
    exit_code(status.state.as_ref())
}

fn ended_before(status: &ContainerStatus) -> Option<i32> {
    exit_code(status.last_state.as_ref())
}

/// Cuts termination messages so that all together stay within bounds.
pub(super) fn bound(spec: &PodSpec, status: &mut PodStatus) {
    let containers = spec::containers(spec).count() + spec::ephemeral_containers(spec).count();
    let max = POD_MAX / containers.max(1);
    let all = [
        &mut status.init_container_statuses,
        &mut status.container_statuses,
        &mut status.ephemeral_container_statuses,
    ];
    for status in all.into_iter().flatten().flatten() {
        for state in [&mut status.state, &mut status.last_state]
            .into_iter()
            .flatten()
        {
            let message = state.terminated.as_mut().and_then(|t| t.message.as_mut());
            if let Some(message) = message.filter(|m| m.len() > max) {
                let mut cut = max;
                while !message.is_char_boundary(cut) {
                    cut -= 1;
                }
                message.truncate(cut);
            }
        }
    }
}
