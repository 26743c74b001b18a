//! The peer agents against a real apiserver, with the rights their manifests grant and no others:
//! nodes are network namespaces on the lab's bridge. The other node is flannel's own back end at
//! first, and migrates.

use anyhow::{Context, Result, ensure};
use rustix::thread::LinkNameSpaceType;
use serde_json::{Value, json};
use std::fs;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;
use testkit::artefacts::{go, ours};
use testkit::cluster::kubectl::Kubectl;
use testkit::command::{command, stdout, stdout_with_input};
use testkit::paths;
use testkit::process::until;
use testkit::scenario::{LIMIT, Scenario};

/// A node: a namespace on the lab's bridge, a Node object, and a pod's namespace.
struct Node {
    name: String,
    address: String,
    pod_cidr: String,
    dir: PathBuf,
    link: String,
    daemon: Option<Child>,
    admin: Kubectl,
}

fn ip(words: &[&str]) -> Result<String> {
    stdout(&mut command("ip", words))
}

impl Node {
    fn new(scenario: &Scenario, dir: &Path, number: u8) -> Result<Self> {
        let (pid, index) = (std::process::id(), scenario.layout.index);
        let node = Self {
            name: format!("span-{pid}-{number}"),
            address: format!("10.99.{index}.{}", 220 + number),
            pod_cidr: format!("10.250.{number}.0/24"),
            dir: dir.join(number.to_string()),
            link: format!("fs{pid}n{number}"),
            daemon: None,
            admin: scenario.admin.clone(),
        };
        fs::create_dir_all(&node.dir)?;
        ip(&["netns", "add", &node.name])?;
        ip(&["netns", "add", &node.pod()])?;
        ip(&[
            "link", "add", &node.link, "type", "veth", "peer", "name", "eth0", "netns", &node.name,
        ])?;
        let alias = format!("ferrule-lab:{}", scenario.layout.name);
        ip(&["link", "set", &node.link, "alias", &alias])?;
        let bridge = scenario.layout.bridge();
        ip(&["link", "set", &node.link, "master", &bridge, "up"])?;
        let address = format!("{}/24", node.address);
        node.run(&["ip", "address", "add", &address, "dev", "eth0"])?;
        node.run(&["ip", "link", "set", "lo", "up"])?;
        node.run(&["ip", "link", "set", "eth0", "up"])?;
        node.register(scenario)?;
        Ok(node)
    }

    /// As a kubelet would; nothing may be scheduled there.
    fn register(&self, scenario: &Scenario) -> Result<()> {
        let object = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": self.name},
            "spec": {"podCIDR": self.pod_cidr, "podCIDRs": [self.pod_cidr], "unschedulable": true},
            "status": {"addresses": [{"type": "InternalIP", "address": self.address}]},
        });
        let mut create = scenario.admin.command(&["create", "-f", "-"]);
        stdout_with_input(&mut create, object.to_string().as_bytes())?;
        Ok(())
    }

    fn pod(&self) -> String {
        format!("{}p", self.name)
    }

    /// Address of the node's pod.
    fn pod_address(&self) -> String {
        self.pod_cidr.replace(".0/24", ".2")
    }

    fn run(&self, words: &[&str]) -> Result<String> {
        let mut all = vec!["netns", "exec", &self.name];
        all.extend(words);
        ip(&all)
    }

    fn start(&mut self, words: &[String], who: &str) -> Result<()> {
        let log = fs::File::create(self.dir.join(format!("{who}.log")))?;
        let mut start = command("ip", &["netns", "exec", &self.name]);
        start
            .args(words)
            .env("NODE_NAME", &self.name)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.daemon = Some(start.spawn().context("start the agent")?);
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        if let Some(mut child) = self.daemon.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    fn start_flannel(&mut self, scenario: &Scenario, net_conf: &Path) -> Result<()> {
        let program = go::flannel()?.join("flannel").display().to_string();
        let kubeconfig = scenario.layout.admin_kubeconfig().display().to_string();
        let words = [
            program,
            format!("--kubeconfig-file={kubeconfig}"),
            format!("--net-config-path={}", net_conf.display()),
        ];
        self.start(&words, "flannel")
    }

    fn start_agent(&mut self, programs: &Path, kubeconfig: &Path, net_conf: &Path) -> Result<()> {
        let agent = programs.join("cni-vxlan-agent").display().to_string();
        let flag = |name: &str, path: &Path| format!("--{name}={}", path.display());
        let words = [
            agent,
            flag("kubeconfig", kubeconfig),
            flag("net-conf", net_conf),
            flag("cni-conf-dir", &self.dir.join("net.d")),
            flag("state-dir", &self.dir.join("state")),
        ];
        self.start(&words, "agent")
    }

    fn log(&self, who: &str) -> String {
        fs::read_to_string(self.dir.join(format!("{who}.log"))).unwrap_or_default()
    }

    /// Waits until the agent says that it is ready.
    fn ready(&self) -> Result<()> {
        let url = "http://127.0.0.1:9473/readyz";
        let words = ["curl", "-sSf", "--max-time", "2", url];
        let answers = || self.run(&words);
        until("the agent is ready", LIMIT, || Ok(()), answers)
            .map(drop)
            .with_context(|| self.log("agent"))
    }

    /// A pod by the plugin, as the network list the agent wrote says.
    fn add_pod(&self, programs: &Path) -> Result<()> {
        let list = fs::read(self.dir.join("net.d/10-ferrule-vxlan.conflist"))?;
        let list: Value = serde_json::from_slice(&list)?;
        let mut conf = list["plugins"][0].clone();
        conf["cniVersion"] = list["cniVersion"].clone();
        conf["name"] = list["name"].clone();
        conf["dataDir"] = json!(self.dir.join("leases"));
        let program = programs.join("cni-vxlan").display().to_string();
        let mut add = command("ip", &["netns", "exec", &self.name, &program]);
        add.env("CNI_COMMAND", "ADD")
            .env("CNI_CONTAINERID", &self.name)
            .env("CNI_NETNS", format!("/run/netns/{}", self.pod()))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/nowhere");
        let printed = stdout_with_input(&mut add, conf.to_string().as_bytes())?;
        ensure!(printed.contains(&self.pod_address()), "{printed}");
        Ok(())
    }

    /// A pod by hand: flannel leaves this to other plugins.
    fn add_plain_pod(&self) -> Result<()> {
        let (pod, gateway) = (self.pod(), self.pod_cidr.replace(".0/24", ".1"));
        let address = format!("{}/24", self.pod_address());
        self.run(&[
            "ip", "link", "add", "pod0", "type", "veth", "peer", "name", "eth0", "netns", &pod,
        ])?;
        let own = format!("{gateway}/24");
        self.run(&["ip", "address", "add", &own, "dev", "pod0"])?;
        self.run(&["ip", "link", "set", "pod0", "up"])?;
        self.run(&["sysctl", "-qw", "net.ipv4.ip_forward=1"])?;
        let inside = |words: &[&str]| ip(&[&["-n", pod.as_str()], words].concat());
        inside(&["address", "add", &address, "dev", "eth0"])?;
        inside(&["link", "set", "eth0", "up"])?;
        inside(&["route", "add", "default", "via", &gateway])?;
        Ok(())
    }

    /// Datagrams between the nodes' pods, of the size given.
    fn reaches(&self, other: &Self, bytes: usize) -> Result<()> {
        let attempt = || datagram(&self.pod(), &other.pod(), &other.pod_address(), bytes);
        until("pods reach each other", LIMIT, || Ok(()), attempt)
            .with_context(|| format!("{} to {}: {}", self.name, other.name, self.log("agent")))
    }
}

/// Does something in a named network namespace, in a thread of its own.
fn within<T: Send>(netns: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let file = fs::File::open(Path::new("/run/netns").join(netns))?;
    let enter = || {
        rustix::thread::move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
        work()
    };
    std::thread::scope(|scope| match scope.spawn(enter).join() {
        Ok(outcome) => outcome,
        Err(_) => anyhow::bail!("the thread in {netns} panicked"),
    })
}

/// Sends one datagram from a namespace to an address in another.
fn datagram(from: &str, to: &str, address: &str, bytes: usize) -> Result<()> {
    let receiver = within(to, || Ok(UdpSocket::bind("0.0.0.0:0")?))?;
    receiver.set_read_timeout(Some(Duration::from_millis(500)))?;
    let port = receiver.local_addr()?.port();
    within(from, || {
        let sender = UdpSocket::bind("0.0.0.0:0")?;
        Ok(sender.send_to(&vec![7; bytes], (address, port))?)
    })?;
    let mut buffer = vec![0; 65_536];
    ensure!(receiver.recv(&mut buffer)? == bytes, "cut off");
    Ok(())
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(self.stop());
        let forget = ["delete", "node", "--ignore-not-found", &self.name];
        drop(self.admin.run(&forget));
        drop(ip(&["netns", "delete", &self.pod()]));
        drop(ip(&["netns", "delete", &self.name]));
        drop(ip(&["link", "delete", &self.link]));
    }
}

/// The account of the manifest in deploy/, with the rights it has there.
fn account(scenario: &Scenario, dir: &Path) -> Result<PathBuf> {
    let manifest = paths::workspace().join("deploy/cni-vxlan/cni-vxlan.yaml");
    let manifest = fs::read_to_string(manifest)?;
    let rights: Vec<&str> = manifest.split("\n---\n").take(3).collect();
    scenario.admin.apply(&rights.join("\n---\n"))?;
    let token = ["create", "token", "cni-vxlan", "--namespace=kube-system"];
    let token = scenario.admin.run(&token)?;
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {
            "server": scenario.layout.server(),
            "certificate-authority": scenario.layout.pki("ca.crt"),
        }}],
        "users": [{"name": "u", "user": {"token": token.trim()}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    });
    let path = dir.join("agent.kubeconfig");
    fs::write(&path, config.to_string())?;
    Ok(path)
}

#[test]
fn a_cluster_of_flannel_migrates_node_by_node_and_no_pod_is_cut_off() -> Result<()> {
    let scenario = Scenario::begin("span")?;
    let programs = ours::peer_programs()?;
    let dir = tempfile::tempdir()?;
    let net_conf = dir.path().join("net-conf.json");
    let network =
        json!({"Network": "10.250.0.0/16", "EnableNFTables": true, "Backend": {"Type": "vxlan"}});
    fs::write(&net_conf, network.to_string())?;
    let kubeconfig = account(&scenario, dir.path())?;
    let mut ours = Node::new(&scenario, dir.path(), 1)?;
    let mut theirs = Node::new(&scenario, dir.path(), 2)?;

    theirs.start_flannel(&scenario, &net_conf)?;
    theirs.add_plain_pod()?;
    ours.start_agent(&programs, &kubeconfig, &net_conf)?;
    ours.ready()?;
    ours.add_pod(&programs)?;
    ours.reaches(&theirs, 8).context(theirs.log("flannel"))?;
    theirs.reaches(&ours, 8).context(theirs.log("flannel"))?;
    // What fits into 1450 bytes with the headers of IP and UDP.
    ours.reaches(&theirs, 1422)?;

    // The second node migrates; the first is not touched.
    theirs.stop()?;
    ensure!(
        theirs.run(&["ip", "link", "show", "flannel.1"]).is_ok(),
        "flannel leaves its device"
    );
    theirs.start_agent(&programs, &kubeconfig, &net_conf)?;
    theirs.ready()?;
    ensure!(
        theirs.run(&["ip", "link", "show", "flannel.1"]).is_err(),
        "flannel's device stays"
    );
    ours.reaches(&theirs, 8)?;
    theirs.reaches(&ours, 8)?;

    // And back.
    ours.stop()?;
    ours.run(&["ip", "link", "delete", "fvx.1"])?;
    ours.start_flannel(&scenario, &net_conf)?;
    theirs.reaches(&ours, 8).context(ours.log("flannel"))?;
    ours.reaches(&theirs, 8)?;

    // A node that leaves is forgotten.
    ours.stop()?;
    scenario.admin.run(&["delete", "node", &ours.name])?;
    let gone = || {
        let routes = theirs.run(&["ip", "route", "show", &ours.pod_cidr])?;
        ensure!(routes.trim().is_empty(), "{routes}");
        Ok(())
    };
    until(
        "the route to the node that left is gone",
        LIMIT,
        || Ok(()),
        gone,
    )?;
    Ok(())
}
