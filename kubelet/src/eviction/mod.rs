//! Node-pressure eviction: a node that runs out of memory, disk or process ids ends pods before
//! the kernel does it at random; and pods that take more of its disk than they may are ended.
//!
//! ```text
//!  statistics ─▶ thresholds (pure) ─▶ pressures ─▶ Node conditions, admission
//!                      │ due
//!                      ▼ unused images first
//!                 rank (pure), local (pure) ─▶ Eviction ─▶ pod::manager ends the pod
//! ```
//! Every [`PERIOD`] the node is looked at, which costs a few small reads. Pods are measured only
//! when a threshold is met or a pod has limits of its own. One pod at a time is evicted for the
//! node's sake, and the next look waits for its end. Forbidden here: ending anything itself.

mod local;
pub mod rank;
pub mod thresholds;

use crate::config::Config;
use crate::events::{EventSink, EventType};
use crate::images::gc::Reclaim;
use crate::metrics::metrics;
use crate::node::NodeHandle;
use crate::pod::index::{PodEntry, PodIndex};
use crate::pod::spec;
use crate::stats::Stats;
use crate::stats::summary::Summary;
use crate::status::derive::is_terminal_phase;
use k8s_openapi::api::core::v1::ObjectReference;
use rank::{Candidate, Disks, Eviction};
use runtime::service::{ImageService, RuntimeService, SandboxState};
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use thresholds::{Look, Memory, Observations, Rule, is_met, observe, rules};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// How often the node is looked at, as the stock kubelet.
const PERIOD: Duration = Duration::from_secs(10);
/// An evicted pod has so long to be gone before the next look.
const CLEANUP: Duration = Duration::from_secs(30);

/// What the task works with.
#[derive(Debug)]
pub struct Evictor<R> {
    /// The engine.
    pub runtime: Arc<R>,
    /// The node's configuration.
    pub config: Arc<Config>,
    /// Pods that run here.
    pub index: PodIndex,
    /// What they take.
    pub stats: Arc<Stats<R>>,
    /// Learns of pressures.
    pub node: NodeHandle,
    /// For users.
    pub events: EventSink,
    /// To the pod manager, which ends pods.
    pub orders: mpsc::Sender<Eviction>,
    /// Removes images nobody uses.
    pub images: Reclaim,
}

impl<R: RuntimeService + ImageService> Evictor<R> {
    /// Runs until stopped.
    pub async fn run(self, stop: CancellationToken) {
        let rules = rules(&self.config);
        let disks = Disks {
            dedicated_images: differ(&self.config.root_dir, &self.config.runtime_root),
        };
        let mut memory = Memory::default();
        tokio::select! {
            () = stop.cancelled() => return,
            () = self.index.synced() => {}
        }
        loop {
            let evicted = tokio::select! {
                () = stop.cancelled() => return,
                evicted = self.look(&rules, &mut memory, disks) => evicted,
            };
            let pause = async {
                if evicted.is_empty() {
                    tokio::time::sleep(PERIOD).await;
                } else {
                    self.until_gone(&evicted).await;
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = pause => {}
            }
        }
    }

    /// One look; the UIDs of the pods it had ended.
    async fn look(&self, rules: &[Rule], memory: &mut Memory, disks: Disks) -> Vec<String> {
        let Some(node) = self.measure(false).await else {
            return Vec::new();
        };
        let observations = observe(&node.node);
        let transition = self.config.eviction_transition_period;
        let look = memory.look(rules, &observations, transition, Instant::now());
        self.node.set_pressures(look.pressures.clone());
        let entries = self.active();
        let limited = entries.iter().any(|e| local::is_limited(&e.pod));
        if !limited && look.due.is_empty() {
            return Vec::new();
        }
        let candidates = self.candidates(&entries).await;
        if self.config.local_storage_isolation {
            let over = local::evictions(&candidates, disks);
            if !over.is_empty() {
                return self.order(over).await;
            }
        }
        let due = self.relieve(rules, &look, &observations, candidates, disks);
        let due = due.await;
        self.order(due).await
    }

    /// What to do against the most urgent shortage: unused images first, then a pod.
    async fn relieve(
        &self,
        rules: &[Rule],
        look: &Look,
        observations: &Observations,
        mut candidates: Vec<Candidate>,
        disks: Disks,
    ) -> Vec<Eviction> {
        let Some(first) = look.due.first().map(|n| &rules[*n]) else {
            return Vec::new();
        };
        let resource = first.signal.resource();
        info!(
            resource,
            signal = first.signal.name(),
            "The node runs short"
        );
        self.node_event(format!("Attempting to reclaim {resource}"));
        if first.signal.is_disk() && self.is_relieved_by_images(rules).await {
            info!(resource, "Unused images made room enough");
            return Vec::new();
        }
        rank::rank(&mut candidates, first.signal, disks);
        let due: Vec<&Rule> = look.due.iter().map(|n| &rules[*n]).collect();
        let most = u64::try_from(self.config.eviction_max_pod_grace_s).unwrap_or(0);
        let chosen = rank::choose(&candidates, first, &due, observations, most);
        if chosen.is_none() {
            warn!(
                resource,
                "The node runs short and has no pod that may be evicted"
            );
        }
        chosen.into_iter().collect()
    }

    /// Removes all images nobody uses; whether nothing is short any more.
    async fn is_relieved_by_images(&self, rules: &[Rule]) -> bool {
        self.images.all_unused().await;
        let Some(after) = self.measure(false).await else {
            return false;
        };
        let observations = observe(&after.node);
        !rules.iter().any(|rule| is_met(rule, &observations, true))
    }

    /// Has pods ended.
    async fn order(&self, evictions: Vec<Eviction>) -> Vec<String> {
        let mut ordered = Vec::new();
        for eviction in evictions {
            info!(
                uid = eviction.uid,
                message = eviction.message,
                "Evicting pod"
            );
            metrics().evictions.with([eviction.signal]).inc();
            ordered.push(eviction.uid.clone());
            if self.orders.send(eviction).await.is_err() {
                // The manager is gone: the agent stops.
                break;
            }
        }
        ordered
    }

    /// Measures the node, or all pods too. None while the agent stops.
    async fn measure(&self, pods: bool) -> Option<Summary> {
        let stats = Arc::clone(&self.stats);
        let measured = tokio::task::spawn_blocking(move || match pods {
            true => stats.summary(),
            false => stats.node_only(),
        });
        measured.await.ok()
    }

    /// Pods that may still run something.
    fn active(&self) -> Vec<Arc<PodEntry>> {
        let mut entries = self.index.list();
        entries.retain(|e| !is_terminal_phase(&e.status));
        entries
    }

    async fn candidates(&self, entries: &[Arc<PodEntry>]) -> Vec<Candidate> {
        let summary = self.measure(true).await.unwrap_or_default();
        let mut stats: BTreeMap<String, _> = summary
            .pods
            .into_iter()
            .map(|p| (p.pod_ref.uid.clone(), p))
            .collect();
        let candidate = |entry: &Arc<PodEntry>| Candidate {
            pod: entry.pod.clone(),
            stats: stats.remove(spec::uid(&entry.pod)),
        };
        entries.iter().map(candidate).collect()
    }

    /// Waits until pods have no process left, for [`CLEANUP`] at most.
    async fn until_gone(&self, uids: &[String]) {
        let mut news = self.runtime.events();
        let gone = async {
            let runs = |uid: &String| {
                let sandboxes = self.runtime.list_pod_sandboxes(uid);
                sandboxes.iter().any(|s| s.state == SandboxState::Ready)
            };
            while uids.iter().any(runs) {
                if let Err(tokio::sync::broadcast::error::RecvError::Closed) = news.recv().await {
                    return;
                }
            }
        };
        if tokio::time::timeout(CLEANUP, gone).await.is_err() {
            warn!(?uids, "Evicted pods take long to end");
        }
    }

    fn node_event(&self, text: String) {
        let node = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(self.config.node_name.clone()),
            uid: Some(self.config.node_name.clone()),
            ..ObjectReference::default()
        };
        let warning = EventType::Warning;
        self.events
            .object_event(node, warning, "EvictionThresholdMet", text);
    }
}

/// Whether two directories are on filesystems of their own.
fn differ(a: &Path, b: &Path) -> bool {
    let device = |path: &Path| std::fs::metadata(path).map(|m| m.dev()).ok();
    device(a) != device(b)
}
