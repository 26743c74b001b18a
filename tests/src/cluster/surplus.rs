//! Removing nodes that a smaller `up --nodes` asks no more for: at once, without draining, as a
//! machine that is switched off and taken out of the cluster.

use super::{Lab, cgroup, down, network, node};
use crate::progress::Step;
use anyhow::Result;

/// Removes every node numbered above `wanted`. A removal that was interrupted is completed by the
/// next one: the record goes last.
pub(super) fn remove(lab: &mut Lab, wanted: usize) -> Result<()> {
    let nodes = lab.state.nodes.iter();
    let surplus: Vec<(String, usize)> = nodes
        // A scenario's own node is the scenario's to remove.
        .filter(|(_, record)| record.number > wanted && record.number < super::spare::FIRST)
        .map(|(name, record)| (name.clone(), record.number))
        .collect();
    for (name, number) in surplus {
        let step = Step::begin(format!("remove {name}"));
        remove_node(lab, &name, number)?;
        step.done("");
    }
    Ok(())
}

/// Removes one node.
pub(super) fn remove_node(lab: &mut Lab, name: &str, number: usize) -> Result<()> {
    node::remove_processes(lab, name)?;
    if let Some(holder) = lab.state.nodes.get(name).and_then(|node| node.holder) {
        crate::process::kill(holder, std::time::Duration::from_secs(30))?;
    }
    let others = lab.state.nodes.values();
    let others: Vec<i32> = others
        .filter(|node| node.number != number)
        .filter_map(|node| node.holder.filter(|holder| holder.is_alive()))
        .map(|holder| holder.pid)
        .collect();
    network::remove_node(&lab.layout, number, &others)?;
    for mut dir in cgroup::existing(Some(&lab.layout.name)) {
        dir.push(name);
        if dir.exists() {
            cgroup::remove_tree(&dir)?;
        }
    }
    forget(lab, name);
    down::remove_directory(&lab.layout.node_dir(name))?;
    lab.state.nodes.remove(name);
    let processes = format!("{name}/");
    lab.state
        .processes
        .retain(|process, _| !process.starts_with(&processes));
    lab.save()
}

/// Takes node and pods out of the cluster. Nobody is left to confirm that the pods ended. While
/// the control plane is down there is nobody to tell either; the controllers find out later.
fn forget(lab: &Lab, name: &str) {
    let node = format!("node/{name}");
    let field = format!("--field-selector=spec.nodeName={name}");
    let delete = ["delete", "pods", "--all-namespaces", "--force", &field];
    // The node first: as long as there is one, its daemon sets make new pods for it.
    for command in [&["delete", &node, "--ignore-not-found"], &delete[..]] {
        if let Err(error) = lab.kubectl.run(command) {
            eprintln!("  {name} stays in the cluster's record: {error:#}");
        }
    }
}
