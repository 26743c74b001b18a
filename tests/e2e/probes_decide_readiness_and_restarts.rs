//! Readiness and liveness.

use anyhow::{Result, ensure};
use testkit::scenario::{Scenario, container, is_ready, script_pod, text};

#[test]
fn a_pod_becomes_ready_and_unready_with_its_probe() -> Result<()> {
    let scenario = Scenario::begin("readiness")?;
    let probe = "    readinessProbe: {exec: {command: [test, -e, /tmp/ready]}, periodSeconds: 1, failureThreshold: 1}\n";
    scenario.apply(&script_pod("moody", "mkdir -p /tmp; sleep 1000", probe))?;
    let running = |event: &testkit::scenario::Event| {
        !container(&event.object, "main")["state"]["running"].is_null()
    };
    let (pod, _) = scenario.watch_pod("moody", "the container to run", running)?;
    ensure!(!is_ready(&pod), "ready before its probe said so");
    scenario.kubectl(&["exec", "moody", "--", "touch", "/tmp/ready"])?;
    scenario.ready("moody")?;
    scenario.kubectl(&["exec", "moody", "--", "rm", "/tmp/ready"])?;
    scenario.watch_pod("moody", "the pod to be unready", |event| {
        !is_ready(&event.object)
    })?;
    ensure!(
        scenario
            .event_about("moody", "Unhealthy")?
            .contains("Readiness")
    );
    Ok(())
}

#[test]
fn a_container_that_fails_its_liveness_probe_is_restarted() -> Result<()> {
    let scenario = Scenario::begin("liveness")?;
    let probe = "    livenessProbe: {httpGet: {port: 8080, path: /alive}, periodSeconds: 1, failureThreshold: 2}\n";
    let script =
        "mkdir -p /w; echo yes > /w/alive; (sleep 5; rm /w/alive) & exec httpd -f -p 8080 -h /w";
    scenario.apply(&script_pod("mortal", script, probe))?;
    let (pod, _) = scenario.watch_pod("mortal", "one restart", |event| {
        container(&event.object, "main")["restartCount"] == 1
    })?;
    let last = container(&pod, "main");
    ensure!(
        !text(last, "/lastState/terminated/reason").is_empty(),
        "{last}"
    );
    ensure!(
        scenario
            .event_about("mortal", "Unhealthy")?
            .contains("Liveness")
    );
    Ok(())
}

#[test]
fn a_tcp_probe_finds_an_open_port() -> Result<()> {
    let scenario = Scenario::begin("tcp")?;
    let probe = "    readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}\n";
    scenario.apply(&script_pod(
        "open",
        "sleep 2; mkdir /w; exec httpd -f -p 8080 -h /w",
        probe,
    ))?;
    scenario.ready("open")?;
    Ok(())
}
