//! CHECK: compares the kernel and the leases with the previous result.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::Path;

use cni::attach::names;
use cni::bandwidth;
use cni::firewall::HostPorts;
use cni::skel::Input;
use cni::types::{AttachResult, CniError, ErrorCode};
use linux::netlink::{Link, Mac, RouteSpec, Rtnl};

use crate::conf::RoutedConf;
use crate::{Routed, kernel, lease};

/// `RT_TABLE_MAIN`
const RT_TABLE_MAIN: u32 = 254;

fn differs(msg: String) -> CniError {
    CniError::new(ErrorCode::StateDiffers, msg)
}

pub(crate) fn check(
    plugin: &Routed,
    input: &Input<'_>,
    previous: &AttachResult,
) -> Result<(), CniError> {
    let conf = RoutedConf::parse(plugin, input)?;
    let mut rtnl = Rtnl::open().map_err(|e| kernel(&e))?;
    let name = names::host_name(&input.conf.name, &input.owner());
    let host = present(&mut rtnl, &name)?;
    if !host.up {
        return Err(differs(format!("link {name} is down")));
    }
    let on_host = rtnl.routes_of(host.index).map_err(|e| kernel(&e))?;
    let on_container = |index: Option<usize>| {
        index.is_none_or(|index| {
            let interface = previous.interfaces.get(index);
            interface.is_some_and(|interface| interface.name == input.ifname)
        })
    };
    let ours = previous.ips.iter().filter(|ip| on_container(ip.interface));
    let addresses: Vec<IpAddr> = ours.map(|ip| ip.address.addr()).collect();
    for address in &addresses {
        if !on_host.iter().any(|route| route.destination == *address) {
            return Err(differs(format!("link {name} lacks the route to {address}")));
        }
    }
    // What others flushed concerns every pod: it is put back, and only what stays wrong is told.
    let state = conf.state().ok();
    let rules = conf.rules(input, state.as_ref());
    rules.repair()?;
    let networks = HostPorts::addresses(previous, &input.ifname);
    rules.check(&input.owner(), &networks, None)?;
    let (network, owner) = (&input.conf.name, input.owner());
    bandwidth::check(&mut rtnl, network, &owner, &host, conf.bandwidth)?;
    check_inside(input, previous, &addresses)?;
    lease::check(input, &conf, previous)
}

fn present(rtnl: &mut Rtnl, name: &str) -> Result<Link, CniError> {
    let link = rtnl.link_by_name(name).map_err(|e| kernel(&e))?;
    link.ok_or_else(|| differs(format!("link {name} is missing")))
}

fn check_inside(
    input: &Input<'_>,
    previous: &AttachResult,
    addresses: &[IpAddr],
) -> Result<(), CniError> {
    let path = input.netns.as_deref().unwrap_or(Path::new(""));
    let netns = File::open(path).map_err(|e| {
        let msg = format!("open network namespace {}", path.display());
        CniError::caused(ErrorCode::InvalidEnvironment, msg, &e)
    })?;
    let mut inside = Rtnl::open_in(netns.as_fd()).map_err(|e| kernel(&e))?;
    let link = present(&mut inside, &input.ifname)?;
    if !link.up {
        return Err(differs(format!("interface {} is down", input.ifname)));
    }
    check_mac(&link, previous)?;
    let found = inside.addresses_of(link.index).map_err(|e| kernel(&e))?;
    for address in addresses {
        if !found.iter().any(|known| known.address == *address) {
            return Err(differs(format!("interface {} lacks {address}", link.name)));
        }
    }
    let host_mac = names::host_mac(&names::host_name(&input.conf.name, &input.owner()));
    check_gateways(&mut inside, &link, previous, host_mac)?;
    check_routes(&mut inside, &link, previous)
}

fn check_mac(link: &Link, previous: &AttachResult) -> Result<(), CniError> {
    let told = previous
        .interfaces
        .iter()
        .find(|i| !i.sandbox.is_empty() && i.name == link.name)
        .filter(|told| !told.mac.is_empty());
    let mac = link.mac.map(|mac| mac.to_string()).unwrap_or_default();
    match told {
        Some(told) if !told.mac.eq_ignore_ascii_case(&mac) => Err(differs(format!(
            "interface {} has hardware address {mac}, not {}",
            link.name, told.mac
        ))),
        _ => Ok(()),
    }
}

fn check_gateways(
    inside: &mut Rtnl,
    link: &Link,
    previous: &AttachResult,
    host_mac: Mac,
) -> Result<(), CniError> {
    let known = inside.neighbours_of(link.index).map_err(|e| kernel(&e))?;
    for gateway in previous.ips.iter().filter_map(|ip| ip.gateway) {
        let found = known.iter().find(|neighbour| neighbour.address == gateway);
        if found.is_none_or(|found| found.mac != Some(host_mac)) {
            let name = &link.name;
            return Err(differs(format!(
                "interface {name} lacks neighbour {gateway}"
            )));
        }
    }
    Ok(())
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
