//! What is checked of the machine as a node. The scenarios in `tests/e2e` check the rest on nodes
//! of the lab; here is what only cgroup v2, systemd or a kernel of one's own can show.

use super::node::{Guest, NODE};
use crate::cluster::sample;
use crate::process::until;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::Duration;

/// Longest wait for anything of a node under emulation.
const LIMIT: Duration = Duration::from_secs(120);

/// One check.
pub(super) struct Check {
    pub(super) sentence: &'static str,
    pub(super) run: fn(&mut Guest) -> Result<()>,
}

/// In the order they run.
pub(super) const CHECKS: [Check; 7] = [
    Check {
        sentence: "the machine registers and becomes Ready",
        run: ready,
    },
    Check {
        sentence: "the sample runs on it, with logs and exec",
        run: sample_runs,
    },
    Check {
        sentence: "limits, delegation and the cgroup namespace are as on v2",
        run: cgroups,
    },
    Check {
        sentence: "a disk is out of a container's reach",
        run: devices,
    },
    Check {
        sentence: "a container killed for its memory says so",
        run: out_of_memory,
    },
    Check {
        sentence: "a killed agent leaves pods running and Ready, and adopts them",
        run: killed,
    },
    Check {
        sentence: "deleted pods leave no cgroup, process or link",
        run: clean,
    },
];

fn ready(guest: &mut Guest) -> Result<()> {
    let node = format!("node/{NODE}");
    let kubectl = &guest.lab.kubectl;
    let network = until(
        "the machine to register",
        LIMIT,
        || Ok(()),
        || {
            let wait = "--for=jsonpath={.spec.podCIDR}";
            kubectl.run(&["wait", wait, &node, "--timeout=5s"])?;
            kubectl.run(&["get", &node, "--output=jsonpath={.spec.podCIDR}"])
        },
    )?;
    guest.join_network(&network)?;
    let wait = ["wait", "--for=condition=Ready", &node, "--timeout=120s"];
    guest.lab.kubectl.run(&wait).map(drop)
}

fn sample_runs(guest: &mut Guest) -> Result<()> {
    sample::ensure(&guest.lab)?;
    let kubectl = &guest.lab.kubectl;
    let log = kubectl.run(&["logs", "deployment/hello"])?;
    ensure!(
        log.contains("hello from ferrule") && log.contains(NODE),
        "the sample's log is {log:?}"
    );
    let said = exec(guest, "cat /www/index.html; exit 7");
    let error = said.err().context("exit code 7 was lost")?.to_string();
    ensure!(error.contains("exit code 7"), "exec said {error}");
    let page = exec(guest, "cat /www/index.html")?;
    ensure!(page.contains("hello from ferrule"), "exec said {page:?}");
    Ok(())
}

/// Runs a line of shell in a container of the sample.
fn exec(guest: &Guest, script: &str) -> Result<String> {
    let args = ["exec", "deployment/hello", "--", "sh", "-c", script];
    guest.lab.kubectl.run(&args)
}

fn cgroups(guest: &mut Guest) -> Result<()> {
    // Of its first process: a command run by exec has a cgroup of its own below that.
    let own = exec(guest, "cat /proc/1/cgroup")?;
    ensure!(
        own.trim() == "0::/",
        "a container sees itself in cgroup {own:?}"
    );
    let given = guest
        .machine
        .stdout("cat /sys/fs/cgroup/kubepods/cgroup.subtree_control")?;
    for controller in ["cpu", "memory", "pids"] {
        ensure!(
            given.split_whitespace().any(|name| name == controller),
            "kubepods hands down only {given:?}"
        );
    }
    // 64 MiB each; the pods' own cgroups have the same limit as their only container.
    let limited = guest.machine.stdout(
        "find /sys/fs/cgroup/kubepods -name memory.max | xargs grep -lx 67108864 | wc -l",
    )?;
    let limited: usize = limited.trim().parse().context("parse a count")?;
    ensure!(
        limited >= 3,
        "{limited} cgroups have the limit of the sample's 3 containers"
    );
    Ok(())
}

fn devices(guest: &mut Guest) -> Result<()> {
    let number = guest.machine.stdout("cat /sys/class/block/vda/dev")?;
    let number = number.trim().replace(':', " ");
    // Making the node is allowed, using it is not; the number proves that the filter says so.
    let script = format!("mknod /tmp/disk b {number} && head -c 1 /tmp/disk");
    let error = exec(guest, &script)
        .err()
        .context("a container read the machine's disk")?;
    let error = error.to_string();
    ensure!(
        error.contains("Operation not permitted"),
        "reading a disk said {error}"
    );
    exec(guest, "echo x >/dev/null && head -c 1 /dev/urandom | wc -c").map(drop)
}

fn out_of_memory(guest: &mut Guest) -> Result<()> {
    let kubectl = &guest.lab.kubectl;
    kubectl.apply(
        "apiVersion: v1
kind: Pod
metadata: {name: greedy}
spec:
  restartPolicy: Never
  containers:
  - name: main
    image: registry.k8s.io/e2e-test-images/busybox:1.37.0-1
    command: [sh, -c, 'exec tail /dev/zero']
    resources: {limits: {memory: 32Mi}}
",
    )?;
    let wait = "--for=jsonpath={.status.phase}=Failed";
    kubectl.run(&["wait", wait, "pod/greedy", "--timeout=120s"])?;
    let pod = kubectl.json(&["get", "pod", "greedy"])?;
    let state = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    ensure!(
        state["reason"] == "OOMKilled" && state["exitCode"] == 137,
        "the container ended as {state}"
    );
    kubectl.run(&["delete", "pod", "greedy"]).map(drop)
}

/// What must not change about a pod while its agent is away.
#[derive(Debug, PartialEq, Eq)]
struct Life {
    name: String,
    container: Value,
    restarts: Value,
    ready_since: Value,
}

fn lives(guest: &Guest) -> Result<Vec<Life>> {
    let pods = guest
        .lab
        .kubectl
        .json(&["get", "pods", "-l", "app=hello"])?;
    let items = pods["items"].as_array().context("a list of pods")?;
    Ok(items.iter().map(life).collect())
}

fn life(pod: &Value) -> Life {
    let status = &pod["status"]["containerStatuses"][0];
    let conditions = pod["status"]["conditions"].as_array();
    let ready = conditions
        .into_iter()
        .flatten()
        .find(|condition| condition["type"] == "Ready" && condition["status"] == "True");
    Life {
        name: pod["metadata"]["name"]
            .as_str()
            .unwrap_or_default()
            .to_owned(),
        container: status["containerID"].clone(),
        restarts: status["restartCount"].clone(),
        ready_since: ready.map_or(Value::Null, |ready| ready["lastTransitionTime"].clone()),
    }
}

fn killed(guest: &mut Guest) -> Result<()> {
    // Below one cgroup: every process of every pod.
    let pods = "find /sys/fs/cgroup/kubepods -name cgroup.procs | xargs cat | sort -n";
    let before = lives(guest)?;
    let count = "find /sys/fs/cgroup/kubepods -type d -name 'pod*' | wc -l";
    until(
        "cgroups of deleted pods to go",
        LIMIT,
        || Ok(()),
        || {
            let found = guest.machine.stdout(count)?;
            let wanted = before.len().to_string();
            ensure!(found.trim() == wanted, "{} pods", found.trim());
            Ok(())
        },
    )?;
    let processes = guest.machine.stdout(pods)?;
    // Stopped at once after the kill, so that it is away and not only replaced.
    guest
        .machine
        .stdout("systemctl kill --kill-who=main -s KILL kubelet; systemctl stop kubelet")?;
    let address = guest
        .lab
        .kubectl
        .json(&["get", "pods", "-l", "app=hello"])?;
    let address = address["items"][0]["status"]["podIP"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let page = guest
        .machine
        .stdout(&format!("busybox wget -qO- http://{address}:8080/"))?;
    ensure!(
        page.contains("hello from ferrule"),
        "without its agent the pod serves {page:?}"
    );
    let without = guest.machine.stdout(pods)?;
    ensure!(
        without == processes,
        "processes were {processes:?} and are {without:?}"
    );
    guest.machine.stdout("systemctl start kubelet")?;
    let kubectl = &guest.lab.kubectl;
    until(
        "the agent to answer again",
        LIMIT,
        || Ok(()),
        || kubectl.run(&["logs", "deployment/hello", "--tail=1"]),
    )?;
    exec(guest, "true")?;
    let with = guest.machine.stdout(pods)?;
    ensure!(
        with == processes,
        "processes were {processes:?} and are {with:?}"
    );
    let after = lives(guest)?;
    ensure!(after == before, "pods were {before:?} and are {after:?}");
    ensure!(
        after.iter().all(|life| life.ready_since.is_string()),
        "not all pods are Ready: {after:?}"
    );
    Ok(())
}

fn clean(guest: &mut Guest) -> Result<()> {
    let kubectl = &guest.lab.kubectl;
    kubectl.run(&[
        "delete",
        "deployment",
        "hello",
        "--cascade=foreground",
        "--timeout=60s",
    ])?;
    let wait = [
        "wait",
        "--for=delete",
        "pod",
        "-l",
        "app=hello",
        "--timeout=60s",
    ];
    kubectl.run(&wait)?;
    let machine = &mut guest.machine;
    // Commands that print what is left, one thing a line.
    let left = "find /sys/fs/cgroup/kubepods -mindepth 2 -type d -name '*pod*'; \
                pgrep -a pod-shim; ls /run/ferrule/netns /run/ferrule/shim; \
                ip -o link show type veth; \
                ls /var/lib/ferrule/sandboxes /var/lib/ferrule/containers; ls /var/lib/kubelet/pods";
    let left = format!("({left}) 2>/dev/null | grep -v -e '^$' -e ':$'; true");
    until(
        "the last traces of pods to go",
        Duration::from_secs(30),
        || Ok(()),
        || {
            let found = machine.stdout(&left)?;
            ensure!(found.is_empty(), "still there: {found}");
            Ok(())
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_that_is_not_ready_has_no_time_since_when() {
        let mut pod = serde_json::json!({
            "metadata": {"name": "a"},
            "status": {
                "containerStatuses": [{"containerID": "ferrule://1", "restartCount": 2}],
                "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "t"}],
            },
        });
        assert_eq!(life(&pod).ready_since, "t");
        pod["status"]["conditions"][0]["status"] = "False".into();
        assert_eq!(life(&pod).ready_since, Value::Null);
        assert_eq!(life(&pod).restarts, 2);
    }
}
