//! GC: pairs, leases and masquerade chains of this network that belong to no valid attachment.

use cni::firewall;
use cni::ipam::Owner;
use cni::skel::{AttachmentKey, Input};
use cni::types::{AttachResult, CniError};
use linux::netlink::{Change, NetlinkError, Rtnl};
use linux::nft::Nft;

use crate::config::{BridgeConf, Ipam};
use crate::{address, kernel, plan};

/// Goes on after a failure and tells the first.
pub(crate) fn gc(input: &Input<'_>, valid: &[AttachmentKey]) -> Result<(), CniError> {
    let conf = BridgeConf::parse(input)?;
    let links = collect_links(input, &conf, valid).map_err(|e| kernel(&e));
    let leases = address::collect(input, &conf.ipam, valid);
    let chains = collect_chains(input, &conf).map_err(|e| kernel(&e));
    links.and(leases).and(chains)
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
            plan::host_name(
                network,
                &Owner {
                    container_id,
                    ifname,
                },
            )
        })
        .collect();
    let prefix = plan::alias_prefix(network);
    let ports = rtnl.ports_of(bridge.index)?;
    let dead = ports
        .into_iter()
        .filter(|port| port.alias.starts_with(&prefix));
    let changes: Vec<Change> = dead
        .filter(|port| !of_valid.contains(&port.name))
        .map(|port| Change::RemoveLink { name: port.name })
        .collect();
    rtnl.apply(&changes).map(|_| ())
}

/// Chains made for a former configuration of this network. With addresses from elsewhere the
/// present one is not known here, so nothing is removed.
fn collect_chains(input: &Input<'_>, conf: &BridgeConf) -> Result<(), NetlinkError> {
    if matches!(conf.ipam, Ipam::Delegated(_)) {
        return Ok(());
    }
    let subnets = address::subnets(input, &conf.ipam, &AttachResult::default());
    let present = firewall::masquerade(&input.conf.name, &subnets, &conf.masquerade_except).name;
    let prefix = firewall::masquerade_prefix(&input.conf.name);
    let mut nft = Nft::open()?;
    for chain in nft.chains()? {
        let stale = chain != present || !conf.masquerade;
        if chain.starts_with(&prefix) && stale {
            nft.remove_chain(&chain)?;
        }
    }
    Ok(())
}
