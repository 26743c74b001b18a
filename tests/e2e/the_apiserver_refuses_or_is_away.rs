//! Certificates that do not work and an apiserver that is gone: pods run on, the cause is named,
//! and what is said afterwards is true.

use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::time::Duration;
use testkit::cluster::pki::{self, Authority, Credentials, Subject};
use testkit::cluster::spare::Spare;
use testkit::process::until;
use testkit::scenario::{
    LIMIT, Scenario, SpareNode, condition, condition_since, container, is_ready, script_pod, text,
};

/// One line a second: what the scenario waits on is also what shows that the pod lives.
const TICKS: &str = "i=0; while :; do echo $i; i=$((i+1)); sleep 1; done";

#[test]
fn an_expired_certificate_is_named_and_its_replacement_is_taken_without_a_restart() -> Result<()> {
    let expired = |scenario: &Scenario, subject: Subject<'_>| {
        let authorities = pki::ensure_control_plane(&scenario.layout)?;
        authorities
            .cluster
            .issue_between(subject, (2020, 1, 1), (2021, 1, 1))
    };
    a_bad_certificate("expired", expired, &["client-certificate-data", "expired"])
}

#[test]
fn a_certificate_of_another_authority_is_named_and_its_replacement_is_taken() -> Result<()> {
    let foreign =
        |_: &Scenario, subject: Subject<'_>| Authority::generate("somebody-else")?.issue(subject);
    a_bad_certificate(
        "foreign",
        foreign,
        &["client-certificate-data", "somebody-else"],
    )
}

fn a_bad_certificate(
    kind: &str,
    issue: impl FnOnce(&Scenario, Subject<'_>) -> Result<Credentials>,
    words: &[&str],
) -> Result<()> {
    let scenario = Scenario::begin(&format!("{kind}-cert"))?;
    let node = scenario.spare_node(&Spare::default())?;
    scenario.apply(&script_pod("steady", TICKS, &node.pin()))?;
    let before = scenario.ready("steady")?;
    let log = log_file(&node, &before)?;
    let file = node
        .agent
        .directory("kubernetes")
        .join("kubelet.kubeconfig");
    let good = std::fs::read(&file)?;
    let user = format!("system:node:{}", node.name);
    let bad = issue(&scenario, Subject::client(&user, Some("system:nodes")))?;
    let authority = std::fs::read_to_string(scenario.layout.pki("ca.crt"))?;
    let bad = pki::kubeconfig(&scenario.layout, &authority, &user, &bad);

    node.agent.kill()?;
    std::fs::write(&file, bad)?;
    let mark = node.agent.log_mark();
    node.agent.start()?;
    let named = |line: &&str| words.iter().all(|word| line.contains(word));
    until(
        "the certificate to be named",
        LIMIT,
        || Ok(()),
        || {
            let text = node.agent.log_since(mark)?;
            ensure!(text.lines().any(|line| named(&line)), "{text}");
            Ok(())
        },
    )?;
    let busy = node.agent.processor_time()?;
    wait_lines(&log, 12)?;
    let busy = node.agent.processor_time()?.saturating_sub(busy);
    ensure!(
        busy < Duration::from_secs(2),
        "it kept itself busy for {busy:?}"
    );
    let said = node.agent.log_since(mark)?;
    let complaints = said.lines().filter(named).count();
    ensure!(complaints <= 3, "{complaints} complaints in 12 s:\n{said}");

    std::fs::write(&file, good)?;
    recovered(&scenario, "steady")?;
    ensure!(node.agent.is_alive()?, "the agent was restarted");
    same_container(&before, &scenario.json(&["get", "pod", "steady"])?)
}

#[test]
fn a_long_outage_of_the_apiserver_leaves_pods_alone_and_ends_in_the_truth() -> Result<()> {
    let scenario = Scenario::alone("outage")?;
    let agent = scenario.agent("node-1");
    let place = format!("/tmp/{}", scenario.namespace);
    let shared = |extra: &str| {
        format!(
            "    volumeMounts: [{{name: shared, mountPath: /shared}}]\n{extra}  nodeName: node-1\n  \
             volumes: [{{name: shared, hostPath: {{path: {place}, type: DirectoryOrCreate}}}}]\n"
        )
    };
    let probe =
        "    readinessProbe: {exec: {command: [test, -e, /shared/ready]}, periodSeconds: 1}\n";
    let crash = "echo run >> /shared/runs; echo run; sleep 4; exit 3";
    let leave = "while [ ! -e /shared/go ]; do sleep 0.2; done; echo bye; exit 7";
    scenario.apply(&script_pod("steady", TICKS, &shared("")))?;
    scenario.apply(&script_pod(
        "doubter",
        &format!("touch /shared/ready; {TICKS}"),
        &shared(probe),
    ))?;
    scenario.apply(&script_pod("crasher", crash, &shared("")))?;
    scenario.apply(&script_pod(
        "leaver",
        leave,
        &shared("  restartPolicy: Never\n"),
    ))?;
    let before = scenario.ready("steady")?;
    for pod in ["doubter", "leaver", "crasher"] {
        scenario.ready(pod)?;
    }
    let node = scenario.admin.json(&["get", "node", "node-1"])?;
    let (log, busy, mark) = (
        agent.inside(&pod_log(&before))?,
        agent.processor_time()?,
        agent.log_mark(),
    );

    let outage = scenario.stop_control_plane()?;
    agent.run(&["rm", &format!("{place}/ready")])?;
    agent.run(&["touch", &format!("{place}/go")])?;
    // Longer than the grace after which the control plane gives a node up (50 s).
    wait_lines(&log, 60)?;
    let busy = agent.processor_time()?.saturating_sub(busy);
    ensure!(
        busy < Duration::from_secs(6),
        "it kept itself busy for {busy:?} of 60 s"
    );
    let said = agent.log_since(mark)?;
    ensure!(
        said.lines().count() < 200,
        "{} lines in 60 s:\n{said}",
        said.lines().count()
    );
    outage.end()?;

    recovered(&scenario, "steady")?;
    let after = scenario.json(&["get", "pod", "steady"])?;
    same_container(&before, &after)?;
    ensure!(is_ready(&after), "{}", after["status"]);
    let since = |object: &serde_json::Value| condition_since(object, "Ready");
    ensure!(
        since(&before) == since(&after),
        "Ready flipped: {}",
        after["status"]
    );
    let node_after = scenario.admin.json(&["get", "node", "node-1"])?;
    ensure!(
        condition(&node_after, "Ready"),
        "{}",
        node_after["status"]["conditions"]
    );
    ensure!(
        since(&node) == since(&node_after),
        "the node's Ready flipped"
    );

    let leaver = scenario.finished("leaver")?;
    let code = &container(&leaver, "main")["state"]["terminated"]["exitCode"];
    ensure!(*code == 7, "{}", leaver["status"]);
    ensure!(
        scenario.kubectl(&["logs", "leaver"])? == "bye\n",
        "its log is lost"
    );
    scenario.watch_pod("doubter", "not to be Ready", |event| {
        !is_ready(&event.object)
    })?;
    let runs = agent.inside(&format!("{place}/runs"))?;
    ensure!(lines(&runs) >= 2, "nothing was restarted meanwhile");
    scenario.watch_pod("crasher", "the true number of restarts", |event| {
        let count = container(&event.object, "main")["restartCount"].as_u64();
        count.is_some_and(|count| count + 1 == lines(&runs) as u64)
    })?;
    Ok(())
}

#[test]
fn a_readiness_that_somebody_else_overwrote_is_set_right() -> Result<()> {
    let scenario = Scenario::begin("overwritten")?;
    scenario.apply(&script_pod("pod", "exec sleep 1000", ""))?;
    scenario.ready("pod")?;
    let patch = r#"{"status":{"conditions":[{"type":"Ready","status":"False"}]}}"#;
    let patched = scenario.kubectl(&[
        "patch",
        "pod",
        "pod",
        "--subresource=status",
        "--type=strategic",
        "--patch",
        patch,
        "--output=json",
    ])?;
    let patched: serde_json::Value = serde_json::from_str(&patched)?;
    ensure!(!is_ready(&patched), "the patch did nothing");
    scenario.ready("pod")?;
    Ok(())
}

/// Where the first container's log of a pod is inside its node.
fn pod_log(pod: &serde_json::Value) -> String {
    let field = |name: &str| text(pod, &format!("/metadata/{name}"));
    let (namespace, name, uid) = (field("namespace"), field("name"), field("uid"));
    format!("/var/log/pods/{namespace}_{name}_{uid}/main/0.log")
}

fn log_file(node: &SpareNode, pod: &serde_json::Value) -> Result<std::path::PathBuf> {
    node.agent.inside(&pod_log(pod))
}

fn lines(file: &Path) -> usize {
    std::fs::read_to_string(file).map_or(0, |text| text.lines().count())
}

/// Waits until a file has so many lines more than now.
fn wait_lines(file: &Path, more: usize) -> Result<()> {
    let wanted = lines(file) + more;
    let limit = Duration::from_secs(more as u64) + LIMIT;
    until(
        "a pod to go on",
        limit,
        || Ok(()),
        || {
            ensure!(
                lines(file) >= wanted,
                "{} has {} lines",
                file.display(),
                lines(file)
            );
            Ok(())
        },
    )
}

/// Waits until the agent answers through the apiserver again.
fn recovered(scenario: &Scenario, pod: &str) -> Result<()> {
    let exec = || scenario.kubectl(&["exec", pod, "--", "true"]).map(drop);
    until("the agent to answer", LIMIT, || Ok(()), exec).context("after the trouble was mended")
}

fn same_container(before: &serde_json::Value, after: &serde_json::Value) -> Result<()> {
    let id = |pod| text(container(pod, "main"), "/containerID");
    ensure!(id(before) == id(after), "the container was replaced");
    ensure!(container(after, "main")["restartCount"] == 0, "{after}");
    Ok(())
}
