//! CHECK: compares the kernel and the leases with the previous result.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use cni::attach::{address, names, plan};
use cni::bandwidth;
use cni::firewall::HostPorts;
use cni::records::Guard;
use cni::skel::Input;
use cni::types::{AttachResult, CniError, ErrorCode};
use linux::netlink::{Link, RouteSpec, Rtnl, in_netns};

use crate::config::BridgeConf;
use crate::{bridge, kernel, network};

/// `RT_TABLE_MAIN`
const RT_TABLE_MAIN: u32 = 254;

fn differs(msg: String) -> CniError {
    CniError::new(ErrorCode::StateDiffers, msg)
}

pub(crate) fn check(input: &Input<'_>, previous: &AttachResult) -> Result<(), CniError> {
    let conf = BridgeConf::parse(input)?;
    let mut rtnl = Rtnl::open().map_err(|e| kernel(&e))?;
    let bridge = present(&mut rtnl, &conf.bridge)?;
    let host = present(
        &mut rtnl,
        &names::host_name(&input.conf.name, &input.owner()),
    )?;
    if host.master != Some(bridge.index) {
        return Err(differs(format!(
            "link {} is no port of {}",
            host.name, bridge.name
        )));
    }
    if !host.up || !bridge.up {
        return Err(differs(format!(
            "link {} or {} is down",
            host.name, bridge.name
        )));
    }
    if (host.hairpin, host.isolated) != (conf.hairpin, conf.isolated) {
        return Err(differs(format!(
            "port {} has other options than configured",
            host.name
        )));
    }
    if conf.is_gateway {
        check_gateways(&conf, &bridge, previous, &mut rtnl)?;
    }
    // What others flushed concerns every pod: it is put back, and only what stays wrong is told.
    network::ensure(input, &conf, previous)?;
    let rules = network::rules(input, &conf, previous)?;
    rules.repair()?;
    network::check(input, &conf, previous)?;
    let addresses = HostPorts::addresses(previous, &input.ifname);
    let guard = guard(input, &conf, previous, &host)?;
    rules.check(&input.owner(), &addresses, guard.as_ref())?;
    bandwidth::check(
        &mut rtnl,
        &input.conf.name,
        &input.owner(),
        &host,
        conf.bandwidth,
    )?;
    check_inside(input, &conf, previous)?;
    address::check(input, &conf.ipam, previous)
}

/// The gateways' addresses are the bridge's, or in a VLAN those of the node's link in it.
fn check_gateways(
    conf: &BridgeConf,
    bridge: &Link,
    previous: &AttachResult,
    rtnl: &mut Rtnl,
) -> Result<(), CniError> {
    let gateways = plan::gateways(previous);
    let in_vlan = match conf.vlans.native {
        Some(id) if !gateways.is_empty() => {
            Some(present(rtnl, &bridge::vlan_link_name(&conf.bridge, id))?)
        }
        Some(_) | None => None,
    };
    let link = in_vlan.as_ref().unwrap_or(bridge);
    if !link.up {
        return Err(differs(format!("link {} is down", link.name)));
    }
    let addresses = rtnl.addresses_of(link.index).map_err(|e| kernel(&e))?;
    match gateways
        .iter()
        .find(|gateway| !addresses.iter().any(|a| a.address == gateway.addr()))
    {
        Some(gateway) => Err(differs(format!("link {} lacks {gateway}", link.name))),
        None => Ok(()),
    }
}

fn present(rtnl: &mut Rtnl, name: &str) -> Result<Link, CniError> {
    let link = rtnl.link_by_name(name).map_err(|e| kernel(&e))?;
    link.ok_or_else(|| differs(format!("link {name} is missing")))
}

/// The guard that the container's port should have.
fn guard(
    input: &Input<'_>,
    conf: &BridgeConf,
    previous: &AttachResult,
    host: &Link,
) -> Result<Option<Guard>, CniError> {
    if !conf.guarded {
        return Ok(None);
    }
    let own = previous
        .interfaces
        .iter()
        .find(|i| i.name == input.ifname && !i.sandbox.is_empty());
    let mac = own.and_then(|i| i.mac.parse::<linux::netlink::Mac>().ok());
    let mac = mac.ok_or_else(|| {
        let msg = format!("prevResult tells no hardware address of {}", input.ifname);
        CniError::new(ErrorCode::InvalidConfig, msg)
    })?;
    Ok(Some(Guard {
        port: host.name.clone(),
        mac: mac.0,
    }))
}

fn check_inside(
    input: &Input<'_>,
    conf: &BridgeConf,
    previous: &AttachResult,
) -> Result<(), CniError> {
    let path = input.netns.as_deref().unwrap_or(Path::new(""));
    let netns = File::open(path).map_err(|e| {
        let msg = format!("open network namespace {}", path.display());
        CniError::caused(ErrorCode::InvalidEnvironment, msg, &e)
    })?;
    let mut inside = Rtnl::open_in(netns.as_fd()).map_err(|e| kernel(&e))?;
    let link = present(&mut inside, &input.ifname)?;
    if link.up == conf.leave_down {
        let state = if link.up { "up" } else { "down" };
        return Err(differs(format!("interface {} is {state}", input.ifname)));
    }
    let told = previous
        .interfaces
        .iter()
        .find(|i| !i.sandbox.is_empty() && i.name == link.name);
    let mac = link.mac.map(|mac| mac.to_string()).unwrap_or_default();
    if let Some(told) = told.filter(|told| !told.mac.is_empty())
        && !told.mac.eq_ignore_ascii_case(&mac)
    {
        let msg = format!(
            "interface {} has hardware address {mac}, not {}",
            link.name, told.mac
        );
        return Err(differs(msg));
    }
    let addresses = inside.addresses_of(link.index).map_err(|e| kernel(&e))?;
    for ip in &previous.ips {
        if ip
            .interface
            .is_some_and(|i| previous.interfaces[i].name != link.name)
        {
            continue;
        }
        let (address, len) = (ip.address.addr(), ip.address.prefix_len());
        if !addresses
            .iter()
            .any(|a| a.address == address && a.prefix_len == len)
        {
            return Err(differs(format!(
                "interface {} lacks {}",
                link.name, ip.address
            )));
        }
    }
    check_routes(&mut inside, &link, previous)?;
    let difference = in_netns(netns.as_fd(), || conf.tuning.difference(&link))
        .map_err(|e| CniError::caused(ErrorCode::Kernel, "look into the container", &e))?;
    difference.map_or(Ok(()), |msg| Err(differs(msg)))
}

fn check_routes(inside: &mut Rtnl, link: &Link, previous: &AttachResult) -> Result<(), CniError> {
    let routes = inside.routes_of(link.index).map_err(|e| kernel(&e))?;
    for wanted in &previous.routes {
        let same = |route: &RouteSpec| {
            route.destination == wanted.dst.network()
                && route.prefix_len == wanted.dst.prefix_len()
                && (wanted.gw.is_none() || route.gateway == wanted.gw)
                && route.table.unwrap_or(RT_TABLE_MAIN) == wanted.table.unwrap_or(RT_TABLE_MAIN)
        };
        if !routes.iter().any(same) {
            let via = wanted.gw.map(|gw| format!(" via {gw}")).unwrap_or_default();
            let msg = format!(
                "interface {} lacks the route to {}{via}",
                link.name, wanted.dst
            );
            return Err(differs(msg));
        }
    }
    Ok(())
}
