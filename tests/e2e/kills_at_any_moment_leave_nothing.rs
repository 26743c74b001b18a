//! `kill -9` of shims, and of the agent at random moments of a burst of pods and of its end: all
//! pods come, all go, and nothing is left of them.

use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use testkit::cluster::spare::Spare;
use testkit::scenario::{BUSYBOX, LIMIT, Scenario, Watch, container, is_ready, script_pod, text};
use testkit::{leaks, process};

#[test]
fn a_pod_whose_shim_is_killed_comes_back_whole_and_others_do_not_notice() -> Result<()> {
    let scenario = Scenario::begin("kill-shim")?;
    let node = scenario.spare_node(&Spare::default())?;
    scenario.apply(&script_pod(
        "victim",
        "echo here; exec sleep 1000",
        &node.pin(),
    ))?;
    scenario.apply(&script_pod("neighbour", "exec sleep 1000", &node.pin()))?;
    let before = scenario.ready("victim")?;
    let neighbour = scenario.ready("neighbour")?;
    let uid = text(&before, "/metadata/uid");
    let inside = leaks::processes_of_pod(&node.agent.cgroups()?, &uid);
    ensure!(!inside.is_empty(), "the pod has no processes");
    process::kill(shim_of(&scenario, &node.name, &uid)?, LIMIT)?;
    for member in inside {
        ensure!(member.wait_gone(LIMIT)?, "{member:?} outlived its shim");
    }
    let (after, _) = scenario.watch_pod("victim", "to be Ready again", |event| {
        is_ready(&event.object) && container(&event.object, "main")["restartCount"] == 1
    })?;
    scenario.event_about("victim", "SandboxChanged")?;
    let lost = &container(&after, "main")["lastState"]["terminated"];
    ensure!(!lost.is_null(), "{}", after["status"]);
    ensure!(scenario.kubectl(&["logs", "victim"])? == "here\n");
    ensure!(scenario.kubectl(&["exec", "victim", "--", "echo", "in"])? == "in\n");
    let same = scenario.json(&["get", "pod", "neighbour"])?;
    let id = |pod| text(container(pod, "main"), "/containerID");
    ensure!(
        id(&neighbour) == id(&same) && is_ready(&same),
        "{}",
        same["status"]
    );
    scenario.kubectl(&["delete", "pod", "victim", "neighbour"])?;
    scenario.nothing_left_on(&node.name)
}

#[test]
fn a_shim_and_the_agent_killed_together_leave_a_pod_that_comes_back() -> Result<()> {
    let scenario = Scenario::begin("kill-both")?;
    let node = scenario.spare_node(&Spare::default())?;
    scenario.apply(&script_pod("victim", "exec sleep 1000", &node.pin()))?;
    let before = scenario.ready("victim")?;
    let uid = text(&before, "/metadata/uid");
    let shim = shim_of(&scenario, &node.name, &uid)?;
    node.agent.kill()?;
    process::kill(shim, LIMIT)?;
    node.agent.start()?;
    scenario.watch_pod("victim", "to be Ready again", |event| {
        is_ready(&event.object) && container(&event.object, "main")["restartCount"] == 1
    })?;
    scenario.kubectl(&["delete", "pod", "victim"])?;
    scenario.nothing_left_on(&node.name)
}

/// The shim of a pod, found by its sandbox's record.
fn shim_of(scenario: &Scenario, node: &str, uid: &str) -> Result<process::ProcessIdentity> {
    let agent = scenario.agent(node);
    let records = agent.inside("/var/lib/ferrule/sandboxes")?;
    let found = leaks::shims_of_node(&agent.cgroups()?)
        .into_iter()
        .find(|(_, id)| {
            let record = std::fs::read_to_string(records.join(id).join("sandbox.json"));
            record.is_ok_and(|record| record.contains(uid))
        });
    Ok(found.with_context(|| format!("pod {uid} has no shim"))?.0)
}

/// Numbers that differ from run to run; the seed is told so that a failure can be repeated with
/// `FERRULE_SEED`.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let given = std::env::var("FERRULE_SEED").ok();
        let seed = given
            .and_then(|seed| seed.parse().ok())
            .unwrap_or(now.as_secs() | 1);
        println!("FERRULE_SEED={seed}");
        Self(seed)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn fifty(node: &str) -> String {
    format!(
        "apiVersion: apps/v1
kind: ReplicaSet
metadata: {{name: many}}
spec:
  replicas: 50
  selector: {{matchLabels: {{app: many}}}}
  template:
    metadata: {{labels: {{app: many}}}}
    spec:
      nodeName: {node}
      terminationGracePeriodSeconds: 2
      containers:
      - {{name: main, image: {BUSYBOX}, command: [sh, -c, 'echo up; exec sleep 1000']}}
"
    )
}

#[test]
fn an_agent_killed_all_the_time_still_starts_fifty_pods_and_ends_them() -> Result<()> {
    let scenario = Scenario::begin("kill-burst")?;
    let node = scenario.spare_node(&Spare::default())?;
    let mut random = Random::new();
    let watch = Watch::start(&scenario, &["pods", "-l", "app=many"])?;
    scenario.apply(&fifty(&node.name))?;
    for _ in 0..5 {
        kill_after_events(&watch, 1 + random.below(60));
        node.agent.kill()?;
        node.agent.start()?;
    }
    let ready = [
        "wait",
        "--for=jsonpath={.status.readyReplicas}=50",
        "rs/many",
        "--timeout=120s",
    ];
    scenario.kubectl(&ready)?;
    let pods = scenario.json(&["get", "pods", "-l", "app=many"])?;
    let pods = pods["items"].as_array().cloned().unwrap_or_default();
    let addresses: BTreeSet<String> = pods.iter().map(|pod| text(pod, "/status/podIP")).collect();
    ensure!(
        addresses.len() == 50,
        "{} addresses for 50 pods",
        addresses.len()
    );
    for pod in &pods {
        let status = container(pod, "main");
        ensure!(status["restartCount"] == 0, "restarted: {status}");
        let uid = text(pod, "/metadata/uid");
        let inside = leaks::processes_of_pod(&node.agent.cgroups()?, &uid);
        let name = |process: &process::ProcessIdentity| {
            std::fs::read_to_string(format!("/proc/{}/comm", process.pid)).unwrap_or_default()
        };
        let sleeps = inside
            .iter()
            .filter(|process| name(process).trim() == "sleep");
        ensure!(
            sleeps.count() == 1,
            "pod {uid} runs {:?}",
            inside.iter().map(name).collect::<Vec<_>>()
        );
    }
    scenario.kubectl(&["delete", "rs", "many", "--wait=false"])?;
    for _ in 0..4 {
        kill_after_events(&watch, 1 + random.below(40));
        node.agent.kill()?;
        node.agent.start()?;
    }
    scenario.kubectl(&[
        "wait",
        "--for=delete",
        "pods",
        "-l",
        "app=many",
        "--timeout=120s",
    ])?;
    scenario.nothing_left_on(&node.name)
}

/// Lets so many events pass, or some seconds when there are no more.
fn kill_after_events(watch: &Watch, events: u64) {
    let start = Instant::now();
    for _ in 0..events {
        let left = Duration::from_secs(8).saturating_sub(start.elapsed());
        if watch.next(left).is_none() {
            return;
        }
    }
}
