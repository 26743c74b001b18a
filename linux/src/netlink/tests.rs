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
    assert_eq!(rtnl.apply(&[remove.clone()]).unwrap(), [Outcome::Done]);
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
