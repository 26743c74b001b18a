//! `cargo xtask bench pods`: the same outside measurement of our node and of the stock one, one
//! after the other on this machine, and their ratios.

pub mod cni;
pub mod life;
pub mod network;

use crate::cluster::{self, Lab, NodeKind, UpOptions};
use crate::process::ProcessIdentity;
use crate::progress::Step;
use crate::{command, packages, paths};
use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BenchOptions {
    /// Measure the stock node too.
    pub against_stock: bool,
    /// Pods started one after the other.
    pub serial: u32,
    /// Pods started at once.
    pub burst: u32,
    /// Missing Debian packages may be installed.
    pub may_install: bool,
    /// The script that measures.
    pub script: PathBuf,
    /// Cargo profile of our kubelet.
    pub profile: String,
}

/// How long the idle nodes are watched.
const IDLE_WINDOW: Duration = Duration::from_secs(15);

/// Measures and returns the figures by kind of node.
///
/// # Errors
/// When a node cannot be brought up or measured.
pub fn pods(options: &BenchOptions) -> Result<BTreeMap<String, Value>> {
    packages::ensure(packages::STOCK, options.may_install)?;
    anyhow::ensure!(
        options.script.is_file(),
        "there is no measuring script at {}: name it by --script or FERRULE_PODBENCH",
        options.script.display()
    );
    let mut results = BTreeMap::new();
    let mut kinds = vec![("ferrule", NodeKind::Ferrule)];
    if options.against_stock {
        kinds.push(("stock", NodeKind::Stock));
    }
    for (name, kind) in kinds {
        let lab_name = format!("bench-{name}");
        let measured = measure(&lab_name, kind, options);
        cluster::down(&lab_name)?;
        results.insert(
            name.to_owned(),
            measured.with_context(|| format!("measure {name}"))?,
        );
    }
    Ok(results)
}

fn measure(lab_name: &str, kind: NodeKind, options: &BenchOptions) -> Result<Value> {
    let lab = cluster::up(&UpOptions {
        lab: lab_name.to_owned(),
        nodes: Some(1),
        kind,
        may_install: options.may_install,
        agents: true,
        addons: cluster::Addons::NONE,
        family: None,
        network: None,
        sample: false,
        profile: options.profile.clone(),
    })?;
    let step = Step::begin(format!(
        "measure {lab_name}: {} serial, {} at once",
        options.serial, options.burst
    ));
    let script = options.script.display().to_string();
    let kubeconfig = lab.layout.admin_kubeconfig().display().to_string();
    let mut python = command::command("python3", &[&script, &kubeconfig, "node-1"]);
    python.args(["--serial", &options.serial.to_string()]);
    python.args(["--burst", &options.burst.to_string()]);
    python.args([
        "--procs",
        r"bin/kubelet|/kubelet|pod-shim|containerd-shim|bin/containerd|/containerd --|/pause",
    ]);
    let text = command::stdout(&mut python)?;
    let mut merged = Map::new();
    for line in text.lines().filter(|line| line.starts_with('{')) {
        let value: Value = serde_json::from_str(line).with_context(|| format!("parse {line}"))?;
        let phase = value["phase"].as_str().unwrap_or("phase").to_owned();
        merged.insert(phase, value);
    }
    step.done(&Value::Object(merged.clone()).to_string());
    merged.insert("idle".into(), idle(&lab)?);
    Ok(Value::Object(merged))
}

/// CPU and memory of everything the node runs by itself, with [`IDLE_PODS`] pods that sleep.
fn idle(lab: &Lab) -> Result<Value> {
    let step = Step::begin(format!(
        "{IDLE_PODS} idle pods, {} s",
        IDLE_WINDOW.as_secs()
    ));
    lab.kubectl.apply(&idle_deployment())?;
    lab.kubectl
        .run(&["rollout", "status", "deployment/idle", "--timeout=300s"])?;
    let processes = overhead_processes(lab);
    let before = cpu_ticks(&processes);
    let start = Instant::now();
    // A measurement over time, not a wait for something.
    std::thread::sleep(IDLE_WINDOW);
    let elapsed = start.elapsed().as_secs_f64();
    let ticks = cpu_ticks(&processes).saturating_sub(before);
    let pss: u64 = processes.iter().map(|process| pss_kib(process.pid)).sum();
    let result = json!({
        "pods": IDLE_PODS,
        "processes": processes.len(),
        "cpu_percent": round(ticks as f64 / TICKS_PER_SECOND / elapsed * 100.0),
        "pss_mib": round(pss as f64 / 1024.0),
    });
    step.done(&result.to_string());
    Ok(result)
}

/// Pods during the idle measurement.
const IDLE_PODS: u32 = 100;

/// `USER_HZ`, the same on every architecture Linux offers today.
const TICKS_PER_SECOND: f64 = 100.0;

fn idle_deployment() -> String {
    format!(
        "apiVersion: apps/v1
kind: Deployment
metadata: {{name: idle, namespace: default}}
spec:
  replicas: {IDLE_PODS}
  selector: {{matchLabels: {{app: idle}}}}
  template:
    metadata: {{labels: {{app: idle}}}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: pause
        image: registry.k8s.io/pause:3.10.2
"
    )
}

/// Agent, runtime and shims of the lab's node, found by its cgroup and the program's name. The
/// pods' own processes are not overhead; a pause container is, but the workload here is the same
/// program, so it is counted for neither.
fn overhead_processes(lab: &Lab) -> Vec<ProcessIdentity> {
    let mut found: Vec<ProcessIdentity> = crate::cluster::cgroup::existing(Some(&lab.layout.name))
        .iter()
        .flat_map(|dir| crate::cluster::cgroup::processes(dir))
        .filter(|process| is_overhead(process.pid))
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// By the first word of the command line: a shim that runs from memory has a number for a name.
fn is_overhead(pid: i32) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let first = line.split(|byte| *byte == 0).next().unwrap_or_default();
    let name = String::from_utf8_lossy(first);
    let name = name.rsplit('/').next().unwrap_or_default();
    let names = ["kubelet", "pod-shim", "containerd", "containerd-shim"];
    names.iter().any(|wanted| name.starts_with(wanted))
}

fn cpu_ticks(processes: &[ProcessIdentity]) -> u64 {
    processes
        .iter()
        .filter_map(|process| fs::read_to_string(format!("/proc/{}/stat", process.pid)).ok())
        .filter_map(|stat| {
            let (_, rest) = stat.rsplit_once(')')?;
            let mut fields = rest.split_ascii_whitespace().skip(11);
            let user: u64 = fields.next()?.parse().ok()?;
            let system: u64 = fields.next()?.parse().ok()?;
            Some(user + system)
        })
        .sum()
}

fn pss_kib(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// The figures side by side; every number that both have gets a ratio.
#[must_use]
pub fn render(results: &BTreeMap<String, Value>) -> String {
    let mut out = format!(
        "{:44} {:>10} {:>10} {:>8}\n",
        "", "ferrule", "stock", "ratio"
    );
    let empty = Value::Null;
    let ours = results.get("ferrule").unwrap_or(&empty);
    let stock = results.get("stock").unwrap_or(&empty);
    let mut rows = BTreeMap::new();
    numbers(String::new(), ours, &mut rows);
    let mut others = BTreeMap::new();
    numbers(String::new(), stock, &mut others);
    let names: std::collections::BTreeSet<&String> = rows.keys().chain(others.keys()).collect();
    for name in names {
        let cell = |value: Option<&f64>| value.map_or("-".to_owned(), |value| format!("{value}"));
        let ratio = match (rows.get(name), others.get(name)) {
            (Some(ours), Some(stock)) if *ours > 0.0 => format!("{:.1}", stock / ours),
            _ => "-".to_owned(),
        };
        let (ours, stock) = (cell(rows.get(name)), cell(others.get(name)));
        out.push_str(&format!("{name:44} {ours:>10} {stock:>10} {ratio:>8}\n"));
    }
    out
}

fn numbers(prefix: String, value: &Value, out: &mut BTreeMap<String, f64>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let separator = if prefix.is_empty() { "" } else { "." };
                numbers(format!("{prefix}{separator}{name}"), value, out);
            }
        }
        Value::Number(number) => {
            out.insert(prefix, number.as_f64().unwrap_or(0.0));
        }
        Value::Null | Value::Bool(_) | Value::String(_) | Value::Array(_) => {}
    }
}

/// The script in the repository, or the one given by `FERRULE_PODBENCH`.
#[must_use]
pub fn default_script() -> PathBuf {
    std::env::var_os("FERRULE_PODBENCH").map_or_else(
        || paths::workspace().join("tests/bench/podbench.py"),
        PathBuf::from,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_stand_beside_what_both_have() {
        let results = BTreeMap::from([
            ("ferrule".to_owned(), json!({"burst": {"ready": 2.0}})),
            (
                "stock".to_owned(),
                json!({"burst": {"ready": 17.0, "only": 1}}),
            ),
        ]);
        let text = render(&results);
        assert!(text.contains("burst.ready"), "{text}");
        assert!(text.contains("8.5"), "{text}");
    }
}
