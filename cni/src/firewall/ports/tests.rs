//! Reading the keys, and the rules against the kernel. Needs root.

use std::os::fd::AsFd;

use super::*;

fn parse(conf: &str) -> Result<HostPorts, String> {
    let conf: Object = serde_json::from_str(conf).unwrap();
    HostPorts::parse(&conf).map_err(|e| format!("{} {}", e.code.number(), e.msg))
}

fn with_mappings(list: &str) -> Result<HostPorts, String> {
    parse(&format!(r#"{{"runtimeConfig":{{"portMappings":{list}}}}}"#))
}

#[test]
fn a_bad_mapping_names_its_place() {
    for (list, expected) in [
        (
            r#"[{"hostPort":0,"containerPort":80}]"#,
            "7 runtimeConfig.portMappings[0].hostPort is 0, not a whole number from 1 to 65535",
        ),
        (
            r#"[{"hostPort":80}]"#,
            "7 runtimeConfig.portMappings[0].containerPort is missing",
        ),
        (
            r#"[{"hostPort":80,"containerPort":80,"protocol":"icmp"}]"#,
            "7 runtimeConfig.portMappings[0].protocol \"icmp\" is none of tcp, udp, sctp",
        ),
        (
            r#"[{"hostPort":80,"containerPort":80,"hostIP":"here"}]"#,
            "7 runtimeConfig.portMappings[0].hostIP \"here\" is not an address",
        ),
        ("{}", "7 portMappings is {}, not a list"),
    ] {
        assert_eq!(with_mappings(list).unwrap_err(), expected);
    }
}

#[test]
fn the_backend_follows_from_the_keys_when_it_is_not_named() {
    let backend = |conf: &str| parse(conf).map(|ports| ports.backend);
    assert_eq!(backend("{}"), Ok(Backend::Nftables));
    assert_eq!(backend(r#"{"backend":"iptables"}"#), Ok(Backend::Iptables));
    assert_eq!(
        backend(r#"{"conditionsV4":["!","-d","192.0.2.0/24"]}"#),
        Ok(Backend::Iptables)
    );
    assert_eq!(
        backend(r#"{"backend":"nftables","conditionsV4":["-i","eth0"]}"#),
        Err("7 conditionsV4 is for iptables, but backend is \"nftables\"".into())
    );
    assert_eq!(
        backend(r#"{"backend":"pf"}"#),
        Err("7 backend \"pf\" is neither \"nftables\" nor \"iptables\"".into())
    );
    assert!(
        backend(r#"{"backend":"firewalld"}"#)
            .unwrap_err()
            .starts_with("2 backend")
    );
    assert!(
        backend(r#"{"markMasqBit":3,"externalSetMarkChain":"KUBE-MARK-MASQ"}"#)
            .unwrap_err()
            .starts_with("7 markMasqBit cannot be combined")
    );
    assert!(
        backend(r#"{"markMasqBit":32}"#)
            .unwrap_err()
            .starts_with("7 markMasqBit is 32")
    );
}

#[test]
fn a_mapping_concerns_its_own_family() {
    let ports = with_mappings(
        r#"[{"hostPort":1,"containerPort":11},{"hostPort":2,"containerPort":22,"hostIP":"0.0.0.0","protocol":"UDP"},
            {"hostPort":3,"containerPort":33,"hostIP":"fd00::9","protocol":"sctp"}]"#,
    )
    .unwrap();
    let addresses = [
        "10.1.0.2/24".parse().unwrap(),
        "fd01::2/64".parse().unwrap(),
    ];
    let shown: Vec<String> = ports
        .forwards(&addresses)
        .iter()
        .map(|f| {
            let ip = f.host_ip.map_or("*".into(), |ip| ip.to_string());
            format!("{}/{ip}:{} {} {}", f.protocol, f.host_port, f.to, f.to_port)
        })
        .collect();
    assert_eq!(
        shown,
        [
            "6/*:1 10.1.0.2 11",
            "17/*:2 10.1.0.2 22",
            "6/*:1 fd01::2 11",
            "132/fd00::9:3 fd01::2 33",
        ]
    );
}

fn owner(id: &str) -> Owner {
    Owner {
        container_id: id.into(),
        ifname: "eth0".into(),
    }
}

fn forward(host_port: u16, to: &str) -> Forward {
    Forward {
        host_ip: None,
        protocol: 6,
        host_port,
        to: to.parse().unwrap(),
        to_port: 80,
    }
}

#[test]
fn elements_are_replaced_by_newcomers_kept_from_strangers_and_restored_after_a_flush() {
    let netns = linux::netlink::new_netns().expect("root is needed");
    let mut nft = Nft::open_in(netns.as_fd()).unwrap();
    let subnets: Vec<IpNet> = vec!["10.1.0.0/24".parse().unwrap(), "fd00::/64".parse().unwrap()];
    let rules = PortRules::of("net", &parse("{}").unwrap(), &subnets).unwrap();
    let none = || Ok::<_, NetlinkError>(Vec::new());
    let (a, b) = (owner("a"), owner("b"));
    let of_a = [forward(80, "10.1.0.2"), forward(81, "fd00::2")];
    let of_b = [forward(80, "10.1.0.3")];
    let there = |nft: &mut Nft, owner: &Owner, forwards: &[Forward]| {
        forwards_are_there(nft, "net", &rules, (owner, forwards)).unwrap()
    };
    for _ in 0..2 {
        add_forwards(&mut nft, "net", &rules, (&a, &of_a), none).unwrap();
    }
    there(&mut nft, &a, &of_a).unwrap();
    add_forwards(&mut nft, "net", &rules, (&b, &of_b), none).unwrap();
    there(&mut nft, &b, &of_b).unwrap();
    assert_eq!(
        there(&mut nft, &a, &of_a).unwrap_err(),
        "host port 80 does not lead to 10.1.0.2"
    );
    // The late DEL of the former holder.
    for _ in 0..2 {
        remove_forwards(&mut nft, "net", &a, &of_a).unwrap();
    }
    there(&mut nft, &b, &of_b).unwrap();

    nft.remove_table().unwrap();
    assert!(there(&mut nft, &b, &of_b).unwrap_err().contains("missing"));
    let c = owner("c");
    let of_c = [forward(82, "10.1.0.4")];
    let many: Vec<Forward> = (10_000..15_000).map(|p| forward(p, "10.1.0.9")).collect();
    let everyone = || {
        let all = vec![(b.clone(), of_b.to_vec()), (owner("many"), many.clone())];
        Ok::<_, NetlinkError>(all)
    };
    add_forwards(&mut nft, "net", &rules, (&c, &of_c), everyone).unwrap();
    there(&mut nft, &b, &of_b).unwrap();
    there(&mut nft, &c, &of_c).unwrap();
    there(&mut nft, &owner("many"), &many[4990..]).unwrap();

    remove_port_rules(&mut nft, "net").unwrap();
    remove_port_rules(&mut nft, "net").unwrap();
    assert!(nft.chains().unwrap().is_empty());
}

#[test]
fn two_configurations_of_one_network_share_the_maps() {
    let netns = linux::netlink::new_netns().expect("root is needed");
    let mut nft = Nft::open_in(netns.as_fd()).unwrap();
    let subnets = ["10.1.0.0/24".parse().unwrap()];
    let none = || Ok::<_, NetlinkError>(Vec::new());
    let (a, of_a) = (owner("a"), [forward(80, "10.1.0.2")]);
    for conf in [
        "{}",
        r#"{"snat":false}"#,
        r#"{"masqAll":true,"markMasqBit":5}"#,
        r#"{"conditionsV4":["ip saddr != 10.0.0.0/8"]}"#,
    ] {
        let rules = PortRules::of("net", &parse(conf).unwrap(), &subnets).unwrap();
        add_forwards(&mut nft, "net", &rules, (&a, &of_a), none).unwrap();
    }
    remove_port_rules(&mut nft, "net").unwrap();
    assert!(nft.chains().unwrap().is_empty());
}
