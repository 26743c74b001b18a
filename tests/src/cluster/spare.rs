//! A node that one scenario adds to a lab for what it does to nodes, and takes away again.
//!
//! It is tainted, so that only pods that name it land there, and numbered from [`FIRST`], so that
//! `up` never meets it.

use super::layout::{Layout, MAX_NODES};
use super::node::{self, NodeContext};
use super::state::{NodeKind, NodeRecord};
use super::{Lab, ensure_routes, ferrule, join_network, pki, stock, surplus, wait_node_ready};
use crate::artefacts::go;
use crate::artefacts::ours::Programs;
use crate::process::until;
use anyhow::{Context, Result};
use std::fs;
use std::time::Duration;

/// Number of the first such node.
pub const FIRST: usize = 90;

/// Longest wait for the apiserver to reach a node that is Ready.
const REACH_LIMIT: Duration = Duration::from_secs(30);

/// What the node shall be like.
#[derive(Debug, Clone, Default)]
pub struct Spare {
    /// The stock kubelet with containerd instead of ours.
    pub stock: bool,
    /// Size of a disk of its own for what kubelet and runtime write.
    pub disk_bytes: Option<u64>,
    /// Lines of its KubeletConfiguration to replace, from and to.
    pub configuration: Vec<(&'static str, String)>,
    /// Further top-level fields of its KubeletConfiguration.
    pub extra: String,
    /// Lines of the runtime's configuration to replace, from and to.
    pub runtime: Vec<(&'static str, String)>,
}

/// Adds a node and waits until it is Ready. Its name comes with a failure too: what was made until
/// then is [`remove`]'s to take away.
pub fn add(lab: &mut Lab, spare: &Spare) -> (String, Result<()>) {
    let taken = |number: &usize| lab.state.nodes.contains_key(&Layout::node_name(*number));
    let number = (FIRST..MAX_NODES).find(|number| !taken(number));
    let number = number.unwrap_or(MAX_NODES);
    let name = Layout::node_name(number);
    let added = add_as(lab, number, &name, spare);
    (name, added)
}

/// Nodes whose scenario was killed.
fn remove_abandoned(lab: &mut Lab) -> Result<()> {
    let abandoned = |record: &&NodeRecord| {
        record.number >= FIRST && !record.holder.is_some_and(|holder| holder.is_alive())
    };
    let numbers: Vec<usize> = lab
        .state
        .nodes
        .values()
        .filter(abandoned)
        .map(|record| record.number)
        .collect();
    numbers
        .into_iter()
        .try_for_each(|number| remove(lab, &Layout::node_name(number)))
}

fn add_as(lab: &mut Lab, number: usize, name: &str, spare: &Spare) -> Result<()> {
    remove_abandoned(lab)?;
    let kind = match spare.stock {
        true => NodeKind::Stock,
        false => NodeKind::Ferrule,
    };
    let record = NodeRecord {
        number,
        kind,
        holder: None,
        pod_networks: Vec::new(),
        disk_bytes: spare.disk_bytes,
    };
    lab.state.nodes.insert(name.to_owned(), record);
    lab.save()?;
    match kind {
        NodeKind::Ferrule => lab.ours = Some(installed_programs(lab)?),
        NodeKind::Stock => lab.peers = Some(go::stock_peers()?),
    }
    let authorities = pki::ensure_control_plane(&lab.layout)?;
    node::ensure(lab, &authorities, number, kind, false)?;
    configure(lab, name, spare)?;
    let context = node::existing(lab, name)?;
    start(lab, &context)
}

/// The programs that the lab's first node runs.
fn installed_programs(lab: &Lab) -> Result<Programs> {
    let first = lab.layout.node_dir(&Layout::node_name(1));
    let programs = Programs {
        kubelet: first.join("bin/kubelet"),
        pod_shim: first.join("bin/pod-shim"),
        cni_bridge: first.join("cni-bin/cni-bridge"),
    };
    for program in [&programs.kubelet, &programs.pod_shim, &programs.cni_bridge] {
        anyhow::ensure!(program.is_file(), "there is no {}", program.display());
    }
    Ok(programs)
}

fn configure(lab: &Lab, name: &str, spare: &Spare) -> Result<()> {
    let dir = lab.layout.node_dir(name).join("kubernetes");
    let taint = "registerWithTaints: [{key: scenario, value: own, effect: NoSchedule}]\n";
    let mut extra = format!("{taint}{}", spare.extra);
    if spare.stock {
        extra.push_str(stock::ENDPOINT);
    }
    let text = node::kubelet_configuration(&lab.layout, name, &extra);
    let text = changed(text, &spare.configuration)?;
    node::write_changed(&dir.join("kubelet.yaml"), &text, 0o644)?;
    if spare.stock {
        return Ok(());
    }
    let file = dir.join("ferrule.yaml");
    let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    node::write_changed(&file, &changed(text, &spare.runtime)?, 0o644)
}

fn changed(mut text: String, changes: &[(&'static str, String)]) -> Result<String> {
    for (from, to) in changes {
        anyhow::ensure!(text.contains(from), "the configuration has no {from:?}");
        text = text.replace(from, to);
    }
    Ok(text)
}

fn start(lab: &mut Lab, context: &NodeContext) -> Result<()> {
    match lab.state.nodes.get(&context.name).map(|node| node.kind) {
        Some(NodeKind::Stock) => stock::start_kubelet(lab, context)?,
        Some(NodeKind::Ferrule) | None => ferrule::start(lab, context)?,
    }
    join_network(lab, &context.name)?;
    ensure_routes(lab)?;
    wait_node_ready(lab, &context.name)?;
    // The apiserver may still hold connections to an earlier node of this address.
    let health = format!("/api/v1/nodes/{}/proxy/healthz", context.name);
    let reached = || lab.kubectl.run(&["get", "--raw", &health]).map(drop);
    until("the node to be reached", REACH_LIMIT, || Ok(()), reached)
}

/// Takes such a node away with all that was made for it; "already gone" is success.
///
/// # Errors
/// When something cannot be removed.
pub fn remove(lab: &mut Lab, name: &str) -> Result<()> {
    let Some(record) = lab.state.nodes.get(name).cloned() else {
        return Ok(());
    };
    anyhow::ensure!(
        record.number >= FIRST,
        "{name} is not a scenario's own node"
    );
    surplus::remove_node(lab, name, record.number)
}
