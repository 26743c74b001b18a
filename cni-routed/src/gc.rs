//! GC: pairs, rules and leases of this network that belong to no valid attachment. Ours are told by their
//! alias; nothing else is touched.

use cni::attach::names;
use cni::ipam::Owner;
use cni::skel::{AttachmentKey, Input};
use cni::types::CniError;
use linux::netlink::{Change, NetlinkError, Rtnl};

use crate::conf::RoutedConf;
use crate::{Routed, kernel, lease};

/// Goes on after a failure and tells the first.
pub(crate) fn gc(
    plugin: &Routed,
    input: &Input<'_>,
    valid: &[AttachmentKey],
) -> Result<(), CniError> {
    let conf = RoutedConf::parse(plugin, input)?;
    let links = collect_links(input, valid).map_err(|e| kernel(&e));
    let is_valid = |owner: &Owner| {
        let same = |key: &AttachmentKey| {
            key.container_id == owner.container_id && key.ifname == owner.ifname
        };
        valid.iter().any(same)
    };
    let rules = conf.rules(input, None).collect(is_valid, valid.is_empty());
    let leases = lease::collect(input, &conf, is_valid);
    links.and(rules).and(leases)
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
            names::host_name(network, &owner)
        })
        .collect();
    let prefix = names::alias_prefix(network);
    let mut rtnl = Rtnl::open()?;
    // Devices for limits are named as their pair is, but for the beginning.
    let mut ours = rtnl.links_of_kind("veth")?;
    ours.extend(rtnl.ifbs()?);
    let changes: Vec<Change> = ours
        .into_iter()
        .filter(|link| link.alias.starts_with(&prefix))
        .filter(|link| !of_valid.contains(&link.name.replacen("fb", "fv", 1)))
        .map(|link| Change::RemoveLink { name: link.name })
        .collect();
    for outcome in rtnl.apply_each(&changes)? {
        outcome?;
    }
    Ok(())
}
