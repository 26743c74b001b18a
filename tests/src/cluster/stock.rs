//! The stock node for comparison: kubelet, containerd, runc and the CNI project's plugins, all
//! unmodified, in the same kind of namespaces on the same bridge.

use super::Lab;
use super::node::{self, NodeContext};
use crate::process::{ProcessSpec, until};
use anyhow::{Context, Result};
use std::path::Path;
use std::time::Duration;

/// Where the kubelet finds containerd, as a field of its configuration.
pub(super) const ENDPOINT: &str =
    "containerRuntimeEndpoint: unix:///run/containerd/containerd.sock\n";

/// Installs the programs, starts containerd, then the kubelet, if `agent` says so.
///
/// # Errors
/// When a file cannot be written or a program not be started.
pub fn ensure(lab: &mut Lab, node: &NodeContext, agent: bool) -> Result<()> {
    let peers = lab
        .peers
        .clone()
        .context("the stock programs were not built")?;
    for plugin in ["bridge", "loopback", "host-local", "portmap"] {
        node::install(&peers.join(plugin), &node.dir.join("cni-bin").join(plugin))?;
    }
    let registry = lab.layout.registry();
    let config = node.dir.join("kubernetes");
    node::write_changed(
        &config.join("containerd.toml"),
        &containerd_configuration(&peers),
        0o644,
    )?;
    for host in ["registry.k8s.io", "docker.io", &registry] {
        let hosts =
            format!("[host.\"http://{registry}\"]\ncapabilities = [\"pull\", \"resolve\"]\n");
        node::write_changed(
            &config.join("certs.d").join(host).join("hosts.toml"),
            &hosts,
            0o644,
        )?;
    }
    let kubelet = node::kubelet_configuration(&lab.layout, &node.name, ENDPOINT);
    node::write_changed(&config.join("kubelet.yaml"), &kubelet, 0o644)?;
    let mut containerd = ProcessSpec::new(
        peers.join("containerd"),
        vec!["--config".into(), "/etc/kubernetes/containerd.toml".into()],
    );
    // containerd starts its shim by name.
    let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", peers.display());
    containerd.env.push(("PATH".into(), path));
    node::ensure_agent(lab, node, "containerd", containerd)?;
    let socket = format!("/proc/{}/root/run/containerd/containerd.sock", node.holder);
    let name = format!("{}/containerd", node.name);
    until(
        "containerd's socket",
        Duration::from_secs(30),
        || lab.require_alive(&name),
        || {
            anyhow::ensure!(Path::new(&socket).exists(), "no socket at {socket}");
            Ok(())
        },
    )?;
    if agent {
        start_kubelet(lab, node)
    } else {
        Ok(())
    }
}

/// Starts the kubelet; harmless when it runs.
///
/// # Errors
/// When it cannot be started.
pub fn start_kubelet(lab: &mut Lab, node: &NodeContext) -> Result<()> {
    let addresses = lab.layout.node_addresses(node.number, lab.state.family);
    let pairs = [
        ("config", "/etc/kubernetes/kubelet.yaml"),
        ("kubeconfig", "/etc/kubernetes/kubelet.kubeconfig"),
        ("root-dir", "/var/lib/kubelet"),
        ("hostname-override", &node.name),
        ("node-ip", &addresses),
        ("cert-dir", "/var/lib/kubelet/pki"),
    ];
    let args = pairs
        .iter()
        .map(|(name, value)| format!("--{name}={value}"))
        .collect();
    let kubelet = ProcessSpec::new(lab.programs.join("kubelet"), args);
    node::ensure_agent(lab, node, "kubelet", kubelet)
}

fn containerd_configuration(peers: &Path) -> String {
    format!(
        r#"version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
address = "/run/containerd/containerd.sock"
[plugins."io.containerd.cri.v1.images"]
snapshotter = "overlayfs"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "registry.k8s.io/pause:3.10.2"
[plugins."io.containerd.cri.v1.images".registry]
config_path = "/etc/kubernetes/certs.d"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
disable_apparmor = true
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/opt/cni/bin"]
conf_dir = "/etc/cni/net.d"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{runc}"
SystemdCgroup = false
"#,
        runc = peers.join("runc").display(),
    )
}

/// The network configuration, once the controller manager has given the node its pods' networks.
#[must_use]
pub fn network_configuration(pod_networks: &[String]) -> String {
    format!(
        r#"{{
  "cniVersion": "1.0.0",
  "name": "stock",
  "plugins": [
    {{
      "type": "bridge",
      "bridge": "cni0",
      "isGateway": true,
      "ipMasq": true,
      "hairpinMode": true,
      "ipam": {ipam}
    }},
    {{"type": "portmap", "capabilities": {{"portMappings": true}}}}
  ]
}}
"#,
        ipam = super::ferrule::addresses(pod_networks),
    )
}
