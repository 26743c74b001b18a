//! What the apiserver knows about a node.

use anyhow::{Result, ensure};
use testkit::scenario::{Scenario, condition, text};

#[test]
fn every_node_is_ready_and_names_its_runtime() -> Result<()> {
    let scenario = Scenario::begin("nodes")?;
    let nodes = scenario.admin.json(&["get", "nodes"])?;
    let nodes = nodes["items"].as_array().cloned().unwrap_or_default();
    ensure!(!nodes.is_empty(), "no node is registered");
    for node in &nodes {
        ensure!(condition(node, "Ready"), "not Ready: {node}");
        let runtime = text(node, "/status/nodeInfo/containerRuntimeVersion");
        ensure!(runtime.starts_with("ferrule://"), "runtime is {runtime}");
        for resource in ["cpu", "memory", "pods", "ephemeral-storage"] {
            for set in ["capacity", "allocatable"] {
                let value = text(node, &format!("/status/{set}/{resource}"));
                ensure!(!value.is_empty(), "{set} has no {resource}");
            }
        }
        let os = text(node, "/metadata/labels/kubernetes.io~1os");
        ensure!(os == "linux", "label kubernetes.io/os is {os:?}");
        let name = text(node, "/metadata/name");
        let hostname = text(node, "/metadata/labels/kubernetes.io~1hostname");
        ensure!(
            hostname == name,
            "label kubernetes.io/hostname is {hostname:?}"
        );
        for false_condition in ["MemoryPressure", "DiskPressure", "PIDPressure"] {
            ensure!(
                !condition(node, false_condition),
                "{name} has {false_condition}"
            );
        }
    }
    Ok(())
}

#[test]
fn the_lease_is_renewed() -> Result<()> {
    let scenario = Scenario::begin("lease")?;
    let selection = [
        "leases",
        "-n",
        "kube-node-lease",
        "--field-selector",
        "metadata.name=node-1",
    ];
    let mut first = None;
    scenario.watch(&selection, "a second renewal", |event| {
        let renewed = text(&event.object, "/spec/renewTime");
        let changed = first.as_ref().is_some_and(|first| *first != renewed);
        first.get_or_insert(renewed);
        changed
    })?;
    Ok(())
}

#[test]
fn a_node_may_not_touch_another_node() -> Result<()> {
    let scenario = Scenario::begin("restriction")?;
    let node = scenario.agent("node-1");
    let kubeconfig = node.directory("kubernetes").join("kubelet.kubeconfig");
    let kubeconfig = format!("--kubeconfig={}", kubeconfig.display());
    let denied = scenario.output(&[&kubeconfig, "get", "secrets"])?;
    let message = String::from_utf8_lossy(&denied.stderr).into_owned();
    ensure!(!denied.status.success(), "a node may list secrets");
    ensure!(message.contains("Forbidden"), "{message}");
    Ok(())
}

#[test]
fn images_a_pod_used_are_listed_in_the_node() -> Result<()> {
    let scenario = Scenario::begin("node-images")?;
    scenario.apply(&testkit::scenario::script_pod("user", "sleep 300", ""))?;
    scenario.ready("user")?;
    let node = text(&scenario.json(&["get", "pod", "user"])?, "/spec/nodeName");
    let field = format!("metadata.name={node}");
    scenario.watch(
        &["nodes", "--field-selector", &field],
        "busybox in the images",
        |event| {
            event
                .object
                .pointer("/status/images")
                .is_some_and(|i| i.to_string().contains("busybox"))
        },
    )?;
    Ok(())
}
