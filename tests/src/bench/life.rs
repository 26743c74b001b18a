//! `cargo xtask bench life`: how soon a running pod follows its ConfigMap and its resources, what
//! probes cost, and how the node's memory grows with its pods; the stock node beside ours.
//!
//! Purpose: figures for what happens after a pod is Ready. Everything is seen from outside: a
//! change is sent through the apiserver, and the clock stops when the file or the cgroup of the
//! pod holds it. The load is [`PROBED_PODS`] pods with an exec probe every second.

use super::{cpu_ticks, overhead_processes, pss_kib, round};
use crate::cluster::{self, Lab, NodeKind, UpOptions};
use crate::process::until;
use crate::progress::Step;
use crate::{packages, scenario::BUSYBOX};
use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Pods with a probe each second.
const PROBED_PODS: u32 = 100;

/// How long processor time is counted.
const WINDOW: Duration = Duration::from_secs(20);

/// How long a change may take: the stock kubelet looks at ConfigMaps once a minute.
const PATIENCE: Duration = Duration::from_secs(180);

/// What to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LifeOptions {
    /// Measure the stock node too.
    pub against_stock: bool,
    /// Changes of a ConfigMap on our node; the stock one gets three, it takes a minute for each.
    pub changes: u32,
    /// Changes of a pod's CPU limit.
    pub resizes: u32,
    /// Pods of the last row of the memory table.
    pub many: u32,
    /// Missing Debian packages may be installed.
    pub may_install: bool,
    /// Cargo profile of our kubelet.
    pub profile: String,
}

/// Measures and returns the figures by kind of node.
///
/// # Errors
/// When a node cannot be brought up or measured.
pub fn life(options: &LifeOptions) -> Result<BTreeMap<String, Value>> {
    packages::ensure(packages::STOCK, options.may_install)?;
    let mut results = BTreeMap::new();
    let mut kinds = vec![("ferrule", NodeKind::Ferrule, options.changes)];
    if options.against_stock {
        kinds.push(("stock", NodeKind::Stock, options.changes.min(3)));
    }
    for (name, kind, changes) in kinds {
        let lab_name = format!("bench-{name}");
        let measured = measure(&lab_name, kind, changes, options);
        cluster::down(&lab_name)?;
        let measured = measured.with_context(|| format!("measure {name}"))?;
        results.insert(name.to_owned(), measured);
    }
    Ok(results)
}

fn measure(name: &str, kind: NodeKind, changes: u32, options: &LifeOptions) -> Result<Value> {
    let lab = cluster::up(&UpOptions {
        lab: name.to_owned(),
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
    let api = Api::start(&lab)?;
    let mut figures = Map::new();
    run_pods(&lab, &probed(PROBED_PODS))?;
    figures.insert("probes".into(), probes(&lab)?);
    lab.kubectl.apply(&follower())?;
    let ready = [
        "wait",
        "--for=condition=Ready",
        "pod/follower",
        "--timeout=120s",
    ];
    lab.kubectl.run(&ready)?;
    let uid = ["get", "pod", "follower", "-o", "jsonpath={.metadata.uid}"];
    let uid = lab.kubectl.run(&uid)?;
    figures.insert("config_map".into(), config_map(&lab, &api, &uid, changes)?);
    figures.insert("resize".into(), resize(&lab, &api, &uid, options.resizes)?);
    let mut memory = Map::new();
    for pods in [100, options.many] {
        run_pods(&lab, &sleeping(pods))?;
        memory.insert(pods.to_string(), resident(&lab));
    }
    figures.insert("memory".into(), Value::Object(memory));
    Ok(Value::Object(figures))
}

/// Replaces the deployment `load` and waits until just its pods are left.
fn run_pods(lab: &Lab, manifest: &str) -> Result<()> {
    let step = Step::begin("pods for the load".to_owned());
    lab.kubectl.apply(manifest)?;
    let rollout = ["rollout", "status", "deployment/load", "--timeout=600s"];
    lab.kubectl.run(&rollout)?;
    until(
        "pods of the load before to go",
        PATIENCE,
        || Ok(()),
        || {
            let pods = lab.kubectl.json(&["get", "pods", "-l", "app=load"])?;
            let pods = pods["items"].as_array().context("no list")?;
            let leaving = pods
                .iter()
                .filter(|p| p["metadata"]["deletionTimestamp"].is_string());
            ensure!(leaving.count() == 0, "pods are leaving");
            Ok(())
        },
    )?;
    step.done("Ready");
    Ok(())
}

/// Pods whose readiness a program tells, every second.
fn probed(pods: u32) -> String {
    let probe = "{exec: {command: ['true']}, periodSeconds: 1}";
    load(pods, &format!("readinessProbe: {probe}"), "")
}

/// Pods that sleep. They share the node's network: its address range is no part of what is
/// measured.
fn sleeping(pods: u32) -> String {
    load(pods, "env: []", "hostNetwork: true")
}

fn load(pods: u32, container: &str, pod: &str) -> String {
    format!(
        "apiVersion: apps/v1
kind: Deployment
metadata: {{name: load, namespace: default}}
spec:
  replicas: {pods}
  selector: {{matchLabels: {{app: load}}}}
  strategy: {{rollingUpdate: {{maxSurge: 0, maxUnavailable: 100%}}}}
  template:
    metadata: {{labels: {{app: load}}}}
    spec:
      terminationGracePeriodSeconds: 0
      {pod}
      containers:
      - name: main
        image: {BUSYBOX}
        command: [sleep, '1000000']
        {container}
"
    )
}

/// A pod with a ConfigMap in its files and a CPU limit.
fn follower() -> String {
    format!(
        "apiVersion: v1
kind: ConfigMap
metadata: {{name: followed, namespace: default}}
data: {{value: begin}}
---
apiVersion: v1
kind: Pod
metadata: {{name: follower, namespace: default}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: {BUSYBOX}
    command: [sleep, '1000000']
    resources: {{requests: {{cpu: 10m, memory: 32Mi}}, limits: {{cpu: 100m, memory: 32Mi}}}}
    volumeMounts: [{{name: config, mountPath: /config}}]
  volumes: [{{name: config, configMap: {{name: followed}}}}]
"
    )
}

/// Processor time of agent, runtime and shims while the probes run.
fn probes(lab: &Lab) -> Result<Value> {
    let step = Step::begin(format!(
        "{PROBED_PODS} probes a second, {} s",
        WINDOW.as_secs()
    ));
    let processes = overhead_processes(lab);
    let before = cpu_ticks(&processes);
    let start = Instant::now();
    // A measurement over time, not a wait for something.
    std::thread::sleep(WINDOW);
    let elapsed = start.elapsed().as_secs_f64();
    let ticks = cpu_ticks(&processes).saturating_sub(before);
    let percent = round(ticks as f64 / super::TICKS_PER_SECOND / elapsed * 100.0);
    let figures = json!({ "pods": PROBED_PODS, "cpu_percent": percent });
    step.done(&figures.to_string());
    Ok(figures)
}

/// From a patch sent to its content in the file.
fn config_map(lab: &Lab, api: &Api, uid: &str, changes: u32) -> Result<Value> {
    let step = Step::begin(format!("{changes} changes of a ConfigMap"));
    let volume = "volumes/kubernetes.io~configmap/config/value";
    let kubelet = lab.layout.node_dir("node-1").join("kubelet");
    let file = kubelet.join("pods").join(uid).join(volume);
    ensure!(file.is_file(), "{} is missing", file.display());
    let mut times = Vec::new();
    for number in 0..changes {
        let value = format!("change {number}");
        let patch = json!({"data": {"value": value}});
        let holds = || fs::read_to_string(&file).is_ok_and(|text| text == value);
        let path = "/api/v1/namespaces/default/configmaps/followed";
        times.push(api.timed(path, &patch, holds)?);
    }
    let figures = distribution(times);
    step.done(&figures.to_string());
    Ok(figures)
}

/// From a patch of the CPU limit sent to the quota in the container's cgroup.
fn resize(lab: &Lab, api: &Api, uid: &str, resizes: u32) -> Result<Value> {
    let step = Step::begin(format!("{resizes} resizes"));
    let quotas = quota_files(lab, uid);
    ensure!(!quotas.is_empty(), "no cgroup of pod {uid}");
    let mut times = Vec::new();
    for number in 0..resizes {
        let milli = 110 + 10 * (number % 5);
        let resources = json!({"limits": {"cpu": format!("{milli}m")}});
        let patch = json!({"spec": {"containers": [{"name": "main", "resources": resources}]}});
        let wanted = (milli * 100).to_string();
        // The pod's own cgroup and the container's.
        let holds = || {
            let inside = |file: &&PathBuf| {
                fs::read_to_string(file).is_ok_and(|t| t.split_whitespace().next() == Some(&wanted))
            };
            quotas.iter().filter(inside).count() >= 2
        };
        let path = "/api/v1/namespaces/default/pods/follower/resize";
        times.push(api.timed(path, &patch, holds)?);
    }
    let figures = distribution(times);
    step.done(&figures.to_string());
    Ok(figures)
}

/// The files with CPU quotas at and below the pod's cgroup, on either kernel and for either
/// cgroup driver.
fn quota_files(lab: &Lab, uid: &str) -> Vec<PathBuf> {
    let names = [uid.to_owned(), uid.replace('-', "_")];
    let mut found = Vec::new();
    let mut left = crate::cluster::cgroup::existing(Some(&lab.layout.name));
    while let Some(dir) = left.pop() {
        let path = dir.to_string_lossy().into_owned();
        if names.iter().any(|name| path.contains(name.as_str())) {
            for file in ["cpu.cfs_quota_us", "cpu.max"] {
                let file = dir.join(file);
                if file.is_file() && !found.contains(&file) {
                    found.push(file);
                }
            }
        }
        left.extend(directories(&dir));
    }
    found
}

fn directories(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let dirs = entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
    dirs.map(|e| e.path()).collect()
}

/// Memory of what the node runs by itself.
fn resident(lab: &Lab) -> Value {
    let mut agents = 0;
    let mut all = 0;
    let processes = overhead_processes(lab);
    for process in &processes {
        let kib = pss_kib(process.pid);
        all += kib;
        let program = fs::read_to_string(format!("/proc/{}/comm", process.pid));
        let program = program.unwrap_or_default();
        if !program.contains("shim") {
            agents += kib;
        }
    }
    let mib = |kib: u64| round(kib as f64 / 1024.0);
    json!({ "agent_pss_mib": mib(agents), "pss_mib": mib(all), "processes": processes.len() })
}

fn distribution(mut times: Vec<Duration>) -> Value {
    times.sort_unstable();
    let at = |percent: usize| {
        let index = (times.len() * percent / 100).min(times.len().saturating_sub(1));
        times.get(index).map_or(0.0, Duration::as_secs_f64)
    };
    let milli = |seconds: f64| (seconds * 10_000.0).round() / 10_000.0;
    json!({
        "n": times.len(), "p50": milli(at(50)), "p90": milli(at(90)), "p99": milli(at(99)),
        "max": milli(times.last().map_or(0.0, Duration::as_secs_f64)),
    })
}

/// The apiserver behind `kubectl proxy`, so that a request costs no start of a program.
struct Api {
    proxy: Child,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Api {
    fn start(lab: &Lab) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let socket = dir.path().join("proxy");
        let argument = format!("--unix-socket={}", socket.display());
        let mut command: Command =
            lab.kubectl
                .command(&["proxy", &argument, "--reject-methods=^$"]);
        let proxy = command
            .stdout(Stdio::null())
            .spawn()
            .context("start kubectl proxy")?;
        let api = Self {
            proxy,
            socket,
            _dir: dir,
        };
        let connect = || Ok(UnixStream::connect(&api.socket).map(drop)?);
        until(
            "kubectl proxy to listen",
            Duration::from_secs(30),
            || Ok(()),
            connect,
        )?;
        Ok(api)
    }

    /// The time from a patch sent until `holds`. A short sleep between two looks keeps the
    /// processor for those who are measured; it is the error of the figure.
    fn timed(&self, path: &str, patch: &Value, holds: impl Fn() -> bool) -> Result<Duration> {
        let began = Instant::now();
        self.patch(path, patch)?;
        while !holds() {
            ensure!(
                began.elapsed() < PATIENCE,
                "{path}: not seen after {PATIENCE:?}"
            );
            std::thread::sleep(Duration::from_micros(300));
        }
        Ok(began.elapsed())
    }

    fn patch(&self, path: &str, patch: &Value) -> Result<()> {
        let mut stream = UnixStream::connect(&self.socket)?;
        let body = patch.to_string();
        let kind = "application/strategic-merge-patch+json";
        write!(
            stream,
            "PATCH {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
             Content-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut reader = BufReader::new(stream);
        let mut status = String::new();
        reader.read_line(&mut status)?;
        if status.contains(" 200 ") {
            return Ok(());
        }
        let mut answer = String::new();
        reader.take(1 << 16).read_to_string(&mut answer)?;
        anyhow::bail!("{path}: {status}{answer}")
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        drop(self.proxy.kill());
        drop(self.proxy.wait());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_names_its_quantiles_in_seconds() {
        let times = (1..=100).rev().map(Duration::from_millis).collect();
        let figures = distribution(times);
        assert_eq!(figures["p50"], 0.051);
        assert_eq!(figures["p99"], 0.1);
        assert_eq!(figures["n"], 100);
    }

    #[test]
    fn manifests_are_yaml() {
        for text in [probed(3), sleeping(3)] {
            let value: Value = serde_saphyr::from_str(&text).unwrap();
            assert_eq!(value["spec"]["replicas"], 3);
        }
    }
}
