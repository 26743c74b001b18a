//! Carries actions out: each a task of its own that ends in an [`Outcome`], which the worker
//! notes in its [`Steps`]. Thin on purpose; decisions are in [`super::plan`].

use super::environment::{PodEnvironment, StartContext, StepError};
use super::hooks::{self, HookTarget};
use super::plan::Action;
use super::spec;
use super::state::{CrashBackoff, Failure, Step, retry_delay_ns};
use super::worker::{Worker, WorkerDeps, field_path, nanoseconds};
use crate::events::EventType;
use crate::launch::ANNOTATION_HASH;
use crate::launch::hash::container_hash;
use crate::observe::PodObservation;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, PodStatus};
use runtime::service::{ContainerId, RuntimeError, RuntimeErrorKind, RuntimeService, SandboxId};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::AbortHandle;
use tracing::{debug, warn};

/// Every container gets this long between stop signal and SIGKILL, even with no grace at all: a
/// process that ends on SIGTERM does so well within it.
const MINIMUM_GRACE: Duration = Duration::from_secs(2);

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
        /// End of the instance before.
        predecessor_finished_ns: Option<i64>,
    },
    /// A container is stopped.
    Killed(ContainerId),
    /// A dead instance is forgotten.
    ContainerRemoved(ContainerId),
    /// Volumes and cgroup are given back.
    TornDown,
    /// Directories are removed.
    Purged,
    /// The apiserver confirmed the deletion.
    Farewell,
}

/// An action that ended, and how.
pub(super) struct Outcome<E: PodEnvironment> {
    pub(super) ended: Ended<E>,
    pub(super) result: Result<(), StepError>,
}

/// Starts an action and marks its step as in flight.
pub(super) fn begin<R: RuntimeService, E: PodEnvironment>(
    worker: &mut Worker<R, E>,
    action: Action,
    observed: &PodObservation,
    status: Arc<PodStatus>,
) -> Option<AbortHandle> {
    let deps = worker.deps.clone();
    let pod = worker.pod.clone();
    let steps = &mut worker.steps;
    let tasks = &mut worker.actions;
    Some(match action {
        Action::PrepareVolumes => {
            steps.volumes.begin();
            tasks.spawn(async move {
                let (volumes, result) = split(deps.environment.prepare_volumes(&pod).await);
                Outcome {
                    ended: Ended::Volumes(volumes),
                    result,
                }
            })
        }
        Action::RunSandbox { attempt } => {
            steps.sandbox.begin();
            tasks.spawn(async move {
                Outcome {
                    ended: Ended::Sandbox,
                    result: run_sandbox(&deps, &pod, attempt).await,
                }
            })
        }
        Action::StopSandbox(id) => {
            steps.sandbox_stops.entry(id.clone()).or_default().begin();
            tasks.spawn(async move {
                let result = deps.runtime.stop_sandbox(&id).await;
                let result = result.map_err(|e| engine_error("FailedKillPod", &e));
                Outcome {
                    ended: Ended::SandboxStopped(id),
                    result,
                }
            })
        }
        Action::RemoveSandbox(id) => {
            steps
                .sandbox_removals
                .entry(id.clone())
                .or_default()
                .begin();
            tasks.spawn(async move {
                let result = deps.runtime.remove_sandbox(&id).await;
                let result = result.map_err(|e| engine_error("FailedKillPod", &e));
                Outcome {
                    ended: Ended::SandboxRemoved(id),
                    result,
                }
            })
        }
        Action::EnsureImage { container } => {
            steps.images.entry(container.clone()).or_default().begin();
            tasks.spawn(async move {
                let (image, result) = split(ensure_image(&deps, &pod, &container).await);
                Outcome {
                    ended: Ended::Image { container, image },
                    result,
                }
            })
        }
        Action::StartContainer {
            container,
            sandbox,
            attempt,
            replaces,
            predecessor_finished_ns,
        } => {
            let volumes = worker.volumes.clone()?;
            let image = worker.images.get(&container).cloned()?;
            steps.starts.entry(container.clone()).or_default().begin();
            let pod_ips = pod_ips(&deps, &pod, observed, &sandbox);
            let context = StartContext {
                attempt,
                pod_ips,
                volumes,
                image,
            };
            tasks.spawn(async move {
                let start = Start { sandbox, replaces };
                let result = start_container(&deps, &pod, &container, start, context).await;
                Outcome {
                    ended: Ended::Start {
                        container,
                        predecessor_finished_ns,
                    },
                    result,
                }
            })
        }
        Action::KillContainer {
            id,
            container,
            grace_s,
            ..
        } => {
            let kill = steps.kills.entry(id.clone()).or_default();
            // A kill with a shorter grace does not run the hook again, nor wait for it.
            let hook = !std::mem::replace(&mut kill.hooked, true);
            let instance = observed.container(&id);
            let pod_ips = instance.map(|c| pod_ips(&deps, &pod, observed, &c.sandbox_id));
            let pod_ip = pod_ips.and_then(|ips| ips.first().copied());
            tasks.spawn(async move {
                let mut grace = Duration::from_secs(grace_s);
                if hook {
                    let spent = pre_stop(&deps, &pod, &id, &container, pod_ip, grace).await;
                    grace = grace.saturating_sub(spent);
                }
                let grace = grace.max(MINIMUM_GRACE);
                let result = deps.runtime.stop_container(&id, grace).await;
                let result = result.map_err(|e| engine_error("FailedKillPod", &e));
                Outcome {
                    ended: Ended::Killed(id),
                    result,
                }
            })
        }
        Action::RemoveContainer(id) => {
            steps
                .container_removals
                .entry(id.clone())
                .or_default()
                .begin();
            tasks.spawn(async move {
                let result = deps.runtime.remove_container(&id).await;
                let result = result.map_err(|e| engine_error("FailedKillPod", &e));
                Outcome {
                    ended: Ended::ContainerRemoved(id),
                    result,
                }
            })
        }
        Action::Teardown => {
            steps.teardown.begin();
            tasks.spawn(async move {
                let result = deps.environment.teardown(&pod).await;
                Outcome {
                    ended: Ended::TornDown,
                    result,
                }
            })
        }
        Action::Purge => {
            steps.purge.begin();
            tasks.spawn(async move {
                Outcome {
                    ended: Ended::Purged,
                    result: deps.environment.purge(&pod).await,
                }
            })
        }
        Action::Farewell => {
            steps.farewell.begin();
            let told = deps.publisher.farewell(&pod, status);
            tasks.spawn(async move {
                // An error means that the publisher forgot the pod: it is gone.
                let _ = told.await;
                Outcome {
                    ended: Ended::Farewell,
                    result: Ok(()),
                }
            })
        }
    })
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

/// Makes cgroup and sandbox.
async fn run_sandbox<R: RuntimeService, E: PodEnvironment>(
    deps: &WorkerDeps<R, E>,
    pod: &Arc<Pod>,
    attempt: u32,
) -> Result<(), StepError> {
    const REASON: &str = "FailedCreatePodSandBox";
    let config = deps.environment.prepare_sandbox(pod, attempt).await?;
    match deps.runtime.run_sandbox(config).await {
        Ok(_) => Ok(()),
        Err(error) => {
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
    deps.environment.ensure_image(pod, spec.spec).await
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

/// Where a container goes.
struct Start {
    sandbox: SandboxId,
    replaces: Option<ContainerId>,
}

/// Creates and starts an instance. An entrypoint that cannot be run is no error here: the engine
/// has recorded an instance that ended, and the restart policy decides.
async fn start_container<R: RuntimeService, E: PodEnvironment>(
    deps: &WorkerDeps<R, E>,
    pod: &Arc<Pod>,
    container: &str,
    start: Start,
    context: StartContext<E::Volumes, E::Image>,
) -> Result<(), StepError> {
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
    if let Some(half_made) = start.replaces {
        let removed = deps.runtime.remove_container(&half_made).await;
        removed.map_err(|e| failed("CreateContainerError", e.message))?;
    }
    let attempt = context.attempt;
    let pod_ip = context.pod_ips.first().copied();
    let config = deps
        .environment
        .container_config(pod, spec.spec, context)
        .await;
    let mut config = config.inspect_err(|e| {
        event(
            EventType::Warning,
            "Failed",
            format!("Error: {}", e.message),
        );
    })?;
    config.attempt = attempt;
    config
        .annotations
        .insert(ANNOTATION_HASH.to_owned(), container_hash(spec.spec));
    let id = match deps.runtime.create_container(&start.sandbox, config).await {
        Ok(id) => id,
        Err(error) => return Err(failed("CreateContainerError", error.message)),
    };
    event(EventType::Normal, "Created", "Container created".to_owned());
    match deps.runtime.start_container(&id).await {
        Ok(()) => {
            event(EventType::Normal, "Started", "Container started".to_owned());
            post_start(deps, pod, spec.spec, &id, pod_ip).await
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
    id: &ContainerId,
    container: &str,
    pod_ip: Option<IpAddr>,
    grace: Duration,
) -> Duration {
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

impl<R: RuntimeService, E: PodEnvironment> Worker<R, E> {
    /// Notes how an action ended.
    pub(super) fn settle(&mut self, outcome: Outcome<E>) {
        let now_ns = nanoseconds(Timestamp::now());
        let Outcome { ended, result } = outcome;
        if let Err(error) = &result {
            self.complain(&ended, error);
        }
        let ok = result.is_ok();
        let steps = &mut self.steps;
        let finish = |step: &mut Step, success: Step| match &result {
            Ok(()) => *step = success,
            Err(error) => *step = failure(step, error, now_ns),
        };
        match ended {
            Ended::Volumes(volumes) => {
                finish(&mut steps.volumes, Step::Done);
                self.volumes = volumes.or(self.volumes.take());
            }
            Ended::VolumesUpdated => {}
            Ended::Sandbox => finish(&mut steps.sandbox, Step::Idle),
            Ended::SandboxStopped(id) => {
                finish(steps.sandbox_stops.entry(id).or_default(), Step::Done);
            }
            Ended::SandboxRemoved(id) => {
                finish(steps.sandbox_removals.entry(id).or_default(), Step::Done);
            }
            Ended::Image { container, image } => {
                finish(
                    steps.images.entry(container.clone()).or_default(),
                    Step::Done,
                );
                if let Some(image) = image {
                    self.images.insert(container, image);
                }
            }
            Ended::Start {
                container,
                predecessor_finished_ns,
            } => {
                finish(
                    steps.starts.entry(container.clone()).or_default(),
                    Step::Idle,
                );
                if ok {
                    // The next start asks for the image again, as the pull policy wants.
                    steps.images.remove(&container);
                    if let Some(finished_ns) = predecessor_finished_ns {
                        let before = self.backoffs.get(&container);
                        let after = CrashBackoff::after_restart(before, finished_ns, now_ns);
                        self.backoffs.insert(container, after);
                    }
                }
            }
            Ended::Killed(id) => {
                if let Some(kill) = steps.kills.get_mut(&id) {
                    finish(&mut kill.step, Step::Idle);
                }
            }
            Ended::ContainerRemoved(id) => {
                finish(
                    steps.container_removals.entry(id.clone()).or_default(),
                    Step::Done,
                );
                if ok {
                    steps.container_removals.remove(&id);
                }
            }
            Ended::TornDown => finish(&mut steps.teardown, Step::Done),
            Ended::Purged => finish(&mut steps.purge, Step::Done),
            Ended::Farewell => finish(&mut steps.farewell, Step::Done),
        }
    }

    /// Tells log and users about a failed step.
    fn complain(&self, ended: &Ended<E>, error: &StepError) {
        match ended {
            Ended::Volumes(_) | Ended::Sandbox => {
                let warning = EventType::Warning;
                self.deps
                    .events
                    .pod_event(&self.pod, None, warning, &error.reason, &error.message);
                debug!(reason = error.reason, error = error.message, "Step failed");
            }
            // Their own makers have said it.
            Ended::Image { .. } | Ended::Start { .. } => {
                debug!(reason = error.reason, error = error.message, "Step failed");
            }
            Ended::SandboxStopped(_)
            | Ended::SandboxRemoved(_)
            | Ended::Killed(_)
            | Ended::ContainerRemoved(_)
            | Ended::TornDown
            | Ended::Purged => {
                let warning = EventType::Warning;
                self.deps
                    .events
                    .pod_event(&self.pod, None, warning, &error.reason, &error.message);
                warn!(
                    reason = error.reason,
                    error = error.message,
                    "Step of the pod's end failed"
                );
            }
            Ended::VolumesUpdated | Ended::Farewell => {}
        }
    }
}

/// The state after a failure: retried later and later.
fn failure(step: &Step, error: &StepError, now_ns: i64) -> Step {
    let failures = step.failures().saturating_add(1);
    let delay = error.retry_after.map_or_else(
        || retry_delay_ns(failures),
        |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX),
    );
    Step::Failed(Failure {
        reason: error.reason.clone(),
        message: error.message.clone(),
        retry_at_ns: now_ns.saturating_add(delay),
        failures,
    })
}
