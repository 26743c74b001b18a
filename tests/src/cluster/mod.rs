//! A lab: one real control plane and nodes, several labs side by side on one machine.
//!
//! ```text
//!   etcd ── kube-apiserver ── kube-controller-manager, kube-scheduler      registry
//!                 │  10.99.<n>.1 on bridge ferrule<n>                          │
//!   ──────────────┴─────────────┬──────────────────────────┬──────────────────┴──
//!                         node-1 (10.99.<n>.11)      node-2 (10.99.<n>.12)
//!                         own net, mount, UTS namespaces, cgroup /ferrule-lab/<lab>/node-1
//! ```
//!
//! Everything is recorded ([`state`]) before it is made and found again by what it carries itself:
//! processes by an environment variable and their cgroup, links by their alias, files by lying
//! below the lab's directory. Nothing else is ever removed.

pub mod addons;
pub mod bare;
pub mod cgroup;
pub mod controlplane;
pub mod down;
pub mod ferrule;
pub mod hosted;
pub mod kubectl;
pub mod layout;
pub mod network;
pub mod node;
pub mod pki;
pub mod podnet;
pub mod sample;
pub mod spare;
pub mod state;
pub mod stock;
mod surplus;

pub use addons::{Addons, ProxyMode};
pub use down::down;
pub use layout::Family;
pub use podnet::Network;
pub use state::NodeKind;

use crate::artefacts::{self, ours};
use crate::process::{self, ProcessSpec, until};
use crate::progress::Step;
use crate::{images, packages, paths};
use anyhow::{Context, Result, bail};
use kubectl::Kubectl;
use layout::{Layout, MAX_NODES};
use network::Site;
use state::{LabState, ProcessRecord};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The lab that commands mean when none is named.
pub const DEFAULT_LAB: &str = "default";

/// A replaced process gets this long to end by itself.
const STOP_GRACE: Duration = Duration::from_secs(3);

/// Longest wait for a node to become Ready.
const READY_LIMIT: Duration = Duration::from_secs(120);

/// What `up` shall bring up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpOptions {
    /// The lab's name.
    pub lab: String,
    /// Number of nodes; those above it are removed. `None` keeps what is there, or makes one.
    pub nodes: Option<usize>,
    /// What new nodes run.
    pub kind: NodeKind,
    /// Missing Debian packages may be installed.
    pub may_install: bool,
    /// Start the nodes' agents. Without them the nodes are prepared, but whoever wants to look at an
    /// agent closely starts it by hand.
    pub agents: bool,
    /// What shall run as pods of the cluster's own.
    pub addons: Addons,
    /// Addresses of a new lab; `None` means IPv4. A lab that is there keeps what it has.
    pub family: Option<Family>,
    /// Network of a new lab's pods; `None` means bridges. A lab that has nodes keeps what it has.
    pub network: Option<Network>,
    /// Start the sample.
    pub sample: bool,
    /// Cargo profile the agent is built with.
    pub profile: String,
}

/// A lab that is being worked on; holds its lock.
#[derive(Debug)]
pub struct Lab {
    /// Addresses and file names.
    pub layout: Layout,
    /// The record.
    pub state: LabState,
    /// Directory of the control plane's programs.
    pub programs: PathBuf,
    /// Our programs, when they were built.
    pub ours: Option<ours::Programs>,
    /// Directory of the stock node's programs, when they were built.
    pub peers: Option<PathBuf>,
    /// kubectl as administrator.
    pub kubectl: Kubectl,
    _lock: LabLock,
}

/// Held while a lab is changed.
#[derive(Debug)]
pub struct LabLock {
    _file: File,
}

impl LabLock {
    /// Waits for whoever changes the lab now.
    ///
    /// # Errors
    /// When the name is none a lab can have, or the lock file cannot be made; mostly a lack of
    /// rights.
    pub fn take(lab: &str) -> Result<Self> {
        layout::check_name(lab)?;
        let labs = paths::labs();
        fs::create_dir_all(&labs)
            .with_context(|| format!("create {} (labs need root)", labs.display()))?;
        Self::take_file(&Self::path(lab))
    }

    fn take_file(path: &Path) -> Result<Self> {
        loop {
            let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
            file.lock()
                .with_context(|| format!("lock {}", path.display()))?;
            // `down` removes the file while it holds it: whoever waited for that one holds
            // nothing, and has to queue at the file that is there now.
            if is_at(&file, path) {
                return Ok(Self { _file: file });
            }
        }
    }

    /// Removes the lock's file, which only its holder may; those who wait for it notice.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(self, lab: &str) -> Result<()> {
        let path = Self::path(lab);
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
    }

    /// Whether somebody is changing the lab right now.
    #[must_use]
    pub fn is_held(lab: &str) -> bool {
        let file = File::open(Self::path(lab));
        file.is_ok_and(|file| matches!(file.try_lock(), Err(fs::TryLockError::WouldBlock)))
    }

    /// The lock's file.
    #[must_use]
    pub fn path(lab: &str) -> PathBuf {
        paths::labs().join(format!(".{lab}.lock"))
    }
}

/// Whether `path` still names this open file.
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let (Ok(held), Ok(named)) = (file.metadata(), fs::metadata(path)) else {
        return false;
    };
    (held.dev(), held.ino()) == (named.dev(), named.ino())
}

impl Lab {
    /// Opens the lab `name`, recording a new one when there is none.
    ///
    /// # Errors
    /// When its record or the control plane's programs cannot be had.
    pub fn open_or_new(name: &str) -> Result<Self> {
        let programs = artefacts::go::kubernetes()?;
        let lock = LabLock::take(name)?;
        let state = LabState::load_or_new(&paths::labs(), name)?;
        let layout = Layout::new(&paths::labs(), name, state.index)?;
        fs::create_dir_all(layout.dir.join("logs")).context("create the lab's log directory")?;
        let kubectl = Kubectl::new(&programs, layout.admin_kubeconfig());
        Ok(Self {
            layout,
            state,
            programs,
            ours: None,
            peers: None,
            kubectl,
            _lock: lock,
        })
    }

    /// Opens a lab that is up.
    ///
    /// # Errors
    /// When there is no lab of that name.
    pub fn open(name: &str) -> Result<Self> {
        let known = LabState::load(&paths::labs(), name)?.is_some();
        anyhow::ensure!(
            known,
            "lab {name} is not up; run `cargo xtask up --lab {name}`"
        );
        Self::open_or_new(name)
    }

    /// Writes the record.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self) -> Result<()> {
        self.state.save(&paths::labs())
    }

    /// Starts a process unless the very same already runs; one that was started with other
    /// arguments or from another file is replaced.
    ///
    /// # Errors
    /// When the old one does not end or the new one cannot be started.
    pub fn ensure_process(&mut self, name: &str, spec: &ProcessSpec) -> Result<()> {
        let fingerprint = spec.fingerprint();
        if let Some(record) = self.state.processes.get(name)
            && let Some(identity) = record.identity.filter(|identity| identity.is_alive())
        {
            if record.fingerprint == fingerprint {
                return Ok(());
            }
            process::stop(identity, STOP_GRACE)?;
        }
        let record = ProcessRecord {
            fingerprint,
            identity: None,
        };
        self.state.processes.insert(name.to_owned(), record);
        self.save()?;
        let owner = match name.split_once('/') {
            Some((node, _)) => node::owner(&self.layout, node),
            None => self.layout.name.clone(),
        };
        self.kill_unrecorded(&owner, spec)?;
        let log = self.layout.log(&name.replace('/', "-"));
        let identity = process::spawn_detached(spec, &owner, &log)?;
        if let Some(record) = self.state.processes.get_mut(name) {
            record.identity = Some(identity);
        }
        self.save()
    }

    /// A starter that was killed between start and record leaves a process that holds the port.
    fn kill_unrecorded(&self, owner: &str, spec: &ProcessSpec) -> Result<()> {
        let recorded: Vec<_> = self
            .state
            .processes
            .values()
            .filter_map(|record| record.identity)
            .collect();
        for (process, name) in process::owned() {
            let command = fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
            let same = command.starts_with(spec.program.as_os_str().as_encoded_bytes());
            if name == owner && same && !recorded.contains(&process) {
                process::kill(process, STOP_GRACE)?;
            }
        }
        Ok(())
    }

    /// # Errors
    /// When the process is not running any more; the message carries the end of its log.
    pub fn require_alive(&self, name: &str) -> Result<()> {
        let record = self.state.processes.get(name);
        if record
            .and_then(|record| record.identity)
            .is_some_and(process::ProcessIdentity::is_alive)
        {
            return Ok(());
        }
        let log = self.layout.log(&name.replace('/', "-"));
        let text = fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(15)..].join("\n");
        bail!(
            "{name} is not running; the end of {}:\n{tail}",
            log.display()
        )
    }

    /// Where the pods of the nodes are that have a place in the network.
    fn sites(&self) -> Vec<Site> {
        let mut sites = Vec::new();
        for node in self.state.nodes.values() {
            let Some(holder) = node.holder.filter(|holder| holder.is_alive()) else {
                continue;
            };
            sites.extend(node.pod_networks.iter().map(|pod_network| Site {
                holder: holder.pid,
                address: match pod_network.contains(':') {
                    true => self.layout.node_address6(node.number).into(),
                    false => self.layout.node_address(node.number).into(),
                },
                pod_network: pod_network.clone(),
            }));
        }
        sites
    }
}

/// Brings a lab up, or completes one that is; doing it twice is harmless.
///
/// # Errors
/// When a step fails; `down` removes whatever was made.
pub fn up(options: &UpOptions) -> Result<Lab> {
    anyhow::ensure!(
        rustix::process::geteuid().is_root(),
        "a lab needs root: namespaces, cgroups"
    );
    packages::ensure(packages::CONTROL_PLANE, options.may_install)?;
    let mut lab = Lab::open_or_new(&options.lab)?;
    let nodes = options
        .nodes
        .unwrap_or_else(|| lab.state.nodes.len().max(1));
    anyhow::ensure!(
        nodes <= MAX_NODES,
        "{nodes} nodes are more than {MAX_NODES}"
    );
    if nodes > 0 {
        build_programs(&mut lab, options, nodes)?;
    }
    decide_addresses(&mut lab, options)?;
    network::ensure_bridge(&lab.layout, lab.state.family)?;
    if options.nodes.is_some() {
        surplus::remove(&mut lab, nodes)?;
    }
    let authorities = pki::ensure_control_plane(&lab.layout)?;
    controlplane::ensure(&mut lab)?;
    if nodes == 0 {
        return Ok(lab);
    }
    let step = Step::begin("test images");
    images::ensure_pushed(&lab.layout.registry(), &paths::cache()?)?;
    step.done(&lab.layout.registry());
    if options.agents {
        addons::begin(&mut lab, options.addons)?;
        podnet::apply(&lab)?;
    }
    let step = Step::begin(format!(
        "{nodes} {}",
        if nodes == 1 { "node" } else { "nodes" }
    ));
    for number in 1..=nodes {
        let recorded = lab
            .state
            .nodes
            .get(&Layout::node_name(number))
            .map(|node| node.kind);
        let kind = recorded.unwrap_or(options.kind);
        node::ensure(&mut lab, &authorities, number, kind, options.agents)?;
    }
    if !options.agents {
        step.done("prepared, no agent started");
        return Ok(lab);
    }
    for number in 1..=nodes {
        join_network(&mut lab, &Layout::node_name(number))?;
    }
    ensure_routes(&lab)?;
    for number in 1..=nodes {
        wait_node_ready(&lab, &Layout::node_name(number))?;
    }
    step.done("Ready");
    let step = options.addons.names().map(Step::begin);
    addons::proceed(&lab, options.addons, nodes)?;
    if options.sample {
        sample::ensure(&lab)?;
    }
    addons::complete(&lab, options.addons)?;
    if let Some(step) = step {
        step.done("Ready");
    }
    Ok(lab)
}

/// The family is decided with the control plane, the network with the first node.
fn decide_addresses(lab: &mut Lab, options: &UpOptions) -> Result<()> {
    let name = &lab.layout.name;
    if let Some(family) = options.family.filter(|family| *family != lab.state.family) {
        anyhow::ensure!(
            lab.state.processes.is_empty(),
            "lab {name} is up with other addresses; take it down first"
        );
        lab.state.family = family;
    }
    if let Some(network) = options
        .network
        .filter(|network| *network != lab.state.network)
    {
        anyhow::ensure!(
            lab.state.nodes.is_empty(),
            "lab {name} has nodes with another network; take it down first"
        );
        lab.state.network = network;
    }
    lab.save()
}

fn build_programs(lab: &mut Lab, options: &UpOptions, nodes: usize) -> Result<()> {
    packages::ensure(packages::NODES, options.may_install)?;
    let kinds: Vec<NodeKind> = (1..=nodes)
        .map(|number| {
            let recorded = lab.state.nodes.get(&Layout::node_name(number));
            recorded.map_or(options.kind, |node| node.kind)
        })
        .collect();
    if kinds.contains(&NodeKind::Stock) {
        packages::ensure(packages::STOCK, options.may_install)?;
        lab.peers = Some(artefacts::go::stock_peers()?);
    }
    if kinds.contains(&NodeKind::Ferrule) {
        lab.ours = Some(ours::build(&options.profile)?);
    }
    Ok(())
}

/// The control plane reaches pods in any case; nodes reach each other's by routes of ours, unless
/// that is the network's own work.
fn ensure_routes(lab: &Lab) -> Result<()> {
    let between = lab.state.network.agents().is_none();
    network::ensure_routes(&lab.layout, &lab.sites(), between)
}

/// Writes the node's network configuration once the controller manager has given it its pods'
/// networks, as an installed network add-on would.
fn join_network(lab: &mut Lab, name: &str) -> Result<()> {
    let process = format!("{name}/kubelet");
    let node = format!("node/{name}");
    let pod_networks = until(
        "the node to register",
        READY_LIMIT,
        || lab.require_alive(&process),
        || {
            lab.kubectl
                .run(&["wait", "--for=create", &node, "--timeout=5s"])?;
            let wait = [
                "wait",
                "--for=jsonpath={.spec.podCIDR}",
                &node,
                "--timeout=5s",
            ];
            lab.kubectl.run(&wait)?;
            lab.kubectl
                .run(&["get", &node, "--output=jsonpath={.spec.podCIDRs[*]}"])
        },
    )?;
    let pod_networks: Vec<String> = pod_networks.split_whitespace().map(str::to_owned).collect();
    let Some(record) = lab.state.nodes.get_mut(name) else {
        return Ok(());
    };
    record.pod_networks.clone_from(&pod_networks);
    if lab.state.network.agents().is_some() {
        // The agent writes it.
        return lab.save();
    }
    let configuration = match record.kind {
        NodeKind::Ferrule => {
            let cluster = lab.layout.pod_networks(lab.state.family);
            ferrule::network_configuration(&cluster, &pod_networks)
        }
        NodeKind::Stock => stock::network_configuration(&pod_networks),
    };
    lab.save()?;
    let file = lab
        .layout
        .node_dir(name)
        .join("cni-conf/10-ferrule.conflist");
    node::write_changed(&file, &configuration, 0o644)
}

fn wait_node_ready(lab: &Lab, name: &str) -> Result<()> {
    let process = format!("{name}/kubelet");
    until(
        &format!("{name} to become Ready"),
        READY_LIMIT,
        || lab.require_alive(&process),
        || {
            let node = format!("node/{name}");
            lab.kubectl
                .run(&["wait", "--for=condition=Ready", &node, "--timeout=5s"])
        },
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waited_for_a_lock_that_was_removed_takes_the_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = LabLock::take_file(&path).unwrap();
        let waiting = path.clone();
        let waiter = std::thread::spawn(move || LabLock::take_file(&waiting).unwrap());
        fs::remove_file(&path).unwrap();
        drop(first);
        let second = waiter.join().unwrap();
        assert!(is_at(&second._file, &path));
    }
}
