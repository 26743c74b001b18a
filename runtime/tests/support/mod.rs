//! An engine of its own for each test: directories, cgroups, a network plugin that only notes
//! its calls, and an image made from the machine's busybox. Everything goes with the value.

#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

use runtime::service::{
    ContainerConfig, ContainerId, ContainerState, ExecOutput, ImageService, NamespaceMode,
    Resources, RuntimeService, SandboxConfig, SandboxId,
};
use runtime::{Engine, EngineConfig};
use sha2::{Digest, Sha256};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub(crate) const IMAGE: &str = "test.local/busybox:1";
/// Longest wait for something that takes milliseconds.
pub(crate) const SOON: Duration = Duration::from_secs(20);

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A node to run engines on, one after the other.
pub(crate) struct Node {
    pub(crate) config: EngineConfig,
    base: PathBuf,
    cgroup_root: String,
}

impl Node {
    pub(crate) fn new() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self::named(&format!("fe-{}-{number}", std::process::id()))
    }

    /// The node of that name, also one that another process made.
    pub(crate) fn named(name: &str) -> Self {
        // In memory, with short paths for sockets; the root is on disk as in life.
        let base = PathBuf::from("/dev/shm").join(name);
        let root = std::env::temp_dir().join(name);
        for dir in [base.join("conf"), base.join("bin"), root.clone()] {
            std::fs::create_dir_all(dir).unwrap();
        }
        let cgroup_root = format!("/ferrule-test-{name}");
        let node = Self {
            config: EngineConfig {
                root,
                run_dir: base.join("run"),
                cni_conf_dir: base.join("conf"),
                cni_bin_dirs: vec![base.join("bin")],
                shim_path: shim(),
                cgroup_root: cgroup_root.clone(),
                ..EngineConfig::default()
            },
            base,
            cgroup_root,
        };
        node.install_network();
        node
    }

    pub(crate) fn name(&self) -> &str {
        self.base.file_name().unwrap().to_str().unwrap()
    }

    fn install_network(&self) {
        let list = r#"{"cniVersion":"1.0.0","name":"noted","plugins":[{"type":"noter"}]}"#;
        std::fs::write(self.base.join("conf/10-noted.conflist"), list).unwrap();
        let script = format!(
            "#!/bin/sh\ncat >/dev/null\necho \"$CNI_COMMAND $CNI_CONTAINERID\" >>{log}\n\
             [ -e {fail}-$CNI_COMMAND ] && {{ echo '{{\"cniVersion\":\"1.0.0\",\"code\":100,\"msg\":\"told to fail\"}}'; exit 1; }}\n\
             case $CNI_COMMAND in\n\
             ADD) echo '{{\"cniVersion\":\"1.0.0\",\"ips\":[{{\"address\":\"10.9.8.7/24\"}}]}}';;\n\
             VERSION) echo '{{\"cniVersion\":\"1.0.0\",\"supportedVersions\":[\"1.0.0\"]}}';;\n\
             esac\n",
            log = self.network_log().display(),
            fail = self.base.join("fail").display(),
        );
        let plugin = self.base.join("bin/noter");
        std::fs::write(&plugin, script).unwrap();
        std::fs::set_permissions(&plugin, PermissionsExt::from_mode(0o755)).unwrap();
    }

    fn network_log(&self) -> PathBuf {
        self.base.join("network.log")
    }

    /// Makes the plugin refuse a command, or serve it again.
    pub(crate) fn network_refuses(&self, command: &str, refuse: bool) {
        let flag = self.base.join(format!("fail-{command}"));
        if refuse {
            std::fs::write(flag, "").unwrap();
        } else {
            std::fs::remove_file(flag).unwrap();
        }
    }

    /// Commands the plugin was given for a sandbox.
    pub(crate) fn network_calls(&self, sandbox: &SandboxId) -> Vec<String> {
        let log = std::fs::read_to_string(self.network_log()).unwrap_or_default();
        let of_it = log.lines().filter_map(|l| l.split_once(' '));
        of_it
            .filter(|(_, id)| *id == sandbox.as_str())
            .map(|(command, _)| command.to_owned())
            .collect()
    }

    pub(crate) async fn open(&self) -> Engine {
        let engine = Engine::open(self.config.clone()).await.unwrap();
        if ImageService::status(&engine, IMAGE).is_none() {
            let archive = self.base.join("busybox.tar");
            write_image(&archive);
            engine.images().load(&archive).await.unwrap();
        }
        engine
    }

    /// Processes in this node's cgroups.
    pub(crate) fn processes(&self) -> Vec<i32> {
        linux::cgroup::detect(&self.cgroup_root)
            .unwrap()
            .processes("/")
    }

    pub(crate) fn sandbox_files(&self) -> usize {
        count(&self.config.root.join("sandboxes"))
    }

    pub(crate) fn container_files(&self) -> usize {
        count(&self.config.root.join("containers"))
    }

    /// Sockets, pins and shared memory left in the run directory.
    pub(crate) fn run_files(&self) -> usize {
        let dirs = ["shim", "netns", "shm"];
        dirs.iter()
            .map(|d| count(&self.config.run_dir.join(d)))
            .sum()
    }

    pub(crate) fn log_dir(&self) -> PathBuf {
        self.base.join("logs")
    }
}

fn count(dir: &Path) -> usize {
    std::fs::read_dir(dir).map_or(0, Iterator::count)
}

impl Drop for Node {
    fn drop(&mut self) {
        // Shims by the names of their sockets: only ours are below this directory.
        if let Ok(sockets) = std::fs::read_dir(self.config.run_dir.join("shim")) {
            for socket in sockets.flatten() {
                end_shim(&socket.path());
            }
        }
        let cgroups = linux::cgroup::detect(&self.cgroup_root).unwrap();
        let _ = cgroups.kill("/");
        let _ = cgroups.remove("/");
        for pin in std::fs::read_dir(self.config.run_dir.join("netns"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let _ = linux::netns::unpin(&pin.path());
        }
        for shared in std::fs::read_dir(self.config.run_dir.join("shm"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let _ = rustix::mount::unmount(shared.path(), rustix::mount::UnmountFlags::DETACH);
        }
        let _ = linux::fs::remove_tree(&self.base);
        let _ = linux::fs::remove_tree(&self.config.root);
    }
}

fn end_shim(socket: &Path) {
    use pod_shim::client::Connection;
    use pod_shim::protocol::{Request, ToShim};
    let Ok(mut connection) = Connection::open(socket) else {
        return;
    };
    let _ = connection.set_timeout(Duration::from_secs(5));
    let request = Request::Shutdown;
    if connection.send(&ToShim { id: 1, request }, vec![]).is_ok() {
        while connection.receive().is_ok() {}
    }
}

/// The shim's program beside this test's, built when it is not there.
fn shim() -> PathBuf {
    let mut dir = std::env::current_exe().unwrap();
    dir.pop();
    if dir.ends_with("deps") {
        dir.pop();
    }
    if let Some(path) = std::env::var_os("FERRULE_TEST_SHIM") {
        return path.into();
    }
    let path = dir.join("pod-shim");
    if !path.exists() {
        let mut build = std::process::Command::new(env!("CARGO"));
        let built = build.args(["build", "-p", "pod-shim"]).status().unwrap();
        assert!(built.success(), "cargo build -p pod-shim");
    }
    path
}

/// An archive with one image of one layer: busybox, a user, a setuid-free world.
fn write_image(path: &Path) {
    let mut layer = tar::Builder::new(Vec::new());
    let mut put = |name: &str, mode: u32, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_mode(mode);
        header.set_size(content.len() as u64);
        header.set_uid(0);
        header.set_gid(0);
        let kind = if name.ends_with('/') {
            tar::EntryType::Directory
        } else {
            tar::EntryType::Regular
        };
        header.set_entry_type(kind);
        layer.append_data(&mut header, name, content).unwrap();
    };
    for dir in ["bin/", "etc/", "tmp/", "data/", "home/web/"] {
        put(dir, 0o755, b"");
    }
    let busybox = std::fs::read("/bin/busybox").expect("busybox-static is needed");
    put("bin/busybox", 0o755, &busybox);
    put(
        "etc/passwd",
        0o644,
        b"root:x:0:0::/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n",
    );
    put(
        "etc/group",
        0o644,
        b"root:x:0:\nweb:x:1000:\nlogs:x:50:web\n",
    );
    put("data/seed", 0o644, b"from the image");
    for applet in [
        "sh", "sleep", "cat", "echo", "id", "ls", "touch", "hostname", "env", "mount", "sed",
        "cut", "head", "tail", "df", "true",
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_mode(0o777);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(0);
        let name = format!("bin/{applet}");
        layer.append_link(&mut header, name, "busybox").unwrap();
    }
    let layer = layer.into_inner().unwrap();
    let digest: String = Sha256::digest(&layer)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux",
        "config": {
            "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["exec sleep 1000"],
            "Env": ["PATH=/bin", "FROM=image"], "Volumes": {"/data": {}},
        },
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
    });
    let manifest = serde_json::json!([{
        "Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"],
    }]);
    let mut archive = tar::Builder::new(std::fs::File::create(path).unwrap());
    let files = [
        ("layer.tar", layer),
        ("config.json", config.to_string().into_bytes()),
        ("manifest.json", manifest.to_string().into_bytes()),
    ];
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        archive
            .append_data(&mut header, name, content.as_slice())
            .unwrap();
    }
    archive.finish().unwrap();
}

pub(crate) fn pod(node: &Node, uid: &str) -> SandboxConfig {
    SandboxConfig {
        name: format!("pod-{uid}"),
        namespace: "default".into(),
        uid: uid.into(),
        hostname: "test-host".into(),
        log_directory: node.log_dir().join(uid),
        cgroup_parent: format!("/kubepods/pod{uid}"),
        pid: NamespaceMode::Container,
        ..SandboxConfig::default()
    }
}

pub(crate) fn script(name: &str, script: &str) -> ContainerConfig {
    ContainerConfig {
        name: name.into(),
        image: IMAGE.into(),
        user_image: IMAGE.into(),
        args: vec![script.into()],
        log_path: format!("{name}/0.log"),
        ..ContainerConfig::default()
    }
}

/// Makes the pod's cgroup, the sandbox and one container, and starts it.
pub(crate) async fn start(
    engine: &Engine,
    node: &Node,
    uid: &str,
    container: ContainerConfig,
) -> (SandboxId, ContainerId) {
    let config = pod(node, uid);
    engine
        .ensure_cgroup(&config.cgroup_parent, &Resources::default())
        .unwrap();
    let sandbox = engine.run_sandbox(config).await.unwrap();
    let id = engine
        .create_container(&sandbox.id, container)
        .await
        .unwrap();
    engine.start_container(&id).await.unwrap();
    (sandbox.id, id)
}

/// Waits until the container has ended; its exit code and reason.
pub(crate) async fn exit(engine: &Engine, id: &ContainerId) -> (i32, String) {
    let mut events = engine.events();
    let wait = async {
        loop {
            let status = engine.container_status(id).expect("container is known");
            if let ContainerState::Exited {
                exit_code, reason, ..
            } = status.state
            {
                return (exit_code, reason);
            }
            // Lagged only means to look again.
            let _ = events.recv().await;
        }
    };
    tokio::time::timeout(SOON, wait).await.expect("it ends")
}

pub(crate) fn log(engine: &Engine, id: &ContainerId) -> String {
    let path = engine.container_status(id).unwrap().log_path;
    let text = std::fs::read_to_string(path).unwrap();
    // "<time> stdout F <line>"
    let lines = text.lines().map(|l| l.splitn(4, ' ').nth(3).unwrap_or(""));
    lines.collect::<Vec<_>>().join("\n")
}

pub(crate) async fn run(engine: &Engine, id: &ContainerId, command: &str) -> ExecOutput {
    let command = ["/bin/sh", "-c", command].map(String::from).to_vec();
    engine.exec_sync(id, command, SOON, 1 << 16).await.unwrap()
}

/// Whether a process is there (not even as a zombie of somebody else).
pub(crate) fn alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(')').next().unwrap_or("").trim_start();
    !(state.is_empty() || state.starts_with('Z'))
}
