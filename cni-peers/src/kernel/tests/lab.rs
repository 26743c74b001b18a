//! Nodes on one bridge, each with a kernel thread; pods on them, made by the plugin.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cni::skel::{Environment, run};
use cni::types::AttachResult;
use ipnet::IpNet;
use linux::netlink::{
    AddressSpec, BridgeSpec, Change, Link, Mac, Rtnl, VethSpec, in_netns, new_netns,
};
use linux::nft::Nft;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;

use crate::kernel::{KernelThread, Report, Settings, Snapshot, spawn};
use crate::netconf::{Backend, NetConf};
use crate::node::{PeerNode, peer_node};
use crate::peers::UnderlayWish;

/// What the issue grants traffic to come back after any failure.
pub(super) const HEALED: Duration = Duration::from_secs(3);

/// Nodes and what joins them.
pub(super) struct Lab {
    pub(super) fabric: File,
    pub(super) nodes: Vec<Node>,
}

/// One node.
pub(super) struct Node {
    pub(super) number: u8,
    pub(super) netns: File,
    pub(super) backend: Backend,
    pub(super) settings: Settings,
    pub(super) addresses: Vec<IpAddr>,
    pub(super) pod_cidrs: Vec<String>,
    /// Annotations put there by others.
    pub(super) annotations: BTreeMap<String, String>,
    kernel: Option<KernelThread>,
    pub(super) reports: watch::Receiver<Report>,
    dir: TempDir,
}

/// A pod with its addresses.
pub(super) struct Pod {
    pub(super) id: String,
    pub(super) netns: File,
    pub(super) result: AttachResult,
}

/// Which addresses nodes and pods have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Families {
    V4,
    Dual,
}

pub(super) fn conf(families: Families) -> NetConf {
    let networks: &[&str] = match families {
        Families::V4 => &["10.244.0.0/16"],
        Families::Dual => &["10.244.0.0/16", "fd00:10::/48"],
    };
    NetConf {
        networks: networks.iter().map(|net| net.parse().unwrap()).collect(),
        vni: 1,
        port: 8472,
        mtu_bytes: None,
        direct_routing: false,
        learning: false,
        gbp: false,
        ignored: Vec::new(),
    }
}

pub(super) fn rtnl_in(netns: &File) -> Rtnl {
    Rtnl::open_in(netns.as_fd()).unwrap()
}

pub(super) fn link(rtnl: &mut Rtnl, name: &str) -> Link {
    let found = rtnl.link_by_name(name).unwrap();
    found.unwrap_or_else(|| panic!("link {name} is missing"))
}

fn up(index: u32) -> Change {
    Change::SetUp { index, up: true }
}

pub(super) fn address(index: u32, text: &str) -> AddressSpec {
    let net: IpNet = text.parse().unwrap();
    AddressSpec {
        index,
        address: net.addr(),
        prefix_len: net.prefix_len(),
        detect_duplicates: false,
    }
}

impl Lab {
    pub(super) fn new(count: u8, backend: Backend, families: Families) -> Self {
        Self::with(count, backend, families, |_| {})
    }

    /// Nodes that know each other, with settings changed by `adjust`.
    pub(super) fn with(
        count: u8,
        backend: Backend,
        families: Families,
        adjust: impl Fn(&mut Settings),
    ) -> Self {
        let fabric = new_netns().expect("root is needed");
        let bridge = BridgeSpec {
            name: "br0".into(),
            mac: None,
            mtu_bytes: None,
        };
        rtnl_in(&fabric)
            .apply(&[Change::AddBridge(bridge)])
            .unwrap();
        let mut lab = Self {
            fabric,
            nodes: Vec::new(),
        };
        for number in 1..=count {
            lab.add_node(number, backend, families, &adjust);
        }
        lab.introduce();
        lab
    }

    fn add_node(
        &mut self,
        number: u8,
        backend: Backend,
        families: Families,
        adjust: &impl Fn(&mut Settings),
    ) {
        let netns = new_netns().unwrap();
        let mut addresses = vec![IpAddr::from([192, 0, 2, number])];
        let mut pod_cidrs = vec![format!("10.244.{number}.0/24")];
        if families == Families::Dual {
            addresses.push(format!("2001:db8::{number}").parse().unwrap());
            pod_cidrs.push(format!("fd00:10:0:{number}::/64"));
        }
        connect(&self.fabric, &netns, number, &addresses);
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut settings = Settings {
            backend,
            conf: conf(families),
            wish: UnderlayWish::default(),
            state_dir: dir.path().join("state"),
            data_dir: dir.path().join("leases"),
            network: "pods".into(),
            masquerade: true,
            resync: Duration::from_secs(5),
            event_buffer_bytes: 1 << 20,
        };
        adjust(&mut settings);
        let (kernel, reports) =
            in_netns(netns.as_fd(), || spawn(settings.clone()).unwrap()).unwrap();
        self.nodes.push(Node {
            number,
            netns,
            backend,
            settings,
            addresses,
            pod_cidrs,
            annotations: BTreeMap::new(),
            kernel: Some(kernel),
            reports,
            dir,
        });
    }

    /// Tells every node of itself, waits for what it announces, and tells all of all.
    pub(super) fn introduce(&mut self) {
        for node in &self.nodes {
            let own = Arc::new(node.as_peer());
            node.send(Snapshot {
                nodes: BTreeMap::from([(own.name.clone(), Arc::clone(&own))]),
                own: Some(own),
                complete: false,
            });
        }
        for node in &mut self.nodes {
            node.wait(|report| report.announcement.is_some());
        }
        self.tell();
        for node in &mut self.nodes {
            node.wait(|report| report.trouble.is_none() && report.reached > 0);
        }
    }

    /// Tells all of all, as they announce themselves now.
    pub(super) fn tell(&self) {
        self.tell_with(&[]);
    }

    /// The same with more nodes.
    pub(super) fn tell_with(&self, more: &[PeerNode]) {
        let ours = self
            .nodes
            .iter()
            .map(Node::as_peer)
            .chain(more.iter().cloned());
        let all: BTreeMap<String, Arc<PeerNode>> = ours
            .map(|peer| (peer.name.clone(), Arc::new(peer)))
            .collect();
        for node in &self.nodes {
            node.send(Snapshot {
                own: all.get(&node.name()).cloned(),
                nodes: all.clone(),
                complete: true,
            });
        }
    }

    /// Pods on the first and the last node.
    pub(super) fn pods(&self) -> (Pod, Pod) {
        (
            self.nodes[0].pod("one"),
            self.nodes[self.nodes.len() - 1].pod("two"),
        )
    }
}

fn connect(fabric: &File, netns: &File, number: u8, addresses: &[IpAddr]) {
    let mut outside = rtnl_in(fabric);
    let bridge = link(&mut outside, "br0").index;
    let name = format!("port{number}");
    outside
        .apply(&[Change::AddVeth(VethSpec {
            name: name.clone(),
            mac: Mac([2, 0, 0, 1, 0, number]),
            master: Some(bridge),
            mtu_bytes: None,
            peer_name: "eth0".into(),
            peer_mac: Mac([2, 0, 0, 2, 0, number]),
            peer_netns: netns.as_raw_fd(),
        })])
        .unwrap();
    let port = link(&mut outside, &name).index;
    outside.apply(&[up(port)]).unwrap();
    let mut inside = rtnl_in(netns);
    let loopback = link(&mut inside, "lo").index;
    let eth0 = link(&mut inside, "eth0").index;
    let mut changes = vec![up(loopback), up(eth0)];
    for ip in addresses {
        let len = if ip.is_ipv4() { 24 } else { 64 };
        changes.push(Change::AddAddress(address(eth0, &format!("{ip}/{len}"))));
    }
    inside.apply(&changes).unwrap();
}

impl Node {
    pub(super) fn name(&self) -> String {
        format!("node-{}", self.number)
    }

    pub(super) fn rtnl(&self) -> Rtnl {
        rtnl_in(&self.netns)
    }

    pub(super) fn nft(&self) -> Nft {
        Nft::open_in(self.netns.as_fd()).unwrap()
    }

    pub(super) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        in_netns(self.netns.as_fd(), work).unwrap()
    }

    pub(super) fn send(&self, snapshot: Snapshot) {
        self.kernel.as_ref().unwrap().send(snapshot);
    }

    /// The Node object as others see it.
    pub(super) fn as_peer(&self) -> PeerNode {
        let mut annotations = self.annotations.clone();
        if let Some(announcement) = &self.reports.borrow().announcement {
            let said = announcement.changes(false).into_iter();
            annotations.extend(said.filter_map(|(key, value)| Some((key, value?))));
        }
        peer_node(&self.name(), &annotations, &self.pod_cidrs, &self.addresses)
    }

    /// Waits until a report is so.
    pub(super) fn wait(&mut self, is: impl Fn(&Report) -> bool) -> Report {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let report = self.reports.borrow_and_update().clone();
            if is(&report) {
                return report;
            }
            assert!(Instant::now() < deadline, "{} says {report:?}", self.name());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends the agent's thread; the kernel keeps what it made.
    pub(super) fn stop(&mut self) {
        self.kernel = None;
    }

    /// Starts it again.
    pub(super) fn start(&mut self) {
        let settings = self.settings.clone();
        let (kernel, reports) = self.run(|| spawn(settings).unwrap());
        self.kernel = Some(kernel);
        self.reports = reports;
    }

    fn call(&self, verb: &str, id: &str, netns: &str, runtime: Value) -> (bool, Vec<u8>) {
        let conf = json!({
            "runtimeConfig": runtime,
            "cniVersion": "1.1.0", "name": "pods", "type": self.backend.plugin().kind,
            "stateDir": self.settings.state_dir, "dataDir": self.dir.path().join("leases"),
        });
        let environment = Environment::default()
            .with("CNI_COMMAND", verb)
            .with("CNI_CONTAINERID", id)
            .with("CNI_NETNS", netns)
            .with("CNI_IFNAME", "eth0")
            .with("CNI_PATH", "/nowhere");
        let mut printed = Vec::new();
        let plugin = self.backend.plugin();
        let text = conf.to_string();
        let code = self.run(|| run(&plugin, &environment, text.as_bytes(), &mut printed));
        (code == std::process::ExitCode::SUCCESS, printed)
    }

    /// A pod made by the plugin.
    pub(super) fn pod(&self, id: &str) -> Pod {
        self.pod_with(id, json!({}))
    }

    /// The same with what a runtime asks for.
    pub(super) fn pod_with(&self, id: &str, runtime: Value) -> Pod {
        let netns = new_netns().unwrap();
        let path = format!("/proc/{}/fd/{}", std::process::id(), netns.as_raw_fd());
        let (fine, printed) = self.call("ADD", id, &path, runtime);
        assert!(fine, "{}", String::from_utf8_lossy(&printed));
        Pod {
            id: id.into(),
            netns,
            result: AttachResult::from_json(&printed).unwrap(),
        }
    }

    pub(super) fn remove(&self, pod: &Pod) {
        let (fine, printed) = self.call("DEL", &pod.id, "", json!({}));
        assert!(fine, "{}", String::from_utf8_lossy(&printed));
    }

    /// MTU that the plugin would give a pod.
    pub(super) fn pod_mtu(&self) -> Option<u32> {
        let state: PathBuf = self.settings.state_dir.clone();
        cni_routed::state::read(&state)
            .ok()
            .map(|state| state.mtu_bytes)
    }
}

impl Pod {
    pub(super) fn address(&self, v4: bool) -> IpAddr {
        let mut same = self.result.ips.iter().map(|ip| ip.address.addr());
        same.find(|address| address.is_ipv4() == v4).unwrap()
    }
}

/// Whether a datagram from one namespace to an address and port reaches a pod that listens there.
pub(super) fn to_port(from: &File, to: (IpAddr, u16), pod: &Pod, listens: u16) -> bool {
    let any = Ipv4Addr::UNSPECIFIED;
    let receiver = in_netns(pod.netns.as_fd(), || {
        UdpSocket::bind((any, listens)).unwrap()
    });
    let receiver = receiver.unwrap();
    let wait = Some(Duration::from_millis(200));
    receiver.set_read_timeout(wait).unwrap();
    let sent = in_netns(from.as_fd(), || {
        UdpSocket::bind((any, 0)).unwrap().send_to(b"hello", to)
    });
    sent.unwrap().is_ok() && receiver.recv(&mut [0; 16]).is_ok()
}

/// Whether a datagram of this size from one namespace reaches a pod, and from which address.
pub(super) fn datagram(
    from: &File,
    to: &Pod,
    v4: bool,
    bytes: usize,
    wait: Duration,
) -> Option<IpAddr> {
    let any: IpAddr = if v4 {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let receiver = in_netns(to.netns.as_fd(), || UdpSocket::bind((any, 0)).unwrap()).unwrap();
    receiver.set_read_timeout(Some(wait)).unwrap();
    let port = receiver.local_addr().unwrap().port();
    let target = to.address(v4);
    let sent = in_netns(from.as_fd(), || {
        let sender = UdpSocket::bind((any, 0)).unwrap();
        sender.send_to(&vec![7; bytes], (target, port))
    });
    // No route yet is as good as lost.
    sent.unwrap().ok()?;
    let mut buffer = vec![0; 70_000];
    let (length, source) = receiver.recv_from(&mut buffer).ok()?;
    (length == bytes).then(|| source.ip())
}

pub(super) fn reaches(from: &File, to: &Pod) -> bool {
    let both = to.result.ips.iter().map(|ip| ip.address.addr().is_ipv4());
    let arrives = |v4| datagram(from, to, v4, 8, Duration::from_millis(200)).is_some();
    both.into_iter().all(arrives)
}

/// Waits until datagrams pass both ways; fails after [`HEALED`].
pub(super) fn heals(one: &Pod, two: &Pod, after: &str) {
    let begun = Instant::now();
    while !(reaches(&one.netns, two) && reaches(&two.netns, one)) {
        assert!(begun.elapsed() < HEALED, "no traffic 3 s after {after}");
    }
    eprintln!("traffic is back {:?} after {after}", begun.elapsed());
}

/// Waits for a condition; fails after [`HEALED`].
pub(super) fn within_limit(what: &str, is: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < HEALED, "not so after 3 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
