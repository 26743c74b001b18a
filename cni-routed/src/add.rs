//! ADD: state, lease, pair, addresses, routes, in this order.
//!
//! Each step is idempotent and keyed by the attachment, so that an ADD killed anywhere is
//! finished by repeating it and undone by DEL.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use cni::attach::names;
use cni::bandwidth;
use cni::firewall;
use cni::skel::Input;
use cni::types::{AttachResult, CniError, ErrorCode, Interface};
use ipnet::IpNet;
use linux::netlink::{Change, Link, Mac, Outcome, Rtnl, VethSpec, in_netns};
use linux::sysctl::Sysctl;

use crate::conf::RoutedConf;
use crate::state::NodeState;
use crate::{Routed, del, kernel, lease, plan};

pub(crate) fn add(plugin: &Routed, input: &Input<'_>) -> Result<AttachResult, CniError> {
    let conf = RoutedConf::parse(plugin, input)?;
    let state = conf.state()?;
    let netns = open_netns(input.netns.as_deref().unwrap_or(Path::new("")))?;
    let mut rtnl = Rtnl::open().map_err(|e| kernel(&e))?;
    let mut inside = Rtnl::open_in(netns.as_fd()).map_err(|e| kernel(&e))?;
    let host_name = names::host_name(&input.conf.name, &input.owner());
    refuse_foreign_interface(input, &host_name, &mut rtnl, &mut inside)?;
    let mut result = lease::allocate(input, &conf, &state, &mut rtnl)?;
    let mtu_bytes = conf.mtu_bytes.unwrap_or(state.mtu_bytes);
    let pair = Pair {
        input,
        netns: &netns,
        host_name: &host_name,
        conf: &conf,
        state: &state,
        mtu_bytes,
    };
    if let Err(error) = pair.attach(&mut rtnl, &mut inside, &mut result) {
        // Best effort: the runtime is bound to DEL after a failure anyway.
        let _ = del::detach(input, &conf, &mut rtnl);
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

/// What is to be made.
struct Pair<'a> {
    input: &'a Input<'a>,
    netns: &'a File,
    host_name: &'a str,
    conf: &'a RoutedConf,
    state: &'a NodeState,
    mtu_bytes: u32,
}

impl Pair<'_> {
    fn attach(
        &self,
        rtnl: &mut Rtnl,
        inside: &mut Rtnl,
        result: &mut AttachResult,
    ) -> Result<(), CniError> {
        result.routes = plan::routes(result);
        let addresses: Vec<IpAddr> = result.ips.iter().map(|ip| ip.address.addr()).collect();
        let derived = || names::container_mac(addresses.first().copied(), self.host_name);
        let mac = self.conf.mac.unwrap_or_else(derived);
        let owner = self.input.owner();
        let networks: Vec<_> = result.ips.iter().map(|ip| ip.address).collect();
        let rules = self.conf.rules(self.input, Some(self.state));
        rules.ensure(&owner, &networks, None)?;
        let host = self.make(mac, rtnl)?;
        self.let_loopback_through(&networks)?;
        let limiter = bandwidth::ensure(rtnl, rules.network, &owner, &host, self.conf.bandwidth)
            .map_err(|e| kernel(&e))?;
        let host_mac = names::host_mac(self.host_name);
        let alias = names::alias(&self.input.conf.name, &self.input.owner());
        rtnl.apply(&plan::node_changes(host.index, alias, &addresses, mac))
            .map_err(|e| kernel(&e))?;
        self.configure_inside(inside, result, host_mac)?;
        // Our end was up first and got its carrier just now, which the kernel acts upon a moment
        // later, dropping packets until then. To be asked about the link makes it do so at once
        // (Linux 6.8 and later).
        rtnl.link_by_index(host.index).map_err(|e| kernel(&e))?;
        let interface = |name: &str, mac: Mac, sandbox: String| Interface {
            name: name.to_owned(),
            mac: mac.to_string(),
            mtu: Some(self.mtu_bytes),
            sandbox,
            ..Interface::default()
        };
        let netns_path = self.input.netns.as_deref().unwrap_or(Path::new(""));
        result.interfaces = vec![
            interface(self.host_name, host_mac, String::new()),
            interface(&self.input.ifname, mac, netns_path.display().to_string()),
        ];
        result.interfaces.extend(limiter);
        for ip in &mut result.ips {
            ip.interface = Some(1);
        }
        Ok(())
    }

    /// Host ports are reached by `localhost` when the way to the pod takes packets from there.
    fn let_loopback_through(&self, networks: &[IpNet]) -> Result<(), CniError> {
        let ports = &self.conf.ports;
        let v4 = networks.iter().any(|net| net.addr().is_ipv4());
        if ports.mappings.is_empty() || !ports.snat || !v4 {
            return Ok(());
        }
        firewall::let_loopback_through(self.host_name)
            .map_err(|e| CniError::caused(ErrorCode::Kernel, "let loopback reach host ports", &e))
    }

    fn make(&self, mac: Mac, rtnl: &mut Rtnl) -> Result<Link, CniError> {
        let spec = VethSpec {
            name: self.host_name.to_owned(),
            mac: names::host_mac(self.host_name),
            master: None,
            mtu_bytes: Some(self.mtu_bytes),
            peer_name: self.input.ifname.clone(),
            peer_mac: mac,
            peer_netns: self.netns.as_raw_fd(),
        };
        let outcome = rtnl
            .apply(&[Change::AddVeth(spec)])
            .map_err(|e| kernel(&e))?;
        if outcome == [Outcome::Unchanged] {
            let msg = format!(
                "{} or {} was made by someone else meanwhile",
                self.host_name, self.input.ifname
            );
            return Err(CniError::new(ErrorCode::TryAgain, msg));
        }
        let found = rtnl.link_by_name(self.host_name).map_err(|e| kernel(&e))?;
        found.ok_or_else(|| vanished(self.host_name))
    }

    fn configure_inside(
        &self,
        inside: &mut Rtnl,
        result: &AttachResult,
        host_mac: Mac,
    ) -> Result<(), CniError> {
        let ifname = self.input.ifname.as_str();
        let link = inside
            .link_by_name(ifname)
            .map_err(|e| kernel(&e))?
            .ok_or_else(|| vanished(ifname))?;
        if result.ips.iter().any(|ip| ip.address.addr().is_ipv6()) {
            // Nodes without IPv6 of their own disable it for every new interface.
            let enabled = in_netns(self.netns.as_fd(), || {
                Sysctl::of(&["net", "ipv6", "conf", ifname, "disable_ipv6"])?.ensure("0")
            });
            let failed = |e: &(dyn std::error::Error + 'static)| {
                CniError::caused(ErrorCode::Kernel, "enable IPv6 in the container", e)
            };
            enabled.map_err(|e| failed(&e))?.map_err(|e| failed(&e))?;
        }
        inside
            .apply(&plan::container_changes(link.index, result, host_mac))
            .map(|_| ())
            .map_err(|e| kernel(&e))
    }
}

fn vanished(name: &str) -> CniError {
    let msg = format!("link {name} vanished while it was made");
    CniError::new(ErrorCode::TryAgain, msg)
}
