//! `cargo xtask bench cni`: ADD and DEL of network plugins as a runtime calls them: exec,
//! environment, configuration on standard input, one process per plugin of the list.
//!
//! Every row has a node of its own: a network namespace. "Existing pods" are attached by the same
//! plugin with the same configuration before the clock starts; a bridge takes 1 024 ports, so they
//! are spread over bridges of at most 900. Measured pods have a network namespace each; existing
//! ones share one by fifty, without default routes: only what they have on the node matters.

use crate::progress::Step;
use crate::{artefacts, packages};
use anyhow::{Context, Result, bail};
use linux::netlink::{in_netns, new_netns};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniOptions {
    /// Measure containernetworking's plugins too.
    pub against_reference: bool,
    /// Pods measured one at a time, and again 16 at once.
    pub count: usize,
    /// Existing pods of the second half of the rows.
    pub crowd: usize,
    /// The same for the reference, which needs long to make them.
    pub reference_crowd: usize,
    /// Missing Debian packages may be installed.
    pub may_install: bool,
}

/// Existing pods of the first half of the rows.
const FEW: usize = 10;

/// Ports of a bridge are 1 024; the measured ones need room too.
const PODS_PER_BRIDGE: usize = 900;

/// Calls at once in the second half of the measurement.
const PARALLEL: usize = 16;

/// What pods ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Feature {
    /// Addresses and routes.
    Plain,
    /// Masquerade.
    Masquerade,
    /// Masquerade and two host ports.
    HostPorts,
}

impl Feature {
    const ALL: [Self; 3] = [Self::Plain, Self::Masquerade, Self::HostPorts];

    fn title(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Masquerade => "masquerade",
            Self::HostPorts => "masquerade, 2 host ports",
        }
    }
}

/// One program or chain of programs.
#[derive(Debug, Clone)]
struct Subject {
    name: String,
    bin: PathBuf,
    /// Types in order of the chain.
    reference: Option<&'static str>,
}

/// Figures of one row, in milliseconds and calls per second.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Who was measured.
    pub subject: String,
    /// What pods asked for.
    pub feature: &'static str,
    /// Pods that were there.
    pub existing: usize,
    /// Calls at once.
    pub parallel: usize,
    /// Of ADD: half of the calls took at most so long, and 99 of 100.
    pub add_ms: (f64, f64),
    /// Of DEL.
    pub del_ms: (f64, f64),
    /// ADDs per second.
    pub adds_per_second: f64,
}

/// Measures and returns the rows.
///
/// # Errors
/// When something cannot be built, or a plugin fails.
pub fn measure(options: &CniOptions) -> Result<Vec<Row>> {
    packages::ensure(packages::CONTROL_PLANE, options.may_install)?;
    packages::ensure(packages::NODES, options.may_install)?;
    let mut subjects = vec![Subject {
        name: "cni-bridge".into(),
        bin: artefacts::ours::plugins()?,
        reference: None,
    }];
    if options.against_reference {
        for backend in ["iptables", "nftables"] {
            subjects.push(Subject {
                name: format!("bridge ({backend})"),
                bin: artefacts::go::stock_peers()?,
                reference: Some(backend),
            });
        }
    }
    let mut rows = Vec::new();
    for ports in [FEW, PODS_PER_BRIDGE] {
        rows.push(floor(options.count, ports)?);
    }
    for feature in Feature::ALL {
        for subject in &subjects {
            // Without rules there is nothing the back ends could differ in.
            if feature == Feature::Plain && subject.reference == Some("nftables") {
                continue;
            }
            let crowd = match subject.reference {
                Some(_) => options.reference_crowd,
                None => options.crowd,
            };
            for existing in [FEW, crowd] {
                rows.extend(measure_one(subject, feature, existing, options.count)?);
            }
        }
    }
    Ok(rows)
}

/// The kernel's own price: a pair made by one request, one end in the pod's namespace and the
/// other in a bridge of so many ports, up, and deleted again. No process, no address, no rule.
fn floor(count: usize, ports: usize) -> Result<Row> {
    use linux::netlink::{BridgeSpec, Change, Mac, Rtnl, VethSpec};
    let node = new_netns().context("make a network namespace")?;
    let mut rtnl = Rtnl::open_in(node.as_fd())?;
    let bridge = BridgeSpec {
        name: "cni0".into(),
        mac: None,
        mtu_bytes: None,
    };
    rtnl.apply(&[Change::AddBridge(bridge)])?;
    let bridge = rtnl.link_by_name("cni0")?.context("the bridge vanished")?;
    let mut add = |name: &str, pod: &File| -> Result<()> {
        rtnl.apply(&[Change::AddVeth(VethSpec {
            name: name.to_owned(),
            mac: Mac([2, 0, 0, 0, 1, 1]),
            master: Some(bridge.index),
            mtu_bytes: None,
            peer_name: name.to_owned(),
            peer_mac: Mac([2, 0, 0, 0, 1, 2]),
            peer_netns: pod.as_raw_fd(),
        })])?;
        let index = rtnl.link_by_name(name)?.context("the pair vanished")?.index;
        rtnl.apply(&[
            Change::NoLinkLocal { index },
            Change::SetUp { index, up: true },
        ])?;
        Ok(())
    };
    let others = new_netns().context("make a network namespace")?;
    for n in 0..ports {
        add(&format!("o{n}"), &others)?;
    }
    let (mut adds, mut dels) = (Vec::new(), Vec::new());
    let begun = Instant::now();
    let pods = (0..count).map(|_| new_netns());
    let pods: Vec<File> = pods
        .collect::<std::io::Result<_>>()
        .context("make network namespaces")?;
    for (n, pod) in pods.iter().enumerate() {
        let begin = Instant::now();
        add(&format!("v{n}"), pod)?;
        adds.push(begin.elapsed());
    }
    let adds_per_second = count as f64 / begun.elapsed().as_secs_f64();
    for n in 0..count {
        let begin = Instant::now();
        let name = format!("v{n}");
        rtnl.apply(&[Change::RemoveLink { name }])?;
        dels.push(begin.elapsed());
    }
    Ok(Row {
        subject: "kernel's floor".into(),
        feature: "a pair, no process",
        existing: ports,
        parallel: 1,
        add_ms: percentiles(&mut adds),
        del_ms: percentiles(&mut dels),
        adds_per_second,
    })
}

/// A node with some pods, gone with the value.
struct Node<'a> {
    subject: &'a Subject,
    feature: Feature,
    netns: File,
    dir: PathBuf,
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A pod to attach, and what it is called with.
struct Pod {
    id: String,
    netns: Arc<File>,
    ifname: String,
    number: usize,
}

/// Numbers of the pods that are measured begin here.
const MEASURED: usize = 1_000_000;

impl Pod {
    fn new(number: usize, ifname: String, netns: Arc<File>) -> Self {
        Self {
            id: format!("{number:064x}"),
            netns,
            ifname,
            number,
        }
    }

    fn measured(count: usize) -> Result<Vec<Self>> {
        let pod = |number| {
            let netns = new_netns().context("make a pod's network namespace")?;
            Ok(Self::new(number, "eth0".into(), Arc::new(netns)))
        };
        (MEASURED..MEASURED + count).map(pod).collect()
    }

    fn crowd(count: usize) -> Result<Vec<Self>> {
        const PER_NAMESPACE: usize = 50;
        let mut pods = Vec::with_capacity(count);
        while pods.len() < count {
            let netns = Arc::new(new_netns().context("make a network namespace")?);
            let numbers = pods.len()..count.min(pods.len() + PER_NAMESPACE);
            pods.extend(numbers.map(|number| {
                let ifname = format!("eth{}", number % PER_NAMESPACE);
                Self::new(number, ifname, Arc::clone(&netns))
            }));
        }
        Ok(pods)
    }
}

fn measure_one(
    subject: &Subject,
    feature: Feature,
    existing: usize,
    count: usize,
) -> Result<Vec<Row>> {
    let title = format!("{}, {}, {existing} pods", subject.name, feature.title());
    let mut step = Step::begin(&title);
    let dir = PathBuf::from(format!("/dev/shm/ferrule-bench-{}", std::process::id()));
    fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    let node = Node {
        subject,
        feature,
        netns: new_netns().context("make the node's network namespace")?,
        dir,
    };
    step.detail("existing pods");
    let crowd = Pod::crowd(existing)?;
    node.run("ADD", &crowd, 4)?;
    let mut rows = Vec::new();
    for parallel in [1, PARALLEL] {
        step.detail(&format!("{parallel} at once"));
        let pods = Pod::measured(count)?;
        let begin = Instant::now();
        let mut adds = node.run("ADD", &pods, parallel)?;
        let adds_per_second = count as f64 / begin.elapsed().as_secs_f64();
        let mut dels = node.run("DEL", &pods, parallel)?;
        rows.push(Row {
            subject: subject.name.clone(),
            feature: feature.title(),
            existing,
            parallel,
            add_ms: percentiles(&mut adds),
            del_ms: percentiles(&mut dels),
            adds_per_second,
        });
    }
    step.done(&format!("ADD p50 {:.2} ms", rows[0].add_ms.0));
    Ok(rows)
}

/// In milliseconds: the one in the middle, and the one behind 99 of 100.
pub(super) fn percentiles(times: &mut [Duration]) -> (f64, f64) {
    times.sort();
    let at = |part: usize| {
        let place = times.len().saturating_sub(1) * part / 100;
        times
            .get(place)
            .map_or(0.0, |time| time.as_secs_f64() * 1e3)
    };
    (at(50), at(99))
}

impl Node<'_> {
    /// Calls a verb for all pods, so many at once; returns how long each call took.
    fn run(&self, verb: &str, pods: &[Pod], parallel: usize) -> Result<Vec<Duration>> {
        let share = pods.len().div_ceil(parallel).max(1);
        std::thread::scope(|scope| {
            let workers: Vec<_> = pods
                .chunks(share)
                .map(|pods| scope.spawn(move || self.run_some(verb, pods)))
                .collect();
            let mut all = Vec::new();
            for worker in workers {
                match worker.join() {
                    Ok(times) => all.extend(times?),
                    Err(_) => bail!("a worker panicked"),
                }
            }
            Ok(all)
        })
    }

    fn run_some(&self, verb: &str, pods: &[Pod]) -> Result<Vec<Duration>> {
        in_netns(self.netns.as_fd(), || {
            let calls = pods.iter().map(|pod| self.call(verb, pod));
            calls.collect::<Result<Vec<_>>>()
        })
        .context("enter the node's network namespace")?
    }

    /// One attachment: the whole chain.
    fn call(&self, verb: &str, pod: &Pod) -> Result<Duration> {
        let mut plugins = self.plugins(pod);
        if verb == "DEL" {
            plugins.reverse();
        }
        let mut previous = Value::Null;
        let begin = Instant::now();
        for mut conf in plugins {
            if !previous.is_null() {
                conf["prevResult"] = previous.clone();
            }
            let printed = exec(&self.subject.bin, verb, pod, &conf)?;
            if verb == "ADD" {
                previous = printed;
            }
        }
        Ok(begin.elapsed())
    }

    /// Configurations in order of the chain.
    fn plugins(&self, pod: &Pod) -> Vec<Value> {
        // A number for each bridge; the pods that are measured share the first.
        let block = match pod.number {
            measured if measured >= MEASURED => 0,
            existing => existing / PODS_PER_BRIDGE,
        };
        let mut bridge = json!({
            "cniVersion": "1.0.0",
            "name": format!("net{block}"),
            "type": "cni-bridge",
            "bridge": format!("cni{block}"),
            "isGateway": true,
            "isDefaultGateway": pod.number >= MEASURED,
            "hairpinMode": true,
            "ipMasq": self.feature != Feature::Plain,
            "ipam": {
                "type": "host-local",
                "dataDir": self.dir.join("leases"),
                "ranges": [[{"subnet": format!("10.{}.0.0/16", 100 + block)}]],
            },
        });
        let port = 1024 + pod.number % 30_000;
        let ports = json!([
            {"hostPort": port, "containerPort": 80, "protocol": "tcp"},
            {"hostPort": port + 30_000, "containerPort": 53, "protocol": "udp"},
        ]);
        let runtime = json!({"portMappings": ports});
        let with_ports = self.feature == Feature::HostPorts;
        let Some(backend) = self.subject.reference else {
            if with_ports {
                bridge["runtimeConfig"] = runtime;
            }
            return vec![bridge];
        };
        bridge["type"] = "bridge".into();
        bridge["ipMasqBackend"] = backend.into();
        let mut chain = vec![bridge];
        if with_ports {
            chain.push(json!({
                "cniVersion": "1.0.0",
                "name": format!("net{block}"),
                "type": "portmap",
                "backend": backend,
                "runtimeConfig": runtime,
            }));
        }
        chain
    }
}

fn exec(bin: &Path, verb: &str, pod: &Pod, conf: &Value) -> Result<Value> {
    let program = bin.join(conf["type"].as_str().unwrap_or_default());
    let netns = format!("/proc/{}/fd/{}", std::process::id(), pod.netns.as_raw_fd());
    let mut child = Command::new(&program)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", &pod.id)
        .env("CNI_NETNS", netns)
        .env("CNI_IFNAME", &pod.ifname)
        .env("CNI_PATH", bin)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("start {}", program.display()))?;
    // Dropping the pipe closes it.
    let sent = child.stdin.take().map_or(Ok(()), |mut stdin| {
        stdin.write_all(conf.to_string().as_bytes())
    });
    sent.with_context(|| format!("send the configuration to {}", program.display()))?;
    let output = child.wait_with_output().context("wait for the plugin")?;
    let printed = String::from_utf8_lossy(&output.stdout);
    anyhow::ensure!(output.status.success(), "{verb} of {}: {printed}", pod.id);
    Ok(serde_json::from_str(&printed).unwrap_or(Value::Null))
}

/// A table for people.
#[must_use]
pub fn render(rows: &[Row]) -> String {
    let mut out = format!(
        "{:20} {:25} {:>8} {:>7} {:>9} {:>9} {:>7} {:>9} {:>9}\n",
        "", "", "existing", "at once", "ADD p50", "p99 ms", "ADD/s", "DEL p50", "p99 ms"
    );
    for row in rows {
        out.push_str(&format!(
            "{:20} {:25} {:>8} {:>7} {:>9.2} {:>9.2} {:>7.0} {:>9.2} {:>9.2}\n",
            row.subject,
            row.feature,
            row.existing,
            row.parallel,
            row.add_ms.0,
            row.add_ms.1,
            row.adds_per_second,
            row.del_ms.0,
            row.del_ms.1,
        ));
    }
    out
}

/// The same for programs.
#[must_use]
pub fn to_json(rows: &[Row]) -> Value {
    let row = |row: &Row| {
        json!({
            "subject": row.subject,
            "feature": row.feature,
            "existing": row.existing,
            "parallel": row.parallel,
            "add_p50_ms": row.add_ms.0,
            "add_p99_ms": row.add_ms.1,
            "adds_per_second": row.adds_per_second,
            "del_p50_ms": row.del_ms.0,
            "del_p99_ms": row.del_ms.1,
        })
    };
    rows.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_sorted_times() {
        let mut times: Vec<Duration> = (1..=100).rev().map(Duration::from_millis).collect();
        let (p50, p99) = percentiles(&mut times);
        assert_eq!((p50.round(), p99.round()), (50.0, 99.0));
        assert_eq!(percentiles(&mut []), (0.0, 0.0));
    }
}
