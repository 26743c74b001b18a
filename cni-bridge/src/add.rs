//! ADD: lease, bridge, masquerade chain, pair, addresses and routes, in this order.
//!
//! Each step is idempotent and keyed by the attachment, so that an ADD killed anywhere is
//! finished by repeating it and undone by DEL.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use cni::firewall;
use cni::skel::Input;
use cni::types::{AttachResult, CniError, ErrorCode, Interface};
use ipnet::IpNet;
use linux::netlink::{
    AddressSpec, BridgeSpec, Change, Link, Mac, Outcome, PortSpec, Rtnl, VethSpec, in_netns,
};
use linux::nft::Nft;
use linux::sysctl::{Sysctl, SysctlError};

use crate::config::BridgeConf;
use crate::{address, kernel, plan};

pub(crate) fn add(input: &Input<'_>) -> Result<AttachResult, CniError> {
    let conf = BridgeConf::parse(input)?;
    let netns_path = input.netns.as_deref().unwrap_or(Path::new(""));
    let netns = open_netns(netns_path)?;
    let mut rtnl = Rtnl::open().map_err(|e| kernel(&e))?;
    let mut inside = Rtnl::open_in(netns.as_fd()).map_err(|e| kernel(&e))?;
    let host_name = plan::host_name(&input.conf.name, &input.owner());
    refuse_foreign_interface(input, &host_name, &mut rtnl, &mut inside)?;
    let mut result = address::allocate(input, &conf.ipam, &mut rtnl)?;
    let made = attach(input, &conf, &netns, &mut rtnl, &mut inside, &mut result);
    if let Err(error) = made {
        // Best effort: the runtime is bound to DEL after a failure anyway.
        let _ = rtnl.apply(&[Change::RemoveLink { name: host_name }]);
        let _ = address::free(input, &conf.ipam);
        return Err(error);
    }
    Ok(result)
}

fn open_netns(path: &Path) -> Result<File, CniError> {
    let failed = |what: &str, e: &io::Error| {
        let msg = format!("{what} network namespace {}", path.display());
        CniError::caused(ErrorCode::InvalidEnvironment, msg, e)
    };
    let netns = File::open(path).map_err(|e| failed("open", &e))?;
    let inode = |file: &File| file.metadata().map(|m| (m.dev(), m.ino()));
    let own = File::open("/proc/self/ns/net").and_then(|own| inode(&own));
    let own = own.map_err(|e| failed("compare", &e))?;
    if inode(&netns).map_err(|e| failed("look at", &e))? == own {
        let msg = format!("network namespace {} is the node's own", path.display());
        return Err(CniError::new(ErrorCode::InvalidEnvironment, msg));
    }
    Ok(netns)
}

/// The specification: an ADD of an interface that exists must fail. One left by this very
/// attachment's killed ADD is not meant: it is made anew.
fn refuse_foreign_interface(
    input: &Input<'_>,
    host_name: &str,
    rtnl: &mut Rtnl,
    inside: &mut Rtnl,
) -> Result<(), CniError> {
    let here = rtnl.link_by_name(host_name).map_err(|e| kernel(&e))?;
    let there = inside.link_by_name(&input.ifname).map_err(|e| kernel(&e))?;
    let alias = plan::alias(&input.conf.name, &input.owner());
    match (here, there) {
        (None, None) => Ok(()),
        (None, Some(_)) => {
            let netns = input.netns.as_deref().unwrap_or(Path::new("")).display();
            let msg = format!("interface {} already exists in {netns}", input.ifname);
            Err(CniError::new(ErrorCode::InvalidEnvironment, msg))
        }
        // Without an alias: killed between making it and marking it.
        (Some(link), _) if link.alias.is_empty() || link.alias == alias => rtnl
            .apply(&[Change::RemoveLink {
                name: host_name.to_owned(),
            }])
            .map(|_| ())
            .map_err(|e| kernel(&e)),
        (Some(link), _) => {
            let msg = format!(
                "link {host_name} belongs to {:?}, not to {alias:?}",
                link.alias
            );
            Err(CniError::new(ErrorCode::TryAgain, msg))
        }
    }
}

fn attach(
    input: &Input<'_>,
    conf: &BridgeConf,
    netns: &File,
    rtnl: &mut Rtnl,
    inside: &mut Rtnl,
    result: &mut AttachResult,
) -> Result<(), CniError> {
    fill_gateways(conf, result)?;
    let gateways = plan::gateways(result);
    let bridge = ensure_bridge(conf, &gateways, rtnl)?;
    if conf.is_gateway {
        ensure_gateway(conf, &bridge, &gateways, rtnl)?;
    }
    if conf.masquerade {
        let subnets = address::subnets(input, &conf.ipam, result);
        let chain = firewall::masquerade(&input.conf.name, &subnets, &conf.masquerade_except);
        Nft::open()
            .and_then(|mut nft| nft.ensure_chain(&chain))
            .map_err(|e| kernel(&e))?;
    }
    result.routes = plan::routes(result, conf.is_default_gateway);
    let first = result.ips.first().map(|ip| ip.address.addr());
    let host_name = plan::host_name(&input.conf.name, &input.owner());
    let mac = conf
        .mac
        .unwrap_or_else(|| plan::container_mac(first, &host_name));
    let host = make_pair(input, conf, netns, &bridge, mac, rtnl)?;
    let mtu = configure_inside(input, conf, netns, inside, result)?;
    let interface = |name: &str, mac: Option<Mac>, mtu, sandbox: &Path| Interface {
        name: name.to_owned(),
        mac: mac.map(|mac| mac.to_string()).unwrap_or_default(),
        mtu: Some(mtu),
        sandbox: sandbox.display().to_string(),
        ..Interface::default()
    };
    let node = Path::new("");
    let netns_path = input.netns.as_deref().unwrap_or(node);
    result.interfaces = vec![
        interface(&bridge.name, bridge.mac, bridge.mtu_bytes, node),
        interface(&host.name, host.mac, host.mtu_bytes, node),
        interface(&input.ifname, Some(mac), mtu, netns_path),
    ];
    for ip in &mut result.ips {
        ip.interface = Some(2);
    }
    Ok(())
}

/// A gateway is needed where the bridge is one; foreign IPAM plugins may leave it out, and the
/// reference then takes the subnet's first address.
fn fill_gateways(conf: &BridgeConf, result: &mut AttachResult) -> Result<(), CniError> {
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

fn ensure_bridge(conf: &BridgeConf, gateways: &[IpNet], rtnl: &mut Rtnl) -> Result<Link, CniError> {
    let found = rtnl.link_by_name(&conf.bridge).map_err(|e| kernel(&e))?;
    let bridge = match found {
        Some(bridge) => bridge,
        None => {
            let mac = plan::bridge_mac(&conf.bridge, gateways.first().map(IpNet::addr));
            let spec = BridgeSpec {
                name: conf.bridge.clone(),
                mac: Some(mac),
                mtu_bytes: conf.mtu_bytes,
            };
            rtnl.apply(&[Change::AddBridge(spec)])
                .map_err(|e| kernel(&e))?;
            let made = rtnl.link_by_name(&conf.bridge).map_err(|e| kernel(&e))?;
            made.ok_or_else(|| {
                let msg = format!("bridge {} vanished while it was made", conf.bridge);
                CniError::new(ErrorCode::TryAgain, msg)
            })?
        }
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
    rtnl.apply(&changes).map_err(|e| kernel(&e))?;
    Ok(bridge)
}

/// Gives the bridge the gateways' addresses and lets the node forward.
fn ensure_gateway(
    conf: &BridgeConf,
    bridge: &Link,
    gateways: &[IpNet],
    rtnl: &mut Rtnl,
) -> Result<(), CniError> {
    let spec = |net: &IpNet| AddressSpec {
        index: bridge.index,
        address: net.addr(),
        prefix_len: net.prefix_len(),
        detect_duplicates: false,
    };
    let changes: Vec<Change> = gateways
        .iter()
        .map(|net| Change::AddAddress(spec(net)))
        .collect();
    let outcomes = rtnl.apply(&changes).map_err(|e| kernel(&e))?;
    if outcomes.contains(&Outcome::Done) {
        // Only a bridge that had not all of them may carry others.
        settle_other_addresses(conf, bridge, gateways, rtnl)?;
    }
    forward(gateways).map_err(|e| CniError::caused(ErrorCode::Kernel, "let the node forward", &e))
}

/// Other addresses of the bridge that share a subnet with a gateway: removed when forced, else
/// an error, and the gateway is not left beside them.
fn settle_other_addresses(
    conf: &BridgeConf,
    bridge: &Link,
    gateways: &[IpNet],
    rtnl: &mut Rtnl,
) -> Result<(), CniError> {
    let mut remove = Vec::new();
    for other in rtnl.addresses_of(bridge.index).map_err(|e| kernel(&e))? {
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
                .map(|net| Change::RemoveAddress(on_bridge(bridge, net)));
            let _ = rtnl.apply(&undo.collect::<Vec<_>>());
            let msg = format!(
                "bridge {} has address {net} already; forceAddress would replace it",
                bridge.name
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
        .map(|net| Change::AddAddress(on_bridge(bridge, net)));
    remove.extend(again);
    rtnl.apply(&remove).map(|_| ()).map_err(|e| kernel(&e))
}

fn on_bridge(bridge: &Link, net: &IpNet) -> AddressSpec {
    AddressSpec {
        index: bridge.index,
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

fn make_pair(
    input: &Input<'_>,
    conf: &BridgeConf,
    netns: &File,
    bridge: &Link,
    mac: Mac,
    rtnl: &mut Rtnl,
) -> Result<Link, CniError> {
    let name = plan::host_name(&input.conf.name, &input.owner());
    let spec = VethSpec {
        mac: plan::host_mac(&name),
        master: Some(bridge.index),
        mtu_bytes: conf.mtu_bytes,
        peer_name: input.ifname.clone(),
        peer_mac: mac,
        peer_netns: netns.as_raw_fd(),
        name: name.clone(),
    };
    let outcome = rtnl
        .apply(&[Change::AddVeth(spec)])
        .map_err(|e| kernel(&e))?;
    if outcome == [Outcome::Unchanged] {
        let msg = format!(
            "{name} or {} was made by someone else meanwhile",
            input.ifname
        );
        return Err(CniError::new(ErrorCode::TryAgain, msg));
    }
    let vanished = || {
        CniError::new(
            ErrorCode::TryAgain,
            format!("link {name} vanished while it was made"),
        )
    };
    let host = rtnl
        .link_by_name(&name)
        .map_err(|e| kernel(&e))?
        .ok_or_else(vanished)?;
    let alias = plan::alias(&input.conf.name, &input.owner());
    let index = host.index;
    // A port needs no address of its own.
    let mut changes = vec![
        Change::SetAlias { index, alias },
        Change::NoLinkLocal { index },
    ];
    if conf.hairpin || conf.isolated {
        let (hairpin, isolated) = (conf.hairpin, conf.isolated);
        changes.push(Change::SetPort(PortSpec {
            index,
            hairpin,
            isolated,
        }));
    }
    changes.push(Change::SetUp { index, up: true });
    rtnl.apply(&changes).map_err(|e| kernel(&e))?;
    Ok(host)
}

/// Sets up the container's end; returns its MTU in bytes.
fn configure_inside(
    input: &Input<'_>,
    conf: &BridgeConf,
    netns: &File,
    inside: &mut Rtnl,
    result: &AttachResult,
) -> Result<u32, CniError> {
    let vanished = || {
        let msg = format!("interface {} vanished while it was made", input.ifname);
        CniError::new(ErrorCode::TryAgain, msg)
    };
    let link = inside
        .link_by_name(&input.ifname)
        .map_err(|e| kernel(&e))?
        .ok_or_else(vanished)?;
    if conf.leave_down {
        return Ok(link.mtu_bytes);
    }
    if result.ips.iter().any(|ip| ip.address.addr().is_ipv6()) {
        let ifname = input.ifname.as_str();
        // Nodes without IPv6 of their own disable it for every new interface.
        let enabled = in_netns(netns.as_fd(), || {
            Sysctl::of(&["net", "ipv6", "conf", ifname, "disable_ipv6"])?.ensure("0")
        });
        let failed = |e: &(dyn std::error::Error + 'static)| {
            CniError::caused(ErrorCode::Kernel, "enable IPv6 in the container", e)
        };
        enabled.map_err(|e| failed(&e))?.map_err(|e| failed(&e))?;
    }
    let changes = plan::container_changes(link.index, result, conf.detect_duplicates);
    inside.apply(&changes).map_err(|e| kernel(&e))?;
    Ok(link.mtu_bytes)
}
