//! Peers that come, go and change; restarts; the node's own network changing; migration.

use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use linux::netlink::{
    Change, Mac, NodeHop, TABLE_MAIN, VethSpec, VxlanConfig, VxlanSpec, in_netns,
};

use super::lab::{Families, Lab, address, datagram, heals, link, rtnl_in, within_limit};
use crate::netconf::Backend;
use crate::node::{Endpoint, Family};

const SECOND: Duration = Duration::from_secs(1);

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn pods_of_two_nodes_talk_in_both_families_and_keep_their_addresses() {
    for backend in [Backend::Vxlan, Backend::HostGw] {
        let lab = Lab::new(3, backend, Families::Dual);
        let (one, two) = lab.pods();
        heals(&one, &two, "the start");
        for v4 in [true, false] {
            let source = datagram(&one.netns, &two, v4, 100, SECOND);
            assert_eq!(source, Some(one.address(v4)), "{backend} from pod to pod");
            // A second pod of the same node, and the node itself.
            let near = lab.nodes[0].pod("near");
            heals(&one, &near, "it was made");
            assert_eq!(
                datagram(&one.netns, &near, v4, 100, SECOND),
                Some(one.address(v4))
            );
            assert!(datagram(&lab.nodes[0].netns, &near, v4, 100, SECOND).is_some());
            assert!(
                datagram(&lab.nodes[0].netns, &two, v4, 100, SECOND).is_some(),
                "{backend} from node to a pod of another (IPv4 {v4})"
            );
            lab.nodes[0].remove(&near);
        }
    }
}

#[test]
fn a_pods_gateway_answers_in_both_families() {
    let lab = Lab::new(2, Backend::HostGw, Families::Dual);
    let (one, two) = lab.pods();
    heals(&one, &two, "the start");
    for config in &one.result.ips {
        let gateway = config.gateway.unwrap();
        let any = if gateway.is_ipv4() {
            ip("0.0.0.0")
        } else {
            ip("::")
        };
        let node = lab.nodes[0].run(|| TcpListener::bind((any, 0)).unwrap());
        let at = (gateway, node.local_addr().unwrap().port()).into();
        // The handshake is answered, and from the gateway's address, or it would fail.
        let asked = in_netns(one.netns.as_fd(), || {
            TcpStream::connect_timeout(&at, SECOND)
        });
        asked.unwrap().unwrap();
        let (_, from) = node.accept().unwrap();
        assert_eq!(from.ip(), config.address.addr());
    }
}

#[test]
fn the_mtu_is_exactly_what_fits() {
    for (backend, families, mtu) in [
        (Backend::Vxlan, Families::V4, 1450),
        (Backend::Vxlan, Families::Dual, 1430),
        (Backend::HostGw, Families::Dual, 1500),
    ] {
        let lab = Lab::new(2, backend, families);
        let (one, two) = lab.pods();
        heals(&one, &two, "the start");
        let inside = link(&mut rtnl_in(&one.netns), "eth0").mtu_bytes;
        assert_eq!(inside, mtu, "{backend} {families:?}");
        // IP and UDP headers.
        let fits = inside as usize - 28;
        assert!(
            datagram(&one.netns, &two, true, fits, SECOND).is_some(),
            "{backend} {fits}"
        );
        if families == Families::Dual {
            let fits = inside as usize - 48;
            assert!(
                datagram(&one.netns, &two, false, fits, SECOND).is_some(),
                "{backend} {fits}"
            );
        }
    }
}

#[test]
fn an_underlay_of_another_mtu_changes_the_device_and_new_pods() {
    let lab = Lab::new(2, Backend::Vxlan, Families::V4);
    let (one, two) = lab.pods();
    heals(&one, &two, "the start");
    let node = &lab.nodes[0];
    for (underlay, wanted) in [(1400, 1350), (1500, 1450)] {
        let index = link(&mut node.rtnl(), "eth0").index;
        let change = Change::SetMtu {
            index,
            mtu_bytes: underlay,
        };
        node.rtnl().apply(&[change]).unwrap();
        within_limit("the device and the state follow", || {
            let device = node.rtnl().link_by_name("fvx.1").unwrap();
            device.is_some_and(|d| d.mtu_bytes == wanted) && node.pod_mtu() == Some(wanted)
        });
        let pod = node.pod(&format!("mtu-{underlay}"));
        assert_eq!(link(&mut rtnl_in(&pod.netns), "eth0").mtu_bytes, wanted);
        heals(&one, &two, "the underlay's MTU changed");
    }
}

#[test]
fn a_restarted_agent_adopts_what_is_there_and_changes_nothing() {
    for backend in [Backend::Vxlan, Backend::HostGw] {
        let mut lab = Lab::new(2, backend, Families::Dual);
        let (one, two) = lab.pods();
        heals(&one, &two, "the start");
        lab.nodes[0].stop();
        assert!(
            datagram(&one.netns, &two, true, 8, SECOND).is_some(),
            "without the agent"
        );
        let late = lab.nodes[0].pod("late");
        assert!(
            datagram(&late.netns, &two, true, 8, SECOND).is_some(),
            "a new pod too"
        );
        lab.nodes[0].start();
        lab.introduce();
        let report = lab.nodes[0].wait(|report| report.trouble.is_none() && report.reached == 2);
        assert_eq!(report.changes, 0, "{backend}");
    }
}

#[test]
fn nodes_that_left_while_the_agent_was_down_are_cleaned_up_but_not_before_a_full_list() {
    let mut lab = Lab::new(3, Backend::Vxlan, Families::V4);
    let has = |lab: &Lab, destination: &str| {
        let routes = lab.nodes[0].rtnl().routes_of_table(TABLE_MAIN).unwrap();
        routes
            .iter()
            .any(|route| route.destination == ip(destination))
    };
    assert!(has(&lab, "10.244.3.0"));
    lab.nodes[0].stop();
    lab.nodes.pop();
    lab.nodes[0].start();
    // Partial: introduces itself first.
    lab.nodes[0].wait(|_| true);
    assert!(has(&lab, "10.244.3.0"));
    lab.introduce();
    within_limit("the route of the node that left is gone", || {
        !has(&lab, "10.244.3.0")
    });
    let device = link(&mut lab.nodes[0].rtnl(), "fvx.1").index;
    assert_eq!(lab.nodes[0].rtnl().fdb_of(device).unwrap().len(), 1);
    assert_eq!(lab.nodes[0].rtnl().neighbours_of(device).unwrap().len(), 1);
}

#[test]
fn a_peer_with_another_hardware_address_or_address_leaves_no_old_entry() {
    let lab = Lab::new(2, Backend::Vxlan, Families::V4);
    let device = link(&mut lab.nodes[0].rtnl(), "fvx.1").index;
    let entries = || -> Vec<(Mac, Option<IpAddr>)> {
        let found = lab.nodes[0].rtnl().fdb_of(device).unwrap();
        found
            .iter()
            .map(|entry| (entry.mac, entry.destination))
            .collect()
    };
    let mut peer = lab.nodes[1].as_peer();
    let first = Mac([2, 7, 7, 7, 7, 1]);
    for (mac, at) in [
        (first, "192.0.2.2"),
        (first, "192.0.2.22"),
        (Mac([2, 7, 7, 7, 7, 2]), "192.0.2.23"),
    ] {
        peer.endpoints.v4 = Some(Endpoint {
            address: ip(at),
            mac: Some(mac),
        });
        lab.tell_with(&[peer.clone()]);
        within_limit("the entry is the new one alone", || {
            entries() == [(mac, Some(ip(at)))]
        });
        let neighbours = lab.nodes[0].rtnl().neighbours_of(device).unwrap();
        let macs: Vec<_> = neighbours.iter().map(|n| n.mac).collect();
        assert_eq!(macs, [Some(mac)]);
    }
}

#[test]
fn a_renumbered_underlay_is_announced_and_traffic_returns() {
    for backend in [Backend::Vxlan, Backend::HostGw] {
        let mut lab = Lab::new(2, backend, Families::V4);
        let (one, two) = lab.pods();
        heals(&one, &two, "the start");
        let index = link(&mut lab.nodes[0].rtnl(), "eth0").index;
        lab.nodes[0]
            .rtnl()
            .apply(&[
                Change::RemoveAddress(address(index, "192.0.2.1/24")),
                Change::AddAddress(address(index, "192.0.2.101/24")),
            ])
            .unwrap();
        // The node's kubelet tells the new address by itself.
        lab.nodes[0].addresses = vec![ip("192.0.2.101")];
        lab.tell();
        let new = ip("192.0.2.101");
        lab.nodes[0].wait(|report| {
            let announced = report.announcement.as_ref();
            announced
                .and_then(|a| a.endpoints.v4)
                .is_some_and(|e| e.address == new)
        });
        lab.tell();
        heals(&one, &two, "the node was renumbered");
    }
}

#[test]
fn an_underlay_deleted_and_made_again_is_taken_up() {
    let lab = Lab::new(2, Backend::Vxlan, Families::V4);
    let (one, two) = lab.pods();
    heals(&one, &two, "the start");
    let name = "port1".to_owned();
    let mut outside = rtnl_in(&lab.fabric);
    outside
        .apply(&[Change::RemoveLink { name: name.clone() }])
        .unwrap();
    let bridge = link(&mut outside, "br0").index;
    outside
        .apply(&[Change::AddVeth(VethSpec {
            name: name.clone(),
            mac: Mac([2, 0, 0, 1, 0, 1]),
            master: Some(bridge),
            mtu_bytes: None,
            peer_name: "eth0".into(),
            peer_mac: Mac([2, 0, 0, 2, 0, 9]),
            peer_netns: lab.nodes[0].netns.as_raw_fd(),
        })])
        .unwrap();
    let port = link(&mut outside, &name).index;
    outside
        .apply(&[Change::SetUp {
            index: port,
            up: true,
        }])
        .unwrap();
    let mut inside = lab.nodes[0].rtnl();
    let index = link(&mut inside, "eth0").index;
    inside
        .apply(&[
            Change::SetUp { index, up: true },
            Change::AddAddress(address(index, "192.0.2.1/24")),
        ])
        .unwrap();
    heals(&one, &two, "the underlay was made again");
}

#[test]
fn with_direct_routing_neighbours_need_no_tunnel() {
    let lab = Lab::with(2, Backend::Vxlan, Families::V4, |settings| {
        settings.conf.direct_routing = true;
    });
    let (one, two) = lab.pods();
    heals(&one, &two, "the start");
    let mut rtnl = lab.nodes[0].rtnl();
    let eth0 = link(&mut rtnl, "eth0").index;
    let routes = rtnl.routes_of_table(TABLE_MAIN).unwrap();
    let to_peer = routes
        .iter()
        .find(|route| route.destination == ip("10.244.2.0"));
    assert!(
        matches!(to_peer.unwrap().hop, NodeHop::Gateway { index, .. } if index == eth0),
        "{to_peer:?}"
    );
}

/// A bridge plugin's pods of before stay reached: the dead end for our own network comes last.
#[test]
fn a_network_on_a_bridge_of_before_goes_on() {
    let mut lab = Lab::new(2, Backend::Vxlan, Families::Dual);
    lab.nodes[0].stop();
    let mut rtnl = lab.nodes[0].rtnl();
    let bridge = linux::netlink::BridgeSpec {
        name: "cni0".into(),
        mac: None,
        mtu_bytes: None,
    };
    rtnl.apply(&[Change::AddBridge(bridge)]).unwrap();
    let index = link(&mut rtnl, "cni0").index;
    let own = ["10.244.1.1/24", "fd00:10:0:1::1/64"];
    let own = own.map(|text| Change::AddAddress(address(index, text)));
    rtnl.apply(&own).unwrap();
    lab.nodes[0].start();
    lab.introduce();
    let routes = rtnl.routes_of_table(TABLE_MAIN).unwrap();
    for (network, metric) in [("10.244.1.0", None), ("fd00:10:0:1::", Some(256))] {
        let bridged = routes.iter().any(|route| {
            route.destination == ip(network)
                && route.hop == NodeHop::Link { index }
                && route.metric == metric
        });
        assert!(bridged, "{network} in {routes:?}");
    }
}

/// A device of the same identifier: flannel's leftover goes where the node was flannel's, any
/// other is named and left.
#[test]
fn a_device_in_our_place_is_replaced_only_where_it_is_flannels_leftover() {
    let mut lab = Lab::new(2, Backend::Vxlan, Families::V4);
    let (one, two) = lab.pods();
    heals(&one, &two, "the start");
    lab.nodes[0].stop();
    let eth0 = link(&mut lab.nodes[0].rtnl(), "eth0").index;
    let theirs = VxlanSpec {
        name: "flannel.1".into(),
        mac: Mac([2, 1, 1, 1, 1, 1]),
        mtu_bytes: 1450,
        alias: String::new(),
        config: VxlanConfig {
            vni: 1,
            port: 8472,
            local: Some(ip("192.0.2.1")),
            underlay: Some(eth0),
            learning: false,
            gbp: false,
        },
    };
    let remove = Change::RemoveLink {
        name: "fvx.1".into(),
    };
    lab.nodes[0]
        .rtnl()
        .apply(&[remove, Change::AddVxlan(theirs)])
        .unwrap();
    lab.nodes[0].start();
    lab.tell();
    let report = lab.nodes[0]
        .wait(|report| report.trouble.is_some() && report.reached > 0 || report.failures > 0);
    let trouble = report.trouble.unwrap();
    assert!(
        trouble.contains("link flannel.1 has VNI 1 on UDP port 8472 already"),
        "{trouble}"
    );
    // As flannel left it.
    let mut put = |key: &str, value: &str| {
        let key = format!("flannel.alpha.coreos.com/{key}");
        lab.nodes[0].annotations.insert(key, value.into());
    };
    put("backend-type", "vxlan");
    put("backend-data", r#"{"VNI":1,"VtepMAC":"02:01:01:01:01:01"}"#);
    put("public-ip", "192.0.2.1");
    lab.tell();
    lab.nodes[0].wait(|report| report.trouble.is_none());
    assert!(
        lab.nodes[0]
            .rtnl()
            .link_by_name("flannel.1")
            .unwrap()
            .is_none()
    );
    // It announces itself anew, flannel's annotations with it.
    lab.nodes[0].annotations.clear();
    lab.tell();
    heals(&one, &two, "our device took flannel's place");
    assert_eq!(
        lab.nodes[0].as_peer().endpoints.of(Family::V4).unwrap().mac,
        link(&mut lab.nodes[0].rtnl(), "fvx.1").mac
    );
}
