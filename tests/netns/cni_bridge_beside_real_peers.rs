//! `cnitool` calls every verb; containernetworking's plugins stand before, behind and beside ours.

use linux::netlink::{in_netns, new_netns};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;
use testkit::artefacts;

/// A node with a directory of networks and one of plugins, and the runtime's cache of results.
struct Node {
    netns: File,
    dir: TempDir,
}

struct Pod(File);

impl Pod {
    fn new() -> Self {
        Self(new_netns().expect("root is needed"))
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

impl Node {
    fn new() -> Self {
        // On a tmpfs, as in production.
        let dir = TempDir::new_in("/dev/shm").unwrap();
        for sub in ["net.d", "bin", "cache"] {
            fs::create_dir(dir.path().join(sub)).unwrap();
        }
        let node = Self {
            netns: new_netns().expect("root is needed"),
            dir,
        };
        let ours = artefacts::ours::plugins().unwrap();
        let stock = artefacts::go::stock_peers().unwrap();
        node.install(&ours, "cni-bridge", "cni-bridge");
        for plugin in ["bridge", "host-local", "portmap"] {
            node.install(&stock, plugin, plugin);
        }
        // A name that is not taken for our own allocator.
        node.install(&stock, "host-local", "foreign-local");
        node
    }

    fn install(&self, from: &std::path::Path, program: &str, name: &str) {
        symlink(from.join(program), self.bin().join(name)).unwrap();
    }

    fn bin(&self) -> PathBuf {
        self.dir.path().join("bin")
    }

    fn network(&self, name: &str, version: &str, plugins: Value) {
        let list = json!({"cniVersion": version, "name": name, "plugins": plugins});
        let file = self
            .dir
            .path()
            .join("net.d")
            .join(format!("{name}.conflist"));
        fs::write(file, list.to_string()).unwrap();
    }

    fn ours(&self, bridge: &str, subnet: &str) -> Value {
        json!({
            "type": "cni-bridge", "bridge": bridge, "isDefaultGateway": true, "ipMasq": true,
            "hairpinMode": true, "capabilities": {"portMappings": true},
            "ipam": {"type": "host-local", "dataDir": self.dir.path().join("leases"),
                     "ranges": [[{"subnet": subnet}]]},
        })
    }

    fn reference(&self, bridge: &str, subnet: &str) -> Value {
        let mut conf = self.ours(bridge, subnet);
        conf["type"] = "bridge".into();
        conf["ipMasqBackend"] = "nftables".into();
        conf["ipam"]["dataDir"] = json!(self.dir.path().join("their-leases"));
        conf
    }

    /// Runs cnitool on the node. Its cache is below /var/lib/cni and the plugin's rules are below
    /// /run: both are the test's own.
    fn cnitool(&self, verb: &str, network: &str, pod: Option<&Pod>, ports: Value) -> CniTool {
        let tool = artefacts::go::cnitool().unwrap().join("cnitool");
        let cache = self.dir.path().join("cache");
        let run = self.dir.path().join("run");
        std::fs::create_dir_all(&run).unwrap();
        let script = format!(
            "mount -t tmpfs none /var/lib && mkdir /var/lib/cni && mount --bind {} /var/lib/cni && mount --bind {} /run && exec {} {verb} {network} '{}'",
            cache.display(),
            run.display(),
            tool.display(),
            pod.map(Pod::path).unwrap_or_default(),
        );
        let output = in_netns(self.netns.as_fd(), || {
            Command::new("unshare")
                .args(["--mount", "sh", "-c", &script])
                .env("NETCONFPATH", self.dir.path().join("net.d"))
                .env("CNI_PATH", self.bin())
                .env("CAP_ARGS", json!({"portMappings": ports}).to_string())
                .output()
                .unwrap()
        })
        .unwrap();
        CniTool {
            ok: output.status.success(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    fn add(&self, network: &str, pod: &Pod, ports: Value) -> Value {
        let told = self.cnitool("add", network, Some(pod), ports);
        serde_json::from_str(&told.must()).unwrap()
    }

    /// GC as a runtime asks for it.
    fn gc(&self, conf: &Value) {
        let plugin = self.bin().join(conf["type"].as_str().unwrap());
        let mut child = in_netns(self.netns.as_fd(), || {
            Command::new(plugin)
                .env_clear()
                .env("CNI_COMMAND", "GC")
                .env("CNI_PATH", self.bin())
                .stdin(std::process::Stdio::piped())
                .spawn()
                .unwrap()
        })
        .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        std::io::Write::write_all(&mut stdin, conf.to_string().as_bytes()).unwrap();
        drop(stdin);
        assert!(child.wait().unwrap().success());
    }

    fn del(&self, network: &str, pod: &Pod) {
        self.cnitool("del", network, Some(pod), Value::Null).must();
    }

    fn leases(&self, network: &str) -> usize {
        let dir = self.dir.path().join("leases").join(network).join("claims");
        fs::read_dir(dir).map_or(0, Iterator::count)
    }

    fn links(&self) -> String {
        let output = in_netns(self.netns.as_fd(), || {
            Command::new("ip").args(["-o", "link"]).output().unwrap()
        });
        String::from_utf8(output.unwrap().stdout).unwrap()
    }
}

#[derive(Debug)]
struct CniTool {
    ok: bool,
    stdout: String,
    #[expect(dead_code, reason = "shown when a call failed")]
    stderr: String,
}

impl CniTool {
    fn must(self) -> String {
        assert!(self.ok, "{self:?}");
        self.stdout
    }
}

/// One connection; returns what the server saw as its source.
fn connect(server: &File, port: u16, client: &File, to: &str) -> Option<String> {
    let listener = in_netns(server.as_fd(), || {
        TcpListener::bind(("0.0.0.0", port)).unwrap()
    });
    let listener = listener.unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut stream = in_netns(client.as_fd(), || {
        TcpStream::connect_timeout(&to.parse().unwrap(), Duration::from_secs(2)).ok()
    })
    .unwrap()?;
    // A connection that is established waits in the listener's queue already.
    let (mut accepted, from) = listener.accept().ok()?;
    accepted.write_all(b"hello").unwrap();
    drop(accepted);
    let mut told = String::new();
    stream.read_to_string(&mut told).unwrap();
    assert_eq!(told, "hello");
    Some(from.ip().to_string())
}

fn port(host: u16) -> Value {
    json!([{"hostPort": host, "containerPort": 80, "protocol": "tcp"}])
}

#[test]
fn cnitool_drives_every_verb_in_every_version() {
    let node = Node::new();
    for (version, checks, collects) in [
        ("0.3.0", false, false),
        ("0.3.1", false, false),
        ("0.4.0", true, false),
        ("1.0.0", true, false),
        ("1.1.0", true, true),
    ] {
        node.network("net", version, json!([node.ours("cni0", "10.88.0.0/24")]));
        let pod = Pod::new();
        let result = node.add("net", &pod, port(8080));
        assert_eq!(result["cniVersion"], version);
        assert!(
            result["ips"][0]["address"]
                .as_str()
                .unwrap()
                .starts_with("10.88.0.")
        );
        let seen = connect(&pod.0, 80, &node.netns, "10.88.0.1:8080");
        assert!(seen.is_some(), "host port in {version}");
        if checks {
            node.cnitool("check", "net", Some(&pod), port(8080)).must();
        }
        if collects {
            node.cnitool("status", "net", None, Value::Null).must();
            node.cnitool("gc", "net", None, Value::Null).must();
            // Its library ends what its cache holds; the plugin gets no list and takes nothing.
            assert_eq!(node.leases("net"), 0);
        }
        node.del("net", &pod);
        node.del("net", &pod);
        assert_eq!(node.leases("net"), 0, "{version}");
        assert!(!node.links().contains("fv"), "{version}: {}", node.links());
    }
}

#[test]
fn containernetworkings_bridge_works_beside_ours() {
    let node = Node::new();
    node.network("ours", "1.0.0", json!([node.ours("cni0", "10.88.0.0/24")]));
    let portmap =
        json!({"type": "portmap", "backend": "nftables", "capabilities": {"portMappings": true}});
    let theirs = json!([node.reference("cni1", "10.99.0.0/24"), portmap]);
    node.network("theirs", "1.0.0", theirs);
    let (ours, theirs) = (Pod::new(), Pod::new());
    node.add("ours", &ours, port(8080));
    node.add("theirs", &theirs, port(8081));
    for round in 0..2 {
        let answers = [
            connect(&ours.0, 80, &node.netns, "10.88.0.1:8080"),
            connect(&theirs.0, 80, &node.netns, "10.88.0.1:8081"),
            connect(&ours.0, 80, &theirs.0, "10.99.0.1:8080"),
            connect(&theirs.0, 80, &ours.0, "10.88.0.1:8081"),
        ];
        assert!(answers.iter().all(Option::is_some), "{round}: {answers:?}");
        // Another pod of each comes and goes: nothing of the other's is touched.
        for network in ["ours", "theirs"] {
            let pod = Pod::new();
            node.add(network, &pod, port(9000));
            node.del(network, &pod);
        }
    }
    node.del("theirs", &theirs);
    assert!(connect(&ours.0, 80, &node.netns, "10.88.0.1:8080").is_some());
    node.del("ours", &ours);
    assert_eq!(node.leases("ours"), 0);
}

#[test]
fn foreign_plugins_may_stand_behind_ours() {
    let node = Node::new();
    let mut first = node.ours("cni0", "10.88.0.0/24");
    first["capabilities"] = json!({});
    let portmap = json!({"type": "portmap", "backend": "nftables", "snat": true, "capabilities": {"portMappings": true}});
    node.network("net", "1.0.0", json!([first, portmap]));
    let pod = Pod::new();
    node.add("net", &pod, port(8080));
    assert!(connect(&pod.0, 80, &node.netns, "10.88.0.1:8080").is_some());
    node.cnitool("check", "net", Some(&pod), port(8080)).must();
    node.del("net", &pod);
    assert_eq!(node.leases("net"), 0);
}

#[test]
fn an_address_is_not_lost_when_a_later_plugin_is_missing() {
    let node = Node::new();
    let missing = json!({"type": "not-installed"});
    let list = json!([node.ours("cni0", "10.88.0.0/24"), missing]);
    node.network("net", "1.1.0", list);
    let pod = Pod::new();
    let told = node.cnitool("add", "net", Some(&pod), Value::Null);
    assert!(!told.ok, "{told:?}");
    assert_eq!(node.leases("net"), 1, "the runtime has not said DEL yet");
    let mut conf = node.ours("cni0", "10.88.0.0/24");
    node.network("net", "1.1.0", json!([conf.clone()]));
    node.cnitool("gc", "net", None, Value::Null).must();
    assert_eq!(node.leases("net"), 1, "a GC without a list proves nothing");
    conf["cniVersion"] = "1.1.0".into();
    conf["name"] = "net".into();
    conf["cni.dev/valid-attachments"] = json!([]);
    node.gc(&conf);
    assert_eq!(node.leases("net"), 0);
}

#[test]
fn a_foreign_allocator_gives_and_takes_addresses() {
    let node = Node::new();
    let mut conf = node.ours("cni0", "10.88.0.0/24");
    conf["ipam"]["type"] = "foreign-local".into();
    conf["ipam"]["dataDir"] = json!(node.dir.path().join("foreign"));
    node.network("net", "1.0.0", json!([conf]));
    let held = || {
        let entries = fs::read_dir(node.dir.path().join("foreign/net")).unwrap();
        let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("10.")).count()
    };
    let pod = Pod::new();
    let result = node.add("net", &pod, port(8080));
    assert_eq!(result["ips"][0]["address"], "10.88.0.2/24");
    assert_eq!(held(), 1);
    node.cnitool("check", "net", Some(&pod), port(8080)).must();
    assert!(connect(&pod.0, 80, &node.netns, "10.88.0.1:8080").is_some());
    node.del("net", &pod);
    assert_eq!(held(), 0);
}
