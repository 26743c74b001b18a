//! GC: pairs and leases of this network that belong to no valid attachment. Ours are told by their
//! alias; nothing else is touched.

use cni::ipam::Owner;
use cni::skel::{AttachmentKey, Input};
use cni::types::CniError;
use linux::netlink::{Change, NetlinkError, Rtnl};

use crate::conf::RoutedConf;
use crate::{Routed, kernel, lease, plan};

/// Goes on after a failure and tells the first.
pub(crate) fn gc(
    plugin: &Routed,
    input: &Input<'_>,
    valid: &[AttachmentKey],
) -> Result<(), CniError> {
    let conf = RoutedConf::parse(plugin, input)?;
    let links = collect_links(input, valid).map_err(|e| kernel(&e));
    let leases = lease::collect(input, &conf, valid);
    links.and(leases)
}

fn collect_links(input: &Input<'_>, valid: &[AttachmentKey]) -> Result<(), NetlinkError> {
    let network = &input.conf.name;
    let of_valid: Vec<String> = valid
        .iter()
        .map(|key| {
            let (container_id, ifname) = (key.container_id.clone(), key.ifname.clone());
            let owner = Owner {
                container_id,
                ifname,
            };
            plan::host_name(network, &owner)
        })
        .collect();
    let prefix = plan::alias_prefix(network);
    let mut rtnl = Rtnl::open()?;
    let ours = rtnl.links_of_kind("veth")?.into_iter();
    let changes: Vec<Change> = ours
        .filter(|link| link.alias.starts_with(&prefix) && !of_valid.contains(&link.name))
        .map(|link| Change::RemoveLink { name: link.name })
        .collect();
    for outcome in rtnl.apply_each(&changes)? {
        outcome?;
    }
    Ok(())
}
