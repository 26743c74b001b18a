//! What a worker remembers of its pod's resources: what they shall be, what the pod's cgroup
//! was given, and what users are told. Lost with the agent and found again: the allocation is on
//! disk, limits in force are in the kernel and the engine's records, conditions at the apiserver.

use super::actuate::{Difference, WantedResources, difference, needs_restart};
use super::{IN_PROGRESS, PendingResize, Progress, ResizeNews};
use crate::observe::{self, PodObservation};
use crate::pod::spec;
use crate::pod::state::Steps;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use runtime::service::{ContainerStatus, Resources};

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct ResizeTracker {
    /// What the cgroups shall be; none until it can be said.
    pub wanted: Option<WantedResources>,
    /// What the pod's cgroup was given last; none when this agent did not give it.
    pub pod_applied: Option<Resources>,
    /// What an action in flight gives it.
    in_flight: Option<Resources>,
    /// The request that waits.
    pub pending: Option<PendingResize>,
    /// The granted request being carried out.
    pub progress: Option<Progress>,
    granted: Option<i64>,
}

/// What became of a granted request: an event to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// Everything is as granted, for the request of this generation.
    Completed(i64),
    /// It did not work, for the request of this generation.
    Error(i64, String),
}

impl ResizeTracker {
    /// Goes on from what the apiserver was told before.
    pub fn new(reported: &PodStatus) -> Self {
        let told = reported.conditions.iter().flatten();
        let progress = told
            .filter(|c| c.type_ == IN_PROGRESS)
            .map(|c| Progress {
                generation: c.observed_generation.unwrap_or(0),
                error: c
                    .message
                    .clone()
                    .filter(|_| c.reason.as_deref() == Some("Error")),
            })
            .next();
        Self {
            progress,
            ..Self::default()
        }
    }

    /// Takes the manager's news in; whether a request was granted, so that a failed try is made
    /// again at once.
    pub fn take(&mut self, news: &ResizeNews) -> bool {
        self.pending.clone_from(&news.pending);
        let granted = news.granted.filter(|g| self.granted != Some(*g));
        let Some(generation) = granted else {
            return false;
        };
        self.granted = Some(generation);
        self.progress = Some(Progress {
            generation,
            error: None,
        });
        true
    }

    /// An action that sets the pod's cgroup begins.
    pub fn begin(&mut self) {
        self.in_flight = self.wanted.as_ref().map(|w| w.pod.clone());
    }

    /// That action ended.
    pub fn end(&mut self, success: bool) {
        let given = self.in_flight.take();
        if success {
            self.pod_applied = given;
        }
    }

    /// Notes why granted resources could not be set; an event when that is news.
    pub fn fail(&mut self, message: &str, generation: i64) -> Option<Told> {
        let progress = self.progress.get_or_insert(Progress {
            generation,
            error: None,
        });
        if progress.error.as_deref() == Some(message) {
            return None;
        }
        progress.error = Some(message.to_owned());
        Some(Told::Error(progress.generation, message.to_owned()))
    }

    /// Compares what is with what was granted; an event when the last of it was done.
    pub fn look(&mut self, pod: &Pod, observed: &PodObservation, steps: &Steps) -> Option<Told> {
        let view = self.view();
        let busy = view.differing(observed).next().is_some()
            || view.pod_is_outdated()
            || restarting(steps, observed).next().is_some();
        if busy {
            let generation = pod.metadata.generation.unwrap_or(0);
            self.progress.get_or_insert(Progress {
                generation,
                error: None,
            });
            return None;
        }
        // Until the cgroups were looked at once, nothing is known.
        if self.wanted.is_some() && self.pod_applied.is_none() && observed.ready_sandbox().is_some()
        {
            return None;
        }
        self.progress
            .take()
            .map(|progress| Told::Completed(progress.generation))
    }

    /// For plans and statuses.
    pub fn view(&self) -> ResizeView<'_> {
        ResizeView {
            wanted: self.wanted.as_ref(),
            pod_applied: self.pod_applied.as_ref(),
            pending: self.pending.as_ref(),
            progress: self.progress.as_ref(),
        }
    }
}

/// Instances that were killed to start anew with other resources, and have no successor yet.
pub fn restarting<'a>(
    steps: &'a Steps,
    observed: &'a PodObservation,
) -> impl Iterator<Item = &'a ContainerStatus> {
    observed.containers.iter().filter(|c| {
        steps.kills.get(&c.id).is_some_and(|kill| kill.for_resize)
            && observed
                .newest(&c.config.name)
                .is_some_and(|newest| newest.id == c.id)
    })
}

/// What of a [`ResizeTracker`] plans and statuses depend on.
#[derive(Debug, Clone, Copy, Default)]
pub struct ResizeView<'a> {
    /// What the cgroups shall be.
    pub wanted: Option<&'a WantedResources>,
    /// What the pod's cgroup was given.
    pub pod_applied: Option<&'a Resources>,
    /// The request that waits.
    pub pending: Option<&'a PendingResize>,
    /// The granted request being carried out.
    pub progress: Option<&'a Progress>,
}

impl<'a> ResizeView<'a> {
    /// Whether the pod's cgroup is known not to be as wanted.
    pub fn pod_is_outdated(&self) -> bool {
        match (self.wanted, self.pod_applied) {
            (Some(wanted), Some(applied)) => difference(applied, &wanted.pod).any(),
            (_, None) | (None, _) => false,
        }
    }

    /// Whether an instance differs from what is wanted, and how.
    pub fn difference(&self, instance: &ContainerStatus) -> Difference {
        let wanted = self
            .wanted
            .and_then(|w| w.containers.get(&instance.config.name));
        wanted.map_or_else(Difference::default, |wanted| {
            difference(&instance.resources, wanted)
        })
    }

    /// Whether an instance has to start anew to get what is wanted.
    pub fn restarts(&self, pod: &Pod, instance: &ContainerStatus) -> bool {
        let container = pod
            .spec
            .as_ref()
            .and_then(|s| spec::container(s, &instance.config.name));
        container.is_some_and(|c| needs_restart(&c.spec, self.difference(instance)))
    }

    /// Running instances that are not as wanted.
    pub fn differing<'o>(
        &'o self,
        observed: &'o PodObservation,
    ) -> impl Iterator<Item = &'o ContainerStatus> + 'o {
        observed
            .containers
            .iter()
            .filter(|c| observe::is_running(c) && self.difference(c).any())
    }
}
