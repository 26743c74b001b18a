//! A pod that shall run: which containers start, wait, or are replaced.

use super::kill::{self, Doom};
use super::resize::killed_for_resize;
use super::{Action, KillReason, PlanInput, PodPlan, StartContainer, Waiting};
use crate::launch::ANNOTATION_HASH;
use crate::launch::hash::container_hash;
use crate::observe;
use crate::pod::hooks;
use crate::pod::rounds::Round;
use crate::pod::spec::{self, ContainerKind, ContainerRef};
use crate::pod::state::{Cause, CrashBackoff, Lifecycle, SECOND_NS, Step, UnhealthyKind};
use k8s_openapi::api::core::v1::PodSpec;
use runtime::service::{ContainerState, ContainerStatus, SandboxState, SandboxStatus};

/// A round lasts at least this long from the start of the container that ends it: one that asks
/// for the next at once would keep the node busy with nothing else.
const ROUND_MIN_NS: i64 = SECOND_NS;

/// A container that shall get a new instance.
struct Wanted<'a> {
    name: &'a str,
    attempt: u32,
    replaces: Option<&'a ContainerStatus>,
    finished_ns: Option<i64>,
}

/// The instances of a container whose turn it is.
#[derive(Clone, Copy)]
struct Turn<'a> {
    /// The newest, if it was made in this sandbox and this round.
    current: Option<&'a ContainerStatus>,
    /// The newest of all.
    newest: Option<&'a ContainerStatus>,
    /// The next instance is its first in this round, and there were rounds before.
    first_of_round: bool,
}

/// Why a pod is over by itself: a failed init container, or main containers that all ended and
/// will not run again.
pub(super) fn verdict(input: &PlanInput<'_>) -> Option<Cause> {
    let spec = input.spec()?;
    let round = Round::of(spec, input.observed);
    if input.steps.starts.values().any(Step::is_running) {
        return None;
    }
    let over = |c: ContainerRef<'_>| {
        input
            .observed
            .newest(&c.spec.name)
            .filter(|instance| !round.is_past(instance) && !killed_for_resize(input, instance))
            .and_then(observe::exit)
            .is_some_and(|(code, _)| !spec::should_restart(spec, c, code))
    };
    let failed_init = spec::containers(spec).any(|c| {
        c.kind == ContainerKind::Init
            && over(c)
            && input
                .observed
                .newest(&c.spec.name)
                .and_then(observe::exit)
                .is_some_and(|e| e.0 != 0)
    });
    let mut mains = spec::containers(spec)
        .filter(|c| c.kind == ContainerKind::Main)
        .peekable();
    let mains_over = mains.peek().is_some() && mains.all(over);
    (failed_init || mains_over).then_some(Cause::Completed)
}

/// Plans a running pod.
pub(super) fn plan(input: &PlanInput<'_>) -> PodPlan {
    let mut plan = PodPlan {
        lifecycle: Lifecycle::Syncing,
        ..PodPlan::default()
    };
    plan.wake_at(super::deadline_ns(input));
    let Some(spec) = input.spec() else {
        return plan;
    };
    if input.steps.volumes.is_due(input.now_ns) {
        plan.actions.push(Action::PrepareVolumes);
    }
    plan.wake_at(input.steps.volumes.retry_at_ns());
    let sandbox = sandbox(input, &mut plan);
    let round = Round::of(spec, input.observed);
    let mut starts = ephemeral(input, spec);
    if end_round(input, spec, round, &mut plan) {
        replace_unfit(input, spec, &mut plan);
        super::resize::plan(input, sandbox, &mut plan);
        starts.extend(wanted(input, spec, sandbox, round, &mut plan));
    }
    prefetch(input, spec, &mut plan);
    for want in starts {
        start(input, sandbox, round.next(), &want, &mut plan);
    }
    super::keep::collect(input, &mut plan);
    plan
}

/// The sandbox to start containers in; plans one when there is none that works.
fn sandbox<'a>(input: &PlanInput<'a>, plan: &mut PodPlan) -> Option<&'a SandboxStatus> {
    let newest = input.observed.newest_sandbox();
    let attempt = match newest {
        Some(s) if s.state == SandboxState::Ready && !input.steps.sandbox.is_running() => {
            return Some(s);
        }
        Some(s) => s.config.attempt.saturating_add(1),
        None => 0,
    };
    if input.steps.sandbox.is_running() {
        return None;
    }
    // Addresses and host ports of a lost sandbox go back before its successor asks for them.
    for old in &input.observed.sandboxes {
        let stop = input.steps.sandbox_stops.get(&old.id);
        if stop == Some(&Step::Done) {
            continue;
        }
        if stop.is_none_or(|s| s.is_due(input.now_ns)) {
            plan.actions.push(Action::StopSandbox(old.id.clone()));
        }
        plan.wake_at(stop.and_then(Step::retry_at_ns));
        return None;
    }
    if input.steps.sandbox.is_due(input.now_ns) {
        plan.actions.push(Action::RunSandbox { attempt });
    }
    plan.wake_at(input.steps.sandbox.retry_at_ns());
    None
}

/// Ends a round that a container wants to be the last: kills what runs, main containers before
/// those they rely on. Whether containers may be started.
fn end_round(input: &PlanInput<'_>, spec: &PodSpec, round: Round<'_>, plan: &mut PodPlan) -> bool {
    let Some(source) = round.source() else {
        return true;
    };
    let running = || {
        spec::containers(spec).filter_map(|c| {
            let mut instances = input.observed.instances(&c.spec.name);
            Some((c.kind, instances.find(|i| observe::is_running(i))?))
        })
    };
    let mains = running().any(|(kind, _)| kind == ContainerKind::Main);
    for (kind, instance) in running() {
        if mains && kind != ContainerKind::Main {
            continue;
        }
        let doom = Doom {
            deadline_ns: input.now_ns,
            reason: KillReason::RestartAll,
            turn: true,
        };
        kill::kill(input, instance, doom, plan);
    }
    let starting = spec::containers(spec)
        .filter_map(|c| input.steps.starts.get(&c.spec.name))
        .any(Step::is_running);
    if starting || running().next().is_some() {
        return false;
    }
    let due_ns = source.created_at_ns.saturating_add(ROUND_MIN_NS);
    if due_ns > input.now_ns {
        plan.wake_at(Some(due_ns));
    }
    due_ns <= input.now_ns
}

/// Kills instances that failed a probe or whose image changed.
fn replace_unfit(input: &PlanInput<'_>, spec: &PodSpec, plan: &mut PodPlan) {
    for container in spec::containers(spec) {
        let Some(instance) = input
            .observed
            .newest(&container.spec.name)
            .filter(|c| observe::is_running(c))
        else {
            continue;
        };
        let reason = match input.health.unhealthy.get(&instance.id) {
            Some(UnhealthyKind::Liveness) => KillReason::Liveness,
            Some(UnhealthyKind::Startup) => KillReason::Startup,
            Some(UnhealthyKind::PostStart) => KillReason::PostStart,
            None if is_outdated(container, instance) => KillReason::SpecChanged,
            None if input.resize.restarts(input.pod, instance) => KillReason::Resize,
            None => continue,
        };
        let probe_grace = match reason {
            KillReason::Liveness => container.spec.liveness_probe.as_ref(),
            KillReason::Startup => container.spec.startup_probe.as_ref(),
            KillReason::SpecChanged
            | KillReason::RestartAll
            | KillReason::Resize
            | KillReason::PodEnds
            | KillReason::PostStart => None,
        }
        .and_then(|p| p.termination_grace_period_seconds)
        .and_then(|s| u64::try_from(s).ok());
        let grace_s = probe_grace.unwrap_or_else(|| spec::grace_seconds(input.pod));
        let doom = Doom {
            deadline_ns: kill::deadline_ns(input.now_ns, grace_s),
            reason,
            turn: true,
        };
        kill::kill(input, instance, doom, plan);
    }
}

/// Whether an instance was made from another image than the spec asks for now. Finished init
/// containers do not matter.
fn is_outdated(container: ContainerRef<'_>, instance: &ContainerStatus) -> bool {
    let recorded = instance.config.annotations.get(ANNOTATION_HASH);
    container.kind != ContainerKind::Init
        && recorded.is_some_and(|hash| *hash != container_hash(container.spec))
}

/// Containers that shall get an instance now, in order. Says why the others wait.
fn wanted<'a>(
    input: &PlanInput<'a>,
    spec: &'a PodSpec,
    sandbox: Option<&SandboxStatus>,
    round: Round<'_>,
    plan: &mut PodPlan,
) -> Vec<Wanted<'a>> {
    let counts =
        |c: &ContainerStatus| sandbox.is_some_and(|s| s.id == c.sandbox_id) && !round.is_past(c);
    let initialized = spec::containers(spec).any(|c| {
        c.kind == ContainerKind::Main && input.observed.newest(&c.spec.name).is_some_and(counts)
    });
    let mut wanted = Vec::new();
    let mut blocked = false;
    // Main containers wait for nobody but for the postStart hooks of those before them.
    let mut held = false;
    for container in spec::containers(spec) {
        let name = &container.spec.name;
        let newest = input.observed.newest(name);
        let turn = Turn {
            current: newest.filter(|c| counts(c)),
            newest,
            first_of_round: newest.is_some_and(|c| round.is_past(c)),
        };
        let current = turn.current;
        match container.kind {
            ContainerKind::Init => {
                let succeeded = current
                    .and_then(observe::exit)
                    .is_some_and(|(code, _)| code == 0);
                if initialized || blocked || succeeded {
                    continue;
                }
                blocked = true;
                wanted.extend(want(input, spec, container, turn, plan));
            }
            ContainerKind::Sidecar => {
                if blocked && !initialized {
                    continue;
                }
                let started = current.is_some_and(|c| {
                    observe::is_running(c)
                        // In flight until its postStart hook is through.
                        && !input.steps.starts.get(name).is_some_and(Step::is_running)
                        && (container.spec.startup_probe.is_none()
                            || input.health.started.get(&c.id) == Some(&true))
                });
                blocked |= !started && !initialized;
                wanted.extend(want(input, spec, container, turn, plan));
            }
            ContainerKind::Main => {
                if blocked {
                    continue;
                }
                let next = want(input, spec, container, turn, plan);
                let next = next.filter(|_| !held);
                held |= holds(input, container, next.is_some());
                wanted.extend(next);
            }
            // See [`ephemeral`].
            ContainerKind::Ephemeral => {}
        }
    }
    wanted
}

/// Whether the main containers after this one have to wait until its postStart hook is through:
/// it is being started, or is about to be. One that cannot be started holds nobody.
fn holds(input: &PlanInput<'_>, container: ContainerRef<'_>, wanted: bool) -> bool {
    let name = &container.spec.name;
    let (start, image) = (input.steps.starts.get(name), input.steps.images.get(name));
    let failing = [start, image]
        .iter()
        .flatten()
        .any(|s| s.failure().is_some());
    hooks::post_start(container.spec).is_some()
        && (start.is_some_and(Step::is_running) || wanted && !failing)
}

/// Ephemeral containers that never had an instance. They wait for nobody and run once: one that
/// ran, as far as anybody knows, does not run again.
fn ephemeral<'a>(input: &PlanInput<'a>, spec: &'a PodSpec) -> Vec<Wanted<'a>> {
    let status = input.pod.status.as_ref();
    let reported = status.and_then(|s| s.ephemeral_container_statuses.as_deref());
    let reported = reported.unwrap_or_default();
    spec::ephemeral_containers(spec)
        .filter_map(|container| {
            let name = container.name.as_str();
            let ran = |s: &k8s_openapi::api::core::v1::ContainerStatus| {
                s.name == name && s.container_id.as_deref().is_some_and(|id| !id.is_empty())
            };
            let replaces = match input.observed.newest(name) {
                _ if input.steps.starts.get(name).is_some_and(Step::is_running) => return None,
                None if reported.iter().any(ran) => return None,
                None => None,
                // Its maker was killed before it started; nobody saw it run.
                Some(c) if c.state == ContainerState::Created => Some(c),
                Some(_) => return None,
            };
            Some(Wanted {
                name,
                attempt: 0,
                replaces,
                finished_ns: None,
            })
        })
        .collect()
}

/// Whether one container, whose turn it is, needs a new instance now.
fn want<'a>(
    input: &PlanInput<'a>,
    spec: &'a PodSpec,
    container: ContainerRef<'a>,
    turn: Turn<'a>,
    plan: &mut PodPlan,
) -> Option<Wanted<'a>> {
    let name = &container.spec.name;
    // Never two at once, not even across sandboxes.
    if input.observed.instances(name).any(observe::is_running)
        || input.steps.starts.get(name).is_some_and(Step::is_running)
    {
        return None;
    }
    let Some(newest) = turn.newest else {
        let attempt = reported_restarts(input, container);
        return Some(Wanted {
            name,
            attempt,
            replaces: None,
            finished_ns: None,
        });
    };
    match &newest.state {
        // Its maker was killed before it started; nobody saw it run.
        ContainerState::Created => Some(Wanted {
            name,
            attempt: newest.config.attempt,
            replaces: Some(newest),
            finished_ns: None,
        }),
        ContainerState::Running { .. } => None,
        // Nobody waits for the crashes of the round before.
        ContainerState::Exited { .. } if turn.first_of_round => Some(Wanted {
            name,
            attempt: newest.config.attempt.saturating_add(1),
            replaces: None,
            finished_ns: None,
        }),
        ContainerState::Exited {
            exit_code,
            finished_at_ns,
            ..
        } => {
            // In a new sandbox init containers run again even if they succeeded before.
            let again = container.kind == ContainerKind::Init && turn.current.is_none()
                || killed_for_resize(input, newest);
            if !again && !spec::should_restart(spec, container, *exit_code) {
                return None;
            }
            // Another definition begins anew.
            let backoff = input.backoffs.get(name);
            let backoff = backoff.filter(|_| !is_outdated(container, newest));
            let wait = CrashBackoff::wait_until(backoff, *finished_at_ns, input.now_ns);
            if let (Some(until_ns), Some(backoff)) = (wait, backoff) {
                plan.wake_at(Some(until_ns));
                let waiting = crash_loop(input, name, backoff);
                plan.waiting.insert(name.clone(), waiting);
                return None;
            }
            Some(Wanted {
                name,
                attempt: newest.config.attempt.saturating_add(1),
                replaces: None,
                finished_ns: Some(*finished_at_ns),
            })
        }
    }
}

/// What users read while a container waits for its restart.
fn crash_loop(input: &PlanInput<'_>, container: &str, backoff: &CrashBackoff) -> Waiting {
    Waiting {
        reason: "CrashLoopBackOff".to_owned(),
        message: format!(
            "back-off {} restarting failed container={container} pod={}",
            go_duration(backoff.delay_seconds()),
            spec::describe(input.pod)
        ),
    }
}

/// Seconds as Go prints a duration: `10s`, `1m20s`, `5m0s`.
fn go_duration(seconds: i64) -> String {
    match (seconds / 60, seconds % 60) {
        (0, s) => format!("{s}s"),
        (m, s) => format!("{m}m{s}s"),
    }
}

/// The restart count to go on from when the runtime lost every instance: what the apiserver was
/// told, plus one.
fn reported_restarts(input: &PlanInput<'_>, container: ContainerRef<'_>) -> u32 {
    let status = input.pod.status.as_ref();
    let statuses = match container.kind {
        ContainerKind::Init | ContainerKind::Sidecar => {
            status.and_then(|s| s.init_container_statuses.as_ref())
        }
        ContainerKind::Main => status.and_then(|s| s.container_statuses.as_ref()),
        ContainerKind::Ephemeral => None,
    };
    statuses
        .and_then(|all| all.iter().find(|s| s.name == container.spec.name))
        .filter(|s| s.container_id.as_deref().is_some_and(|id| !id.is_empty()))
        .map_or(0, |s| {
            u32::try_from(s.restart_count)
                .unwrap_or(0)
                .saturating_add(1)
        })
}

/// Images of containers that never ran are fetched beside everything else.
fn prefetch(input: &PlanInput<'_>, spec: &PodSpec, plan: &mut PodPlan) {
    for container in spec::containers(spec) {
        if input.observed.newest(&container.spec.name).is_none() {
            ensure_image(input, &container.spec.name, plan);
        }
    }
}

/// Plans the image of a container unless it is there or under way; whether it is there.
fn ensure_image(input: &PlanInput<'_>, name: &str, plan: &mut PodPlan) -> bool {
    let step = input.steps.images.get(name);
    if let Some(failure) = step.and_then(Step::failure) {
        plan.waiting.insert(
            name.to_owned(),
            Waiting {
                reason: failure.reason.clone(),
                message: failure.message.clone(),
            },
        );
    }
    plan.wake_at(step.and_then(Step::retry_at_ns));
    let action = Action::EnsureImage {
        container: name.to_owned(),
    };
    if step.is_none_or(|s| s.is_due(input.now_ns)) && !plan.actions.contains(&action) {
        plan.actions.push(action);
    }
    step == Some(&Step::Done)
}

/// Starts a wanted container once sandbox, volumes and image are there.
fn start(
    input: &PlanInput<'_>,
    sandbox: Option<&SandboxStatus>,
    round: u32,
    want: &Wanted<'_>,
    plan: &mut PodPlan,
) {
    let name = want.name;
    let image = ensure_image(input, name, plan);
    let step = input.steps.starts.get(name);
    if let Some(failure) = step.and_then(Step::failure) {
        plan.waiting.insert(
            name.to_owned(),
            Waiting {
                reason: failure.reason.clone(),
                message: failure.message.clone(),
            },
        );
    }
    plan.wake_at(step.and_then(Step::retry_at_ns));
    let due = step.is_none_or(|s| *s == Step::Done || s.is_due(input.now_ns));
    let Some(sandbox) = sandbox.filter(|_| image && due && input.steps.volumes == Step::Done)
    else {
        return;
    };
    plan.actions.push(Action::StartContainer(StartContainer {
        container: name.to_owned(),
        sandbox: sandbox.id.clone(),
        attempt: want.attempt,
        round,
        replaces: want.replaces.map(|c| c.id.clone()),
        predecessor_finished_ns: want.finished_ns,
    }));
}
