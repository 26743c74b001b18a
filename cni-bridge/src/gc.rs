//! GC: pairs and leases of this network that belong to no valid attachment, and its masquerade
//! chains when there is none at all.

use cni::firewall;
use cni::ipam::Owner;
use cni::skel::{AttachmentKey, Input};
use cni::types::CniError;
use linux::netlink::{Change, NetlinkError, Rtnl};
use linux::nft::Nft;

use crate::config::BridgeConf;
use crate::{address, kernel, plan};

/// Goes on after a failure and tells the first.
pub(crate) fn gc(input: &Input<'_>, valid: &[AttachmentKey]) -> Result<(), CniError> {
    let conf = BridgeConf::parse(input)?;
    let links = collect_links(input, &conf, valid).map_err(|e| kernel(&e));
    let leases = address::collect(input, &conf.ipam, valid);
    let chains = collect_chains(input, valid).map_err(|e| kernel(&e));
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

/// Chains are the network's, not an attachment's: one made for a former configuration still serves
/// the pods of that time. They go when nobody is left; the next ADD makes its own again.
fn collect_chains(input: &Input<'_>, valid: &[AttachmentKey]) -> Result<(), NetlinkError> {
    if !valid.is_empty() {
        return Ok(());
    }
    let prefix = firewall::masquerade_prefix(&input.conf.name);
    let mut nft = Nft::open()?;
    for chain in nft.chains()? {
        if chain.starts_with(&prefix) {
            nft.remove_chain(&chain)?;
        }
    }
    Ok(())
}
