//! Notes how actions ended.

use super::{Ended, Outcome};
use crate::events::EventType;
use crate::pod::environment::{PodEnvironment, StepError};
use crate::pod::state::{Failure, Step, UnhealthyKind, retry_delay_ns};
use crate::pod::worker::Worker;
use runtime::service::RuntimeService;
use tracing::{debug, warn};

impl<R: RuntimeService, E: PodEnvironment> Worker<R, E> {
    /// Notes how an action ended.
    pub(in crate::pod) fn settle(&mut self, outcome: Outcome<E>) {
        let now_ns = self.deps.clock.now_ns();
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
            Ended::Sandbox => {
                finish(&mut steps.sandbox, Step::Idle);
                self.resize.end(ok);
            }
            Ended::Resized => {
                finish(&mut steps.resize, Step::Idle);
                self.resize.end(ok);
                if let Err(error) = &result {
                    let generation = self.pod.metadata.generation.unwrap_or(0);
                    let told = self.resize.fail(&error.message, generation);
                    self.tell_resize(told);
                }
            }
            Ended::SandboxStopped(id) => {
                finish(steps.sandbox_stops.entry(id).or_default(), Step::Done);
            }
            Ended::SandboxRemoved(id) => {
                finish(steps.sandbox_removals.entry(id).or_default(), Step::Done);
            }
            Ended::Image { container, image } => {
                self.measure.pull_ends();
                finish(
                    steps.images.entry(container.clone()).or_default(),
                    Step::Done,
                );
                if let Some(image) = image {
                    self.images.insert(container, image);
                }
            }
            Ended::Start { container, started } => {
                finish(
                    steps.starts.entry(container.clone()).or_default(),
                    Step::Idle,
                );
                if ok || started.ran {
                    // The next start asks for the image again, as the pull policy wants.
                    steps.images.remove(&container);
                }
                if let Some(id) = started.condemned {
                    self.health.unhealthy.insert(id, UnhealthyKind::PostStart);
                }
                if let Some(backoff) = started.backoff {
                    self.backoffs.insert(container, backoff);
                }
            }
            Ended::Hooked(id) => {
                if let Some(kill) = steps.kills.get_mut(&id) {
                    kill.hook = Step::Done;
                }
                self.keep_note();
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
            Ended::Image { .. } | Ended::Start { .. } | Ended::Resized => {
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
            Ended::VolumesUpdated | Ended::Farewell | Ended::Hooked(_) => {}
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
