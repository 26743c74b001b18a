//! The six verbs of the built plugin against the kernel. Needs root; each test has network
//! namespaces of its own.

use std::os::fd::{AsFd, AsRawFd};

use crate::lab::{Lab, Pod, error, outside, send};
use cni::types::SpecVersion;
use linux::netlink::{AddressSpec, Change, Mac, RouteSpec, Rtnl, VethSpec, new_netns};
use serde_json::json;

#[test]
fn a_pod_reaches_its_gateway_and_another_pod() {
    let lab = Lab::new();
    let (one, two) = (Pod::new("one"), Pod::new("two"));
    let first = lab.add(&one).unwrap();
    let second = lab.add(&two).unwrap();
    assert_eq!(first.ips[0].address.to_string(), "10.88.0.2/24");
    assert_eq!(first.ips[0].gateway.unwrap().to_string(), "10.88.0.1");
    let names: Vec<_> = first.interfaces.iter().map(|i| i.name.as_str()).collect();
    assert_eq!((names[0], names[2]), ("cni0", "eth0"));
    assert_eq!(first.interfaces[2].sandbox, one.path());
    assert_eq!(first.interfaces[2].mac, "0a:58:0a:58:00:02");
    assert_eq!(
        send(&one, &lab.node, "10.88.0.1").as_deref(),
        Some("10.88.0.2")
    );
    let to = second.ips[0].address.addr().to_string();
    assert_eq!(send(&one, &two.netns, &to).as_deref(), Some("10.88.0.2"));
}

#[test]
fn both_families_work_at_once_without_waiting_for_duplicate_detection() {
    let lab = Lab::new().ranges(&["10.88.0.0/24", "fd00:88::/64"]);
    let (one, two) = (Pod::new("one"), Pod::new("two"));
    let first = lab.add(&one).unwrap();
    lab.add(&two).unwrap();
    assert_eq!(first.ips[1].address.to_string(), "fd00:88::2/64");
    assert_eq!(
        send(&one, &two.netns, "fd00:88::3").as_deref(),
        Some("fd00:88::2")
    );
    assert_eq!(
        send(&one, &lab.node, "fd00:88::1").as_deref(),
        Some("fd00:88::2")
    );
    lab.check(&one, &first).unwrap();
}

#[test]
fn what_leaves_the_network_has_the_nodes_address_unless_excepted() {
    let lab = Lab::new();
    let beyond = outside(&lab);
    let pod = Pod::new("one");
    lab.add(&pod).unwrap();
    assert_eq!(
        send(&pod, &beyond, "192.0.2.2").as_deref(),
        Some("192.0.2.1")
    );
    // Rules flushed by others come back with the next ADD.
    lab.nft().remove_table().unwrap();
    lab.add(&Pod::new("two")).unwrap();
    assert_eq!(lab.nft().chains().unwrap().len(), 1);

    let lab = Lab::new().with("ipMasqExcept", json!(["192.0.2.0/24"]));
    let beyond = outside(&lab);
    let mut rtnl = Rtnl::open_in(beyond.as_fd()).unwrap();
    let index = rtnl.link_by_name("eth0").unwrap().unwrap().index;
    let back = RouteSpec {
        destination: "10.88.0.0".parse().unwrap(),
        prefix_len: 24,
        gateway: Some("192.0.2.1".parse().unwrap()),
        index,
        mtu_bytes: None,
        advmss_bytes: None,
        priority: None,
        table: None,
        scope: None,
    };
    rtnl.apply(&[Change::AddRoute(back)]).unwrap();
    let pod = Pod::new("one");
    lab.add(&pod).unwrap();
    assert_eq!(
        send(&pod, &beyond, "192.0.2.2").as_deref(),
        Some("10.88.0.2")
    );
}

#[test]
fn del_leaves_nothing_with_or_without_a_namespace_once_or_twice() {
    let lab = Lab::new();
    for netns in ["its own", "", "/dead/path"] {
        let pod = Pod::new("one");
        lab.add(&pod).unwrap();
        assert_eq!((lab.ports().len(), lab.claims().len()), (1, 1));
        let path = if netns == "its own" {
            pod.path()
        } else {
            netns.to_owned()
        };
        for _ in 0..2 {
            lab.call("DEL", &pod.id, &path, &lab.conf).unwrap();
            lab.assert_nothing_left(&format!("with namespace {netns:?}"));
        }
        assert!(pod.rtnl().link_by_name("eth0").unwrap().is_none());
    }
    let mut wrong = lab.conf.clone();
    wrong["prevResult"] = json!({"cniVersion": "1.1.0", "ips": [{"address": "1.2.3.4/5"}]});
    let pod = Pod::new("two");
    lab.add(&pod).unwrap();
    drop(pod);
    lab.call("DEL", "two", "", &wrong).unwrap();
    lab.assert_nothing_left("with a wrong previous result");
    lab.call("DEL", "never-added", "", &lab.conf).unwrap();
}

#[test]
fn a_foreign_interface_of_that_name_is_refused_and_left_alone() {
    let lab = Lab::new();
    let pod = Pod::new("one");
    let other = new_netns().unwrap();
    pod.rtnl()
        .apply(&[Change::AddVeth(VethSpec {
            name: "eth0".into(),
            mac: Mac([2, 0, 0, 0, 0, 1]),
            master: None,
            mtu_bytes: None,
            peer_name: "x".into(),
            peer_mac: Mac([2, 0, 0, 0, 0, 2]),
            peer_netns: other.as_raw_fd(),
        })])
        .unwrap();
    let (code, text) = error(lab.add(&pod));
    assert!(
        code == 4 && text.contains("eth0 already exists"),
        "{code} {text}"
    );
    lab.assert_nothing_left("after the refusal");
    lab.del(&pod).unwrap();
    assert!(pod.rtnl().link_by_name("eth0").unwrap().is_some());
}

#[test]
fn the_nodes_own_namespace_and_a_dead_one_are_refused() {
    let lab = Lab::new();
    let own = lab.call("ADD", "one", "/proc/self/ns/net", &lab.conf);
    assert!(error(own).1.contains("is the node's own"));
    assert_eq!(error(lab.call("ADD", "one", "/dead/path", &lab.conf)).0, 4);
    lab.assert_nothing_left("after refusals");
}

#[test]
fn a_repeated_add_gives_the_same_result() {
    let lab = Lab::new();
    let pod = Pod::new("one");
    let first = lab.add(&pod).unwrap();
    assert_eq!(lab.add(&pod).unwrap(), first);
    assert_eq!((lab.ports().len(), lab.claims().len()), (1, 1));
}

#[test]
fn check_finds_each_difference() {
    let lab = Lab::new().with("hairpinMode", json!(true));
    let pod = Pod::new("one");
    let result = lab.add(&pod).unwrap();
    lab.check(&pod, &result).unwrap();
    let inside = pod.rtnl().link_by_name("eth0").unwrap().unwrap();
    let default = pod.rtnl().routes_of(inside.index).unwrap();
    let default = default
        .into_iter()
        .find(|route| route.prefix_len == 0)
        .unwrap();
    pod.rtnl()
        .apply(&[Change::RemoveRoute(default.clone())])
        .unwrap();
    assert!(
        error(lab.check(&pod, &result))
            .1
            .contains("lacks the route to 0.0.0.0/0")
    );
    pod.rtnl().apply(&[Change::AddRoute(default)]).unwrap();
    lab.check(&pod, &result).unwrap();
    let address = AddressSpec {
        index: inside.index,
        address: result.ips[0].address.addr(),
        prefix_len: 24,
        detect_duplicates: false,
    };
    pod.rtnl().apply(&[Change::RemoveAddress(address)]).unwrap();
    assert!(
        error(lab.check(&pod, &result))
            .1
            .contains("lacks 10.88.0.2/24")
    );
    pod.rtnl()
        .apply(&[Change::SetUp {
            index: inside.index,
            up: false,
        }])
        .unwrap();
    assert!(error(lab.check(&pod, &result)).1.contains("eth0 is down"));
    let port = lab.ports().remove(0);
    lab.rtnl()
        .apply(&[Change::RemoveLink { name: port }])
        .unwrap();
    let (code, text) = error(lab.check(&pod, &result));
    assert!(code == 101 && text.contains("is missing"), "{code} {text}");
}

#[test]
fn gc_removes_what_no_valid_attachment_owns_and_nothing_else() {
    let lab = Lab::new();
    let pods: Vec<Pod> = (0..4).map(|n| Pod::new(&format!("pod-{n}"))).collect();
    for pod in &pods {
        lab.add(pod).unwrap();
    }
    // A stranger's port, and a chain of another network.
    let other = new_netns().unwrap();
    let bridge = lab.rtnl().link_by_name("cni0").unwrap().unwrap().index;
    lab.rtnl()
        .apply(&[Change::AddVeth(VethSpec {
            name: "stranger".into(),
            mac: Mac([2, 0, 0, 0, 0, 1]),
            master: Some(bridge),
            mtu_bytes: None,
            peer_name: "x".into(),
            peer_mac: Mac([2, 0, 0, 0, 0, 2]),
            peer_netns: other.as_raw_fd(),
        })])
        .unwrap();
    let foreign = cni::firewall::masquerade("other", &["10.1.0.0/24".parse().unwrap()], &[]);
    let former = cni::firewall::masquerade("net", &["10.9.0.0/24".parse().unwrap()], &[]);
    lab.nft().ensure_chain(&foreign).unwrap();
    lab.nft().ensure_chain(&former).unwrap();
    lab.gc(&[&pods[1]]).unwrap();
    assert_eq!(lab.claims(), ["10.88.0.3"]);
    let ports = lab.ports();
    assert!(
        ports.len() == 2 && ports.contains(&"stranger".to_owned()),
        "{ports:?}"
    );
    assert_eq!(
        lab.nft().chains().unwrap().len(),
        3,
        "pods of a former configuration need theirs"
    );
    lab.gc(&[]).unwrap();
    assert_eq!(lab.nft().chains().unwrap(), [foreign.name]);
    assert_eq!(
        (lab.claims().len(), lab.ports()),
        (0, vec!["stranger".to_owned()])
    );
}

#[test]
fn ranges_may_come_with_each_add_only() {
    let mut lab = Lab::new();
    lab.conf["ipam"]["ranges"].take();
    assert!(
        error(lab.add(&Pod::new("none")))
            .1
            .contains("runtimeConfig.ipRanges")
    );
    let without = lab.conf.clone();
    lab.conf["runtimeConfig"] = json!({"ipRanges": [[{"subnet": "10.66.0.0/24"}]]});
    let pod = Pod::new("one");
    assert_eq!(
        lab.add(&pod).unwrap().ips[0].address.to_string(),
        "10.66.0.2/24"
    );
    lab.conf = without;
    lab.call("STATUS", "", "", &lab.conf).unwrap();
    lab.gc(&[&pod]).unwrap();
    assert_eq!(
        (lab.claims().len(), lab.nft().chains().unwrap().len()),
        (1, 1)
    );
    lab.del(&pod).unwrap();
    lab.assert_nothing_left("without ranges");
}

#[test]
fn status_says_50_while_no_address_is_left() {
    let lab = Lab::new().ranges(&["10.88.0.0/29"]);
    let pods: Vec<Pod> = (0..5).map(|n| Pod::new(&format!("pod-{n}"))).collect();
    for pod in &pods {
        lab.call("STATUS", "", "", &lab.conf).unwrap();
        lab.add(pod).unwrap();
    }
    let (code, text) = error(lab.call("STATUS", "", "", &lab.conf));
    assert!(
        code == 50 && text.contains("no address is free in"),
        "{code} {text}"
    );
    let (code, text) = error(lab.add(&Pod::new("one-too-many")));
    assert!(
        code == 102 && text.contains("no address is free in"),
        "{code} {text}"
    );
    lab.del(&pods[2]).unwrap();
    lab.call("STATUS", "", "", &lab.conf).unwrap();
    let ports = lab.ports().len();
    assert_eq!(ports, 4);
}

#[test]
fn every_version_gets_its_own_form_of_result() {
    let lab = Lab::new();
    for version in SpecVersion::ALL {
        let mut conf = lab.conf.clone();
        conf["cniVersion"] = version.as_str().into();
        let pod = Pod::new("one");
        let printed = lab.call("ADD", &pod.id, &pod.path(), &conf).unwrap();
        assert_eq!(printed["cniVersion"], version.as_str());
        let old = version < SpecVersion::V1_0_0;
        assert_eq!(printed["ips"][0].get("version").is_some(), old, "{version}");
        let newest = version == SpecVersion::V1_1_0;
        assert_eq!(
            printed["interfaces"][0].get("mtu").is_some(),
            newest,
            "{version}"
        );
        lab.call("DEL", &pod.id, "", &conf).unwrap();
    }
}

#[test]
fn port_options_mtu_and_mac_are_as_configured() {
    let lab = Lab::new()
        .with("mtu", json!(1400))
        .with("portIsolation", json!(true))
        .with("hairpinMode", json!(true))
        .with(
            "runtimeConfig",
            json!({"mac": "02:11:22:33:44:55", "ips": ["10.88.0.77"]}),
        )
        .with("capabilities", json!({"portMappings": true}));
    let pod = Pod::new("one");
    let result = lab.add(&pod).unwrap();
    assert_eq!(result.ips[0].address.to_string(), "10.88.0.77/24");
    assert_eq!(result.interfaces[2].mtu, Some(1400));
    let inside = pod.rtnl().link_by_name("eth0").unwrap().unwrap();
    assert_eq!(inside.mac.unwrap().to_string(), "02:11:22:33:44:55");
    let mut rtnl = lab.rtnl();
    let bridge = rtnl.link_by_name("cni0").unwrap().unwrap();
    let port = rtnl.ports_of(bridge.index).unwrap().remove(0);
    assert_eq!(
        (port.hairpin, port.isolated, port.mtu_bytes),
        (true, true, 1400)
    );
    assert_eq!(port.alias, "ferrule:net:eth0:one");
}

#[test]
fn a_network_without_addresses_is_a_link_and_no_more() {
    let lab = Lab::new()
        .with("ipam", json!({}))
        .with("isDefaultGateway", json!(false))
        .with("ipMasq", json!(false))
        .with("disableContainerInterface", json!(true));
    let pod = Pod::new("one");
    let result = lab.add(&pod).unwrap();
    assert!(result.ips.is_empty());
    assert!(!pod.rtnl().link_by_name("eth0").unwrap().unwrap().up);
    lab.check(&pod, &result).unwrap();
    lab.del(&pod).unwrap();
    lab.assert_nothing_left("without addresses");
}

#[test]
fn another_address_on_the_bridge_is_an_error_unless_forced() {
    let lab = Lab::new();
    let mut rtnl = lab.rtnl();
    let bridge = linux::netlink::BridgeSpec {
        name: "cni0".into(),
        mac: None,
        mtu_bytes: None,
    };
    rtnl.apply(&[Change::AddBridge(bridge)]).unwrap();
    let index = rtnl.link_by_name("cni0").unwrap().unwrap().index;
    let address = "10.88.0.99".parse().unwrap();
    let spec = AddressSpec {
        index,
        address,
        prefix_len: 24,
        detect_duplicates: false,
    };
    rtnl.apply(&[Change::AddAddress(spec)]).unwrap();
    let pod = Pod::new("one");
    let (code, text) = error(lab.add(&pod));
    assert!(code == 7 && text.contains("10.88.0.99/24"), "{code} {text}");
    lab.assert_nothing_left("after the refusal");
    let lab = lab.with("forceAddress", json!(true));
    lab.add(&pod).unwrap();
    let left: Vec<_> = rtnl.addresses_of(index).unwrap();
    let v4: Vec<_> = left.iter().filter(|a| a.address.is_ipv4()).collect();
    assert!(
        v4.len() == 1 && v4[0].address.to_string() == "10.88.0.1",
        "{v4:?}"
    );
}

#[test]
fn a_bridge_that_is_none_is_refused_by_name() {
    let lab = Lab::new().with("bridge", json!("lo"));
    let (code, text) = error(lab.add(&Pod::new("one")));
    assert!(
        code == 7 && text.contains("bridge \"lo\" exists and is no bridge"),
        "{code} {text}"
    );
    assert_eq!(error(lab.call("STATUS", "", "", &lab.conf)).0, 50);
}

#[test]
fn a_delegated_ipam_plugin_is_called_and_undone_after_a_failure() {
    use std::os::unix::fs::PermissionsExt;
    let lab = Lab::new().with("ipam", json!({"type": "own-ipam"}));
    let (bin, log) = (lab.dir.join("bin"), lab.dir.join("log"));
    std::fs::create_dir_all(&bin).unwrap();
    let install = |answer: &str| {
        let text = format!(
            "#!/bin/sh\n/bin/cat >/dev/null\necho $CNI_COMMAND >> {}\n[ $CNI_COMMAND = ADD ] || exit 0\n{answer}\n",
            log.display()
        );
        let staged = lab.dir.join("staged");
        std::fs::write(&staged, text).unwrap();
        std::fs::set_permissions(&staged, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(staged, bin.join("own-ipam")).unwrap();
    };
    let pod = Pod::new("one");
    let (code, text) = error(lab.add(&pod));
    assert!(code == 103 && text.contains("own-ipam"), "{code} {text}");
    install(r#"echo '{"code":11,"msg":"wait"}'; exit 1"#);
    assert_eq!(error(lab.add(&pod)), (11, "wait: ".into()));
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "ADD\nDEL\n");
    install(r#"echo '{"cniVersion":"1.1.0","ips":[{"address":"10.77.0.5/24"}]}'"#);
    let result = lab.add(&pod).unwrap();
    assert_eq!(result.ips[0].gateway.unwrap().to_string(), "10.77.0.1");
    lab.check(&pod, &result).unwrap();
    lab.gc(&[&pod]).unwrap();
    lab.del(&pod).unwrap();
    let order = std::fs::read_to_string(&log).unwrap().replace('\n', " ");
    assert_eq!(order, "ADD DEL ADD CHECK GC DEL ");
}
