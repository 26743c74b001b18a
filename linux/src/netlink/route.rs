//! Routes.

use std::net::IpAddr;

use netlink_packet_core::Emitable;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteScope, RouteType,
};

use super::addr::family;
use super::socket::{NLM_F_CREATE, NLM_F_EXCL, Request};

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;

/// A unicast route over one link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteSpec {
    /// Destination network.
    pub destination: IpAddr,
    /// Length of its prefix in bits.
    pub prefix_len: u8,
    /// Next hop; none for a destination on the link itself.
    pub gateway: Option<IpAddr>,
    /// The link.
    pub index: u32,
    /// MTU of the path in bytes.
    pub mtu_bytes: Option<u32>,
    /// Advertised TCP segment size in bytes.
    pub advmss_bytes: Option<u32>,
    /// Metric.
    pub priority: Option<u32>,
    /// Routing table; none is the main one.
    pub table: Option<u32>,
    /// `rtm_scope`; none follows from the gateway.
    pub scope: Option<u8>,
}

impl RouteSpec {
    pub(super) fn add(&self) -> Request {
        self.request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, "add route")
    }

    pub(super) fn remove(&self) -> Request {
        self.request(RTM_DELROUTE, 0, "remove route")
    }

    fn request(&self, kind: u16, flags: u16, operation: &'static str) -> Request {
        let mut message = RouteMessage::default();
        message.header.address_family = family(&self.destination);
        message.header.destination_prefix_length = self.prefix_len;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Boot;
        message.header.kind = RouteType::Unicast;
        message.header.scope = match (self.scope, self.gateway) {
            (Some(scope), _) => RouteScope::from(scope),
            (None, Some(_)) => RouteScope::Universe,
            (None, None) if self.destination.is_ipv4() => RouteScope::Link,
            (None, None) => RouteScope::Universe,
        };
        message.attributes = self.attributes();
        let mut body = vec![0; message.buffer_len()];
        message.emit(&mut body);
        let via = self
            .gateway
            .map(|gw| format!(" via {gw}"))
            .unwrap_or_default();
        let object = format!(
            "{}/{}{via} on link {}",
            self.destination, self.prefix_len, self.index
        );
        Request {
            kind,
            flags,
            body,
            operation,
            object,
        }
    }

    fn attributes(&self) -> Vec<RouteAttribute> {
        let mut attributes = vec![RouteAttribute::Oif(self.index)];
        if self.prefix_len > 0 {
            attributes.push(RouteAttribute::Destination(address(self.destination)));
        }
        attributes.extend(self.gateway.map(|gw| RouteAttribute::Gateway(address(gw))));
        attributes.extend(self.priority.map(RouteAttribute::Priority));
        attributes.extend(self.table.map(RouteAttribute::Table));
        let mut metrics = Vec::new();
        metrics.extend(self.mtu_bytes.map(RouteMetric::Mtu));
        metrics.extend(self.advmss_bytes.map(RouteMetric::Advmss));
        if !metrics.is_empty() {
            attributes.push(RouteAttribute::Metrics(metrics));
        }
        attributes
    }
}

fn address(ip: IpAddr) -> RouteAddress {
    match ip {
        IpAddr::V4(v4) => RouteAddress::Inet(v4),
        IpAddr::V6(v6) => RouteAddress::Inet6(v6),
    }
}
