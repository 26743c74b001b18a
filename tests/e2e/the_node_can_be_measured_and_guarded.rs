//! What the node tells of itself and its pods, and to whom.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testkit::scenario::{Scenario, script_pod, text};

/// A GET of a kubelet's path through the apiserver.
fn through_apiserver(scenario: &Scenario, node: &str, path: &str) -> Result<String> {
    let url = format!("/api/v1/nodes/{node}/proxy{path}");
    scenario.kubectl(&["get", "--raw", &url])
}

/// A GET straight from the kubelet, with a token or with nothing.
fn from_kubelet(
    scenario: &Scenario,
    node: &str,
    token: Option<&str>,
    path: &str,
) -> Result<String> {
    let object = scenario.json(&["get", "node", node])?;
    let address = text(&object, "/status/addresses/0/address");
    let server = format!("--server=https://{address}:10250");
    let token = token.map(|t| format!("--token={t}"));
    let mut args = vec![
        "--kubeconfig=/dev/null",
        "--insecure-skip-tls-verify=true",
        &server,
    ];
    args.extend(token.as_deref());
    args.extend(["get", "--raw", path]);
    let output = scenario.output(&args)?;
    let shown = [output.stdout, output.stderr].concat();
    let shown = String::from_utf8_lossy(&shown).into_owned();
    ensure!(output.status.success(), "{shown}");
    Ok(shown)
}

fn pod_of(summary: &Value, namespace: &str, name: &str) -> Option<Value> {
    let of = |pod: &&Value| {
        text(pod, "/podRef/name") == name && text(pod, "/podRef/namespace") == namespace
    };
    summary["pods"].as_array()?.iter().find(of).cloned()
}

#[test]
fn a_summary_tells_what_each_pod_takes() -> Result<()> {
    let scenario = Scenario::begin("summary")?;
    let script = "head -c 200000 /dev/zero > /written; head -c 300000 /dev/zero > /dir/file; \
                  echo hello; i=0; while true; do i=$((i+1)); done";
    let extra = "    resources: {limits: {cpu: 100m, memory: 64Mi}}\n    \
                 volumeMounts: [{name: dir, mountPath: /dir}]\n  volumes: [{name: dir, emptyDir: {}}]\n";
    scenario.apply(&script_pod("busy", script, extra))?;
    let node = text(&scenario.ready("busy")?, "/spec/nodeName");
    let whole = through_apiserver(&scenario, &node, "/stats/summary")?;
    let summary: Value = serde_json::from_str(&whole).context("read the summary")?;
    let pod = pod_of(&summary, &scenario.namespace, "busy").context("the pod is not in it")?;
    let number = |of: &Value, pointer: &str| of.pointer(pointer).and_then(Value::as_u64);
    for pointer in [
        "/cpu/usageNanoCores",
        "/cpu/usageCoreNanoSeconds",
        "/memory/workingSetBytes",
        "/memory/availableBytes",
        "/network/rxBytes",
        "/network/txBytes",
        "/ephemeral-storage/usedBytes",
        "/process_stats/process_count",
        "/containers/0/cpu/usageNanoCores",
        "/containers/0/memory/workingSetBytes",
        "/containers/0/rootfs/usedBytes",
        "/containers/0/logs/usedBytes",
    ] {
        ensure!(number(&pod, pointer).is_some(), "no {pointer} in {pod}");
    }
    ensure!(text(&pod, "/network/name") == "eth0", "{pod}");
    for pointer in [
        "/node/cpu/usageNanoCores",
        "/node/memory/workingSetBytes",
        "/node/fs/usedBytes",
        "/node/runtime/imageFs/usedBytes",
        "/node/runtime/containerFs/usedBytes",
        "/node/rlimit/curproc",
        "/node/systemContainers/0/memory/workingSetBytes",
    ] {
        let found = number(&summary, pointer).is_some();
        ensure!(found, "no {pointer} in {}", summary["node"]);
    }
    let small = through_apiserver(&scenario, &node, "/stats/summary?only_cpu_and_memory=true")?;
    let small: Value = serde_json::from_str(&small)?;
    ensure!(small["node"].get("fs").is_none(), "{}", small["node"]);
    Ok(())
}

#[test]
fn metrics_have_the_names_that_dashboards_use() -> Result<()> {
    let scenario = Scenario::begin("metrics")?;
    scenario.apply(&script_pod("shown", "sleep 300", ""))?;
    let node = text(&scenario.ready("shown")?, "/spec/nodeName");
    let labels = format!("namespace=\"{}\",pod=\"shown\"", scenario.namespace);
    let pages: [(&str, &[&str]); 4] = [
        (
            "/metrics/resource",
            &[
                "node_cpu_usage_seconds_total ",
                "node_memory_working_set_bytes ",
                "container_cpu_usage_seconds_total{container=\"main\",",
                "resource_scrape_error 0\n",
            ],
        ),
        (
            "/metrics/cadvisor",
            &[
                "machine_cpu_cores{",
                "container_memory_working_set_bytes{container=\"main\",",
                "container_cpu_usage_seconds_total{container=\"main\",cpu=\"total\",",
                "container_network_receive_bytes_total{container=\"\",interface=\"eth0\",",
                "container_spec_memory_limit_bytes{",
            ],
        ),
        (
            "/metrics",
            &[
                "kubelet_running_pods ",
                "kubelet_running_containers{container_state=\"running\"} ",
                "kubelet_runtime_operations_total{operation_type=\"start_container\"} ",
                "kubelet_pod_start_duration_seconds_count ",
                "kubelet_node_name{node=\"node-",
                "kubernetes_build_info{",
                "process_resident_memory_bytes ",
                "rest_client_requests_total{code=\"200\",",
            ],
        ),
        ("/metrics/probes", &[]),
    ];
    for (path, wanted) in pages {
        let page = through_apiserver(&scenario, &node, path)?;
        for name in wanted {
            ensure!(page.contains(name), "no {name} in {path}");
        }
        if path != "/metrics" && !wanted.is_empty() {
            ensure!(page.contains(&labels), "no {labels} in {path}");
        }
    }
    Ok(())
}

#[test]
fn only_who_may_read_metrics_reads_them() -> Result<()> {
    let scenario = Scenario::begin("guarded")?;
    let role = format!("read-metrics-{}", scenario.namespace);
    let account = format!("{}:reader", scenario.namespace);
    for name in ["reader", "stranger"] {
        scenario.kubectl(&["create", "serviceaccount", name])?;
    }
    let token = |name: &str| -> Result<String> {
        let token = scenario.kubectl(&["create", "token", name])?;
        Ok(token.trim().to_owned())
    };
    let resource = "--resource=nodes/metrics";
    scenario.kubectl(&["create", "clusterrole", &role, "--verb=get", resource])?;
    let (of_role, to) = (
        format!("--clusterrole={role}"),
        format!("--serviceaccount={account}"),
    );
    scenario.kubectl(&["create", "clusterrolebinding", &role, &of_role, &to])?;
    let checks = || -> Result<()> {
        let reader = token("reader")?;
        let page = from_kubelet(&scenario, "node-1", Some(&reader), "/metrics/resource")?;
        ensure!(page.contains("node_cpu_usage_seconds_total"), "{page}");
        let refused = |token: Option<&str>, path: &str| {
            let answer = from_kubelet(&scenario, "node-1", token, path);
            answer.err().map(|e| e.to_string()).unwrap_or_default()
        };
        let message = refused(Some(&reader), "/stats/summary");
        ensure!(message.contains("subresource(s)=[stats]"), "{message:?}");
        let message = refused(Some(&token("stranger")?), "/metrics/resource");
        ensure!(
            message.contains("verb=get, resource=nodes, subresource(s)=[metrics]"),
            "{message:?}"
        );
        let message = refused(Some("made-up"), "/metrics/resource").to_lowercase();
        let unauthorized = message.contains("unauthorized") || message.contains("logged in");
        ensure!(unauthorized, "{message:?}");
        Ok(())
    };
    let outcome = checks();
    scenario.kubectl(&["delete", "clusterrolebinding", &role])?;
    scenario.kubectl(&["delete", "clusterrole", &role])?;
    outcome
}

#[test]
fn people_can_look_at_the_node() -> Result<()> {
    let scenario = Scenario::begin("looked-at")?;
    scenario.apply(&script_pod("seen", "sleep 300", ""))?;
    let node = text(&scenario.ready("seen")?, "/spec/nodeName");
    for (path, wanted) in [
        ("/healthz", "ok"),
        ("/healthz/syncloop", "ok"),
        ("/healthz?verbose=true", "[+]syncloop ok"),
        ("/runningpods/", "\"name\":\"seen\""),
        ("/configz", "\"kubeletconfig\""),
        ("/logs/", "<a href=\"pods/\">pods/</a>"),
        ("/flagz", "config="),
        ("/metrics/slis", "kubernetes_healthcheck{name=\"syncloop\""),
    ] {
        let page = through_apiserver(&scenario, &node, path)?;
        ensure!(page.contains(wanted), "no {wanted:?} in {path}: {page}");
    }
    Ok(())
}
