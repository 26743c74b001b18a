//! STATUS: whether an ADD would find what it needs.

use cni::skel::Input;
use cni::types::{CniError, ErrorCode};
use linux::netlink::Rtnl;
use linux::nft::Nft;

use crate::address;
use crate::config::BridgeConf;

pub(crate) fn status(input: &Input<'_>) -> Result<(), CniError> {
    let conf = BridgeConf::parse(input)?;
    let unavailable = |what: &str, e: &linux::netlink::NetlinkError| {
        CniError::caused(ErrorCode::NotAvailable, what, e)
    };
    let mut rtnl = Rtnl::open().map_err(|e| unavailable("no rtnetlink", &e))?;
    let link = rtnl
        .link_by_name(&conf.bridge)
        .map_err(|e| unavailable("no rtnetlink", &e))?;
    if let Some(link) = link.filter(|link| link.kind != "bridge") {
        let msg = format!("bridge {:?} exists and is no bridge", link.name);
        return Err(CniError::new(ErrorCode::NotAvailable, msg));
    }
    if conf.masquerade {
        Nft::open().map_err(|e| unavailable("no nftables", &e))?;
    }
    address::status(input, &conf.ipam)
}
