//! Plans and differences in tables.

use linux::netlink::{Change, FdbEntry, Link, Neighbour};

use super::*;
use crate::node::peer_node;

fn conf(direct_routing: bool) -> NetConf {
    NetConf {
        networks: nets(&["10.244.0.0/16", "fd00::/48"]),
        vni: 1,
        port: 8472,
        mtu_bytes: None,
        direct_routing,
        learning: false,
        gbp: false,
        ignored: Vec::new(),
    }
}

fn nets(all: &[&str]) -> Vec<IpNet> {
    all.iter().map(|net| net.parse().unwrap()).collect()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn underlay(address: &str, network: &str) -> Option<Underlay> {
    Some(Underlay {
        index: 2,
        name: "eth0".into(),
        address: ip(address),
        public: ip(address),
        on_link: nets(&[network]),
        mtu_bytes: 1500,
        up: true,
    })
}

fn own() -> PeerNode {
    node("own", &["10.244.1.0/24", "fd00:0:0:1::/64"])
}

fn node(name: &str, cidrs: &[&str]) -> PeerNode {
    let cidrs: Vec<String> = cidrs.iter().map(|c| (*c).to_owned()).collect();
    peer_node(name, &BTreeMap::new(), &cidrs, &[])
}

fn peer(name: &str, cidr: &str, address: &str, mac: u8) -> PeerNode {
    let mut peer = node(name, &[cidr]);
    peer.backend = Some("vxlan".into());
    peer.vni = Some(1);
    let address = ip(address);
    *peer.endpoints.of_mut(Family::of(address)) = Some(Endpoint {
        address,
        mac: Some(Mac([2, 0, 0, 0, 0, mac])),
    });
    peer
}

const INDICES: Indices = Indices {
    devices: PerFamily {
        v4: Some(10),
        v6: Some(11),
    },
    loopback: 1,
};

/// Routes, neighbours and forwarding entries in words, and who was left out.
fn check(backend: Backend, conf: &NetConf, peers: &[PeerNode], expected: &[&str]) {
    let underlays = PerFamily {
        v4: underlay("192.0.2.1", "192.0.2.0/24"),
        v6: underlay("2001:db8::1", "2001:db8::/64"),
    };
    let own = own();
    let place = Place {
        backend,
        conf,
        own: &own,
        underlays: &underlays,
    };
    let wanted = wanted(&place, &INDICES, peers.iter());
    let mut said = Vec::new();
    for route in &wanted.routes {
        let net = format!("{}/{}", route.destination, route.prefix_len);
        match &route.hop {
            NodeHop::Gateway {
                gateway,
                index,
                onlink,
            } => said.push(format!("{net} via {gateway} on {index} {onlink}")),
            NodeHop::Link { index } => said.push(format!("{net} on {index}")),
            // Of every node.
            NodeHop::Local { .. } | NodeHop::Blackhole => {}
        }
    }
    let neighbours = wanted.neighbours.iter();
    said.extend(neighbours.map(|n| format!("{} is {} on {}", n.address, n.mac, n.index)));
    let entries = wanted.fdb.iter();
    said.extend(entries.map(|e| format!("{} to {} on {}", e.mac, e.destination, e.index)));
    said.extend(
        wanted
            .skipped
            .iter()
            .map(|s| format!("{}: {}", s.node, s.why)),
    );
    assert_eq!(said, expected);
}

#[test]
fn a_peer_behind_vxlan_takes_a_route_a_neighbour_and_a_forwarding_entry() {
    check(
        Backend::Vxlan,
        &conf(false),
        &[peer("a", "10.244.2.0/24", "192.0.2.2", 1)],
        &[
            "10.244.2.0/24 via 10.244.2.0 on 10 true",
            "10.244.2.0 is 02:00:00:00:00:01 on 10",
            "02:00:00:00:00:01 to 192.0.2.2 on 10",
        ],
    );
}

#[test]
fn ipv6_goes_by_its_own_device() {
    check(
        Backend::Vxlan,
        &conf(false),
        &[peer("a", "fd00:0:0:2::/64", "2001:db8::2", 1)],
        &[
            "fd00:0:0:2::/64 via fd00:0:0:2:: on 11 true",
            "fd00:0:0:2:: is 02:00:00:00:00:01 on 11",
            "02:00:00:00:00:01 to 2001:db8::2 on 11",
        ],
    );
}

#[test]
fn with_direct_routing_only_far_peers_are_tunnelled() {
    check(
        Backend::Vxlan,
        &conf(true),
        &[
            peer("far", "10.244.2.0/24", "198.51.100.2", 1),
            peer("near", "10.244.3.0/24", "192.0.2.3", 2),
        ],
        &[
            "10.244.2.0/24 via 10.244.2.0 on 10 true",
            "10.244.3.0/24 via 192.0.2.3 on 2 false",
            "10.244.2.0 is 02:00:00:00:00:01 on 10",
            "02:00:00:00:00:01 to 198.51.100.2 on 10",
        ],
    );
}

#[test]
fn host_gw_needs_no_announcement_and_says_who_is_too_far() {
    let silent = |name: &str, cidr: &str, address: &str| {
        let cidrs = [cidr.to_owned()];
        peer_node(name, &BTreeMap::new(), &cidrs, &[ip(address)])
    };
    check(
        Backend::HostGw,
        &conf(false),
        &[
            silent("far", "10.244.2.0/24", "198.51.100.2"),
            silent("near", "10.244.3.0/24", "192.0.2.3"),
        ],
        &[
            "10.244.3.0/24 via 192.0.2.3 on 2 false",
            "far: its address 198.51.100.2 is not on the network of eth0 (192.0.2.0/24), as host-gw needs",
        ],
    );
}

#[test]
fn peers_that_cannot_be_right_are_left_out_by_name() {
    let mut other_vni = peer("vni", "10.244.6.0/24", "192.0.2.6", 6);
    other_vni.vni = Some(7);
    let mut other_backend = peer("backend", "10.244.7.0/24", "192.0.2.7", 7);
    other_backend.backend = Some("host-gw".into());
    let mut no_mac = peer("mac", "10.244.8.0/24", "192.0.2.8", 8);
    no_mac.endpoints.v4.as_mut().unwrap().mac = None;
    check(
        Backend::Vxlan,
        &conf(false),
        &[
            peer("a", "10.244.2.0/24", "192.0.2.2", 1),
            peer("b", "10.244.2.0/25", "192.0.2.3", 2),
            peer("c", "10.244.1.128/25", "192.0.2.4", 3),
            peer("d", "10.244.3.0/24", "192.0.2.1", 4),
            peer("e", "10.244.4.0/24", "192.0.2.5", 1),
            node("new", &["10.244.5.0/24"]),
            other_vni,
            other_backend,
            no_mac,
        ],
        &[
            "10.244.2.0/24 via 10.244.2.0 on 10 true",
            "10.244.2.0 is 02:00:00:00:00:01 on 10",
            "02:00:00:00:00:01 to 192.0.2.2 on 10",
            "b: its podCIDR 10.244.2.0/25 overlaps 10.244.2.0/24 of node a",
            "c: its podCIDR 10.244.1.128/25 overlaps 10.244.1.0/24 of node own",
            "d: it announces our own address 192.0.2.1",
            "e: it announces hardware address 02:00:00:00:00:01, as node a does",
            "new: it announces no IPv4 address yet",
            "vni: it announces VNI 7, ours is 1",
            "backend: it announces back end \"host-gw\"",
            "mac: it announces no hardware address of a vxlan device",
        ],
    );
}

#[test]
fn our_own_networks_are_a_dead_end_and_their_gateways_are_ours() {
    let underlays = PerFamily::default();
    let (conf, own) = (conf(false), own());
    let place = Place {
        backend: Backend::Vxlan,
        conf: &conf,
        own: &own,
        underlays: &underlays,
    };
    let wanted = wanted(&place, &INDICES, std::iter::empty());
    let shown: Vec<String> = wanted
        .routes
        .iter()
        .map(|r| format!("{} {:?}", r.destination, r.hop))
        .collect();
    assert_eq!(
        shown,
        [
            "10.244.1.0 Blackhole",
            "10.244.1.1 Local { index: 1 }",
            "fd00:0:0:1:: Blackhole",
            "fd00:0:0:1::1 Local { index: 1 }",
        ]
    );
}

#[test]
fn the_mtu_leaves_room_for_the_outer_headers_of_each_family() {
    let underlays = PerFamily {
        v4: underlay("192.0.2.1", "192.0.2.0/24"),
        v6: underlay("2001:db8::1", "2001:db8::/64"),
    };
    let (plain, own) = (conf(false), own());
    let mtu = |backend, conf: &NetConf, own: &PeerNode| {
        let place = Place {
            backend,
            conf,
            own,
            underlays: &underlays,
        };
        let devices = place.devices();
        let devices = devices
            .iter()
            .map(|device| device.spec.mtu_bytes)
            .collect::<Vec<_>>();
        (place.pod_mtu().unwrap(), devices)
    };
    assert_eq!(mtu(Backend::Vxlan, &plain, &own), (1430, vec![1450, 1430]));
    assert_eq!(mtu(Backend::HostGw, &plain, &own), (1500, vec![]));
    let v4_only = node("own", &["10.244.1.0/24"]);
    assert_eq!(mtu(Backend::Vxlan, &plain, &v4_only), (1450, vec![1450]));
    let mut asked = plain;
    asked.mtu_bytes = Some(9000);
    assert_eq!(
        mtu(Backend::Vxlan, &asked, &v4_only).0,
        1450,
        "more does not fit"
    );
    asked.mtu_bytes = Some(1400);
    assert_eq!(mtu(Backend::Vxlan, &asked, &v4_only).0, 1400);
}

#[test]
fn the_hardware_address_is_the_nodes_own_for_good() {
    let mac = vtep_mac("node-1", 1, Family::V4);
    assert_eq!(mac, vtep_mac("node-1", 1, Family::V4));
    for other in [
        vtep_mac("node-2", 1, Family::V4),
        vtep_mac("node-1", 2, Family::V4),
        vtep_mac("node-1", 1, Family::V6),
    ] {
        assert_ne!(mac, other);
        assert_eq!(other.0[0] & 0b11, 0b10, "{other} is local and no group");
    }
}

#[test]
fn a_plan_that_is_in_place_takes_no_change() {
    let conf = conf(false);
    let own = own();
    let underlays = PerFamily {
        v4: underlay("192.0.2.1", "192.0.2.0/24"),
        v6: None,
    };
    let place = Place {
        backend: Backend::Vxlan,
        conf: &conf,
        own: &own,
        underlays: &underlays,
    };
    let peers = [peer("a", "10.244.2.0/24", "192.0.2.2", 1)];
    let wanted = wanted(&place, &INDICES, peers.iter());
    assert_eq!(route_changes(&wanted.routes, &wanted.routes, true), []);
    let neighbours: Vec<Neighbour> = wanted
        .neighbours
        .iter()
        .map(|n| Neighbour {
            index: n.index,
            address: n.address,
            mac: Some(n.mac),
            permanent: true,
        })
        .collect();
    assert_eq!(
        neighbour_changes(10, &wanted.neighbours, &neighbours, true),
        []
    );
    let entries: Vec<FdbEntry> = wanted.fdb.iter().map(|e| entry(e, e.destination)).collect();
    assert_eq!(fdb_changes(10, &wanted.fdb, &entries, true), []);
}

fn entry(spec: &FdbSpec, destination: IpAddr) -> FdbEntry {
    FdbEntry {
        index: spec.index,
        mac: spec.mac,
        destination: Some(destination),
        permanent: true,
    }
}

#[test]
fn strangers_go_and_what_differs_is_replaced_in_one_step() {
    let route = |destination: &str, gateway: &str| NodeRoute {
        destination: ip(destination),
        prefix_len: 24,
        hop: NodeHop::Gateway {
            gateway: ip(gateway),
            index: 2,
            onlink: false,
        },
        source: None,
        metric: None,
        table: TABLE_MAIN,
        protocol: PEER_ROUTE_PROTOCOL,
    };
    let wanted = [route("10.244.2.0", "192.0.2.2")];
    let found = [
        route("10.244.2.0", "192.0.2.9"),
        route("10.244.9.0", "192.0.2.9"),
    ];
    assert_eq!(
        route_changes(&wanted, &found, true),
        [
            Change::RemoveNodeRoute(found[1].clone()),
            Change::SetNodeRoute(wanted[0].clone()),
        ]
    );
    // Before the first full list nobody is a stranger.
    assert_eq!(
        route_changes(&wanted, &found, false),
        [Change::SetNodeRoute(wanted[0].clone())]
    );
    let spec = FdbSpec {
        index: 10,
        mac: Mac([2, 0, 0, 0, 0, 1]),
        destination: ip("192.0.2.2"),
    };
    let wanted = [spec.clone()];
    let moved = [entry(&spec, ip("192.0.2.9"))];
    assert_eq!(
        fdb_changes(10, &wanted, &moved, true),
        [Change::SetFdb(spec.clone())]
    );
    let stranger = FdbSpec {
        mac: Mac([2, 0, 0, 0, 0, 9]),
        ..spec.clone()
    };
    let both = [
        entry(&spec, spec.destination),
        entry(&stranger, stranger.destination),
    ];
    assert_eq!(
        fdb_changes(10, &wanted, &both, true),
        [Change::RemoveFdb(stranger)]
    );
}

fn link(index: u32, name: &str) -> Link {
    Link {
        index,
        name: name.into(),
        up: true,
        mtu_bytes: 1500,
        ..Link::default()
    }
}

#[test]
fn the_underlay_is_asked_for_or_has_the_internal_ip_or_the_default_route() {
    let address = |index, text: &str| linux::netlink::AddressSpec {
        index,
        address: ip(text),
        prefix_len: 24,
        detect_duplicates: false,
    };
    let facts = LinkFacts {
        addresses: vec![
            address(1, "127.0.0.1"),
            address(2, "192.0.2.1"),
            address(3, "198.51.100.1"),
            address(3, "198.51.100.7"),
        ],
        routes: vec![NodeRoute {
            destination: ip("0.0.0.0"),
            prefix_len: 0,
            hop: NodeHop::Gateway {
                gateway: ip("198.51.100.254"),
                index: 3,
                onlink: false,
            },
            source: None,
            metric: None,
            table: TABLE_MAIN,
            protocol: 3,
        }],
        links: vec![link(1, "lo"), link(2, "eth0"), link(3, "eth1")],
    };
    let chosen = |interface: Option<&str>, internal: &[&str]| {
        let wish = UnderlayWish {
            interface: interface.map(str::to_owned),
            public: Vec::new(),
            internal: internal.iter().map(|text| ip(text)).collect(),
        };
        choose(Family::V4, &wish, &facts).map(|u| format!("{} {}", u.name, u.address))
    };
    assert_eq!(
        chosen(None, &["192.0.2.1"]).as_deref(),
        Some("eth0 192.0.2.1")
    );
    assert_eq!(
        chosen(None, &["203.0.113.9"]).as_deref(),
        Some("eth1 198.51.100.1")
    );
    assert_eq!(chosen(None, &[]).as_deref(), Some("eth1 198.51.100.1"));
    assert_eq!(
        chosen(Some("eth0"), &["198.51.100.1"]).as_deref(),
        Some("eth0 192.0.2.1")
    );
    assert_eq!(
        chosen(Some("198.51.100.7"), &[]).as_deref(),
        Some("eth1 198.51.100.7")
    );
    assert_eq!(chosen(Some("eth9"), &["192.0.2.1"]), None);
}

proptest::proptest! {
    /// Whatever the nodes say: no two routes to one destination, every neighbour has its
    /// forwarding entry, and applying the differences to any state gives the plan.
    #[test]
    fn every_plan_is_consistent(nodes: Vec<(u8, u8, u8)>) {
        let peers: Vec<PeerNode> = nodes
            .iter()
            .enumerate()
            .map(|(n, (cidr, address, mac))| {
                let cidr = format!("10.244.{cidr}.0/24");
                peer(&format!("n{n}"), &cidr, &format!("192.0.2.{address}"), *mac)
            })
            .collect();
        let underlays = PerFamily { v4: underlay("192.0.2.1", "192.0.2.0/24"), v6: None };
        let (conf, own) = (conf(false), own());
        let place = Place { backend: Backend::Vxlan, conf: &conf, own: &own, underlays: &underlays };
        let wanted = wanted(&place, &INDICES, peers.iter());
        let mut seen = std::collections::HashSet::new();
        for route in &wanted.routes {
            proptest::prop_assert!(seen.insert((route.destination, route.prefix_len)));
        }
        for neighbour in &wanted.neighbours {
            let entries = wanted.fdb.iter().filter(|entry| entry.mac == neighbour.mac);
            proptest::prop_assert!(entries.count() >= 1);
        }
        proptest::prop_assert_eq!(wanted.reached + wanted.skipped.len(), peers.len());
    }
}
