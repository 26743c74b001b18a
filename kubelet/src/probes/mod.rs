//! Probes: is a container started, alive, ready?
//!
//! [`Probes`] keeps one small task per probe of each running container. A task sleeps until its
//! probe is due, asks ([`check`] by exec, HTTP, TCP or gRPC), lets the thresholds decide
//! ([`verdict`], pure) and reports each change of verdict as a [`ProbeUpdate`] to the channel
//! given at construction; the pod's worker acts on it. Nothing here kills or restarts a
//! container, and nothing here writes status.
//!
//! Probes belong to one incarnation of a container (its id): a restart begins anew. A container
//! adopted after a restart of the agent keeps the verdict it had, so that no Ready condition
//! flips; its first probes are spread over their period by a hash, so that a node full of probed
//! pods does not probe them all at once.
//!
//! Readiness is asked at once when a container is up, liveness at the next beat of a clock that
//! began with the pod, so that nobody is condemned in the moment of starting. A startup probe is
//! asked at once as well, to be quick; it may only gain by it: a failure before its first beat
//! does not count.
//!
//! Tasks end when their container is removed, when its pod is removed, and on liveness or startup
//! failure (the container is to be replaced).

pub mod check;
mod grpc;
mod http;
pub mod verdict;

use crate::events::{EventSink, EventType, field_path};
use crate::metrics::metrics;
use check::{Checker, Outcome, Target};
use k8s_openapi::api::core::v1::{Container, Pod, Probe};
use runtime::service::{ContainerId, RuntimeService};
use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use verdict::{Thresholds, Tracker};

/// Tries of a probe that cannot be made before it is given up until its next time.
const MAX_TRIES: usize = 3;

/// At most this many probes run at once on a node: enough for hundreds of pods with one-second
/// probes, few enough that a storm cannot starve the node.
const MAX_CONCURRENT: usize = 64;

/// Which of the three probes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProbeKind {
    /// The container has come up; until then the others wait.
    Startup,
    /// The container must be replaced when it fails.
    Liveness,
    /// The container takes traffic.
    Readiness,
}

impl ProbeKind {
    /// The word in events.
    pub fn word(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }
}

/// A verdict that changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeUpdate {
    /// Pod UID.
    pub pod_uid: String,
    /// Container.
    pub container_id: ContainerId,
    /// Its name in the pod.
    pub container_name: String,
    /// Which probe.
    pub kind: ProbeKind,
    /// The new verdict.
    pub success: bool,
    /// What the probe said, for events.
    pub message: String,
    /// The probe's own grace period, when it has one and failed.
    pub termination_grace_period_seconds: Option<i64>,
}

/// The verdicts that survived a restart of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Adopted {
    /// Startup had succeeded (or there is no startup probe).
    pub started: bool,
    /// Readiness had succeeded.
    pub ready: bool,
}

/// A running container to be probed.
#[derive(Debug, Clone)]
pub struct ProbeTarget {
    /// Its pod.
    pub pod: Arc<Pod>,
    /// Its name in the pod's containers or (sidecars) init containers.
    pub container_name: String,
    /// This incarnation.
    pub container_id: ContainerId,
    /// Where HTTP, TCP and gRPC probes go when they name no host.
    pub pod_ip: Option<IpAddr>,
    /// How long it runs already.
    pub running_for: Duration,
    /// How long the node has had the pod.
    pub pod_for: Duration,
    /// Verdicts to go on from, after a restart of the agent.
    pub adopted: Option<Adopted>,
}

/// What is known of one container.
#[derive(Debug)]
struct Entry {
    pod_uid: String,
    started: watch::Sender<bool>,
    ready: watch::Sender<bool>,
    terminating: CancellationToken,
    stop: CancellationToken,
}

/// The probes of a node. Cheap to clone.
#[derive(Debug)]
pub struct Probes<R> {
    inner: Arc<Inner<R>>,
}

impl<R> Clone for Probes<R> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

#[derive(Debug)]
struct Inner<R> {
    checker: Checker<R>,
    events: EventSink,
    updates: mpsc::Sender<ProbeUpdate>,
    tracker: TaskTracker,
    shutdown: CancellationToken,
    slots: Semaphore,
    entries: Mutex<HashMap<ContainerId, Arc<Entry>>>,
}

impl<R: RuntimeService> Probes<R> {
    /// Probes that report to `updates` and record events; tasks are spawned on `tracker` and end
    /// with `shutdown`.
    pub fn new(
        runtime: Arc<R>,
        events: EventSink,
        updates: mpsc::Sender<ProbeUpdate>,
        tracker: TaskTracker,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                checker: Checker::new(runtime),
                events,
                updates,
                tracker,
                shutdown,
                slots: Semaphore::new(MAX_CONCURRENT),
                entries: Mutex::default(),
            }),
        }
    }

    /// Starts the probes of a running container. Idempotent by container id.
    pub fn ensure(&self, target: ProbeTarget) {
        let Some(container) = find_container(&target.pod, &target.container_name) else {
            return;
        };
        let path = field_path(&target.pod, &target.container_name);
        let has_startup = container.startup_probe.is_some();
        let has_readiness = container.readiness_probe.is_some();
        let stop = self.inner.shutdown.child_token();
        let entry = Arc::new(Entry {
            pod_uid: target.pod.metadata.uid.clone().unwrap_or_default(),
            started: watch::Sender::new(target.adopted.map_or(!has_startup, |a| a.started)),
            ready: watch::Sender::new(target.adopted.map_or(!has_readiness, |a| a.ready)),
            terminating: stop.child_token(),
            stop,
        });
        {
            let mut entries = self.lock();
            if entries.contains_key(&target.container_id) {
                return;
            }
            entries.insert(target.container_id.clone(), Arc::clone(&entry));
        }
        for (kind, probe) in [
            (ProbeKind::Startup, &container.startup_probe),
            (ProbeKind::Liveness, &container.liveness_probe),
            (ProbeKind::Readiness, &container.readiness_probe),
        ] {
            if let Some(probe) = probe {
                let task = ProbeTask {
                    probes: self.clone(),
                    entry: Arc::clone(&entry),
                    target: target.clone(),
                    container: container.clone(),
                    field_path: path.clone(),
                    kind,
                    probe: probe.clone(),
                    since: Instant::now(),
                };
                self.inner.tracker.spawn(task.run());
            }
        }
    }

    /// Stops the probes of one container (it ended, or is to be replaced) and forgets it.
    pub fn remove_container(&self, id: &ContainerId) {
        if let Some(entry) = self.lock().remove(id) {
            entry.stop.cancel();
        }
    }

    /// Stops and forgets all containers of a pod.
    pub fn remove_pod(&self, uid: &str) {
        self.lock().retain(|_, entry| {
            let keep = entry.pod_uid != uid;
            if !keep {
                entry.stop.cancel();
            }
            keep
        });
    }

    /// The pod is being stopped: liveness and startup end, readiness goes on until its
    /// containers are gone.
    pub fn set_terminating(&self, uid: &str) {
        for entry in self.lock().values().filter(|e| e.pod_uid == uid) {
            entry.terminating.cancel();
        }
    }

    /// Whether a container is ready as far as probes are concerned; none when unknown.
    pub fn ready(&self, id: &ContainerId) -> Option<bool> {
        self.lock()
            .get(id)
            .map(|e| *e.ready.borrow() && *e.started.borrow())
    }

    /// Whether a container has started as far as probes are concerned; none when unknown.
    pub fn started(&self, id: &ContainerId) -> Option<bool> {
        self.lock().get(id).map(|e| *e.started.borrow())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<ContainerId, Arc<Entry>>> {
        self.inner
            .entries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A main or init container of the pod by name.
fn find_container(pod: &Pod, name: &str) -> Option<Container> {
    let spec = pod.spec.as_ref()?;
    let init = spec.init_containers.iter().flatten();
    let mut all = spec.containers.iter().chain(init);
    all.find(|c| c.name == name).cloned()
}

/// One probe of one container.
struct ProbeTask<R> {
    probes: Probes<R>,
    entry: Arc<Entry>,
    target: ProbeTarget,
    container: Container,
    field_path: String,
    kind: ProbeKind,
    probe: Probe,
    /// When `target` was true.
    since: Instant,
}

impl<R: RuntimeService> ProbeTask<R> {
    async fn run(self) {
        let ended = match self.kind {
            ProbeKind::Readiness => self.entry.stop.clone(),
            ProbeKind::Startup | ProbeKind::Liveness => self.entry.terminating.clone(),
        };
        // Dropping `probe_loop` at an await is safe: an exec in flight is killed by its own
        // time limit, verdicts are only changed between awaits.
        tokio::select! {
            () = ended.cancelled() => {}
            () = self.probe_loop() => {}
        }
    }

    async fn probe_loop(&self) {
        let mut tracker = Tracker::new(Thresholds::of(&self.probe), self.initial());
        if self.kind == ProbeKind::Startup {
            if *self.entry.started.borrow() {
                return;
            }
        } else {
            let mut started = self.entry.started.subscribe();
            if started.wait_for(|s| *s).await.is_err() {
                return;
            }
        }
        let period = seconds(self.probe.period_seconds, 10);
        if self.kind == ProbeKind::Startup && self.target.adopted.is_none() {
            tokio::time::sleep(self.initial_delay()).await;
            let early = self.ask().await;
            if early.success && self.take(&mut tracker, early).await.is_break() {
                return;
            }
        }
        let mut due = tokio::time::interval_at(Instant::now() + self.first_delay(), period);
        due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            due.tick().await;
            let outcome = self.ask().await;
            if self.take(&mut tracker, outcome).await.is_break() {
                return;
            }
        }
    }

    /// Notes what a probe found; breaks when this probe has no more to say.
    async fn take(&self, tracker: &mut Tracker, outcome: Outcome) -> ControlFlow<()> {
        if !outcome.success || outcome.warning {
            self.record(&outcome);
        }
        if outcome.errored {
            return ControlFlow::Continue(());
        }
        match tracker.observe(outcome.success) {
            Some(success) if !self.report(success, outcome.message).await => ControlFlow::Break(()),
            Some(_) | None => ControlFlow::Continue(()),
        }
    }

    /// The verdict before the first probe: alive, not ready, not started; or what it was.
    fn initial(&self) -> Option<bool> {
        match self.kind {
            ProbeKind::Startup => None,
            ProbeKind::Liveness => Some(true),
            ProbeKind::Readiness => Some(*self.entry.ready.borrow()),
        }
    }

    /// What is left of initialDelaySeconds, which count from the start of the container.
    fn initial_delay(&self) -> Duration {
        let initial = seconds(Some(self.probe.initial_delay_seconds.unwrap_or(0)), 0);
        let running = self.target.running_for + self.since.elapsed();
        initial.saturating_sub(running)
    }

    /// How long to wait for the first regular probe. Those of adopted containers are spread over
    /// their period.
    fn first_delay(&self) -> Duration {
        let wait = self.initial_delay();
        let period = seconds(self.probe.period_seconds, 10);
        if self.target.adopted.is_some() && wait.is_zero() {
            return period.mul_f64(phase(&self.target.container_id, self.kind));
        }
        match self.kind {
            ProbeKind::Readiness => wait,
            ProbeKind::Startup | ProbeKind::Liveness => {
                let pod_for = self.target.pod_for + self.since.elapsed();
                next_beat(pod_for + wait, period) - pod_for
            }
        }
    }

    async fn ask(&self) -> Outcome {
        // The semaphore is never closed.
        let _slot = self.probes.inner.slots.acquire().await;
        let target = Target {
            container_id: &self.target.container_id,
            container: &self.container,
            pod_ip: self.target.pod_ip,
            timeout: seconds(self.probe.timeout_seconds, 1),
        };
        let began = Instant::now();
        let mut outcome = self.probes.inner.checker.check(&self.probe, &target).await;
        for _ in 1..MAX_TRIES {
            if !outcome.errored {
                break;
            }
            outcome = self.probes.inner.checker.check(&self.probe, &target).await;
        }
        self.count(&outcome, began.elapsed());
        outcome
    }

    fn count(&self, outcome: &Outcome, took: Duration) {
        let meta = &self.target.pod.metadata;
        let of = |text: &Option<String>| text.clone().unwrap_or_default();
        let (pod, namespace, uid) = (of(&meta.name), of(&meta.namespace), of(&meta.uid));
        let (kind, container) = (self.kind.word(), self.target.container_name.as_str());
        let result = match (outcome.success, outcome.errored) {
            (true, _) => "successful",
            (false, false) => "failed",
            (false, true) => "unknown",
        };
        let all = metrics();
        all.probes
            .with([kind, result, container, &pod, &namespace, &uid])
            .inc();
        all.probe_durations
            .with([kind, container, &pod, &namespace])
            .observe_time(took);
    }

    fn record(&self, outcome: &Outcome) {
        let (reason, verb) = match (outcome.warning, outcome.errored) {
            (true, _) => ("ProbeWarning", "warning"),
            (false, true) => ("Unhealthy", "errored and resulted in unknown state"),
            (false, false) => ("Unhealthy", "failed"),
        };
        let message = format!("{} probe {verb}: {}", self.kind.word(), outcome.message);
        self.probes.inner.events.pod_event(
            &self.target.pod,
            Some(&self.field_path),
            EventType::Warning,
            reason,
            message,
        );
    }

    /// Publishes a changed verdict; false when this probe has no more to say.
    async fn report(&self, success: bool, message: String) -> bool {
        match self.kind {
            ProbeKind::Startup => {
                if success {
                    self.entry.started.send_replace(true);
                }
            }
            ProbeKind::Liveness => {}
            ProbeKind::Readiness => {
                self.entry.ready.send_replace(success);
            }
        }
        let update = ProbeUpdate {
            pod_uid: self.entry.pod_uid.clone(),
            container_id: self.target.container_id.clone(),
            container_name: self.target.container_name.clone(),
            kind: self.kind,
            success,
            message,
            termination_grace_period_seconds: self.probe.termination_grace_period_seconds,
        };
        let heard = self.probes.inner.updates.send(update).await.is_ok();
        let more = match self.kind {
            ProbeKind::Startup => false,
            ProbeKind::Liveness => success,
            ProbeKind::Readiness => true,
        };
        heard && more
    }
}

/// A whole number of seconds with the API's default; at least one where the default is.
fn seconds(value: Option<i32>, default: u64) -> Duration {
    let given = value.and_then(|v| u64::try_from(v).ok()).filter(|v| *v > 0);
    Duration::from_secs(given.unwrap_or(default))
}

/// The first whole multiple of `period` from `at` on.
fn next_beat(at: Duration, period: Duration) -> Duration {
    let period_ns = period.as_nanos().max(1);
    let beats = at.as_nanos().div_ceil(period_ns);
    Duration::from_nanos(u64::try_from(beats.saturating_mul(period_ns)).unwrap_or(u64::MAX))
}

/// A number in 0..1 that is the same for the same probe at every start of the agent.
fn phase(id: &ContainerId, kind: ProbeKind) -> f64 {
    // FNV-1a: short, and spreads ids well enough.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in id.as_str().bytes().chain(kind.word().bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    f64::from((hash >> 32) as u32) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests;
