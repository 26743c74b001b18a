//! GC: pairs, rules and leases of this network that belong to no valid attachment, and the
//! network's own rules when there is none at all.

use cni::attach::{address, names};
use cni::firewall::{self, xtables};
use cni::ipam::Owner;
use cni::records::Backend;
use cni::skel::{AttachmentKey, Input};
use cni::types::{AttachResult, CniError};
use linux::netlink::{Change, NetlinkError, Rtnl};
use linux::nft::Nft;

use crate::config::BridgeConf;
use crate::{kernel, network};

/// Goes on after a failure and tells the first.
pub(crate) fn gc(input: &Input<'_>, valid: &[AttachmentKey]) -> Result<(), CniError> {
    let conf = BridgeConf::parse(input)?;
    let links = collect_links(input, &conf, valid).map_err(|e| kernel(&e));
    let is_valid = |owner: &Owner| {
        let same = |key: &AttachmentKey| {
            key.container_id == owner.container_id && key.ifname == owner.ifname
        };
        valid.iter().any(same)
    };
    let rules = network::rules(input, &conf, &AttachResult::default())
        .and_then(|rules| rules.collect(is_valid, valid.is_empty()));
    let leases = address::collect(input, &conf.ipam, valid);
    let chains = collect_chains(input, &conf, valid);
    links.and(rules).and(leases).and(chains)
}

/// Ours are told by their alias; a port that someone else put on the bridge is not touched.
fn collect_links(
    input: &Input<'_>,
    conf: &BridgeConf,
    valid: &[AttachmentKey],
) -> Result<(), NetlinkError> {
    let mut rtnl = Rtnl::open()?;
    let Some(bridge) = rtnl.link_by_name(&conf.bridge)? else {
        return Ok(());
    };
    let network = &input.conf.name;
    let of_valid: Vec<String> = valid
        .iter()
        .map(|key| {
            let (container_id, ifname) = (key.container_id.clone(), key.ifname.clone());
            names::host_name(
                network,
                &Owner {
                    container_id,
                    ifname,
                },
            )
        })
        .collect();
    let prefix = names::alias_prefix(network);
    let ports = rtnl.ports_of(bridge.index)?;
    let dead = ports
        .into_iter()
        .filter(|port| port.alias.starts_with(&prefix));
    let mut changes: Vec<Change> = dead
        .filter(|port| !of_valid.contains(&port.name))
        .map(|port| Change::RemoveLink { name: port.name })
        .collect();
    // Devices for limits: named as their pair is, but for the beginning.
    let limiters = rtnl.ifbs()?.into_iter();
    let dead = limiters.filter(|link| link.alias.starts_with(&prefix));
    changes.extend(
        dead.filter(|link| !of_valid.contains(&link.name.replacen("fb", "fv", 1)))
            .map(|link| Change::RemoveLink { name: link.name }),
    );
    rtnl.apply(&changes).map(|_| ())
}

/// Chains are the network's, not an attachment's: one made for a former configuration still serves
/// the pods of that time. They go when nobody is left; the next ADD makes its own again.
fn collect_chains(
    input: &Input<'_>,
    conf: &BridgeConf,
    valid: &[AttachmentKey],
) -> Result<(), CniError> {
    if !valid.is_empty() {
        return Ok(());
    }
    let prefix = firewall::masquerade_prefix(&input.conf.name);
    let by_nft = || -> Result<(), NetlinkError> {
        let mut nft = Nft::open()?;
        for chain in nft.chains()? {
            if chain.starts_with(&prefix) {
                nft.remove_chain(&chain)?;
            }
        }
        firewall::stop_isolating(&mut nft, &conf.bridge)
    };
    let removed = by_nft().map_err(|e| kernel(&e));
    let asked = [conf.masquerade, Some(conf.ports.backend)];
    if asked.contains(&Some(Backend::Iptables)) {
        return removed.and(xtables::remove_network(&input.conf.name));
    }
    removed
}
