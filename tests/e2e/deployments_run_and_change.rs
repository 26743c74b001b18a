//! The life of a Deployment, through the real controllers.

use anyhow::{Result, ensure};
use testkit::scenario::{BUSYBOX, Scenario, text};

fn deployment(name: &str, replicas: u32, version: &str) -> String {
    format!(
        "apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: main
        image: {BUSYBOX}
        command: [sh, -c, 'echo version $VERSION; exec sleep 100000']
        env: [{{name: VERSION, value: {version}}}]
        resources: {{requests: {{cpu: 1m, memory: 1Mi}}}}
"
    )
}

const ROLLOUT: [&str; 4] = ["rollout", "status", "deployment/web", "--timeout=120s"];

#[test]
fn a_deployment_rolls_out_scales_to_fifty_and_goes_away() -> Result<()> {
    let scenario = Scenario::alone("scale")?;
    scenario.apply(&deployment("web", 3, "one"))?;
    scenario.kubectl(&ROLLOUT)?;
    scenario.kubectl(&["scale", "deployment/web", "--replicas=50"])?;
    scenario.kubectl(&ROLLOUT)?;
    let pods = scenario.json(&["get", "pods", "-l", "app=web"])?;
    let pods = pods["items"].as_array().cloned().unwrap_or_default();
    let addresses: std::collections::BTreeSet<String> =
        pods.iter().map(|pod| text(pod, "/status/podIP")).collect();
    ensure!(
        addresses.len() == 50,
        "{} different addresses for 50 pods",
        addresses.len()
    );
    scenario.kubectl(&["delete", "deployment", "web"])?;
    scenario.kubectl(&[
        "wait",
        "--for=delete",
        "pods",
        "-l",
        "app=web",
        "--timeout=120s",
    ])?;
    Ok(())
}

#[test]
fn a_new_version_rolls_out_and_rolls_back() -> Result<()> {
    let scenario = Scenario::begin("rollout")?;
    scenario.apply(&deployment("web", 2, "one"))?;
    scenario.kubectl(&ROLLOUT)?;
    scenario.apply(&deployment("web", 2, "two"))?;
    scenario.kubectl(&ROLLOUT)?;
    every_pod_logged(&scenario, "version two")?;
    scenario.kubectl(&["rollout", "undo", "deployment/web"])?;
    scenario.kubectl(&ROLLOUT)?;
    every_pod_logged(&scenario, "version one")
}

/// Pods on their way out do not count: a rollout does not wait for them.
fn every_pod_logged(scenario: &Scenario, wanted: &str) -> Result<()> {
    let pods = scenario.json(&["get", "pods", "-l", "app=web"])?;
    let pods = pods["items"].as_array().into_iter().flatten();
    for pod in pods.filter(|pod| pod.pointer("/metadata/deletionTimestamp").is_none()) {
        let logs = scenario.kubectl(&["logs", &text(pod, "/metadata/name")])?;
        ensure!(logs.trim() == wanted, "{logs} instead of {wanted}");
    }
    Ok(())
}

#[test]
fn pods_on_different_nodes_reach_each_other() -> Result<()> {
    let scenario = Scenario::begin("reach")?;
    let nodes = scenario.admin.json(&["get", "nodes"])?;
    let nodes: Vec<String> = nodes["items"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|node| text(node, "/metadata/name"))
        .collect();
    let (first, last) = (&nodes[0], &nodes[nodes.len() - 1]);
    let server = testkit::scenario::script_pod(
        "server",
        "mkdir /w && echo found > /w/index.html && exec httpd -f -p 8080 -h /w",
        &format!("  nodeName: {first}\n"),
    );
    scenario.apply(&server)?;
    let address = text(&scenario.ready("server")?, "/status/podIP");
    let client = testkit::scenario::script_pod(
        "client",
        &format!(
            "for i in 1 2 3 4 5; do wget -q -O - http://{address}:8080/ && exit; sleep 1; done; exit 1"
        ),
        &format!("  nodeName: {last}\n  restartPolicy: Never\n"),
    );
    scenario.apply(&client)?;
    let pod = scenario.finished("client")?;
    ensure!(testkit::scenario::phase(&pod) == "Succeeded", "{pod}");
    ensure!(
        scenario.kubectl(&["logs", "client"])?.trim() == "found",
        "another page"
    );
    Ok(())
}
