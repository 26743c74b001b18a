//! What a worker keeps in line with the containers that exist: probes, last words, notes.

use super::clock::nanoseconds;
use super::environment::PodEnvironment;
use super::spec::{self, ContainerKind};
use super::state::{CrashBackoff, Step};
use super::termination;
use super::worker::Worker;
use crate::launch::ANNOTATION_BACKOFF;
use crate::observe::PodObservation;
use crate::probes::{Adopted, ProbeTarget};
use k8s_openapi::api::core::v1::Container;
use runtime::service::{ContainerState, ContainerStatus, RuntimeService};
use std::collections::BTreeSet;
use std::time::Duration;

impl<R: RuntimeService, E: PodEnvironment> Worker<R, E> {
    /// Keeps probes, last words and step memory in line with what exists.
    pub(super) fn track(&mut self, observed: &PodObservation) {
        let ids: BTreeSet<_> = observed.containers.iter().map(|c| c.id.clone()).collect();
        self.health.retain(&ids);
        self.messages.retain(|id, _| ids.contains(id));
        self.steps
            .kills
            .retain(|id, k| ids.contains(id) || k.step.is_running());
        let adopting = std::mem::replace(&mut self.adopting, false);
        let pod = self.pod.clone();
        let Some(spec) = pod.spec.as_ref() else {
            return;
        };
        for instance in &observed.containers {
            let Some(container) = spec::container(spec, &instance.config.name) else {
                continue;
            };
            if adopting {
                self.adopt_backoff(instance);
            }
            match &instance.state {
                ContainerState::Created => {}
                ContainerState::Running { started_at_ns, .. } => {
                    // Nobody is judged before its postStart hook is through.
                    let starting = self.steps.starts.get(&instance.config.name);
                    let probed = has_probes(&container.spec)
                        && container.kind != ContainerKind::Init
                        && !starting.is_some_and(Step::is_running);
                    if probed {
                        let adopted = if adopting {
                            self.adopt(&container.spec, instance)
                        } else {
                            None
                        };
                        self.probe(&container.spec, instance, *started_at_ns, observed, adopted);
                    }
                }
                ContainerState::Exited { .. } => {
                    if !self.messages.contains_key(&instance.id) {
                        self.deps.probes.remove_container(&instance.id);
                        let words = termination::read(&container.spec, instance);
                        self.messages.insert(instance.id.clone(), words);
                    }
                }
            }
        }
    }

    /// After a restart of the agent: the back-off the newest instance was started with.
    fn adopt_backoff(&mut self, instance: &ContainerStatus) {
        let config = &instance.config;
        let recorded = config.annotations.get(ANNOTATION_BACKOFF);
        if let Some(delay_ns) = recorded.and_then(|d| d.parse().ok()) {
            // Instances come newest first.
            self.backoffs
                .entry(config.name.clone())
                .or_insert(CrashBackoff::recorded(delay_ns, instance.created_at_ns));
        }
    }

    /// After a restart of the agent: what the apiserver was told of an instance still holds, so
    /// that nothing flips.
    fn adopt(&mut self, container: &Container, instance: &ContainerStatus) -> Option<Adopted> {
        let id = format!("ferrule://{}", instance.id);
        let told = self.pod.status.as_ref().and_then(|s| {
            let mut all = s
                .container_statuses
                .iter()
                .chain(&s.init_container_statuses)
                .flatten();
            all.find(|c| c.name == instance.config.name && c.container_id.as_ref() == Some(&id))
        })?;
        let adopted = Adopted {
            started: told.started == Some(true) || container.startup_probe.is_none(),
            ready: told.ready,
        };
        self.health
            .started
            .insert(instance.id.clone(), adopted.started);
        self.health.ready.insert(instance.id.clone(), adopted.ready);
        Some(adopted)
    }

    /// Has a running instance probed. Idempotent.
    fn probe(
        &self,
        container: &Container,
        instance: &ContainerStatus,
        started_at_ns: i64,
        observed: &PodObservation,
        adopted: Option<Adopted>,
    ) {
        let sandbox = observed
            .sandboxes
            .iter()
            .find(|s| s.id == instance.sandbox_id);
        let host_network = self
            .pod
            .spec
            .as_ref()
            .is_some_and(|s| s.host_network == Some(true));
        let pod_ip = if host_network {
            self.deps
                .environment
                .host_ips()
                .first()
                .and_then(|ip| ip.parse().ok())
        } else {
            sandbox.and_then(|s| s.ips.first().copied())
        };
        let now_ns = self.deps.clock.now_ns();
        let since = |ns: i64| {
            let ns = now_ns.saturating_sub(ns);
            Duration::from_nanos(u64::try_from(ns).unwrap_or(0))
        };
        self.deps.probes.ensure(ProbeTarget {
            pod: self.pod.clone(),
            container_name: container.name.clone(),
            container_id: instance.id.clone(),
            pod_ip,
            running_for: since(started_at_ns),
            pod_for: since(nanoseconds(self.start_time)),
            adopted,
        });
    }
}

/// Whether anything is to be probed.
fn has_probes(container: &Container) -> bool {
    container.liveness_probe.is_some()
        || container.readiness_probe.is_some()
        || container.startup_probe.is_some()
}
