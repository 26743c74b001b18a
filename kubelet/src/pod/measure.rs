//! How long pods take, for the agent's metrics. Decides nothing.

use super::spec::{self, ContainerKind};
use crate::metrics::metrics;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use runtime::service::{ContainerState, ContainerStatus};
use std::time::{Duration, Instant};

/// Durations of one pod.
#[derive(Debug)]
pub(super) struct Measure {
    seen: Instant,
    looked: bool,
    updated: bool,
    running: bool,
    pulls: u32,
    pulling_since: Option<Instant>,
    pulled: Duration,
}

impl Measure {
    /// Of a pod first seen now with this status.
    pub(super) fn new(reported: &PodStatus) -> Self {
        Self {
            seen: Instant::now(),
            looked: false,
            updated: false,
            running: is_running(reported),
            pulls: 0,
            pulling_since: None,
            pulled: Duration::ZERO,
        }
    }

    /// The desired pod changed.
    pub(super) fn updated(&mut self) {
        self.updated = true;
    }

    /// A look that began at `began` is over.
    pub(super) fn looked(&mut self, pod: &Pod, began: Instant) {
        let updated = std::mem::take(&mut self.updated);
        let operation = match (std::mem::replace(&mut self.looked, true), updated) {
            (false, _) => "create",
            (true, true) => "update",
            (true, false) => "sync",
        };
        let all = metrics();
        if operation == "create" {
            all.pod_worker_start.observe_time(began - self.seen);
            let containers = pod.spec.as_ref().map_or(0, |s| s.containers.len());
            all.containers_per_pod.observe(containers as f64);
        }
        all.pod_worker
            .with([operation])
            .observe_time(began.elapsed());
    }

    /// An image is asked for.
    pub(super) fn pull_begins(&mut self) {
        self.pulls += 1;
        self.pulling_since.get_or_insert_with(Instant::now);
    }

    /// It is there, or will not be.
    pub(super) fn pull_ends(&mut self) {
        self.pulls = self.pulls.saturating_sub(1);
        if self.pulls == 0
            && let Some(since) = self.pulling_since.take()
        {
            self.pulled += since.elapsed();
        }
    }

    /// The newest status.
    pub(super) fn status(&mut self, pod: &Pod, status: &PodStatus, now: Timestamp) {
        if self.running || !is_running(status) {
            return;
        }
        self.running = true;
        let all = metrics();
        all.pod_start.observe_time(self.seen.elapsed());
        let Some(created) = &pod.metadata.creation_timestamp else {
            return;
        };
        let total = now.duration_since(created.0);
        let total = Duration::try_from(total).unwrap_or_default();
        all.pod_start_total.observe_time(total);
        all.pod_start_sli
            .observe_time(total.saturating_sub(self.pulled));
    }
}

/// Whether all main containers run.
fn is_running(status: &PodStatus) -> bool {
    let containers = status.container_statuses.as_deref().unwrap_or_default();
    let runs = |s: &k8s_openapi::api::core::v1::ContainerStatus| {
        s.state
            .as_ref()
            .is_some_and(|state| state.running.is_some())
    };
    !containers.is_empty() && containers.iter().all(runs)
}

/// The word for a kind of container.
fn word(kind: ContainerKind) -> &'static str {
    match kind {
        ContainerKind::Init | ContainerKind::Sidecar => "init_container",
        ContainerKind::Main => "container",
        ContainerKind::Ephemeral => "ephemeral_container",
    }
}

/// A start was tried; `error` is the reason when it failed.
pub(super) fn start(kind: ContainerKind, error: Option<&str>) {
    let all = metrics();
    all.started_containers.with([word(kind)]).inc();
    if let Some(reason) = error {
        all.started_containers_errors
            .with([word(kind), reason])
            .inc();
    }
}

/// A container of the pod ended.
pub(super) fn end(pod: &Pod, container: &ContainerStatus) {
    let ContainerState::Exited {
        exit_code, reason, ..
    } = &container.state
    else {
        return;
    };
    let spec = pod.spec.as_ref();
    let found = spec.and_then(|s| spec::container(s, &container.config.name));
    let kind = found.map_or(ContainerKind::Main, |c| c.kind);
    let code = exit_code.to_string();
    metrics()
        .terminated_containers
        .with([word(kind), &code, reason])
        .inc();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pulls_side_by_side_count_once() {
        let mut measure = Measure::new(&PodStatus::default());
        measure.pull_begins();
        measure.pull_begins();
        measure.pull_ends();
        assert_eq!(measure.pulled, Duration::ZERO);
        measure.pull_ends();
        assert!(measure.pulled > Duration::ZERO && measure.pulling_since.is_none());
        measure.pull_ends();
        assert_eq!(measure.pulls, 0);
    }
}
