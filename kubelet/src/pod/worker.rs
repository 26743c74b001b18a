//! One task per pod UID. It looks at everything, asks [`plan`](super::plan::plan), starts the
//! actions, reports, and sleeps until something changed: the desired pod, the runtime, a probe,
//! an action that ended, a time the plan named. It never waits for an action; several run side by
//! side, and what is under way is in [`Steps`].
//!
//! Dropping the task (the agent stops) drops its actions and touches no container.

mod desire;

use super::admission;
use super::clock::{Clock, nanoseconds};
use super::environment::PodEnvironment;
use super::execute::{self, Ended, Outcome};
use super::index::{ContainerRefs, PodEntry, PodIndex};
use super::measure::Measure;
use super::plan::kill::{self, words};
use super::plan::{self, Action, KillReason, PlanInput, PodPlan, Waiting};
use super::resize::ResizeNews;
use super::resize::tracker::ResizeTracker;
use super::spec;
use super::state::{
    BackoffLimits, Cause, CrashBackoff, EndingNote, Health, Kill, Lifecycle, Step, Steps,
    Terminating, UnhealthyKind,
};
use crate::events::{EventSink, EventType, field_path};
use crate::eviction::rank::EVICTED;
use crate::observe::{self, PodObservation};
use crate::probes::{ProbeKind, ProbeUpdate, Probes};
use crate::status::derive::{DeriveInput, derive};
use crate::status::publish::StatusPublisher;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use runtime::service::{ContainerId, RuntimeService};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinSet};
use tracing::{Instrument, debug, info, warn};

/// What all workers share.
#[derive(Debug)]
pub struct WorkerDeps<R, E> {
    /// The engine.
    pub runtime: Arc<R>,
    /// The node around pods.
    pub environment: Arc<E>,
    /// Probes.
    pub probes: Probes<R>,
    /// Events for users.
    pub events: EventSink,
    /// Where statuses go.
    pub publisher: StatusPublisher,
    /// What readers see.
    pub index: PodIndex,
    /// Bounds of the restart back-off.
    pub backoff: BackoffLimits,
    /// The time.
    pub clock: Clock,
    /// Rung when a pod has given resources back: requests that wait may fit now.
    pub room: Arc<Notify>,
}

/// What a pod shall be.
#[derive(Debug, Clone)]
pub struct Desired {
    /// Newest object, with the resources it was granted; of an orphan only its names.
    pub pod: Arc<Pod>,
    /// What became of requests for other resources.
    pub resize: ResizeNews,
    /// The source no longer has it.
    pub gone: bool,
    /// The node refuses it, or ends it for the sake of others.
    pub rejected: Option<Cause>,
    /// Seconds it has for that; none for what its spec says.
    pub grace_s: Option<u64>,
}

/// Ways to reach a worker besides its desired pod.
#[derive(Debug, Default)]
pub struct Mailbox {
    wake: Notify,
    probes: Mutex<Vec<ProbeUpdate>>,
    retry: AtomicBool,
    released: AtomicBool,
}

impl Mailbox {
    /// Something changed: look again.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// A probe's verdict changed.
    pub fn probe(&self, update: ProbeUpdate) {
        self.probes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(update);
        self.wake();
    }

    /// What a step may have failed for has changed: try failed steps again now.
    pub fn retry(&self) {
        self.retry.store(true, Ordering::Release);
        self.wake();
    }

    /// Whether the pod has given its resources back: it does not count for admission any more.
    pub fn is_released(&self) -> bool {
        self.released.load(Ordering::Acquire)
    }

    fn take_probes(&self) -> Vec<ProbeUpdate> {
        std::mem::take(&mut *self.probes.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The worker of one pod.
pub struct Worker<R: RuntimeService, E: PodEnvironment> {
    pub(super) deps: Arc<WorkerDeps<R, E>>,
    desired: watch::Receiver<Desired>,
    mailbox: Arc<Mailbox>,
    pub(super) pod: Arc<Pod>,
    gone: bool,
    lifecycle: Lifecycle,
    pub(super) steps: Steps,
    pub(super) health: Health,
    pub(super) backoffs: BTreeMap<String, CrashBackoff>,
    pub(super) volumes: Option<E::Volumes>,
    pub(super) images: BTreeMap<String, E::Image>,
    pub(super) messages: BTreeMap<ContainerId, String>,
    pub(super) resize: ResizeTracker,
    ended: Option<Cause>,
    ended_grace_s: Option<u64>,
    announced_backoff: BTreeMap<String, ContainerId>,
    status: Arc<PodStatus>,
    published: bool,
    pub(super) start_time: Timestamp,
    pub(super) adopting: bool,
    pub(super) actions: JoinSet<Outcome<E>>,
    pulls: Vec<AbortHandle>,
    panicked: bool,
    pub(super) measure: Measure,
}

impl<R: RuntimeService, E: PodEnvironment> std::fmt::Debug for Worker<R, E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker")
            .field("pod", &spec::describe(&self.pod))
            .field("lifecycle", &self.lifecycle)
            .finish_non_exhaustive()
    }
}

impl<R: RuntimeService, E: PodEnvironment> Worker<R, E> {
    /// A worker for the pod in `desired`.
    pub fn new(
        deps: Arc<WorkerDeps<R, E>>,
        desired: watch::Receiver<Desired>,
        mailbox: Arc<Mailbox>,
    ) -> Self {
        let first = desired.borrow().clone();
        let reported = first.pod.status.clone().unwrap_or_default();
        let measure = Measure::new(&reported);
        let start_time = reported
            .start_time
            .as_ref()
            .map_or_else(|| deps.clock.now(), |t| t.0);
        let note = deps.environment.note(&first.pod);
        let lifecycle = lifecycle(&first, note.as_ref(), deps.clock.now_ns());
        let mut steps = Steps::default();
        for id in note.map(|n| n.hooked).unwrap_or_default() {
            let kill = Kill {
                deadline_ns: i64::MAX,
                hook: Step::Done,
                ..Kill::default()
            };
            steps.kills.insert(id, kill);
        }
        let mut resize = ResizeTracker::new(&reported);
        resize.wanted = deps.environment.wanted_resources(&first.pod);
        resize.take(&first.resize);
        Self {
            deps,
            desired,
            mailbox,
            pod: first.pod,
            gone: first.gone,
            lifecycle,
            steps,
            health: Health::default(),
            backoffs: BTreeMap::new(),
            volumes: None,
            images: BTreeMap::new(),
            messages: BTreeMap::new(),
            resize,
            ended: None,
            ended_grace_s: None,
            announced_backoff: BTreeMap::new(),
            status: Arc::new(reported),
            published: false,
            start_time,
            adopting: true,
            actions: JoinSet::new(),
            pulls: Vec::new(),
            panicked: false,
            measure,
        }
    }

    /// Runs until the pod is finished: nothing of it is left but its last status.
    pub async fn run(mut self) -> Arc<PodStatus> {
        let span = tracing::info_span!(
            "pod",
            pod = format!("{}/{}", spec::namespace(&self.pod), spec::name(&self.pod)),
            uid = spec::uid(&self.pod)
        );
        async move {
            loop {
                self.take_desired();
                let began = Instant::now();
                let next = self.step();
                self.measure.looked(&self.pod, began);
                let wake_at_ns = match next {
                    Next::Finished => break,
                    Next::Again => continue,
                    Next::Wait(at) => at,
                };
                self.wait(wake_at_ns).await;
            }
            let uid = spec::uid(&self.pod);
            self.deps.probes.remove_pod(uid);
            self.deps.index.remove(uid);
            self.deps.publisher.forget(uid);
            info!("Pod is finished");
            self.status
        }
        .instrument(span)
        .await
    }

    /// One look: observe, plan, report, act.
    fn step(&mut self) -> Next {
        let now = self.deps.clock.now();
        if self.panicked && self.actions.is_empty() {
            // Its step would be in flight for ever. All steps are idempotent, and none is under
            // way that could be done twice.
            self.panicked = false;
            self.steps = Steps::default();
        }
        let observed = PodObservation::read(&*self.deps.runtime, spec::uid(&self.pod));
        self.take_probes();
        if self.mailbox.retry.swap(false, Ordering::AcqRel) {
            self.steps.retry_now();
        }
        self.track(&observed);
        let told = self.resize.look(&self.pod, &observed, &self.steps);
        self.tell_resize(told);
        let plan = plan::plan(&PlanInput {
            pod: &self.pod,
            gone: self.gone,
            lifecycle: &self.lifecycle,
            observed: &observed,
            steps: &self.steps,
            health: &self.health,
            backoffs: &self.backoffs,
            ended: self.ended.as_ref(),
            ended_grace_s: self.ended_grace_s,
            resize: self.resize.view(),
            start_time_ns: nanoseconds(self.start_time),
            now_ns: nanoseconds(now),
        });
        let PodPlan {
            lifecycle,
            actions,
            waiting,
            wake_at_ns,
        } = plan;
        let moved = lifecycle != self.lifecycle;
        if moved {
            self.enter(lifecycle, &observed);
        }
        self.announce_backoff(&observed, &waiting);
        self.report(&observed, &waiting, now);
        for action in actions {
            debug!(?action, "Action begins");
            self.begin(action, &observed);
        }
        match (&self.lifecycle, moved) {
            (Lifecycle::Finished, _) => Next::Finished,
            (_, true) => Next::Again,
            (_, false) => Next::Wait(wake_at_ns),
        }
    }

    /// Keeps on disk what a new agent must know of this ending.
    pub(super) fn keep_note(&self) {
        if let Lifecycle::Terminating(ending) = &self.lifecycle {
            let kills = self.steps.kills.iter();
            let hooked = kills.filter(|(_, k)| k.hook == Step::Done);
            let note = EndingNote {
                ending: ending.clone(),
                hooked: hooked.map(|(id, _)| id.clone()).collect(),
            };
            self.deps.environment.keep_note(&self.pod, &note);
        }
    }

    /// Goes to the next state.
    fn enter(&mut self, lifecycle: Lifecycle, observed: &PodObservation) {
        info!(from = ?self.lifecycle, to = ?lifecycle, "Pod state changes");
        if let (Lifecycle::Syncing, Lifecycle::Terminating(ending)) = (&self.lifecycle, &lifecycle)
        {
            self.deps.probes.set_terminating(spec::uid(&self.pod));
            self.deps.environment.stop_waiting(&self.pod);
            // Nobody waits for these images any more; the download itself is shared and bounded.
            for pull in self.pulls.drain(..) {
                pull.abort();
            }
            if let Cause::Failed { reason, message } = &ending.cause {
                let type_ = match reason.as_str() {
                    admission::PREEMPTING | EVICTED => EventType::Warning,
                    _ => EventType::Normal,
                };
                self.deps
                    .events
                    .pod_event(&self.pod, None, type_, reason, message);
            }
        }
        self.lifecycle = lifecycle;
        if let Lifecycle::Terminated(_) = self.lifecycle {
            self.mailbox.released.store(true, Ordering::Release);
            self.deps.room.notify_one();
        }
        if observed.running().next().is_some() {
            self.keep_note();
        }
        if let Lifecycle::Terminating(_) = &self.lifecycle {
            for instance in observed.running() {
                self.tell_kill(&instance.id, &instance.config.name, KillReason::PodEnds);
            }
        }
    }

    /// Tells users once that an instance is being stopped.
    fn tell_kill(&mut self, id: &ContainerId, container: &str, reason: KillReason) {
        let kill = self.steps.kills.entry(id.clone()).or_insert_with(|| Kill {
            deadline_ns: i64::MAX,
            ..Kill::default()
        });
        if reason == KillReason::Resize {
            kill.for_resize = true;
            // Other resources are a fresh start: crashes before do not delay it.
            self.backoffs.remove(container);
        }
        if !std::mem::replace(&mut kill.told, true) {
            let text = words(&self.pod, container, reason);
            self.container_event(container, EventType::Normal, "Killing", text);
        }
    }

    /// Sleeps until something may have changed.
    async fn wait(&mut self, wake_at_ns: Option<i64>) {
        let sleep = async {
            match wake_at_ns {
                Some(at) => {
                    let left = at.saturating_sub(self.deps.clock.now_ns()).max(0);
                    // One millisecond more: a timer that fires early would only look twice.
                    let left = Duration::from_nanos(u64::try_from(left).unwrap_or(0));
                    tokio::time::sleep(left + Duration::from_millis(1)).await;
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.mailbox.wake.notified() => {}
            changed = self.desired.changed() => {
                if changed.is_err() {
                    // The manager is gone: the agent stops, and this task with it.
                    std::future::pending::<()>().await;
                }
                self.desired.mark_changed();
            }
            Some(ended) = self.actions.join_next(), if !self.actions.is_empty() => {
                self.settle_joined(ended);
                while let Some(more) = self.actions.try_join_next() {
                    self.settle_joined(more);
                }
            }
            () = sleep => {}
        }
    }

    fn settle_joined(&mut self, ended: Result<Outcome<E>, tokio::task::JoinError>) {
        match ended {
            Ok(outcome) => self.settle(outcome),
            // An aborted pull; whatever needs it later starts anew.
            Err(error) if error.is_cancelled() => {}
            Err(error) => {
                warn!(%error, "Action panicked");
                self.panicked = true;
            }
        }
    }

    /// Takes probe verdicts in.
    fn take_probes(&mut self) {
        for update in self.mailbox.take_probes() {
            let id = update.container_id;
            match (update.kind, update.success) {
                (ProbeKind::Readiness, ready) => {
                    self.health.ready.insert(id, ready);
                }
                (ProbeKind::Startup, true) => {
                    self.health.started.insert(id, true);
                }
                (ProbeKind::Startup, false) => {
                    self.health.unhealthy.insert(id, UnhealthyKind::Startup);
                }
                (ProbeKind::Liveness, false) => {
                    self.health.unhealthy.insert(id, UnhealthyKind::Liveness);
                }
                (ProbeKind::Liveness, true) => {}
            }
        }
    }

    /// Tells users once per crash that a restart has to wait.
    fn announce_backoff(&mut self, observed: &PodObservation, waiting: &BTreeMap<String, Waiting>) {
        for (name, _) in waiting
            .iter()
            .filter(|(_, w)| w.reason == "CrashLoopBackOff")
        {
            let Some(dead) = observed.newest_dead(name) else {
                continue;
            };
            if self.announced_backoff.get(name) == Some(&dead.id) {
                continue;
            }
            self.announced_backoff.insert(name.clone(), dead.id.clone());
            let pod = spec::describe(&self.pod);
            let text = format!("Back-off restarting failed container {name} in pod {pod}");
            self.container_event(name, EventType::Warning, "BackOff", text);
        }
    }

    /// An event about a container.
    pub(super) fn container_event(&self, name: &str, type_: EventType, reason: &str, text: String) {
        let path = field_path(&self.pod, name);
        self.deps
            .events
            .pod_event(&self.pod, Some(&path), type_, reason, text);
    }

    /// Derives the status and hands it to readers and to the apiserver when it is news.
    fn report(
        &mut self,
        observed: &PodObservation,
        waiting: &BTreeMap<String, Waiting>,
        now: Timestamp,
    ) {
        if self.lifecycle == Lifecycle::Finished {
            return;
        }
        let host_ips = self.deps.environment.host_ips();
        let status = derive(&DeriveInput {
            pod: &self.pod,
            previous: &self.status,
            lifecycle: &self.lifecycle,
            observed,
            health: &self.health,
            waiting,
            starts: &self.steps.starts,
            resize: self.resize.view(),
            termination_messages: &self.messages,
            host_ips: &host_ips,
            start_time: self.start_time,
            now,
        });
        let changed = status != *self.status;
        if !changed && self.published {
            return;
        }
        if changed {
            self.status = Arc::new(status);
        }
        self.published = true;
        self.measure.status(&self.pod, &self.status, now);
        self.deps.index.insert(PodEntry {
            pod: self.pod.clone(),
            status: self.status.clone(),
            containers: container_refs(observed),
        });
        // After the farewell there is nobody to tell.
        if !self.gone && self.steps.farewell == Step::Idle {
            self.deps.publisher.publish(&self.pod, self.status.clone());
        }
    }

    /// Starts an action.
    fn begin(&mut self, action: Action, observed: &PodObservation) {
        if let Action::PreStop(hook) = &action {
            self.tell_kill(&hook.id, &hook.container, hook.reason);
            let kill = self.steps.kills.entry(hook.id.clone()).or_default();
            kill.deadline_ns = hook.deadline_ns;
            kill.hook.begin();
        }
        if let Action::KillContainer(stop) = &action {
            self.tell_kill(&stop.id, &stop.container, stop.reason);
            let kill = self.steps.kills.entry(stop.id.clone()).or_default();
            kill.deadline_ns = stop.deadline_ns;
            kill.step.begin();
        }
        if let Action::RunSandbox { attempt } = &action
            && *attempt > 0
        {
            let text = "Pod sandbox changed, it will be killed and re-created.";
            self.deps
                .events
                .pod_event(&self.pod, None, EventType::Normal, "SandboxChanged", text);
        }
        if matches!(action, Action::RunSandbox { .. } | Action::Resize) {
            self.resize.begin();
        }
        let is_pull = matches!(action, Action::EnsureImage { .. });
        let handle = execute::begin(self, action, observed, self.status.clone());
        if is_pull {
            self.measure.pull_begins();
            self.pulls.retain(|p| !p.is_finished());
            self.pulls.push(handle);
        }
    }
}

/// Where a pod stands when its worker begins. An ending that an agent before us began goes on.
fn lifecycle(first: &Desired, note: Option<&EndingNote>, now_ns: i64) -> Lifecycle {
    if let Some(cause) = &first.rejected {
        return Lifecycle::Terminating(Terminating {
            cause: cause.clone(),
            grace_s: 0,
            deadline_ns: 0,
        });
    }
    if let Some(note) = note {
        return Lifecycle::Terminating(note.ending.clone());
    }
    if spec::is_terminal(&first.pod) {
        // It ended before this agent knew it: never started again, only cleaned up.
        let grace_s = spec::grace_seconds(&first.pod);
        return Lifecycle::Terminating(Terminating {
            cause: Cause::Completed,
            grace_s,
            deadline_ns: kill::deadline_ns(now_ns, grace_s),
        });
    }
    Lifecycle::Syncing
}

/// What a look leads to.
enum Next {
    /// The state moved: look again at once.
    Again,
    /// Wait, at most until the time given (nanoseconds since the epoch).
    Wait(Option<i64>),
    /// The end.
    Finished,
}

/// Instances by name, for readers of logs.
fn container_refs(observed: &PodObservation) -> BTreeMap<String, ContainerRefs> {
    let mut refs: BTreeMap<String, ContainerRefs> = BTreeMap::new();
    for instance in &observed.containers {
        let entry = refs.entry(instance.config.name.clone()).or_default();
        if entry.current.is_none() {
            entry.current = Some(instance.id.clone());
            // A dead container that will run again is both: its logs are the newest and the
            // previous ones. An older one is about to be forgotten.
            if observe::exit(instance).is_some() {
                entry.previous = Some(instance.id.clone());
            }
        } else if entry.previous.is_none() {
            entry.previous = Some(instance.id.clone());
        }
    }
    refs
}
