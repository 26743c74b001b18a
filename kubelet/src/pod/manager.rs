//! Who has a worker: one per pod UID, from the first sight of a pod until nothing of it is left.
//!
//! One task reads the source's changes, the engine's news and probe verdicts, and passes them to
//! workers; it waits for nothing. A pod whose namesake (same namespace and name, another UID) is
//! still here queues behind it. A finished UID never gets a second worker, but for a static pod
//! whose manifest came back. After the first full sync of every source, and at every audit, pods
//! that the node holds but nobody wants are ended and cleaned up.

use super::admission;
use super::environment::{PodEnvironment, Rejection};
use super::mirror::Mirrors;
use super::resize::ResizeNews;
use super::resize::allocation::Allocation;
use super::state::Cause;
use super::worker::{Desired, Mailbox, Worker, WorkerDeps};
use super::{measure, spec};
use crate::events::EventType;
use crate::eviction::rank::{EVICTED, Eviction};
use crate::metrics::metrics;
use crate::probes::ProbeUpdate;
use crate::source::{self, PodChange, Source};
use k8s_openapi::api::core::v1::{Pod, PodSpec, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use runtime::service::{RuntimeEvent, RuntimeEventKind, RuntimeService};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

mod resize;

/// How often every worker looks again although nothing happened, and leftovers are looked for.
/// It only checks: nothing should ever be found.
const AUDIT: Duration = Duration::from_secs(60);

/// Grace of pods that no source knows.
const ORPHAN_GRACE_S: i64 = 1;

/// A pod with a worker.
#[derive(Debug)]
pub(super) struct Handle {
    /// What its worker was told.
    pub(super) desired: watch::Sender<Desired>,
    mailbox: Arc<Mailbox>,
    /// The newest object of its source.
    pub(super) newest: Arc<Pod>,
    /// What it was granted of that.
    pub(super) allocation: Allocation,
    /// Whether the record on disk says so.
    pub(super) recorded: bool,
}

/// The UIDs that finished last, as many as could still be shown by a stale list.
#[derive(Debug, Default)]
struct Tombstones {
    known: HashSet<String>,
    order: VecDeque<String>,
}

impl Tombstones {
    /// A full day of a busy node.
    const MAX: usize = 8192;

    fn contains(&self, uid: &str) -> bool {
        self.known.contains(uid)
    }

    fn insert(&mut self, uid: String) {
        if self.known.insert(uid.clone()) {
            self.order.push_back(uid);
        }
        if self.order.len() > Self::MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
    }
}

/// A worker's pod that is finished, and its last status.
type Ended = (String, Arc<PodStatus>);

/// Gives pods their workers.
#[derive(Debug)]
pub struct Manager<R: RuntimeService, E: PodEnvironment> {
    pub(super) deps: Arc<WorkerDeps<R, E>>,
    pub(super) workers: HashMap<String, Handle>,
    /// Pods that wait for their namesake, oldest first.
    queued: Vec<Desired>,
    /// UIDs that are finished: never taken up again, not even when a list from a stale cache of
    /// the apiserver shows them once more.
    finished: Tombstones,
    /// Sources that have not shown everything yet.
    awaited: BTreeSet<Source>,
    /// What the apiserver is shown of static pods.
    mirrors: Mirrors,
    tasks: JoinSet<Ended>,
}

/// What the manager listens to.
#[derive(Debug)]
pub struct Inputs {
    /// Desired pods.
    pub changes: mpsc::Receiver<PodChange>,
    /// Probe verdicts.
    pub probes: mpsc::Receiver<ProbeUpdate>,
    /// Namespaces in which a ConfigMap or Secret changed: what failed for want of one there is
    /// tried again at once.
    pub objects: mpsc::Receiver<String>,
    /// Pods to end because the node runs short.
    pub evictions: mpsc::Receiver<Eviction>,
    /// Shows that the manager goes round.
    pub heartbeat: Arc<Heartbeat>,
}

/// When the manager last went round; what `/healthz` judges it by.
#[derive(Debug)]
pub struct Heartbeat {
    start: Instant,
    last_s: AtomicU64,
}

impl Default for Heartbeat {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            last_s: AtomicU64::new(0),
        }
    }
}

impl Heartbeat {
    fn beat(&self) {
        let now = self.start.elapsed().as_secs();
        self.last_s.store(now, Ordering::Relaxed);
    }

    /// What is wrong when it stands still: it looks at all pods at least every [`AUDIT`].
    pub fn problem(&self) -> Option<String> {
        let silent = self.start.elapsed().as_secs() - self.last_s.load(Ordering::Relaxed);
        (silent > 3 * AUDIT.as_secs())
            .then(|| format!("[-]syncloop failed: no pod was looked at for {silent} s"))
    }
}

impl<R: RuntimeService, E: PodEnvironment> Manager<R, E> {
    /// Without pods, for the apiserver's only.
    pub fn new(deps: Arc<WorkerDeps<R, E>>) -> Self {
        Self::with_sources(deps, [Source::Api], Mirrors::default())
    }

    /// Without pods, for those of these sources.
    pub fn with_sources(
        deps: Arc<WorkerDeps<R, E>>,
        sources: impl IntoIterator<Item = Source>,
        mirrors: Mirrors,
    ) -> Self {
        Self {
            deps,
            workers: HashMap::new(),
            queued: Vec::new(),
            finished: Tombstones::default(),
            awaited: sources.into_iter().collect(),
            mirrors,
            tasks: JoinSet::new(),
        }
    }

    /// Runs until cancelled. Running containers are left alone then.
    pub async fn run(mut self, mut inputs: Inputs, cancel: CancellationToken) {
        let mut news = self.deps.runtime.events();
        let room = self.deps.room.clone();
        let mut audit = tokio::time::interval(AUDIT);
        audit.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            inputs.heartbeat.beat();
            tokio::select! {
                () = cancel.cancelled() => break,
                change = inputs.changes.recv() => match change {
                    Some(change) => self.change(change),
                    None => break,
                },
                Some(update) = inputs.probes.recv() => {
                    if let Some(worker) = self.workers.get(&update.pod_uid) {
                        worker.mailbox.probe(update);
                    }
                }
                Some(namespace) = inputs.objects.recv() => {
                    for worker in self.workers.values() {
                        if spec::namespace(&worker.desired.borrow().pod) == namespace {
                            worker.mailbox.retry();
                        }
                    }
                }
                Some(eviction) = inputs.evictions.recv() => self.evict(eviction),
                event = news.recv() => self.news(event),
                () = room.notified() => self.grant_waiting(),
                Some(ended) = self.tasks.join_next(), if !self.tasks.is_empty() => {
                    self.worker_ended(ended);
                }
                _ = audit.tick() => self.audit(),
            }
        }
        self.tasks.shutdown().await;
    }

    fn change(&mut self, change: PodChange) {
        match change {
            // Nothing to run: the static pod it shows has a worker of its own.
            PodChange::Set(pod) if source::is_mirror(&pod) => {
                self.mirrors.seen(&pod);
            }
            PodChange::Gone(pod) if source::is_mirror(&pod) => {
                self.mirrors.unseen(&pod);
            }
            PodChange::Set(pod) => self.set(pod),
            PodChange::Gone(pod) => self.gone(pod),
            PodChange::Synced(source) => self.synced(source),
        }
    }

    /// Whether every source has shown everything it has.
    pub(super) fn is_synced(&self) -> bool {
        self.awaited.is_empty()
    }

    /// A source has shown everything it has.
    fn synced(&mut self, source: Source) {
        self.awaited.remove(&source);
        let all = self.is_synced();
        if source == Source::Api || all {
            self.mirrors.synced(all);
        }
        if all {
            info!(pods = self.workers.len(), "Pods are synced");
            self.deps.index.set_synced();
            self.grant_waiting();
            self.end_unknown();
        }
    }

    /// A pod is new or changed.
    fn set(&mut self, pod: Arc<Pod>) {
        let uid = spec::uid(&pod).to_owned();
        if source::is_static(&pod) {
            self.end_strangers(&pod);
        } else if self.finished.contains(&uid) {
            return;
        }
        if let Some(worker) = self.workers.get(&uid) {
            let returned = source::is_static(&pod) && worker.desired.borrow().gone;
            if !returned {
                if source::is_static(&pod) {
                    self.mirrors.shown(&pod);
                }
                self.changed(&uid, pod);
                return;
            }
            // Its manifest came back while it ends: it starts again after that.
        }
        if let Some(waiting) = self.queued.iter_mut().find(|d| spec::uid(&d.pod) == uid) {
            waiting.pod = pod;
            return;
        }
        let desired = Desired {
            pod,
            resize: ResizeNews::default(),
            gone: false,
            rejected: None,
            grace_s: None,
        };
        if self.has_namesake(&desired.pod) {
            info!(
                pod = spec::describe(&desired.pod),
                "Pod waits for its namesake to end"
            );
            self.queued.push(desired);
        } else {
            self.start(desired);
        }
    }

    /// The source no longer has a pod.
    fn gone(&mut self, pod: Arc<Pod>) {
        let uid = spec::uid(&pod);
        self.queued.retain(|d| spec::uid(&d.pod) != uid);
        if let Some(worker) = self.workers.get_mut(uid) {
            if source::is_static(&pod) {
                self.mirrors.ending(&pod);
            }
            worker.newest = pod.clone();
            let granted = worker.allocation.granted(&pod).unwrap_or(pod);
            worker.desired.send_modify(|d| {
                d.pod = granted;
                d.gone = true;
            });
        }
    }

    /// Ends what the node still holds of another pod with this static pod's name: its manifest
    /// changed while no agent ran. The new one waits for that, whether the apiserver is there or
    /// not.
    fn end_strangers(&mut self, pod: &Pod) {
        let wanted = (spec::namespace(pod), spec::name(pod));
        let found: BTreeSet<String> = self
            .deps
            .runtime
            .list_sandboxes()
            .into_iter()
            .map(|s| s.config)
            .filter(|c| (c.namespace.as_str(), c.name.as_str()) == wanted)
            .map(|c| c.uid)
            .filter(|uid| uid != spec::uid(pod))
            .collect();
        for uid in found {
            self.end_orphan(uid, wanted.0.to_owned(), wanted.1.to_owned());
        }
    }

    /// Whether another pod of that name is still here.
    fn has_namesake(&self, pod: &Pod) -> bool {
        let name = |p: &Pod| (p.metadata.namespace.clone(), p.metadata.name.clone());
        self.workers
            .values()
            .any(|w| name(&w.desired.borrow().pod) == name(pod))
    }

    /// Gives a pod its worker, after admission if it is new to this node.
    fn start(&mut self, mut desired: Desired) {
        let uid = spec::uid(&desired.pod).to_owned();
        let newest = desired.pod.clone();
        let recorded = self.deps.environment.load_allocation(&uid);
        let allocation = recorded.clone().unwrap_or_else(|| Allocation::of(&newest));
        if let Some(granted) = allocation.granted(&newest) {
            desired.pod = granted;
            desired.resize.pending = resize::told(&newest);
        }
        if self.is_new(&desired, &uid)
            && let Err(refusal) = self.admit(&desired.pod)
        {
            let warning = EventType::Warning;
            let text = &refusal.message;
            self.deps
                .events
                .pod_event(&desired.pod, None, warning, &refusal.reason, text);
            let rejections = &metrics().admission_rejections;
            rejections.with([&refusal.reason]).inc();
            desired.rejected = Some(Cause::Failed {
                reason: refusal.reason,
                message: format!("Pod was rejected: {}", refusal.message),
            });
        }
        if source::is_static(&desired.pod) && !desired.gone {
            self.mirrors.shown(&desired.pod);
        }
        let mailbox = Arc::new(Mailbox::default());
        let (tx, rx) = watch::channel(desired);
        let worker = Worker::new(self.deps.clone(), rx, mailbox.clone());
        let handle = Handle {
            desired: tx,
            mailbox,
            newest,
            allocation,
            recorded: recorded.is_some(),
        };
        self.workers.insert(uid.clone(), handle);
        self.record_allocation(&uid);
        self.grant_waiting();
        self.tasks.spawn(async move { (uid, worker.run().await) });
    }

    /// Asks whether a new pod may run here, and makes room for it if it is critical.
    fn admit(&self, pod: &Arc<Pod>) -> Result<(), Rejection> {
        let others = self.others(spec::uid(pod));
        let admission = self.deps.environment.admit(pod, &others)?;
        self.preempt(&admission.preempt);
        Ok(())
    }

    /// Records what a pod was granted, if that is not done yet. A disk that is full is no reason to
    /// refuse a pod: its own steps tell of that, and the next audit tries again.
    fn record_allocation(&mut self, uid: &str) {
        let Some(worker) = self.workers.get_mut(uid) else {
            return;
        };
        let ends = {
            let desired = worker.desired.borrow();
            let leaves = desired.gone || desired.pod.metadata.deletion_timestamp.is_some();
            leaves || desired.rejected.is_some() || spec::is_terminal(&desired.pod)
        };
        if worker.recorded || ends {
            return;
        }
        let environment = &self.deps.environment;
        match environment.save_allocation(uid, &worker.allocation) {
            Ok(()) => worker.recorded = true,
            Err(error) => {
                let pod = spec::describe(&worker.newest);
                warn!(pod, %error, "Allocation not recorded, the next audit tries again");
            }
        }
    }

    /// Ends pods that have to give room to a critical one.
    pub(super) fn preempt(&self, victims: &[Arc<Pod>]) {
        for victim in victims {
            info!(pod = spec::describe(victim), "Preempting pod");
            metrics().preemptions.with([""]).inc();
            let cause = Cause::Failed {
                reason: admission::PREEMPTING.to_owned(),
                message: admission::PREEMPTED.to_owned(),
            };
            if let Some(worker) = self.workers.get(spec::uid(victim)) {
                worker.desired.send_modify(|d| d.rejected = Some(cause));
            }
        }
    }

    /// Ends a pod because the node runs short.
    fn evict(&self, eviction: Eviction) {
        let Some(worker) = self.workers.get(&eviction.uid) else {
            return;
        };
        worker.desired.send_modify(|d| {
            d.rejected = Some(Cause::Failed {
                reason: EVICTED.to_owned(),
                message: eviction.message,
            });
            d.grace_s = Some(eviction.grace_s);
        });
    }

    /// The pods that use resources of the node beside `uid`, as they were granted.
    pub(super) fn others(&self, uid: &str) -> Vec<Arc<Pod>> {
        let others = self.workers.iter().filter(|(other, _)| *other != uid);
        others
            .filter(|(_, worker)| !worker.mailbox.is_released())
            .map(|(_, worker)| worker.desired.borrow())
            .filter(|desired| desired.rejected.is_none() && !spec::is_terminal(&desired.pod))
            .map(|desired| desired.pod.clone())
            .collect()
    }

    /// Whether a pod has nothing on this node yet and wants to run.
    fn is_new(&self, desired: &Desired, uid: &str) -> bool {
        !desired.gone
            && desired.pod.metadata.deletion_timestamp.is_none()
            && !spec::is_terminal(&desired.pod)
            && self.deps.runtime.list_pod_sandboxes(uid).is_empty()
    }

    fn news(&mut self, event: Result<RuntimeEvent, broadcast::error::RecvError>) {
        match event {
            Ok(RuntimeEvent::Changed {
                pod_uid,
                container,
                kind,
                ..
            }) => {
                if kind == RuntimeEventKind::Exited
                    && let Some(entry) = self.deps.index.by_uid(&pod_uid)
                    && let Some(ended) =
                        container.and_then(|id| self.deps.runtime.container_status(&id))
                {
                    measure::end(&entry.pod, &ended);
                }
                if let Some(worker) = self.workers.get(&pod_uid) {
                    worker.mailbox.wake();
                }
            }
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                warn!(missed, "Engine news missed, looking at all pods");
                self.wake_all();
            }
            // The engine lives as long as the agent.
            Err(broadcast::error::RecvError::Closed) => {}
        }
    }

    fn wake_all(&self) {
        for worker in self.workers.values() {
            worker.mailbox.wake();
        }
    }

    fn audit(&mut self) {
        self.wake_all();
        if self.is_synced() {
            for uid in self.workers.keys().cloned().collect::<Vec<_>>() {
                self.record_allocation(&uid);
            }
            self.grant_waiting();
            self.end_unknown();
        }
    }

    /// A worker's pod is finished: its namesake may start.
    fn worker_ended(&mut self, ended: Result<Ended, tokio::task::JoinError>) {
        let (uid, last) = match ended {
            Ok(ended) => ended,
            Err(error) => {
                // Its handle stays: better a pod without a worker than two workers.
                warn!(%error, "Pod worker panicked");
                return;
            }
        };
        if let Some(worker) = self.workers.remove(&uid)
            && source::is_static(&worker.desired.borrow().pod)
        {
            // Its UID is its manifest's, which may come back.
            self.mirrors.ended(&worker.desired.borrow().pod);
            let returned = self.queued.iter_mut().filter(|d| spec::uid(&d.pod) == uid);
            returned.for_each(|d| d.pod = with_history(&d.pod, &last));
        } else {
            self.finished.insert(uid);
        }
        self.grant_waiting();
        let mut still = Vec::new();
        for desired in std::mem::take(&mut self.queued) {
            if self.has_namesake(&desired.pod) {
                still.push(desired);
            } else {
                self.start(desired);
            }
        }
        self.queued = still;
    }

    /// Ends what the node holds of pods nobody wants.
    fn end_unknown(&mut self) {
        let mut unknown: BTreeMap<String, (String, String)> = BTreeMap::new();
        for sandbox in self.deps.runtime.list_sandboxes() {
            let config = sandbox.config;
            unknown.insert(config.uid, (config.namespace, config.name));
        }
        for uid in self.deps.environment.leftovers() {
            unknown.entry(uid).or_default();
        }
        unknown.retain(|uid, _| {
            !self.workers.contains_key(uid)
                && !self.queued.iter().any(|d| spec::uid(&d.pod) == uid)
                && !self.finished.contains(uid)
        });
        for (uid, (namespace, name)) in unknown {
            self.end_orphan(uid, namespace, name);
        }
    }

    /// Gives a worker to what the node holds of a pod of which only names are known, to end it.
    fn end_orphan(&mut self, uid: String, namespace: String, name: String) {
        if self.workers.contains_key(&uid) {
            return;
        }
        info!(
            uid,
            namespace, name, "Pod is unknown to its source, ending it"
        );
        let metadata = ObjectMeta {
            uid: Some(uid),
            namespace: Some(namespace),
            name: Some(name),
            ..ObjectMeta::default()
        };
        // What its spec said is gone with it; the stock kubelet grants a second.
        let spec = PodSpec {
            termination_grace_period_seconds: Some(ORPHAN_GRACE_S),
            ..PodSpec::default()
        };
        let pod = Arc::new(Pod {
            metadata,
            spec: Some(spec),
            ..Pod::default()
        });
        self.start(Desired {
            pod,
            resize: ResizeNews::default(),
            gone: true,
            rejected: None,
            grace_s: None,
        });
    }
}

/// A pod that comes back under its old UID, with what became of its containers: restarts are
/// counted on.
fn with_history(pod: &Arc<Pod>, last: &PodStatus) -> Arc<Pod> {
    let mut pod = (**pod).clone();
    let status = pod.status.get_or_insert_default();
    status.container_statuses = last.container_statuses.clone();
    status.init_container_statuses = last.init_container_statuses.clone();
    Arc::new(pod)
}
