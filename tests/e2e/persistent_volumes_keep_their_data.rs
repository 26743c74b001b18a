//! Claims, the volumes behind them, and what is left on the node when their pods are gone.

use anyhow::{Result, ensure};
use testkit::scenario::{BUSYBOX, Scenario, phase, text};

/// A local volume of node-1 and a claim that is bound to it.
fn local_volume(namespace: &str, path: &str) -> String {
    format!(
        "apiVersion: v1
kind: PersistentVolume
metadata: {{name: {namespace}}}
spec:
  capacity: {{storage: 1Gi}}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Delete
  storageClassName: \"\"
  claimRef: {{namespace: {namespace}, name: data}}
  local: {{path: {path}}}
  nodeAffinity:
    required:
      nodeSelectorTerms:
      - matchExpressions:
        - {{key: kubernetes.io/hostname, operator: In, values: [node-1]}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: data}}
spec:
  accessModes: [ReadWriteOnce]
  storageClassName: \"\"
  volumeName: {namespace}
  resources: {{requests: {{storage: 1Gi}}}}
"
    )
}

fn claimant(name: &str, script: &str, more: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  securityContext: {{fsGroup: 4711}}
  containers:
  - name: main
    image: {BUSYBOX}
    command: [sh, -c, '{script}']
    volumeMounts:
    - {{name: data, mountPath: /data{more}}}
  volumes:
  - {{name: data, persistentVolumeClaim: {{claimName: data}}}}
"
    )
}

#[test]
fn a_local_volume_keeps_its_files_from_pod_to_pod_and_leaves_no_mount() -> Result<()> {
    let scenario = Scenario::begin("local")?;
    let path = format!("/tmp/{}", scenario.namespace);
    let node = scenario.agent("node-1");
    node.run(&["mkdir", "-p", &path])?;
    scenario.apply(&local_volume(&scenario.namespace, &path))?;
    let script = "echo kept > /data/file; stat -c %g /data; ls -ld /data";
    scenario.apply(&claimant("writer", script, ""))?;
    let pod = scenario.finished("writer")?;
    let said = scenario.kubectl(&["logs", "writer"])?;
    ensure!(phase(&pod) == "Succeeded", "{said}\n{pod}");
    ensure!(said.starts_with("4711\n"), "{said}");
    scenario.kubectl(&["delete", "pod", "writer"])?;
    let script = "mkdir -p /data/x && cat /data/../data/y";
    scenario.apply(&claimant("below", script, ", subPath: sub"))?;
    scenario.finished("below")?;
    scenario.apply(&claimant("reader", "cat /data/file; ls /data", ""))?;
    let pod = scenario.finished("reader")?;
    let said = scenario.kubectl(&["logs", "reader"])?;
    ensure!(phase(&pod) == "Succeeded", "{said}\n{pod}");
    ensure!(said == "kept\nfile\nsub\n", "{said}");
    scenario.kubectl(&["delete", "pod", "reader", "below"])?;
    let mounts = node.run(&["cat", "/proc/self/mountinfo"])?;
    ensure!(
        !mounts.contains("kubernetes.io~local-volume"),
        "a mount is left:\n{mounts}"
    );
    node.run(&["rm", "-r", &path])?;
    scenario.kubectl(&["delete", "pvc", "data", "--wait=false"])?;
    scenario.kubectl(&["delete", "pv", &scenario.namespace, "--wait=false"])?;
    Ok(())
}

#[test]
fn a_pod_waits_for_a_directory_that_is_not_there_and_says_so() -> Result<()> {
    let scenario = Scenario::begin("nowhere")?;
    let path = format!("/tmp/{}", scenario.namespace);
    let node = scenario.agent("node-1");
    scenario.apply(&local_volume(&scenario.namespace, &path))?;
    scenario.apply(&claimant("waiting", "true", ""))?;
    let message = scenario.event_about("waiting", "FailedMount")?;
    let wanted = format!(
        "MountVolume.NewMounter initialization failed for volume \"{}\" : path \"{path}\" does not exist",
        scenario.namespace
    );
    ensure!(message == wanted, "{message}");
    node.run(&["mkdir", "-p", &path])?;
    let pod = scenario.finished("waiting")?;
    ensure!(phase(&pod) == "Succeeded", "{pod}");
    scenario.kubectl(&["delete", "pod", "waiting"])?;
    node.run(&["rm", "-r", &path])?;
    scenario.kubectl(&["delete", "pv", &scenario.namespace, "--wait=false"])?;
    Ok(())
}

#[test]
fn every_node_has_a_csinode_that_belongs_to_it() -> Result<()> {
    let scenario = Scenario::begin("csinode")?;
    let node = scenario.admin.json(&["get", "node", "node-1"])?;
    let object = scenario.admin.json(&["get", "csinode", "node-1"])?;
    let owner = text(&object, "/metadata/ownerReferences/0/uid");
    ensure!(owner == text(&node, "/metadata/uid"), "{object}");
    Ok(())
}
