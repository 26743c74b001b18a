//! DEL: the pair, then the lease. By container id and interface name alone: the namespace may be
//! empty, dead or wrong, there need be no previous result, and the agent's state may be gone.
//! The kernel takes the route and the neighbours with the link.

use cni::skel::Input;
use cni::types::{CniError, ErrorCode};
use linux::netlink::{Change, Rtnl};

use crate::conf::RoutedConf;
use crate::{Routed, kernel, lease, plan};

pub(crate) fn del(plugin: &Routed, input: &Input<'_>) -> Result<(), CniError> {
    let conf = RoutedConf::parse(plugin, input)?;
    let mut rtnl = Rtnl::open().map_err(|e| kernel(&e))?;
    let name = plan::host_name(&input.conf.name, &input.owner());
    let alias = plan::alias(&input.conf.name, &input.owner());
    match rtnl.link_by_name(&name).map_err(|e| kernel(&e))? {
        None => {}
        Some(link) if !link.alias.is_empty() && link.alias != alias => {
            let msg = format!("link {name} belongs to {:?}, not to {alias:?}", link.alias);
            return Err(CniError::new(ErrorCode::TryAgain, msg));
        }
        Some(_) => rtnl
            .apply(&[Change::RemoveLink { name }])
            .map(|_| ())
            .map_err(|e| kernel(&e))?,
    }
    // The address is given back only after nothing can use it any more.
    lease::free(input, &conf)
}
