//! ADD: lease, bridge, rules of the network, pair, addresses and routes, rules of the pod, in this
//! order.
//!
//! Each step is idempotent and keyed by the attachment, so that an ADD killed anywhere is
//! finished by repeating it and undone by DEL.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use cni::attach::{address, names, plan};
use cni::records::Guard;
use cni::skel::Input;
use cni::types::{AttachResult, CniError, ErrorCode, Interface};
use cni::{bandwidth, firewall, tuning};
use linux::netlink::{Change, Link, Mac, Outcome, PortSpec, Rtnl, VethSpec, in_netns};
use linux::sysctl::{Sysctl, SysctlError};

use crate::config::BridgeConf;
use crate::{bridge, kernel, network};

pub(crate) fn add(input: &Input<'_>) -> Result<AttachResult, CniError> {
    let conf = BridgeConf::parse(input)?;
    input.refuse_unknown_args(&["IP", "MAC"])?;
    conf.tuning.allowed_by(Path::new(tuning::ALLOWLIST))?;
    let netns_path = input.netns.as_deref().unwrap_or(Path::new(""));
    let (netns, home) = open_namespaces(netns_path)?;
    let mut rtnl = Rtnl::open().map_err(|e| kernel(&e))?;
    // The plugin is a process of one thread.
    let inside = Rtnl::open_visiting(netns.as_fd(), home.as_fd());
    let mut inside = inside.map_err(|e| kernel(&e))?;
    refuse_foreign_interface(input, &mut rtnl, &mut inside)?;
    let mut result = address::allocate(input, &conf.ipam, &mut rtnl)?;
    let made = attach(input, &conf, &netns, &mut rtnl, &mut inside, &mut result);
    if let Err(error) = made {
        // Best effort: the runtime is bound to DEL after a failure anyway.
        let _ = network::detach(input, &conf, &mut rtnl);
        return Err(error);
    }
    if let Some(previous) = input.conf.previous()? {
        result = result.after(previous);
    }
    Ok(result)
}

/// The container's namespace and the node's own, which must be two.
fn open_namespaces(path: &Path) -> Result<(File, File), CniError> {
    let failed = |what: &str, e: &io::Error| {
        let msg = format!("{what} network namespace {}", path.display());
        CniError::caused(ErrorCode::InvalidEnvironment, msg, e)
    };
    let netns = File::open(path).map_err(|e| failed("open", &e))?;
    // Of the thread: a test's threads may be in namespaces of their own.
    let home = File::open("/proc/thread-self/ns/net").map_err(|e| failed("compare", &e))?;
    let inode = |file: &File| file.metadata().map(|m| (m.dev(), m.ino()));
    let own = inode(&home).map_err(|e| failed("compare", &e))?;
    if inode(&netns).map_err(|e| failed("look at", &e))? == own {
        let msg = format!("network namespace {} is the node's own", path.display());
        return Err(CniError::new(ErrorCode::InvalidEnvironment, msg));
    }
    Ok((netns, home))
}

/// The specification: an ADD of an interface that exists must fail. One left by this very
/// attachment's killed ADD is not meant: it is made anew.
fn refuse_foreign_interface(
    input: &Input<'_>,
    rtnl: &mut Rtnl,
    inside: &mut Rtnl,
) -> Result<(), CniError> {
    let host_name = names::host_name(&input.conf.name, &input.owner());
    let here = rtnl.link_by_name(&host_name).map_err(|e| kernel(&e))?;
    let there = inside.link_by_name(&input.ifname).map_err(|e| kernel(&e))?;
    let alias = names::alias(&input.conf.name, &input.owner());
    match (here, there) {
        (None, None) => Ok(()),
        (None, Some(_)) => {
            let netns = input.netns.as_deref().unwrap_or(Path::new("")).display();
            let msg = format!("interface {} already exists in {netns}", input.ifname);
            Err(CniError::new(ErrorCode::InvalidEnvironment, msg))
        }
        // Without an alias: killed between making it and marking it.
        (Some(link), _) if link.alias.is_empty() || link.alias == alias => rtnl
            .apply(&[Change::RemoveLink { name: host_name }])
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
    let owner = input.owner();
    bridge::fill_gateways(conf, result)?;
    let gateways = plan::gateways(result);
    let bridge = bridge::ensure(conf, &gateways, rtnl)?;
    let mut gateway_link = None;
    if conf.is_gateway {
        gateway_link = bridge::ensure_gateway(conf, &bridge, &gateways, rtnl)?;
    }
    network::ensure(input, conf, result)?;
    result.routes = plan::routes(result, conf.is_default_gateway);
    if let Some(dns) = &conf.dns {
        result.dns = dns.clone();
    }
    let first = result.ips.first().map(|ip| ip.address.addr());
    let host_name = names::host_name(&input.conf.name, &owner);
    let mac = conf
        .mac
        .unwrap_or_else(|| names::container_mac(first, &host_name));
    let guard = conf.guarded.then_some(Guard {
        port: host_name,
        mac: mac.0,
    });
    let addresses: Vec<_> = result.ips.iter().map(|ip| ip.address).collect();
    // Before the pair: no frame of the pod comes earlier than its guard.
    network::rules(input, conf, result)?.ensure(&owner, &addresses, guard)?;
    if conf.ports.snat && addresses.iter().any(|net| net.addr().is_ipv4()) {
        loopback(conf, gateway_link.as_ref().unwrap_or(&bridge))?;
    }
    let host = make_pair(input, conf, netns, &bridge, mac, rtnl)?;
    let limiter = bandwidth::ensure(rtnl, &input.conf.name, &owner, &host, conf.bandwidth)
        .map_err(|e| kernel(&e))?;
    let mtu = configure_inside(input, conf, netns, inside, result)?;
    result.interfaces = interfaces(input, [&bridge, &host], mac, mtu);
    let node_link = |link: &Link| Interface {
        name: link.name.clone(),
        mac: link.mac.map(|mac| mac.to_string()).unwrap_or_default(),
        mtu: Some(link.mtu_bytes),
        ..Interface::default()
    };
    result
        .interfaces
        .extend(gateway_link.as_ref().map(node_link));
    result.interfaces.extend(limiter);
    for ip in &mut result.ips {
        ip.interface = Some(2);
    }
    Ok(())
}

/// Host ports are reached by `localhost` when the way to the pod takes packets from there.
fn loopback(conf: &BridgeConf, towards_pods: &Link) -> Result<(), CniError> {
    if conf.ports.mappings.is_empty() {
        return Ok(());
    }
    firewall::let_loopback_through(&towards_pods.name)
        .map_err(|e| CniError::caused(ErrorCode::Kernel, "let loopback reach host ports", &e))
}

fn interfaces(input: &Input<'_>, links: [&Link; 2], mac: Mac, mtu: u32) -> Vec<Interface> {
    let interface = |name: &str, mac: Option<Mac>, mtu, sandbox: &Path| Interface {
        name: name.to_owned(),
        mac: mac.map(|mac| mac.to_string()).unwrap_or_default(),
        mtu: Some(mtu),
        sandbox: sandbox.display().to_string(),
        ..Interface::default()
    };
    let node = Path::new("");
    let netns_path = input.netns.as_deref().unwrap_or(node);
    let mut all: Vec<Interface> = links
        .iter()
        .map(|link| interface(&link.name, link.mac, link.mtu_bytes, node))
        .collect();
    all.push(interface(&input.ifname, Some(mac), mtu, netns_path));
    all
}

fn make_pair(
    input: &Input<'_>,
    conf: &BridgeConf,
    netns: &File,
    bridge: &Link,
    mac: Mac,
    rtnl: &mut Rtnl,
) -> Result<Link, CniError> {
    let name = names::host_name(&input.conf.name, &input.owner());
    let spec = VethSpec {
        mac: names::host_mac(&name),
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
    let alias = names::alias(&input.conf.name, &input.owner());
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
    changes.extend(bridge::port_vlans(conf, bridge, index));
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
    set_parameters(input, conf, netns, result)?;
    let mut changes = Vec::new();
    if !conf.leave_down {
        changes = plan::container_changes(link.index, result, conf.detect_duplicates);
    }
    changes.extend(conf.tuning.changes(link.index));
    inside.apply(&changes).map_err(|e| kernel(&e))?;
    Ok(link.mtu_bytes)
}

/// Kernel parameters of the container's namespace: entered only when there are any to set.
fn set_parameters(
    input: &Input<'_>,
    conf: &BridgeConf,
    netns: &File,
    result: &AttachResult,
) -> Result<(), CniError> {
    let ifname = input.ifname.as_str();
    let six = !conf.leave_down && result.ips.iter().any(|ip| ip.address.addr().is_ipv6());
    // A chosen hardware address may be another than the last holder of the IP address had:
    // neighbours are told.
    let announce = !conf.leave_down && conf.mac.is_some();
    if !six && !announce && conf.tuning.sysctl.is_empty() {
        return Ok(());
    }
    let set = || -> Result<(), SysctlError> {
        if six {
            // Nodes without IPv6 of their own disable it for every new interface.
            Sysctl::of(&["net", "ipv6", "conf", ifname, "disable_ipv6"])?.ensure("0")?;
        }
        if announce {
            Sysctl::of(&["net", "ipv4", "conf", ifname, "arp_notify"])?.ensure("1")?;
        }
        for (parameter, value) in conf.tuning.parameters(ifname)? {
            parameter.write(&value)?;
        }
        Ok(())
    };
    let failed = |e: &(dyn std::error::Error + 'static)| {
        CniError::caused(ErrorCode::Kernel, "set parameters in the container", e)
    };
    in_netns(netns.as_fd(), set)
        .map_err(|e| failed(&e))?
        .map_err(|e| failed(&e))
}
