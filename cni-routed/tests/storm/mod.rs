//! Many calls of a routed plugin's program at once, kills among them; for `cni-vxlan` and
//! `cni-hostgw`, which are one plugin under two names. Needs root.

use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;

use cni_routed::state::{NodeState, ensure};
use linux::netlink::{Rtnl, TABLE_MAIN, in_netns, new_netns};
use serde_json::{Value, json};
use tempfile::TempDir;

const WORKERS: u64 = 8;

/// Steps at which a call may be told to die; some have fewer, and come through.
const STEPS: u64 = 40;

/// Small numbers that look random and are the same every time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % limit
    }
}

/// A node whose agent wrote its state once.
struct Node {
    program: &'static str,
    netns: File,
    dir: TempDir,
}

impl Node {
    fn new(program: &'static str) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let state = NodeState {
            pod_cidrs: vec!["10.88.0.0/26".parse().unwrap()],
            mtu_bytes: 1450,
        };
        ensure(&dir.path().join("state"), &state).unwrap();
        Self {
            program,
            netns: new_netns().expect("root is needed"),
            dir,
        }
    }

    fn conf(&self, host_port: u64) -> Value {
        let ports = json!([{"hostPort": host_port, "containerPort": 80, "protocol": "udp"}]);
        json!({
            "cniVersion": "1.1.0", "name": "net", "type": "routed",
            "stateDir": self.dir.path().join("state"), "dataDir": self.dir.path().join("leases"),
            "runtimeConfig": {"portMappings": ports},
        })
    }

    /// Calls a verb that may be told to die at a step.
    fn call(&self, verb: &str, id: &str, netns: &str, conf: &Value, die_at: Option<u64>) -> Output {
        in_netns(self.netns.as_fd(), || {
            let mut command = Command::new(self.program);
            if let Some(step) = die_at {
                command.env("FERRULE_DIE_AT", step.to_string());
            }
            let mut child = command
                .env("CNI_COMMAND", verb)
                .env("CNI_CONTAINERID", id)
                .env("CNI_NETNS", netns)
                .env("CNI_IFNAME", "eth0")
                .env("CNI_PATH", "/nowhere")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            // A plugin that dies first breaks the pipe.
            let _ = child
                .stdin
                .take()
                .unwrap()
                .write_all(conf.to_string().as_bytes());
            child.wait_with_output().unwrap()
        })
        .unwrap()
    }

    fn must(&self, verb: &str, id: &str, netns: &str, conf: &Value) -> Value {
        let output = self.call(verb, id, netns, conf, None);
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{verb} of {id}: {printed}");
        serde_json::from_str(&printed).unwrap_or(Value::Null)
    }

    fn files(&self, kind: &str) -> Vec<String> {
        let dir = self.dir.path().join("leases/net").join(kind);
        let entries = std::fs::read_dir(dir).into_iter().flatten();
        let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
        // What a killed writer left is no record.
        names.filter(|name| name != ".staged").collect()
    }

    fn assert_nothing_left(&self) {
        let none = Vec::<String>::new();
        for kind in ["claims", "leases", "rules"] {
            assert_eq!(self.files(kind), none, "{kind}");
        }
        let mut rtnl = Rtnl::open_in(self.netns.as_fd()).unwrap();
        assert_eq!(rtnl.links_of_kind("veth").unwrap().len(), 0, "pairs");
        assert_eq!(rtnl.routes_of_table(TABLE_MAIN).unwrap(), [], "routes");
        let shown = in_netns(self.netns.as_fd(), || {
            let nft = Command::new("nft").args(["list", "ruleset"]).output();
            String::from_utf8(nft.unwrap().stdout).unwrap()
        });
        let shown = shown.unwrap();
        let elements = shown
            .lines()
            .filter(|line| line.contains("comment \"") && line.contains(" : "));
        assert_eq!(elements.count(), 0, "host ports: {shown}");
    }
}

/// So many rounds of ADD, CHECK and DEL in all, each call killed at random now and then.
pub(crate) fn storm(program: &'static str) {
    // `FERRULE_STORM=10000` takes minutes.
    let rounds = std::env::var("FERRULE_STORM").map_or(600, |n| n.parse().unwrap());
    let node = Node::new(program);
    let held: Mutex<HashSet<String>> = Mutex::default();
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            let (node, held) = (&node, &held);
            scope.spawn(move || {
                let mut dice = Dice(worker + 1);
                let conf = node.conf(8080 + worker);
                for round in 0..rounds / WORKERS {
                    live(
                        node,
                        held,
                        &mut dice,
                        &format!("pod-{worker}-{round}"),
                        &conf,
                    );
                }
            });
        }
    });
    node.assert_nothing_left();
}

fn live(node: &Node, held: &Mutex<HashSet<String>>, dice: &mut Dice, id: &str, conf: &Value) {
    let pod = new_netns().expect("root is needed");
    let path = format!("/proc/{}/fd/{}", std::process::id(), pod.as_raw_fd());
    let perhaps_killed = |dice: &mut Dice, verb| {
        if dice.below(3) == 0 {
            node.call(verb, id, &path, conf, Some(dice.below(STEPS)));
        }
    };
    perhaps_killed(dice, "ADD");
    let printed = node.must("ADD", id, &path, conf);
    let address = printed["ips"][0]["address"].to_string();
    let new = held.lock().unwrap().insert(address.clone());
    assert!(new, "{address} was given twice");
    let mut checked = conf.clone();
    checked["prevResult"] = printed;
    node.must("CHECK", id, &path, &checked);
    // Before DEL begins, or another worker may have it already.
    held.lock().unwrap().remove(&address);
    perhaps_killed(dice, "DEL");
    let netns = ["", "/dead/path"][usize::from(dice.below(2) == 1)];
    node.must("DEL", id, netns, conf);
}
