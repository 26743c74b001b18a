//! A node without an agent of ours: a network namespace on a lab's bridge, a Node object, and one
//! pod's namespace. Enough for peer agents and network plugins, which need no kubelet.

use super::kubectl::Kubectl;
use super::layout::Layout;
use crate::artefacts::go;
use crate::command::{command, stdout, stdout_with_input};
use crate::process::{OWNER_VARIABLE, until};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

/// Longest wait for a peer agent.
const READY_LIMIT: Duration = Duration::from_secs(90);

/// Where bare nodes are made.
#[derive(Debug, Clone, Copy)]
pub struct Site<'a> {
    /// The lab.
    pub layout: &'a Layout,
    /// kubectl as its administrator.
    pub admin: &'a Kubectl,
    /// Each node gets a directory in it.
    pub dir: &'a Path,
    /// Begins the nodes' names; this process's number follows.
    pub prefix: &'a str,
    /// Last part of the address of the node with number 0. Whole nodes of a lab are below 120.
    pub first_address: u8,
}

/// A namespace on the lab's bridge, a Node object, and a pod's namespace; gone with the value.
#[derive(Debug)]
pub struct BareNode {
    /// Of the Node object and of the namespace.
    pub name: String,
    /// By which the others reach it.
    pub address: String,
    /// A /24.
    pub pod_cidr: String,
    /// Logs, state, configuration.
    pub dir: PathBuf,
    lab: String,
    link: String,
    daemon: Option<Child>,
    admin: Kubectl,
}

/// Runs `ip`.
///
/// # Errors
/// When it fails.
pub fn ip(words: &[&str]) -> Result<String> {
    stdout(&mut command("ip", words))
}

impl BareNode {
    /// Makes the node with the number, and its Node object as a kubelet would; nothing may be
    /// scheduled there.
    ///
    /// # Errors
    /// When the kernel or the apiserver refuses.
    pub fn new(site: Site<'_>, number: u8) -> Result<Self> {
        let pid = std::process::id();
        let node = Self {
            name: format!("{}-{pid}-{number}", site.prefix),
            address: format!(
                "10.99.{}.{}",
                site.layout.index,
                site.first_address + number
            ),
            pod_cidr: format!("10.250.{number}.0/24"),
            dir: site.dir.join(number.to_string()),
            lab: site.layout.name.clone(),
            link: format!("fs{pid}n{number}"),
            daemon: None,
            admin: site.admin.clone(),
        };
        fs::create_dir_all(&node.dir).with_context(|| format!("make {}", node.dir.display()))?;
        node.join(&site.layout.bridge())?;
        let object = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name},
            "spec": {"podCIDR": node.pod_cidr, "podCIDRs": [node.pod_cidr], "unschedulable": true},
            "status": {"addresses": [{"type": "InternalIP", "address": node.address}]},
        });
        let mut create = node.admin.command(&["create", "-f", "-"]);
        stdout_with_input(&mut create, object.to_string().as_bytes())?;
        Ok(node)
    }

    fn join(&self, bridge: &str) -> Result<()> {
        ip(&["netns", "add", &self.name])?;
        ip(&["netns", "add", &self.pod()])?;
        ip(&[
            "link", "add", &self.link, "type", "veth", "peer", "name", "eth0", "netns", &self.name,
        ])?;
        let alias = format!("{}{}", super::network::ALIAS_PREFIX, self.lab);
        ip(&["link", "set", &self.link, "alias", &alias])?;
        ip(&["link", "set", &self.link, "master", bridge, "up"])?;
        let address = format!("{}/24", self.address);
        self.run(&["ip", "address", "add", &address, "dev", "eth0"])?;
        self.run(&["ip", "link", "set", "lo", "up"])?;
        self.run(&["ip", "link", "set", "eth0", "up"])?;
        Ok(())
    }

    /// The pod's network namespace.
    #[must_use]
    pub fn pod(&self) -> String {
        format!("{}p", self.name)
    }

    /// Address of the node's pod: the first one a plugin gives.
    #[must_use]
    pub fn pod_address(&self) -> String {
        self.pod_cidr.replace(".0/24", ".2")
    }

    /// Runs a command in the node's network namespace.
    ///
    /// # Errors
    /// When it fails.
    pub fn run(&self, words: &[&str]) -> Result<String> {
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
            .env(OWNER_VARIABLE, &self.lab)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.daemon = Some(start.spawn().with_context(|| format!("start {who}"))?);
        Ok(())
    }

    /// Kills the agent, ours or flannel's.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(mut child) = self.daemon.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Starts flannel as the lab's administrator.
    ///
    /// # Errors
    /// When it cannot be built or started.
    pub fn start_flannel(&mut self, kubeconfig: &Path, net_conf: &Path) -> Result<()> {
        let program = go::flannel()?.join("flannel").display().to_string();
        let words = [
            program,
            format!("--kubeconfig-file={}", kubeconfig.display()),
            format!("--net-config-path={}", net_conf.display()),
        ];
        self.start(&words, "flannel")
    }

    /// Starts a peer agent of ours.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_agent(&mut self, agent: &Path, kubeconfig: &Path, net_conf: &Path) -> Result<()> {
        let flag = |name: &str, path: &Path| format!("--{name}={}", path.display());
        let words = [
            agent.display().to_string(),
            flag("kubeconfig", kubeconfig),
            flag("net-conf", net_conf),
            flag("cni-conf-dir", &self.dir.join("net.d")),
            flag("state-dir", &self.dir.join("state")),
        ];
        self.start(&words, "agent")
    }

    /// What an agent said so far.
    #[must_use]
    pub fn log(&self, who: &str) -> String {
        fs::read_to_string(self.dir.join(format!("{who}.log"))).unwrap_or_default()
    }

    /// Waits until our agent says that it is ready.
    ///
    /// # Errors
    /// When it does not in time; with its log.
    pub fn ready(&self) -> Result<()> {
        let url = "http://127.0.0.1:9473/readyz";
        let words = ["curl", "-sSf", "--max-time", "2", url];
        let answers = || self.run(&words);
        until("the agent is ready", READY_LIMIT, || Ok(()), answers)
            .map(drop)
            .with_context(|| self.log("agent"))
    }

    /// A pod by our plugin, as the network list the agent wrote says.
    ///
    /// # Errors
    /// When there is no list, or ADD fails or gives another address than it should.
    pub fn add_pod(&self, plugin: &Path) -> Result<()> {
        let dir = self.dir.join("net.d");
        let entries = fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))?;
        let lists = entries.flatten().map(|entry| entry.path());
        let list = lists
            .into_iter()
            .find(|path| path.extension().is_some_and(|end| end == "conflist"))
            .with_context(|| format!("{} has no network list", dir.display()))?;
        let list: Value = serde_json::from_slice(&fs::read(list)?)?;
        let mut conf = list["plugins"][0].clone();
        conf["cniVersion"] = list["cniVersion"].clone();
        conf["name"] = list["name"].clone();
        conf["dataDir"] = json!(self.dir.join("leases"));
        self.add(plugin, &conf)
    }

    /// A pod by any plugin; those it calls are in the same directory.
    ///
    /// # Errors
    /// When ADD fails or gives another address than the first.
    pub fn add(&self, plugin: &Path, conf: &Value) -> Result<()> {
        let program = plugin.display().to_string();
        let mut add = command("ip", &["netns", "exec", &self.name, &program]);
        add.env("CNI_COMMAND", "ADD")
            .env("CNI_CONTAINERID", &self.name)
            .env("CNI_NETNS", format!("/run/netns/{}", self.pod()))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", plugin.parent().unwrap_or(Path::new("/nowhere")));
        let printed = stdout_with_input(&mut add, conf.to_string().as_bytes())?;
        ensure!(printed.contains(&self.pod_address()), "{printed}");
        Ok(())
    }
}

impl Drop for BareNode {
    fn drop(&mut self) {
        drop(self.stop());
        let forget = ["delete", "node", "--ignore-not-found", &self.name];
        drop(self.admin.run(&forget));
        drop(ip(&["netns", "delete", &self.pod()]));
        drop(ip(&["netns", "delete", &self.name]));
        drop(ip(&["link", "delete", &self.link]));
    }
}
