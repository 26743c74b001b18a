//! Resources of running pods: what is asked for through `resize` reaches cgroups and status, or
//! waits with a reason.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use testkit::scenario::{BUSYBOX, Scenario, container, is_ready, text};

/// A pod of one sleeping container `main` with these resources, and more of its spec.
fn sleeper(name: &str, resources: &Value, container: &str, spec: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: sleeper}}}}
spec:
  terminationGracePeriodSeconds: 1
{spec}  containers:
  - name: main
    image: {BUSYBOX}
    command: [sleep, '100000']
    resources: {resources}
{container}"
    )
}

fn resize(scenario: &Scenario, pod: &str, resources: &Value) -> Result<()> {
    let patch = json!({"spec": {"containers": [{"name": "main", "resources": resources}]}});
    let patch = patch.to_string();
    scenario.kubectl(&[
        "patch",
        "pod",
        pod,
        "--subresource=resize",
        "--patch",
        &patch,
    ])?;
    Ok(())
}

/// Watches a pod until it is as wanted.
fn seen(
    scenario: &Scenario,
    pod: &str,
    what: &str,
    wanted: impl Fn(&Value) -> bool,
) -> Result<(Value, Duration)> {
    scenario.watch_pod(pod, what, |event| wanted(&event.object))
}

fn resize_condition<'a>(pod: &'a Value, kind: &str) -> Option<&'a Value> {
    let conditions = pod["status"]["conditions"].as_array()?;
    conditions.iter().find(|c| c["type"] == kind)
}

/// Whether everything the pod asks for is in force.
fn settled(pod: &Value) -> bool {
    pod["status"]["observedGeneration"] == pod["metadata"]["generation"]
        && resize_condition(pod, "PodResizePending").is_none()
        && resize_condition(pod, "PodResizeInProgress").is_none()
        && is_ready(pod)
}

/// A file of the container's own cgroup, on either kernel.
fn cgroup(scenario: &Scenario, pod: &str, v1: &str, v2: &str) -> Result<String> {
    let script = format!("cat /sys/fs/cgroup/{v1} 2>/dev/null || cat /sys/fs/cgroup/{v2}");
    let text = scenario.kubectl(&["exec", pod, "--", "sh", "-c", &script])?;
    Ok(text.trim().to_owned())
}

fn memory_limit(scenario: &Scenario, pod: &str) -> Result<String> {
    cgroup(scenario, pod, "memory/memory.limit_in_bytes", "memory.max")
}

fn cpu_quota(scenario: &Scenario, pod: &str) -> Result<String> {
    let text = cgroup(scenario, pod, "cpu/cpu.cfs_quota_us", "cpu.max")?;
    Ok(text.split(' ').next().unwrap_or_default().to_owned())
}

/// The part of a spec that puts a pod on this node once it fits: what other scenarios leave
/// behind may take some moments to go.
fn on(node: &str) -> String {
    format!("  nodeSelector: {{kubernetes.io/hostname: {node}}}\n")
}

/// Allocatable CPU of a node in thousandths.
fn cpu_milli(node: &Value) -> Result<i64> {
    let amount = text(node, "/status/allocatable/cpu");
    Ok(match amount.strip_suffix('m') {
        Some(milli) => milli.parse()?,
        None => amount.parse::<i64>()? * 1000,
    })
}

#[test]
fn a_running_container_gets_more_and_less_without_a_restart() -> Result<()> {
    let scenario = Scenario::begin("resize")?;
    let amounts = |cpu: &str, memory: &str| json!({"cpu": cpu, "memory": memory});
    let both = |cpu: &str, memory: &str| json!({"requests": amounts(cpu, memory), "limits": amounts(cpu, memory)});
    scenario.apply(&sleeper("grows", &both("100m", "64Mi"), "", ""))?;
    scenario.ready("grows")?;
    ensure!(memory_limit(&scenario, "grows")? == (64 << 20).to_string());
    for (cpu, memory, quota) in [("200m", "96Mi", "20000"), ("50m", "48Mi", "5000")] {
        let began = Instant::now();
        resize(&scenario, "grows", &both(cpu, memory))?;
        let (pod, _) = seen(&scenario, "grows", "settled", settled)?;
        println!(
            "resize to {cpu} and {memory} told after {:?}",
            began.elapsed()
        );
        let status = container(&pod, "main");
        ensure!(status["resources"] == both(cpu, memory), "{status}");
        ensure!(
            status["allocatedResources"] == amounts(cpu, memory),
            "{status}"
        );
        ensure!(status["restartCount"] == 0, "{status}");
        ensure!(cpu_quota(&scenario, "grows")? == quota);
        let bytes = if memory == "96Mi" { 96 << 20 } else { 48 << 20 };
        ensure!(memory_limit(&scenario, "grows")? == bytes.to_string());
    }
    let started = scenario.event_about("grows", "ResizeStarted")?;
    ensure!(
        started.starts_with("Pod resize started: {\"containers\":[{\"name\":\"main\""),
        "{started}"
    );
    scenario.event_about("grows", "ResizeCompleted")?;
    Ok(())
}

#[test]
fn a_container_whose_policy_says_so_starts_anew() -> Result<()> {
    let scenario = Scenario::begin("resize-restart")?;
    let memory =
        |amount: &str| json!({"requests": {"memory": amount}, "limits": {"memory": amount}});
    let policy = "    resizePolicy: [{resourceName: memory, restartPolicy: RestartContainer}]\n";
    let manifest = sleeper(
        "anew",
        &memory("32Mi"),
        policy,
        "  restartPolicy: OnFailure\n",
    );
    scenario.apply(&manifest)?;
    scenario.ready("anew")?;
    for (count, amount) in [(1, "48Mi"), (2, "32Mi")] {
        resize(&scenario, "anew", &memory(amount))?;
        let (pod, took) = seen(&scenario, "anew", "what was asked for", |pod| {
            settled(pod) && container(pod, "main")["restartCount"] == count
        })?;
        println!("restart {count} for a resize took {took:?}");
        ensure!(
            container(&pod, "main")["resources"] == memory(amount),
            "{pod}"
        );
    }
    ensure!(memory_limit(&scenario, "anew")? == (32 << 20).to_string());
    let words = scenario.event_about("anew", "Killing")?;
    ensure!(words == "Container main resize requires restart", "{words}");
    Ok(())
}

#[test]
fn a_memory_limit_below_what_is_in_use_waits_and_kills_nothing() -> Result<()> {
    let scenario = Scenario::begin("resize-low")?;
    let memory =
        |amount: &str| json!({"requests": {"memory": amount}, "limits": {"memory": amount}});
    scenario.apply(&sleeper("low", &memory("32Mi"), "", ""))?;
    scenario.ready("low")?;
    resize(&scenario, "low", &memory("10Ki"))?;
    let (pod, _) = seen(&scenario, "low", "what was asked for", |pod| {
        resize_condition(pod, "PodResizeInProgress").is_some_and(|c| c["reason"] == "Error")
    })?;
    let progress = resize_condition(&pod, "PodResizeInProgress").context("condition")?;
    let message = text(progress, "/message");
    ensure!(
        message.contains("memory limit (10240) below current usage"),
        "{message}"
    );
    ensure!(
        container(&pod, "main")["resources"] == memory("32Mi"),
        "{pod}"
    );
    ensure!(
        container(&pod, "main")["allocatedResources"]["memory"] == "10Ki",
        "{pod}"
    );
    scenario.event_about("low", "ResizeError")?;
    resize(&scenario, "low", &memory("32Mi"))?;
    let (pod, _) = seen(&scenario, "low", "settled", settled)?;
    ensure!(container(&pod, "main")["restartCount"] == 0, "{pod}");
    Ok(())
}

#[test]
fn what_does_not_fit_waits_until_there_is_room() -> Result<()> {
    let scenario = Scenario::alone("resize-room")?;
    let node = scenario.json(&["get", "nodes"])?["items"][0].clone();
    let name = text(&node, "/metadata/name");
    let requests = |milli: i64| json!({"requests": {"cpu": format!("{milli}m")}});
    let here = on(&name);
    // Two pods that leave less than one of them wants.
    let share = cpu_milli(&node)? / 4;
    scenario.apply(&sleeper("first", &requests(share), "", &here))?;
    scenario.apply(&sleeper("second", &requests(share), "", &here))?;
    scenario.ready("first")?;
    scenario.ready("second")?;
    resize(&scenario, "first", &requests(3 * share + 10))?;
    let (pod, _) = seen(&scenario, "first", "what was asked for", |pod| {
        resize_condition(pod, "PodResizePending").is_some()
    })?;
    let pending = resize_condition(&pod, "PodResizePending").context("condition")?;
    ensure!(pending["reason"] == "Deferred", "{pending}");
    ensure!(
        pending["observedGeneration"] == pod["metadata"]["generation"],
        "{pending}"
    );
    let message = text(pending, "/message");
    ensure!(
        message.starts_with("Node didn't have enough resource: cpu, requested: "),
        "{message}"
    );
    scenario.event_about("first", "ResizeDeferred")?;
    let began = Instant::now();
    scenario.kubectl(&["delete", "pod", "second", "--wait=false"])?;
    let (pod, _) = seen(&scenario, "first", "settled", settled)?;
    println!(
        "granted {:?} after the other pod was deleted",
        began.elapsed()
    );
    ensure!(
        container(&pod, "main")["resources"] == requests(3 * share + 10),
        "{pod}"
    );
    Ok(())
}

#[test]
fn what_was_granted_survives_a_killed_agent_and_what_was_not_waits() -> Result<()> {
    let scenario = Scenario::alone("resize-kill")?;
    let requests = |cpu: &str| json!({"requests": {"cpu": cpu, "memory": "16Mi"}});
    scenario.apply(&sleeper("kept", &requests("100m"), "", ""))?;
    let pod = scenario.ready("kept")?;
    let node = text(&pod, "/spec/nodeName");
    // Another pod takes more than half of the node: half of it is more than is left.
    let cpu = scenario.json(&["get", "node", &node])?;
    let half = cpu_milli(&cpu)? / 2;
    let other = json!({"requests": {"cpu": format!("{}m", half + 200)}});
    let there = on(&node);
    scenario.apply(&sleeper("other", &other, "", &there))?;
    scenario.ready("other")?;
    resize(&scenario, "kept", &requests("150m"))?;
    seen(&scenario, "kept", "settled", settled)?;
    let agent = scenario.agent(&node);
    agent.kill()?;
    resize(&scenario, "kept", &requests(&format!("{half}m")))?;
    agent.start()?;
    let (pod, _) = seen(&scenario, "kept", "what was asked for", |pod| {
        resize_condition(pod, "PodResizePending").is_some()
    })?;
    let status = container(&pod, "main");
    ensure!(status["allocatedResources"]["cpu"] == "150m", "{status}");
    ensure!(status["resources"]["requests"]["cpu"] == "150m", "{status}");
    agent.kill()?;
    resize(&scenario, "kept", &requests("120m"))?;
    agent.start()?;
    let (pod, _) = seen(&scenario, "kept", "settled", settled)?;
    let status = container(&pod, "main");
    ensure!(status["resources"]["requests"]["cpu"] == "120m", "{status}");
    ensure!(status["restartCount"] == 0, "{status}");
    let shares = cgroup(&scenario, "kept", "cpu/cpu.shares", "cpu.weight")?;
    ensure!(shares == "122" || shares == "17", "shares {shares}");
    Ok(())
}

#[test]
fn the_downward_api_shows_what_was_granted() -> Result<()> {
    let scenario = Scenario::begin("resize-shown")?;
    let cpu = |amount: &str| json!({"requests": {"cpu": amount}, "limits": {"cpu": amount}});
    let mount = "    volumeMounts: [{name: info, mountPath: /info}]\n";
    let volume = "  volumes:
  - name: info
    downwardAPI:
      items:
      - {path: cpu, resourceFieldRef: {containerName: main, resource: limits.cpu, divisor: 1m}}
";
    scenario.apply(&sleeper("shown", &cpu("100m"), mount, volume))?;
    scenario.ready("shown")?;
    let wait = "until [ \"$(cat /info/cpu)\" = 200 ]; do sleep 0.1; done";
    ensure!(scenario.kubectl(&["exec", "shown", "--", "cat", "/info/cpu"])? == "100");
    resize(&scenario, "shown", &cpu("200m"))?;
    scenario.kubectl(&["exec", "shown", "--", "timeout", "30", "sh", "-c", wait])?;
    Ok(())
}

#[test]
fn a_pod_of_its_own_resources_shares_them_among_its_containers() -> Result<()> {
    let scenario = Scenario::begin("pod-level")?;
    let resources = json!({"requests": {"cpu": "100m", "memory": "32Mi"}, "limits": {"cpu": "200m", "memory": "64Mi"}});
    let spec = format!("  resources: {resources}\n");
    scenario.apply(&sleeper("shares", &json!({}), "", &spec))?;
    let pod = scenario.ready("shares")?;
    ensure!(pod["status"]["qosClass"] == "Burstable", "{pod}");
    ensure!(memory_limit(&scenario, "shares")? == (64 << 20).to_string());
    let (pod, _) = seen(&scenario, "shares", "what was asked for", |pod| {
        pod["status"]["resources"] == resources
    })?;
    ensure!(
        pod["status"]["allocatedResources"] == resources["requests"],
        "{pod}"
    );
    let patch = json!({"spec": {"resources": {"limits": {"memory": "96Mi"}}}}).to_string();
    let words = [
        "patch",
        "pod",
        "shares",
        "--subresource=resize",
        "--patch",
        &patch,
    ];
    scenario.kubectl(&words)?;
    seen(&scenario, "shares", "what was asked for", |pod| {
        settled(pod) && pod["status"]["resources"]["limits"]["memory"] == "96Mi"
    })?;
    ensure!(memory_limit(&scenario, "shares")? == (96 << 20).to_string());
    Ok(())
}

#[test]
fn a_runtime_class_nobody_serves_keeps_its_pod_waiting() -> Result<()> {
    let scenario = Scenario::begin("runtime-class")?;
    let class = format!("nobody-{}", scenario.namespace);
    let made = scenario.apply(&format!(
        "apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {{name: {class}}}
handler: nobody
"
    ));
    made?;
    let spec = format!("  runtimeClassName: {class}\n");
    scenario.apply(&sleeper("waits", &json!({}), "", &spec))?;
    let words = scenario.event_about("waits", "FailedCreatePodSandBox")?;
    ensure!(
        words.contains("no runtime for \"nobody\" is configured"),
        "{words}"
    );
    let pod = scenario.json(&["get", "pod", "waits"])?;
    ensure!(pod["status"]["phase"] == "Pending", "{pod}");
    scenario.kubectl(&["delete", "runtimeclass", &class])?;
    Ok(())
}
