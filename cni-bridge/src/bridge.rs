//! The bridge itself: made when it is not there, up, with the gateways' addresses.

use std::fs::File;
use std::os::fd::AsRawFd;

use cni::attach::names;
use cni::ipam::Owner;
use cni::keys;
use cni::types::{AttachResult, CniError, ErrorCode};
use ipnet::IpNet;
use linux::netlink::{AddressSpec, BridgeSpec, Change, Link, Outcome, PortVlan, Rtnl, VethSpec};
use linux::sysctl::{Sysctl, SysctlError};

use crate::config::BridgeConf;
use crate::kernel;

/// A gateway is needed where the bridge is one; foreign IPAM plugins may leave it out, and the
/// reference then takes the subnet's first address.
pub(crate) fn fill_gateways(conf: &BridgeConf, result: &mut AttachResult) -> Result<(), CniError> {
    if !conf.is_gateway {
        return Ok(());
    }
    for ip in &mut result.ips {
        if ip.gateway.is_none() {
            let first = ip.address.hosts().next();
            ip.gateway = first.filter(|gateway| *gateway != ip.address.addr());
        }
        if ip.gateway.is_none() {
            let msg = format!(
                "isGateway: subnet of {} has no room for a gateway",
                ip.address
            );
            return Err(CniError::new(ErrorCode::InvalidConfig, msg));
        }
    }
    Ok(())
}

/// The bridge, up and as configured.
pub(crate) fn ensure(
    conf: &BridgeConf,
    gateways: &[IpNet],
    rtnl: &mut Rtnl,
) -> Result<Link, CniError> {
    let found = rtnl.link_by_name(&conf.bridge).map_err(|e| kernel(&e))?;
    let (bridge, made) = match found {
        Some(bridge) => (bridge, false),
        None => (make(conf, gateways, rtnl)?, true),
    };
    if bridge.kind != "bridge" {
        let kind = if bridge.kind.is_empty() {
            "hardware"
        } else {
            &bridge.kind
        };
        let msg = format!(
            "bridge {:?} exists and is no bridge but {kind}",
            conf.bridge
        );
        return Err(CniError::new(ErrorCode::InvalidConfig, msg));
    }
    let index = bridge.index;
    let mut changes = Vec::new();
    if !bridge.up {
        changes.push(Change::SetUp { index, up: true });
    }
    if conf.promiscuous && !bridge.promiscuous {
        changes.push(Change::SetPromiscuous { index, on: true });
    }
    if let Some(key) = conf.vlans.asking() {
        if bridge.default_vlan.is_none() {
            if made {
                let name = conf.bridge.clone();
                let _ = rtnl.apply(&[Change::RemoveLink { name }]);
            }
            let problem = "needs a kernel with VLAN filtering on bridges, which this one lacks";
            return Err(keys::unsupported(key, problem));
        }
        if !bridge.vlan_filtering {
            changes.push(Change::FilterVlans { index });
        }
    }
    rtnl.apply(&changes).map_err(|e| kernel(&e))?;
    Ok(bridge)
}

fn make(conf: &BridgeConf, gateways: &[IpNet], rtnl: &mut Rtnl) -> Result<Link, CniError> {
    let mac = names::bridge_mac(&conf.bridge, gateways.first().map(IpNet::addr));
    let spec = BridgeSpec {
        name: conf.bridge.clone(),
        mac: Some(mac),
        mtu_bytes: conf.mtu_bytes,
    };
    rtnl.apply(&[Change::AddBridge(spec)])
        .map_err(|e| kernel(&e))?;
    // Routers beyond the bridge are not the node's. And nobody else can have the bridge's own
    // address: while it is being looked for (a second or two) the node could not ask for the
    // pods' hardware addresses. Without IPv6 there are no such parameters.
    for parameter in ["accept_ra", "accept_dad"] {
        let _ = Sysctl::of(&["net", "ipv6", "conf", &conf.bridge, parameter])
            .and_then(|parameter| parameter.ensure("0"));
    }
    let made = rtnl.link_by_name(&conf.bridge).map_err(|e| kernel(&e))?;
    made.ok_or_else(|| {
        let msg = format!("bridge {} vanished while it was made", conf.bridge);
        CniError::new(ErrorCode::TryAgain, msg)
    })
}

/// What makes a port of the bridge part of the configured VLANs.
pub(crate) fn port_vlans(conf: &BridgeConf, bridge: &Link, index: u32) -> Vec<Change> {
    let vlans = &conf.vlans;
    if vlans.asking().is_none() {
        return Vec::new();
    }
    let vlan = |id, native| PortVlan { index, id, native };
    let mut changes = Vec::new();
    let default = bridge.default_vlan.filter(|id| *id > 0);
    if let Some(id) = default.filter(|_| !vlans.preserve_default) {
        changes.push(Change::RemoveVlan(vlan(id, true)));
    }
    // A trunk without a native VLAN has VLAN 1, as in the reference.
    changes.push(Change::AddVlan(vlan(vlans.native.unwrap_or(1), true)));
    let tagged = vlans.trunk.iter().filter(|id| Some(**id) != vlans.native);
    changes.extend(tagged.map(|id| Change::AddVlan(vlan(*id, false))));
    changes
}

/// Gives the gateways' addresses to the bridge, or in a VLAN to a link that is the node's in that
/// VLAN, and lets the node forward. Returns that link when it is another than the bridge.
pub(crate) fn ensure_gateway(
    conf: &BridgeConf,
    bridge: &Link,
    gateways: &[IpNet],
    rtnl: &mut Rtnl,
) -> Result<Option<Link>, CniError> {
    let in_vlan = match conf.vlans.native {
        Some(id) if !gateways.is_empty() => Some(vlan_link(conf, bridge, id, rtnl)?),
        Some(_) | None => None,
    };
    let link = in_vlan.as_ref().unwrap_or(bridge);
    let changes: Vec<Change> = gateways
        .iter()
        .map(|net| Change::AddAddress(address_of(link, net)))
        .collect();
    let outcomes = rtnl.apply(&changes).map_err(|e| kernel(&e))?;
    if outcomes.contains(&Outcome::Done) {
        // Only a bridge that had not all of them may carry others.
        settle_other_addresses(conf, link, gateways, rtnl)?;
    }
    forward(gateways)
        .map_err(|e| CniError::caused(ErrorCode::Kernel, "let the node forward", &e))?;
    Ok(in_vlan)
}

/// Name of the node's link in a VLAN of a bridge.
pub(crate) fn vlan_link_name(bridge: &str, id: u16) -> String {
    format!("{bridge}.{id}")
}

/// The node's link in a VLAN: one end of a pair whose other end is a port of the bridge. It is
/// set up last: one that is down may be half made, and is finished.
fn vlan_link(conf: &BridgeConf, bridge: &Link, id: u16, rtnl: &mut Rtnl) -> Result<Link, CniError> {
    let name = vlan_link_name(&conf.bridge, id);
    let found = rtnl.link_by_name(&name).map_err(|e| kernel(&e))?;
    if let Some(link) = found.filter(|link| link.up) {
        return Ok(link);
    }
    let own = File::open("/proc/self/ns/net")
        .map_err(|e| CniError::caused(ErrorCode::Io, "open the node's network namespace", &e))?;
    let owner = Owner {
        container_id: name.clone(),
        ifname: String::new(),
    };
    let port = names::host_name("gateway", &owner);
    let spec = VethSpec {
        mac: names::host_mac(&port),
        master: Some(bridge.index),
        mtu_bytes: conf.mtu_bytes,
        peer_name: name.clone(),
        peer_mac: names::host_mac(&name),
        peer_netns: own.as_raw_fd(),
        name: port.clone(),
    };
    // A pair that is there already is left as it is.
    rtnl.apply(&[Change::AddVeth(spec)])
        .map_err(|e| kernel(&e))?;
    let find = |rtnl: &mut Rtnl, name: &str| {
        let link = rtnl.link_by_name(name).map_err(|e| kernel(&e))?;
        let vanished = || format!("link {name} vanished while it was made");
        link.ok_or_else(|| CniError::new(ErrorCode::TryAgain, vanished()))
    };
    let port = find(rtnl, &port)?.index;
    let link = find(rtnl, &name)?;
    let mut changes = port_vlans(conf, bridge, port);
    let index = link.index;
    changes.push(Change::SetUp {
        index: port,
        up: true,
    });
    changes.push(Change::SetUp { index, up: true });
    rtnl.apply(&changes).map_err(|e| kernel(&e))?;
    Ok(link)
}

/// Other addresses of the bridge that share a subnet with a gateway: removed when forced, else
/// an error, and the gateway is not left beside them.
fn settle_other_addresses(
    conf: &BridgeConf,
    link: &Link,
    gateways: &[IpNet],
    rtnl: &mut Rtnl,
) -> Result<(), CniError> {
    let mut remove = Vec::new();
    for other in rtnl.addresses_of(link.index).map_err(|e| kernel(&e))? {
        let Ok(net) = IpNet::new(other.address, other.prefix_len) else {
            continue;
        };
        let shares = |gw: &IpNet| gw.contains(&net.addr()) || net.contains(&gw.addr());
        if gateways.contains(&net) || !gateways.iter().any(shares) {
            continue;
        }
        if !conf.force_address {
            let undo = gateways
                .iter()
                .map(|net| Change::RemoveAddress(address_of(link, net)));
            let _ = rtnl.apply(&undo.collect::<Vec<_>>());
            let msg = format!(
                "bridge {} has address {net} already; forceAddress would replace it",
                link.name
            );
            return Err(CniError::new(ErrorCode::InvalidConfig, msg));
        }
        remove.push(Change::RemoveAddress(other));
    }
    if remove.is_empty() {
        return Ok(());
    }
    // Addresses of one subnet hang together: with the first the kernel removes the later ones,
    // ours among them.
    let again = gateways
        .iter()
        .map(|net| Change::AddAddress(address_of(link, net)));
    remove.extend(again);
    rtnl.apply(&remove).map(|_| ()).map_err(|e| kernel(&e))
}

fn address_of(link: &Link, net: &IpNet) -> AddressSpec {
    AddressSpec {
        index: link.index,
        address: net.addr(),
        prefix_len: net.prefix_len(),
        detect_duplicates: false,
    }
}

fn forward(gateways: &[IpNet]) -> Result<(), SysctlError> {
    if gateways.iter().any(|net| net.addr().is_ipv4()) {
        Sysctl::of(&["net", "ipv4", "ip_forward"])?.ensure("1")?;
    }
    if gateways.iter().any(|net| net.addr().is_ipv6()) {
        Sysctl::of(&["net", "ipv6", "conf", "all", "forwarding"])?.ensure("1")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BridgeConf;

    #[test]
    fn a_port_leaves_the_default_vlan_for_its_own() {
        let conf = |text: &str| BridgeConf::from_json(text);
        let bridge = Link {
            default_vlan: Some(1),
            ..Link::default()
        };
        let shown = |text: &str| format!("{:?}", port_vlans(&conf(text), &bridge, 7));
        assert_eq!(shown("{}"), "[]");
        assert_eq!(
            shown(r#"{"vlan":5}"#),
            "[RemoveVlan(PortVlan { index: 7, id: 1, native: true }), AddVlan(PortVlan { index: 7, id: 5, native: true })]"
        );
        assert_eq!(
            shown(r#"{"vlanTrunk":[{"id":5}],"preserveDefaultVlan":true}"#),
            "[AddVlan(PortVlan { index: 7, id: 1, native: true }), AddVlan(PortVlan { index: 7, id: 5, native: false })]"
        );
    }
}
