//! Starts and kills of containers, with their hooks.

use super::{Ended, Outcome, Started, ending};
use crate::events::{EventType, field_path};
use crate::launch::hash::container_hash;
use crate::launch::security::own_users;
use crate::launch::{ANNOTATION_BACKOFF, ANNOTATION_HASH, ANNOTATION_ROUND};
use crate::metrics::metrics;
use crate::observe::PodObservation;
use crate::pod::environment::{PodEnvironment, StartContext, StepError};
use crate::pod::hooks::{self, HookTarget, Hooked};
use crate::pod::measure;
use crate::pod::plan::{KillContainer, KillReason, PreStop, StartContainer};
use crate::pod::spec;
use crate::pod::state::CrashBackoff;
use crate::pod::worker::{Worker, WorkerDeps};
use k8s_openapi::api::core::v1::{Container, Pod};
use runtime::service::{
    ContainerConfig, ContainerId, ContainerState, NamespaceMode, RuntimeErrorKind, RuntimeService,
    SandboxId,
};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast;
use tokio::task::AbortHandle;
use tracing::debug;

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
    let backoff = start.predecessor_finished_ns.map(|finished_ns| {
        let now_ns = deps.clock.now_ns();
        // That of another definition does not count.
        let hash = observed
            .newest(&start.container)
            .and_then(|c| c.config.annotations.get(ANNOTATION_HASH));
        let spec = pod.spec.as_ref();
        let found = spec.and_then(|s| spec::container(s, &start.container));
        let same = found.is_some_and(|f| hash == Some(&container_hash(&f.spec)));
        let before = worker.backoffs.get(&start.container).filter(|_| same);
        CrashBackoff::after_restart(before, finished_ns, now_ns, deps.backoff)
    });
    worker.actions.spawn(async move {
        let mut started = Started::default();
        let result = match context {
            Some(context) => {
                let launch = Launch {
                    deps: &deps,
                    pod: &pod,
                    start: &start,
                    target,
                    backoff,
                };
                launch.run(context, &mut started).await
            }
            // The plan asks for both to be there first; asked again it will find them missing.
            None => Err(StepError::new(
                "ContainerCreating",
                "volumes or image are not there",
            )),
        };
        let container = start.container;
        Outcome::new(Ended::Start { container, started }, result)
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

/// Runs the preStop hook of an instance, within what is left of its grace.
pub(super) fn begin_pre_stop<R: RuntimeService, E: PodEnvironment>(
    worker: &mut Worker<R, E>,
    hook: PreStop,
    observed: &PodObservation,
) -> AbortHandle {
    let (deps, pod) = (worker.deps.clone(), worker.pod.clone());
    let instance = observed.container(&hook.id);
    let pod_ips = instance.map(|c| pod_ips(&deps, &pod, observed, &c.sandbox_id));
    let pod_ip = pod_ips.and_then(|ips| ips.first().copied());
    worker.actions.spawn(async move {
        pre_stop(&deps, &pod, &hook, pod_ip).await;
        Outcome::new(Ended::Hooked(hook.id), Ok(()))
    })
}

/// Stops an instance: stop signal, SIGKILL.
pub(super) fn begin_kill<R: RuntimeService, E: PodEnvironment>(
    worker: &mut Worker<R, E>,
    kill: KillContainer,
) -> AbortHandle {
    let deps = worker.deps.clone();
    worker.actions.spawn(async move {
        let grace = match kill.reason {
            KillReason::RestartAll => Duration::ZERO,
            KillReason::PodEnds
            | KillReason::Liveness
            | KillReason::Startup
            | KillReason::SpecChanged
            | KillReason::PostStart
            | KillReason::Resize => kill.grace.max(MINIMUM_GRACE),
        };
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

/// One start and all it needs.
struct Launch<'a, R, E> {
    deps: &'a WorkerDeps<R, E>,
    pod: &'a Arc<Pod>,
    start: &'a StartContainer,
    target: Target,
    backoff: Option<CrashBackoff>,
}

impl<R: RuntimeService, E: PodEnvironment> Launch<'_, R, E> {
    fn event(&self, type_: EventType, reason: &str, text: String) {
        let path = field_path(self.pod, &self.start.container);
        let events = &self.deps.events;
        events.pod_event(self.pod, Some(&path), type_, reason, text);
    }

    fn failed(&self, reason: &str, message: String) -> StepError {
        self.event(EventType::Warning, "Failed", format!("Error: {message}"));
        if self.start.attempt == 0 && own_users(self.pod) {
            metrics().started_user_pods_errors.inc();
        }
        StepError::new(reason, message)
    }

    /// Creates and starts the instance. An entrypoint that cannot be run is no error here: the
    /// engine has recorded an instance that ended, and the restart policy decides.
    async fn run(
        self,
        context: StartContext<E::Volumes, E::Image>,
        started: &mut Started,
    ) -> Result<(), StepError> {
        let name = self.start.container.as_str();
        let spec = self.pod.spec.as_ref();
        let Some(found) = spec.and_then(|s| spec::container(s, name)) else {
            let message = format!("no container {name:?}");
            return Err(StepError::new("InvalidContainer", message));
        };
        let runtime = &self.deps.runtime;
        if let Some(half_made) = &self.start.replaces {
            let removed = runtime.remove_container(half_made).await;
            removed.map_err(|e| self.failed("CreateContainerError", e.message))?;
        }
        let pod_ip = context.pod_ips.first().copied();
        let config = self.config(&found.spec, context).await?;
        let created = runtime.create_container(&self.start.sandbox, config).await;
        let id = created.map_err(|e| self.failed("CreateContainerError", e.message))?;
        self.event(EventType::Normal, "Created", "Container created".to_owned());
        started.ran = true;
        started.backoff = self.backoff;
        let began = runtime.start_container(&id).await;
        let failure = began.as_ref().err().map(|_| "RunContainerError");
        measure::start(found.kind, failure);
        match began {
            Ok(()) => {
                self.event(EventType::Normal, "Started", "Container started".to_owned());
                let hooked = self.post_start(&found.spec, &id, pod_ip).await;
                hooked.inspect_err(|_| started.condemned = Some(id))
            }
            Err(error) => {
                let step = self.failed("RunContainerError", error.message);
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

    /// What the instance shall be.
    async fn config(
        &self,
        spec: &Container,
        context: StartContext<E::Volumes, E::Image>,
    ) -> Result<ContainerConfig, StepError> {
        let pid = match &self.target {
            Target::None => None,
            Target::Instance(id) => Some(NamespaceMode::Target(id.clone())),
            Target::Missing(name) => {
                let message = format!("unable to find target container {name}");
                return Err(self.failed("CreateContainerConfigError", message));
            }
        };
        let environment = &self.deps.environment;
        let config = environment.container_config(self.pod, spec, context).await;
        let mut config = config.inspect_err(|e| {
            let text = format!("Error: {}", e.message);
            self.event(EventType::Warning, "Failed", text);
        })?;
        config.attempt = self.start.attempt;
        config.pid = pid.or(config.pid);
        let annotations = &mut config.annotations;
        annotations.insert(ANNOTATION_HASH.to_owned(), container_hash(spec));
        if self.start.round > 0 {
            annotations.insert(ANNOTATION_ROUND.to_owned(), self.start.round.to_string());
        }
        if let Some(backoff) = &self.backoff {
            let delay = backoff.delay_ns().to_string();
            annotations.insert(ANNOTATION_BACKOFF.to_owned(), delay);
        }
        Ok(config)
    }

    /// Runs the postStart hook. A container whose hook failed has to go; the restart policy
    /// decides what follows. The event does not say what the hook said: it may hold secrets.
    async fn post_start(
        &self,
        container: &Container,
        id: &ContainerId,
        pod_ip: Option<IpAddr>,
    ) -> Result<(), StepError> {
        let Some(hook) = hooks::post_start(container) else {
            return Ok(());
        };
        let target = HookTarget {
            pod: self.pod,
            id,
            container,
            pod_ip,
        };
        let run = hooks::run(&self.deps.runtime, hook, target, None);
        let hooked = tokio::select! {
            hooked = run => hooked,
            // Nobody is left to be hooked; its end speaks for itself.
            () = until_ended(&*self.deps.runtime, id) => Ok(Hooked::Done),
        };
        match hooked {
            Ok(hooked) => {
                tell_fallback(self.deps, self.pod, hooked);
                Ok(())
            }
            Err(message) => {
                let text = "PostStartHook failed".to_owned();
                self.event(EventType::Warning, "FailedPostStartHook", text);
                Err(StepError {
                    // Its end is what the next start waits for.
                    retry_after: Some(Duration::ZERO),
                    ..StepError::new("PostStartHookError", message)
                })
            }
        }
    }
}

/// Resolves when an instance does not run any more.
async fn until_ended<R: RuntimeService>(runtime: &R, id: &ContainerId) {
    let mut news = runtime.events();
    loop {
        let state = runtime.container_status(id).map(|c| c.state);
        if !matches!(state, Some(ContainerState::Running { .. })) {
            return;
        }
        if let Err(broadcast::error::RecvError::Closed) = news.recv().await {
            std::future::pending::<()>().await;
        }
    }
}

/// Tells of a hook that went without TLS.
fn tell_fallback<R, E>(deps: &WorkerDeps<R, E>, pod: &Pod, hooked: Hooked) {
    if let Hooked::FellBack(host) = hooked {
        let text = format!(
            "request to HTTPS lifecycle hook {host} got HTTP response, retry with HTTP succeeded"
        );
        let warning = EventType::Warning;
        deps.events
            .pod_event(pod, None, warning, "LifecycleHTTPFallback", text);
    }
}

/// Runs the preStop hook within the grace. One that takes longer is left alone.
async fn pre_stop<R: RuntimeService, E: PodEnvironment>(
    deps: &WorkerDeps<R, E>,
    pod: &Arc<Pod>,
    action: &PreStop,
    pod_ip: Option<IpAddr>,
) {
    let Some((container, hook)) = hooks::pre_stop(pod, &action.container) else {
        return;
    };
    let target = HookTarget {
        pod,
        id: &action.id,
        container,
        pod_ip,
    };
    let run = hooks::run(&deps.runtime, hook, target, Some(action.limit));
    match tokio::time::timeout(action.limit, run).await {
        Ok(Ok(hooked)) => tell_fallback(deps, pod, hooked),
        Ok(Err(message)) => {
            debug!(container = action.container, message, "PreStop hook failed");
            let path = field_path(pod, &action.container);
            let text = "PreStopHook failed";
            let warning = EventType::Warning;
            deps.events
                .pod_event(pod, Some(&path), warning, "FailedPreStopHook", text);
        }
        Err(_) => debug!(container = action.container, "PreStop hook took too long"),
    }
}
