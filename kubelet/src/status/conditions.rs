//! The pod conditions a node writes. Pure.

use super::derive::{DeriveInput, is_terminal_phase};
use crate::eviction::rank::{EVICTED, NODE_LOW};
use crate::pod::admission;
use crate::pod::resize;
use crate::pod::rounds::{self, Round};
use crate::pod::spec::{self, ContainerKind};
use crate::pod::state::{Cause, Lifecycle};
use k8s_openapi::api::core::v1::{ContainerStatus, PodCondition, PodSpec, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

/// Condition types this node owns; all others belong to somebody else and are kept.
pub(crate) const OWNED: [&str; 5] = [
    "PodReadyToStartContainers",
    "Initialized",
    "Ready",
    "ContainersReady",
    "PodScheduled",
];

/// Conditions about requests for other resources; they are there only while such a request is
/// under way.
const RESIZE: [&str; 2] = [resize::PENDING, resize::IN_PROGRESS];

/// All containers start anew because one ended (KEP-5532). Only pods with such a rule have it.
const RESTARTING: &str = "AllContainersRestarting";

/// Whether a condition type is this node's.
fn is_owned(type_: &str) -> bool {
    OWNED.contains(&type_) || RESIZE.contains(&type_) || type_ == RESTARTING
}

/// A pod is ended for the sake of others. Several may write it; it is ours with our reason.
const DISRUPTION_TARGET: &str = "DisruptionTarget";
const BY_KUBELET: &str = "TerminationByKubelet";

/// Whether a condition was written by this node.
pub(super) fn is_ours(condition: &PodCondition) -> bool {
    let by_kubelet = condition.reason.as_deref() == Some(BY_KUBELET);
    is_owned(&condition.type_) || condition.type_ == DISRUPTION_TARGET && by_kubelet
}

/// A condition's value before times are filled in.
struct Value {
    status: bool,
    reason: Option<&'static str>,
    message: Option<String>,
}

impl Value {
    const TRUE: Self = Self {
        status: true,
        reason: None,
        message: None,
    };

    fn no(reason: &'static str) -> Self {
        Self {
            status: false,
            reason: Some(reason),
            message: None,
        }
    }
}

/// All conditions of the new status: foreign ones first, then ours in the order users know.
pub(super) fn conditions(
    input: &DeriveInput<'_>,
    spec: &PodSpec,
    status: &PodStatus,
    network_ready: bool,
) -> Vec<PodCondition> {
    let previous = input.previous.conditions.as_deref().unwrap_or_default();
    // Others change theirs at the apiserver: the newest object has them, not our last report.
    let newest = input
        .pod
        .status
        .as_ref()
        .and_then(|s| s.conditions.as_deref());
    let mut all: Vec<_> = newest
        .unwrap_or(previous)
        .iter()
        .filter(|c| !is_owned(&c.type_))
        .cloned()
        .collect();
    if let Some(message) = disrupted(input)
        && !all.iter().any(|c| c.type_ == DISRUPTION_TARGET)
    {
        all.push(disruption_target(input, message));
    }
    let containers_ready = containers_ready(spec, status);
    let ready = ready(spec, &containers_ready, &all);
    let values = [
        Value {
            status: network_ready,
            reason: None,
            message: None,
        },
        initialized(spec, status),
        ready,
        containers_ready,
        Value::TRUE,
    ];
    if !is_terminal_phase(status) {
        all.extend(resizing(input, previous));
    }
    for (type_, value) in OWNED.iter().zip(values) {
        all.push(condition(input, previous, type_, value));
    }
    if rounds::could_restart_all(spec) {
        let value = restarting(input, spec, status);
        all.push(PodCondition {
            observed_generation: None,
            ..condition(input, previous, RESTARTING, value)
        });
    }
    all
}

/// Whether a container ended so that all restart, and they have not begun yet.
fn restarting(input: &DeriveInput<'_>, spec: &PodSpec, status: &PodStatus) -> Value {
    match status.phase.as_deref() {
        Some("Succeeded") => return Value::no("PodCompleted"),
        Some("Failed") => return Value::no("PodFailed"),
        _ => {}
    }
    let under_way = Round::of(spec, input.observed).source().is_some();
    Value {
        status: under_way,
        reason: under_way.then_some("RestartAllContainersStarted"),
        message: under_way.then(|| "container exited with restart policy rule".to_owned()),
    }
}

/// What users read of a pod that the node ends for the sake of others; none when it ends for a
/// reason of its own.
fn disrupted<'a>(input: &DeriveInput<'a>) -> Option<&'a str> {
    let cause = match input.lifecycle {
        Lifecycle::Terminating(ending) => &ending.cause,
        Lifecycle::Terminated(cause) => cause,
        Lifecycle::Syncing | Lifecycle::Finished => return None,
    };
    match cause {
        Cause::Failed { reason, .. } if reason == admission::PREEMPTING => {
            Some("Pod was preempted by Kubelet to accommodate a critical pod.")
        }
        // What a pod takes beyond its own limits is its own doing.
        Cause::Failed { reason, message } if reason == EVICTED => {
            Some(message.as_str()).filter(|m| m.starts_with(NODE_LOW))
        }
        Cause::Failed { .. } | Cause::Completed | Cause::Deleted => None,
    }
}

fn disruption_target(input: &DeriveInput<'_>, message: &str) -> PodCondition {
    PodCondition {
        type_: DISRUPTION_TARGET.to_owned(),
        status: "True".to_owned(),
        reason: Some(BY_KUBELET.to_owned()),
        message: Some(message.to_owned()),
        last_transition_time: Some(Time(input.now)),
        observed_generation: input.pod.metadata.generation,
        ..PodCondition::default()
    }
}

/// The conditions of a request that waits and of one that is being carried out. Their times move
/// with the reason, their generation is that of the request.
fn resizing(input: &DeriveInput<'_>, previous: &[PodCondition]) -> Vec<PodCondition> {
    let make = |type_: &str, reason: Option<&str>, message: Option<&str>, generation: i64| {
        let since = previous
            .iter()
            .find(|c| c.type_ == type_ && c.reason.as_deref() == reason)
            .and_then(|c| c.last_transition_time.clone());
        PodCondition {
            type_: type_.to_owned(),
            status: "True".to_owned(),
            reason: reason.map(str::to_owned),
            message: message.map(str::to_owned),
            last_transition_time: Some(since.unwrap_or(Time(input.now))),
            observed_generation: Some(generation),
            ..PodCondition::default()
        }
    };
    let pending = input.resize.pending.map(|p| {
        let message = Some(p.message.as_str()).filter(|m| !m.is_empty());
        make(resize::PENDING, Some(p.reason()), message, p.generation)
    });
    let progress = input.resize.progress.map(|p| {
        let error = p.error.as_deref();
        make(
            resize::IN_PROGRESS,
            error.map(|_| "Error"),
            error,
            p.generation,
        )
    });
    pending.into_iter().chain(progress).collect()
}

/// Fills in generation and transition time: the latter moves only when the status does.
fn condition(
    input: &DeriveInput<'_>,
    previous: &[PodCondition],
    type_: &str,
    value: Value,
) -> PodCondition {
    let status = if value.status { "True" } else { "False" };
    let unchanged = previous
        .iter()
        .find(|c| c.type_ == type_ && c.status == status)
        .and_then(|c| c.last_transition_time.clone());
    PodCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: value.reason.map(str::to_owned),
        message: value.message,
        last_transition_time: Some(unchanged.unwrap_or(Time(input.now))),
        observed_generation: input.pod.metadata.generation,
        ..PodCondition::default()
    }
}

/// Whether all init containers are through (sidecars: started).
fn initialized(spec: &PodSpec, status: &PodStatus) -> Value {
    if status.phase.as_deref() == Some("Succeeded") {
        return Value {
            status: true,
            reason: Some("PodCompleted"),
            message: None,
        };
    }
    let inits = status
        .init_container_statuses
        .as_deref()
        .unwrap_or_default();
    // Once a main container ran, initialisation is behind the pod, whatever was lost since.
    let ran = |s: &ContainerStatus| s.container_id.as_deref().is_some_and(|id| !id.is_empty());
    if status.container_statuses.iter().flatten().any(ran) {
        return Value::TRUE;
    }
    let incomplete: Vec<_> = spec::containers(spec)
        .filter(|c| match c.kind {
            ContainerKind::Init => !find(inits, &c.spec.name).is_some_and(|s| s.ready),
            ContainerKind::Sidecar => {
                find(inits, &c.spec.name).is_none_or(|s| s.started != Some(true))
            }
            ContainerKind::Main | ContainerKind::Ephemeral => false,
        })
        .map(|c| c.spec.name.as_str())
        .collect();
    if incomplete.is_empty() {
        return Value::TRUE;
    }
    Value {
        status: false,
        reason: Some("ContainersNotInitialized"),
        message: Some(format!(
            "containers with incomplete status: [{}]",
            incomplete.join(" ")
        )),
    }
}

/// Whether all main containers and sidecars are ready.
fn containers_ready(spec: &PodSpec, status: &PodStatus) -> Value {
    match status.phase.as_deref() {
        Some("Succeeded") => return Value::no("PodCompleted"),
        Some("Failed") => return Value::no("PodFailed"),
        _ => {}
    }
    let inits = status
        .init_container_statuses
        .as_deref()
        .unwrap_or_default();
    let mains = status.container_statuses.as_deref().unwrap_or_default();
    let unready: Vec<_> = spec::containers(spec)
        .filter(|c| {
            let statuses = match c.kind {
                ContainerKind::Init | ContainerKind::Ephemeral => return false,
                ContainerKind::Sidecar => inits,
                ContainerKind::Main => mains,
            };
            !find(statuses, &c.spec.name).is_some_and(|s| s.ready)
        })
        .map(|c| c.spec.name.as_str())
        .collect();
    if unready.is_empty() {
        return Value::TRUE;
    }
    Value {
        status: false,
        reason: Some("ContainersNotReady"),
        message: Some(format!(
            "containers with unready status: [{}]",
            unready.join(" ")
        )),
    }
}

/// Containers ready and every readiness gate open.
fn ready(spec: &PodSpec, containers: &Value, foreign: &[PodCondition]) -> Value {
    if !containers.status {
        return Value {
            status: false,
            reason: containers.reason,
            message: containers.message.clone(),
        };
    }
    let closed: Vec<_> = spec
        .readiness_gates
        .iter()
        .flatten()
        .filter_map(|gate| {
            let name = &gate.condition_type;
            match foreign.iter().find(|c| c.type_ == *name) {
                Some(c) if c.status == "True" => None,
                Some(c) => Some(format!(
                    "the status of pod readiness gate {name:?} is not \"True\", but {}",
                    c.status
                )),
                None => Some(format!(
                    "corresponding condition of pod readiness gate {name:?} does not exist."
                )),
            }
        })
        .collect();
    if closed.is_empty() {
        return Value::TRUE;
    }
    Value {
        status: false,
        reason: Some("ReadinessGatesNotReady"),
        message: Some(closed.join(", ")),
    }
}

/// A status by container name.
fn find<'a>(statuses: &'a [ContainerStatus], name: &str) -> Option<&'a ContainerStatus> {
    statuses.iter().find(|s| s.name == name)
}
