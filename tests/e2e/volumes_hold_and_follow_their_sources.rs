//! Volumes of every kind, and how quickly they follow their sources.

use anyhow::{Result, ensure};
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};
use testkit::scenario::{BUSYBOX, Scenario, phase, script_pod};

/// Prints a line whenever the file's content changes; looks ten times a second.
const FOLLOW: &str = "while :; do new=$(cat /config/key); \
    if [ \"$new\" != \"$old\" ]; then echo \"$new\"; old=$new; fi; sleep 0.05; done";

#[test]
fn a_config_map_change_reaches_its_volume_within_a_second() -> Result<()> {
    let scenario = Scenario::begin("follow")?;
    scenario.kubectl(&["create", "configmap", "source", "--from-literal=key=one"])?;
    let extra = "    volumeMounts: [{name: config, mountPath: /config}]\n  \
                 volumes: [{name: config, configMap: {name: source}}]\n";
    scenario.apply(&script_pod("reader", FOLLOW, extra))?;
    scenario.ready("reader")?;
    let mut child = scenario
        .admin
        .command(&["-n", &scenario.namespace, "logs", "-f", "reader"])
        .stdout(Stdio::piped())
        .spawn()?;
    let stdout = child
        .stdout
        .take()
        .ok_or_else(|| anyhow::anyhow!("no output"))?;
    let mut lines = BufReader::new(stdout).lines();
    ensure!(
        lines.next().transpose()?.as_deref() == Some("one"),
        "first content"
    );
    for value in ["two", "three"] {
        let patch = format!("{{\"data\":{{\"key\":\"{value}\"}}}}");
        scenario.kubectl(&["patch", "configmap", "source", "--patch", &patch])?;
        // From the moment the apiserver has answered; kubectl's own time is not ours.
        let start = Instant::now();
        let line = lines.next().transpose()?;
        let took = start.elapsed();
        ensure!(
            line.as_deref() == Some(value),
            "{line:?} after {value} was written"
        );
        ensure!(took < Duration::from_secs(1), "{value} took {took:?}");
    }
    child.kill()?;
    child.wait()?;
    Ok(())
}

#[test]
fn volumes_carry_modes_items_and_several_sources() -> Result<()> {
    let scenario = Scenario::begin("volumes")?;
    scenario.kubectl(&[
        "create",
        "configmap",
        "config",
        "--from-literal=a=1",
        "--from-literal=b=2",
    ])?;
    scenario.kubectl(&[
        "create",
        "secret",
        "generic",
        "secret",
        "--from-literal=s=hidden",
    ])?;
    let script = "set -e; cat /config/only-b; test ! -e /config/a; \
        test $(stat -L -c %a /config/only-b) = 440; \
        cat /all/cm /all/secret /all/name; test -s /all/token; \
        test $(stat -f -c %T /memory) = tmpfs; touch /disk/x /memory/x; \
        cat /sub; if touch /config/x 2>/dev/null; then exit 9; fi; echo end";
    scenario.apply(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: all, labels: {{color: red}}}}
spec:
  restartPolicy: Never
  containers:
  - name: main
    image: {BUSYBOX}
    command: [sh, -c, '{script}']
    volumeMounts:
    - {{name: config, mountPath: /config}}
    - {{name: all, mountPath: /all}}
    - {{name: disk, mountPath: /disk}}
    - {{name: memory, mountPath: /memory}}
    - {{name: whole, mountPath: /sub, subPath: a}}
  volumes:
  - name: config
    configMap: {{name: config, defaultMode: 0440, items: [{{key: b, path: only-b}}]}}
  - {{name: whole, configMap: {{name: config}}}}
  - {{name: disk, emptyDir: {{}}}}
  - {{name: memory, emptyDir: {{medium: Memory, sizeLimit: 1Mi}}}}
  - name: all
    projected:
      sources:
      - configMap: {{name: config, items: [{{key: a, path: cm}}]}}
      - secret: {{name: secret, items: [{{key: s, path: secret}}]}}
      - downwardAPI: {{items: [{{path: name, fieldRef: {{fieldPath: metadata.name}}}}]}}
      - serviceAccountToken: {{path: token, expirationSeconds: 600}}
"
    ))?;
    let pod = scenario.finished("all")?;
    let logs = scenario.kubectl(&["logs", "all"])?;
    ensure!(phase(&pod) == "Succeeded", "{logs}\n{pod}");
    ensure!(logs.starts_with("21hiddenall1"), "{logs}");
    Ok(())
}

#[test]
fn an_optional_source_may_be_missing_and_may_come_later() -> Result<()> {
    let scenario = Scenario::begin("optional")?;
    let script = "while ! cat /config/key 2>/dev/null; do sleep 0.1; done";
    let extra = "    volumeMounts: [{name: config, mountPath: /config}]\n  restartPolicy: Never\n  \
                 volumes: [{name: config, configMap: {name: later, optional: true}}]\n";
    scenario.apply(&script_pod("patient", script, extra))?;
    scenario.watch_pod("patient", "the pod to run", |event| {
        phase(&event.object) == "Running"
    })?;
    scenario.kubectl(&["create", "configmap", "later", "--from-literal=key=came"])?;
    scenario.finished("patient")?;
    ensure!(scenario.kubectl(&["logs", "patient"])? == "came");
    Ok(())
}

#[test]
fn a_pod_waits_for_a_config_map_that_does_not_exist_and_starts_when_it_does() -> Result<()> {
    let scenario = Scenario::begin("missing")?;
    let extra = "    volumeMounts: [{name: config, mountPath: /config}]\n  restartPolicy: Never\n  \
                 volumes: [{name: config, configMap: {name: later}}]\n";
    scenario.apply(&script_pod("waiting", "cat /config/key", extra))?;
    let message = scenario.event_about("waiting", "FailedMount")?;
    ensure!(
        message.contains("later"),
        "the event does not name the ConfigMap: {message}"
    );
    scenario.kubectl(&["create", "configmap", "later", "--from-literal=key=came"])?;
    let pod = scenario.finished("waiting")?;
    ensure!(phase(&pod) == "Succeeded", "{pod}");
    Ok(())
}

#[test]
fn a_host_path_is_the_nodes_own() -> Result<()> {
    let scenario = Scenario::begin("hostpath")?;
    let name = format!("/tmp/{}", scenario.namespace);
    let extra = format!(
        "    volumeMounts: [{{name: host, mountPath: /host}}]\n  restartPolicy: Never\n  \
         nodeName: node-1\n  \
         volumes: [{{name: host, hostPath: {{path: {name}, type: DirectoryOrCreate}}}}]\n"
    );
    scenario.apply(&script_pod("writer", "echo written > /host/file", &extra))?;
    let pod = scenario.finished("writer")?;
    ensure!(phase(&pod) == "Succeeded", "{pod}");
    let node = scenario.agent("node-1");
    ensure!(node.run(&["cat", &format!("{name}/file")])?.trim() == "written");
    Ok(())
}
