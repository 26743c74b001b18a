//! Ends: hooks, order, grace. And a look into a running pod from a container added to it.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::{Duration, Instant};
use testkit::process::until;
use testkit::scenario::{BUSYBOX, LIMIT, Scenario, Watch, script_pod, text};

#[test]
fn a_debug_container_sees_the_processes_of_its_target() -> Result<()> {
    let scenario = Scenario::begin("debug")?;
    scenario.apply(&script_pod("patient", "exec sleep 12345", ""))?;
    let before = scenario.ready("patient")?;
    let image = format!("--image={BUSYBOX}");
    let look = "tr '\\0' ' ' < /proc/1/cmdline";
    scenario.kubectl(&[
        "debug",
        "patient",
        &image,
        "--target=main",
        "--container=doctor",
        "--",
        "sh",
        "-c",
        look,
    ])?;
    let (pod, _) = scenario.watch_pod("patient", "the debug container's end", |event| {
        let status = &event.object["status"]["ephemeralContainerStatuses"][0];
        !status["state"]["terminated"].is_null()
    })?;
    let status = &pod["status"]["ephemeralContainerStatuses"][0];
    ensure!(status["state"]["terminated"]["exitCode"] == 0, "{status}");
    let seen = scenario.kubectl(&["logs", "patient", "-c", "doctor"])?;
    ensure!(seen.trim() == "sleep 12345", "it saw {seen:?}");
    let main = |pod: &Value| text(pod, "/status/containerStatuses/0/containerID");
    ensure!(main(&before) == main(&pod), "the pod was disturbed");
    Ok(())
}

#[test]
fn main_containers_end_before_sidecars_and_hooks_run_first() -> Result<()> {
    let scenario = Scenario::begin("order")?;
    let polite = "trap 'echo asked; exit 0' TERM; while :; do sleep 0.1; done";
    let slow = "trap 'sleep 2; exit 0' TERM; while :; do sleep 0.1; done";
    scenario.apply(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: ordered, finalizers: [example.com/look]}}
spec:
  terminationGracePeriodSeconds: 30
  initContainers:
  - name: sidecar
    image: {BUSYBOX}
    restartPolicy: Always
    command: [sh, -c, \"{polite}\"]
  containers:
  - name: main
    image: {BUSYBOX}
    command: [sh, -c, \"{slow}\"]
    lifecycle: {{preStop: {{sleep: {{seconds: 2}}}}}}
"
    ))?;
    scenario.ready("ordered")?;
    let start = Instant::now();
    scenario.kubectl(&["delete", "pod", "ordered", "--wait=false"])?;
    let ended = |pod: &Value, list: &str| {
        let path = format!("/status/{list}/0/state/terminated/finishedAt");
        text(pod, &path)
    };
    let (pod, _) = scenario.watch_pod("ordered", "both ends", |event| {
        !ended(&event.object, "initContainerStatuses").is_empty()
            && !ended(&event.object, "containerStatuses").is_empty()
    })?;
    let took = start.elapsed();
    scenario.kubectl(&[
        "patch",
        "pod",
        "ordered",
        "-p",
        r#"{"metadata":{"finalizers":null}}"#,
    ])?;
    let (main, sidecar) = (
        ended(&pod, "containerStatuses"),
        ended(&pod, "initContainerStatuses"),
    );
    ensure!(main <= sidecar, "main ended {main}, its sidecar {sidecar}");
    ensure!(took >= Duration::from_secs(4), "the hook was cut: {took:?}");
    ensure!(
        took < Duration::from_secs(15),
        "somebody waited for nothing: {took:?}"
    );
    Ok(())
}

#[test]
fn a_new_agent_grants_only_the_grace_that_is_left() -> Result<()> {
    let scenario = Scenario::alone("grace-left")?;
    let deaf = "trap '' TERM; while :; do sleep 0.1; done";
    let pod = script_pod("deaf", deaf, "  nodeName: node-1\n").replace("Seconds: 3", "Seconds: 20");
    scenario.apply(&pod)?;
    scenario.ready("deaf")?;
    let agent = scenario.agent("node-1");
    let watch = Watch::start(&scenario, &["pods"])?;
    let start = Instant::now();
    scenario.kubectl(&["delete", "pod", "deaf", "--wait=false"])?;
    while start.elapsed() < Duration::from_secs(12) {
        let _ = watch.next(Duration::from_millis(500));
    }
    agent.kill()?;
    agent.start()?;
    scenario.gone("deaf")?;
    let took = start.elapsed();
    ensure!(took >= Duration::from_secs(19), "grace was cut: {took:?}");
    ensure!(took < Duration::from_secs(29), "grace began anew: {took:?}");
    Ok(())
}

#[test]
fn a_post_start_hook_that_fails_ends_its_container_and_is_told() -> Result<()> {
    let scenario = Scenario::begin("post-start")?;
    scenario.apply(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: hooked}}
spec:
  terminationGracePeriodSeconds: 2
  containers:
  - name: main
    image: {BUSYBOX}
    command: [sh, -c, 'exec sleep 1000']
    lifecycle: {{postStart: {{exec: {{command: [sh, -c, 'echo secret; exit 3']}}}}}}
"
    ))?;
    let restarted = || -> Result<()> {
        let pod = scenario.json(&["get", "pod", "hooked"])?;
        let count = pod["status"]["containerStatuses"][0]["restartCount"].as_i64();
        count.filter(|n| *n > 0).map(drop).context("no restart yet")
    };
    until("a restart", LIMIT, || Ok(()), restarted)?;
    let told = scenario.event_about("hooked", "FailedPostStartHook")?;
    ensure!(told.contains("PostStartHook failed"), "{told}");
    ensure!(!told.contains("secret"), "{told}");
    Ok(())
}
