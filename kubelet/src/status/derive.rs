//! A pod's status from its spec, its state and what the runtime holds. Pure.

use super::{conditions, containers, last_words, resources};
use crate::observe::PodObservation;
use crate::pod::plan::Waiting;
use crate::pod::resize::tracker::ResizeView;
use crate::pod::spec::{self, ContainerKind, RestartPolicy};
use crate::pod::state::{Cause, Health, Lifecycle, Step};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, HostIP, Pod, PodIP, PodSpec, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use runtime::service::ContainerId;
use std::collections::BTreeMap;

/// All a status depends on.
#[derive(Debug, Clone, Copy)]
pub struct DeriveInput<'a> {
    /// Newest desired object.
    pub pod: &'a Pod,
    /// The status derived last; the apiserver's when the pod is first seen.
    pub previous: &'a PodStatus,
    /// State of the pod on this node.
    pub lifecycle: &'a Lifecycle,
    /// What the runtime holds.
    pub observed: &'a PodObservation,
    /// Probe results.
    pub health: &'a Health,
    /// Why containers wait, by name.
    pub waiting: &'a BTreeMap<String, Waiting>,
    /// Starts by container name: one in flight (its postStart hook may run) is not running yet.
    pub starts: &'a BTreeMap<String, Step>,
    /// Resources granted and in force.
    pub resize: ResizeView<'a>,
    /// Last words of dead containers.
    pub termination_messages: &'a BTreeMap<ContainerId, String>,
    /// Addresses of the node, first is primary.
    pub host_ips: &'a [String],
    /// When this node took the pod up.
    pub start_time: Timestamp,
    /// Now.
    pub now: Timestamp,
}

/// Nanoseconds since the epoch as an API time; none for 0, which means "never".
pub(super) fn time(ns: i64) -> Option<Time> {
    let at = Timestamp::from_nanosecond(i128::from(ns)).ok()?;
    (ns != 0).then_some(Time(at))
}

/// Derives.
pub fn derive(input: &DeriveInput<'_>) -> PodStatus {
    let previous = input.previous;
    let empty = PodSpec::default();
    let spec = input.pod.spec.as_ref().unwrap_or(&empty);
    // What others write is in the newest object, not in our last report.
    let theirs = input.pod.status.as_ref().unwrap_or(previous);
    let mut status = PodStatus {
        observed_generation: input
            .pod
            .metadata
            .generation
            .or(previous.observed_generation),
        qos_class: theirs.qos_class.clone(),
        start_time: previous.start_time.clone().or(Some(Time(input.start_time))),
        nominated_node_name: theirs.nominated_node_name.clone(),
        resource_claim_statuses: theirs.resource_claim_statuses.clone(),
        extended_resource_claim_status: theirs.extended_resource_claim_status.clone(),
        ..PodStatus::default()
    };
    let rejected = is_rejected(input);
    if !rejected {
        let all = containers::statuses(input, spec);
        let some = |list: Vec<ContainerStatus>| Some(list).filter(|s| !s.is_empty());
        status.init_container_statuses = some(all.init);
        status.container_statuses = some(all.main);
        status.ephemeral_container_statuses = some(all.ephemeral);
    }
    end_of_phase(input, spec, &mut status);
    if !rejected && matches!(input.lifecycle, Lifecycle::Terminated(_)) {
        last_words::settle(spec, &mut status);
    }
    last_words::bound(spec, &mut status);
    if !rejected {
        resources::of_pod(input, &mut status);
    }
    let network_ready = addresses(input, spec, &mut status);
    if !rejected {
        status.conditions = Some(conditions::conditions(input, spec, &status, network_ready));
    } else {
        status.conditions = previous.conditions.clone();
    }
    status
}

/// Whether the node refused the pod before it had anything.
fn is_rejected(input: &DeriveInput<'_>) -> bool {
    let failed = match input.lifecycle {
        Lifecycle::Terminating(e) => matches!(e.cause, Cause::Failed { .. }),
        Lifecycle::Terminated(cause) => matches!(cause, Cause::Failed { .. }),
        Lifecycle::Syncing | Lifecycle::Finished => false,
    };
    failed && input.observed.sandboxes.is_empty() && input.previous.container_statuses.is_none()
}

/// Sets phase, reason and message. A terminal phase is told only when no process is left, and
/// never taken back.
fn end_of_phase(input: &DeriveInput<'_>, spec: &PodSpec, status: &mut PodStatus) {
    let previous = input.previous;
    if spec::is_terminal(input.pod) || is_terminal_phase(previous) {
        let told = if is_terminal_phase(previous) {
            Some(previous)
        } else {
            input.pod.status.as_ref()
        };
        status.phase = told.and_then(|s| s.phase.clone());
        status.reason = told.and_then(|s| s.reason.clone());
        status.message = told.and_then(|s| s.message.clone());
        return;
    }
    // What is being started may run before anybody looks again.
    let starting = input.starts.values().any(Step::is_running);
    let alive = starting || input.observed.running().next().is_some();
    let cause = match input.lifecycle {
        Lifecycle::Syncing | Lifecycle::Finished => None,
        Lifecycle::Terminating(ending) => Some(&ending.cause),
        Lifecycle::Terminated(cause) => Some(cause),
    };
    let phase = match cause {
        None => match phase(spec, status, false) {
            Phase::Succeeded | Phase::Failed => Phase::Running,
            open => open,
        },
        Some(_) if alive => {
            let open = phase(spec, status, false);
            if open == Phase::Pending {
                Phase::Pending
            } else {
                Phase::Running
            }
        }
        Some(Cause::Failed { reason, message }) => {
            status.reason = Some(reason.clone());
            status.message = Some(message.clone());
            Phase::Failed
        }
        Some(Cause::Completed | Cause::Deleted) => {
            close_waiting(status);
            match phase(spec, status, true) {
                Phase::Succeeded => Phase::Succeeded,
                Phase::Failed | Phase::Pending | Phase::Running => Phase::Failed,
            }
        }
    };
    status.phase = Some(phase.as_str().to_owned());
}

/// Main containers of an ended pod that ran before and wait for another run have ended for good.
fn close_waiting(status: &mut PodStatus) {
    for container in status.container_statuses.iter_mut().flatten() {
        let waits = container
            .state
            .as_ref()
            .is_some_and(|s| s.waiting.is_some());
        let last = container
            .last_state
            .clone()
            .filter(|s| s.terminated.is_some());
        if waits && let Some(last) = last {
            container.state = Some(last);
            container.last_state = None;
        }
    }
}

/// Whether a status holds a phase that never changes again.
pub(crate) fn is_terminal_phase(status: &PodStatus) -> bool {
    matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"))
}

/// The API's phases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Pending,
    Running,
    Succeeded,
    Failed,
}

impl Phase {
    fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Running => "Running",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
        }
    }
}

/// The phase container statuses add up to. Sidecars count only until the pod is initialised.
fn phase(spec: &PodSpec, status: &PodStatus, ended: bool) -> Phase {
    let policy = spec::restart_policy(spec);
    let inits = status
        .init_container_statuses
        .as_deref()
        .unwrap_or_default();
    let mains = status.container_statuses.as_deref().unwrap_or_default();
    let main_ran = mains
        .iter()
        .any(|s| has_ended(s).is_some() || is_running(s));
    let mut pending_init = false;
    for container in spec::containers(spec) {
        let own = inits.iter().find(|s| s.name == container.spec.name);
        match container.kind {
            ContainerKind::Init => match own.and_then(has_ended) {
                Some(0) => {}
                Some(code) if !spec::should_restart(spec, container, code) => return Phase::Failed,
                Some(_) | None => pending_init |= !main_ran,
            },
            ContainerKind::Sidecar => {
                pending_init |= !main_ran && own.is_none_or(|s| s.started != Some(true));
            }
            ContainerKind::Main | ContainerKind::Ephemeral => {}
        }
    }
    if pending_init {
        return Phase::Pending;
    }
    let running = mains.iter().filter(|s| is_running(s)).count();
    let ends: Vec<i32> = mains.iter().filter_map(has_ended).collect();
    let waiting = mains.len().saturating_sub(running + ends.len());
    if waiting > 0 || mains.is_empty() {
        return Phase::Pending;
    }
    if running > 0 {
        return Phase::Running;
    }
    let succeeded = ends.iter().all(|code| *code == 0);
    match (ended, policy, succeeded) {
        (true, _, true) => Phase::Succeeded,
        (true, _, false) => Phase::Failed,
        (false, RestartPolicy::Always, _) => Phase::Running,
        (false, RestartPolicy::OnFailure | RestartPolicy::Never, true) => Phase::Succeeded,
        (false, RestartPolicy::Never, false) => Phase::Failed,
        (false, RestartPolicy::OnFailure, false) => Phase::Running,
    }
}

/// Whether a container has a process.
fn is_running(status: &ContainerStatus) -> bool {
    status.state.as_ref().is_some_and(|s| s.running.is_some())
}

/// Exit code of a container that has no process but had one.
fn has_ended(status: &ContainerStatus) -> Option<i32> {
    if is_running(status) {
        return None;
    }
    let of =
        |s: &k8s_openapi::api::core::v1::ContainerState| s.terminated.as_ref().map(|t| t.exit_code);
    let now = status.state.as_ref().and_then(of);
    now.or_else(|| status.last_state.as_ref().and_then(of))
}

/// Fills in addresses; whether the pod's network is ready now.
fn addresses(input: &DeriveInput<'_>, spec: &PodSpec, status: &mut PodStatus) -> bool {
    let host_network = spec.host_network == Some(true);
    let ready = input.observed.ready_sandbox();
    status.host_ip = input
        .host_ips
        .first()
        .cloned()
        .or_else(|| input.previous.host_ip.clone());
    let host_ips: Vec<_> = input
        .host_ips
        .iter()
        .map(|ip| HostIP { ip: ip.clone() })
        .collect();
    status.host_ips = Some(host_ips)
        .filter(|ips| !ips.is_empty())
        .or_else(|| input.previous.host_ips.clone());
    let own: Vec<String> = match ready {
        Some(_) if host_network => input.host_ips.to_vec(),
        Some(sandbox) => sandbox.ips.iter().map(ToString::to_string).collect(),
        None => Vec::new(),
    };
    // A sandbox that is gone or being replaced leaves the last address: users look for it.
    if own.is_empty() {
        status.pod_ip = input.previous.pod_ip.clone();
        status.pod_ips = input.previous.pod_ips.clone();
    } else {
        status.pod_ip = own.first().cloned();
        status.pod_ips = Some(own.into_iter().map(|ip| PodIP { ip }).collect());
    }
    ready.is_some_and(|s| host_network || !s.ips.is_empty())
}
