//! Whatever others alter, traffic is back within three seconds.

use std::net::IpAddr;

use linux::netlink::{
    Change, EventSocket, FdbSpec, Mac, NeighbourSpec, NetEvent, NodeHop, NodeRoute, TABLE_MAIN,
};
use linux::sysctl::Sysctl;

use super::lab::{Families, Lab, Node, address, heals, link, reaches, to_port, within_limit};
use crate::netconf::Backend;
use cni_routed::PEER_ROUTE_PROTOCOL;

/// Breaks something on the first node and waits for traffic. `damage` must really break it or at
/// least differ; that it is put back is seen by the counter of repairs.
fn check(backend: Backend, what: &str, damage: impl FnOnce(&Node)) {
    let mut lab = Lab::new(2, backend, Families::V4);
    let (one, two) = lab.pods();
    heals(&one, &two, "the start");
    let before = lab.nodes[0].wait(|report| report.trouble.is_none()).repairs;
    damage(&lab.nodes[0]);
    heals(&one, &two, what);
    lab.nodes[0].wait(|report| report.repairs > before && report.trouble.is_none());
}

fn device(node: &Node) -> u32 {
    link(&mut node.rtnl(), "fvx.1").index
}

fn apply(node: &Node, change: Change) {
    node.rtnl().apply(&[change]).unwrap();
}

fn peer_mac() -> Mac {
    crate::peers::vtep_mac("node-2", 1, crate::node::Family::V4)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn route(hop: NodeHop) -> NodeRoute {
    NodeRoute {
        destination: ip("10.244.2.0"),
        prefix_len: 24,
        hop,
        source: None,
        metric: None,
        table: TABLE_MAIN,
        protocol: PEER_ROUTE_PROTOCOL,
    }
}

fn tunnel_route(node: &Node) -> NodeRoute {
    route(NodeHop::Gateway {
        gateway: ip("10.244.2.0"),
        index: device(node),
        onlink: true,
    })
}

#[test]
fn a_deleted_vxlan_device_comes_back_with_all_its_peers() {
    check(Backend::Vxlan, "the device was deleted", |node| {
        apply(
            node,
            Change::RemoveLink {
                name: "fvx.1".into(),
            },
        );
    });
}

#[test]
fn a_vxlan_device_set_down_comes_up_with_all_its_peers() {
    check(Backend::Vxlan, "the device was set down", |node| {
        let index = device(node);
        apply(node, Change::SetUp { index, up: false });
    });
}

#[test]
fn a_vxlan_device_with_another_hardware_address_gets_its_own_back() {
    check(
        Backend::Vxlan,
        "the device's hardware address was changed",
        |node| {
            let (index, mac) = (device(node), Mac([2, 9, 9, 9, 9, 9]));
            apply(node, Change::SetMac { index, mac });
        },
    );
}

#[test]
fn a_vxlan_device_without_its_address_gets_it_back() {
    check(Backend::Vxlan, "the device's address was removed", |node| {
        apply(
            node,
            Change::RemoveAddress(address(device(node), "10.244.1.0/32")),
        );
    });
}

#[test]
fn a_vxlan_device_of_another_mtu_gets_the_right_one_back() {
    check(Backend::Vxlan, "the device's MTU was changed", |node| {
        let (index, mtu_bytes) = (device(node), 600);
        apply(node, Change::SetMtu { index, mtu_bytes });
    });
}

#[test]
fn a_deleted_route_comes_back() {
    check(Backend::Vxlan, "the route was deleted", |node| {
        apply(node, Change::RemoveNodeRoute(tunnel_route(node)));
    });
    check(Backend::HostGw, "the route was deleted", |node| {
        let index = link(&mut node.rtnl(), "eth0").index;
        let gateway = ip("192.0.2.2");
        let hop = NodeHop::Gateway {
            gateway,
            index,
            onlink: false,
        };
        apply(node, Change::RemoveNodeRoute(route(hop)));
    });
}

#[test]
fn an_altered_route_is_put_right() {
    for backend in [Backend::Vxlan, Backend::HostGw] {
        check(backend, "the route was led into nothing", |node| {
            apply(node, Change::SetNodeRoute(route(NodeHop::Blackhole)));
        });
    }
}

#[test]
fn a_deleted_or_altered_neighbour_is_put_right() {
    let neighbour = |node: &Node, mac| NeighbourSpec {
        index: device(node),
        address: ip("10.244.2.0"),
        mac,
    };
    check(Backend::Vxlan, "the neighbour was deleted", |node| {
        apply(node, Change::RemoveNeighbour(neighbour(node, peer_mac())));
    });
    check(Backend::Vxlan, "the neighbour was altered", |node| {
        let wrong = Mac([2, 9, 9, 9, 9, 9]);
        apply(node, Change::SetNeighbour(neighbour(node, wrong)));
    });
}

#[test]
fn a_deleted_or_altered_forwarding_entry_is_put_right() {
    let entry = |node: &Node, destination: &str| FdbSpec {
        index: device(node),
        mac: peer_mac(),
        destination: ip(destination),
    };
    check(Backend::Vxlan, "the forwarding entry was deleted", |node| {
        apply(node, Change::RemoveFdb(entry(node, "192.0.2.2")));
    });
    check(Backend::Vxlan, "the forwarding entry was altered", |node| {
        apply(node, Change::SetFdb(entry(node, "192.0.2.99")));
    });
}

#[test]
fn forwarding_switched_off_is_switched_on() {
    for backend in [Backend::Vxlan, Backend::HostGw] {
        check(backend, "forwarding was switched off", |node| {
            node.run(|| {
                let forward = Sysctl::parse("net.ipv4.ip_forward").unwrap();
                forward.write("0").unwrap();
            });
        });
    }
}

#[test]
fn strict_reverse_path_filtering_on_the_device_is_loosened() {
    check(Backend::Vxlan, "strict reverse path filtering", |node| {
        node.run(|| {
            let filter = Sysctl::of(&["net", "ipv4", "conf", "fvx.1", "rp_filter"]).unwrap();
            filter.write("1").unwrap();
        });
    });
}

#[test]
fn flushed_rules_come_back() {
    let mut lab = Lab::new(2, Backend::Vxlan, Families::V4);
    let node = &mut lab.nodes[0];
    node.wait(|report| report.trouble.is_none());
    let chains = node.nft().chains().unwrap();
    assert_eq!(chains.len(), 3, "{chains:?}");
    for _ in 0..5 {
        let status = node.run(|| {
            std::process::Command::new("nft")
                .args(["flush", "ruleset"])
                .status()
        });
        assert!(status.unwrap().success());
        within_limit("the rules are back", || {
            node.nft().chains().unwrap() == chains
        });
    }
}

#[test]
fn host_ports_come_back_after_a_flush() {
    let lab = Lab::new(2, Backend::Vxlan, Families::V4);
    let (node, other) = (&lab.nodes[0], &lab.nodes[1]);
    let mapping = serde_json::json!({"portMappings": [
        {"hostPort": 5353, "containerPort": 53, "protocol": "udp"},
    ]});
    let pod = node.pod_with("one", mapping);
    let at = (ip("192.0.2.1"), 5353);
    let served = || to_port(&other.netns, at, &pod, 53);
    within_limit("the port is served", served);
    let flush = ["flush", "ruleset"];
    let status = node.run(|| std::process::Command::new("nft").args(flush).status());
    assert!(status.unwrap().success());
    within_limit("the port is served again", served);
    node.remove(&pod);
    assert!(!served());
}

/// udev's MACAddressPolicy gives new devices an address of its own when it comes late.
#[test]
fn a_random_hardware_address_set_by_a_racer_does_not_last() {
    let mut lab = Lab::new(2, Backend::Vxlan, Families::V4);
    let (one, two) = lab.pods();
    heals(&one, &two, "the start");
    let node = &lab.nodes[0];
    let racer = node.run(|| {
        std::thread::spawn(|| {
            let mut events = EventSocket::routes(1 << 20).unwrap();
            let mut rtnl = linux::netlink::Rtnl::open().unwrap();
            let mut raced = 0_u8;
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
            let mut known = Vec::new();
            while raced < 3 && std::time::Instant::now() < deadline {
                let mut seen = Vec::new();
                events
                    .drain(|event| {
                        if let NetEvent::Link { index } = event {
                            seen.push(index);
                        }
                    })
                    .unwrap();
                for index in seen {
                    let found = rtnl.link_by_index(index).unwrap();
                    // Once per device that appears.
                    if found.is_some_and(|l| l.kind == "vxlan") && !known.contains(&index) {
                        known.push(index);
                        raced += 1;
                        let mac = Mac([0x12, 0x34, 0, 0, 0, raced]);
                        rtnl.apply(&[Change::SetMac { index, mac }]).unwrap();
                    }
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            raced
        })
    });
    for _ in 0..3 {
        apply(
            node,
            Change::RemoveLink {
                name: "fvx.1".into(),
            },
        );
        heals(&one, &two, "a racer changed the new device");
    }
    assert!(racer.join().unwrap() >= 1, "the racer raced");
    let wanted = crate::peers::vtep_mac("node-1", 1, crate::node::Family::V4);
    within_limit("the hardware address is ours", || {
        node.rtnl()
            .link_by_name("fvx.1")
            .unwrap()
            .and_then(|l| l.mac)
            == Some(wanted)
    });
    lab.nodes[0].wait(|report| report.trouble.is_none());
}

#[test]
fn strangers_with_our_mark_go_and_those_of_others_stay() {
    let mut lab = Lab::new(2, Backend::Vxlan, Families::V4);
    let node = &mut lab.nodes[0];
    node.wait(|report| report.trouble.is_none());
    let index = link(&mut node.rtnl(), "eth0").index;
    let to = |destination: &str, protocol| NodeRoute {
        destination: ip(destination),
        protocol,
        ..route(NodeHop::Gateway {
            gateway: ip("192.0.2.2"),
            index,
            onlink: false,
        })
    };
    apply(node, Change::SetNodeRoute(to("10.244.77.0", 3)));
    apply(
        node,
        Change::SetNodeRoute(to("10.244.99.0", PEER_ROUTE_PROTOCOL)),
    );
    let has = |destination: &str| {
        let routes = node.rtnl().routes_of_table(TABLE_MAIN).unwrap();
        routes
            .iter()
            .any(|route| route.destination == ip(destination))
    };
    within_limit("the stranger is gone", || !has("10.244.99.0"));
    assert!(has("10.244.77.0"), "the other's route stays");
}

#[test]
fn traffic_survives_the_underlay_going_down_and_up() {
    for backend in [Backend::Vxlan, Backend::HostGw] {
        let mut lab = Lab::new(2, backend, Families::V4);
        let (one, two) = lab.pods();
        heals(&one, &two, "the start");
        let index = link(&mut lab.nodes[0].rtnl(), "eth0").index;
        apply(&lab.nodes[0], Change::SetUp { index, up: false });
        let report = lab.nodes[0].wait(|report| report.trouble.is_some());
        assert!(report.trouble.unwrap().contains("interface eth0 is down"));
        assert!(!reaches(&one.netns, &two));
        apply(&lab.nodes[0], Change::SetUp { index, up: true });
        heals(&one, &two, "the underlay went down and up");
        lab.nodes[0].wait(|report| report.trouble.is_none());
    }
}
