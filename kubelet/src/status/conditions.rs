//! The pod conditions a node writes. Pure.

use super::derive::DeriveInput;
use crate::pod::spec::{self, ContainerKind};
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
        .filter(|c| !OWNED.contains(&c.type_.as_str()))
        .cloned()
        .collect();
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
    for (type_, value) in OWNED.iter().zip(values) {
        all.push(condition(input, previous, type_, value));
    }
    all
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
