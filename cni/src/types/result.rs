//! The inner form of a result: what an attachment got.

use std::net::IpAddr;

use ipnet::IpNet;

/// Everything an ADD made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AttachResult {
    /// Interfaces made, on the node and in the container.
    pub interfaces: Vec<Interface>,
    /// Addresses given.
    pub ips: Vec<IpConfig>,
    /// Routes set in the container.
    pub routes: Vec<Route>,
    /// Resolver settings, empty when the network has none.
    pub dns: Dns,
}

impl AttachResult {
    /// This result behind that of plugins before us in the chain: what they made stays first, and
    /// nothing of theirs is lost.
    #[must_use]
    pub fn after(mut self, previous: Self) -> Self {
        let shift = previous.interfaces.len();
        for ip in &mut self.ips {
            ip.interface = ip.interface.map(|index| index + shift);
        }
        let Self {
            mut interfaces,
            mut ips,
            mut routes,
            dns,
        } = previous;
        interfaces.append(&mut self.interfaces);
        ips.append(&mut self.ips);
        routes.append(&mut self.routes);
        let dns = if self.dns == Dns::default() {
            dns
        } else {
            self.dns
        };
        Self {
            interfaces,
            ips,
            routes,
            dns,
        }
    }

    /// Addresses of the container: those bound to an interface in a sandbox, or to none.
    #[must_use]
    pub fn container_addresses(&self) -> Vec<IpNet> {
        let in_container = |ip: &&IpConfig| match ip.interface {
            None => true,
            Some(index) => self
                .interfaces
                .get(index)
                .is_some_and(|i| !i.sandbox.is_empty()),
        };
        self.ips
            .iter()
            .filter(in_container)
            .map(|ip| ip.address)
            .collect()
    }
}

/// One interface of a result.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Hardware address, or empty.
    pub mac: String,
    /// Maximum transmission unit in bytes, when known (1.1.0).
    pub mtu: Option<u32>,
    /// Path of its network namespace; empty for the node's own.
    pub sandbox: String,
    /// Path of a socket for user-space devices (1.1.0), or empty.
    pub socket_path: String,
    /// PCI address (1.1.0), or empty.
    pub pci_id: String,
}

/// One address of a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IpConfig {
    /// Address with the prefix length of its subnet.
    pub address: IpNet,
    /// Gateway of that subnet.
    pub gateway: Option<IpAddr>,
    /// Index into [`AttachResult::interfaces`].
    pub interface: Option<usize>,
}

/// One route of a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Destination.
    pub dst: IpNet,
    /// Next hop; none means the gateway of the subnet of the same family.
    pub gw: Option<IpAddr>,
    /// MTU of the path in bytes (1.1.0).
    pub mtu: Option<u32>,
    /// Advertised TCP segment size in bytes (1.1.0).
    pub advmss: Option<u32>,
    /// Metric (1.1.0).
    pub priority: Option<u32>,
    /// Routing table (1.1.0).
    pub table: Option<u32>,
    /// `rtm_scope` (1.1.0).
    pub scope: Option<u8>,
}

impl Route {
    /// A route with nothing but a destination and a next hop.
    #[must_use]
    pub fn new(dst: IpNet, gw: Option<IpAddr>) -> Self {
        Self {
            dst,
            gw,
            mtu: None,
            advmss: None,
            priority: None,
            table: None,
            scope: None,
        }
    }
}

/// Resolver settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    /// Servers in order.
    pub nameservers: Vec<String>,
    /// Local domain, or empty.
    pub domain: String,
    /// Search list.
    pub search: Vec<String>,
    /// `options` of resolv.conf.
    pub options: Vec<String>,
}
