//! A shim under test with a tiny root filesystem and cgroups of its own.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on stops"
)]
#![allow(dead_code, reason = "each test program uses a part of it")]

use linux::process::spawn::SealedProgram;
use pod_shim::client::{Connection, ShimProcess, ShimStart, spawn_shim};
use pod_shim::protocol::*;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Capabilities containers have by default.
pub(crate) const DEFAULT_CAPS: [u8; 14] = [0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31];

pub(crate) struct Lab {
    pub(crate) dir: PathBuf,
    pub(crate) cgroups: Vec<PathBuf>,
    pub(crate) socket: PathBuf,
    pub(crate) shim: ShimProcess,
    pub(crate) conn: Connection,
    next_id: u64,
    pub(crate) events: Vec<Event>,
}

/// busybox-static is the whole root filesystem of these tests.
fn busybox() -> PathBuf {
    let path = PathBuf::from("/bin/busybox");
    if !path.exists() {
        eprintln!("installing busybox-static, which these tests run in their containers");
        let done = std::process::Command::new("apt-get")
            .args(["install", "-y", "-qq", "busybox-static"])
            .status()
            .unwrap();
        assert!(
            done.success(),
            "busybox-static is needed and could not be installed"
        );
    }
    path
}

fn make_lower(dir: &Path) {
    let lower = dir.join("lower");
    for sub in ["bin", "etc", "tmp", "dir"] {
        std::fs::create_dir_all(lower.join(sub)).unwrap();
    }
    std::fs::copy(busybox(), lower.join("bin/busybox")).unwrap();
    for name in [
        "sh", "true", "false", "cat", "echo", "sleep", "ls", "id", "grep", "seq", "touch", "stat",
        "readlink", "ps", "kill", "head", "dd", "mount", "hostname", "tty", "stty", "setsid", "wc",
        "tail", "yes", "env", "mkdir", "test", "printf", "ip", "umask",
    ] {
        std::os::unix::fs::symlink("busybox", lower.join("bin").join(name)).unwrap();
    }
    std::fs::write(lower.join("etc/file"), "a file\n").unwrap();
}

fn make_cgroups(name: &str) -> Vec<PathBuf> {
    let base = Path::new("/sys/fs/cgroup");
    let parents: Vec<PathBuf> = if base.join("cgroup.controllers").exists() {
        let _ = std::fs::write(base.join("cgroup.subtree_control"), "+memory +pids");
        vec![base.to_owned()]
    } else {
        ["memory", "pids", "freezer", "cpu", "devices"]
            .iter()
            .map(|h| base.join(h))
            .collect()
    };
    parents
        .iter()
        .map(|parent| {
            let dir = parent.join(name);
            std::fs::create_dir(&dir).unwrap_or_else(|e| panic!("make {}: {e}", dir.display()));
            let _ = std::fs::write(dir.join("cgroup.subtree_control"), "+memory +pids");
            dir
        })
        .collect()
}

impl Lab {
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    pub(crate) fn with(change: impl FnOnce(&mut SandboxSpec)) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("ferrule-shim-test-{}-{number}", std::process::id());
        let dir = std::env::temp_dir().join(&name);
        std::fs::create_dir_all(&dir).unwrap();
        make_lower(&dir);
        let cgroups = make_cgroups(&name);
        let socket = dir.join("s.sock");
        // One copy in memory for all, as the agent has it.
        static PROGRAM: OnceLock<SealedProgram> = OnceLock::new();
        let program =
            PROGRAM.get_or_init(|| SealedProgram::from_file(Path::new(&shim_path())).unwrap());
        let start = ShimStart {
            dir: &dir,
            socket: &socket,
            log: &dir.join("shim.log"),
        };
        let shim = spawn_shim(program, &start).unwrap();
        let conn = connect(&socket);
        let mut lab = Self {
            dir,
            cgroups,
            socket,
            shim,
            conn,
            next_id: 1,
            events: Vec::new(),
        };
        let snapshot = lab.conn.receive().unwrap();
        assert!(matches!(snapshot, FromShim::Snapshot(s) if s.sandbox_id.is_none()));
        let mut spec = SandboxSpec {
            sandbox_id: name,
            host_network: false,
            host_ipc: false,
            share_pid: false,
            netns_path: Some(lab.dir.join("netns")),
            hostname: Some("box".into()),
            domainname: None,
            sysctls: BTreeMap::from([(
                "net.ipv4.ip_unprivileged_port_start".into(),
                "1234".into(),
            )]),
            shim_oom_score_adj: None,
            helper_cgroups: vec![],
            user_namespace: None,
        };
        change(&mut spec);
        match lab.request(Request::Setup(spec), vec![]).unwrap() {
            Reply::Ready { shim_pid, .. } => assert_eq!(shim_pid, lab.shim.pid),
            other => panic!("{other:?}"),
        }
        lab
    }

    pub(crate) fn send(&mut self, request: Request, fds: Vec<OwnedFd>) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.conn.send(&ToShim { id, request }, fds).unwrap();
        id
    }

    pub(crate) fn request(
        &mut self,
        request: Request,
        fds: Vec<OwnedFd>,
    ) -> Result<Reply, ShimError> {
        let wanted = self.send(request, fds);
        loop {
            match self.conn.receive().unwrap() {
                FromShim::Reply { id, result } if id == wanted => return result,
                FromShim::Event(event) => self.events.push(event),
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) fn launch(&mut self, spec: LaunchSpec) -> Result<Reply, ShimError> {
        self.request(Request::Launch(Box::new(spec)), vec![])
    }

    pub(crate) fn next_event(&mut self) -> Event {
        if !self.events.is_empty() {
            return self.events.remove(0);
        }
        match self.conn.receive().unwrap() {
            FromShim::Event(event) => event,
            other => panic!("{other:?}"),
        }
    }

    /// Wait for a container's exit, putting other events aside.
    pub(crate) fn wait_exit(&mut self, id: &str) -> ExitRecord {
        let mut aside = Vec::new();
        loop {
            match self.next_event() {
                Event::Exited { container_id, exit } if container_id == id => {
                    self.events.extend(aside);
                    return exit;
                }
                other => aside.push(other),
            }
        }
    }

    pub(crate) fn wait_exec(&mut self, id: &str) -> i32 {
        let mut aside = Vec::new();
        loop {
            match self.next_event() {
                Event::ExecExited { exec_id, exit_code } if exec_id == id => {
                    self.events.extend(aside);
                    return exit_code;
                }
                other => aside.push(other),
            }
        }
    }

    /// Launch, wait, return exit record and the text of the log without times and tags.
    pub(crate) fn run(&mut self, id: &str, argv: &[&str]) -> (ExitRecord, String) {
        let spec = self.spec(id, argv);
        self.run_spec(spec)
    }

    pub(crate) fn run_spec(&mut self, spec: LaunchSpec) -> (ExitRecord, String) {
        let id = spec.container_id.clone();
        let log = self.log_path(&id);
        match self.launch(spec) {
            Ok(Reply::Started(_)) => {}
            other => panic!("{other:?}"),
        }
        let exit = self.wait_exit(&id);
        (exit, log_text(&log))
    }

    pub(crate) fn log_path(&self, id: &str) -> PathBuf {
        self.dir.join("logs").join(id).join("0.log")
    }

    pub(crate) fn state_dir(&self, id: &str) -> PathBuf {
        self.dir.join("containers").join(id)
    }

    /// A container as the engine would describe it.
    pub(crate) fn spec(&self, id: &str, argv: &[&str]) -> LaunchSpec {
        let state_dir = self.state_dir(id);
        for sub in ["upper", "work"] {
            std::fs::create_dir_all(state_dir.join(sub)).unwrap();
        }
        LaunchSpec {
            container_id: id.into(),
            process: process(argv),
            rootfs: RootfsSpec {
                lower: vec![self.dir.join("lower")],
                upper: state_dir.join("upper"),
                work: state_dir.join("work"),
                readonly: false,
                options: vec![],
            },
            mounts: standard_mounts(),
            devices: [
                ("null", 3),
                ("zero", 5),
                ("full", 7),
                ("random", 8),
                ("urandom", 9),
            ]
            .map(|(name, minor)| DeviceSpec {
                path: format!("/dev/{name}"),
                host_path: None,
                kind: 'c',
                major: 1,
                minor,
                mode: 0o666,
                uid: 0,
                gid: 0,
            })
            .to_vec(),
            masked_paths: [
                "/proc/kcore",
                "/proc/timer_list",
                "/proc/scsi",
                "/sys/firmware",
                "/proc/none",
            ]
            .map(String::from)
            .to_vec(),
            readonly_paths: ["/proc/sys", "/proc/bus"].map(String::from).to_vec(),
            pid_namespace: PidNamespace::Container,
            cgroups: self.container_cgroups(id),
            cgroup_namespace: true,
            log: Some(LogSpec {
                path: self.log_path(id),
                max_bytes: 0,
                max_files: 5,
            }),
            stdin: false,
            stdin_once: false,
            tty: false,
            state_dir,
        }
    }

    /// A container's own cgroups, made when missing.
    pub(crate) fn container_cgroups(&self, id: &str) -> Vec<PathBuf> {
        let dirs: Vec<PathBuf> = self.cgroups.iter().map(|dir| dir.join(id)).collect();
        for dir in &dirs {
            std::fs::create_dir_all(dir).unwrap();
        }
        dirs
    }

    pub(crate) fn exec_spec(&self, exec_id: &str, container_id: &str, argv: &[&str]) -> ExecSpec {
        ExecSpec {
            exec_id: exec_id.into(),
            container_id: container_id.into(),
            process: process(argv),
            tty: false,
            stdio: Stdio::default(),
            cgroups: self.container_cgroups(container_id),
        }
    }

    /// Run a session to its end and return its exit code and what it wrote.
    pub(crate) fn exec(&mut self, exec_id: &str, container: &str, argv: &[&str]) -> (i32, String) {
        let (read, write) = linux::event::pipe().unwrap();
        let mut spec = self.exec_spec(exec_id, container, argv);
        spec.stdio = Stdio {
            stdin: false,
            stdout: true,
            stderr: true,
        };
        let fds = vec![write.try_clone().unwrap(), write];
        self.request(Request::Exec(Box::new(spec)), fds).unwrap();
        let text = read_all(read);
        (self.wait_exec(exec_id), text)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.conn.send(
            &ToShim {
                id: 0,
                request: Request::Shutdown,
            },
            vec![],
        );
        if !self
            .shim
            .pidfd
            .wait_exited(Duration::from_secs(15))
            .unwrap_or(true)
        {
            let _ = self.shim.pidfd.send_signal(9);
        }
        reap(self.shim.pid);
        for dir in &self.cgroups {
            remove_cgroup(dir);
        }
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.join("shim.log")).unwrap_or_default();
            eprintln!("shim said:\n{log}");
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Killed processes leave their cgroup a little after they are reaped.
fn remove_cgroup(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    for _ in 0..10_000 {
        if std::fs::remove_dir(dir).is_ok() {
            return;
        }
        std::thread::yield_now();
    }
    eprintln!("{} could not be removed", dir.display());
}

pub(crate) fn reap(pid: i32) {
    let _ = std::process::Command::new("/bin/true").status();
    let _ =
        linux::process::pidfd::PidFd::open(pid).map(|fd| fd.wait_exited(Duration::from_secs(1)));
}

pub(crate) fn shim_path() -> String {
    std::env::var("POD_SHIM").unwrap_or_else(|_| env!("CARGO_BIN_EXE_pod-shim").into())
}

pub(crate) fn connect(socket: &Path) -> Connection {
    let conn = Connection::open(socket).unwrap();
    conn.set_timeout(Duration::from_secs(30)).unwrap();
    conn
}

pub(crate) fn process(argv: &[&str]) -> ProcessSpec {
    ProcessSpec {
        argv: argv.iter().map(|s| (*s).to_owned()).collect(),
        env: vec!["PATH=/bin".into(), "HOME=/".into(), "TERM=xterm".into()],
        cwd: "/".into(),
        capabilities: DEFAULT_CAPS.to_vec(),
        ..ProcessSpec::default()
    }
}

pub(crate) fn filesystem(target: &str, fstype: &str, options: &[&str]) -> MountSpec {
    MountSpec {
        target: target.into(),
        source: MountSource::Filesystem {
            fstype: fstype.into(),
            options: options.iter().map(|s| (*s).to_owned()).collect(),
        },
        readonly: false,
        recursive_readonly: false,
        propagation: Propagation::Private,
        nosuid: true,
        nodev: !["tmpfs", "devpts"].contains(&fstype),
        noexec: true,
        map_ids: false,
    }
}

pub(crate) fn bind(path: &Path, target: &str) -> MountSpec {
    MountSpec {
        source: MountSource::Bind {
            path: path.into(),
            sub_path: None,
        },
        nosuid: false,
        nodev: false,
        noexec: false,
        map_ids: false,
        ..filesystem(target, "", &[])
    }
}

pub(crate) fn standard_mounts() -> Vec<MountSpec> {
    let sysfs = MountSpec {
        readonly: true,
        ..filesystem("/sys", "sysfs", &[])
    };
    let cgroup = MountSpec {
        source: MountSource::Cgroup,
        readonly: true,
        ..filesystem("/sys/fs/cgroup", "", &[])
    };
    vec![
        filesystem("/proc", "proc", &[]),
        filesystem("/dev", "tmpfs", &["mode=755", "size=65536k"]),
        filesystem(
            "/dev/pts",
            "devpts",
            &["newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        filesystem("/dev/mqueue", "mqueue", &[]),
        filesystem("/dev/shm", "tmpfs", &["mode=1777", "size=65536k"]),
        sysfs,
        cgroup,
    ]
}

pub(crate) fn log_text(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .map(|line| {
            let mut parts = line.splitn(4, ' ');
            let (_, _, tag, text) = (parts.next(), parts.next(), parts.next(), parts.next());
            match tag {
                Some("F") => format!("{}\n", text.unwrap()),
                Some("P") => text.unwrap().to_owned(),
                other => panic!("{other:?} in {line}"),
            }
        })
        .collect()
}

pub(crate) fn read_all(fd: OwnedFd) -> String {
    use std::io::Read;
    let mut bytes = Vec::new();
    let _ = std::fs::File::from(fd).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

pub(crate) fn alive(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}/exe")).read_link().is_ok()
}
