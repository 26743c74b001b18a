//! Pods from source to publisher on the engine in memory.

mod resize;
mod rounds;

use super::admission::Admission;
use super::clock::Clock;
use super::environment::{PodEnvironment, Rejection, ResizeRefusal, StartContext, StepError};
use super::fixture::{deleting, simple};
use super::index::PodIndex;
use super::manager::{Inputs, Manager};
use super::mirror::Mirrors;
use super::resize::actuate::{Running, WantedResources};
use super::resize::allocation::Allocation;
use super::resize::queue::compute_requests;
use super::state::{BackoffLimits, EndingNote};
use super::worker::WorkerDeps;
use crate::events::EventSink;
use crate::eviction::rank::Eviction;
use crate::observe::is_running;
use crate::probes::Probes;
use crate::source::{PodChange, Source};
use crate::status::publish::{StatusApi, StatusApiError, StatusPublisher};
use k8s_openapi::api::core::v1::{Container, Pod};
use proptest::prelude::*;
use runtime::fake::{FakeRuntime, OnStop};
use runtime::service::{ContainerConfig, ImageConfig, RuntimeService, SandboxConfig, SandboxState};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A node that has everything, or fails as scripted.
#[derive(Debug, Default)]
struct FakeNode {
    reject: Mutex<Option<Rejection>>,
    config_errors: Mutex<Vec<StepError>>,
    leftovers: Mutex<Vec<String>>,
    torn_down: Mutex<Vec<String>>,
    notes: Mutex<BTreeMap<String, EndingNote>>,
    room: Mutex<Option<i64>>,
    allocations: Mutex<BTreeMap<String, Allocation>>,
    resized: Mutex<Vec<String>>,
}

impl PodEnvironment for FakeNode {
    type Volumes = ();
    type Image = ();

    fn admit(&self, _: &Pod, _: &[Arc<Pod>]) -> Result<Admission, Rejection> {
        let reject = self.reject.lock().unwrap().clone();
        reject.map_or(Ok(Admission::default()), Err)
    }
    fn admit_resize(
        &self,
        pod: &Pod,
        _: &Pod,
        others: &[Arc<Pod>],
    ) -> Result<Admission, ResizeRefusal> {
        let Some(room) = *self.room.lock().unwrap() else {
            return Ok(Admission::default());
        };
        let used: i64 = others.iter().map(|p| compute_requests(p).0).sum();
        if used + compute_requests(pod).0 <= room {
            return Ok(Admission::default());
        }
        Err(ResizeRefusal {
            reason: "OutOfcpu".to_owned(),
            infeasible: false,
            message: "full".to_owned(),
        })
    }
    fn load_allocation(&self, uid: &str) -> Option<Allocation> {
        self.allocations.lock().unwrap().get(uid).cloned()
    }
    fn save_allocation(&self, uid: &str, allocation: &Allocation) -> Result<(), StepError> {
        let mut all = self.allocations.lock().unwrap();
        all.insert(uid.to_owned(), allocation.clone());
        Ok(())
    }
    fn wanted_resources(&self, _: &Pod) -> Option<WantedResources> {
        None
    }
    async fn resize(
        &self,
        pod: &Arc<Pod>,
        _: WantedResources,
        _: Vec<Running>,
    ) -> Result<(), StepError> {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        self.resized.lock().unwrap().push(uid);
        Ok(())
    }
    fn host_ips(&self) -> Vec<String> {
        vec!["192.0.2.1".to_owned()]
    }
    async fn prepare_volumes(&self, _: &Arc<Pod>) -> Result<(), StepError> {
        Ok(())
    }
    async fn update_volumes(&self, _: &Arc<Pod>) {}
    async fn prepare_sandbox(
        &self,
        pod: &Arc<Pod>,
        attempt: u32,
    ) -> Result<SandboxConfig, StepError> {
        let of = |s: &Option<String>| s.clone().unwrap_or_default();
        Ok(SandboxConfig {
            uid: of(&pod.metadata.uid),
            name: of(&pod.metadata.name),
            namespace: of(&pod.metadata.namespace),
            attempt,
            ..SandboxConfig::default()
        })
    }
    async fn ensure_image(&self, _: &Arc<Pod>, _: &Container) -> Result<(), StepError> {
        Ok(())
    }
    async fn container_config(
        &self,
        _: &Arc<Pod>,
        container: &Container,
        _: StartContext<(), ()>,
    ) -> Result<ContainerConfig, StepError> {
        if let Some(error) = self.config_errors.lock().unwrap().pop() {
            return Err(error);
        }
        let image = container.image.clone().unwrap_or_default();
        Ok(ContainerConfig {
            name: container.name.clone(),
            image: image.clone(),
            user_image: image,
            ..ContainerConfig::default()
        })
    }
    fn keep_note(&self, pod: &Pod, note: &EndingNote) {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        self.notes.lock().unwrap().insert(uid, note.clone());
    }
    fn note(&self, pod: &Pod) -> Option<EndingNote> {
        let notes = self.notes.lock().unwrap();
        notes.get(pod.metadata.uid.as_deref()?).cloned()
    }
    async fn teardown(&self, pod: &Arc<Pod>) -> Result<(), StepError> {
        self.torn_down
            .lock()
            .unwrap()
            .push(pod.metadata.uid.clone().unwrap_or_default());
        Ok(())
    }
    async fn purge(&self, pod: &Arc<Pod>) -> Result<(), StepError> {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        self.leftovers.lock().unwrap().retain(|l| *l != uid);
        Ok(())
    }
    fn leftovers(&self) -> Vec<String> {
        self.leftovers.lock().unwrap().clone()
    }
}

/// An apiserver that notes statuses and deletions by pod UID.
#[derive(Debug, Clone, Default)]
struct Apiserver {
    statuses: Arc<Mutex<BTreeMap<String, Vec<Value>>>>,
    deleted: Arc<Mutex<Vec<String>>>,
}

impl StatusApi for Apiserver {
    async fn patch(&self, _: &str, _: &str, body: &Value) -> Result<u64, StatusApiError> {
        let uid = body["metadata"]["uid"].as_str().unwrap().to_owned();
        let mut statuses = self.statuses.lock().unwrap();
        let all = statuses.entry(uid).or_default();
        all.push(body["status"].clone());
        Ok(1000 + all.len() as u64)
    }
    async fn delete(&self, _: &str, _: &str, uid: &str) -> Result<(), StatusApiError> {
        self.deleted.lock().unwrap().push(uid.to_owned());
        Ok(())
    }
}

/// An agent's core on fakes.
struct Lab {
    runtime: Arc<FakeRuntime>,
    node: Arc<FakeNode>,
    api: Apiserver,
    events: EventSink,
    index: PodIndex,
    changes: mpsc::Sender<PodChange>,
    objects: mpsc::Sender<String>,
    evictions: mpsc::Sender<Eviction>,
    cancel: CancellationToken,
}

impl Lab {
    fn start(runtime: Arc<FakeRuntime>) -> Self {
        Self::with_sources(runtime, &[Source::Api])
    }

    fn with_sources(runtime: Arc<FakeRuntime>, sources: &[Source]) -> Self {
        runtime.preload("a:1", ImageConfig::default());
        let (api, events, index) = (Apiserver::default(), EventSink::memory(), PodIndex::new());
        let (changes, changes_rx) = mpsc::channel(64);
        let (probe_tx, probes_rx) = mpsc::channel(64);
        let cancel = CancellationToken::new();
        let publisher = StatusPublisher::default();
        let node = Arc::new(FakeNode::default());
        let tracker = TaskTracker::new();
        let probes = Probes::new(
            runtime.clone(),
            events.clone(),
            probe_tx,
            tracker,
            cancel.clone(),
        );
        let deps = Arc::new(WorkerDeps {
            runtime: runtime.clone(),
            environment: node.clone(),
            probes,
            events: events.clone(),
            publisher: publisher.clone(),
            index: index.clone(),
            backoff: BackoffLimits::default(),
            clock: Clock::Wall,
            room: Arc::default(),
        });
        tokio::spawn(publisher.task(api.clone()).run(cancel.clone()));
        let (objects, objects_rx) = mpsc::channel(8);
        let (evictions, evictions_rx) = mpsc::channel(8);
        let inputs = Inputs {
            changes: changes_rx,
            probes: probes_rx,
            objects: objects_rx,
            evictions: evictions_rx,
            heartbeat: Arc::default(),
        };
        let mirrors = Mirrors::new(publisher, index.clone());
        let manager = Manager::with_sources(deps, sources.iter().copied(), mirrors);
        tokio::spawn(manager.run(inputs, cancel.clone()));
        Self {
            runtime,
            node,
            api,
            events,
            index,
            changes,
            objects,
            evictions,
            cancel,
        }
    }

    async fn set(&self, pod: Pod) {
        self.changes
            .send(PodChange::Set(Arc::new(pod)))
            .await
            .unwrap();
    }

    async fn gone(&self, pod: Pod) {
        self.changes
            .send(PodChange::Gone(Arc::new(pod)))
            .await
            .unwrap();
    }

    async fn phase(&self, uid: &str, phase: &str) {
        let wanted = || {
            self.index
                .by_uid(uid)
                .is_some_and(|e| e.status.phase.as_deref() == Some(phase))
        };
        until(&format!("{uid} {phase}"), wanted).await;
    }

    fn reasons(&self) -> Vec<String> {
        self.events
            .recorded()
            .into_iter()
            .map(|e| e.reason)
            .collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// Lets the tasks run until a condition holds. With the clock paused, time passes only when all
/// tasks wait.
async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..20_000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("never: {what}");
}

fn named(uid: &str, mut pod: Pod) -> Pod {
    pod.metadata.uid = Some(uid.to_owned());
    pod.metadata.name = Some(format!("pod-{uid}"));
    pod
}

#[tokio::test(start_paused = true)]
async fn a_pod_runs_is_reported_once_and_goes_when_deleted() {
    let lab = Lab::start(Arc::new(FakeRuntime::new()));
    lab.set(simple("Always")).await;
    lab.phase("u1", "Running").await;
    assert_eq!(lab.reasons(), ["Created", "Started"]);
    until("patched", || !lab.api.statuses.lock().unwrap().is_empty()).await;
    {
        let statuses = lab.api.statuses.lock().unwrap();
        assert_eq!(statuses["u1"].len(), 1, "one PATCH from nothing to ready");
        assert_eq!(statuses["u1"][0]["phase"], "Running");
    }
    lab.set(deleting(simple("Always"), 30)).await;
    until("deleted", || {
        lab.api.deleted.lock().unwrap().contains(&"u1".to_owned())
    })
    .await;
    until("removed", || lab.runtime.list_sandboxes().is_empty()).await;
    assert!(
        lab.node
            .torn_down
            .lock()
            .unwrap()
            .contains(&"u1".to_owned())
    );
    let last = lab.api.statuses.lock().unwrap()["u1"]
        .last()
        .unwrap()
        .clone();
    assert!(
        ["Failed", "Succeeded"].contains(&last["phase"].as_str().unwrap()),
        "{last}"
    );
    // The source shows it once more before it goes: it is not started again.
    lab.set(deleting(simple("Always"), 0)).await;
    lab.gone(simple("Always")).await;
    until("forgotten", || lab.index.by_uid("u1").is_none()).await;
    assert!(lab.runtime.list_sandboxes().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_container_that_ends_is_restarted_with_a_count() {
    let lab = Lab::start(Arc::new(FakeRuntime::new()));
    lab.set(simple("Always")).await;
    lab.phase("u1", "Running").await;
    let first = lab.runtime.find("u1", "a").unwrap();
    lab.runtime.exit(&first.id, 1);
    until("restarted", || {
        lab.runtime
            .find("u1", "a")
            .is_some_and(|c| c.id != first.id && is_running(&c))
    })
    .await;
    until("counted", || {
        lab.index.by_uid("u1").is_some_and(|e| {
            e.status
                .container_statuses
                .iter()
                .flatten()
                .any(|s| s.restart_count == 1 && s.ready)
        })
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_lost_sandbox_is_replaced_and_told() {
    let lab = Lab::start(Arc::new(FakeRuntime::new()));
    lab.set(simple("Always")).await;
    lab.phase("u1", "Running").await;
    let old = lab.runtime.list_sandboxes()[0].id.clone();
    lab.runtime.kill_shim(&old);
    until("replaced", || {
        lab.runtime
            .list_sandboxes()
            .iter()
            .any(|s| s.id != old && s.state == SandboxState::Ready && s.config.attempt == 1)
            && lab.runtime.find("u1", "a").is_some_and(|c| is_running(&c))
    })
    .await;
    assert!(lab.reasons().contains(&"SandboxChanged".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_completed_pod_is_reported_and_its_volumes_are_given_back() {
    let runtime = Arc::new(FakeRuntime::new());
    runtime.exit_on_start("a", 0);
    let lab = Lab::start(runtime);
    lab.set(simple("Never")).await;
    lab.phase("u1", "Succeeded").await;
    until("torn down", || {
        !lab.node.torn_down.lock().unwrap().is_empty()
    })
    .await;
    assert!(lab.runtime.find("u1", "a").is_some(), "kept for its logs");
}

#[tokio::test(start_paused = true)]
async fn a_rejected_pod_fails_and_never_gets_a_sandbox() {
    let lab = Lab::start(Arc::new(FakeRuntime::new()));
    *lab.node.reject.lock().unwrap() = Some(Rejection {
        reason: "OutOfcpu".to_owned(),
        message: "no".to_owned(),
    });
    lab.set(simple("Always")).await;
    lab.phase("u1", "Failed").await;
    until("patched", || !lab.api.statuses.lock().unwrap().is_empty()).await;
    let status = lab.api.statuses.lock().unwrap()["u1"][0].clone();
    assert_eq!(status["message"], "Pod was rejected: no");
    assert!(lab.runtime.list_sandboxes().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_config_error_waits_with_its_reason_and_is_retried_when_the_object_comes() {
    let lab = Lab::start(Arc::new(FakeRuntime::new()));
    lab.node.config_errors.lock().unwrap().push(StepError {
        retry_after: Some(Duration::from_millis(50)),
        ..StepError::new("CreateContainerConfigError", "configmap \"x\" not found")
    });
    lab.set(simple("Always")).await;
    until("waiting", || {
        lab.index.by_uid("u1").is_some_and(|e| {
            serde_json::to_string(&*e.status)
                .unwrap()
                .contains("CreateContainerConfigError")
        })
    })
    .await;
    lab.objects.send("ns".to_owned()).await.unwrap();
    lab.phase("u1", "Running").await;
}

#[tokio::test(start_paused = true)]
async fn pods_first_seen_ended_or_deleted_are_never_started() {
    let lab = Lab::start(Arc::new(FakeRuntime::new()));
    let mut ended = named("e", simple("Always"));
    ended.status = serde_json::from_value(serde_json::json!({"phase": "Failed"})).unwrap();
    lab.set(ended).await;
    lab.set(named("d", deleting(simple("Always"), 30))).await;
    until("deleted", || {
        lab.api.deleted.lock().unwrap().contains(&"d".to_owned())
    })
    .await;
    until("torn down", || {
        lab.node.torn_down.lock().unwrap().contains(&"e".to_owned())
    })
    .await;
    assert!(lab.runtime.calls().is_empty(), "{:?}", lab.runtime.calls());
}

#[tokio::test(start_paused = true)]
async fn a_successor_waits_for_its_namesake() {
    let runtime = Arc::new(FakeRuntime::new());
    runtime.on_stop("a", OnStop::Ignores);
    let lab = Lab::start(runtime);
    lab.set(simple("Always")).await;
    lab.phase("u1", "Running").await;
    lab.gone(deleting(simple("Always"), 0)).await;
    let mut second = simple("Always");
    second.metadata.uid = Some("u2".to_owned());
    lab.set(second).await;
    lab.phase("u2", "Running").await;
    assert!(
        lab.runtime
            .list_sandboxes()
            .iter()
            .all(|s| s.config.uid == "u2")
    );
}

#[tokio::test(start_paused = true)]
async fn a_new_agent_adopts_what_runs_and_nothing_flips() {
    let runtime = Arc::new(FakeRuntime::new());
    let first = Lab::start(runtime.clone());
    let mut probed = simple("Always");
    probed.spec.as_mut().unwrap().containers[0].readiness_probe = serde_json::from_value(
        serde_json::json!({"exec": {"command": ["true"]}, "initialDelaySeconds": 3600}),
    )
    .unwrap();
    first.set(probed.clone()).await;
    first.phase("u1", "Running").await;
    let id = runtime.find("u1", "a").unwrap().id;
    drop(first);
    // What the apiserver holds: ready, with the id of the instance that runs.
    probed.status = serde_json::from_value(serde_json::json!({"phase": "Running",
        "startTime": "2026-01-01T00:00:00Z",
        "conditions": [{"type": "Ready", "status": "True"}],
        "containerStatuses": [{"name": "a", "image": "a:1", "imageID": "", "ready": true,
            "started": true, "restartCount": 0, "containerID": format!("ferrule://{id}")}]}))
    .unwrap();
    let second = Lab::start(runtime.clone());
    second.set(probed).await;
    second
        .changes
        .send(PodChange::Synced(Source::Api))
        .await
        .unwrap();
    second.phase("u1", "Running").await;
    until("patched", || {
        !second.api.statuses.lock().unwrap().is_empty()
    })
    .await;
    for status in &second.api.statuses.lock().unwrap()["u1"] {
        let text = status.to_string();
        assert!(!text.contains("ContainersNotReady"), "{text}");
    }
    assert_eq!(runtime.find("u1", "a").unwrap().id, id);
    assert!(
        second.events.recorded().is_empty(),
        "{:?}",
        second.events.recorded()
    );
}

#[tokio::test(start_paused = true)]
async fn what_the_apiserver_does_not_know_is_ended_after_the_first_sync() {
    let runtime = Arc::new(FakeRuntime::new());
    let first = Lab::start(runtime.clone());
    first.set(simple("Always")).await;
    first.phase("u1", "Running").await;
    drop(first);
    let second = Lab::start(runtime.clone());
    second.node.leftovers.lock().unwrap().push("u9".to_owned());
    second
        .changes
        .send(PodChange::Synced(Source::Api))
        .await
        .unwrap();
    until("orphan removed", || runtime.list_sandboxes().is_empty()).await;
    until("leftover removed", || {
        second.node.leftovers.lock().unwrap().is_empty()
    })
    .await;
    assert!(second.api.deleted.lock().unwrap().is_empty());
}

/// A pod of a manifest, with this UID.
fn from_manifest(uid: &str) -> Pod {
    let mut pod = simple("Always");
    pod.metadata.uid = Some(uid.to_owned());
    pod.metadata.generation = None;
    let annotation = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    pod.metadata.annotations = Some(
        [
            annotation("kubernetes.io/config.source", "file"),
            annotation("kubernetes.io/config.hash", uid),
        ]
        .into(),
    );
    pod
}

#[tokio::test(start_paused = true)]
async fn nothing_is_unknown_before_every_source_was_read_and_mirrors_are_never_run() {
    let runtime = Arc::new(FakeRuntime::new());
    let first = Lab::start(runtime.clone());
    first.set(simple("Always")).await;
    first.phase("u1", "Running").await;
    drop(first);
    let second = Lab::with_sources(runtime.clone(), &[Source::Api, Source::File]);
    let mut mirror = from_manifest("m1");
    let annotations = mirror.metadata.annotations.as_mut().unwrap();
    annotations.insert("kubernetes.io/config.mirror".to_owned(), "h9".to_owned());
    mirror.metadata.name = Some("other".to_owned());
    second.set(mirror).await;
    second
        .changes
        .send(PodChange::Synced(Source::Api))
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(
        runtime.list_sandboxes().len(),
        1,
        "the old pod may be static"
    );
    assert_eq!(runtime.list_sandboxes()[0].config.uid, "u1");
    second
        .changes
        .send(PodChange::Synced(Source::File))
        .await
        .unwrap();
    until("ended", || runtime.list_sandboxes().is_empty()).await;
}

/// One step of a random life.
#[derive(Debug, Clone)]
enum Chance {
    Set,
    Delete(i64),
    Gone,
    Exit(i32),
    LoseSandbox,
    Pass(u8),
}

fn chances() -> impl Strategy<Value = Vec<Chance>> {
    let one = prop_oneof![
        4 => Just(Chance::Set),
        1 => (0..40_i64).prop_map(Chance::Delete),
        1 => Just(Chance::Gone),
        4 => (0..2_i32).prop_map(Chance::Exit),
        2 => Just(Chance::LoseSandbox),
        6 => (1..20_u8).prop_map(Chance::Pass),
    ];
    proptest::collection::vec(one, 1..30)
}

/// Plays a life and checks after each step that no container runs twice, and that after its
/// deletion nothing starts again.
async fn play(life: Vec<Chance>, policy: &str) {
    let runtime = Arc::new(FakeRuntime::new());
    let lab = Lab::start(runtime.clone());
    let mut deleted = false;
    let mut starts_at_end = None;
    let starts = || {
        runtime
            .calls()
            .iter()
            .filter(|c| format!("{c:?}").contains("StartContainer"))
            .count()
    };
    for chance in life {
        match chance {
            Chance::Set => lab.set(simple(policy)).await,
            Chance::Delete(grace) => {
                lab.set(deleting(simple(policy), grace)).await;
                deleted = true;
            }
            Chance::Gone if deleted => lab.gone(deleting(simple(policy), 0)).await,
            Chance::Gone => {}
            Chance::Exit(code) => {
                if let Some(c) = runtime.find("u1", "a").filter(is_running) {
                    runtime.exit(&c.id, code);
                }
            }
            Chance::LoseSandbox => {
                if let Some(s) = runtime.list_sandboxes().first() {
                    runtime.kill_shim(&s.id);
                }
            }
            Chance::Pass(ms) => {
                for _ in 0..ms {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        }
        let alive = runtime
            .list_containers(None)
            .into_iter()
            .filter(is_running)
            .count();
        assert!(alive <= 1, "{alive} instances of one container run");
        if deleted && lab.api.deleted.lock().unwrap().contains(&"u1".to_owned()) {
            let known = *starts_at_end.get_or_insert_with(starts);
            assert_eq!(starts(), known, "a finished pod was started again");
        }
    }
    lab.set(deleting(simple(policy), 0)).await;
    until("gone from the runtime", || {
        runtime.list_sandboxes().is_empty()
    })
    .await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn no_random_life_runs_a_container_twice_or_wakes_a_finished_pod(
        life in chances(), policy in prop_oneof![Just("Always"), Just("OnFailure"), Just("Never")]
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(play(life, policy));
    }
}
