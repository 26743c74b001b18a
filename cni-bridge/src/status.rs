//! STATUS: whether an ADD would find what it needs.

use cni::attach::address;
use cni::skel::Input;
use cni::types::{AttachResult, CniError, ErrorCode};
use linux::netlink::Rtnl;
use linux::nft::Nft;

use crate::config::BridgeConf;
use crate::network;

pub(crate) fn status(input: &Input<'_>) -> Result<(), CniError> {
    let conf = BridgeConf::parse(input)?;
    let unavailable = |what: &str, e: &linux::netlink::NetlinkError| {
        CniError::caused(ErrorCode::NotAvailable, what, e)
    };
    let mut rtnl = Rtnl::open().map_err(|e| unavailable("no rtnetlink", &e))?;
    let link = rtnl
        .link_by_name(&conf.bridge)
        .map_err(|e| unavailable("no rtnetlink", &e))?;
    let served = link.is_some();
    if let Some(link) = link.filter(|link| link.kind != "bridge") {
        let msg = format!("bridge {:?} exists and is no bridge", link.name);
        return Err(CniError::new(ErrorCode::NotAvailable, msg));
    }
    Nft::open().map_err(|e| unavailable("no nftables", &e))?;
    // What others flushed is put back here too, unless there never was a pod. Where subnets come
    // with each ADD they are not known now.
    let none = AttachResult::default();
    if served && !address::subnets(input, &conf.ipam, &none).is_empty() {
        network::ensure(input, &conf, &none)?;
        network::rules(input, &conf, &none)?.repair()?;
    }
    address::status(input, &conf.ipam)
}
