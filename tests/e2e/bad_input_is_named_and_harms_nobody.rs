//! Wrong specifications: each gets a message that names what is wrong, and nothing else suffers.

use anyhow::{Result, ensure};
use testkit::cluster::spare::Spare;
use testkit::process::until;
use testkit::scenario::{
    Event, LIMIT, Scenario, condition, container, is_ready, script_pod, text, waiting_reason,
};

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
    ensure!(!is_ready(&pod), "{pod}");
    // Said with the words and the exit code people know.
    let (pod, _) = scenario.watch_pod("pod", "a second attempt", |event| {
        let state = &container(&event.object, "main")["lastState"]["terminated"];
        state["reason"] == "StartError"
    })?;
    let last = &container(&pod, "main")["lastState"]["terminated"];
    ensure!(last["exitCode"] == 128, "{last}");
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

#[test]
fn a_missing_network_plugin_is_named_and_found_when_it_comes() -> Result<()> {
    let scenario = Scenario::begin("no-plugin")?;
    let node = scenario.spare_node(&Spare::default())?;
    scenario.apply(&script_pod("before", "exec sleep 1000", &node.pin()))?;
    scenario.ready("before")?;
    let plugin = node.agent.directory("cni-bin").join("cni-bridge");
    let away = plugin.with_extension("away");
    std::fs::rename(&plugin, &away)?;
    scenario.apply(&script_pod("during", "exec sleep 1000", &node.pin()))?;
    let message = scenario.event_about("during", "FailedCreatePodSandBox")?;
    ensure!(message.contains("cni-bridge"), "{message}");
    std::fs::rename(&away, &plugin)?;
    scenario.ready("during")?;
    let before = scenario.json(&["get", "pod", "before"])?;
    ensure!(is_ready(&before) && container(&before, "main")["restartCount"] == 0);
    scenario.kubectl(&["delete", "pod", "before", "during"])?;
    scenario.nothing_left_on(&node.name)
}

#[test]
fn a_node_without_network_configuration_says_so_and_keeps_its_pods() -> Result<()> {
    let scenario = Scenario::begin("no-conflist")?;
    let node = scenario.spare_node(&Spare::default())?;
    scenario.apply(&script_pod("before", "exec sleep 1000", &node.pin()))?;
    scenario.ready("before")?;
    let file = node.agent.directory("cni-conf").join("10-ferrule.conflist");
    let away = file.with_extension("away");
    std::fs::rename(&file, &away)?;
    let field = format!("metadata.name={}", node.name);
    let (seen, _) = scenario.watch(
        &["nodes", "--field-selector", &field],
        "the node not to be Ready",
        |event| !condition(&event.object, "Ready"),
    )?;
    let conditions = seen["status"]["conditions"].to_string();
    ensure!(conditions.contains("NetworkPluginNotReady"), "{conditions}");
    ensure!(scenario.kubectl(&["exec", "before", "--", "echo", "here"])? == "here\n");
    std::fs::rename(&away, &file)?;
    scenario.watch(
        &["nodes", "--field-selector", &field],
        "the node to be Ready",
        |event| condition(&event.object, "Ready"),
    )?;
    scenario.apply(&script_pod("after", "exec sleep 1000", &node.pin()))?;
    scenario.ready("after")?;
    let before = scenario.json(&["get", "pod", "before"])?;
    ensure!(
        container(&before, "main")["restartCount"] == 0,
        "{}",
        before["status"]
    );
    Ok(())
}

#[test]
fn a_volume_whose_config_map_is_missing_waits_for_it_by_name() -> Result<()> {
    let scenario = Scenario::begin("no-volume")?;
    let extra = "    volumeMounts: [{name: settings, mountPath: /settings}]\n  \
                 volumes: [{name: settings, configMap: {name: absent}}]\n";
    scenario.apply(&script_pod(
        "pod",
        "cat /settings/word; echo; exec sleep 1000",
        extra,
    ))?;
    let message = scenario.event_about("pod", "FailedMount")?;
    ensure!(
        message.contains("absent") && message.contains("settings"),
        "{message}"
    );
    let pod = scenario.json(&["get", "pod", "pod"])?;
    ensure!(
        waiting_reason(&pod, "main") == "ContainerCreating",
        "{}",
        pod["status"]
    );
    scenario.kubectl(&["create", "configmap", "absent", "--from-literal=word=found"])?;
    scenario.ready("pod")?;
    let found = || {
        let logs = scenario.kubectl(&["logs", "pod"])?;
        ensure!(logs == "found\n", "{logs:?}");
        Ok(())
    };
    until("the file to be read", LIMIT, || Ok(()), found)
}

#[test]
fn a_memory_limit_nothing_can_run_in_is_named() -> Result<()> {
    let scenario = Scenario::begin("no-memory")?;
    let extra = "    resources: {limits: {memory: 4Ki}}\n";
    scenario.apply(&script_pod("pod", "exec sleep 1000", extra))?;
    let (pod, _) = scenario.watch_pod("pod", "the start to fail", |event| {
        let status = container(&event.object, "main").to_string();
        status.contains("memory limit too low") || status.contains("OOMKilled")
    })?;
    ensure!(!is_ready(&pod), "{}", pod["status"]);
    Ok(())
}

#[test]
fn huge_pages_the_node_does_not_have() -> Result<()> {
    let scenario = Scenario::begin("no-pages")?;
    let extra = "    resources: {limits: {hugepages-1Gi: 512Gi, memory: 64Mi, cpu: 10m}}\n  \
                 nodeName: node-1\n";
    scenario.apply(&script_pod("pod", "true", extra))?;
    let pod = scenario.finished("pod")?;
    let reason = text(&pod, "/status/reason");
    ensure!(reason == "OutOfhugepages-1Gi", "{}", pod["status"]);
    Ok(())
}
