//! Pure: from what the nodes say and where this node stands, what its kernel shall hold; and from
//! what it holds, what to change. No IO, no clock, no channel.
//!
//! ```text
//!  vxlan    route 10.244.2.0/24 via 10.244.2.0 dev fvx.1 onlink
//!           neighbour 10.244.2.0 = VTEP's hardware address      (per peer and family)
//!           forwarding entry VTEP's hardware address = peer's address
//!  next hop route 10.244.2.0/24 via peer's address              (host-gw, DirectRouting)
//!  both     blackhole of our own podCIDRs, our gateways as local addresses
//! ```
//!
//! The layout of the first is flannel's, so that a node of either kind reaches the other.

mod diff;
mod underlay;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use cni_routed::PEER_ROUTE_PROTOCOL;
use ipnet::IpNet;
use linux::netlink::{
    FdbSpec, Mac, NeighbourSpec, NodeHop, NodeRoute, TABLE_LOCAL, TABLE_MAIN, VxlanConfig,
    VxlanSpec,
};

use crate::netconf::{Backend, NetConf};
use crate::node::{Announcement, Endpoint, Family, PeerNode, PerFamily};

pub(crate) use diff::{fdb_changes, neighbour_changes, route_changes};
pub(crate) use underlay::{LinkFacts, Underlay, UnderlayWish, choose};

/// What the outer headers take: Ethernet 14, IP 20 or 40, UDP 8, VXLAN 8.
const OVERHEAD_V4_BYTES: u32 = 50;
const OVERHEAD_V6_BYTES: u32 = 70;

/// Metric of routes that count when there is no other.
const LAST_METRIC: u32 = u32::MAX;

/// Begins the alias of every device of ours.
pub(crate) const ALIAS: &str = "ferrule-peers:";

/// A VXLAN device to be kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DevicePlan {
    pub(crate) family: Family,
    pub(crate) spec: VxlanSpec,
    /// Its one address, a network of its own: the first of our podCIDR. What this node itself
    /// sends to other nodes' pods comes from there.
    pub(crate) address: IpAddr,
}

/// This node, as far as planning needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place<'a> {
    pub(crate) backend: Backend,
    pub(crate) conf: &'a NetConf,
    pub(crate) own: &'a PeerNode,
    pub(crate) underlays: &'a PerFamily<Option<Underlay>>,
}

/// The part of our podCIDRs that is of a family. One each, by the API's own rule.
pub(crate) fn pod_cidr(node: &PeerNode, family: Family) -> Option<IpNet> {
    let mut same = node.pod_cidrs.iter();
    same.find(|net| Family::of_net(net) == family).copied()
}

/// Hardware address of a node's VXLAN device: always the same for the same node and network, so
/// that a device made again needs no word to the peers. Locally administered.
pub(crate) fn vtep_mac(node: &str, vni: u32, family: Family) -> Mac {
    let key = format!("{node}\0{vni}\0{}", family.as_str());
    let sum = key.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mixed = (sum ^ (sum >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let [_, _, a, b, c, d, e, f] = (mixed ^ (mixed >> 33)).to_be_bytes();
    Mac([(a & 0xfc) | 0x02, b, c, d, e, f])
}

impl Place<'_> {
    /// The VXLAN devices of this node: one per family that has a podCIDR and an underlay.
    pub(crate) fn devices(&self) -> Vec<DevicePlan> {
        match self.backend {
            Backend::HostGw => Vec::new(),
            Backend::Vxlan => {
                let devices = Family::BOTH
                    .iter()
                    .filter_map(|family| self.device(*family));
                devices.collect()
            }
        }
    }

    fn device(&self, family: Family) -> Option<DevicePlan> {
        let pods = pod_cidr(self.own, family)?;
        let underlay = self.underlays.of(family).as_ref()?;
        let vni = self.conf.vni;
        let name = match family {
            Family::V4 => format!("fvx.{vni}"),
            Family::V6 => format!("fvx6.{vni}"),
        };
        Some(DevicePlan {
            family,
            address: pods.network(),
            spec: VxlanSpec {
                mac: vtep_mac(&self.own.name, vni, family),
                mtu_bytes: self.mtu(family, underlay),
                alias: format!("{ALIAS}{name}"),
                name,
                config: VxlanConfig {
                    vni,
                    port: self.conf.port,
                    local: Some(underlay.address),
                    underlay: Some(underlay.index),
                    learning: self.conf.learning,
                    gbp: self.conf.gbp,
                },
            },
        })
    }

    fn mtu(&self, family: Family, underlay: &Underlay) -> u32 {
        let overhead = match (self.backend, family) {
            (Backend::HostGw, _) => 0,
            (Backend::Vxlan, Family::V4) => OVERHEAD_V4_BYTES,
            (Backend::Vxlan, Family::V6) => OVERHEAD_V6_BYTES,
        };
        let fits = underlay.mtu_bytes.saturating_sub(overhead);
        self.conf.mtu_bytes.map_or(fits, |asked| asked.min(fits))
    }

    /// MTU of a pod's interface: what fits through every family in use. None without underlay.
    pub(crate) fn pod_mtu(&self) -> Option<u32> {
        let of = |family: &Family| {
            pod_cidr(self.own, *family)?;
            let underlay = self.underlays.of(*family).as_ref()?;
            Some(self.mtu(*family, underlay))
        };
        Family::BOTH.iter().filter_map(of).min()
    }

    /// What keeps this node from serving a family it has a podCIDR for.
    pub(crate) fn lacking(&self) -> Option<String> {
        if self.own.pod_cidrs.is_empty() {
            return Some(format!(
                "node {} has no podCIDR yet (the controller manager gives them, with \
                 --allocate-node-cidrs and --cluster-cidr)",
                self.own.name
            ));
        }
        for family in Family::BOTH {
            let Some(pods) = pod_cidr(self.own, family) else {
                continue;
            };
            let words = family.as_str();
            if self.underlays.of(family).is_none() {
                return Some(format!(
                    "podCIDR {pods} is {words}, but no interface with an {words} address was \
                     found: the node's InternalIPs are {:?} (see --iface)",
                    self.own.addresses
                ));
            }
            let inside = |net: &IpNet| net.contains(&pods);
            if !self.conf.networks.iter().any(inside) {
                return Some(format!(
                    "podCIDR {pods} of this node lies in no network of the configuration ({})",
                    shown(&self.conf.networks)
                ));
            }
        }
        None
    }

    /// What this node tells the others.
    pub(crate) fn announcement(&self) -> Announcement {
        let mut endpoints = PerFamily::default();
        for family in Family::BOTH {
            if pod_cidr(self.own, family).is_none() {
                continue;
            }
            *endpoints.of_mut(family) = self.underlays.of(family).as_ref().map(|underlay| {
                let overwritten = *self.own.overwrite.of(family);
                Endpoint {
                    address: overwritten.unwrap_or(underlay.public),
                    mac: match self.backend {
                        Backend::Vxlan => Some(vtep_mac(&self.own.name, self.conf.vni, family)),
                        Backend::HostGw => None,
                    },
                }
            });
        }
        Announcement {
            backend: self.backend,
            vni: self.conf.vni,
            endpoints,
        }
    }
}

fn shown(networks: &[IpNet]) -> String {
    let all: Vec<String> = networks.iter().map(ToString::to_string).collect();
    all.join(", ")
}

/// A peer that is left out, in one family or wholly, and why.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Skipped {
    pub(crate) node: String,
    pub(crate) why: String,
}

/// What the kernel shall hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) routes: Vec<NodeRoute>,
    pub(crate) neighbours: Vec<NeighbourSpec>,
    pub(crate) fdb: Vec<FdbSpec>,
    pub(crate) skipped: Vec<Skipped>,
    /// Peers that are reached, counted once per family.
    pub(crate) reached: usize,
}

/// Indices of the links that routes lead over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Indices {
    pub(crate) devices: PerFamily<Option<u32>>,
    /// Of the loopback link.
    pub(crate) loopback: u32,
}

/// Plans routes, neighbours and forwarding entries for all peers.
pub(crate) fn wanted<'a>(
    place: &Place<'_>,
    indices: &Indices,
    peers: impl Iterator<Item = &'a PeerNode>,
) -> Wanted {
    let mut planning = Planning {
        place,
        indices,
        wanted: Wanted::default(),
        networks: BTreeMap::new(),
        macs: HashMap::new(),
    };
    planning.own();
    // Maps of nodes are ordered by name: of two that claim one network always the same wins.
    for peer in peers.filter(|peer| peer.name != place.own.name) {
        for cidr in &peer.pod_cidrs {
            match planning.peer(peer, *cidr) {
                Ok(()) => planning.wanted.reached += 1,
                Err(why) => planning.wanted.skipped.push(Skipped {
                    node: peer.name.clone(),
                    why,
                }),
            }
        }
    }
    planning.wanted
}

struct Planning<'a> {
    place: &'a Place<'a>,
    indices: &'a Indices,
    wanted: Wanted,
    /// Who has which network already, by first address (as a number with its family).
    networks: BTreeMap<IpAddr, (IpNet, String)>,
    macs: HashMap<Mac, String>,
}

impl Planning<'_> {
    /// Of packets to an address of ours that no pod has, none shall wander off by the default
    /// route; and pods may ask their gateway.
    fn own(&mut self) {
        for net in &self.place.own.pod_cidrs {
            let name = self.place.own.name.clone();
            self.networks.insert(net.network(), (*net, name));
            self.wanted.routes.push(NodeRoute {
                destination: net.network(),
                prefix_len: net.prefix_len(),
                hop: NodeHop::Blackhole,
                source: None,
                // Behind every other: a bridge with pods of a former network may have the same.
                metric: Some(LAST_METRIC),
                table: TABLE_MAIN,
                protocol: PEER_ROUTE_PROTOCOL,
            });
            if let Some(gateway) = net.hosts().next().map(|first| after_network(net, first)) {
                self.wanted.routes.push(NodeRoute {
                    destination: gateway,
                    prefix_len: net.max_prefix_len(),
                    hop: NodeHop::Local {
                        index: self.indices.loopback,
                    },
                    source: None,
                    metric: None,
                    table: TABLE_LOCAL,
                    protocol: PEER_ROUTE_PROTOCOL,
                });
            }
        }
    }

    fn peer(&mut self, peer: &PeerNode, cidr: IpNet) -> Result<(), String> {
        let family = Family::of_net(&cidr);
        let underlay = self.place.underlays.of(family).as_ref();
        let underlay =
            underlay.ok_or_else(|| format!("this node has no {} of its own", family.as_str()))?;
        let announced = peer.backend.as_deref();
        if let Some(other) = announced.filter(|name| *name != self.place.backend.as_str()) {
            return Err(format!("it announces back end {other:?}"));
        }
        let endpoint = *peer.endpoints.of(family);
        let address = match (endpoint, self.place.backend) {
            (Some(endpoint), _) => endpoint.address,
            // A next hop needs no more than the address that every node has.
            (None, Backend::HostGw) => {
                let mut same = peer.addresses.iter();
                let found = same
                    .find(|address| Family::of(**address) == family)
                    .copied();
                found.ok_or_else(|| format!("it has no {} InternalIP", family.as_str()))?
            }
            (None, Backend::Vxlan) => {
                let words = family.as_str();
                return Err(format!("it announces no {words} address yet"));
            }
        };
        if address == underlay.address || address == underlay.public {
            return Err(format!("it announces our own address {address}"));
        }
        self.claim(peer, cidr)?;
        let near = underlay.on_link.iter().any(|net| net.contains(&address));
        let hop = match (self.place.backend, near) {
            (Backend::HostGw, true) => self.next_hop(address, underlay.index),
            (Backend::Vxlan, true) if self.place.conf.direct_routing => {
                self.next_hop(address, underlay.index)
            }
            (Backend::HostGw, false) => {
                self.networks.remove(&cidr.network());
                return Err(format!(
                    "its address {address} is not on the network of {} ({}), as host-gw needs",
                    underlay.name,
                    shown(&underlay.on_link)
                ));
            }
            (Backend::Vxlan, _) => match self.tunnel(peer, cidr, address) {
                Ok(hop) => hop,
                Err(why) => {
                    self.networks.remove(&cidr.network());
                    return Err(why);
                }
            },
        };
        self.wanted.routes.push(NodeRoute {
            destination: cidr.network(),
            prefix_len: cidr.prefix_len(),
            hop,
            source: None,
            metric: None,
            table: TABLE_MAIN,
            protocol: PEER_ROUTE_PROTOCOL,
        });
        Ok(())
    }

    fn next_hop(&self, gateway: IpAddr, index: u32) -> NodeHop {
        NodeHop::Gateway {
            gateway,
            index,
            onlink: false,
        }
    }

    fn tunnel(&mut self, peer: &PeerNode, cidr: IpNet, address: IpAddr) -> Result<NodeHop, String> {
        let family = Family::of_net(&cidr);
        let index = *self.indices.devices.of(family);
        let index = index.ok_or("our vxlan device is missing")?;
        if let Some(vni) = peer.vni.filter(|vni| *vni != self.place.conf.vni) {
            return Err(format!(
                "it announces VNI {vni}, ours is {}",
                self.place.conf.vni
            ));
        }
        let mac = peer.endpoints.of(family).and_then(|endpoint| endpoint.mac);
        let mac = mac.ok_or("it announces no hardware address of a vxlan device")?;
        if mac == vtep_mac(&self.place.own.name, self.place.conf.vni, family) {
            return Err(format!("it announces our own hardware address {mac}"));
        }
        if let Some(other) = self.macs.get(&mac).filter(|other| **other != peer.name) {
            return Err(format!(
                "it announces hardware address {mac}, as node {other} does"
            ));
        }
        self.macs.insert(mac, peer.name.clone());
        let remote = cidr.network();
        self.wanted.neighbours.push(NeighbourSpec {
            index,
            address: remote,
            mac,
        });
        self.wanted.fdb.push(FdbSpec {
            index,
            mac,
            destination: address,
        });
        Ok(NodeHop::Gateway {
            gateway: remote,
            index,
            onlink: true,
        })
    }

    /// Two nodes with one network would take turns.
    fn claim(&mut self, peer: &PeerNode, cidr: IpNet) -> Result<(), String> {
        // Networks either nest or are apart: the one that begins last at or before our end is the
        // only one that can overlap.
        let last = self.networks.range(..=cidr.broadcast()).next_back();
        if let Some((_, (taken, owner))) = last
            && Family::of_net(taken) == Family::of_net(&cidr)
            && (taken.contains(&cidr) || cidr.contains(taken))
        {
            return Err(format!(
                "its podCIDR {cidr} overlaps {taken} of node {owner}"
            ));
        }
        self.networks
            .insert(cidr.network(), (cidr, peer.name.clone()));
        Ok(())
    }
}

/// The gateway that the plugin gives to pods: the address after the network's own. Of an IPv6
/// network `hosts` begins with the network's own address.
fn after_network(net: &IpNet, first: IpAddr) -> IpAddr {
    match (net, first) {
        (IpNet::V6(_), IpAddr::V6(v6)) if first == net.network() => {
            IpAddr::V6((u128::from(v6) + 1).into())
        }
        (_, first) => first,
    }
}

#[cfg(test)]
mod tests;
