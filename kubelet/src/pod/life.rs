//! Random lives of one pod, and the rules that every life keeps.
//!
//! A life is a list of [`Chance`]s: the spec changes, containers end, probes judge, the sandbox is
//! lost, the pod is deleted, the apiserver is away, the agent is killed between any two calls of
//! the engine and another one comes. The [`World`] outlives agents: engine, node and apiserver.
//! It is the reference: it knows only what happened, and complains when a rule is broken.

mod found;
mod order;
mod truth;

use super::admission::Admission;
use super::clock::Clock;
use super::environment::{PodEnvironment, Rejection, ResizeRefusal, StartContext, StepError};
use super::fixture::{deleting, pod};
use super::index::PodIndex;
use super::manager::{Inputs, Manager};
use super::resize::actuate::{Running, WantedResources};
use super::resize::allocation::Allocation;
use super::spec::{self, ContainerKind};
use super::state::{BackoffLimits, EndingNote};
use super::worker::WorkerDeps;
use crate::events::EventSink;
use crate::eviction::rank::Eviction;
use crate::observe::is_running;
use crate::probes::{ProbeKind, ProbeUpdate, Probes};
use crate::source::{PodChange, Source};
use crate::status::publish::{StatusApi, StatusApiError, StatusPublisher};
use k8s_openapi::api::core::v1::{Container, Pod};
use proptest::prelude::*;
use runtime::fake::FakeRuntime;
use runtime::service::{
    ContainerConfig, ContainerStatus, ImageConfig, RuntimeService, SandboxConfig,
};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use order::{initialized, round};
use truth::{ended, impossible, merge};

const UID: &str = "u1";
/// 2026-01-01.
const EPOCH_NS: i64 = 1_767_225_600_000_000_000;
/// Each call of engine and node takes this long.
const STEP: Duration = Duration::from_millis(1);
/// How long an agent may take to act on what it was told.
const REACTION_NS: i64 = 20_000_000;

/// One thing that happens.
#[derive(Debug, Clone)]
enum Chance {
    /// The image of `a` changes.
    Update,
    /// An ephemeral container is added.
    Debug,
    /// One of the running containers ends.
    Exit(u8, i32),
    /// A readiness probe judges one of them.
    Ready(u8, bool),
    /// A liveness probe condemns one of them.
    Condemn(u8),
    /// The shim dies.
    LoseSandbox,
    /// Deleted with this grace.
    Delete(i64),
    /// Removed from the apiserver by force.
    Gone,
    /// The node runs short. An agent that is killed meanwhile may forget it.
    Evict,
    /// The apiserver goes away or comes back.
    Outage(bool),
    /// The agent is killed and another one starts.
    KillAgent,
    /// Time passes, milliseconds.
    Pass(u32),
}

fn chances() -> impl Strategy<Value = Vec<Chance>> {
    let one = prop_oneof![
        2 => Just(Chance::Update),
        1 => Just(Chance::Debug),
        8 => (any::<u8>(), 0..3_i32).prop_map(|(n, code)| Chance::Exit(n, code)),
        6 => (any::<u8>(), any::<bool>()).prop_map(|(n, ready)| Chance::Ready(n, ready)),
        2 => any::<u8>().prop_map(Chance::Condemn),
        2 => Just(Chance::LoseSandbox),
        1 => (0..40_i64).prop_map(Chance::Delete),
        1 => Just(Chance::Gone),
        1 => Just(Chance::Evict),
        3 => any::<bool>().prop_map(Chance::Outage),
        6 => Just(Chance::KillAgent),
        12 => (1..12_u32).prop_map(Chance::Pass),
        6 => (12..400_u32).prop_map(Chance::Pass),
        2 => (400..60_000_u32).prop_map(Chance::Pass),
    ];
    proptest::collection::vec(one, 1..50)
}

/// The pods that live here.
fn shape(which: usize, policy: &str) -> Pod {
    let probe = json!({"exec": {"command": ["true"]}, "initialDelaySeconds": 100_000});
    let sidecar = json!({"name": "s", "image": "s:1", "restartPolicy": "Always"});
    let rule = json!({"action": "RestartAllContainers",
        "exitCodes": {"operator": "In", "values": [2]}});
    let restarter = json!({"name": "a", "image": "a:1", "restartPolicy": policy,
        "restartPolicyRules": [rule]});
    let hooked = json!({"name": "a", "image": "a:1", "lifecycle":
        {"preStop": {"sleep": {"seconds": 5}}, "postStart": {"sleep": {"seconds": 1}}}});
    let spec = [
        json!({"containers": [{"name": "a", "image": "a:1", "readinessProbe": probe}]}),
        json!({"initContainers": [{"name": "i", "image": "i:1"}, {"name": "j", "image": "j:1"}],
            "containers": [{"name": "a", "image": "a:1", "readinessProbe": probe}]}),
        json!({"initContainers": [sidecar, {"name": "i", "image": "i:1"}],
            "containers": [hooked, {"name": "b", "image": "b:1", "readinessProbe": probe}]}),
        json!({"initContainers": [{"name": "i", "image": "i:1"}, sidecar],
            "containers": [restarter, {"name": "b", "image": "b:1", "readinessProbe": probe}]}),
    ];
    let mut spec = spec[which].clone();
    spec["restartPolicy"] = json!(policy);
    spec["terminationGracePeriodSeconds"] = json!(30);
    pod(spec)
}

/// The node as agents find it.
#[derive(Debug, Default)]
struct Node {
    notes: Mutex<Option<EndingNote>>,
    torn_down: Mutex<bool>,
    leftovers: Mutex<bool>,
}

impl PodEnvironment for Node {
    type Volumes = ();
    type Image = ();

    fn admit(&self, _: &Pod, _: &[Arc<Pod>]) -> Result<Admission, Rejection> {
        Ok(Admission::default())
    }
    fn admit_resize(&self, _: &Pod, _: &Pod, _: &[Arc<Pod>]) -> Result<Admission, ResizeRefusal> {
        Ok(Admission::default())
    }
    fn load_allocation(&self, _: &str) -> Option<Allocation> {
        None
    }
    fn save_allocation(&self, _: &str, _: &Allocation) -> Result<(), StepError> {
        Ok(())
    }
    fn wanted_resources(&self, _: &Pod) -> Option<WantedResources> {
        None
    }
    async fn resize(
        &self,
        _: &Arc<Pod>,
        _: WantedResources,
        _: Vec<Running>,
    ) -> Result<(), StepError> {
        Ok(())
    }
    fn host_ips(&self) -> Vec<String> {
        vec!["192.0.2.1".to_owned()]
    }
    async fn prepare_volumes(&self, _: &Arc<Pod>) -> Result<(), StepError> {
        *self.leftovers.lock().unwrap() = true;
        *self.torn_down.lock().unwrap() = false;
        tokio::time::sleep(STEP).await;
        Ok(())
    }
    async fn update_volumes(&self, _: &Arc<Pod>) {}
    async fn prepare_sandbox(
        &self,
        pod: &Arc<Pod>,
        attempt: u32,
    ) -> Result<SandboxConfig, StepError> {
        tokio::time::sleep(STEP).await;
        Ok(SandboxConfig {
            uid: spec::uid(pod).to_owned(),
            name: spec::name(pod).to_owned(),
            namespace: spec::namespace(pod).to_owned(),
            attempt,
            ..SandboxConfig::default()
        })
    }
    async fn ensure_image(&self, _: &Arc<Pod>, _: &Container) -> Result<(), StepError> {
        tokio::time::sleep(STEP).await;
        Ok(())
    }
    async fn container_config(
        &self,
        _: &Arc<Pod>,
        container: &Container,
        _: StartContext<(), ()>,
    ) -> Result<ContainerConfig, StepError> {
        tokio::time::sleep(STEP).await;
        let image = container.image.clone().unwrap_or_default();
        Ok(ContainerConfig {
            name: container.name.clone(),
            image: image.clone(),
            user_image: image,
            ..ContainerConfig::default()
        })
    }
    fn keep_note(&self, _: &Pod, note: &EndingNote) {
        *self.notes.lock().unwrap() = Some(note.clone());
    }
    fn note(&self, _: &Pod) -> Option<EndingNote> {
        self.notes.lock().unwrap().clone()
    }
    async fn teardown(&self, _: &Arc<Pod>) -> Result<(), StepError> {
        tokio::time::sleep(STEP).await;
        *self.torn_down.lock().unwrap() = true;
        Ok(())
    }
    async fn purge(&self, _: &Arc<Pod>) -> Result<(), StepError> {
        tokio::time::sleep(STEP).await;
        *self.leftovers.lock().unwrap() = false;
        *self.notes.lock().unwrap() = None;
        Ok(())
    }
    fn leftovers(&self) -> Vec<String> {
        let left = *self.leftovers.lock().unwrap();
        left.then(|| UID.to_owned()).into_iter().collect()
    }
}

/// What the apiserver holds.
#[derive(Debug)]
struct Held {
    status: Value,
    version: u64,
    exists: bool,
    away: bool,
    /// Instances a probe once found not ready.
    unready: BTreeSet<String>,
    violations: Vec<String>,
}

/// The apiserver: takes patches and looks whether they can be true.
#[derive(Debug, Clone)]
struct Apiserver {
    held: Arc<Mutex<Held>>,
    runtime: Arc<FakeRuntime>,
    node: Arc<Node>,
}

impl Apiserver {
    fn refusal(&self) -> Option<StatusApiError> {
        let held = self.held.lock().unwrap();
        if held.away {
            return Some(StatusApiError::Unavailable("away".to_owned()));
        }
        (!held.exists).then_some(StatusApiError::Gone)
    }

    fn any_running(&self) -> bool {
        self.runtime.list_containers(None).iter().any(is_running)
    }
}

impl StatusApi for Apiserver {
    async fn patch(&self, _: &str, _: &str, body: &Value) -> Result<u64, StatusApiError> {
        tokio::time::sleep(STEP).await;
        if let Some(refusal) = self.refusal() {
            return Err(refusal);
        }
        let running = self.any_running();
        let mut held = self.held.lock().unwrap();
        let before = held.status.clone();
        merge(&mut held.status, &body["status"]);
        let mut wrong = impossible(&before, &held.status, &held.unready);
        if ended(&held.status) && !ended(&before) && running {
            wrong.push("a terminal phase was told while a container ran".to_owned());
        }
        held.violations.extend(wrong);
        held.version += 1;
        Ok(held.version)
    }

    async fn delete(&self, _: &str, _: &str, _: &str) -> Result<(), StatusApiError> {
        tokio::time::sleep(STEP).await;
        if let Some(refusal) = self.refusal() {
            return Err(refusal);
        }
        let mut held = self.held.lock().unwrap();
        if self.any_running() || !*self.node.torn_down.lock().unwrap() {
            let text = "the deletion was confirmed before the pod was torn down";
            held.violations.push(text.to_owned());
        }
        held.exists = false;
        Ok(())
    }
}

/// A running agent.
struct Agent {
    changes: mpsc::Sender<PodChange>,
    evictions: mpsc::Sender<Eviction>,
    probes: mpsc::Sender<ProbeUpdate>,
    tasks: Vec<JoinHandle<()>>,
    cancel: CancellationToken,
}

impl Agent {
    fn start(world: &World) -> Self {
        let cancel = CancellationToken::new();
        let events = EventSink::memory();
        let (probe_tx, probe_updates) = mpsc::channel(64);
        let publisher = StatusPublisher::default();
        let deps = Arc::new(WorkerDeps {
            runtime: world.runtime.clone(),
            environment: world.node.clone(),
            probes: Probes::new(
                world.runtime.clone(),
                events.clone(),
                probe_tx.clone(),
                TaskTracker::new(),
                cancel.clone(),
            ),
            events,
            publisher: publisher.clone(),
            index: PodIndex::new(),
            room: Arc::default(),
            backoff: BackoffLimits::default(),
            clock: world.clock,
        });
        let (changes, changes_rx) = mpsc::channel(64);
        let (_, objects) = mpsc::channel(1);
        let (evictions, evictions_rx) = mpsc::channel(8);
        let inputs = Inputs {
            changes: changes_rx,
            probes: probe_updates,
            objects,
            evictions: evictions_rx,
            heartbeat: Arc::default(),
        };
        let task = publisher.task(world.api.clone());
        let tasks = vec![
            tokio::spawn(task.run(cancel.clone())),
            tokio::spawn(Manager::new(deps).run(inputs, cancel.clone())),
        ];
        Self {
            changes,
            evictions,
            probes: probe_tx,
            tasks,
            cancel,
        }
    }

    /// Nothing of it goes on.
    async fn kill(self) {
        self.cancel.cancel();
        for task in &self.tasks {
            task.abort();
        }
        for task in self.tasks {
            let _ = task.await;
        }
    }
}

/// All that outlives an agent.
struct World {
    runtime: Arc<FakeRuntime>,
    node: Arc<Node>,
    api: Apiserver,
    clock: Clock,
    /// As the apiserver holds it, without its status.
    pod: Pod,
    agent: Option<Agent>,
    /// Since when nothing may be started any more, nanoseconds.
    over_since: Option<i64>,
    judged: BTreeSet<String>,
}

impl World {
    async fn begin(pod: Pod) -> Self {
        let runtime = Arc::new(FakeRuntime::new());
        for image in ["a:1", "a:2", "b:1", "i:1", "j:1", "s:1", "e:1"] {
            runtime.preload(image, ImageConfig::default());
        }
        runtime.follow_clock(EPOCH_NS);
        runtime.take_time(STEP);
        let node = Arc::new(Node::default());
        let held = Held {
            status: Value::Object(Map::new()),
            version: 1,
            exists: true,
            away: false,
            unready: BTreeSet::new(),
            violations: Vec::new(),
        };
        let mut world = Self {
            api: Apiserver {
                held: Arc::new(Mutex::new(held)),
                runtime: runtime.clone(),
                node: node.clone(),
            },
            clock: Clock::Tokio {
                epoch_ns: EPOCH_NS,
                since: tokio::time::Instant::now(),
            },
            runtime,
            node,
            pod,
            agent: None,
            over_since: None,
            judged: BTreeSet::new(),
        };
        world.restart().await;
        world
    }

    /// Kills the agent, if there is one, and starts another.
    async fn restart(&mut self) {
        if let Some(agent) = self.agent.take() {
            agent.kill().await;
        }
        self.agent = Some(Agent::start(self));
        self.show().await;
    }

    async fn send(&self, change: PodChange) {
        if let Some(agent) = &self.agent {
            agent.changes.send(change).await.unwrap();
        }
    }

    /// The watch shows what is there, when it can.
    async fn show(&mut self) {
        let (pod, exists) = {
            let held = self.api.held.lock().unwrap();
            if held.away {
                return;
            }
            let mut pod = self.pod.clone();
            pod.status = serde_json::from_value(held.status.clone()).unwrap();
            pod.metadata.resource_version = Some(held.version.to_string());
            (pod, held.exists)
        };
        if exists {
            if pod.metadata.deletion_timestamp.is_some() {
                self.over(REACTION_NS);
            }
            self.send(PodChange::Set(Arc::new(pod))).await;
        }
        self.send(PodChange::Synced(Source::Api)).await;
    }

    fn running(&self, nth: u8) -> Option<ContainerStatus> {
        let all = self.runtime.list_containers(None);
        let mut running: Vec<_> = all.into_iter().filter(is_running).collect();
        running.sort_by_key(|c| c.created_at_ns);
        let nth = usize::from(nth).checked_rem(running.len())?;
        Some(running.swap_remove(nth))
    }

    async fn judge(&self, nth: u8, kind: ProbeKind, success: bool) {
        let Some(instance) = self.running(nth) else {
            return;
        };
        if !success {
            let id = format!("ferrule://{}", instance.id);
            self.api.held.lock().unwrap().unready.insert(id);
        }
        let update = ProbeUpdate {
            pod_uid: UID.to_owned(),
            container_id: instance.id,
            container_name: instance.config.name,
            kind,
            success,
            message: String::new(),
            termination_grace_period_seconds: None,
        };
        if let Some(agent) = &self.agent {
            let _ = agent.probes.send(update).await;
        }
    }

    async fn happen(&mut self, chance: Chance) {
        match chance {
            Chance::Update => {
                let main = &mut self.pod.spec.as_mut().unwrap().containers[0];
                let newer = main.image.as_deref() == Some("a:1");
                main.image = Some(if newer { "a:2" } else { "a:1" }.to_owned());
                self.pod.metadata.generation = self.pod.metadata.generation.map(|g| g + 1);
                self.show().await;
            }
            Chance::Debug => {
                let added = json!([{"name": "e", "image": "e:1", "targetContainerName": "a"}]);
                let spec = self.pod.spec.as_mut().unwrap();
                spec.ephemeral_containers = serde_json::from_value(added).unwrap();
                self.show().await;
            }
            Chance::Exit(nth, code) => {
                if let Some(instance) = self.running(nth) {
                    self.runtime.exit(&instance.id, code);
                }
            }
            Chance::Ready(nth, ready) => self.judge(nth, ProbeKind::Readiness, ready).await,
            Chance::Condemn(nth) => self.judge(nth, ProbeKind::Liveness, false).await,
            Chance::LoseSandbox => {
                if let Some(sandbox) = self.runtime.list_sandboxes().last() {
                    self.runtime.kill_shim(&sandbox.id);
                }
            }
            Chance::Delete(grace) => {
                self.pod = deleting(self.pod.clone(), grace);
                self.show().await;
            }
            Chance::Gone => {
                let away = {
                    let mut held = self.api.held.lock().unwrap();
                    held.exists &= held.away;
                    held.away
                };
                if !away {
                    self.over(REACTION_NS);
                    self.send(PodChange::Gone(Arc::new(self.pod.clone()))).await;
                }
            }
            Chance::Evict => {
                if let Some(agent) = &self.agent {
                    let eviction = Eviction {
                        uid: UID.to_owned(),
                        message: "The node was low on resource: memory. ".to_owned(),
                        grace_s: 1,
                        signal: "memory.available",
                    };
                    let _ = agent.evictions.send(eviction).await;
                }
            }
            Chance::Outage(away) => {
                self.api.held.lock().unwrap().away = away;
                self.show().await;
            }
            Chance::KillAgent => self.restart().await,
            Chance::Pass(ms) => self.pass(ms).await,
        }
    }

    fn over(&mut self, after_ns: i64) {
        let since = self.clock.now_ns().saturating_add(after_ns);
        self.over_since = Some(self.over_since.map_or(since, |s| s.min(since)));
    }

    async fn pass(&mut self, ms: u32) {
        let mut left = ms;
        while left > 0 {
            // Long waits are looked at less closely.
            let step = if ms - left < 50 { 1 } else { left.min(50) };
            tokio::time::sleep(Duration::from_millis(u64::from(step))).await;
            left -= step;
            self.check();
        }
    }

    /// Looks at what runs.
    fn check(&mut self) {
        let all = self.runtime.list_containers(None);
        let mut names = BTreeSet::new();
        let latest = all.iter().map(round).max().unwrap_or(0);
        for running in all.iter().filter(|c| is_running(c)) {
            assert!(
                round(running) == latest || running.config.name == "e",
                "{} runs on in the round after its own",
                running.config.name
            );
            assert!(
                names.insert(running.config.name.clone()),
                "two instances of {} run",
                running.config.name
            );
        }
        let pod = self.pod.clone();
        let spec = pod.spec.as_ref().unwrap();
        for instance in &all {
            if !self.judged.insert(instance.id.0.clone()) {
                continue;
            }
            if let Some(over) = self.over_since {
                let name = &instance.config.name;
                assert!(
                    instance.created_at_ns < over,
                    "{name} was started after its pod was over"
                );
            }
            let found = spec::container(spec, &instance.config.name).unwrap();
            if found.kind == ContainerKind::Main {
                initialized(spec, instance, &all);
            }
        }
        let held = self.api.held.lock().unwrap();
        assert!(held.violations.is_empty(), "{:#?}", held.violations);
        let ended = ended(&held.status);
        drop(held);
        if ended {
            self.over(0);
        }
    }

    /// The pod goes in the end, whatever happened to it.
    async fn finish(mut self) {
        self.api.held.lock().unwrap().away = false;
        self.show().await;
        if self.api.held.lock().unwrap().exists {
            self.happen(Chance::Delete(0)).await;
        } else {
            self.send(PodChange::Gone(Arc::new(self.pod.clone()))).await;
        }
        for _ in 0..20 {
            self.pass(10_000).await;
            let held = self.api.held.lock().unwrap();
            let left = *self.node.leftovers.lock().unwrap();
            if !held.exists && self.runtime.list_sandboxes().is_empty() && !left {
                break;
            }
        }
        let held = self.api.held.lock().unwrap();
        assert!(!held.exists, "the deletion was never confirmed");
        assert!(
            self.runtime.list_sandboxes().is_empty(),
            "a sandbox is left"
        );
        assert!(!*self.node.leftovers.lock().unwrap(), "files are left");
    }
}

async fn live(life: Vec<Chance>, which: usize, policy: &str) {
    let mut world = World::begin(shape(which, policy)).await;
    for chance in life {
        world.happen(chance).await;
        world.check();
    }
    world.finish().await;
}

fn run(life: Vec<Chance>, which: usize, policy: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(live(life, which, policy));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn no_random_life_breaks_a_rule_whenever_agents_are_killed(
        life in chances(),
        which in 0..4_usize,
        policy in prop_oneof![Just("Always"), Just("OnFailure"), Just("Never")],
    ) {
        run(life, which, policy);
    }
}
