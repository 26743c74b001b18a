//! What a node with our kubelet needs: our programs, the runtime's configuration, the network
//! plugin and its configuration.

use super::Lab;
use super::node::{self, NodeContext};
use crate::process::ProcessSpec;
use anyhow::{Context, Result};
use serde_json::json;
use std::path::Path;

/// Installs the programs and starts the agent, if `agent` says so.
///
/// # Errors
/// When a file cannot be written or the agent not be started.
pub fn ensure(lab: &mut Lab, node: &NodeContext, agent: bool) -> Result<()> {
    let programs = lab.ours.clone().context("our programs were not built")?;
    let bin = node.dir.join("bin");
    node::install(&programs.kubelet, &bin.join("kubelet"))?;
    node::install(&programs.pod_shim, &bin.join("pod-shim"))?;
    node::install(&programs.cni_bridge, &node.dir.join("cni-bin/cni-bridge"))?;
    let runtime = runtime_configuration(&lab.layout.registry(), &bin.join("pod-shim"));
    node::write_changed(&node.dir.join("kubernetes/ferrule.yaml"), &runtime, 0o644)?;
    if agent { start(lab, node) } else { Ok(()) }
}

/// The runtime's configuration of a node that pulls from the lab's registry.
#[must_use]
pub fn runtime_configuration(registry: &str, shim: &Path) -> String {
    format!(
        "root: /var/lib/ferrule
runDir: /run/ferrule
cniConfDir: /etc/cni/net.d
cniBinDirs: [/opt/cni/bin]
shimPath: {shim}
registries:
  mirrors:
    registry.k8s.io: [\"http://{registry}\"]
    docker.io: [\"http://{registry}\"]
  insecure: [\"{registry}\"]
",
        shim = shim.display(),
    )
}

/// Flags of the agent on the node `name`, with one address or one of each family.
#[must_use]
pub fn agent_flags(name: &str, addresses: &str) -> Vec<String> {
    let pairs = [
        ("config", "/etc/kubernetes/kubelet.yaml"),
        ("kubeconfig", "/etc/kubernetes/kubelet.kubeconfig"),
        ("root-dir", "/var/lib/kubelet"),
        ("hostname-override", name),
        ("node-ip", addresses),
        ("cert-dir", "/var/lib/kubelet/pki"),
        ("runtime-config", "/etc/kubernetes/ferrule.yaml"),
    ];
    let flags = pairs.iter();
    flags
        .map(|(flag, value)| format!("--{flag}={value}"))
        .collect()
}

/// Starts the agent with the programs that are installed; harmless when it runs.
///
/// # Errors
/// When it cannot be started.
pub fn start(lab: &mut Lab, node: &NodeContext) -> Result<()> {
    let addresses = lab.layout.node_addresses(node.number, lab.state.family);
    let args = agent_flags(&node.name, &addresses);
    let mut spec = ProcessSpec::new(node.dir.join("bin/kubelet"), args);
    spec.env.push(("RUST_BACKTRACE".into(), "1".into()));
    node::ensure_agent(lab, node, "kubelet", spec)
}

/// The network configuration, once the controller manager has given the node its pods' networks.
/// Pods see each other's own addresses: `cluster`, the networks of all pods, is not masqueraded.
#[must_use]
pub fn network_configuration(cluster: &str, pod_networks: &[String]) -> String {
    let cluster: Vec<&str> = cluster.split(',').collect();
    format!(
        r#"{{
  "cniVersion": "1.1.0",
  "name": "ferrule",
  "plugins": [
    {{
      "type": "cni-bridge",
      "bridge": "cni0",
      "isGateway": true,
      "ipMasq": true,
      "ipMasqExcept": {cluster},
      "hairpinMode": true,
      "capabilities": {{"portMappings": true}},
      "ipam": {ipam}
    }}
  ]
}}
"#,
        cluster = json!(cluster),
        ipam = addresses(pod_networks),
    )
}

/// An address of each network, and a way out for each family.
pub(super) fn addresses(pod_networks: &[String]) -> serde_json::Value {
    let ranges: Vec<_> = pod_networks
        .iter()
        .map(|net| json!([{"subnet": net}]))
        .collect();
    let routes = pod_networks.iter().map(|net| match net.contains(':') {
        true => json!({"dst": "::/0"}),
        false => json!({"dst": "0.0.0.0/0"}),
    });
    json!({"type": "host-local", "ranges": ranges, "routes": routes.collect::<Vec<_>>()})
}
