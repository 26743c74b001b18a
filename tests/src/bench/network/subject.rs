//! Two nodes with a pod each, in all the ways that are compared.

use crate::artefacts::{go, ours};
use crate::cluster::Lab;
use crate::cluster::bare::{BareNode, Site, ip};
use crate::command::{command, stdout_with_input};
use crate::process::{OWNER_VARIABLE, until};
use anyhow::{Context, Result};
use linux::netlink::in_netns;
use serde_json::{Value, json};
use std::fs;
use std::net::TcpStream;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

/// All pods of all nodes.
const NETWORK: &str = "10.250.0.0/16";

/// The addresses of this bench's nodes begin here.
const FIRST_ADDRESS: u8 = 180;

/// Longest wait for something that is expected to happen.
const LIMIT: Duration = Duration::from_secs(60);

/// How the pods of the two nodes reach each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// No pods: the nodes themselves.
    Native,
    /// cni-bridge, and a route on each node.
    Bridge,
    /// cni-hostgw and its agents.
    Hostgw,
    /// cni-vxlan and its agents.
    Vxlan,
    /// flannel's host-gw, with containernetworking's bridge as flannel's plugin calls it.
    FlannelHostgw,
    /// flannel's vxlan, in the same way.
    FlannelVxlan,
}

impl Kind {
    pub(super) const ALL: [Self; 6] = [
        Self::Native,
        Self::Bridge,
        Self::Hostgw,
        Self::FlannelHostgw,
        Self::Vxlan,
        Self::FlannelVxlan,
    ];

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Native => "native, no pods",
            Self::Bridge => "cni-bridge, routes",
            Self::Hostgw => "cni-hostgw",
            Self::Vxlan => "cni-vxlan",
            Self::FlannelHostgw => "flannel host-gw",
            Self::FlannelVxlan => "flannel vxlan",
        }
    }

    pub(super) fn is_flannel(self) -> bool {
        match self {
            Self::FlannelHostgw | Self::FlannelVxlan => true,
            Self::Native | Self::Bridge | Self::Hostgw | Self::Vxlan => false,
        }
    }

    fn net_conf(self) -> Value {
        let backend = match self {
            Self::Hostgw | Self::FlannelHostgw => "host-gw",
            Self::Native | Self::Bridge | Self::Vxlan | Self::FlannelVxlan => "vxlan",
        };
        json!({"Network": NETWORK, "EnableNFTables": true, "Backend": {"Type": backend}})
    }
}

/// Two nodes, ready, with a server that listens in the second one's end.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) kind: Kind,
    /// Network namespace of the end that asks.
    pub(super) client: String,
    /// Of the one that answers.
    pub(super) server: String,
    /// Its address.
    pub(super) address: String,
    /// Of the ends' interfaces.
    pub(super) mtu_bytes: u32,
    iperf: Child,
    _nodes: [BareNode; 2],
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = self.iperf.kill();
        let _ = self.iperf.wait();
    }
}

impl Subject {
    /// Makes nodes and pods; `number` counts the subjects.
    pub(super) fn new(lab: &Lab, dir: &Path, kind: Kind, number: usize) -> Result<Self> {
        let site = Site {
            layout: &lab.layout,
            admin: &lab.kubectl,
            dir,
            prefix: "bench",
            first_address: FIRST_ADDRESS,
        };
        let number = u8::try_from(2 * number).context("too many subjects")?;
        let mut nodes = [
            BareNode::new(site, number)?,
            BareNode::new(site, number + 1)?,
        ];
        let net_conf = dir.join(format!("net-conf-{number}.json"));
        fs::write(&net_conf, kind.net_conf().to_string())?;
        match kind {
            Kind::Native => {}
            Kind::Bridge => bridge(&nodes)?,
            Kind::Hostgw => agents(lab, &mut nodes, "cni-hostgw", &net_conf)?,
            Kind::Vxlan => agents(lab, &mut nodes, "cni-vxlan", &net_conf)?,
            Kind::FlannelHostgw | Kind::FlannelVxlan => flannel(lab, &mut nodes, &net_conf)?,
        }
        let (client, server, address) = match kind {
            Kind::Native => (
                nodes[0].name.clone(),
                nodes[1].name.clone(),
                nodes[1].address.clone(),
            ),
            Kind::Bridge
            | Kind::Hostgw
            | Kind::Vxlan
            | Kind::FlannelHostgw
            | Kind::FlannelVxlan => (nodes[0].pod(), nodes[1].pod(), nodes[1].pod_address()),
        };
        until(
            "the ends reach each other",
            LIMIT,
            || Ok(()),
            || reaches(&client, &address),
        )
        .with_context(|| nodes[0].log("agent") + &nodes[0].log("flannel"))?;
        Ok(Self {
            kind,
            mtu_bytes: mtu_bytes(&client)?,
            iperf: listen(&server, &lab.layout.name)?,
            client,
            server,
            address,
            _nodes: nodes,
        })
    }
}

/// Whether anybody answers; nobody listens yet, so that a refusal is the answer.
fn reaches(netns: &str, address: &str) -> Result<()> {
    let netns = fs::File::open(format!("/run/netns/{netns}"))?;
    let to = format!("{address}:9").parse()?;
    let connect = || TcpStream::connect_timeout(&to, Duration::from_secs(1));
    match in_netns(netns.as_fd(), connect)? {
        Err(error) if error.kind() != std::io::ErrorKind::ConnectionRefused => Err(error.into()),
        Ok(_) | Err(_) => Ok(()),
    }
}

fn mtu_bytes(netns: &str) -> Result<u32> {
    let shown = ip(&["-json", "-n", netns, "link", "show", "eth0"])?;
    let shown: Value = serde_json::from_str(&shown)?;
    let mtu = shown[0]["mtu"].as_u64();
    Ok(u32::try_from(mtu.context("a link without an MTU")?)?)
}

fn listen(netns: &str, lab: &str) -> Result<Child> {
    let mut iperf = command("ip", &["netns", "exec", netns, "iperf3", "--server"]);
    iperf
        .env(OWNER_VARIABLE, lab)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let child = iperf.spawn().context("start iperf3")?;
    // Port 5201 in state LISTEN, as the process's own namespace shows it.
    let table = format!("/proc/{}/net/tcp6", child.id());
    let listens = || {
        let text = fs::read_to_string(&table)?;
        let found = text
            .lines()
            .any(|line| line.contains(":1451 ") && line.contains(" 0A "));
        anyhow::ensure!(found, "not yet");
        Ok(())
    };
    until("iperf3 listens", LIMIT, || Ok(()), listens)?;
    Ok(child)
}

/// Both nodes lead to the other's pods.
fn routes(nodes: &[BareNode; 2]) -> Result<()> {
    for (own, other) in [(&nodes[0], &nodes[1]), (&nodes[1], &nodes[0])] {
        own.run(&["ip", "route", "add", &other.pod_cidr, "via", &other.address])?;
    }
    Ok(())
}

fn bridge(nodes: &[BareNode; 2]) -> Result<()> {
    let plugin = ours::plugins()?.join("cni-bridge");
    for node in nodes {
        let conf = json!({
            "cniVersion": "1.0.0",
            "name": "bench",
            "type": "cni-bridge",
            "isDefaultGateway": true,
            "ipMasq": true,
            "ipMasqExcept": [NETWORK],
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "dataDir": node.dir.join("leases"),
                "ranges": [[{"subnet": node.pod_cidr}]],
            },
        });
        node.add(&plugin, &conf)?;
    }
    routes(nodes)
}

fn agents(lab: &Lab, nodes: &mut [BareNode; 2], name: &'static str, net_conf: &Path) -> Result<()> {
    let programs = ours::network(name)?;
    let agent = programs.agent.context("the network has no agent")?;
    for node in nodes.iter_mut() {
        node.start_agent(&agent, &lab.layout.admin_kubeconfig(), net_conf)?;
    }
    for node in nodes {
        node.ready()?;
        node.add_pod(&programs.plugin)?;
    }
    Ok(())
}

/// flannel with the bridge that flannel's own plugin asks for, and the masquerade that its traffic
/// manager for nftables keeps: the peer's main links neither.
fn flannel(lab: &Lab, nodes: &mut [BareNode; 2], net_conf: &Path) -> Result<()> {
    let bridge = go::stock_peers()?.join("bridge");
    for node in nodes.iter_mut() {
        node.start_flannel(&lab.layout.admin_kubeconfig(), net_conf)?;
    }
    for node in nodes {
        let keeps = || {
            let log = node.log("flannel");
            let line = log.lines().find(|line| line.contains("flannel keeps"));
            let mtu = line.and_then(|line| line.rsplit(' ').next()?.parse::<u32>().ok());
            mtu.context("flannel is not ready")
        };
        let mtu = until("flannel is ready", LIMIT, || Ok(()), keeps)
            .with_context(|| node.log("flannel"))?;
        let conf = json!({
            "cniVersion": "1.0.0",
            "name": "cbr0",
            "type": "bridge",
            "mtu": mtu,
            "hairpinMode": true,
            "ipMasq": false,
            "isGateway": true,
            "isDefaultGateway": true,
            "ipam": {
                "type": "host-local",
                "dataDir": node.dir.join("leases"),
                "ranges": [[{"subnet": node.pod_cidr}]],
                "routes": [{"dst": NETWORK}],
            },
        });
        node.add(&bridge, &conf)?;
        let rules = format!(
            "table ip flannel-ipv4 {{ chain postrtg {{ \
             type nat hook postrouting priority srcnat; \
             meta mark 0x4000 return; \
             ip saddr {own} ip daddr {NETWORK} return; \
             ip saddr {NETWORK} ip daddr {own} return; \
             ip saddr != {own} ip daddr {own} return; \
             ip saddr {NETWORK} ip daddr != 224.0.0.0/4 masquerade fully-random; \
             ip saddr != {NETWORK} ip daddr {NETWORK} masquerade fully-random\n}}\n}}\n",
            own = node.pod_cidr,
        );
        let mut nft = command("ip", &["netns", "exec", &node.name, "nft", "-f", "-"]);
        stdout_with_input(&mut nft, rules.as_bytes())?;
    }
    Ok(())
}
