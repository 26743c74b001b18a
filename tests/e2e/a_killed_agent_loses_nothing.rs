//! `kill -9` of the agent at every stage of a pod's life.

use anyhow::{Result, ensure};
use testkit::scenario::{BUSYBOX, Scenario, Watch, container, is_ready, phase, script_pod, text};

const ON_NODE: &str = "  nodeName: node-1\n";

fn replicas(name: &str, count: u32, script: &str) -> String {
    format!(
        "apiVersion: apps/v1
kind: ReplicaSet
metadata: {{name: {name}}}
spec:
  replicas: {count}
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      nodeName: node-1
      terminationGracePeriodSeconds: 2
      containers:
      - {{name: main, image: {BUSYBOX}, command: [sh, -c, '{script}']}}
"
    )
}

#[test]
fn running_pods_stay_ready_and_are_not_restarted() -> Result<()> {
    let scenario = Scenario::alone("kill-running")?;
    scenario.apply(&script_pod(
        "steady",
        "i=0; while :; do echo $i; i=$((i+1)); sleep 0.1; done",
        ON_NODE,
    ))?;
    let before = scenario.ready("steady")?;
    let watch = Watch::start(&scenario, &["pods"])?;
    let agent = scenario.agent("node-1");
    for _ in 0..3 {
        agent.kill()?;
        agent.start()?;
        // The agent is back when it answers through the apiserver again.
        let exec = || scenario.kubectl(&["exec", "steady", "--", "true"]);
        testkit::process::until("the agent", testkit::scenario::LIMIT, || Ok(()), exec)?;
    }
    let after = scenario.json(&["get", "pod", "steady"])?;
    let id = |pod: &serde_json::Value| text(container(pod, "main"), "/containerID");
    ensure!(id(&before) == id(&after), "the container was replaced");
    ensure!(container(&after, "main")["restartCount"] == 0, "{after}");
    for event in watch.seen() {
        ensure!(
            is_ready(&event.object),
            "Ready flipped: {}",
            event.object["status"]
        );
    }
    let logs = scenario.kubectl(&["logs", "steady"])?;
    for (number, line) in logs.lines().enumerate() {
        ensure!(line == number.to_string(), "log line {number} is {line:?}");
    }
    Ok(())
}

#[test]
fn pods_that_were_starting_start() -> Result<()> {
    let scenario = Scenario::alone("kill-starting")?;
    let agent = scenario.agent("node-1");
    scenario.apply(&replicas("many", 10, "exec sleep 1000"))?;
    scenario.watch(&["pods", "-l", "app=many"], "the first pod", |_| true)?;
    for _ in 0..3 {
        agent.kill()?;
        agent.start()?;
        scenario.watch(&["pods", "-l", "app=many"], "any event", |_| true)?;
    }
    let ready = [
        "wait",
        "--for=jsonpath={.status.readyReplicas}=10",
        "rs/many",
        "--timeout=90s",
    ];
    scenario.kubectl(&ready)?;
    let pods = scenario.json(&["get", "pods", "-l", "app=many"])?;
    let pods = pods["items"].as_array().cloned().unwrap_or_default();
    let addresses: std::collections::BTreeSet<String> =
        pods.iter().map(|pod| text(pod, "/status/podIP")).collect();
    ensure!(addresses.len() == 10, "addresses: {addresses:?}");
    Ok(())
}

#[test]
fn pods_that_were_stopping_are_gone() -> Result<()> {
    let scenario = Scenario::alone("kill-stopping")?;
    let agent = scenario.agent("node-1");
    scenario.apply(&replicas(
        "many",
        5,
        "trap : TERM; while :; do sleep 0.2; done",
    ))?;
    let ready = [
        "wait",
        "--for=jsonpath={.status.readyReplicas}=5",
        "rs/many",
        "--timeout=90s",
    ];
    scenario.kubectl(&ready)?;
    scenario.kubectl(&["delete", "rs", "many", "--wait=false"])?;
    scenario.watch(
        &["pods", "-l", "app=many"],
        "a deletion to begin",
        |event| {
            event
                .object
                .pointer("/metadata/deletionTimestamp")
                .is_some()
        },
    )?;
    agent.kill()?;
    agent.start()?;
    scenario.kubectl(&[
        "wait",
        "--for=delete",
        "pods",
        "-l",
        "app=many",
        "--timeout=90s",
    ])?;
    Ok(())
}

#[test]
fn a_container_that_exits_meanwhile_keeps_its_code_and_log() -> Result<()> {
    let scenario = Scenario::alone("kill-exit")?;
    let agent = scenario.agent("node-1");
    let script = "echo before; while [ ! -e /shared/go ]; do sleep 0.05; done; echo after; exit 5";
    let name = format!("/tmp/{}", scenario.namespace);
    let extra = format!(
        "    volumeMounts: [{{name: shared, mountPath: /shared}}]\n{ON_NODE}  restartPolicy: Never\n  \
         volumes: [{{name: shared, hostPath: {{path: {name}, type: DirectoryOrCreate}}}}]\n"
    );
    scenario.apply(&script_pod("leaver", script, &extra))?;
    scenario.ready("leaver")?;
    let pid = first_process(&agent, "/shared/go")?;
    agent.kill()?;
    agent.run(&["touch", &format!("{name}/go")])?;
    ensure!(
        pid.wait_gone(testkit::scenario::LIMIT)?,
        "the container did not end"
    );
    agent.start()?;
    let pod = scenario.finished("leaver")?;
    ensure!(phase(&pod) == "Failed", "{pod}");
    ensure!(
        container(&pod, "main")["state"]["terminated"]["exitCode"] == 5,
        "{pod}"
    );
    ensure!(scenario.kubectl(&["logs", "leaver"])? == "before\nafter\n");
    Ok(())
}

#[test]
fn a_container_that_crashes_meanwhile_is_restarted_once() -> Result<()> {
    let scenario = Scenario::alone("kill-restart")?;
    let agent = scenario.agent("node-1");
    scenario.apply(&script_pod("phoenix", "exec sleep 98765", ON_NODE))?;
    scenario.ready("phoenix")?;
    let pid = first_process(&agent, "98765")?;
    agent.kill()?;
    testkit::process::kill(pid, testkit::scenario::LIMIT)?;
    agent.start()?;
    let (pod, _) = scenario.watch_pod("phoenix", "one restart", |event| {
        let status = container(&event.object, "main");
        status["restartCount"] == 1 && !status["state"]["running"].is_null()
    })?;
    let last = &container(&pod, "main")["lastState"]["terminated"]["exitCode"];
    ensure!(*last == 137, "{}", container(&pod, "main"));
    Ok(())
}

#[test]
fn a_pod_deleted_meanwhile_is_taken_down_on_return() -> Result<()> {
    let scenario = Scenario::alone("kill-deleted")?;
    let agent = scenario.agent("node-1");
    scenario.apply(&script_pod("orphan", "exec sleep 98764", ON_NODE))?;
    scenario.ready("orphan")?;
    let pid = first_process(&agent, "98764")?;
    agent.kill()?;
    scenario.kubectl(&["delete", "pod", "orphan", "--force", "--grace-period=0"])?;
    agent.start()?;
    ensure!(
        pid.wait_gone(testkit::scenario::LIMIT)?,
        "a pod without an object still runs"
    );
    Ok(())
}

/// A process of the node whose command line contains `word`; asked of the machine, since the
/// agent is not to be relied on here.
fn first_process(
    agent: &testkit::scenario::Agent,
    word: &str,
) -> Result<testkit::process::ProcessIdentity> {
    let found = testkit::process::all().into_iter().find(|process| {
        let line = std::fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
        let comm =
            std::fs::read_to_string(format!("/proc/{}/comm", process.pid)).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(word)
            && ["sh", "ash", "sleep"].contains(&comm.trim())
    });
    found.ok_or_else(|| anyhow::anyhow!("no process of {agent:?} has {word} on its command line"))
}
