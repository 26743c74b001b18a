//! Container statuses from what the runtime holds. Pure.

use super::derive::{DeriveInput, time};
use super::resources;
use crate::observe;
use crate::pod::rounds::{self, Round};
use crate::pod::spec::{self, ContainerKind, ContainerRef};
use crate::pod::state::{Lifecycle, Step};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated,
    ContainerStateWaiting, ContainerStatus, ContainerUser, LinuxContainerUser, PodSpec,
    VolumeMountStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use runtime::service as rt;

/// Scheme of container ids in the API.
pub(super) const ID_SCHEME: &str = "ferrule://";
/// When a container began that never did.
const EPOCH: Time = Time(Timestamp::UNIX_EPOCH);
/// Exit code of a container whose end nobody saw.
const UNKNOWN_EXIT: i32 = 137;
/// What users read of a container that another one's end started anew.
const RESTARTING_ALL: &str = "RestartingAllContainers";
const RESTARTING_ALL_TEXT: &str = "The container is removed because RestartAllContainers in place";

/// Container statuses of a pod, by the lists they go to.
#[derive(Debug, Default)]
pub(super) struct Statuses {
    /// Init containers and sidecars, in the order of the spec.
    pub(super) init: Vec<ContainerStatus>,
    /// Main containers, by name.
    pub(super) main: Vec<ContainerStatus>,
    /// Ephemeral containers, by name.
    pub(super) ephemeral: Vec<ContainerStatus>,
}

/// Statuses of all containers of the spec.
pub(super) fn statuses(input: &DeriveInput<'_>, spec: &PodSpec) -> Statuses {
    let round = Round::of(spec, input.observed);
    let mut all = Statuses::default();
    for container in spec::containers(spec) {
        let status = one(input, spec, container, round);
        match container.kind {
            ContainerKind::Init | ContainerKind::Sidecar => all.init.push(status),
            ContainerKind::Main => all.main.push(status),
            ContainerKind::Ephemeral => all.ephemeral.push(status),
        }
    }
    for ephemeral in spec::ephemeral_containers(spec) {
        let shaped = spec::as_container(ephemeral);
        let container = ContainerRef {
            kind: ContainerKind::Ephemeral,
            spec: &shaped,
        };
        all.ephemeral.push(one(input, spec, container, round));
    }
    all.main.sort_by(|a, b| a.name.cmp(&b.name));
    all.ephemeral.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

/// The status reported before for a container.
fn before<'a>(input: &DeriveInput<'a>, container: ContainerRef<'_>) -> Option<&'a ContainerStatus> {
    let list = match container.kind {
        ContainerKind::Init | ContainerKind::Sidecar => &input.previous.init_container_statuses,
        ContainerKind::Main => &input.previous.container_statuses,
        ContainerKind::Ephemeral => &input.previous.ephemeral_container_statuses,
    };
    list.iter()
        .flatten()
        .find(|s| s.name == container.spec.name)
}

/// One container.
fn one(
    input: &DeriveInput<'_>,
    spec: &PodSpec,
    container: ContainerRef<'_>,
    round: Round<'_>,
) -> ContainerStatus {
    let name = &container.spec.name;
    let newest = input.observed.newest(name);
    let before = before(input, container);
    let awaited = newest.filter(|c| awaits_round(input, spec, container, round, c));
    let (state, last_state) = match awaited {
        Some(instance) => between_rounds(input, spec, container, round, instance),
        None => states(input, spec, container, newest, before, round),
    };
    let running = state.running.is_some();
    let started = running
        && newest.is_some_and(|c| {
            container.spec.startup_probe.is_none() || input.health.started.get(&c.id) == Some(&true)
        });
    let completed_init = container.kind == ContainerKind::Init
        && state.terminated.as_ref().is_some_and(|t| t.exit_code == 0);
    // Init containers are ready when they are through, ephemeral ones never.
    let serves = match container.kind {
        ContainerKind::Main | ContainerKind::Sidecar => true,
        ContainerKind::Init | ContainerKind::Ephemeral => false,
    };
    let ready = completed_init
        || serves
            && started
            && newest.is_some_and(|c| {
                container.spec.readiness_probe.is_none()
                    || input.health.ready.get(&c.id) == Some(&true)
            });
    ContainerStatus {
        name: name.clone(),
        state: Some(state),
        last_state,
        ready,
        started: (container.kind != ContainerKind::Ephemeral).then_some(started),
        // Never fewer than were told: one that ends between two rounds had its next one counted.
        restart_count: newest
            .map_or(0, |c| {
                let next = u32::from(awaited.is_some());
                i32::try_from(c.config.attempt.saturating_add(next)).unwrap_or(i32::MAX)
            })
            .max(before.map_or(0, |b| b.restart_count)),
        image: newest.map_or_else(
            || container.spec.image.clone().unwrap_or_default(),
            |c| c.config.user_image.clone(),
        ),
        image_id: newest.map_or_else(
            || before.map(|b| b.image_id.clone()).unwrap_or_default(),
            |c| c.image_ref.clone(),
        ),
        container_id: newest
            .filter(|c| !matches!(c.state, rt::ContainerState::Created))
            .map(|c| format!("{ID_SCHEME}{}", c.id))
            .or_else(|| before.and_then(|b| b.container_id.clone())),
        allocated_resources: newest.and_then(|_| resources::allocated(container.spec)),
        resources: newest.map(|c| resources::in_force(container.spec, c)),
        volume_mounts: volume_mounts(container.spec),
        user: newest.and_then(user),
        ..ContainerStatus::default()
    }
}

/// Whether a container waits for its first instance in a round that has begun, or begins once no
/// process is left.
fn awaits_round(
    input: &DeriveInput<'_>,
    spec: &PodSpec,
    container: ContainerRef<'_>,
    round: Round<'_>,
    newest: &rt::ContainerStatus,
) -> bool {
    let is_running = |c: ContainerRef<'_>| {
        let mut instances = input.observed.instances(&c.spec.name);
        instances.any(observe::is_running)
    };
    container.kind != ContainerKind::Ephemeral
        && matches!(input.lifecycle, Lifecycle::Syncing)
        && round.is_past(newest)
        && !observe::is_running(newest)
        && (round.source().is_none() || !spec::containers(spec).any(is_running))
}

/// State and last state of a container that waits for its first instance in a round.
fn between_rounds(
    input: &DeriveInput<'_>,
    spec: &PodSpec,
    container: ContainerRef<'_>,
    round: Round<'_>,
    newest: &rt::ContainerStatus,
) -> (ContainerState, Option<ContainerState>) {
    let state = match round.source() {
        Some(_) => waiting_state(RESTARTING_ALL, Some(RESTARTING_ALL_TEXT.to_owned())),
        None => waits(input, spec, &container.spec.name),
    };
    let last = terminated(input, newest).map(|end| {
        if rounds::is_source(container, newest) {
            end
        } else {
            restarted(end)
        }
    });
    (state, last)
}

/// The end of an instance as the stock kubelet tells it when another container's end started all
/// anew.
fn restarted(mut end: ContainerState) -> ContainerState {
    if let Some(terminated) = &mut end.terminated {
        terminated.reason = Some(RESTARTING_ALL.to_owned());
        terminated.message = Some(RESTARTING_ALL_TEXT.to_owned());
        terminated.exit_code = UNKNOWN_EXIT;
        terminated.signal = None;
    }
    end
}

/// Why a container waits: what the plan says, else that its turn has not come.
fn waits(input: &DeriveInput<'_>, spec: &PodSpec, name: &str) -> ContainerState {
    let Some(waiting) = input.waiting.get(name) else {
        let has_init = spec.init_containers.as_ref().is_some_and(|c| !c.is_empty());
        let reason = if has_init {
            "PodInitializing"
        } else {
            "ContainerCreating"
        };
        return waiting_state(reason, None);
    };
    let message = Some(waiting.message.clone()).filter(|m| !m.is_empty());
    waiting_state(&waiting.reason, message)
}

/// State and last state.
fn states(
    input: &DeriveInput<'_>,
    spec: &PodSpec,
    container: ContainerRef<'_>,
    newest: Option<&rt::ContainerStatus>,
    before: Option<&ContainerStatus>,
    round: Round<'_>,
) -> (ContainerState, Option<ContainerState>) {
    let name = &container.spec.name;
    let dead = input.observed.newest_dead(name);
    let ended = || {
        let state = dead.and_then(|c| terminated(input, c))?;
        let older = dead.is_some_and(|c| round.is_older(c) && !rounds::is_source(container, c));
        Some(if older { restarted(state) } else { state })
    };
    let last = || ended().or_else(|| unknown_end(input, before));
    let kept_last = || {
        before
            .and_then(|b| b.last_state.clone())
            .filter(|s| *s != ContainerState::default())
    };
    let waiting = || waits(input, spec, name);
    let Some(instance) = newest else {
        return lost(input, before).map_or_else(
            || (waiting(), unknown_end(input, before).or_else(kept_last)),
            |state| (state, kept_last()),
        );
    };
    match &instance.state {
        rt::ContainerState::Running { .. }
            if input.starts.get(name).is_some_and(Step::is_running) =>
        {
            (waiting(), last().or_else(kept_last))
        }
        rt::ContainerState::Running { started_at_ns, .. } => {
            let running = ContainerState {
                running: Some(ContainerStateRunning {
                    started_at: time(*started_at_ns),
                }),
                ..ContainerState::default()
            };
            (running, ended().or_else(kept_last))
        }
        rt::ContainerState::Created => match lost(input, before) {
            Some(state) => (state, kept_last()),
            None => (waiting(), last().or_else(kept_last)),
        },
        rt::ContainerState::Exited { exit_code, .. } => {
            let again = matches!(input.lifecycle, Lifecycle::Syncing)
                && (spec::should_restart(spec, container, *exit_code)
                    || input.waiting.contains_key(name));
            if again && input.waiting.contains_key(name) {
                (waiting(), last())
            } else {
                let id = format!("{ID_SCHEME}{}", instance.id);
                // The end that is the state now is not also the one before.
                let older = kept_last().filter(|s| {
                    s.terminated
                        .as_ref()
                        .is_some_and(|t| t.container_id.as_ref() != Some(&id))
                });
                (terminated(input, instance).unwrap_or_default(), older)
            }
        }
    }
}

/// A container the runtime does not hold although its pod has ended: the end reported before, or
/// one nobody saw.
fn lost(input: &DeriveInput<'_>, before: Option<&ContainerStatus>) -> Option<ContainerState> {
    if matches!(input.lifecycle, Lifecycle::Syncing) {
        return None;
    }
    let state = before.and_then(|b| b.state.as_ref());
    if let Some(ended) = state.filter(|s| s.terminated.is_some()) {
        return Some(ended.clone());
    }
    if let Some(crashed) = state.filter(|s| s.waiting.is_some()) {
        return Some(crashed.clone()).filter(|_| !has_id(before));
    }
    has_id(before).then(|| unknown(before.and_then(|b| b.container_id.clone())))
}

/// Whether a container had an instance as far as the apiserver knows.
fn has_id(before: Option<&ContainerStatus>) -> bool {
    before
        .and_then(|b| b.container_id.as_deref())
        .is_some_and(|id| !id.is_empty())
}

/// The last state of a container that was running as far as the apiserver knows, and is lost.
fn unknown_end(
    input: &DeriveInput<'_>,
    before: Option<&ContainerStatus>,
) -> Option<ContainerState> {
    let was_running = before
        .and_then(|b| b.state.as_ref())
        .is_some_and(|s| s.running.is_some());
    (was_running && matches!(input.lifecycle, Lifecycle::Syncing))
        .then(|| unknown(before.and_then(|b| b.container_id.clone())))
}

/// An end nobody saw.
pub(super) fn unknown(container_id: Option<String>) -> ContainerState {
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: UNKNOWN_EXIT,
            reason: Some("ContainerStatusUnknown".to_owned()),
            message: Some(
                "The container could not be located when the pod was terminated".to_owned(),
            ),
            container_id,
            ..ContainerStateTerminated::default()
        }),
        ..ContainerState::default()
    }
}

/// A waiting state.
fn waiting_state(reason: &str, message: Option<String>) -> ContainerState {
    ContainerState {
        waiting: Some(ContainerStateWaiting {
            reason: Some(reason.to_owned()),
            message,
        }),
        ..ContainerState::default()
    }
}

/// The terminated state of a dead instance.
fn terminated(input: &DeriveInput<'_>, container: &rt::ContainerStatus) -> Option<ContainerState> {
    match &container.state {
        rt::ContainerState::Created | rt::ContainerState::Running { .. } => None,
        rt::ContainerState::Exited {
            started_at_ns,
            finished_at_ns,
            exit_code,
            signal,
            reason,
            message,
        } => {
            let own = input
                .termination_messages
                .get(&container.id)
                .filter(|m| !m.is_empty());
            let message = match (message.is_empty(), own) {
                (true, own) => own.cloned(),
                (false, None) => Some(message.clone()),
                (false, Some(own)) => Some(format!("{message}: {own}")),
            };
            Some(ContainerState {
                terminated: Some(ContainerStateTerminated {
                    container_id: Some(format!("{ID_SCHEME}{}", container.id)),
                    exit_code: *exit_code,
                    // The API's signal field is for those who have no exit code; 128+n says it.
                    signal: signal.filter(|_| *exit_code == 0),
                    reason: Some(reason.clone()).filter(|r| !r.is_empty()),
                    message,
                    // A container that never ran has the epoch there, as users know it.
                    started_at: time(*started_at_ns).or(Some(EPOCH)),
                    finished_at: time(*finished_at_ns),
                }),
                ..ContainerState::default()
            })
        }
    }
}

/// Mounts as they are; the mode of read-only ones spelled out.
fn volume_mounts(container: &Container) -> Option<Vec<VolumeMountStatus>> {
    let mounts = container.volume_mounts.as_ref().filter(|m| !m.is_empty())?;
    let status = mounts.iter().map(|m| VolumeMountStatus {
        name: m.name.clone(),
        mount_path: m.mount_path.clone(),
        read_only: m.read_only,
        recursive_read_only: (m.read_only == Some(true)).then(|| {
            match m.recursive_read_only.as_deref() {
                Some("Enabled" | "IfPossible") => "Enabled".to_owned(),
                _ => "Disabled".to_owned(),
            }
        }),
        ..VolumeMountStatus::default()
    });
    Some(status.collect())
}

/// Identity of the first process.
fn user(container: &rt::ContainerStatus) -> Option<ContainerUser> {
    let (uid, gid, groups) = container.user.as_ref()?;
    Some(ContainerUser {
        linux: Some(LinuxContainerUser {
            uid: i64::from(*uid),
            gid: i64::from(*gid),
            supplemental_groups: Some(groups.iter().map(|g| i64::from(*g)).collect::<Vec<_>>())
                .filter(|g| !g.is_empty()),
        }),
    })
}
