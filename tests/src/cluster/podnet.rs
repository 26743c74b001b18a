//! How pods of different nodes reach each other: by routes the lab makes itself, or by one of our
//! networks that span nodes, from the manifest users apply.

use super::Lab;
use super::layout::Family;
use crate::artefacts::ours;
use crate::{images, paths};
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::fs;

/// The network of a lab's pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// A bridge on every node; the lab makes the routes between them.
    #[default]
    Bridge,
    /// cni-vxlan and its peer agents.
    Vxlan,
    /// cni-hostgw and its peer agents.
    Hostgw,
}

impl Network {
    /// The plugin of a network that has peer agents.
    pub(super) fn agents(self) -> Option<&'static str> {
        match self {
            Self::Bridge => None,
            Self::Vxlan => Some("cni-vxlan"),
            Self::Hostgw => Some("cni-hostgw"),
        }
    }
}

/// Hands the network's agents to the cluster, before there is a node to run them.
pub(super) fn apply(lab: &Lab) -> Result<()> {
    let Some(name) = lab.state.network.agents() else {
        return Ok(());
    };
    let programs = ours::network(name)?;
    let image = images::own::ensure_network(&lab.layout.registry(), &paths::cache()?, &programs)?;
    let file = paths::workspace().join(format!("deploy/{name}/{name}.yaml"));
    let manifest = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    let manifest = fill(lab, &manifest, name, &image)?;
    let applied = lab.kubectl.apply(&manifest);
    applied
        .with_context(|| format!("hand {name} to the cluster"))
        .map(drop)
}

/// What a user changes in the manifest, and what this lab has to: its nodes are all on one
/// network, where `DirectRouting` would leave nothing for VXLAN to do; and there may be no
/// kube-proxy, so that only the apiserver's own address leads to it.
fn fill(lab: &Lab, manifest: &str, name: &str, image: &str) -> Result<String> {
    let networks = lab.layout.pod_networks(lab.state.family);
    let networks = match (lab.state.family, networks.split_once(',')) {
        (Family::Dual, Some((first, second))) => {
            format!(r#""Network": "{first}", "EnableIPv6": true, "IPv6Network": "{second}""#)
        }
        (Family::Ipv4 | Family::Dual, _) => format!(r#""Network": "{networks}""#),
    };
    let field = "valueFrom: {fieldRef: {fieldPath: spec.nodeName}}";
    let server = format!(
        "{field}
            - {{name: KUBERNETES_SERVICE_HOST, value: {}}}
            - {{name: KUBERNETES_SERVICE_PORT, value: '6443'}}",
        lab.layout.control_address()
    );
    let changes = [
        (r#""Network": "10.244.0.0/16""#, networks.as_str()),
        (field, server.as_str()),
    ];
    let mut filled = manifest.replace(&format!("ferrule.dev/{name}:latest"), image);
    filled = filled.replace(r#", "DirectRouting": true"#, "");
    for (from, to) in changes {
        ensure!(
            filled.contains(from),
            "the manifest of {name} has no {from}"
        );
        filled = filled.replace(from, to);
    }
    Ok(filled)
}
