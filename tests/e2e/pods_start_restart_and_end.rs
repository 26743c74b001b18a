//! The life of a pod: order, restarts, grace, phases.

use anyhow::{Result, ensure};
use std::time::{Duration, Instant};
use testkit::scenario::{BUSYBOX, Scenario, container, phase, script_pod, text, waiting_reason};

#[test]
fn init_containers_run_in_order_before_the_main_ones() -> Result<()> {
    let scenario = Scenario::begin("init")?;
    scenario.apply(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: ordered}}
spec:
  restartPolicy: Never
  volumes: [{{name: shared, emptyDir: {{}}}}]
  initContainers:
  - name: first
    image: {BUSYBOX}
    command: [sh, -c, 'sleep 1; echo first >> /shared/order']
    volumeMounts: [{{name: shared, mountPath: /shared}}]
  - name: second
    image: {BUSYBOX}
    command: [sh, -c, 'echo second >> /shared/order']
    volumeMounts: [{{name: shared, mountPath: /shared}}]
  containers:
  - name: main
    image: {BUSYBOX}
    command: [sh, -c, 'echo main >> /shared/order; cat /shared/order']
    volumeMounts: [{{name: shared, mountPath: /shared}}]
"
    ))?;
    let pod = scenario.finished("ordered")?;
    ensure!(phase(&pod) == "Succeeded", "{pod}");
    ensure!(scenario.kubectl(&["logs", "ordered"])? == "first\nsecond\nmain\n");
    Ok(())
}

#[test]
fn a_failing_init_container_keeps_the_main_one_from_starting() -> Result<()> {
    let scenario = Scenario::begin("init-fails")?;
    scenario.apply(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: stuck}}
spec:
  restartPolicy: Never
  initContainers:
  - {{name: first, image: {BUSYBOX}, command: ['false']}}
  containers:
  - {{name: main, image: {BUSYBOX}, command: ['true']}}
"
    ))?;
    let pod = scenario.finished("stuck")?;
    ensure!(phase(&pod) == "Failed", "{pod}");
    let reason = text(container(&pod, "main"), "/state/waiting/reason");
    ensure!(
        reason == "PodInitializing",
        "main container: {}",
        container(&pod, "main")
    );
    Ok(())
}

#[test]
fn exit_codes_become_phases() -> Result<()> {
    let scenario = Scenario::begin("phases")?;
    let never = "  restartPolicy: Never\n";
    scenario.apply(&script_pod("good", "exit 0", never))?;
    scenario.apply(&script_pod("bad", "exit 42", never))?;
    let good = scenario.finished("good")?;
    ensure!(phase(&good) == "Succeeded", "{good}");
    ensure!(text(container(&good, "main"), "/state/terminated/reason") == "Completed");
    let bad = scenario.finished("bad")?;
    ensure!(phase(&bad) == "Failed", "{bad}");
    ensure!(
        container(&bad, "main")["state"]["terminated"]["exitCode"] == 42,
        "{bad}"
    );
    ensure!(text(container(&bad, "main"), "/state/terminated/reason") == "Error");
    Ok(())
}

#[test]
fn a_crashing_container_is_restarted_with_back_off() -> Result<()> {
    let scenario = Scenario::begin("crash")?;
    scenario.apply(&script_pod("crash", "exit 1", ""))?;
    let (pod, _) = scenario.watch_pod("crash", "CrashLoopBackOff", |event| {
        waiting_reason(&event.object, "main") == "CrashLoopBackOff"
    })?;
    ensure!(phase(&pod) == "Running", "phase {}", phase(&pod));
    let last = &container(&pod, "main")["lastState"]["terminated"]["exitCode"];
    ensure!(*last == 1, "last state: {}", container(&pod, "main"));
    ensure!(
        scenario
            .event_about("crash", "BackOff")?
            .contains("restarting")
    );
    Ok(())
}

#[test]
fn a_pod_gets_its_grace_and_no_more() -> Result<()> {
    let scenario = Scenario::begin("grace")?;
    let polite = "trap 'echo asked; exit 0' TERM; while :; do sleep 0.1; done";
    let deaf = "trap '' TERM; while :; do sleep 0.1; done";
    let patient = script_pod("polite", polite, "").replace("Seconds: 3", "Seconds: 20");
    scenario.apply(&patient)?;
    scenario.apply(&script_pod("deaf", deaf, ""))?;
    scenario.ready("polite")?;
    scenario.ready("deaf")?;
    let start = Instant::now();
    scenario.kubectl(&["delete", "pod", "polite"])?;
    ensure!(
        start.elapsed() < Duration::from_secs(10),
        "polite took {:?}",
        start.elapsed()
    );
    let start = Instant::now();
    scenario.kubectl(&["delete", "pod", "deaf"])?;
    let took = start.elapsed();
    ensure!(
        took > Duration::from_millis(2500),
        "killed after {took:?}, before its grace of 3 s"
    );
    ensure!(
        took < Duration::from_secs(12),
        "took {took:?} with a grace of 3 s"
    );
    Ok(())
}

#[test]
fn a_forced_deletion_does_not_wait() -> Result<()> {
    let scenario = Scenario::begin("force")?;
    let deaf = "trap '' TERM; while :; do sleep 0.1; done";
    let grace = "  terminationGracePeriodSeconds: 600\n";
    let pod = script_pod("deaf", deaf, "").replace("  terminationGracePeriodSeconds: 3\n", grace);
    scenario.apply(&pod)?;
    scenario.ready("deaf")?;
    scenario.kubectl(&["delete", "pod", "deaf", "--force", "--grace-period=0"])?;
    scenario.gone("deaf")
}

#[test]
fn a_container_that_takes_too_much_memory_is_named_oom_killed() -> Result<()> {
    let scenario = Scenario::begin("oom")?;
    // The shell's own process allocates, so that the container's first process is the victim.
    let script = "a=x; while :; do a=$a$a; done";
    let extra = "    resources: {limits: {memory: 16Mi}}\n  restartPolicy: Never\n";
    scenario.apply(&script_pod("greedy", script, extra))?;
    let pod = scenario.finished("greedy")?;
    let terminated = &container(&pod, "main")["state"]["terminated"];
    ensure!(terminated["reason"] == "OOMKilled", "{terminated}");
    ensure!(terminated["exitCode"] == 137, "{terminated}");
    Ok(())
}

#[test]
fn status_tells_addresses_and_quality_of_service() -> Result<()> {
    let scenario = Scenario::begin("status")?;
    scenario.apply(&script_pod("one", "sleep 1000", ""))?;
    let guaranteed = "    resources: {limits: {cpu: 10m, memory: 16Mi}}\n";
    scenario.apply(&script_pod("two", "sleep 1000", guaranteed))?;
    let one = scenario.ready("one")?;
    ensure!(text(&one, "/status/qosClass") == "BestEffort", "{one}");
    ensure!(
        text(&one, "/status/podIPs/0/ip") == text(&one, "/status/podIP"),
        "{one}"
    );
    ensure!(text(&one, "/status/hostIP").starts_with("10.99."), "{one}");
    let id = text(container(&one, "main"), "/containerID");
    ensure!(
        id.starts_with("ferrule://") || id.starts_with("containerd://"),
        "container id {id}"
    );
    ensure!(!text(&one, "/status/startTime").is_empty(), "no start time");
    let two = scenario.ready("two")?;
    ensure!(text(&two, "/status/qosClass") == "Guaranteed", "{two}");
    Ok(())
}
