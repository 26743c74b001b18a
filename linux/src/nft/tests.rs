//! Against the kernel, each test in a network namespace of its own. Needs root.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::Command;

use super::*;

fn prefix(address: &str, len: u8) -> Prefix {
    Prefix {
        address: address.parse().unwrap(),
        len,
    }
}

fn masquerade(source: Prefix, except: &[Prefix]) -> Rule {
    let mut exprs = vec![
        Expr::Family(Family::of(source.address)),
        Expr::Source(Sense::Is, source),
    ];
    exprs.extend(except.iter().map(|net| Expr::Destination(Sense::Not, *net)));
    exprs.push(Expr::Masquerade);
    Rule {
        exprs,
        comment: "network test".into(),
    }
}

fn chain() -> Chain {
    Chain {
        name: "masq-test".into(),
        hook: Some(Hook::SourceNat),
        rules: vec![
            masquerade(
                prefix("10.1.0.0", 20),
                &[prefix("10.1.0.0", 16), prefix("224.0.0.0", 4)],
            ),
            masquerade(prefix("fd00:1::", 64), &[prefix("ff00::", 8)]),
        ],
    }
}

/// What the administrator's tool makes of our bytes; none when it is not installed.
fn listed(netns: &File) -> Option<String> {
    let output = crate::netlink::in_netns(netns.as_fd(), || {
        Command::new("nft").args(["list", "ruleset"]).output()
    })
    .unwrap();
    let Ok(output) = output else {
        println!("skipped comparing with nft's own view: nft is not installed");
        return None;
    };
    Some(String::from_utf8(output.stdout).unwrap())
}

fn assert_listed(netns: &File, all: &[&str]) {
    let Some(text) = listed(netns) else { return };
    for wanted in all {
        assert!(text.contains(wanted), "{wanted}\n--- in ---\n{text}");
    }
}

#[test]
fn the_kernel_takes_our_rules_and_nft_shows_them_as_meant() {
    let netns = crate::netlink::new_netns().expect("root is needed");
    let mut nft = Nft::open_in(netns.as_fd()).unwrap();
    assert!(nft.ensure_chain(&chain()).unwrap());
    assert!(
        !nft.ensure_chain(&chain()).unwrap(),
        "the second time nothing is to be done"
    );
    assert_eq!(nft.chains().unwrap(), ["masq-test"]);
    assert_listed(
        &netns,
        &[
            "table inet ferrule",
            "type nat hook postrouting priority srcnat; policy accept;",
            "ip saddr 10.1.0.0/20 ip daddr != 10.1.0.0/16 ip daddr != 224.0.0.0/4 masquerade comment \"network test\"",
            "ip6 saddr fd00:1::/64 ip6 daddr != ff00::/8 masquerade",
        ],
    );
}

#[test]
fn a_flushed_or_deleted_chain_comes_back_and_removal_is_idempotent() {
    let netns = crate::netlink::new_netns().expect("root is needed");
    let mut nft = Nft::open_in(netns.as_fd()).unwrap();
    nft.ensure_chain(&chain()).unwrap();
    nft.transact(&[on_chain(TABLE, NFT_MSG_DELRULE, "empty", "masq-test")])
        .unwrap();
    assert_eq!(nft.rules_in("masq-test").unwrap(), Some(0));
    assert!(nft.ensure_chain(&chain()).unwrap());
    assert_eq!(nft.rules_in("masq-test").unwrap(), Some(2));
    nft.remove_table().unwrap();
    nft.remove_table().unwrap();
    assert!(nft.ensure_chain(&chain()).unwrap());
    nft.remove_chain("masq-test").unwrap();
    nft.remove_chain("masq-test").unwrap();
    assert_eq!(nft.rules_in("masq-test").unwrap(), None);
    assert!(nft.chains().unwrap().is_empty());
}

fn port_map(name: &str, by_address: bool, family: Family) -> Set {
    let address = if family == Family::V4 {
        Kind::V4
    } else {
        Kind::V6
    };
    let mut key = vec![Kind::Transport, Kind::Port];
    if by_address {
        key.insert(0, address);
    }
    Set {
        name: name.into(),
        key,
        value: vec![address, Kind::Port],
    }
}

fn port(map: &str, host: u16, pod: &str, to: u16, owner: &str) -> Element {
    Element {
        set: map.into(),
        key: vec![Part::Transport(6), Part::Port(host)],
        value: vec![Part::Address(pod.parse().unwrap()), Part::Port(to)],
        owner: owner.into(),
    }
}

#[test]
fn a_map_sends_ports_on_and_its_elements_know_their_owner() {
    let netns = crate::netlink::new_netns().expect("root is needed");
    let mut nft = Nft::open_in(netns.as_fd()).unwrap();
    let nat = |map: &str, family, by_address| Rule {
        exprs: vec![
            Expr::Family(family),
            Expr::DestinationNat {
                map: map.into(),
                family,
                by_address,
            },
        ],
        comment: String::new(),
    };
    let inner = Chain {
        name: "ports".into(),
        hook: None,
        rules: vec![
            nat("four-address", Family::V4, true),
            nat("four", Family::V4, false),
            nat("six-address", Family::V6, true),
            nat("six", Family::V6, false),
        ],
    };
    let outer = Chain {
        name: "in".into(),
        hook: Some(Hook::DestinationNat),
        rules: vec![Rule {
            exprs: vec![Expr::DestinationIsLocal, Expr::Jump("ports".into())],
            comment: String::new(),
        }],
    };
    let first = port("four", 8080, "10.1.0.2", 80, "c1/eth0");
    let six = port("six", 8080, "fd00::2", 80, "c1/eth0");
    let make = Transaction::on(TABLE)
        .put_set(&port_map("four-address", true, Family::V4))
        .put_set(&port_map("four", false, Family::V4))
        .put_set(&port_map("six-address", true, Family::V6))
        .put_set(&port_map("six", false, Family::V6))
        .put_chain(&inner)
        .put_chain(&outer)
        .put_elements(&[first.clone(), six.clone()]);
    nft.commit(&make).unwrap();
    nft.commit(&make).unwrap();
    assert_listed(
        &netns,
        &[
            "fib daddr type local jump ports",
            "dnat ip to ip daddr . meta l4proto . th dport map @four-address",
            "dnat ip to meta l4proto . th dport map @four",
            "dnat ip6 to meta l4proto . th dport map @six",
            "tcp . 8080 comment \"c1/eth0\" : 10.1.0.2 . 80",
        ],
    );
    let found = nft.look_up(TABLE, &first).unwrap().unwrap();
    assert_eq!((found.same_value, found.owner.as_str()), (true, "c1/eth0"));
    assert!(nft.look_up(TABLE, &six).unwrap().unwrap().same_value);
    let other = port("four", 8080, "10.1.0.3", 80, "c2/eth0");
    assert!(!nft.look_up(TABLE, &other).unwrap().unwrap().same_value);
    let refused = nft.commit(&Transaction::on(TABLE).put_elements(std::slice::from_ref(&other)));
    assert!(refused.is_err(), "another value under the same key");
    let replace = Transaction::on(TABLE)
        .remove_element(&other)
        .add_elements(std::slice::from_ref(&other));
    nft.commit(&replace).unwrap();
    let found = nft.look_up(TABLE, &first).unwrap().unwrap();
    assert_eq!((found.same_value, found.owner.as_str()), (false, "c2/eth0"));
    nft.commit(&Transaction::on(TABLE).remove_element(&other))
        .unwrap();
    assert_eq!(nft.look_up(TABLE, &first).unwrap(), None);
    let away = Transaction::on(TABLE)
        .remove_chain("in")
        .remove_chain("ports")
        .remove_set("four");
    nft.commit(&away).unwrap();
    assert!(nft.chains().unwrap().is_empty());
}

#[test]
fn marks_conditions_and_verdicts_read_as_nft_writes_them() {
    let netns = crate::netlink::new_netns().expect("root is needed");
    let mut nft = Nft::open_in(netns.as_fd()).unwrap();
    let rule = |exprs: &[Expr]| Rule {
        exprs: exprs.to_vec(),
        comment: String::new(),
    };
    let chain = Chain {
        name: "forward".into(),
        hook: Some(Hook::Forward),
        rules: vec![
            rule(&[
                Expr::InInterface(Sense::Is, "cni0".into()),
                Expr::OutInterface(Sense::Not, "cni0".into()),
                Expr::Drop,
            ]),
            rule(&[Expr::Established, Expr::Accept]),
            rule(&[Expr::Mark(Sense::Is, 0x2000, 0x2000), Expr::Return]),
            rule(&[Expr::SetMark {
                keep: !0x2000,
                flip: 0x2000,
            }]),
            rule(&[
                Expr::Transport(Sense::Is, 17),
                Expr::DestinationPort(Sense::Not, 53),
                Expr::Accept,
            ]),
        ],
    };
    nft.ensure_chain(&chain).unwrap();
    assert_listed(
        &netns,
        &[
            "type filter hook forward priority filter; policy accept;",
            "iifname \"cni0\" oifname != \"cni0\" drop",
            "ct state established,related accept",
            "meta mark & 0x00002000 == 0x00002000 return",
            "udp dport != 53 accept",
        ],
    );
}

#[test]
fn frames_with_a_strange_source_can_be_dropped_on_a_bridge() {
    let netns = crate::netlink::new_netns().expect("root is needed");
    let mut nft = Nft::open_in(netns.as_fd()).unwrap();
    let guarded = Set {
        name: "guarded".into(),
        key: vec![Kind::Interface],
        value: vec![],
    };
    let allowed = Set {
        name: "allowed".into(),
        key: vec![Kind::Interface, Kind::Hardware],
        value: vec![],
    };
    let chain = Chain {
        name: "in".into(),
        hook: Some(Hook::BridgeIn),
        rules: vec![Rule {
            exprs: vec![
                Expr::InInterfaceIn("guarded".into()),
                Expr::HardwareSourceIn(Sense::Not, "allowed".into()),
                Expr::Drop,
            ],
            comment: String::new(),
        }],
    };
    let port = Element {
        set: "guarded".into(),
        key: vec![Part::Interface("veth0".into())],
        value: vec![],
        owner: "c1/eth0".into(),
    };
    let pair = Element {
        set: "allowed".into(),
        key: vec![
            Part::Interface("veth0".into()),
            Part::Hardware(Mac([2, 0, 0, 0, 0, 1])),
        ],
        value: vec![],
        owner: "c1/eth0".into(),
    };
    let make = Transaction::on(BRIDGE_TABLE)
        .put_set(&guarded)
        .put_set(&allowed)
        .put_chain(&chain)
        .put_elements(&[port, pair.clone()]);
    match nft.commit(&make) {
        Err(e) if e.errno() == Some(libc::EAFNOSUPPORT) => {
            println!("skipped: this kernel has no nftables for bridges");
            return;
        }
        other => other.unwrap(),
    }
    assert_listed(
        &netns,
        &[
            "table bridge ferrule",
            "iifname @guarded iifname . ether saddr != @allowed drop",
            "\"veth0\" . 02:00:00:00:00:01",
        ],
    );
    let found = nft.look_up(BRIDGE_TABLE, &pair).unwrap().unwrap();
    assert!(found.same_value && found.owner == "c1/eth0");
}
