//! Names, hardware addresses, addresses and routes, from plain values.

use std::net::IpAddr;

use cni::ipam::Owner;
use cni::types::{AttachResult, Route};
use ipnet::IpNet;
use linux::netlink::{AddressSpec, Change, Mac, RouteSpec};

/// First of every alias of ours.
const MARK: &str = "ferrule";

/// The kernel keeps 255 bytes of an alias.
const MAX_ALIAS_BYTES: usize = 255;

/// Name of the node's end: the same for the same attachment, so that DEL and a repeated ADD find
/// it without asking anyone. 52 bits of hash: among 10 000 pods a clash has a chance of 1 in 90
/// million, and the alias tells it.
pub(crate) fn host_name(network: &str, owner: &Owner) -> String {
    let key = format!("{network}\0{}\0{}", owner.container_id, owner.ifname);
    format!("fv{:013x}", hash(key.as_bytes()) >> 12)
}

/// The owner's mark on the node's end.
pub(crate) fn alias(network: &str, owner: &Owner) -> String {
    let mut alias = format!("{MARK}:{network}:{}:{}", owner.ifname, owner.container_id);
    // Names are ASCII, so any place is a boundary.
    alias.truncate(MAX_ALIAS_BYTES);
    alias
}

/// Begins the alias of every port of a network.
pub(crate) fn alias_prefix(network: &str) -> String {
    format!("{MARK}:{network}:")
}

/// Hardware address of the container's end: made from its first address, so that whoever still
/// has the former holder of a reused address in his neighbour table is right nonetheless, and
/// nothing needs to be announced. Without an address, from the attachment.
pub(crate) fn container_mac(first: Option<IpAddr>, host_name: &str) -> Mac {
    match first {
        Some(IpAddr::V4(v4)) => {
            let [a, b, c, d] = v4.octets();
            Mac([0x0a, 0x58, a, b, c, d])
        }
        Some(IpAddr::V6(v6)) => hashed_mac(0x0e, &v6.octets()),
        None => hashed_mac(0x06, host_name.as_bytes()),
    }
}

/// Hardware address of the node's end: fixed at creation, so that nothing (udev) changes it.
pub(crate) fn host_mac(host_name: &str) -> Mac {
    hashed_mac(0x02, host_name.as_bytes())
}

/// Hardware address of the bridge: of its own, or it would change with its ports.
pub(crate) fn bridge_mac(bridge: &str, gateway: Option<IpAddr>) -> Mac {
    match gateway {
        Some(IpAddr::V4(v4)) => container_mac(Some(v4.into()), bridge),
        Some(IpAddr::V6(_)) | None => hashed_mac(0x02, bridge.as_bytes()),
    }
}

/// Locally administered (bit 1), not a group (bit 0): `first` has the former only.
fn hashed_mac(first: u8, bytes: &[u8]) -> Mac {
    let [_, _, _, a, b, c, d, e] = hash(bytes).to_be_bytes();
    Mac([first, a, b, c, d, e])
}

fn hash(bytes: &[u8]) -> u64 {
    let sum = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    // FNV's last step spreads the last bytes badly; one more mixing round mends that.
    let mixed = (sum ^ (sum >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^ (mixed >> 33)
}

/// Gateways with the prefix of their subnets: what the bridge carries.
pub(crate) fn gateways(result: &AttachResult) -> Vec<IpNet> {
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
pub(crate) fn routes(result: &AttachResult, default_gateway: bool) -> Vec<Route> {
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
pub(crate) fn container_changes(
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
    use cni::types::IpConfig;

    use super::*;

    fn owner(id: &str) -> Owner {
        Owner {
            container_id: id.into(),
            ifname: "eth0".into(),
        }
    }

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
    fn names_fit_and_differ() {
        let name = host_name("net", &owner("a"));
        assert_eq!(name.len(), 15);
        assert_ne!(name, host_name("net", &owner("b")));
        assert_ne!(name, host_name("net2", &owner("a")));
        let long = alias("net", &owner(&"x".repeat(400)));
        assert_eq!(long.len(), 255);
        assert!(long.starts_with(&alias_prefix("net")));
    }

    #[test]
    fn a_reused_address_has_the_same_hardware_address() {
        let ip = Some("10.244.0.2".parse().unwrap());
        assert_eq!(container_mac(ip, "a").to_string(), "0a:58:0a:f4:00:02");
        assert_eq!(container_mac(ip, "a"), container_mac(ip, "b"));
        for mac in [
            container_mac(None, "x"),
            host_mac("x"),
            bridge_mac("cni0", None),
        ] {
            assert_eq!(mac.0[0] & 0b11, 0b10, "{mac} is local and no group");
        }
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
