//! Environment, names, users and namespaces of a container.

use anyhow::{Result, ensure};
use testkit::scenario::{BUSYBOX, Scenario, phase, script_pod};

#[test]
fn environment_comes_from_every_source_and_expands() -> Result<()> {
    let scenario = Scenario::begin("environment")?;
    scenario.kubectl(&[
        "create",
        "configmap",
        "config",
        "--from-literal=KEY=from-map",
    ])?;
    scenario.kubectl(&[
        "create",
        "secret",
        "generic",
        "secret",
        "--from-literal=S=hidden",
    ])?;
    scenario.apply(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: env, labels: {{color: red}}}}
spec:
  restartPolicy: Never
  containers:
  - name: main
    image: {BUSYBOX}
    command: [sh, -c, 'echo $A $B $C $D $E $KEY $PRE_S $HOSTNAME \"$(ARG)\"']
    envFrom:
    - configMapRef: {{name: config}}
    - {{prefix: PRE_, secretRef: {{name: secret}}}}
    env:
    - {{name: A, value: plain}}
    - {{name: B, value: $(A)-more}}
    - {{name: C, value: $$(A)}}
    - {{name: D, valueFrom: {{fieldRef: {{fieldPath: \"metadata.labels['color']\"}}}}}}
    - {{name: E, valueFrom: {{resourceFieldRef: {{resource: limits.memory, divisor: 1Mi}}}}}}
    - {{name: ARG, value: expanded}}
    resources: {{limits: {{memory: 32Mi}}}}
"
    ))?;
    let pod = scenario.finished("env")?;
    let logs = scenario.kubectl(&["logs", "env"])?;
    ensure!(phase(&pod) == "Succeeded", "{pod}");
    let wanted = "plain plain-more $(A) red 32 from-map hidden env expanded";
    ensure!(logs.starts_with(wanted), "{logs}");
    Ok(())
}

#[test]
fn users_and_capabilities_are_as_asked() -> Result<()> {
    let scenario = Scenario::begin("security")?;
    let extra = "    securityContext: {runAsUser: 1000, runAsGroup: 2000, readOnlyRootFilesystem: true, \
                 allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}, \
                 seccompProfile: {type: RuntimeDefault}}\n  restartPolicy: Never\n";
    let script = "id -u; id -g; grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status; \
                  touch /x 2>&1 | grep -c Read-only";
    scenario.apply(&script_pod("tight", script, extra))?;
    scenario.finished("tight")?;
    let logs = scenario.kubectl(&["logs", "tight"])?;
    let words: Vec<&str> = logs.split_whitespace().collect();
    let wanted = [
        "1000",
        "2000",
        "CapEff:",
        "0000000000000000",
        "NoNewPrivs:",
        "1",
        "Seccomp:",
        "2",
        "1",
    ];
    ensure!(words == wanted, "{words:?}");
    Ok(())
}

#[test]
fn a_pod_sees_its_own_namespaces_or_the_hosts() -> Result<()> {
    let scenario = Scenario::begin("namespaces")?;
    let never = "  restartPolicy: Never\n";
    scenario.apply(&script_pod(
        "own",
        "hostname; echo $$$$; ls /sys/class/net",
        never,
    ))?;
    scenario.finished("own")?;
    let own = scenario.kubectl(&["logs", "own"])?;
    let lines: Vec<&str> = own.lines().collect();
    ensure!(lines[..2] == ["own", "1"], "{own}");
    ensure!(lines.contains(&"eth0") && lines.contains(&"lo"), "{own}");
    let host = "  restartPolicy: Never\n  hostNetwork: true\n  hostPID: true\n  nodeName: node-1\n";
    scenario.apply(&script_pod("host", "hostname; echo $$$$", host))?;
    let pod = scenario.finished("host")?;
    let logs = scenario.kubectl(&["logs", "host"])?;
    let lines: Vec<&str> = logs.lines().collect();
    ensure!(lines[0] == "node-1" && lines[1] != "1", "{logs}");
    ensure!(
        pod.pointer("/status/podIP") == pod.pointer("/status/hostIP"),
        "{pod}"
    );
    Ok(())
}

#[test]
fn containers_of_a_pod_share_the_network_and_the_pid_namespace_if_asked() -> Result<()> {
    let scenario = Scenario::begin("shared")?;
    scenario.apply(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: shared}}
spec:
  shareProcessNamespace: true
  restartPolicy: Never
  containers:
  - {{name: server, image: {BUSYBOX}, command: [sh, -c, 'mkdir /w; echo hi > /w/index.html; exec httpd -f -p 8080 -h /w']}}
  - name: client
    image: {BUSYBOX}
    command: [sh, -c, 'until wget -q -O - http://127.0.0.1:8080/ 2>/dev/null; do sleep 0.1; done; killall httpd']
"
    ))?;
    let pod = scenario.finished("shared")?;
    ensure!(
        scenario
            .kubectl(&["logs", "shared", "-c", "client"])?
            .trim()
            == "hi",
        "{pod}"
    );
    Ok(())
}

#[test]
fn hosts_and_resolver_are_managed() -> Result<()> {
    let scenario = Scenario::begin("hosts")?;
    let extra =
        "  restartPolicy: Never\n  hostAliases: [{ip: 192.0.2.7, hostnames: [alias.test]}]\n";
    scenario.apply(&script_pod(
        "files",
        "cat /etc/hosts /etc/resolv.conf",
        extra,
    ))?;
    let pod = scenario.finished("files")?;
    let logs = scenario.kubectl(&["logs", "files"])?;
    let address = testkit::scenario::text(&pod, "/status/podIP");
    ensure!(logs.contains("alias.test"), "{logs}");
    ensure!(
        !address.is_empty() && logs.contains(&address),
        "{address} is not in {logs}"
    );
    let dns = scenario.layout.service_address(10).to_string();
    ensure!(logs.contains(&format!("nameserver {dns}")), "{logs}");
    ensure!(
        logs.contains(&format!("{}.svc.cluster.local", scenario.namespace)),
        "{logs}"
    );
    Ok(())
}
