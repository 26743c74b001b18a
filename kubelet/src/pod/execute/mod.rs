//! Carries actions out: each a task of its own that ends in an [`Outcome`], which the worker
//! notes in its [`Steps`] ([`settle`]). Thin on purpose; decisions are in [`super::plan`].

mod container;
mod settle;

use super::environment::{PodEnvironment, StepError};
use super::old_logs;
use super::plan::Action;
use super::resize::actuate::Running;
use super::spec;
use super::state::{CrashBackoff, Step, Steps};
use super::worker::{Worker, WorkerDeps};
use crate::launch::security::own_users;
use crate::metrics::metrics;
use crate::observe::PodObservation;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use runtime::service::{ContainerId, RuntimeError, RuntimeService, SandboxId};
use std::sync::Arc;
use tokio::task::AbortHandle;

/// Which action ended.
pub(super) enum Ended<E: PodEnvironment> {
    /// Volumes are there.
    Volumes(Option<E::Volumes>),
    /// Volumes show new metadata.
    VolumesUpdated,
    /// A sandbox runs.
    Sandbox,
    /// A sandbox is stopped.
    SandboxStopped(SandboxId),
    /// A sandbox is forgotten.
    SandboxRemoved(SandboxId),
    /// An image is there.
    Image {
        /// Container name.
        container: String,
        /// The image.
        image: Option<E::Image>,
    },
    /// A container was started (or could not be).
    Start {
        /// Container name.
        container: String,
        /// What came of it.
        started: Started,
    },
    /// The preStop hook of a container is through.
    Hooked(ContainerId),
    /// A container is stopped.
    Killed(ContainerId),
    /// A dead instance is forgotten.
    ContainerRemoved(ContainerId),
    /// Volumes and cgroup are given back.
    TornDown,
    /// Directories are removed.
    Purged,
    /// Cgroups are as granted.
    Resized,
    /// The apiserver confirmed the deletion.
    Farewell,
}

/// What came of a start.
#[derive(Debug, Default)]
pub(super) struct Started {
    /// The back-off its instance was started with, when there was one before it and it got as
    /// far as being started.
    pub(super) backoff: Option<CrashBackoff>,
    /// An instance that must go: its postStart hook failed.
    pub(super) condemned: Option<ContainerId>,
    /// An instance got as far as being started.
    pub(super) ran: bool,
}

/// An action that ended, and how.
pub(super) struct Outcome<E: PodEnvironment> {
    pub(super) ended: Ended<E>,
    pub(super) result: Result<(), StepError>,
}

impl<E: PodEnvironment> Outcome<E> {
    pub(super) fn new(ended: Ended<E>, result: Result<(), StepError>) -> Self {
        Self { ended, result }
    }
}

/// The step an action belongs to; kills have their own notes.
fn step<'a>(steps: &'a mut Steps, action: &Action) -> Option<&'a mut Step> {
    Some(match action {
        Action::PrepareVolumes => &mut steps.volumes,
        Action::RunSandbox { .. } => &mut steps.sandbox,
        Action::StopSandbox(id) => steps.sandbox_stops.entry(id.clone()).or_default(),
        Action::RemoveSandbox(id) => steps.sandbox_removals.entry(id.clone()).or_default(),
        Action::EnsureImage { container } => steps.images.entry(container.clone()).or_default(),
        Action::StartContainer(s) => steps.starts.entry(s.container.clone()).or_default(),
        Action::RemoveContainer(id) => steps.container_removals.entry(id.clone()).or_default(),
        Action::Teardown => &mut steps.teardown,
        Action::Purge => &mut steps.purge,
        Action::Resize => &mut steps.resize,
        Action::Farewell => &mut steps.farewell,
        Action::KillContainer(_) | Action::PreStop(_) => return None,
    })
}

/// Starts an action and marks its step as in flight.
pub(super) fn begin<R: RuntimeService, E: PodEnvironment>(
    worker: &mut Worker<R, E>,
    action: Action,
    observed: &PodObservation,
    status: Arc<PodStatus>,
) -> AbortHandle {
    if let Some(step) = step(&mut worker.steps, &action) {
        step.begin();
    }
    let (deps, pod) = (worker.deps.clone(), worker.pod.clone());
    match action {
        Action::PrepareVolumes => worker.actions.spawn(async move {
            let (volumes, result) = split(deps.environment.prepare_volumes(&pod).await);
            Outcome::new(Ended::Volumes(volumes), result)
        }),
        Action::RunSandbox { attempt } => worker.actions.spawn(async move {
            Outcome::new(Ended::Sandbox, run_sandbox(&deps, &pod, attempt).await)
        }),
        Action::StopSandbox(id) => worker.actions.spawn(async move {
            let result = ending(deps.runtime.stop_sandbox(&id).await);
            Outcome::new(Ended::SandboxStopped(id), result)
        }),
        Action::RemoveSandbox(id) => worker.actions.spawn(async move {
            let result = ending(deps.runtime.remove_sandbox(&id).await);
            Outcome::new(Ended::SandboxRemoved(id), result)
        }),
        Action::EnsureImage { container } => worker.actions.spawn(async move {
            let (image, result) = split(ensure_image(&deps, &pod, &container).await);
            Outcome::new(Ended::Image { container, image }, result)
        }),
        Action::RemoveContainer(id) => {
            let old = old_logs::behind(observed, &id);
            worker.actions.spawn(async move {
                let result = ending(deps.runtime.remove_container(&id).await);
                if let (Ok(()), Some(old)) = (&result, old) {
                    // Whatever stays is taken at the next removal.
                    let _ = tokio::task::spawn_blocking(move || old_logs::remove(&old)).await;
                }
                Outcome::new(Ended::ContainerRemoved(id), result)
            })
        }
        Action::Teardown => worker.actions.spawn(async move {
            Outcome::new(Ended::TornDown, deps.environment.teardown(&pod).await)
        }),
        Action::Resize => {
            let wanted = worker.resize.wanted.clone().unwrap_or_default();
            let running = resizable(worker, observed);
            worker.actions.spawn(async move {
                let result = deps.environment.resize(&pod, wanted, running).await;
                Outcome::new(Ended::Resized, result)
            })
        }
        Action::Purge => worker
            .actions
            .spawn(async move { Outcome::new(Ended::Purged, deps.environment.purge(&pod).await) }),
        Action::Farewell => {
            let told = deps.publisher.farewell(&pod, status);
            worker.actions.spawn(async move {
                // An error means that the publisher forgot the pod: it is gone.
                let _ = told.await;
                Outcome::new(Ended::Farewell, Ok(()))
            })
        }
        Action::StartContainer(start) => container::begin_start(worker, start, observed),
        Action::PreStop(hook) => container::begin_pre_stop(worker, hook, observed),
        Action::KillContainer(kill) => container::begin_kill(worker, kill),
    }
}

/// Running containers whose limits may change as they run.
fn resizable<R: RuntimeService, E: PodEnvironment>(
    worker: &Worker<R, E>,
    observed: &PodObservation,
) -> Vec<Running> {
    let view = worker.resize.view();
    let running = observed
        .running()
        .filter(|c| !view.restarts(&worker.pod, c));
    running
        .map(|c| Running {
            id: c.id.clone(),
            name: c.config.name.clone(),
            resources: c.resources.clone(),
        })
        .collect()
}

/// A value beside its error.
fn split<T>(result: Result<T, StepError>) -> (Option<T>, Result<(), StepError>) {
    match result {
        Ok(value) => (Some(value), Ok(())),
        Err(error) => (None, Err(error)),
    }
}

fn engine_error(reason: &str, error: &RuntimeError) -> StepError {
    StepError::new(reason, error.message.clone())
}

/// How a call that ends a part of the pod went.
fn ending(result: runtime::service::Result<()>) -> Result<(), StepError> {
    result.map_err(|e| engine_error("FailedKillPod", &e))
}

/// Makes cgroup and sandbox.
async fn run_sandbox<R: RuntimeService, E: PodEnvironment>(
    deps: &WorkerDeps<R, E>,
    pod: &Arc<Pod>,
    attempt: u32,
) -> Result<(), StepError> {
    const REASON: &str = "FailedCreatePodSandBox";
    let config = deps.environment.prepare_sandbox(pod, attempt).await?;
    metrics().started_pods.inc();
    let own_users = own_users(pod);
    if own_users {
        metrics().started_user_pods.inc();
    }
    match deps.runtime.run_sandbox(config).await {
        Ok(_) => Ok(()),
        Err(error) => {
            metrics().started_pods_errors.inc();
            if own_users {
                metrics().started_user_pods_errors.inc();
            }
            let message = format!("Failed to create pod sandbox: {error}");
            Err(StepError::new(REASON, message))
        }
    }
}

async fn ensure_image<R: RuntimeService, E: PodEnvironment>(
    deps: &WorkerDeps<R, E>,
    pod: &Arc<Pod>,
    container: &str,
) -> Result<E::Image, StepError> {
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
    deps.environment.ensure_image(pod, &spec.spec).await
}
