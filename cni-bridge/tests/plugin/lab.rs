//! A node in a network namespace of its own, pods in others, and the built plugin between them.
//! Everything is gone with the value.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use cni::types::AttachResult;
use linux::netlink::{Rtnl, in_netns, new_netns};
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
        Self {
            node: new_netns().expect("root is needed"),
            dir,
            conf,
        }
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
        self.on_node(|| {
            let mut child = Command::new(env!("CARGO_BIN_EXE_cni-bridge"))
                .env_clear()
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
        let output = self
            .start(verb, id, netns, conf)
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
        entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    pub(crate) fn assert_nothing_left(&self, when: &str) {
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
