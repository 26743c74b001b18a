//! Gateways, routes and what is to be done inside the container, from plain values.

use crate::types::{AttachResult, Route};
use ipnet::IpNet;
use linux::netlink::{AddressSpec, Change, RouteSpec};

/// Gateways with the prefix of their subnets: what the bridge carries.
#[must_use]
pub fn gateways(result: &AttachResult) -> Vec<IpNet> {
    let mut all: Vec<IpNet> = Vec::new();
    for ip in &result.ips {
        let net = ip
            .gateway
            .and_then(|gw| IpNet::new(gw, ip.address.prefix_len()).ok());
        if let Some(net) = net
            && !all.contains(&net)
        {
            all.push(net);
        }
    }
    all
}

/// Routes for the container: those asked for, next hops filled in, a default route when wanted,
/// none twice (plugins/bridge fails with "file exists" there).
#[must_use]
pub fn routes(result: &AttachResult, default_gateway: bool) -> Vec<Route> {
    let gateway_of = |dst: &IpNet| {
        let same =
            |ip: &&crate::types::IpConfig| ip.address.addr().is_ipv4() == dst.addr().is_ipv4();
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
    if default_gateway {
        for ip in &result.ips {
            let all = if ip.address.addr().is_ipv4() {
                "0.0.0.0/0"
            } else {
                "::/0"
            };
            if let (Ok(dst), Some(gateway)) = (all.parse(), ip.gateway) {
                push(Route::new(dst, Some(gateway)));
            }
        }
    }
    routes
}

/// What makes the container's end usable, in one request.
#[must_use]
pub fn container_changes(
    index: u32,
    result: &AttachResult,
    detect_duplicates: bool,
) -> Vec<Change> {
    let mut changes = Vec::new();
    if !result.ips.iter().any(|ip| ip.address.addr().is_ipv6()) {
        // Each link-local address costs several multicast packets to every port of the bridge:
        // with it, an ADD beside 600 pods takes many times that of the first.
        changes.push(Change::NoLinkLocal { index });
    }
    changes.push(Change::SetUp { index, up: true });
    changes.extend(result.ips.iter().map(|ip| {
        Change::AddAddress(AddressSpec {
            index,
            address: ip.address.addr(),
            prefix_len: ip.address.prefix_len(),
            detect_duplicates,
        })
    }));
    changes.extend(
        result
            .routes
            .iter()
            .map(|route| Change::AddRoute(route_spec(index, route))),
    );
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
    use crate::types::IpConfig;

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
        routes
            .iter()
            .map(|r| format!("{} via {:?}", r.dst, r.gw.map(|g| g.to_string())))
            .collect()
    }

    #[test]
    fn a_default_route_that_is_there_already_is_not_doubled() {
        let with = result(&[("10.1.0.2/24", "10.1.0.1")], &[("0.0.0.0/0", None)]);
        assert_eq!(
            shown(&routes(&with, true)),
            [r#"0.0.0.0/0 via Some("10.1.0.1")"#]
        );
    }

    #[test]
    fn both_families_get_their_gateways() {
        let ips = [("10.1.0.2/24", "10.1.0.1"), ("fd00::2/64", "fd00::1")];
        let with = result(
            &ips,
            &[("fd99::/16", None), ("10.9.0.0/16", Some("10.1.0.7"))],
        );
        assert_eq!(
            shown(&routes(&with, true)),
            [
                r#"fd99::/16 via Some("fd00::1")"#,
                r#"10.9.0.0/16 via Some("10.1.0.7")"#,
                r#"0.0.0.0/0 via Some("10.1.0.1")"#,
                r#"::/0 via Some("fd00::1")"#,
            ]
        );
        let gateways: Vec<_> = gateways(&with).iter().map(ToString::to_string).collect();
        assert_eq!(gateways, ["10.1.0.1/24", "fd00::1/64"]);
    }
}
