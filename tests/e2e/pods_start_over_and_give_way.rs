//! Pods that start over as a whole because one container says so, and pods that have to go for
//! what they take.

use anyhow::{Result, bail, ensure};
use serde_json::Value;
use testkit::scenario::{
    BUSYBOX, LIMIT, Scenario, Watch, condition, container, is_ready, phase, text,
};

#[test]
fn one_containers_end_starts_the_whole_pod_over_in_place() -> Result<()> {
    let scenario = Scenario::begin("start-over")?;
    let watch = Watch::start(&scenario, &["pods"])?;
    let once = "if [ -f /d/done ]; then exec sleep 1000; fi; touch /d/done; sleep 1; exit 42";
    scenario.apply(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: phoenix}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  initContainers:
  - {{name: prepare, image: {BUSYBOX}, command: [sh, -c, date >> /d/prepared],
     volumeMounts: [{{name: d, mountPath: /d}}]}}
  - {{name: helper, image: {BUSYBOX}, restartPolicy: Always, command: [sleep, '1000']}}
  containers:
  - name: source
    image: {BUSYBOX}
    command: [sh, -c, \"{once}\"]
    volumeMounts: [{{name: d, mountPath: /d}}]
    restartPolicy: Never
    restartPolicyRules:
    - {{action: RestartAllContainers, exitCodes: {{operator: In, values: [42]}}}}
  - {{name: other, image: {BUSYBOX}, command: [sleep, '1000']}}
  volumes: [{{name: d, emptyDir: {{}}}}]
"
    ))?;
    let (mut told, mut last) = (false, Value::Null);
    while !(is_ready(&last) && all(&last).all(|c| c["restartCount"] == 1)) {
        let Some(event) = watch.next(LIMIT) else {
            bail!("no second round: {last}");
        };
        last = event.object;
        told |= condition(&last, "AllContainersRestarting");
        ensure!(phase(&last) != "Failed", "the pod failed in between");
    }
    ensure!(told, "nobody was told of the restart");
    ensure!(!condition(&last, "AllContainersRestarting"), "{last}");
    let ended = &container(&last, "source")["lastState"]["terminated"];
    ensure!(ended["exitCode"] == 42, "source ended {ended}");
    let ended = &container(&last, "other")["lastState"]["terminated"];
    ensure!(
        ended["reason"] == "RestartingAllContainers",
        "other: {ended}"
    );
    let look = [
        "exec",
        "phoenix",
        "-c",
        "source",
        "--",
        "cat",
        "/d/prepared",
    ];
    let prepared = scenario.kubectl(&look)?;
    ensure!(prepared.lines().count() == 2, "prepared {prepared:?}");
    Ok(())
}

/// Statuses of init and main containers.
fn all(pod: &Value) -> impl Iterator<Item = &Value> {
    let lists = ["initContainerStatuses", "containerStatuses"];
    let lists = lists.map(|list| pod["status"][list].as_array());
    lists.into_iter().flatten().flatten()
}

#[test]
fn a_pod_that_fills_its_volume_beyond_the_limit_is_evicted() -> Result<()> {
    let scenario = Scenario::begin("size-limit")?;
    scenario.apply(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: hoarder}}
spec:
  terminationGracePeriodSeconds: 30
  containers:
  - name: main
    image: {BUSYBOX}
    command: [sh, -c, dd if=/dev/zero of=/d/big bs=1M count=4; exec sleep 1000]
    volumeMounts: [{{name: d, mountPath: /d}}]
  volumes: [{{name: d, emptyDir: {{sizeLimit: 1Mi}}}}]
"
    ))?;
    let (pod, _) = scenario.watch_pod("hoarder", "its eviction", |event| {
        phase(&event.object) == "Failed"
    })?;
    let (reason, message) = (text(&pod, "/status/reason"), text(&pod, "/status/message"));
    ensure!(reason == "Evicted", "{reason}: {message}");
    let expected = "Usage of EmptyDir volume \"d\" exceeds the limit \"1Mi\". ";
    ensure!(message == expected, "{message:?}");
    scenario.event_about("hoarder", "Evicted")?;
    Ok(())
}
