//! Masquerade by iptables, admission, guarded hardware addresses, isolation, VLANs. Needs root.

use linux::netlink::{Change, Mac};
use serde_json::json;

use crate::lab::{Lab, Pod, connect, error, outside, send, serve};

#[test]
fn iptables_masquerades_where_the_key_asks_for_it() {
    let lab = Lab::new().with("ipMasqBackend", json!("iptables"));
    let beyond = outside(&lab);
    let (one, two) = (Pod::new("one"), Pod::new("two"));
    let result = lab.add(&one).unwrap();
    lab.add(&two).unwrap();
    lab.check(&one, &result).unwrap();
    assert_eq!(
        send(&one, &beyond, "192.0.2.2").as_deref(),
        Some("192.0.2.1")
    );
    let rules = lab.shown("iptables-save", &["-t", "nat"]);
    assert_eq!(rules.matches("-j MASQUERADE").count(), 1, "{rules}");
    assert!(lab.nft().chains().unwrap().is_empty());
    // A flush is repaired.
    lab.shown("iptables", &["-t", "nat", "-F"]);
    lab.check(&one, &result).unwrap();
    assert_eq!(
        send(&one, &beyond, "192.0.2.2").as_deref(),
        Some("192.0.2.1")
    );
}

#[test]
fn iptables_admits_pods_through_a_forward_chain_that_drops() {
    let lab = Lab::new()
        .with("backend", json!("iptables"))
        .with("iptablesAdminChainName", json!("MY-ADMIN"));
    let beyond = outside(&lab);
    lab.shown("iptables", &["-P", "FORWARD", "DROP"]);
    let pod = Pod::new("one");
    let result = lab.add(&pod).unwrap();
    lab.check(&pod, &result).unwrap();
    let served = serve(&beyond, 80, 1);
    assert_eq!(connect(&pod.netns, "192.0.2.2:80").unwrap(), "192.0.2.1");
    served.join().unwrap();
    let rules = lab.shown("iptables-save", &["-t", "filter"]);
    assert!(rules.contains("-A FERRULE-FORWARD -j MY-ADMIN"), "{rules}");
    lab.del(&pod).unwrap();
    let rules = lab.shown("iptables-save", &["-t", "filter"]);
    assert!(!rules.contains("10.88.0.2"), "{rules}");
}

#[test]
fn a_guarded_pod_sends_from_its_own_hardware_address_only() {
    let lab = Lab::new().with("macspoofchk", json!(true));
    let (one, two) = (Pod::new("one"), Pod::new("two"));
    let result = lab.add(&one).unwrap();
    let second = lab.add(&two).unwrap();
    lab.check(&one, &result).unwrap();
    assert!(send(&one, &lab.node, "10.88.0.1").is_some());
    let index = one.rtnl().link_by_name("eth0").unwrap().unwrap().index;
    let strange = Mac([2, 0, 0, 0, 0, 9]);
    one.rtnl()
        .apply(&[Change::SetMac {
            index,
            mac: strange,
        }])
        .unwrap();
    assert!(send(&one, &lab.node, "10.88.0.1").is_none());
    assert!(send(&two, &lab.node, "10.88.0.1").is_some());
    // A flush is repaired for everyone.
    lab.shown("nft", &["flush", "ruleset"]);
    lab.check(&two, &second).unwrap();
    assert!(send(&one, &lab.node, "10.88.0.1").is_none());
    for pod in [&one, &two] {
        lab.call("DEL", &pod.id, "", &lab.conf).unwrap();
    }
    let rules = lab.shown("nft", &["list", "table", "bridge", "ferrule"]);
    assert!(!rules.contains("elements"), "{rules}");
    lab.assert_nothing_left("after guarded pods");
}

#[test]
fn bridges_that_keep_apart_do() {
    let apart = |policy: &str| {
        let other = json!({"type": "host-local", "ranges": [[{"subnet": "10.99.0.0/24"}]]});
        let lab = Lab::new().with("ingressPolicy", json!(policy));
        let mut second = lab.conf.clone();
        second["name"] = "second".into();
        second["bridge"] = "cni1".into();
        second["ipam"] = other;
        second["ipam"]["dataDir"] = lab.conf["ipam"]["dataDir"].clone();
        (lab, second)
    };
    for (policy, across, beside) in [
        ("open", true, true),
        ("same-bridge", false, true),
        ("isolated", false, false),
    ] {
        let (lab, second) = apart(policy);
        let (one, two, far) = (Pod::new("one"), Pod::new("two"), Pod::new("far"));
        let result = lab.add(&one).unwrap();
        lab.add(&two).unwrap();
        lab.call("ADD", &far.id, &far.path(), &second).unwrap();
        lab.check(&one, &result).unwrap();
        assert_eq!(
            send(&one, &far.netns, "10.99.0.2").is_some(),
            across,
            "{policy} across"
        );
        assert_eq!(
            send(&one, &two.netns, "10.88.0.3").is_some(),
            beside,
            "{policy} beside"
        );
        assert!(send(&one, &lab.node, "10.88.0.1").is_some(), "{policy}");
    }
}

#[test]
fn vlans_are_refused_by_name_where_the_kernel_has_none() {
    for (key, value) in [("vlan", json!(100)), ("vlanTrunk", json!([{"id": 100}]))] {
        let lab = Lab::new().with(key, value);
        let pod = Pod::new("one");
        match lab.add(&pod) {
            Ok(result) => {
                println!("this kernel filters VLANs on bridges");
                lab.check(&pod, &result).unwrap();
                let two = Pod::new("two");
                if key == "vlan" {
                    // Down, as after a kill while it was made: told, and mended by the next ADD.
                    lab.shown("ip", &["link", "set", "cni0.100", "down"]);
                    assert!(
                        error(lab.check(&pod, &result))
                            .1
                            .contains("cni0.100 is down")
                    );
                }
                lab.add(&two).unwrap();
                lab.check(&pod, &result).unwrap();
                let reaches = |netns, address| send(&pod, netns, address).is_some();
                assert!(reaches(&two.netns, "10.88.0.3"), "{key}");
                assert!(reaches(&lab.node, "10.88.0.1") || key != "vlan");
            }
            refused => {
                let (code, text) = error(refused);
                assert!(
                    code == 2 && text.starts_with(&format!("{key} needs a kernel")),
                    "{code} {text}"
                );
                assert!(lab.rtnl().link_by_name("cni0").unwrap().is_none());
                lab.assert_nothing_left("after a refusal");
            }
        }
    }
}
