//! DEL: the pair, its rules, then the lease. By container id and interface name alone: the namespace may be
//! empty, dead or wrong, there need be no previous result, and the agent's state may be gone.
//! The kernel takes the route and the neighbours with the link.

use cni::attach::names;
use cni::bandwidth;
use cni::skel::Input;
use cni::types::{CniError, ErrorCode};
use linux::netlink::{Change, Rtnl};

use crate::conf::RoutedConf;
use crate::{Routed, kernel, lease};

pub(crate) fn del(plugin: &Routed, input: &Input<'_>) -> Result<(), CniError> {
    let conf = RoutedConf::parse(plugin, input)?;
    let mut rtnl = Rtnl::open().map_err(|e| kernel(&e))?;
    detach(input, &conf, &mut rtnl)
}

/// Takes away everything an attachment has. The address is given back only after nothing can use
/// it any more.
pub(crate) fn detach(
    input: &Input<'_>,
    conf: &RoutedConf,
    rtnl: &mut Rtnl,
) -> Result<(), CniError> {
    let links = remove_links(input, rtnl);
    let rules = conf.rules(input, None).remove(&input.owner());
    links.and(rules)?;
    lease::free(input, conf)
}

fn remove_links(input: &Input<'_>, rtnl: &mut Rtnl) -> Result<(), CniError> {
    let (network, owner) = (&input.conf.name, input.owner());
    let name = names::host_name(network, &owner);
    let alias = names::alias(network, &owner);
    let found = rtnl.link_by_name(&name).map_err(|e| kernel(&e))?;
    if let Some(link) = &found
        && !link.alias.is_empty()
        && link.alias != alias
    {
        let msg = format!("link {name} belongs to {:?}, not to {alias:?}", link.alias);
        return Err(CniError::new(ErrorCode::TryAgain, msg));
    }
    // The device for limits may have outlived the pair.
    let mut changes = vec![bandwidth::removal(network, &owner)];
    if found.is_some() {
        changes.insert(0, Change::RemoveLink { name });
    }
    rtnl.apply(&changes).map(|_| ()).map_err(|e| kernel(&e))
}
