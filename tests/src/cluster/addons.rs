//! What every cluster runs as pods of its own: kube-proxy on each node and the cluster's name
//! server, both unmodified, in images of ours.

use super::Lab;
use crate::{images, paths};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::time::Duration;

const PROXY: &str = include_str!("kube-proxy.yaml");

const DNS: &str = include_str!("coredns.yaml");

/// Longest wait for an add-on; a node that pulls its images first takes some seconds.
const ROLLOUT_LIMIT: Duration = Duration::from_secs(120);

/// Two name servers are what installers make; a single node needs no second one.
const DNS_REPLICAS: usize = 2;

/// What kube-proxy writes its rules with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProxyMode {
    /// nftables.
    #[default]
    Nftables,
    /// iptables, which here is the one that speaks nftables.
    Iptables,
}

impl ProxyMode {
    fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }

    /// A command that succeeds once the rules for the apiserver's service are written.
    fn written(self) -> &'static str {
        match self {
            Self::Nftables => "[nft, list, map, ip, kube-proxy, service-ips]",
            // The chain's name is a hash of default/kubernetes:https.
            Self::Iptables => "[iptables, -w, '5', -t, nat, -S, KUBE-SVC-NPX46M4PTMTKRN6Y]",
        }
    }
}

/// Which of them `up` starts. What runs already and is not asked for stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addons {
    /// kube-proxy on every node, so that services have addresses that work.
    pub proxy: bool,
    /// How it writes rules; `None` keeps what the lab has.
    pub mode: Option<ProxyMode>,
    /// CoreDNS.
    pub dns: bool,
}

impl Addons {
    /// For a person who waits; nothing when there is nothing to wait for.
    pub(super) fn names(self) -> Option<&'static str> {
        match (self.proxy, self.dns) {
            (true, true) => Some("kube-proxy, CoreDNS"),
            (true, false) => Some("kube-proxy"),
            (false, true) => Some("CoreDNS"),
            (false, false) => None,
        }
    }

    /// Neither: what is measured or tested is the node alone.
    pub const NONE: Self = Self {
        proxy: false,
        mode: None,
        dns: false,
    };

    /// Both.
    pub const ALL: Self = Self {
        proxy: true,
        mode: None,
        dns: true,
    };
}

/// Makes what the add-ons are made of, and hands kube-proxy to the cluster, before there is a node
/// to run it.
pub(super) fn begin(lab: &mut Lab, wanted: Addons) -> Result<()> {
    if wanted.dns {
        images::ensure_dns(&lab.layout.registry(), &paths::cache()?)?;
    }
    if !wanted.proxy {
        return Ok(());
    }
    let mode = wanted.mode.or(lab.state.proxy_mode).unwrap_or_default();
    apply_proxy(lab, mode)
}

/// Waits until services have addresses on all `nodes`, then hands the name server to the cluster:
/// its first connection goes to the apiserver's service, and one that begins before there are
/// rules is lost for as long as it is tried.
pub(super) fn proceed(lab: &Lab, wanted: Addons, nodes: usize) -> Result<()> {
    if wanted.proxy {
        // A roll-out counts the nodes its controller has seen, which may be none yet.
        let ready = format!("--for=jsonpath={{.status.numberReady}}={nodes}");
        let limit = format!("--timeout={}s", ROLLOUT_LIMIT.as_secs());
        let wait = ["--namespace=kube-system", "wait", "daemonset/kube-proxy"];
        let waited = lab.kubectl.run(&[&wait[..], &[&ready, &limit]].concat());
        waited.context("wait for kube-proxy")?;
    }
    if wanted.dns {
        apply_dns(lab, nodes)?;
    }
    Ok(())
}

/// Waits until names are resolved.
pub(super) fn complete(lab: &Lab, wanted: Addons) -> Result<()> {
    if wanted.dns {
        rolled_out(lab, "deployment/coredns")?;
    }
    Ok(())
}

/// Lets kube-proxy write its rules otherwise, and waits until it has on every node.
///
/// # Errors
/// When it does not come up that way.
pub fn set_proxy_mode(lab: &mut Lab, mode: ProxyMode) -> Result<()> {
    apply_proxy(lab, mode)?;
    rolled_out(lab, "daemonset/kube-proxy")
}

fn apply_proxy(lab: &mut Lab, mode: ProxyMode) -> Result<()> {
    let image = images::ensure_proxy(&lab.layout.registry(), &paths::cache()?)?;
    let pods = lab.layout.pod_networks(lab.state.family);
    let filled = PROXY
        .replace("LAB_MODE", mode.name())
        .replace("LAB_WRITTEN", mode.written())
        .replace("LAB_PODS", &pods)
        .replace("LAB_SERVER", &lab.layout.server())
        .replace("LAB_IMAGE", &image);
    // A pod reads its configuration once: another configuration means another pod.
    let digest = Sha256::digest(filled.as_bytes());
    let digest: String = digest.iter().take(8).map(|b| format!("{b:02x}")).collect();
    lab.kubectl
        .apply(&filled.replace("LAB_CONFIGURATION", &digest))
        .context("hand kube-proxy to the cluster")?;
    lab.state.proxy_mode = Some(mode);
    lab.save()
}

fn apply_dns(lab: &Lab, nodes: usize) -> Result<()> {
    let image = images::ensure_dns(&lab.layout.registry(), &paths::cache()?)?;
    let filled = DNS
        .replace("LAB_ADDRESS", &lab.layout.service_address(10).to_string())
        .replace("LAB_REPLICAS", &nodes.clamp(1, DNS_REPLICAS).to_string())
        .replace("LAB_IMAGE", &image);
    let applied = lab.kubectl.apply(&filled);
    applied.context("hand CoreDNS to the cluster").map(drop)
}

fn rolled_out(lab: &Lab, what: &str) -> Result<()> {
    let limit = format!("--timeout={}s", ROLLOUT_LIMIT.as_secs());
    let status = ["--namespace=kube-system", "rollout", "status", what, &limit];
    let waited = lab.kubectl.run(&status);
    waited.with_context(|| format!("wait for {what}")).map(drop)
}
