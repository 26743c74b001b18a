//! Rules of the specification about chains, results and arguments. Needs root.

use serde_json::json;

use crate::lab::{Lab, Pod, error};

#[test]
fn what_plugins_before_us_made_stays_in_the_result() {
    let lab = Lab::new();
    let before = json!({
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "lo", "sandbox": "/x"}, {"name": "net9", "sandbox": "/x"}],
        "ips": [{"address": "192.0.2.9/24", "interface": 1}],
        "routes": [{"dst": "198.51.100.0/24", "gw": "192.0.2.1"}],
        "dns": {"nameservers": ["192.0.2.53"]},
    });
    let lab = lab.with("prevResult", before);
    let pod = Pod::new("one");
    let result = lab.add(&pod).unwrap();
    let names: Vec<&str> = result.interfaces.iter().map(|i| i.name.as_str()).collect();
    assert_eq!(names[..3], ["lo", "net9", "cni0"]);
    assert_eq!(result.ips[0].address.to_string(), "192.0.2.9/24");
    assert_eq!(
        (result.ips[1].address.to_string(), result.ips[1].interface),
        ("10.88.0.2/24".into(), Some(4))
    );
    assert_eq!(result.interfaces[4].name, "eth0");
    assert_eq!(result.routes.len(), 2);
    assert_eq!(result.dns.nameservers, ["192.0.2.53"]);
    let mut alone = result.clone();
    // CHECK looks at its own part: the others' are theirs to check.
    alone.routes.remove(0);
    lab.check(&pod, &alone).unwrap();
}

#[test]
fn a_later_plugin_may_have_added_to_the_result_that_check_is_given() {
    let lab = Lab::new();
    let pod = Pod::new("one");
    let mut result = lab.add(&pod).unwrap();
    result.interfaces.push(cni::types::Interface {
        name: "tun0".into(),
        sandbox: pod.path(),
        ..Default::default()
    });
    result.ips.push(cni::types::IpConfig {
        address: "10.200.0.1/32".parse().unwrap(),
        gateway: None,
        interface: Some(3),
    });
    lab.check(&pod, &result).unwrap();
}

#[test]
fn resolver_settings_come_from_the_runtime_the_configuration_or_the_ranges() {
    let pod = |lab: &Lab| {
        let result = lab.add(&Pod::new("one")).unwrap();
        lab.call("DEL", "one", "", &lab.conf).unwrap();
        result.dns
    };
    let mut lab = Lab::new();
    std::fs::create_dir_all(&lab.dir).unwrap();
    let file = lab.dir.join("resolv.conf");
    std::fs::write(&file, "nameserver 192.0.2.1\nsearch a b\noptions ndots:5\n").unwrap();
    lab.conf["ipam"]["resolvConf"] = json!(file);
    let dns = pod(&lab);
    assert_eq!(
        (dns.nameservers, dns.search.len()),
        (vec!["192.0.2.1".into()], 2)
    );
    let lab = lab.with("dns", json!({"nameservers": ["192.0.2.2"]}));
    assert_eq!(pod(&lab).nameservers, ["192.0.2.2"]);
    let runtime = json!({"dns": {"servers": ["192.0.2.3"], "searches": ["c"]}});
    let lab = lab.with("runtimeConfig", runtime);
    let dns = pod(&lab);
    assert_eq!(
        (dns.nameservers, dns.search),
        (vec!["192.0.2.3".into()], vec!["c".into()])
    );
}

#[test]
fn arguments_of_the_environment_are_honoured_and_unknown_ones_need_leave() {
    let lab = Lab::new();
    let pod = Pod::new("one");
    let add = |args: &str| {
        let environment = [("CNI_ARGS", args.to_owned())];
        lab.call_with("ADD", &pod.id, &pod.path(), &lab.conf, &environment)
    };
    let result = add("IP=10.88.0.77;MAC=02:00:00:00:00:07;K8S_POD_NAME=web;K8S_POD_UID=u").unwrap();
    assert_eq!(result["ips"][0]["address"], "10.88.0.77/24");
    assert_eq!(result["interfaces"][2]["mac"], "02:00:00:00:00:07");
    lab.del(&pod).unwrap();
    let (code, text) = error(add("COLOUR=red"));
    assert!(code == 4 && text.contains("COLOUR"), "{code} {text}");
    lab.assert_nothing_left("after a refusal");
    add("COLOUR=red;IgnoreUnknown=true").unwrap();
    // DEL must not be stopped by what ADD would refuse.
    let environment = [("CNI_ARGS", "COLOUR=red".to_owned())];
    lab.call_with("DEL", &pod.id, "", &lab.conf, &environment)
        .unwrap();
    lab.assert_nothing_left("after del");
}

#[test]
fn addresses_and_hardware_addresses_may_be_asked_for_by_args_cni() {
    let lab = Lab::new().with(
        "args",
        json!({"cni": {"ips": ["10.88.0.66"], "mac": "02:00:00:00:00:06"}}),
    );
    let pod = Pod::new("one");
    let result = lab.add(&pod).unwrap();
    assert_eq!(result.ips[0].address.to_string(), "10.88.0.66/24");
    assert_eq!(result.interfaces[2].mac, "02:00:00:00:00:06");
}

#[test]
fn several_ranges_of_one_set_are_used_up_in_turn() {
    let mut lab = Lab::new();
    lab.conf["ipam"]["ranges"] = json!([[
        {"subnet": "10.88.0.0/29", "rangeStart": "10.88.0.5", "rangeEnd": "10.88.0.6"},
        {"subnet": "10.89.0.0/29", "gateway": "10.89.0.6"}
    ]]);
    let addresses: Vec<String> = (0..4)
        .map(|n| {
            lab.add(&Pod::new(&format!("pod-{n}"))).unwrap().ips[0]
                .address
                .to_string()
        })
        .collect();
    assert_eq!(
        addresses,
        [
            "10.88.0.5/29",
            "10.88.0.6/29",
            "10.89.0.1/29",
            "10.89.0.2/29"
        ]
    );
}

#[test]
fn leases_of_the_dead_are_taken_back_before_the_pool_runs_dry() {
    // 253 addresses: from 241 in use on, the dead are looked for now and then.
    let lab = Lab::new().with("isDefaultGateway", json!(false));
    let alive = Pod::new("alive");
    lab.add(&alive).unwrap();
    let doomed: Vec<Pod> = (0..239).map(|n| Pod::new(&format!("doomed-{n}"))).collect();
    for pod in &doomed {
        lab.add(pod).unwrap();
    }
    // Their namespaces go, and their pairs with them, as after a crash without DEL.
    drop(doomed);
    while lab.ports().len() > 1 {
        std::thread::yield_now();
    }
    for n in 0..8 {
        lab.add(&Pod::new(&format!("new-{n}"))).unwrap();
    }
    let claims = lab.claims();
    assert!(claims.len() < 100, "{} in use", claims.len());
    assert!(claims.contains(&"10.88.0.2".to_owned()));
}
