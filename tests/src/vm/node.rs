//! The second half of `cargo xtask test --vm`: the machine is a node of a real control plane, its
//! agent a systemd service, its containers on cgroup v2.
//!
//! Checks run in order on one node; one that fails ends the run, since the later ones build on it.

use super::LAB;
use super::image::Image;
use super::job::Job;
use super::machine::{Machine, Options};
use super::node_checks::CHECKS;
use crate::artefacts::ours::{self, Programs};
use crate::cluster::node::{self, Place};
use crate::cluster::{self, Lab, NodeKind, UpOptions, ferrule, network, pki};
use crate::progress::Step;
use crate::suite::Tally;
use crate::{command, images, paths};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The node's name.
pub(super) const NODE: &str = "vm-1";

/// Its number, which decides its address; above those of nodes that are namespaces.
const NUMBER: usize = 90;

/// Where the agent and the shim lie in the machine.
const PROGRAMS: &str = "/usr/local/bin";

/// Longest life of the machine.
const LIMIT: Duration = Duration::from_secs(900);

/// The node and the control plane it belongs to.
pub(super) struct Guest {
    pub(super) lab: Lab,
    pub(super) machine: Machine,
}

/// Brings up a control plane, joins the machine, runs the checks and removes everything. The
/// programs are built when none are given.
///
/// # Errors
/// When the lab cannot be brought up or taken down, or the machine not be booted.
pub fn run(image: &Image, may_install: bool, programs: Option<Programs>) -> Result<Tally> {
    // What an interrupted run left.
    cluster::down(LAB)?;
    let tally = joined(image, may_install, programs);
    cluster::down(LAB)?;
    tally
}

fn joined(image: &Image, may_install: bool, programs: Option<Programs>) -> Result<Tally> {
    let programs = match programs {
        Some(programs) => programs,
        None => ours::build(ours::TEST_PROFILE)?,
    };
    let lab = cluster::up(&UpOptions {
        lab: LAB.to_owned(),
        nodes: Some(0),
        kind: NodeKind::Ferrule,
        may_install,
        agents: false,
        addons: cluster::Addons::NONE,
        family: None,
        network: None,
        sample: false,
        profile: ours::TEST_PROFILE.to_owned(),
    })?;
    let step = Step::begin("test images");
    images::ensure_pushed(&lab.layout.registry(), &paths::cache()?)?;
    step.done(&lab.layout.registry());
    let step = Step::begin("boot the machine, start its agent");
    let mut guest = boot(image, lab, &programs)?;
    step.done("");
    let tally = check(&mut guest);
    let Guest { lab, machine } = guest;
    if tally.failed == 0 {
        machine.power_off()?;
    } else {
        // With pods left, a shutdown waits long for what does not end; nothing of it is kept.
        drop(machine);
    }
    drop(lab);
    Ok(tally)
}

/// Runs the checks and prints what a test program would.
fn check(guest: &mut Guest) -> Tally {
    let mut tally = Tally::default();
    for check in CHECKS {
        let start = Instant::now();
        let outcome = (check.run)(guest);
        let seconds = start.elapsed().as_secs_f32();
        tally.add(Tally::one(outcome.is_ok()));
        match outcome {
            Ok(()) => println!("test node: {} ... ok ({seconds:.1} s)", check.sentence),
            Err(error) => {
                println!(
                    "test node: {} ... FAILED ({seconds:.1} s)\n{error:#}",
                    check.sentence
                );
                println!("{}", evidence(guest));
                break;
            }
        }
    }
    tally
}

/// What helps to understand a failure.
fn evidence(guest: &mut Guest) -> String {
    let pods = guest
        .lab
        .kubectl
        .run(&["get", "pods,nodes", "-A", "-o", "wide"]);
    let log = guest
        .machine
        .stdout("journalctl -u kubelet -n 60 --no-pager -o cat");
    let text = |result: Result<String>| result.unwrap_or_else(|error| format!("{error:#}"));
    format!("{}\nend of the agent's log:\n{}", text(pods), text(log))
}

fn boot(image: &Image, lab: Lab, programs: &Programs) -> Result<Guest> {
    let tap = ensure_tap(&lab)?;
    let job = job(&lab, programs)?;
    let options = Options {
        dir: lab.layout.node_dir(NODE).join("machine"),
        memory_mib: 2048,
        tap: Some(tap),
        limit: LIMIT,
    };
    let mut machine = Machine::boot(image, &job, &options)?;
    let setup = machine.ready()?;
    anyhow::ensure!(
        setup.code == 0,
        "set up the machine as a node: {}",
        setup.text
    );
    Ok(Guest { lab, machine })
}

/// A tap device on the lab's bridge; it carries the lab's alias, by which `down` finds it.
fn ensure_tap(lab: &Lab) -> Result<String> {
    let tap = format!("{}vm", lab.layout.bridge());
    let alias = format!("{}{}", network::ALIAS_PREFIX, lab.layout.name);
    let ip = |args: &[&str]| command::stdout(&mut command::command("ip", args));
    if !Path::new("/sys/class/net").join(&tap).exists() {
        ip(&["tuntap", "add", "dev", &tap, "mode", "tap"])?;
    }
    ip(&["link", "set", "dev", &tap, "alias", &alias])?;
    ip(&[
        "link",
        "set",
        "dev",
        &tap,
        "master",
        &lab.layout.bridge(),
        "up",
    ])?;
    Ok(tap)
}

/// Credentials and configuration as on the lab's other nodes, in the places of an ordinary one.
fn job(lab: &Lab, programs: &Programs) -> Result<Job> {
    let layout = &lab.layout;
    let dir = layout.node_dir(NODE);
    let authorities = pki::ensure_control_plane(layout)?;
    let place = Place {
        name: NODE,
        number: NUMBER,
        dir: &dir,
    };
    node::write_credentials(layout, &authorities, &place)?;
    let files = dir.join("kubernetes");
    let shim = Path::new(PROGRAMS).join("pod-shim");
    let runtime = ferrule::runtime_configuration(&layout.registry(), &shim);
    node::write_changed(&files.join("ferrule.yaml"), &runtime, 0o644)?;
    let configuration = files.join("kubelet.yaml");
    let text = fs::read_to_string(&configuration).context("read the node's configuration")?;
    node::write_changed(&configuration, &whole_machine(&text), 0o644)?;
    let address = layout.node_address(NUMBER).to_string();
    let flags = ferrule::agent_flags(NODE, &address);
    node::write_changed(&dir.join("kubelet.service"), &unit(&flags), 0o644)?;
    let control = layout.control_address().to_string();
    let mut job = Job::serving(&setup(&address, &control))
        .file(&programs.kubelet, format!("{PROGRAMS}/kubelet"))
        .file(&programs.pod_shim, shim)
        .file(&programs.cni_bridge, "/opt/cni/bin/cni-bridge")
        .file(
            dir.join("kubelet.service"),
            "/etc/systemd/system/kubelet.service",
        );
    for name in [
        "kubelet.kubeconfig",
        "kubelet.yaml",
        "ferrule.yaml",
        "pki/ca.crt",
        "pki/kubelet.crt",
        "pki/kubelet.key",
    ] {
        job = job.file(
            files.join(name),
            PathBuf::from("/etc/kubernetes").join(name),
        );
    }
    Ok(job)
}

/// The lab's nodes share one kernel and each has a subtree of its cgroups; this one has all.
fn whole_machine(configuration: &str) -> String {
    let lines = configuration.lines().map(|line| {
        if line.starts_with("cgroupRoot:") {
            "cgroupRoot: /"
        } else {
            line
        }
    });
    lines.map(|line| format!("{line}\n")).collect()
}

/// The agent as a service: systemd hands it every controller, and pods outlive it.
fn unit(flags: &[String]) -> String {
    format!(
        "[Unit]
Description=Kubernetes node agent
After=network.target
[Service]
ExecStart={PROGRAMS}/kubelet {flags}
Environment=RUST_BACKTRACE=1
Restart=always
RestartSec=1
Delegate=yes
KillMode=process
",
        flags = flags.join(" ")
    )
}

fn setup(address: &str, control: &str) -> String {
    format!(
        "hostname {NODE}
printf '127.0.0.1 localhost\\n{address} {NODE}\\n' >/etc/hosts
printf 'nameserver {control}\\n' >/etc/resolv.conf
ip link set lo up &&
ip address add {address}/24 dev eth0 &&
ip link set eth0 up &&
ip route add default via {control} &&
echo 1 >/proc/sys/net/ipv4/ip_forward &&
systemctl daemon-reload &&
systemctl start kubelet"
    )
}

impl Guest {
    /// Gives the node its network configuration, as an add-on would, and the control plane the
    /// way to its pods.
    ///
    /// # Errors
    /// When the machine or the kernel refuses.
    pub(super) fn join_network(&mut self, pod_network: &str) -> Result<()> {
        let cluster = self.lab.layout.pod_network();
        let configuration = ferrule::network_configuration(&cluster, &[pod_network.to_owned()]);
        let configuration = configuration.replace('\n', " ");
        let file = "/etc/cni/net.d/10-ferrule.conflist";
        self.machine.stdout(&format!(
            "mkdir -p /etc/cni/net.d && printf '%s' '{configuration}' >{file}.new && mv {file}.new {file}"
        ))?;
        let via = self.lab.layout.node_address(NUMBER).to_string();
        let bridge = self.lab.layout.bridge();
        let route = ["route", "replace", pod_network, "via", &via, "dev", &bridge];
        command::stdout(&mut command::command("ip", &route)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_of_its_own_has_the_whole_tree_of_cgroups() {
        let text = whole_machine("port: 1\ncgroupRoot: /a/b\nmaxPods: 2\n");
        assert_eq!(text, "port: 1\ncgroupRoot: /\nmaxPods: 2\n");
    }

    #[test]
    fn the_service_leaves_pods_alone_when_it_stops() {
        let unit = unit(&["--a=b".into(), "--c=d".into()]);
        assert!(unit.contains("ExecStart=/usr/local/bin/kubelet --a=b --c=d\n"));
        assert!(unit.contains("KillMode=process\n") && unit.contains("Delegate=yes\n"));
    }
}
