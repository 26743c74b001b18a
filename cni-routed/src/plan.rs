//! Routes and changes, from plain values.

use std::net::IpAddr;

use cni::types::{AttachResult, Route};
use ipnet::IpNet;
use linux::netlink::{
    AddressSpec, Change, Mac, NeighbourSpec, NodeHop, NodeRoute, RouteSpec, TABLE_MAIN,
};

use crate::POD_ROUTE_PROTOCOL;

/// A network of one address.
pub(crate) fn single(address: IpAddr) -> IpNet {
    IpNet::from(address)
}

/// Routes for the container: those asked for, then a default route per family unless one was
/// asked for.
pub(crate) fn routes(result: &AttachResult) -> Vec<Route> {
    let gateway_of = |dst: &IpNet| {
        let same = |ip: &&cni::types::IpConfig| ip.address.addr().is_ipv4() == dst.addr().is_ipv4();
        result.ips.iter().filter(same).find_map(|ip| ip.gateway)
    };
    let mut routes: Vec<Route> = Vec::new();
    let mut push = |route: Route| {
        let key = |r: &Route| (r.dst, r.table, r.priority);
        if !routes.iter().any(|known| key(known) == key(&route)) {
            routes.push(route);
        }
    };
    for route in &result.routes {
        push(Route {
            gw: route.gw.or_else(|| gateway_of(&route.dst)),
            ..route.clone()
        });
    }
    for ip in &result.ips {
        let any = if ip.address.addr().is_ipv4() {
            "0.0.0.0/0"
        } else {
            "::/0"
        };
        if let (Ok(dst), Some(gateway)) = (any.parse(), ip.gateway) {
            push(Route::new(dst, Some(gateway)));
        }
    }
    routes
}

/// What makes the container's end usable, in one request.
pub(crate) fn container_changes(index: u32, result: &AttachResult, host_mac: Mac) -> Vec<Change> {
    let mut changes = Vec::new();
    if !result.ips.iter().any(|ip| ip.address.addr().is_ipv6()) {
        changes.push(Change::NoLinkLocal { index });
    }
    changes.push(Change::SetUp { index, up: true });
    changes.extend(result.ips.iter().map(|ip| {
        Change::AddAddress(AddressSpec {
            index,
            address: ip.address.addr(),
            prefix_len: ip.address.prefix_len(),
            detect_duplicates: false,
        })
    }));
    let gateways = result.ips.iter().filter_map(|ip| ip.gateway);
    for gateway in gateways {
        changes.push(Change::SetNeighbour(NeighbourSpec {
            index,
            address: gateway,
            mac: host_mac,
        }));
        // The address is alone in its network, so that its gateway is on the link must be said.
        changes.push(Change::AddRoute(route_spec(
            index,
            &Route::new(single(gateway), None),
        )));
    }
    let routes = result.routes.iter();
    changes.extend(routes.map(|route| Change::AddRoute(route_spec(index, route))));
    changes
}

/// What makes the node's end usable, in one request.
pub(crate) fn node_changes(
    index: u32,
    alias: String,
    addresses: &[IpAddr],
    mac: Mac,
) -> Vec<Change> {
    let mut changes = vec![
        Change::SetAlias { index, alias },
        Change::NoLinkLocal { index },
        Change::SetUp { index, up: true },
    ];
    for address in addresses {
        changes.push(Change::SetNeighbour(NeighbourSpec {
            index,
            address: *address,
            mac,
        }));
        // In place of what a container that died badly may have left for the same address.
        changes.push(Change::SetNodeRoute(NodeRoute {
            destination: *address,
            prefix_len: single(*address).prefix_len(),
            hop: NodeHop::Link { index },
            source: None,
            metric: None,
            table: TABLE_MAIN,
            protocol: POD_ROUTE_PROTOCOL,
        }));
    }
    changes
}

fn route_spec(index: u32, route: &Route) -> RouteSpec {
    RouteSpec {
        destination: route.dst.network(),
        prefix_len: route.dst.prefix_len(),
        gateway: route.gw,
        index,
        mtu_bytes: route.mtu,
        advmss_bytes: route.advmss,
        priority: route.priority,
        table: route.table,
        scope: route.scope,
    }
}

#[cfg(test)]
mod tests {
    use cni::types::IpConfig;

    use super::*;

    fn result(ips: &[(&str, &str)], routes: &[(&str, Option<&str>)]) -> AttachResult {
        AttachResult {
            ips: ips
                .iter()
                .map(|(address, gateway)| IpConfig {
                    address: address.parse().unwrap(),
                    gateway: Some(gateway.parse().unwrap()),
                    interface: None,
                })
                .collect(),
            routes: routes
                .iter()
                .map(|(dst, gw)| Route::new(dst.parse().unwrap(), gw.map(|g| g.parse().unwrap())))
                .collect(),
            ..AttachResult::default()
        }
    }

    fn shown(routes: &[Route]) -> Vec<String> {
        let via = |r: &Route| r.gw.map(|gw| format!(" via {gw}")).unwrap_or_default();
        routes
            .iter()
            .map(|r| format!("{}{}", r.dst, via(r)))
            .collect()
    }

    #[test]
    fn both_families_reach_their_gateway_and_go_out_by_it() {
        let ips = [("10.1.0.2/32", "10.1.0.1"), ("fd00::2/128", "fd00::1")];
        assert_eq!(
            shown(&routes(&result(&ips, &[("192.0.2.0/24", None)]))),
            [
                "192.0.2.0/24 via 10.1.0.1",
                "0.0.0.0/0 via 10.1.0.1",
                "::/0 via fd00::1",
            ]
        );
    }

    #[test]
    fn a_default_route_asked_for_is_not_doubled() {
        let ips = [("10.1.0.2/32", "10.1.0.1")];
        let asked = result(&ips, &[("0.0.0.0/0", Some("10.1.0.1"))]);
        assert_eq!(shown(&routes(&asked)), ["0.0.0.0/0 via 10.1.0.1"]);
    }
}
