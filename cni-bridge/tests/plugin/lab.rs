//! A node in a network namespace of its own, pods in others, and the built plugin between them.
//! Everything is gone with the value.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use cni::types::AttachResult;
use linux::netlink::{AddressSpec, Change, Mac, Rtnl, VethSpec, in_netns, new_netns};
use linux::nft::Nft;
use serde_json::{Value, json};

/// A node with nothing but a loopback interface.
pub(crate) struct Lab {
    pub(crate) node: File,
    pub(crate) dir: PathBuf,
    pub(crate) conf: Value,
}

/// A pod's namespace, open; dropping it is what a runtime's tear-down does.
pub(crate) struct Pod {
    pub(crate) id: String,
    pub(crate) netns: File,
}

impl Pod {
    pub(crate) fn new(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            netns: new_netns().expect("root is needed"),
        }
    }

    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.netns.as_raw_fd())
    }

    pub(crate) fn rtnl(&self) -> Rtnl {
        Rtnl::open_in(self.netns.as_fd()).unwrap()
    }

    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        in_netns(self.netns.as_fd(), work).unwrap()
    }
}

impl Lab {
    /// With one /24 and everything else at its default.
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = PathBuf::from(format!(
            "/dev/shm/ferrule-bridge-{}-{n}",
            std::process::id()
        ));
        let conf = json!({
            "cniVersion": "1.1.0", "name": "net", "type": "cni-bridge", "bridge": "cni0",
            "isDefaultGateway": true, "ipMasq": true,
            "ipam": {"type": "host-local", "dataDir": dir.join("leases"),
                     "ranges": [[{"subnet": "10.88.0.0/24"}]]},
        });
        let lab = Self {
            node: new_netns().expect("root is needed"),
            dir,
            conf,
        };
        let mut rtnl = lab.rtnl();
        let index = rtnl.link_by_name("lo").unwrap().unwrap().index;
        rtnl.apply(&[Change::SetUp { index, up: true }]).unwrap();
        lab
    }

    /// With another value of a key.
    pub(crate) fn with(mut self, key: &str, value: Value) -> Self {
        self.conf[key] = value;
        self
    }

    pub(crate) fn ranges(mut self, subnets: &[&str]) -> Self {
        let sets: Vec<Value> = subnets.iter().map(|s| json!([{"subnet": s}])).collect();
        self.conf["ipam"]["ranges"] = Value::Array(sets);
        self
    }

    pub(crate) fn rtnl(&self) -> Rtnl {
        Rtnl::open_in(self.node.as_fd()).unwrap()
    }

    pub(crate) fn nft(&self) -> Nft {
        Nft::open_in(self.node.as_fd()).unwrap()
    }

    pub(crate) fn on_node<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        in_netns(self.node.as_fd(), work).unwrap()
    }

    /// Starts a call; standard input is sent.
    pub(crate) fn start(&self, verb: &str, id: &str, netns: &str, conf: &Value) -> Child {
        self.start_with(verb, id, netns, conf, &[])
    }

    /// The same with more in the environment.
    pub(crate) fn start_with(
        &self,
        verb: &str,
        id: &str,
        netns: &str,
        conf: &Value,
        environment: &[(&str, String)],
    ) -> Child {
        self.on_node(|| {
            let mut child = Command::new(env!("CARGO_BIN_EXE_cni-bridge"))
                .env_clear()
                .envs(environment.iter().map(|(name, value)| (*name, value)))
                .env("CNI_COMMAND", verb)
                .env("CNI_CONTAINERID", id)
                .env("CNI_NETNS", netns)
                .env("CNI_IFNAME", "eth0")
                .env("CNI_PATH", self.dir.join("bin"))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            // A plugin that dies first breaks the pipe: not this call's concern.
            let _ = child
                .stdin
                .take()
                .unwrap()
                .write_all(conf.to_string().as_bytes());
            child
        })
    }

    /// What was printed: a result, nothing, or an error.
    pub(crate) fn call(
        &self,
        verb: &str,
        id: &str,
        netns: &str,
        conf: &Value,
    ) -> Result<Value, Value> {
        self.call_with(verb, id, netns, conf, &[])
    }

    pub(crate) fn call_with(
        &self,
        verb: &str,
        id: &str,
        netns: &str,
        conf: &Value,
        environment: &[(&str, String)],
    ) -> Result<Value, Value> {
        let output = self
            .start_with(verb, id, netns, conf, environment)
            .wait_with_output()
            .unwrap();
        let printed = match output.stdout.as_slice() {
            [] => Value::Null,
            bytes => serde_json::from_slice(bytes).unwrap(),
        };
        if output.status.success() {
            Ok(printed)
        } else {
            Err(printed)
        }
    }

    pub(crate) fn add(&self, pod: &Pod) -> Result<AttachResult, Value> {
        let printed = self.call("ADD", &pod.id, &pod.path(), &self.conf)?;
        Ok(AttachResult::from_value(&printed).unwrap())
    }

    pub(crate) fn del(&self, pod: &Pod) -> Result<Value, Value> {
        self.call("DEL", &pod.id, &pod.path(), &self.conf)
    }

    pub(crate) fn check(&self, pod: &Pod, result: &AttachResult) -> Result<Value, Value> {
        let mut conf = self.conf.clone();
        conf["prevResult"] = result.to_value(cni::types::SpecVersion::NEWEST);
        self.call("CHECK", &pod.id, &pod.path(), &conf)
    }

    pub(crate) fn gc(&self, valid: &[&Pod]) -> Result<Value, Value> {
        let mut conf = self.conf.clone();
        let valid = valid
            .iter()
            .map(|pod| json!({"containerID": pod.id, "ifname": "eth0"}));
        conf["cni.dev/valid-attachments"] = valid.collect();
        self.call("GC", "", "", &conf)
    }

    /// Names of the bridge's ports.
    pub(crate) fn ports(&self) -> Vec<String> {
        let mut rtnl = self.rtnl();
        let Some(bridge) = rtnl.link_by_name("cni0").unwrap() else {
            return Vec::new();
        };
        rtnl.ports_of(bridge.index)
            .unwrap()
            .into_iter()
            .map(|port| port.name)
            .collect()
    }

    /// Addresses in use.
    pub(crate) fn claims(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.dir.join("leases/net/claims")) else {
            return Vec::new();
        };
        entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    /// Leases on file.
    pub(crate) fn leases(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.dir.join("leases/net/leases")) else {
            return Vec::new();
        };
        let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != ".staged").collect()
    }

    /// Rules on file.
    pub(crate) fn records(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.dir.join("leases/net/rules")) else {
            return Vec::new();
        };
        let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
        // What a killed writer left is no record.
        names.filter(|name| name != ".staged").collect()
    }

    /// What a program of the administrator shows.
    pub(crate) fn shown(&self, program: &str, args: &[&str]) -> String {
        let output = self.on_node(|| Command::new(program).args(args).output().unwrap());
        String::from_utf8(output.stdout).unwrap()
    }

    /// Host ports that lead somewhere, as `nft` shows them.
    pub(crate) fn forwards(&self) -> Vec<String> {
        let rules = self.shown("nft", &["list", "ruleset"]);
        let lines = rules
            .lines()
            .filter(|line| line.contains("comment \"") && line.contains(" : "));
        lines.map(|line| line.trim().to_owned()).collect()
    }

    pub(crate) fn assert_nothing_left(&self, when: &str) {
        assert_eq!(self.records(), Vec::<String>::new(), "records {when}");
        assert_eq!(self.forwards(), Vec::<String>::new(), "host ports {when}");
        assert!(self.rtnl().ifbs().unwrap().is_empty(), "limits {when}");
        assert_eq!(self.ports(), Vec::<String>::new(), "ports {when}");
        assert_eq!(self.claims(), Vec::<String>::new(), "claims {when}");
        assert_eq!(self.leases(), Vec::<String>::new(), "leases {when}");
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Sends one datagram from `from` to `to:9` and returns the source address that `at` saw.
pub(crate) fn send(from: &Pod, at: &std::fs::File, to: &str) -> Option<String> {
    let listener = linux::netlink::in_netns(at.as_fd(), || {
        let any = if to.contains(':') {
            "[::]:9"
        } else {
            "0.0.0.0:9"
        };
        let socket = UdpSocket::bind(any).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(3)))
            .unwrap();
        socket
    })
    .unwrap();
    let target = if to.contains(':') {
        format!("[{to}]:9")
    } else {
        format!("{to}:9")
    };
    from.run(|| {
        let any = if to.contains(':') {
            "[::]:0"
        } else {
            "0.0.0.0:0"
        };
        UdpSocket::bind(any)
            .unwrap()
            .send_to(b"hello", target)
            .unwrap();
    });
    let mut buffer = [0; 16];
    listener
        .recv_from(&mut buffer)
        .ok()
        .map(|(_, source)| source.ip().to_string())
}

/// A host beyond the node, at 192.0.2.2, that knows no way back to the pods.
pub(crate) fn outside(lab: &Lab) -> std::fs::File {
    let outside = new_netns().unwrap();
    let mut node = lab.rtnl();
    node.apply(&[Change::AddVeth(VethSpec {
        name: "up0".into(),
        mac: Mac([2, 0, 0, 0, 0, 1]),
        master: None,
        mtu_bytes: None,
        peer_name: "eth0".into(),
        peer_mac: Mac([2, 0, 0, 0, 0, 2]),
        peer_netns: outside.as_raw_fd(),
    })])
    .unwrap();
    let address = |rtnl: &mut Rtnl, name: &str, address: &str| {
        let index = rtnl.link_by_name(name).unwrap().unwrap().index;
        let address = address.parse().unwrap();
        let spec = AddressSpec {
            index,
            address,
            prefix_len: 24,
            detect_duplicates: false,
        };
        rtnl.apply(&[Change::SetUp { index, up: true }, Change::AddAddress(spec)])
            .unwrap();
    };
    address(&mut node, "up0", "192.0.2.1");
    address(
        &mut Rtnl::open_in(outside.as_fd()).unwrap(),
        "eth0",
        "192.0.2.2",
    );
    outside
}

pub(crate) fn error(answer: Result<impl std::fmt::Debug, serde_json::Value>) -> (u64, String) {
    let error = answer.expect_err("must fail");
    let details = error["details"].as_str().unwrap_or_default();
    let text = format!("{}: {details}", error["msg"].as_str().unwrap_or_default());
    (error["code"].as_u64().unwrap(), text)
}

/// Accepts so many connections to a port in a namespace, and tells each who it comes from.
pub(crate) fn serve(netns: &File, port: u16, times: usize) -> std::thread::JoinHandle<()> {
    let listener = in_netns(netns.as_fd(), || TcpListener::bind(("::", port)).unwrap()).unwrap();
    std::thread::spawn(move || {
        for _ in 0..times {
            let (mut stream, from) = listener.accept().unwrap();
            let _ = write!(stream, "{}", from.ip().to_canonical());
        }
    })
}

/// Connects from a namespace; returns what [`serve`] told.
pub(crate) fn connect(from: &File, to: &str) -> std::io::Result<String> {
    in_netns(from.as_fd(), || {
        let to = to.parse().unwrap();
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        let mut told = String::new();
        stream.read_to_string(&mut told)?;
        Ok(told)
    })
    .unwrap()
}
