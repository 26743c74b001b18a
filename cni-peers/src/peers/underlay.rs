//! Which interface of the node its peers are reached by: the one asked for, else the one that has
//! the node's InternalIP, else the one of the default route.

use std::net::IpAddr;

use ipnet::IpNet;
use linux::netlink::{AddressSpec, Link, NodeHop, NodeRoute, TABLE_MAIN};

use crate::node::Family;

/// The node's own network in one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Underlay {
    pub(crate) index: u32,
    pub(crate) name: String,
    /// Source of what leaves.
    pub(crate) address: IpAddr,
    /// What others shall use: differs behind address translation.
    pub(crate) public: IpAddr,
    /// Networks whose members are neighbours.
    pub(crate) on_link: Vec<IpNet>,
    pub(crate) mtu_bytes: u32,
    /// It is up.
    pub(crate) up: bool,
}

/// What flags and the Node object say about it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct UnderlayWish {
    /// `--iface`: a name or an address.
    pub(crate) interface: Option<String>,
    /// `--public-ip`, `--public-ipv6`.
    pub(crate) public: Vec<IpAddr>,
    /// The Node's InternalIPs.
    pub(crate) internal: Vec<IpAddr>,
}

/// What the kernel says about the links that matter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LinkFacts {
    pub(crate) addresses: Vec<AddressSpec>,
    /// Of the main table.
    pub(crate) routes: Vec<NodeRoute>,
    /// The links of those addresses.
    pub(crate) links: Vec<Link>,
}

/// Finds the underlay of a family; none when no interface has an address of it.
pub(crate) fn choose(family: Family, wish: &UnderlayWish, facts: &LinkFacts) -> Option<Underlay> {
    let usable = |address: &&AddressSpec| {
        Family::of(address.address) == family
            && !address.address.is_loopback()
            && !link_local(address.address)
    };
    let candidates: Vec<&AddressSpec> = facts.addresses.iter().filter(usable).collect();
    let chosen = match &wish.interface {
        Some(asked) => asked_for(asked, &candidates, facts, &wish.internal),
        None => {
            let internal = wish.internal.iter();
            let mut same = internal.filter(|address| Family::of(**address) == family);
            let by_internal =
                same.find_map(|wanted| candidates.iter().find(|c| c.address == *wanted).copied());
            by_internal.or_else(|| by_default_route(family, &candidates, facts))
        }
    }?;
    let link = facts.links.iter().find(|link| link.index == chosen.index)?;
    let on_link = candidates
        .iter()
        .filter(|address| address.index == chosen.index)
        .filter_map(|address| IpNet::new(address.address, address.prefix_len).ok())
        .map(|net| net.trunc())
        .filter(|net| net.prefix_len() < net.max_prefix_len())
        .collect();
    let told = wish
        .public
        .iter()
        .find(|address| Family::of(**address) == family);
    Some(Underlay {
        index: link.index,
        name: link.name.clone(),
        address: chosen.address,
        public: told.copied().unwrap_or(chosen.address),
        on_link,
        mtu_bytes: link.mtu_bytes,
        up: link.up,
    })
}

fn asked_for<'a>(
    asked: &str,
    candidates: &[&'a AddressSpec],
    facts: &LinkFacts,
    internal: &[IpAddr],
) -> Option<&'a AddressSpec> {
    if let Ok(address) = asked.parse::<IpAddr>() {
        // An address of one family names the interface for both.
        let index = facts.addresses.iter().find(|a| a.address == address)?.index;
        let exact = candidates.iter().find(|c| c.address == address);
        return exact
            .or_else(|| candidates.iter().find(|c| c.index == index))
            .copied();
    }
    let index = facts.links.iter().find(|link| link.name == asked)?.index;
    let mut on_it = candidates
        .iter()
        .filter(|candidate| candidate.index == index);
    let known = on_it
        .clone()
        .find(|candidate| internal.contains(&candidate.address));
    known.or_else(|| on_it.next()).copied()
}

fn by_default_route<'a>(
    family: Family,
    candidates: &[&'a AddressSpec],
    facts: &LinkFacts,
) -> Option<&'a AddressSpec> {
    let mut defaults: Vec<&NodeRoute> = facts
        .routes
        .iter()
        .filter(|r| {
            r.table == TABLE_MAIN && r.prefix_len == 0 && Family::of(r.destination) == family
        })
        .collect();
    defaults.sort_by_key(|route| route.metric.unwrap_or(0));
    defaults.iter().find_map(|route| {
        let index = match route.hop {
            NodeHop::Gateway { index, .. } | NodeHop::Link { index } => index,
            NodeHop::Local { .. } | NodeHop::Blackhole => return None,
        };
        candidates
            .iter()
            .find(|candidate| candidate.index == index)
            .copied()
    })
}

fn link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}
