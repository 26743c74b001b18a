//! Users, images and files that a pod has for itself, and what holds it in.

use anyhow::{Context, Result, ensure};
use testkit::process::until;
use testkit::scenario::{BUSYBOX, Event, LIMIT, Scenario, phase, script_pod, waiting_reason};

#[test]
fn root_of_a_pod_with_users_of_its_own_is_nobody_on_the_node() -> Result<()> {
    let scenario = Scenario::begin("own-users")?;
    scenario.kubectl(&[
        "create",
        "configmap",
        "config",
        "--from-literal=key=from-map",
    ])?;
    let script = "id -u; cat /proc/self/uid_map; cat /config/key; echo; stat -c %u:%g / /scratch /config/key \
                  /var/run/secrets/kubernetes.io/serviceaccount/token; touch /scratch/made /made; \
                  stat -c %u /scratch/made; hostname; echo last > /dev/termination-log; sleep 1000";
    let extra = "    volumeMounts:
    - {name: scratch, mountPath: /scratch}
    - {name: config, mountPath: /config}
  nodeName: node-1
  hostUsers: false
  securityContext: {fsGroup: 4321}
  volumes:
  - {name: scratch, emptyDir: {}}
  - {name: config, configMap: {name: config}}
";
    scenario.apply(&script_pod("own", script, extra))?;
    let pod = scenario.ready("own")?;
    let whole = || {
        let logs = scenario.kubectl(&["logs", "own"])?;
        ensure!(logs.ends_with("own\n"), "{logs}");
        Ok(logs)
    };
    let logs = until("the whole log", LIMIT, || Ok(()), whole)?;
    let words: Vec<&str> = logs.split_whitespace().collect();
    let first: u32 = words
        .get(2)
        .and_then(|w| w.parse().ok())
        .context(logs.clone())?;
    ensure!(
        first >= 65536 && first.is_multiple_of(65536) && words[3] == "65536",
        "{logs}"
    );
    let rest = ["from-map", "0:0", "0:4321", "0:4321", "0:4321", "0", "own"];
    ensure!(words[4..] == rest, "{logs}");
    let uid = pod.pointer("/status/containerStatuses/0/user/linux/uid");
    ensure!(uid.and_then(serde_json::Value::as_u64) == Some(0), "{pod}");
    let inside = scenario.kubectl(&[
        "exec",
        "own",
        "--",
        "sh",
        "-c",
        "id -u; cat /proc/1/uid_map",
    ])?;
    ensure!(
        inside.starts_with("0\n") && inside.contains(&first.to_string()),
        "{inside}"
    );
    // A second pod of the node has other ids.
    let script = "cat /proc/self/uid_map; sleep 1000";
    scenario.apply(&script_pod(
        "second",
        script,
        "  nodeName: node-1\n  hostUsers: false\n",
    ))?;
    scenario.ready("second")?;
    let map = || {
        let logs = scenario.kubectl(&["logs", "second"])?;
        ensure!(logs.ends_with('\n'), "{logs}");
        Ok(logs)
    };
    let other = until("the second map", LIMIT, || Ok(()), map)?;
    ensure!(!other.contains(&format!(" {first} ")), "{other}");
    scenario.kubectl(&["delete", "pod", "own", "second", "--wait=false"])?;
    scenario.gone("own")?;
    scenario.gone("second")
}

#[test]
fn a_volume_shows_the_content_of_an_image() -> Result<()> {
    let scenario = Scenario::begin("image-volume")?;
    let pod = |name: &str, script: &str, image: &str, sub_path: &str| {
        let extra = format!(
            "    volumeMounts:
    - {{name: image, mountPath: /image, subPath: \"{sub_path}\"}}
  restartPolicy: Never
  volumes:
  - {{name: image, image: {{reference: \"{image}\", pullPolicy: IfNotPresent}}}}
"
        );
        script_pod(name, script, &extra)
    };
    let script = "ls /image/bin/busybox && touch /image/x 2>&1 | grep -c Read-only; \
                  grep -c 'image.*noexec' /proc/mounts";
    scenario.apply(&pod("whole", script, BUSYBOX, ""))?;
    scenario.apply(&pod("part", "head -n 1 /image/passwd", BUSYBOX, "etc"))?;
    scenario.apply(&pod("missing-part", "true", BUSYBOX, "not/there"))?;
    let nowhere = "registry.k8s.io/e2e-test-images/nowhere:1";
    scenario.apply(&pod("missing", "true", nowhere, ""))?;
    ensure!(phase(&scenario.finished("whole")?) == "Succeeded");
    let logs = scenario.kubectl(&["logs", "whole"])?;
    ensure!(
        logs.split_whitespace().eq(["/image/bin/busybox", "1", "1"]),
        "{logs}"
    );
    ensure!(phase(&scenario.finished("part")?) == "Succeeded");
    ensure!(
        scenario
            .kubectl(&["logs", "part"])?
            .starts_with("root:x:0:0")
    );
    let waits = |reason: &'static [&'static str]| {
        move |event: &Event| reason.contains(&waiting_reason(&event.object, "main").as_str())
    };
    let pulling = waits(&["ErrImagePull", "ImagePullBackOff"]);
    scenario.watch_pod("missing", "waits for its image", pulling)?;
    scenario.watch_pod(
        "missing-part",
        "cannot be made",
        waits(&["CreateContainerError"]),
    )?;
    Ok(())
}

#[test]
fn environment_comes_from_a_file_an_init_container_wrote() -> Result<()> {
    let scenario = Scenario::begin("env-file")?;
    scenario.apply(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: env-file}}
spec:
  restartPolicy: Never
  volumes: [{{name: work, emptyDir: {{}}}}]
  initContainers:
  - name: write
    image: {BUSYBOX}
    command: [sh, -c, \"echo \\\"NAME='from a file'\\\" > /work/env\"]
    volumeMounts: [{{name: work, mountPath: /work}}]
  containers:
  - name: main
    image: {BUSYBOX}
    command: [sh, -c, 'echo $X; cat /proc/self/limits | grep \"open files\"; df -k /dev/shm | tail -n 1']
    env:
    - {{name: X, valueFrom: {{fileKeyRef: {{volumeName: work, path: env, key: NAME}}}}}}
"
    ))?;
    ensure!(phase(&scenario.finished("env-file")?) == "Succeeded");
    let logs = scenario.kubectl(&["logs", "env-file"])?;
    let lines: Vec<&str> = logs.lines().collect();
    ensure!(lines.len() == 3 && lines[0] == "from a file", "{logs}");
    let words: Vec<&str> = lines[1].split_whitespace().collect();
    ensure!(
        words.get(3) == Some(&"1024"),
        "limits of containers are not the agent's: {logs}"
    );
    ensure!(
        lines[2].split_whitespace().nth(1) == Some("65536"),
        "{logs}"
    );
    Ok(())
}
