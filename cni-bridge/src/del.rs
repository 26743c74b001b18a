//! DEL: the rules, then the pair, then the lease. By container id and interface name alone: the
//! namespace may be empty, dead or wrong, and there need be no previous result.

use cni::skel::Input;
use cni::types::CniError;
use linux::netlink::Rtnl;

use crate::config::BridgeConf;
use crate::{kernel, network};

pub(crate) fn del(input: &Input<'_>) -> Result<(), CniError> {
    let conf = BridgeConf::parse(input)?;
    let mut rtnl = Rtnl::open().map_err(|e| kernel(&e))?;
    network::detach(input, &conf, &mut rtnl)
}
