//! Starts and kills of containers, with their hooks.

use super::{Ended, Outcome, ending, engine_error};
use crate::events::{EventType, field_path};
use crate::launch::ANNOTATION_HASH;
use crate::launch::hash::container_hash;
use crate::observe::PodObservation;
use crate::pod::environment::{PodEnvironment, StartContext, StepError};
use crate::pod::hooks::{self, HookTarget};
use crate::pod::plan::{KillContainer, StartContainer};
use crate::pod::spec;
use crate::pod::worker::{Worker, WorkerDeps};
use k8s_openapi::api::core::v1::{Container, Pod};
use runtime::service::{ContainerId, NamespaceMode, RuntimeErrorKind, RuntimeService, SandboxId};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::AbortHandle;

/// Every container gets this long between stop signal and SIGKILL, even with no grace at all: a
/// process that ends on SIGTERM does so well within it.
const MINIMUM_GRACE: Duration = Duration::from_secs(2);

/// Creates and starts an instance.
pub(super) fn begin_start<R: RuntimeService, E: PodEnvironment>(
    worker: &mut Worker<R, E>,
    start: StartContainer,
    observed: &PodObservation,
) -> AbortHandle {
    let (deps, pod) = (worker.deps.clone(), worker.pod.clone());
    let image = worker.images.get(&start.container).cloned();
    let context = worker
        .volumes
        .clone()
        .zip(image)
        .map(|(volumes, image)| StartContext {
            attempt: start.attempt,
            pod_ips: pod_ips(&deps, &pod, observed, &start.sandbox),
            volumes,
            image,
        });
    let target = target(&pod, &start.container, observed);
    worker.actions.spawn(async move {
        let result = match context {
            Some(context) => start_container(&deps, &pod, &start, context, target).await,
            // The plan asks for both to be there first; asked again it will find them missing.
            None => Err(StepError::new(
                "ContainerCreating",
                "volumes or image are not there",
            )),
        };
        let ended = Ended::Start {
            container: start.container,
            predecessor_finished_ns: start.predecessor_finished_ns,
        };
        Outcome::new(ended, result)
    })
}

/// Whose processes a new container shall see besides those of its pod.
enum Target {
    /// Nobody's in particular.
    None,
    /// Those of this instance.
    Instance(ContainerId),
    /// Those of a container that has no instance.
    Missing(String),
}

/// The instance an ephemeral container was aimed at, whatever its state.
fn target(pod: &Pod, container: &str, observed: &PodObservation) -> Target {
    let found = pod
        .spec
        .as_ref()
        .and_then(|s| spec::container(s, container));
    let Some(name) = found.and_then(|f| f.target) else {
        return Target::None;
    };
    match observed.newest(name) {
        Some(instance) => Target::Instance(instance.id.clone()),
        None => Target::Missing(name.to_owned()),
    }
}

/// Stops an instance: preStop hook, stop signal, SIGKILL.
pub(super) fn begin_kill<R: RuntimeService, E: PodEnvironment>(
    worker: &mut Worker<R, E>,
    kill: KillContainer,
    observed: &PodObservation,
) -> AbortHandle {
    let (deps, pod) = (worker.deps.clone(), worker.pod.clone());
    let notes = worker.steps.kills.entry(kill.id.clone()).or_default();
    // A kill with a shorter grace does not run the hook again, nor wait for it.
    let hook = !std::mem::replace(&mut notes.hooked, true);
    let instance = observed.container(&kill.id);
    let pod_ips = instance.map(|c| pod_ips(&deps, &pod, observed, &c.sandbox_id));
    let pod_ip = pod_ips.and_then(|ips| ips.first().copied());
    worker.actions.spawn(async move {
        let mut grace = Duration::from_secs(kill.grace_s);
        if hook {
            let spent = pre_stop(&deps, &pod, &kill, pod_ip).await;
            grace = grace.saturating_sub(spent);
        }
        let grace = grace.max(MINIMUM_GRACE);
        let result = ending(deps.runtime.stop_container(&kill.id, grace).await);
        Outcome::new(Ended::Killed(kill.id), result)
    })
}

/// Addresses the containers of a sandbox see.
fn pod_ips<R: RuntimeService, E: PodEnvironment>(
    deps: &WorkerDeps<R, E>,
    pod: &Pod,
    observed: &PodObservation,
    sandbox: &SandboxId,
) -> Vec<IpAddr> {
    if pod
        .spec
        .as_ref()
        .is_some_and(|s| s.host_network == Some(true))
    {
        return deps
            .environment
            .host_ips()
            .iter()
            .filter_map(|ip| ip.parse().ok())
            .collect();
    }
    let sandbox = observed.sandboxes.iter().find(|s| s.id == *sandbox);
    sandbox.map(|s| s.ips.clone()).unwrap_or_default()
}

/// Creates and starts an instance. An entrypoint that cannot be run is no error here: the engine
/// has recorded an instance that ended, and the restart policy decides.
async fn start_container<R: RuntimeService, E: PodEnvironment>(
    deps: &WorkerDeps<R, E>,
    pod: &Arc<Pod>,
    start: &StartContainer,
    context: StartContext<E::Volumes, E::Image>,
    target: Target,
) -> Result<(), StepError> {
    let container = start.container.as_str();
    let path = field_path(pod, container);
    let event = |type_, reason: &str, text: String| {
        deps.events.pod_event(pod, Some(&path), type_, reason, text);
    };
    let failed = |reason: &str, message: String| {
        event(EventType::Warning, "Failed", format!("Error: {message}"));
        StepError::new(reason, message)
    };
    let spec = pod
        .spec
        .as_ref()
        .and_then(|s| spec::container(s, container));
    let Some(spec) = spec else {
        return Err(StepError::new(
            "InvalidContainer",
            format!("no container {container:?}"),
        ));
    };
    if let Some(half_made) = &start.replaces {
        let removed = deps.runtime.remove_container(half_made).await;
        removed.map_err(|e| failed("CreateContainerError", e.message))?;
    }
    let pid = match target {
        Target::None => None,
        Target::Instance(id) => Some(NamespaceMode::Target(id)),
        Target::Missing(name) => {
            let message = format!("unable to find target container {name}");
            return Err(failed("CreateContainerConfigError", message));
        }
    };
    let pod_ip = context.pod_ips.first().copied();
    let config = deps
        .environment
        .container_config(pod, &spec.spec, context)
        .await;
    let mut config = config.inspect_err(|e| {
        event(
            EventType::Warning,
            "Failed",
            format!("Error: {}", e.message),
        );
    })?;
    config.attempt = start.attempt;
    config.pid = pid.or(config.pid);
    config
        .annotations
        .insert(ANNOTATION_HASH.to_owned(), container_hash(&spec.spec));
    let id = match deps.runtime.create_container(&start.sandbox, config).await {
        Ok(id) => id,
        Err(error) => return Err(failed("CreateContainerError", error.message)),
    };
    event(EventType::Normal, "Created", "Container created".to_owned());
    match deps.runtime.start_container(&id).await {
        Ok(()) => {
            event(EventType::Normal, "Started", "Container started".to_owned());
            post_start(deps, pod, &spec.spec, &id, pod_ip).await
        }
        Err(error) => {
            let step = failed("RunContainerError", error.message);
            match error.kind {
                RuntimeErrorKind::StartFailed => Ok(()),
                RuntimeErrorKind::NotFound
                | RuntimeErrorKind::Invalid
                | RuntimeErrorKind::Network
                | RuntimeErrorKind::ImagePull
                | RuntimeErrorKind::Conflict
                | RuntimeErrorKind::Timeout
                | RuntimeErrorKind::System => Err(step),
            }
        }
    }
}

/// Runs the postStart hook. A container whose hook failed is killed; the restart policy decides.
async fn post_start<R: RuntimeService, E: PodEnvironment>(
    deps: &WorkerDeps<R, E>,
    pod: &Arc<Pod>,
    container: &Container,
    id: &ContainerId,
    pod_ip: Option<IpAddr>,
) -> Result<(), StepError> {
    let Some(hook) = hooks::post_start(container) else {
        return Ok(());
    };
    let target = HookTarget {
        id,
        container,
        pod_ip,
    };
    let Err(error) = hooks::run(&deps.runtime, hook, target, None).await else {
        return Ok(());
    };
    let path = field_path(pod, &container.name);
    let warning = EventType::Warning;
    deps.events.pod_event(
        pod,
        Some(&path),
        warning,
        "FailedPostStartHook",
        format!("PostStartHook failed: {error}"),
    );
    let grace = Duration::from_secs(spec::grace_seconds(pod)).max(MINIMUM_GRACE);
    let stopped = deps.runtime.stop_container(id, grace).await;
    stopped.map_err(|e| engine_error("PostStartHookError", &e))
}

/// Runs the preStop hook within the grace; how long it took.
async fn pre_stop<R: RuntimeService, E: PodEnvironment>(
    deps: &WorkerDeps<R, E>,
    pod: &Arc<Pod>,
    kill: &KillContainer,
    pod_ip: Option<IpAddr>,
) -> Duration {
    let (id, container) = (&kill.id, kill.container.as_str());
    let grace = Duration::from_secs(kill.grace_s);
    let Some((spec, hook)) = hooks::pre_stop(pod, container).filter(|_| !grace.is_zero()) else {
        return Duration::ZERO;
    };
    let began = tokio::time::Instant::now();
    let target = HookTarget {
        id,
        container: spec,
        pod_ip,
    };
    let run = hooks::run(&deps.runtime, hook, target, Some(grace));
    let error = match tokio::time::timeout(grace, run).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error),
        Err(_) => Some(format!(
            "PreStop hook did not end within {} s",
            grace.as_secs()
        )),
    };
    if let Some(error) = error {
        let path = field_path(pod, container);
        let text = format!("PreStopHook failed: {error}");
        deps.events.pod_event(
            pod,
            Some(&path),
            EventType::Warning,
            "FailedPreStopHook",
            text,
        );
    }
    began.elapsed()
}
