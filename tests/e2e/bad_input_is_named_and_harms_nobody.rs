//! Wrong specifications: each gets a message that names what is wrong, and nothing else suffers.

use anyhow::{Result, ensure};
use testkit::scenario::{Event, Scenario, container, script_pod, text, waiting_reason};

fn waits_with(reason: &'static str) -> impl Fn(&Event) -> bool {
    move |event| waiting_reason(&event.object, "main") == reason
}

#[test]
fn an_image_that_does_not_exist() -> Result<()> {
    let scenario = Scenario::begin("no-image")?;
    let pod = script_pod("pod", "true", "").replace("busybox:1.37.0-1", "no-such-image:1");
    scenario.apply(&pod)?;
    let reasons = ["ErrImagePull", "ImagePullBackOff"];
    let (pod, _) = scenario.watch_pod("pod", "ErrImagePull", |event| {
        reasons.contains(&waiting_reason(&event.object, "main").as_str())
    })?;
    let message = text(container(&pod, "main"), "/state/waiting/message");
    ensure!(message.contains("no-such-image"), "{message}");
    scenario.watch_pod("pod", "ImagePullBackOff", waits_with("ImagePullBackOff"))?;
    Ok(())
}

#[test]
fn an_image_name_that_is_none() -> Result<()> {
    let scenario = Scenario::begin("bad-name")?;
    let image = testkit::scenario::BUSYBOX;
    scenario.apply(&script_pod("pod", "true", "").replace(image, "UPPER//x"))?;
    scenario.watch_pod("pod", "InvalidImageName", waits_with("InvalidImageName"))?;
    Ok(())
}

#[test]
fn an_image_that_must_not_be_pulled() -> Result<()> {
    let scenario = Scenario::begin("never-pull")?;
    let pod = script_pod("pod", "true", "    imagePullPolicy: Never\n");
    scenario.apply(&pod.replace("busybox:1.37.0-1", "never-there:1"))?;
    scenario.watch_pod("pod", "ErrImageNeverPull", waits_with("ErrImageNeverPull"))?;
    Ok(())
}

#[test]
fn an_entrypoint_that_does_not_exist() -> Result<()> {
    let scenario = Scenario::begin("no-entrypoint")?;
    let pod = script_pod("pod", "true", "").replace("command: [sh, -c,", "command: [/no/entry,");
    scenario.apply(&pod)?;
    let (pod, _) = scenario.watch_pod("pod", "the start to fail", |event| {
        container(&event.object, "main")
            .to_string()
            .contains("/no/entry")
    })?;
    ensure!(!testkit::scenario::is_ready(&pod), "{pod}");
    Ok(())
}

#[test]
fn a_working_directory_that_is_a_file() -> Result<()> {
    let scenario = Scenario::begin("workdir")?;
    scenario.apply(&script_pod("pod", "true", "    workingDir: /etc/passwd\n"))?;
    scenario.watch_pod("pod", "the start to fail", |event| {
        container(&event.object, "main")["state"]
            .to_string()
            .contains("/etc/passwd")
            || container(&event.object, "main")["lastState"]
                .to_string()
                .contains("/etc/passwd")
    })?;
    Ok(())
}

#[test]
fn an_environment_whose_config_map_is_missing() -> Result<()> {
    let scenario = Scenario::begin("no-env")?;
    let extra = "    envFrom: [{configMapRef: {name: absent}}]\n";
    scenario.apply(&script_pod("pod", "true", extra))?;
    let reason = waits_with("CreateContainerConfigError");
    let (pod, _) = scenario.watch_pod("pod", "CreateContainerConfigError", reason)?;
    let message = text(container(&pod, "main"), "/state/waiting/message");
    ensure!(message.contains("absent"), "{message}");
    Ok(())
}

#[test]
fn a_host_path_that_is_of_another_type() -> Result<()> {
    let scenario = Scenario::begin("wrong-type")?;
    let extra = "    volumeMounts: [{name: host, mountPath: /host}]\n  \
                 volumes: [{name: host, hostPath: {path: /etc/passwd, type: Directory}}]\n";
    scenario.apply(&script_pod("pod", "true", extra))?;
    let message = scenario.event_about("pod", "FailedMount")?;
    ensure!(message.contains("/etc/passwd"), "{message}");
    Ok(())
}

#[test]
fn a_user_that_must_not_be_root_but_is() -> Result<()> {
    let scenario = Scenario::begin("non-root")?;
    scenario.apply(&script_pod(
        "pod",
        "true",
        "    securityContext: {runAsNonRoot: true}\n",
    ))?;
    let reason = waits_with("CreateContainerConfigError");
    scenario.watch_pod("pod", "CreateContainerConfigError", reason)?;
    Ok(())
}

#[test]
fn more_than_the_node_has() -> Result<()> {
    let scenario = Scenario::begin("too-much")?;
    let extra = "    resources: {requests: {cpu: '1000'}}\n  nodeName: node-1\n";
    scenario.apply(&script_pod("pod", "true", extra))?;
    let pod = scenario.finished("pod")?;
    ensure!(
        text(&pod, "/status/reason") == "OutOfcpu",
        "{}",
        pod["status"]
    );
    Ok(())
}

#[test]
fn a_bad_network_configuration_is_named_and_repaired_without_a_restart() -> Result<()> {
    let scenario = Scenario::alone("bad-network")?;
    let agent = scenario.agent("node-1");
    let file = agent.directory("cni-conf").join("10-ferrule.conflist");
    let good = std::fs::read(&file)?;
    scenario.apply(&script_pod("before", "sleep 1000", "  nodeName: node-1\n"))?;
    scenario.ready("before")?;
    std::fs::write(&file, "{ not json")?;
    scenario.apply(&script_pod("during", "sleep 1000", "  nodeName: node-1\n"))?;
    // Said of the node, of the pod, or of both.
    let named = scenario.watch(&["events"], "the file's name in an event", |event| {
        text(&event.object, "/message").contains("10-ferrule.conflist")
    });
    let node = scenario.admin.json(&["get", "node", "node-1"])?;
    std::fs::write(&file, good)?;
    let in_node = node["status"]["conditions"]
        .to_string()
        .contains("10-ferrule.conflist");
    ensure!(
        in_node || named.is_ok(),
        "nobody names the file: {}",
        node["status"]["conditions"]
    );
    scenario.ready("during")?;
    let before = scenario.json(&["get", "pod", "before"])?;
    ensure!(
        container(&before, "main")["restartCount"] == 0,
        "a running pod was touched"
    );
    Ok(())
}
