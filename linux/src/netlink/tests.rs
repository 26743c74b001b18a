//! Against the kernel, each test in network namespaces of its own. Needs root.

use std::os::fd::{AsFd, AsRawFd};

use super::*;

fn mac(last: u8) -> Mac {
    Mac([0x0a, 0x58, 10, 1, 0, last])
}

fn address(index: u32, text: &str, prefix_len: u8) -> AddressSpec {
    AddressSpec {
        index,
        address: text.parse().unwrap(),
        prefix_len,
        detect_duplicates: false,
    }
}

#[test]
fn a_pair_is_born_in_the_bridge_and_in_the_namespace_by_one_request() {
    let (node, pod) = (
        crate::netlink::new_netns().expect("root is needed"),
        crate::netlink::new_netns().expect("root is needed"),
    );
    let mut rtnl = Rtnl::open_in(node.as_fd()).unwrap();
    let bridge = BridgeSpec {
        name: "br0".into(),
        mac: Some(mac(1)),
        mtu_bytes: Some(1400),
    };
    let made = rtnl.apply(&[Change::AddBridge(bridge.clone())]).unwrap();
    assert_eq!(made, [Outcome::Done]);
    assert_eq!(
        rtnl.apply(&[Change::AddBridge(bridge)]).unwrap(),
        [Outcome::Unchanged]
    );
    let bridge = rtnl.link_by_name("br0").unwrap().unwrap();
    assert_eq!(
        (bridge.mac, bridge.up, bridge.kind.as_str()),
        (Some(mac(1)), true, "bridge")
    );

    let veth = VethSpec {
        name: "v1".into(),
        mac: mac(2),
        master: Some(bridge.index),
        mtu_bytes: Some(1400),
        peer_name: "eth0".into(),
        peer_mac: mac(3),
        peer_netns: pod.as_raw_fd(),
    };
    rtnl.apply(&[Change::AddVeth(veth.clone())]).unwrap();
    let ours = rtnl.link_by_name("v1").unwrap().unwrap();
    assert_eq!(ours.master, Some(bridge.index));
    assert_eq!(
        (ours.up, ours.mtu_bytes, ours.mac),
        (false, 1400, Some(mac(2)))
    );
    let mut inside = Rtnl::open_in(pod.as_fd()).unwrap();
    let peer = inside.link_by_name("eth0").unwrap().unwrap();
    assert_eq!(
        (peer.up, peer.mtu_bytes, peer.mac),
        (false, 1400, Some(mac(3)))
    );
    assert_eq!(
        rtnl.apply(&[Change::AddVeth(veth)]).unwrap(),
        [Outcome::Unchanged]
    );

    rtnl.apply(&[
        Change::SetAlias {
            index: ours.index,
            alias: "owner".into(),
        },
        Change::NoLinkLocal { index: ours.index },
        Change::SetUp {
            index: ours.index,
            up: true,
        },
        Change::SetPort(PortSpec {
            index: ours.index,
            hairpin: true,
            isolated: true,
        }),
    ])
    .unwrap();
    inside
        .apply(&[Change::SetUp {
            index: peer.index,
            up: true,
        }])
        .unwrap();
    assert_eq!(rtnl.addresses_of(ours.index).unwrap(), []);
    let ports = rtnl.ports_of(bridge.index).unwrap();
    assert_eq!(ports.len(), 1);
    let port = &ports[0];
    assert_eq!(
        (port.alias.as_str(), port.hairpin, port.isolated),
        ("owner", true, true)
    );

    let remove = Change::RemoveLink { name: "v1".into() };
    assert_eq!(
        rtnl.apply(std::slice::from_ref(&remove)).unwrap(),
        [Outcome::Done]
    );
    assert_eq!(rtnl.apply(&[remove]).unwrap(), [Outcome::Unchanged]);
    assert!(inside.link_by_name("eth0").unwrap().is_none());
}

#[test]
fn addresses_and_routes_of_both_families_come_and_go_twice() {
    let netns = crate::netlink::new_netns().expect("root is needed");
    let mut rtnl = Rtnl::open_in(netns.as_fd()).unwrap();
    let spec = BridgeSpec {
        name: "br0".into(),
        mac: None,
        mtu_bytes: None,
    };
    rtnl.apply(&[Change::AddBridge(spec)]).unwrap();
    let index = rtnl.link_by_name("br0").unwrap().unwrap().index;
    let route = |destination: &str, prefix_len, gateway: &str| RouteSpec {
        destination: destination.parse().unwrap(),
        prefix_len,
        gateway: Some(gateway.parse().unwrap()),
        index,
        mtu_bytes: Some(1300),
        advmss_bytes: None,
        priority: None,
        table: None,
        scope: None,
    };
    let add = [
        Change::AddAddress(address(index, "10.1.0.2", 24)),
        Change::AddAddress(address(index, "fd00::2", 64)),
        Change::AddRoute(route("0.0.0.0", 0, "10.1.0.1")),
        Change::AddRoute(route("::", 0, "fd00::1")),
    ];
    assert_eq!(rtnl.apply(&add).unwrap(), [Outcome::Done; 4]);
    assert_eq!(rtnl.apply(&add).unwrap(), [Outcome::Unchanged; 4]);
    let found = rtnl.addresses_of(index).unwrap();
    for wanted in [
        address(index, "10.1.0.2", 24),
        address(index, "fd00::2", 64),
    ] {
        assert!(found.contains(&wanted), "{wanted:?} in {found:?}");
    }
    let routes = rtnl.routes_of(index).unwrap();
    for (destination, gateway) in [("0.0.0.0", "10.1.0.1"), ("::", "fd00::1")] {
        let default = routes
            .iter()
            .find(|r| r.prefix_len == 0 && r.destination.to_string() == destination);
        assert_eq!(
            default.unwrap().gateway,
            Some(gateway.parse().unwrap()),
            "{routes:?}"
        );
    }
    let remove = [
        Change::RemoveRoute(route("::", 0, "fd00::1")),
        Change::RemoveRoute(route("0.0.0.0", 0, "10.1.0.1")),
        Change::RemoveAddress(address(index, "fd00::2", 64)),
        Change::RemoveAddress(address(index, "10.1.0.2", 24)),
    ];
    assert_eq!(rtnl.apply(&remove).unwrap(), [Outcome::Done; 4]);
    assert_eq!(rtnl.apply(&remove).unwrap(), [Outcome::Unchanged; 4]);
}

#[test]
fn a_refusal_names_operation_object_and_reason() {
    let netns = crate::netlink::new_netns().expect("root is needed");
    let mut rtnl = Rtnl::open_in(netns.as_fd()).unwrap();
    let error = rtnl
        .apply(&[Change::SetUp {
            index: 99,
            up: true,
        }])
        .unwrap_err();
    assert_eq!(error.to_string(), "set up link 99");
    assert_eq!(error.errno(), Some(libc::ENODEV));
    assert_eq!(rtnl.link_by_index(99).unwrap(), None);
}

fn vxlan(name: &str, vni: u32) -> VxlanSpec {
    VxlanSpec {
        name: name.into(),
        mac: mac(9),
        mtu_bytes: 1400,
        alias: String::new(),
        config: VxlanConfig {
            vni,
            port: 8472,
            local: None,
            underlay: None,
            learning: false,
            gbp: false,
        },
    }
}

#[test]
fn a_vxlan_device_reads_back_as_made_and_its_identifier_is_its_own() {
    let netns = crate::netlink::new_netns().expect("root is needed");
    let mut rtnl = Rtnl::open_in(netns.as_fd()).unwrap();
    let spec = vxlan("vx0", 7);
    let add = [Change::AddVxlan(spec.clone())];
    assert_eq!(rtnl.apply(&add).unwrap(), [Outcome::Done]);
    assert_eq!(rtnl.apply(&add).unwrap(), [Outcome::Unchanged]);
    let link = rtnl.link_by_name("vx0").unwrap().unwrap();
    assert_eq!(link.vxlan, Some(spec.config));
    assert_eq!((link.mac, link.mtu_bytes), (Some(mac(9)), 1400));
    let twin = [Change::AddVxlan(vxlan("vx1", 7))];
    assert_eq!(rtnl.apply(&twin).unwrap(), [Outcome::Unchanged]);
    assert_eq!(rtnl.link_by_name("vx1").unwrap(), None);
    assert_eq!(rtnl.links_of_kind("vxlan").unwrap(), [link]);
}

#[test]
fn neighbours_and_forwarding_entries_are_replaced_listed_and_removed() {
    let netns = crate::netlink::new_netns().expect("root is needed");
    let mut rtnl = Rtnl::open_in(netns.as_fd()).unwrap();
    rtnl.apply(&[Change::AddVxlan(vxlan("vx0", 7))]).unwrap();
    let index = rtnl.link_by_name("vx0").unwrap().unwrap().index;
    rtnl.apply(&[Change::SetUp { index, up: true }]).unwrap();
    for address in ["10.1.0.0", "fd00::"] {
        let address = address.parse().unwrap();
        let with = |last| NeighbourSpec {
            index,
            address,
            mac: mac(last),
        };
        let set = [1, 2].map(|last| Change::SetNeighbour(with(last)));
        rtnl.apply(&set).unwrap();
        let found = rtnl.neighbours_of(index).unwrap();
        let ours: Vec<_> = found
            .iter()
            .filter(|n| n.permanent && n.address == address)
            .collect();
        assert_eq!(ours.len(), 1, "{found:?}");
        assert_eq!(ours[0].mac, Some(mac(2)));
        let remove = [Change::RemoveNeighbour(with(2))];
        assert_eq!(rtnl.apply(&remove).unwrap(), [Outcome::Done]);
        assert_eq!(rtnl.apply(&remove).unwrap(), [Outcome::Unchanged]);
    }
    let to = |destination: &str| FdbSpec {
        index,
        mac: mac(3),
        destination: destination.parse().unwrap(),
    };
    rtnl.apply(&[
        Change::SetFdb(to("192.0.2.1")),
        Change::SetFdb(to("192.0.2.2")),
    ])
    .unwrap();
    let found = rtnl.fdb_of(index).unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!((found[0].mac, found[0].permanent), (mac(3), true));
    assert_eq!(found[0].destination, "192.0.2.2".parse().ok());
    let remove = [Change::RemoveFdb(to("192.0.2.2"))];
    assert_eq!(rtnl.apply(&remove).unwrap(), [Outcome::Done]);
    assert_eq!(rtnl.apply(&remove).unwrap(), [Outcome::Unchanged]);
}

#[test]
fn routes_of_every_type_read_back_as_set_and_only_ours_are_listed() {
    let netns = crate::netlink::new_netns().expect("root is needed");
    let mut rtnl = Rtnl::open_in(netns.as_fd()).unwrap();
    let loopback = rtnl.link_by_name("lo").unwrap().unwrap().index;
    rtnl.apply(&[Change::AddVxlan(vxlan("vx0", 7))]).unwrap();
    let index = rtnl.link_by_name("vx0").unwrap().unwrap().index;
    let up = |index| Change::SetUp { index, up: true };
    rtnl.apply(&[up(loopback), up(index)]).unwrap();
    let route = |destination: &str, prefix_len, hop, table| NodeRoute {
        destination: destination.parse().unwrap(),
        prefix_len,
        hop,
        source: None,
        metric: None,
        table,
        protocol: 140,
    };
    let via = |gateway: &str| NodeHop::Gateway {
        gateway: gateway.parse().unwrap(),
        index,
        onlink: true,
    };
    let local = NodeHop::Local { index: loopback };
    let wanted = [
        route("10.1.0.0", 24, via("10.1.0.0"), TABLE_MAIN),
        route("10.2.0.0", 24, NodeHop::Blackhole, TABLE_MAIN),
        route("10.2.0.1", 32, local.clone(), TABLE_LOCAL),
        route("10.3.0.1", 32, NodeHop::Link { index }, TABLE_MAIN),
        route("fd00:1::", 64, via("fd00:1::"), TABLE_MAIN),
        route("fd00:2::", 64, NodeHop::Blackhole, TABLE_MAIN),
        route("fd00:2::1", 128, local, TABLE_LOCAL),
        route("fd00:3::1", 128, NodeHop::Link { index }, TABLE_MAIN),
    ];
    let set: Vec<Change> = wanted.iter().cloned().map(Change::SetNodeRoute).collect();
    for outcome in rtnl.apply_each(&set).unwrap() {
        outcome.unwrap();
    }
    let mut foreign = wanted[1].clone();
    (foreign.protocol, foreign.destination) = (4, "10.9.0.0".parse().unwrap());
    rtnl.apply(&[Change::SetNodeRoute(foreign)]).unwrap();
    let found = rtnl.routes_of_protocol(140).unwrap();
    for route in &wanted {
        assert!(found.contains(route), "{route:?} in {found:?}");
    }
    assert_eq!(found.len(), wanted.len());
    // Another hop to the same destination takes the place of the first.
    let mut moved = wanted[0].clone();
    moved.hop = NodeHop::Blackhole;
    rtnl.apply(&[Change::SetNodeRoute(moved.clone())]).unwrap();
    let found = rtnl.routes_of_protocol(140).unwrap();
    assert!(
        found.contains(&moved) && !found.contains(&wanted[0]),
        "{found:?}"
    );
    let remove: Vec<Change> = found.into_iter().map(Change::RemoveNodeRoute).collect();
    for outcome in rtnl.apply_each(&remove).unwrap() {
        assert_eq!(outcome.unwrap(), Outcome::Done);
    }
    assert_eq!(rtnl.routes_of_protocol(140).unwrap(), []);
}

#[test]
fn changes_are_heard_and_more_than_fits_is_told_as_an_overrun() {
    let netns = crate::netlink::new_netns().expect("root is needed");
    let open = |bytes| in_netns(netns.as_fd(), || EventSocket::routes(bytes).unwrap()).unwrap();
    let (mut roomy, mut tiny) = (open(1 << 20), open(1024));
    let mut rtnl = Rtnl::open_in(netns.as_fd()).unwrap();
    rtnl.apply(&[Change::AddVxlan(vxlan("vx0", 7))]).unwrap();
    let index = rtnl.link_by_name("vx0").unwrap().unwrap().index;
    let address = |last: u8| Change::AddAddress(address(index, &format!("10.1.0.{last}"), 32));
    let many: Vec<Change> = (1..200).map(address).collect();
    rtnl.apply_each(&many).unwrap();
    let heard = |socket: &mut EventSocket| {
        let mut events = Vec::new();
        socket.drain(|event| events.push(event)).unwrap();
        events
    };
    let events = heard(&mut roomy);
    assert!(events.contains(&NetEvent::Link { index }), "{events:?}");
    let addresses = events.iter().filter(|e| **e == NetEvent::Address { index });
    assert_eq!(addresses.count(), 199);
    assert!(heard(&mut tiny).contains(&NetEvent::Overrun));
    assert_eq!(heard(&mut tiny), [], "read empty");
}
