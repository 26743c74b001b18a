//! Routes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::Emitable;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteScope, RouteType,
};

use super::addr::{family, ip};
use super::socket::{Answer, NLM_F_CREATE, NLM_F_EXCL, Request, each_attribute};

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
/// `struct rtmsg`
const RTMSG_BYTES: usize = 12;
const AF_INET: u16 = libc::AF_INET as u16;
const AF_INET6: u16 = libc::AF_INET6 as u16;
const RTN_UNICAST: u8 = 1;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_TABLE: u16 = 15;

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

    /// Reads a unicast `RTM_NEWROUTE`; none when it is another message or too short. Metrics of
    /// the path are not read.
    pub(super) fn decode(answer: &Answer) -> Option<Self> {
        let header = answer.body.first_chunk::<RTMSG_BYTES>()?;
        let [family, prefix_len, _, _, table, _, scope, kind, ..] = *header;
        if answer.kind != RTM_NEWROUTE || kind != RTN_UNICAST {
            return None;
        }
        // A default route has no destination attribute.
        let destination: IpAddr = match u16::from(family) {
            AF_INET => Ipv4Addr::UNSPECIFIED.into(),
            AF_INET6 => Ipv6Addr::UNSPECIFIED.into(),
            _ => return None,
        };
        let mut route = Self {
            destination,
            prefix_len,
            gateway: None,
            index: 0,
            mtu_bytes: None,
            advmss_bytes: None,
            priority: None,
            table: Some(u32::from(table)),
            scope: Some(scope),
        };
        let number = |value: &[u8]| value.first_chunk::<4>().map(|b| u32::from_ne_bytes(*b));
        for (kind, value) in each_attribute(&answer.body[RTMSG_BYTES..]) {
            match kind {
                RTA_DST => route.destination = ip(value)?,
                RTA_OIF => route.index = number(value)?,
                RTA_GATEWAY => route.gateway = ip(value),
                RTA_PRIORITY => route.priority = number(value),
                RTA_TABLE => route.table = number(value),
                _ => {}
            }
        }
        Some(route)
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

/// One dump per family: the kernel filters only within one.
pub(super) fn dumps(index: u32) -> [Request; 2] {
    [AddressFamily::Inet, AddressFamily::Inet6].map(|family| {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        message.attributes = vec![RouteAttribute::Oif(index)];
        let mut body = vec![0; message.buffer_len()];
        message.emit(&mut body);
        let object = index.to_string();
        Request {
            kind: RTM_GETROUTE,
            flags: 0,
            body,
            operation: "list routes of link",
            object,
        }
    })
}

fn address(ip: IpAddr) -> RouteAddress {
    match ip {
        IpAddr::V4(v4) => RouteAddress::Inet(v4),
        IpAddr::V6(v6) => RouteAddress::Inet6(v6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_route_reader_panic(body: Vec<u8>) {
            let _ = RouteSpec::decode(&Answer { kind: RTM_NEWROUTE, body });
        }
    }
}
