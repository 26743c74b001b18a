//! Routes of a node as its peer agent keeps them: of any type, carrying a protocol number that
//! tells whose they are. rtnetlink(7), `struct rtmsg`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::addr::ip;
use super::attribute::{put_address, put_u32};
use super::socket::{Answer, NLM_F_CREATE, NLM_F_REPLACE, Request, each_attribute};

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
/// `struct rtmsg`
const RTMSG_BYTES: usize = 12;
const AF_INET: u8 = libc::AF_INET as u8;
const AF_INET6: u8 = libc::AF_INET6 as u8;
const RTN_UNICAST: u8 = 1;
const RTN_LOCAL: u8 = 2;
const RTN_BLACKHOLE: u8 = 6;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RT_SCOPE_HOST: u8 = 254;
const RTNH_F_ONLINK: u32 = 4;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_TABLE: u16 = 15;
/// Flags of a next hop that the kernel adds by itself (dead, linkdown, offload) are not ours.
const OUR_FLAGS: u32 = RTNH_F_ONLINK;
/// The metric that IPv6 takes when none is given.
const IP6_RT_PRIO_USER: u32 = 1024;

/// Where to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum NodeHop {
    /// By a neighbour.
    Gateway {
        /// The neighbour.
        gateway: IpAddr,
        /// The link.
        index: u32,
        /// The neighbour is on the link although no address of the link says so.
        onlink: bool,
    },
    /// On the link itself.
    Link {
        /// The link.
        index: u32,
    },
    /// To this node, as if it were an address of its own.
    Local {
        /// The loopback link.
        index: u32,
    },
    /// Nowhere, silently.
    Blackhole,
}

/// A route with an owner.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NodeRoute {
    /// Destination network.
    pub destination: IpAddr,
    /// Length of its prefix in bits.
    pub prefix_len: u8,
    /// Where to.
    pub hop: NodeHop,
    /// Source address of what this node sends there itself.
    pub source: Option<IpAddr>,
    /// Metric; none is the family's default.
    pub metric: Option<u32>,
    /// Routing table.
    pub table: u32,
    /// Whose it is (`rtm_protocol`).
    pub protocol: u8,
}

/// `RT_TABLE_MAIN`
pub const TABLE_MAIN: u32 = 254;
/// `RT_TABLE_LOCAL`
pub const TABLE_LOCAL: u32 = 255;

impl NodeRoute {
    pub(super) fn set(&self) -> Request {
        let operation = "set route";
        self.request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, operation)
    }

    pub(super) fn remove(&self) -> Request {
        self.request(RTM_DELROUTE, 0, "remove route")
    }

    fn request(&self, kind: u16, flags: u16, operation: &'static str) -> Request {
        let v4 = self.destination.is_ipv4();
        let family = if v4 { AF_INET } else { AF_INET6 };
        let (route_type, scope, hop_flags) = match &self.hop {
            NodeHop::Gateway { onlink, .. } => {
                let flags = if *onlink { RTNH_F_ONLINK } else { 0 };
                (RTN_UNICAST, RT_SCOPE_UNIVERSE, flags)
            }
            NodeHop::Link { .. } if v4 => (RTN_UNICAST, RT_SCOPE_LINK, 0),
            NodeHop::Link { .. } => (RTN_UNICAST, RT_SCOPE_UNIVERSE, 0),
            NodeHop::Local { .. } if v4 => (RTN_LOCAL, RT_SCOPE_HOST, 0),
            NodeHop::Local { .. } => (RTN_LOCAL, RT_SCOPE_UNIVERSE, 0),
            NodeHop::Blackhole => (RTN_BLACKHOLE, RT_SCOPE_UNIVERSE, 0),
        };
        let small_table = u8::try_from(self.table).unwrap_or(0);
        let mut body = vec![family, self.prefix_len, 0, 0, small_table];
        body.extend([self.protocol, scope, route_type]);
        body.extend(hop_flags.to_ne_bytes());
        if self.prefix_len > 0 {
            put_address(&mut body, RTA_DST, self.destination);
        }
        put_u32(&mut body, RTA_TABLE, self.table);
        let mut via = String::new();
        match &self.hop {
            NodeHop::Gateway { gateway, index, .. } => {
                put_u32(&mut body, RTA_OIF, *index);
                put_address(&mut body, RTA_GATEWAY, *gateway);
                via = format!(" via {gateway} on link {index}");
            }
            NodeHop::Link { index } | NodeHop::Local { index } => {
                put_u32(&mut body, RTA_OIF, *index);
                via = format!(" on link {index}");
            }
            NodeHop::Blackhole => {}
        }
        if let Some(source) = self.source {
            put_address(&mut body, RTA_PREFSRC, source);
        }
        if let Some(metric) = self.metric {
            put_u32(&mut body, RTA_PRIORITY, metric);
        }
        Request {
            kind,
            flags,
            body,
            operation,
            object: format!("{}/{}{via}", self.destination, self.prefix_len),
        }
    }

    /// Reads an `RTM_NEWROUTE`; none when it is another message, too short, or of a type this
    /// module does not make.
    pub(super) fn decode(answer: &Answer) -> Option<Self> {
        if answer.kind != RTM_NEWROUTE {
            return None;
        }
        let header = answer.body.first_chunk::<RTMSG_BYTES>()?;
        let [
            family,
            prefix_len,
            _,
            _,
            table,
            protocol,
            _,
            kind,
            f0,
            f1,
            f2,
            f3,
        ] = *header;
        let any: IpAddr = match family {
            AF_INET => Ipv4Addr::UNSPECIFIED.into(),
            AF_INET6 => Ipv6Addr::UNSPECIFIED.into(),
            _ => return None,
        };
        let mut route = Self {
            destination: any,
            prefix_len,
            hop: NodeHop::Blackhole,
            source: None,
            metric: None,
            table: u32::from(table),
            protocol,
        };
        let mut gateway = None;
        let mut index = 0;
        let number = |value: &[u8]| value.first_chunk::<4>().map(|b| u32::from_ne_bytes(*b));
        for (kind, value) in each_attribute(&answer.body[RTMSG_BYTES..]) {
            match kind {
                RTA_DST => route.destination = ip(value)?,
                RTA_OIF => index = number(value)?,
                RTA_GATEWAY => gateway = ip(value),
                RTA_PREFSRC => route.source = ip(value),
                RTA_PRIORITY => route.metric = number(value),
                RTA_TABLE => route.table = number(value)?,
                _ => {}
            }
        }
        if family == AF_INET6 {
            route.metric = route.metric.filter(|metric| *metric != IP6_RT_PRIO_USER);
        }
        let onlink = u32::from_ne_bytes([f0, f1, f2, f3]) & OUR_FLAGS != 0;
        route.hop = match (kind, gateway) {
            (RTN_UNICAST, Some(gateway)) => NodeHop::Gateway {
                gateway,
                index,
                onlink,
            },
            (RTN_UNICAST, None) => NodeHop::Link { index },
            (RTN_LOCAL, _) => NodeHop::Local { index },
            (RTN_BLACKHOLE, _) => NodeHop::Blackhole,
            _ => return None,
        };
        Some(route)
    }
}

/// Which routes a dump shall give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filter {
    /// Those carrying a protocol number, of every table.
    Protocol(u8),
    /// Those of a table.
    Table(u32),
}

/// One dump per family: the kernel filters only within one.
pub(super) fn dumps(filter: Filter) -> [Request; 2] {
    [AF_INET, AF_INET6].map(|family| {
        let (protocol, table) = match filter {
            Filter::Protocol(protocol) => (protocol, 0),
            Filter::Table(table) => (0, table),
        };
        let small_table = u8::try_from(table).unwrap_or(0);
        let mut body = vec![family, 0, 0, 0, small_table, protocol, 0, 0];
        body.extend([0; 4]);
        Request {
            kind: RTM_GETROUTE,
            flags: 0,
            body,
            operation: "list routes",
            object: format!("of {filter:?}"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_node_route_reader_panic(body: Vec<u8>) {
            let _ = NodeRoute::decode(&Answer { kind: RTM_NEWROUTE, body });
        }
    }
}
