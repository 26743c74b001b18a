//! The six verbs of the routed plugin against the kernel, called as its programs call it. Needs
//! root; each test has network namespaces of its own.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on shall stop")]

use std::fs::File;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use cni::skel::{Environment, run};
use cni::types::{AttachResult, SpecVersion};
use cni_routed::VXLAN;
use cni_routed::state::{NodeState, ensure};
use linux::netlink::{Change, Mac, Rtnl, TABLE_MAIN, in_netns, new_netns};
use linux::sysctl::Sysctl;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A node: a namespace, the agent's state, the configuration.
struct Lab {
    node: File,
    dir: TempDir,
    conf: Value,
}

struct Pod {
    id: String,
    netns: File,
    /// Holds the path of the namespace, which goes with the pod.
    dir: TempDir,
}

impl Pod {
    fn new(id: &str) -> Self {
        let netns = new_netns().expect("root is needed");
        let dir = tempfile::tempdir().unwrap();
        let open = format!("/proc/{}/fd/{}", std::process::id(), netns.as_raw_fd());
        std::os::unix::fs::symlink(open, dir.path().join("netns")).unwrap();
        Self {
            id: id.into(),
            netns,
            dir,
        }
    }

    fn path(&self) -> String {
        self.dir.path().join("netns").display().to_string()
    }

    fn rtnl(&self) -> Rtnl {
        Rtnl::open_in(self.netns.as_fd()).unwrap()
    }
}

impl Lab {
    fn new(pod_cidrs: &[&str]) -> Self {
        let lab = Self::without_state();
        lab.write_state(pod_cidrs, 1450);
        lab
    }

    fn without_state() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let conf = json!({
            "cniVersion": "1.1.0", "name": "net", "type": "cni-vxlan",
            "stateDir": dir.path().join("state"), "dataDir": dir.path().join("leases"),
        });
        let node = new_netns().expect("root is needed");
        in_netns(node.as_fd(), || {
            // The agent's part.
            let all = ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"];
            for name in all {
                Sysctl::parse(name).unwrap().write("1").unwrap();
            }
        })
        .unwrap();
        Self { node, dir, conf }
    }

    fn write_state(&self, pod_cidrs: &[&str], mtu_bytes: u32) {
        let state = NodeState {
            pod_cidrs: pod_cidrs.iter().map(|net| net.parse().unwrap()).collect(),
            mtu_bytes,
        };
        ensure(&self.dir.path().join("state"), &state).unwrap();
    }

    fn rtnl(&self) -> Rtnl {
        Rtnl::open_in(self.node.as_fd()).unwrap()
    }

    fn call(&self, verb: &str, id: &str, netns: &str, conf: &Value) -> Result<Value, Value> {
        let environment = Environment::default()
            .with("CNI_COMMAND", verb)
            .with("CNI_CONTAINERID", id)
            .with("CNI_NETNS", netns)
            .with("CNI_IFNAME", "eth0")
            .with("CNI_PATH", "/nowhere");
        let mut printed = Vec::new();
        let text = conf.to_string();
        let code = in_netns(self.node.as_fd(), || {
            run(&VXLAN, &environment, text.as_bytes(), &mut printed)
        });
        let fine = code.unwrap() == ExitCode::SUCCESS;
        let printed = match printed.as_slice() {
            [] => Value::Null,
            bytes => serde_json::from_slice(bytes).unwrap(),
        };
        if fine { Ok(printed) } else { Err(printed) }
    }

    fn add(&self, pod: &Pod) -> Result<AttachResult, Value> {
        let printed = self.call("ADD", &pod.id, &pod.path(), &self.conf)?;
        Ok(AttachResult::from_value(&printed).unwrap())
    }

    fn del(&self, id: &str, netns: &str) -> Result<Value, Value> {
        self.call("DEL", id, netns, &self.conf)
    }

    fn check(&self, pod: &Pod, result: &AttachResult) -> Result<Value, Value> {
        let mut conf = self.conf.clone();
        conf["prevResult"] = result.to_value(SpecVersion::NEWEST);
        self.call("CHECK", &pod.id, &pod.path(), &conf)
    }

    fn pairs(&self) -> Vec<String> {
        let links = self.rtnl().links_of_kind("veth").unwrap();
        links.into_iter().map(|link| link.name).collect()
    }

    fn files(&self, kind: &str) -> usize {
        let dir: PathBuf = self.dir.path().join("leases/net").join(kind);
        std::fs::read_dir(dir).map_or(0, Iterator::count)
    }

    fn assert_nothing_left(&self) {
        assert_eq!(self.pairs(), Vec::<String>::new());
        assert_eq!((self.files("claims"), self.files("leases")), (0, 0));
        let routes = self.rtnl().routes_of_table(TABLE_MAIN).unwrap();
        assert_eq!(routes, []);
    }
}

fn error(answer: Result<impl std::fmt::Debug, Value>) -> (u64, String) {
    let error = answer.expect_err("must fail");
    let details = error["details"].as_str().unwrap_or_default();
    let text = format!("{}: {details}", error["msg"].as_str().unwrap_or_default());
    (error["code"].as_u64().unwrap(), text)
}

/// Sends a datagram to an address in another namespace and returns the source seen there; again
/// for IPv6, whose addresses work a moment after they were set.
fn send(from: &File, at: &File, to: IpAddr) -> Option<IpAddr> {
    let attempts = if to.is_ipv4() { 1 } else { 5 };
    (0..attempts).find_map(|_| send_once(from, at, to))
}

fn send_once(from: &File, at: &File, to: IpAddr) -> Option<IpAddr> {
    let any: IpAddr = if to.is_ipv4() {
        [0, 0, 0, 0].into()
    } else {
        [0_u16; 8].into()
    };
    let listener = in_netns(at.as_fd(), || UdpSocket::bind((any, 0)).unwrap()).unwrap();
    let limit = Some(Duration::from_secs(3));
    listener.set_read_timeout(limit).unwrap();
    let port = listener.local_addr().unwrap().port();
    in_netns(from.as_fd(), || {
        let sender = UdpSocket::bind((any, 0)).unwrap();
        sender.send_to(b"hello", (to, port)).unwrap();
    })
    .unwrap();
    let mut buffer = [0; 16];
    listener
        .recv_from(&mut buffer)
        .ok()
        .map(|(_, source)| source.ip())
}

#[test]
fn two_pods_reach_each_other_in_both_families_without_a_bridge_or_arp() {
    let lab = Lab::new(&["10.244.1.0/24", "fd00:1::/64"]);
    let (one, two) = (Pod::new("one"), Pod::new("two"));
    let first = lab.add(&one).unwrap();
    let second = lab.add(&two).unwrap();
    let shown = |result: &AttachResult| -> Vec<String> {
        result.ips.iter().map(|ip| ip.address.to_string()).collect()
    };
    assert_eq!(shown(&first), ["10.244.1.2/32", "fd00:1::2/128"]);
    assert_eq!(shown(&second), ["10.244.1.3/32", "fd00:1::3/128"]);
    assert_eq!(first.ips[0].gateway, "10.244.1.1".parse().ok());
    assert_eq!(first.interfaces[1].mac, "0a:58:0a:f4:01:02");
    assert_eq!(first.interfaces[1].mtu, Some(1450));
    for (index, ip) in second.ips.iter().enumerate() {
        let source = send(&one.netns, &two.netns, ip.address.addr());
        assert_eq!(source, Some(first.ips[index].address.addr()));
    }
    lab.check(&one, &first).unwrap();
    // No other neighbour was ever asked for.
    let index = one.rtnl().link_by_name("eth0").unwrap().unwrap().index;
    let neighbours = one.rtnl().neighbours_of(index).unwrap();
    let asked = neighbours
        .iter()
        .filter(|n| !n.permanent && n.address.is_ipv4());
    assert_eq!(asked.count(), 0, "{neighbours:?}");
}

/// IPv4 only: of an IPv6 address the kernel adds the local route a moment after it has answered.
#[test]
fn the_very_first_packet_arrives_both_ways() {
    let lab = Lab::new(&["10.244.1.0/24"]);
    let first = Pod::new("first");
    let to = lab.add(&first).unwrap().ips[0].address.addr();
    for n in 0..40 {
        let pod = Pod::new(&format!("pod-{n}"));
        let own = lab.add(&pod).unwrap().ips[0].address.addr();
        if n % 2 == 0 {
            let seen = send(&pod.netns, &first.netns, to);
            assert_eq!(seen, Some(own), "from pod {n}");
        } else {
            let seen = send(&first.netns, &pod.netns, own);
            assert_eq!(seen, Some(to), "to pod {n}");
        }
        lab.del(&pod.id, "").unwrap();
    }
}

#[test]
fn an_ipv6_only_node_works() {
    let lab = Lab::new(&["fd00:1::/64"]);
    let (one, two) = (Pod::new("one"), Pod::new("two"));
    let first = lab.add(&one).unwrap();
    let second = lab.add(&two).unwrap();
    let source = send(&one.netns, &two.netns, second.ips[0].address.addr());
    assert_eq!(source, Some(first.ips[0].address.addr()));
}

#[test]
fn before_the_agent_has_spoken_add_says_try_again_and_status_not_available() {
    let lab = Lab::without_state();
    let pod = Pod::new("one");
    let (code, text) = error(lab.add(&pod));
    assert_eq!(code, 11, "{text}");
    assert!(
        text.contains("does the peer agent run on this node?"),
        "{text}"
    );
    let (code, _) = error(lab.call("STATUS", "", "", &lab.conf));
    assert_eq!(code, 50);
    // DEL and GC do without.
    lab.del("one", "").unwrap();
    let mut conf = lab.conf.clone();
    conf["cni.dev/valid-attachments"] = json!([]);
    lab.call("GC", "", "", &conf).unwrap();
    lab.write_state(&["10.244.1.0/24"], 1400);
    lab.call("STATUS", "", "", &lab.conf).unwrap();
    assert_eq!(lab.add(&pod).unwrap().interfaces[0].mtu, Some(1400));
}

#[test]
fn del_needs_no_namespace_no_state_and_may_be_repeated() {
    let lab = Lab::new(&["10.244.1.0/24", "fd00:1::/64"]);
    for netns in ["", "/proc/1/fd/none", "/var/run/netns/gone"] {
        let pod = Pod::new("one");
        lab.add(&pod).unwrap();
        std::fs::rename(lab.dir.path().join("state"), lab.dir.path().join("gone")).unwrap();
        lab.del("one", netns).unwrap();
        lab.del("one", netns).unwrap();
        lab.assert_nothing_left();
        std::fs::rename(lab.dir.path().join("gone"), lab.dir.path().join("state")).unwrap();
    }
}

#[test]
fn an_interface_of_others_is_refused_and_our_own_half_done_one_is_finished() {
    let lab = Lab::new(&["10.244.1.0/24"]);
    let pod = Pod::new("one");
    let first = lab.add(&pod).unwrap();
    // A second ADD of the same attachment: as after a kill.
    assert_eq!(lab.add(&pod).unwrap(), first);
    lab.check(&pod, &first).unwrap();
    let (code, text) = error(lab.call("ADD", "other", &pod.path(), &lab.conf));
    assert_eq!(code, 4, "{text}");
    assert_eq!(lab.pairs().len(), 1);
    assert_eq!(lab.files("leases"), 1);
}

#[test]
fn check_names_what_is_different() {
    let lab = Lab::new(&["10.244.1.0/24"]);
    let pod = Pod::new("one");
    let result = lab.add(&pod).unwrap();
    lab.check(&pod, &result).unwrap();
    let host = lab.pairs()[0].clone();
    let host = lab.rtnl().link_by_name(&host).unwrap().unwrap();
    let mut elsewhere = result.clone();
    elsewhere.ips[0].address = "10.244.1.99/32".parse().unwrap();
    let (code, text) = error(lab.check(&pod, &elsewhere));
    assert_eq!(code, 101);
    assert!(text.contains("lacks the route to 10.244.1.99"), "{text}");
    let index = pod.rtnl().link_by_name("eth0").unwrap().unwrap().index;
    let mac = Mac([2, 0, 0, 0, 0, 1]);
    pod.rtnl().apply(&[Change::SetMac { index, mac }]).unwrap();
    assert!(
        error(lab.check(&pod, &result))
            .1
            .contains("hardware address")
    );
    lab.rtnl()
        .apply(&[Change::RemoveLink { name: host.name }])
        .unwrap();
    assert!(error(lab.check(&pod, &result)).1.contains("is missing"));
}

#[test]
fn gc_keeps_the_valid_and_frees_the_rest() {
    let lab = Lab::new(&["10.244.1.0/24"]);
    let pods = ["one", "two", "three"].map(Pod::new);
    for pod in &pods {
        lab.add(pod).unwrap();
    }
    let mut conf = lab.conf.clone();
    conf["cni.dev/valid-attachments"] = json!([{"containerID": "two", "ifname": "eth0"}]);
    lab.call("GC", "", "", &conf).unwrap();
    assert_eq!(
        (lab.pairs().len(), lab.files("leases"), lab.files("claims")),
        (1, 1, 1)
    );
    conf["cni.dev/valid-attachments"] = json!([]);
    lab.call("GC", "", "", &conf).unwrap();
    lab.assert_nothing_left();
}

#[test]
fn an_exhausted_pool_says_so_and_takes_back_what_the_dead_hold() {
    let lab = Lab::new(&["10.244.1.0/30"]);
    let (one, two) = (Pod::new("one"), Pod::new("two"));
    lab.add(&one).unwrap();
    let (code, text) = error(lab.add(&two));
    assert_eq!(code, 102, "{text}");
    assert_eq!(error(lab.call("STATUS", "", "", &lab.conf)).0, 50);
    assert_eq!(lab.pairs().len(), 1, "the refused ADD left nothing");
    // The first pod dies without a DEL.
    lab.rtnl()
        .apply(&[Change::RemoveLink {
            name: lab.pairs()[0].clone(),
        }])
        .unwrap();
    drop(one);
    lab.add(&two).unwrap();
}

#[test]
fn addresses_and_hardware_addresses_asked_for_are_given() {
    let mut lab = Lab::new(&["10.244.1.0/24"]);
    lab.conf["runtimeConfig"] = json!({
        "ips": ["10.244.1.77/24"], "mac": "02:aa:00:00:00:01",
        "ipRanges": [[{"subnet": "10.99.0.0/24"}]],
    });
    let pod = Pod::new("one");
    let result = lab.add(&pod).unwrap();
    assert_eq!(result.ips.len(), 1, "ranges are the node's alone");
    assert_eq!(result.ips[0].address.to_string(), "10.244.1.77/32");
    assert_eq!(result.interfaces[1].mac, "02:aa:00:00:00:01");
    lab.conf["runtimeConfig"] = json!({"ips": ["10.245.0.1"]});
    let (code, text) = error(lab.add(&Pod::new("two")));
    assert_eq!(code, 7, "{text}");
}

#[test]
fn host_ports_and_limits_come_and_go_with_the_pod() {
    let mut lab = Lab::new(&["10.244.1.0/24"]);
    let two = Pod::new("two");
    lab.add(&two).unwrap();
    lab.conf["runtimeConfig"] = json!({
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "udp"}],
        "bandwidth": {"ingressRate": 10_000_000, "ingressBurst": 1_000_000,
                      "egressRate": 10_000_000, "egressBurst": 1_000_000},
    });
    let one = Pod::new("one");
    let result = lab.add(&one).unwrap();
    lab.check(&one, &result).unwrap();
    let loopback = lab.rtnl().link_by_name("lo").unwrap().unwrap().index;
    let address = linux::netlink::AddressSpec {
        index: loopback,
        address: "192.0.2.1".parse().unwrap(),
        prefix_len: 32,
        detect_duplicates: false,
    };
    lab.rtnl().apply(&[Change::AddAddress(address)]).unwrap();
    // Another pod, the pod itself by way of the node, and the node.
    for from in [&two.netns, &one.netns, &lab.node] {
        let listener = in_netns(one.netns.as_fd(), || UdpSocket::bind("0.0.0.0:80").unwrap());
        let listener = listener.unwrap();
        listener
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        in_netns(from.as_fd(), || {
            let sender = UdpSocket::bind("0.0.0.0:0").unwrap();
            sender.send_to(b"hello", "192.0.2.1:8080").unwrap();
        })
        .unwrap();
        listener.recv(&mut [0; 16]).unwrap();
    }
    assert_eq!(lab.rtnl().ifbs().unwrap().len(), 1);
    lab.del("one", "").unwrap();
    lab.del("two", "").unwrap();
    assert_eq!(lab.rtnl().ifbs().unwrap().len(), 0);
    assert_eq!(lab.files("rules"), 0);
    lab.assert_nothing_left();
}

#[test]
fn a_bad_value_names_its_field() {
    for (key, value, said) in [
        (
            "stateDir",
            json!("x"),
            "stateDir \"x\" is not an absolute path",
        ),
        ("dataDir", json!(7), "dataDir is 7, not a string"),
        ("mtu", json!(5), "mtu 5 is no whole number from 68 to 65535"),
        (
            "mac",
            json!("zz"),
            "mac \"zz\" is not a hardware address like 0a:58:0a:f4:00:02",
        ),
    ] {
        let mut lab = Lab::new(&["10.244.1.0/24"]);
        lab.conf[key] = value;
        let (code, text) = error(lab.add(&Pod::new("one")));
        assert_eq!((code, text.trim_end_matches(": ")), (7, said));
    }
}

#[test]
fn results_come_in_the_version_asked_for() {
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let mut lab = Lab::new(&["10.244.1.0/24"]);
        lab.conf["cniVersion"] = json!(version);
        let pod = Pod::new("one");
        let printed = lab.call("ADD", "one", &pod.path(), &lab.conf).unwrap();
        assert_eq!(printed["cniVersion"], version);
        lab.del("one", &pod.path()).unwrap();
    }
}
