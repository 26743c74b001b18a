//! Host ports. Needs root.

use std::net::UdpSocket;
use std::time::Duration;

use serde_json::{Value, json};

use crate::lab::{Lab, Pod, connect, error, outside, serve};

fn mapping(host_port: u16, container_port: u16, protocol: &str) -> Value {
    json!({"hostPort": host_port, "containerPort": container_port, "protocol": protocol})
}

fn with_ports(lab: Lab, ports: Value) -> Lab {
    lab.with("hairpinMode", json!(true))
        .with("runtimeConfig", json!({"portMappings": ports}))
}

#[test]
fn a_host_port_is_reached_from_outside_the_node_itself_loopback_the_pod_and_its_neighbour() {
    for backend in ["nftables", "iptables"] {
        let lab = with_ports(Lab::new(), json!([mapping(8080, 80, "tcp")]))
            .with("backend", json!(backend));
        let beyond = outside(&lab);
        let pod = Pod::new("one");
        let result = lab.add(&pod).unwrap();
        lab.check(&pod, &result).unwrap();
        let neighbour = Pod::new("two");
        let mut plain = lab.conf.clone();
        plain["runtimeConfig"] = json!({});
        lab.call("ADD", &neighbour.id, &neighbour.path(), &plain)
            .unwrap();
        let served = serve(&pod.netns, 80, 5);
        for (from, to, seen) in [
            (&beyond, "192.0.2.1:8080", "192.0.2.2"),
            (&lab.node, "192.0.2.1:8080", "192.0.2.1"),
            (&lab.node, "127.0.0.1:8080", "10.88.0.1"),
            (&pod.netns, "192.0.2.1:8080", "10.88.0.1"),
            (&neighbour.netns, "10.88.0.1:8080", "10.88.0.1"),
        ] {
            let told = connect(from, to);
            assert_eq!(
                told.as_deref().ok(),
                Some(seen),
                "{backend}, {to}: {told:?}"
            );
        }
        served.join().unwrap();
        // Elsewhere nothing is caught.
        assert!(connect(&pod.netns, "192.0.2.2:8080").is_err());
        for _ in 0..2 {
            lab.call("DEL", &pod.id, "", &plain).unwrap();
        }
        lab.call("DEL", &neighbour.id, "", &plain).unwrap();
        lab.assert_nothing_left(backend);
        let nat = lab.shown("iptables-save", &["-t", "nat"]);
        assert!(!nat.contains("10.88.0.2:80"), "{nat}");
    }
}

#[test]
fn a_host_port_of_one_address_is_not_another_addresss() {
    let mut of_one = mapping(8080, 80, "tcp");
    of_one["hostIP"] = "192.0.2.1".into();
    let mut of_nobody = mapping(53, 80, "tcp");
    of_nobody["hostIP"] = "192.0.2.2".into();
    let lab = with_ports(Lab::new(), json!([of_one, of_nobody]));
    let beyond = outside(&lab);
    let pod = Pod::new("one");
    lab.add(&pod).unwrap();
    let served = serve(&pod.netns, 80, 1);
    assert!(connect(&lab.node, "10.88.0.1:8080").is_err());
    // An address that is not the node's catches nobody else's traffic.
    let other = Pod::new("two");
    let mut plain = lab.conf.clone();
    plain["runtimeConfig"] = json!({});
    lab.call("ADD", &other.id, &other.path(), &plain).unwrap();
    assert!(connect(&other.netns, "192.0.2.2:53").is_err());
    assert_eq!(connect(&beyond, "192.0.2.1:8080").unwrap(), "192.0.2.2");
    served.join().unwrap();
}

#[test]
fn both_families_have_their_ports() {
    let lab = with_ports(Lab::new(), json!([mapping(8080, 80, "TCP")]))
        .ranges(&["10.88.0.0/24", "fd00:88::/64"]);
    let (pod, client) = (Pod::new("one"), Pod::new("two"));
    let result = lab.add(&pod).unwrap();
    lab.check(&pod, &result).unwrap();
    let mut plain = lab.conf.clone();
    plain["runtimeConfig"] = json!({});
    lab.call("ADD", &client.id, &client.path(), &plain).unwrap();
    let served = serve(&pod.netns, 80, 2);
    assert_eq!(
        connect(&client.netns, "10.88.0.1:8080").unwrap(),
        "10.88.0.1"
    );
    assert_eq!(
        connect(&client.netns, "[fd00:88::1]:8080").unwrap(),
        "fd00:88::1"
    );
    served.join().unwrap();
    assert_eq!(lab.forwards().len(), 2);
    lab.del(&pod).unwrap();
    assert!(lab.forwards().is_empty());
}

#[test]
fn conditions_and_snat_are_honoured() {
    let lab = with_ports(Lab::new(), json!([mapping(8080, 80, "tcp")]))
        .with("conditionsV4", json!(["ip", "saddr", "!=", "192.0.2.2"]))
        .with("snat", json!(false));
    let beyond = outside(&lab);
    let pod = Pod::new("one");
    lab.add(&pod).unwrap();
    let served = serve(&pod.netns, 80, 1);
    assert!(connect(&beyond, "192.0.2.1:8080").is_err());
    assert_eq!(
        connect(&lab.node, "192.0.2.1:8080").unwrap(),
        "192.0.2.1",
        "with its own address"
    );
    served.join().unwrap();
    let masqueraded = with_ports(Lab::new(), json!([mapping(8080, 80, "tcp")]))
        .with("masqAll", json!(true))
        .with("markMasqBit", json!(5));
    let beyond = outside(&masqueraded);
    let pod = Pod::new("one");
    masqueraded.add(&pod).unwrap();
    let served = serve(&pod.netns, 80, 1);
    assert_eq!(connect(&beyond, "192.0.2.1:8080").unwrap(), "10.88.0.1");
    served.join().unwrap();
}

#[test]
fn a_client_that_keeps_its_udp_port_reaches_the_next_pod_at_once() {
    let lab = with_ports(Lab::new(), json!([mapping(5353, 53, "udp")]));
    let beyond = outside(&lab);
    let client = linux::netlink::in_netns(std::os::fd::AsFd::as_fd(&beyond), || {
        UdpSocket::bind("192.0.2.2:4000").unwrap()
    })
    .unwrap();
    let receives = |pod: &Pod| {
        let socket = pod.run(|| UdpSocket::bind("0.0.0.0:53").unwrap());
        let limit = Some(Duration::from_secs(2));
        socket.set_read_timeout(limit).unwrap();
        client.send_to(b"question", "192.0.2.1:5353").unwrap();
        let mut buffer = [0; 16];
        socket.recv_from(&mut buffer).is_ok()
    };
    for id in ["one", "two", "three"] {
        let pod = Pod::new(id);
        lab.add(&pod).unwrap();
        assert!(receives(&pod), "pod {id}");
        lab.del(&pod).unwrap();
    }
    // A packet in between makes a connection that leads nowhere; it is forgotten too.
    client.send_to(b"question", "192.0.2.1:5353").unwrap();
    let pod = Pod::new("four");
    lab.add(&pod).unwrap();
    assert!(receives(&pod), "after a packet that nobody answered");
}

#[test]
fn a_late_del_takes_nothing_from_the_pod_that_has_the_port_now() {
    let lab = with_ports(Lab::new(), json!([mapping(8080, 80, "tcp")]));
    let (old, new) = (Pod::new("old"), Pod::new("new"));
    lab.add(&old).unwrap();
    let result = lab.add(&new).unwrap();
    lab.del(&old).unwrap();
    lab.check(&new, &result).unwrap();
    let served = serve(&new.netns, 80, 1);
    connect(&lab.node, "10.88.0.1:8080").unwrap();
    served.join().unwrap();
    lab.del(&new).unwrap();
    lab.assert_nothing_left("after both");
}

#[test]
fn flushed_rules_come_back_with_the_next_add_check_or_status() {
    let lab = with_ports(Lab::new(), json!([mapping(8080, 80, "tcp")]));
    let pod = Pod::new("one");
    let result = lab.add(&pod).unwrap();
    let mut plain = lab.conf.clone();
    plain["runtimeConfig"] = json!({});
    for repairing in ["ADD", "CHECK", "STATUS"] {
        lab.shown("nft", &["flush", "ruleset"]);
        assert!(lab.forwards().is_empty());
        match repairing {
            "ADD" => {
                let other = Pod::new("two");
                lab.call("ADD", &other.id, &other.path(), &plain).unwrap();
                lab.call("DEL", &other.id, "", &plain).unwrap();
            }
            "CHECK" => drop(lab.check(&pod, &result).unwrap()),
            _ => drop(lab.call("STATUS", "", "", &plain).unwrap()),
        }
        let served = serve(&pod.netns, 80, 1);
        connect(&lab.node, "10.88.0.1:8080").unwrap();
        served.join().unwrap();
        assert_eq!(lab.forwards().len(), 1, "by {repairing}");
    }
}

#[test]
fn gc_takes_the_ports_of_the_dead_and_with_the_last_pod_the_rules() {
    for backend in ["nftables", "iptables"] {
        let lab = with_ports(Lab::new(), json!([mapping(8080, 80, "tcp")]))
            .with("backend", json!(backend))
            .with("ipMasqBackend", json!(backend));
        let (kept, dead) = (Pod::new("kept"), Pod::new("dead"));
        lab.add(&dead).unwrap();
        let mut other = lab.conf.clone();
        other["runtimeConfig"] = json!({"portMappings": [mapping(8081, 80, "tcp")]});
        lab.call("ADD", &kept.id, &kept.path(), &other).unwrap();
        lab.gc(&[&kept]).unwrap();
        assert_eq!(lab.records(), ["kept@eth0"], "{backend}");
        let served = serve(&kept.netns, 80, 1);
        connect(&lab.node, "10.88.0.1:8081").unwrap();
        served.join().unwrap();
        assert!(connect(&lab.node, "10.88.0.1:8080").is_err());
        lab.gc(&[]).unwrap();
        lab.assert_nothing_left(backend);
        assert!(lab.nft().chains().unwrap().is_empty());
        let nat = lab.shown("iptables-save", &[]);
        assert!(
            !nat.contains("FERRULE-P") && !nat.contains("FERRULE-M-"),
            "{nat}"
        );
    }
}

#[test]
fn a_bad_mapping_names_itself_and_leaves_nothing() {
    let lab = with_ports(Lab::new(), json!([mapping(0, 80, "tcp")]));
    let (code, text) = error(lab.add(&Pod::new("one")));
    assert!(
        code == 7 && text.contains("runtimeConfig.portMappings[0].hostPort is 0"),
        "{code} {text}"
    );
    lab.assert_nothing_left("after a refusal");
}
