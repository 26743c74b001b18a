//! From what was asked and what the image says to a launch specification without defaults.
//!
//! Pure: no file, no clock, no kernel. What must be looked up (users, layers, devices, cgroup
//! directories) is looked up by [`super::create`] and handed in as values.

use super::signal;
use super::users::ResolvedUser;
use crate::service::{ContainerConfig, ImageConfig, Mount, NamespaceMode, SandboxConfig};
use linux::cgroup::{DeviceAccess, DeviceKind, DeviceRule, default_devices};
use linux::seccomp::default_profile::capability_number;
use pod_shim::protocol::{
    DeviceSpec, LaunchSpec, LogSpec, MountSource, MountSpec, PidNamespace, ProcessSpec,
    Propagation, RootfsSpec,
};
use std::path::PathBuf;

/// What stands in PATH when the image says nothing (as the field's runtimes have it).
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Capabilities of a container that asks for none.
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// SIGTERM.
const DEFAULT_STOP_SIGNAL: i32 = 15;

/// A request that can never work; names the field.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// Neither pod nor image says what to run.
    #[error("no command: neither the container nor image {image} has one")]
    NoCommand {
        /// The image.
        image: String,
    },
    /// A capability nobody knows.
    #[error("security.{field}: unknown capability {name:?}")]
    Capability {
        /// `add_capabilities` or `drop_capabilities`.
        field: &'static str,
        /// As written.
        name: String,
    },
    /// A stop signal nobody knows.
    #[error("stop signal {0:?} is unknown")]
    Signal(String),
    /// A path that must be absolute.
    #[error("{field} {path:?} is not an absolute path")]
    Relative {
        /// The field.
        field: &'static str,
        /// As written.
        path: String,
    },
    /// A string the kernel cannot take.
    #[error("{0} holds a NUL byte")]
    Nul(&'static str),
    /// An environment name that is none.
    #[error("environment variable name {0:?} is empty or holds '='")]
    EnvName(String),
    /// The network, IPC or PID mode makes no sense there.
    #[error("{field}: mode {mode:?} is not possible")]
    Mode {
        /// The field.
        field: &'static str,
        /// The mode.
        mode: NamespaceMode,
    },
}

/// Everything the specification is made of.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// The container's id.
    pub id: &'a str,
    /// What was asked.
    pub config: &'a ContainerConfig,
    /// What the image says.
    pub image: &'a ImageConfig,
    /// The sandbox.
    pub sandbox: &'a SandboxConfig,
    /// The process's user.
    pub user: &'a ResolvedUser,
    /// Capability numbers, from [`capabilities`].
    pub capabilities: Vec<u8>,
    /// Compiled seccomp program, base64.
    pub seccomp: Option<String>,
    /// Image layers, topmost first.
    pub layers: Vec<PathBuf>,
    /// The container's state directory.
    pub state_dir: PathBuf,
    /// Directory shared as `/dev/shm`.
    pub shared_memory: PathBuf,
    /// The sandbox's files to show: (path in the container, file).
    pub files: Vec<(&'static str, PathBuf)>,
    /// The image's volumes and image mounts, made ready.
    pub extra_mounts: Vec<MountSpec>,
    /// Devices to make besides the standard ones.
    pub devices: Vec<DeviceSpec>,
    /// Cgroup directories.
    pub cgroups: Vec<PathBuf>,
    /// Log file; none discards.
    pub log_path: Option<PathBuf>,
    /// The most files a process of this node may ever open.
    pub open_files_most: u64,
}

/// The whole specification.
///
/// # Errors
/// [`SpecError`] naming the field that cannot be.
pub fn launch_spec(inputs: Inputs<'_>) -> Result<LaunchSpec, SpecError> {
    let config = inputs.config;
    let process = process(&inputs)?;
    let mounts = mounts(&inputs)?;
    let mut devices = standard_devices();
    devices.extend(inputs.devices);
    let log = inputs.log_path.map(|path| LogSpec {
        path,
        max_bytes: config.log_max_bytes,
        max_files: config.log_max_files,
    });
    let (masked_paths, readonly_paths) = if config.security.privileged {
        (Vec::new(), Vec::new())
    } else {
        let security = &config.security;
        (
            security.masked_paths.clone(),
            security.readonly_paths.clone(),
        )
    };
    Ok(LaunchSpec {
        container_id: inputs.id.to_owned(),
        rootfs: RootfsSpec {
            lower: inputs.layers,
            upper: inputs.state_dir.join("upper"),
            work: inputs.state_dir.join("work"),
            readonly: config.security.readonly_rootfs,
            // The layer dies with the container; syncing it buys nothing.
            options: vec!["volatile".to_owned()],
        },
        state_dir: inputs.state_dir,
        process,
        mounts,
        devices,
        masked_paths,
        readonly_paths,
        pid_namespace: pid_namespace(config, inputs.sandbox)?,
        cgroups: inputs.cgroups,
        cgroup_namespace: !config.security.privileged,
        log,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
    })
}

fn process(inputs: &Inputs<'_>) -> Result<ProcessSpec, SpecError> {
    let config = inputs.config;
    let cwd = [&config.working_dir, &inputs.image.working_dir]
        .into_iter()
        .find(|dir| !dir.is_empty());
    let cwd = cwd.cloned().unwrap_or_else(|| "/".to_owned());
    absolute("working_dir", &cwd)?;
    let argv = argv(config, inputs.image)?;
    if argv.iter().any(|a| a.contains('\0')) {
        return Err(SpecError::Nul("command"));
    }
    Ok(ProcessSpec {
        argv,
        env: environment(config, inputs.image, inputs.sandbox, &inputs.user.home)?,
        cwd,
        uid: inputs.user.uid,
        gid: inputs.user.gid,
        groups: inputs.user.groups.clone(),
        capabilities: inputs.capabilities.clone(),
        ambient_capabilities: Vec::new(),
        no_new_privileges: config.security.no_new_privs,
        seccomp: inputs.seccomp.clone(),
        rlimits: vec![open_files(inputs.open_files_most)],
        oom_score_adj: Some(config.oom_score_adj),
        umask: Some(0o022),
    })
}

/// The limit on open files, as services of a systemd machine have it: not the agent's own, which
/// it raises for itself.
fn open_files(most: u64) -> (u32, u64, u64) {
    const RLIMIT_NOFILE: u32 = 7;
    const SOFT: u64 = 1024;
    const HARD: u64 = 524_288;
    let hard = HARD.min(most);
    (RLIMIT_NOFILE, SOFT.min(hard), hard)
}

/// What to run: the container's command replaces entrypoint and arguments, its arguments
/// replace the image's.
fn argv(config: &ContainerConfig, image: &ImageConfig) -> Result<Vec<String>, SpecError> {
    let (program, arguments) = if !config.command.is_empty() {
        (&config.command, &config.args)
    } else if !config.args.is_empty() {
        (&image.entrypoint, &config.args)
    } else {
        (&image.entrypoint, &image.cmd)
    };
    let argv: Vec<String> = program.iter().chain(arguments).cloned().collect();
    if argv.is_empty() {
        return Err(SpecError::NoCommand {
            image: config.user_image.clone(),
        });
    }
    Ok(argv)
}

fn environment(
    config: &ContainerConfig,
    image: &ImageConfig,
    sandbox: &SandboxConfig,
    home: &str,
) -> Result<Vec<String>, SpecError> {
    let mut env: Vec<(String, String)> = Vec::new();
    let mut set = |name: &str, value: &str| match env.iter_mut().find(|(n, _)| n == name) {
        Some((_, old)) => value.clone_into(old),
        None => env.push((name.to_owned(), value.to_owned())),
    };
    set("PATH", DEFAULT_PATH);
    for entry in &image.env {
        let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
        set(name, value);
    }
    if config.tty {
        set("TERM", "xterm");
    }
    if !sandbox.hostname.is_empty() {
        set("HOSTNAME", &sandbox.hostname);
    }
    for (name, value) in &config.env {
        if name.is_empty() || name.contains('=') {
            return Err(SpecError::EnvName(name.clone()));
        }
        set(name, value);
    }
    if !env.iter().any(|(name, _)| name == "HOME") {
        env.push(("HOME".to_owned(), home.to_owned()));
    }
    if env
        .iter()
        .any(|(n, v)| n.contains('\0') || v.contains('\0'))
    {
        return Err(SpecError::Nul("env"));
    }
    Ok(env.into_iter().map(|(n, v)| format!("{n}={v}")).collect())
}

/// Capability numbers of the process: the default set, changed by what was added and dropped,
/// never more than `available` (bits), which is what the node itself has.
///
/// # Errors
/// [`SpecError::Capability`] for an unknown name.
pub fn capabilities(config: &ContainerConfig, available: u64) -> Result<Vec<u8>, SpecError> {
    let security = &config.security;
    let number = |field: &'static str, name: &str| {
        capability_number(name).ok_or_else(|| SpecError::Capability {
            field,
            name: name.to_owned(),
        })
    };
    let is_all =
        |name: &String| name.eq_ignore_ascii_case("ALL") || name.eq_ignore_ascii_case("CAP_ALL");
    let (add, drop) = (&security.add_capabilities, &security.drop_capabilities);
    let mut set = 0u64;
    for name in DEFAULT_CAPABILITIES {
        set |= capability_number(name).map_or(0, |n| 1 << n);
    }
    if security.privileged || add.iter().any(is_all) {
        set = u64::MAX;
    }
    if drop.iter().any(is_all) && !security.privileged {
        set = 0;
    }
    for name in add.iter().filter(|n| !is_all(n)) {
        set |= 1 << number("add_capabilities", name)?;
    }
    for name in drop.iter().filter(|n| !is_all(n)) {
        let bit = 1 << number("drop_capabilities", name)?;
        if !security.privileged {
            set &= !bit;
        }
    }
    let set = set & available;
    Ok((0..64).filter(|n| set >> n & 1 == 1).collect())
}

fn mounts(inputs: &Inputs<'_>) -> Result<Vec<MountSpec>, SpecError> {
    let config = inputs.config;
    for mount in &config.mounts {
        absolute("mounts.container_path", &mount.container_path)?;
    }
    let clean = |path: &str| path.trim_end_matches('/').to_owned();
    let asked: Vec<String> = config
        .mounts
        .iter()
        .map(|m| clean(&m.container_path))
        .collect();
    let mut list = default_mounts(inputs);
    for (target, file) in &inputs.files {
        let mut mount = bind(target, file.clone());
        mount.readonly = config.security.readonly_rootfs;
        list.push(mount);
    }
    list.retain(|m| !asked.contains(&clean(&m.target)));
    let of_image = |m: &&MountSpec| !asked.contains(&clean(&m.target));
    let volumes: Vec<MountSpec> = inputs
        .extra_mounts
        .iter()
        .filter(of_image)
        .cloned()
        .collect();
    let mut user: Vec<MountSpec> = Vec::new();
    for mount in &config.mounts {
        let made_ready = inputs
            .extra_mounts
            .iter()
            .find(|m| mount.image.is_some() && m.target == mount.container_path);
        user.push(made_ready.cloned().unwrap_or_else(|| asked_mount(mount)));
    }
    user.extend(volumes);
    // Outer ones first, else they would cover inner ones.
    user.sort_by_key(|m| m.target.split('/').filter(|p| !p.is_empty()).count());
    list.extend(user);
    if inputs.sandbox.user_namespace.is_some() {
        for mount in &mut list {
            mount.map_ids = matches!(mount.source, MountSource::Bind { .. });
        }
    }
    Ok(list)
}

fn asked_mount(mount: &Mount) -> MountSpec {
    MountSpec {
        target: mount.container_path.clone(),
        source: MountSource::Bind {
            path: mount.host_path.clone(),
            sub_path: mount.sub_path.clone(),
        },
        readonly: mount.readonly,
        recursive_readonly: mount.recursive_readonly,
        propagation: mount.propagation,
        nosuid: false,
        nodev: false,
        noexec: false,
        map_ids: false,
    }
}

/// A private bind mount.
#[must_use]
pub fn bind(target: &str, path: PathBuf) -> MountSpec {
    MountSpec {
        target: target.to_owned(),
        source: MountSource::Bind {
            path,
            sub_path: None,
        },
        readonly: false,
        recursive_readonly: false,
        propagation: Propagation::Private,
        nosuid: false,
        nodev: false,
        noexec: false,
        map_ids: false,
    }
}

/// A mount of what image layers show, topmost first.
#[must_use]
pub fn layers(
    target: &str,
    lower: Vec<PathBuf>,
    changes: Option<(PathBuf, PathBuf)>,
    sub_path: Option<String>,
) -> MountSpec {
    MountSpec {
        source: MountSource::Layers {
            lower,
            changes,
            sub_path,
        },
        ..bind(target, PathBuf::new())
    }
}

/// A mount of a filesystem by type.
#[must_use]
pub fn filesystem(target: &str, fstype: &str, options: &[String]) -> MountSpec {
    MountSpec {
        source: MountSource::Filesystem {
            fstype: fstype.to_owned(),
            options: options.to_vec(),
        },
        ..bind(target, PathBuf::new())
    }
}

fn default_mounts(inputs: &Inputs<'_>) -> Vec<MountSpec> {
    let privileged = inputs.config.security.privileged;
    let options = |list: &[&str]| -> Vec<String> { list.iter().map(|s| (*s).to_owned()).collect() };
    let hardened = |mount: MountSpec| MountSpec {
        nosuid: true,
        nodev: true,
        noexec: true,
        ..mount
    };
    let dev = options(&["mode=755", "size=65536k"]);
    let pts = options(&["newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]);
    let shared_memory = match inputs.sandbox.ipc {
        NamespaceMode::Node => bind("/dev/shm", PathBuf::from("/dev/shm")),
        NamespaceMode::Pod | NamespaceMode::Container | NamespaceMode::Target(_) => {
            bind("/dev/shm", inputs.shared_memory.clone())
        }
    };
    vec![
        hardened(filesystem("/proc", "proc", &[])),
        MountSpec {
            nosuid: true,
            ..filesystem("/dev", "tmpfs", &dev)
        },
        MountSpec {
            nosuid: true,
            noexec: true,
            ..filesystem("/dev/pts", "devpts", &pts)
        },
        hardened(filesystem("/dev/mqueue", "mqueue", &[])),
        hardened(shared_memory),
        MountSpec {
            readonly: !privileged,
            ..hardened(filesystem("/sys", "sysfs", &[]))
        },
        MountSpec {
            source: MountSource::Cgroup,
            readonly: !privileged,
            ..hardened(bind("/sys/fs/cgroup", PathBuf::new()))
        },
    ]
}

/// The nodes every container has.
fn standard_devices() -> Vec<DeviceSpec> {
    let nodes = [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
    ];
    let make = |(name, major, minor): (&str, u32, u32)| DeviceSpec {
        path: format!("/dev/{name}"),
        host_path: Some(PathBuf::from(format!("/dev/{name}"))),
        kind: 'c',
        major,
        minor,
        mode: 0o666,
        uid: 0,
        gid: 0,
    };
    nodes.into_iter().map(make).collect()
}

/// What the device cgroup allows: the standard set and what was asked for.
#[must_use]
pub fn device_rules(config: &ContainerConfig, devices: &[DeviceSpec]) -> Vec<DeviceRule> {
    if config.security.privileged {
        return vec![DeviceRule::EVERYTHING];
    }
    let mut rules = default_devices();
    for device in devices {
        let asked = config.devices.iter().find(|(_, p, _)| *p == device.path);
        let letters = asked.map_or("rwm", |(_, _, letters)| letters.as_str());
        rules.push(DeviceRule {
            kind: if device.kind == 'b' {
                DeviceKind::Block
            } else {
                DeviceKind::Char
            },
            major: Some(device.major),
            minor: Some(device.minor),
            access: DeviceAccess::from_letters(if letters.is_empty() { "rwm" } else { letters }),
        });
    }
    rules
}

fn pid_namespace(
    config: &ContainerConfig,
    sandbox: &SandboxConfig,
) -> Result<PidNamespace, SpecError> {
    Ok(match config.pid.as_ref().unwrap_or(&sandbox.pid) {
        NamespaceMode::Container => PidNamespace::Container,
        NamespaceMode::Pod => PidNamespace::Pod,
        NamespaceMode::Node => PidNamespace::Host,
        NamespaceMode::Target(id) => PidNamespace::Target(id.0.clone()),
    })
}

/// The signal that asks the container to stop.
///
/// # Errors
/// [`SpecError::Signal`] when the pod's is unknown; an unknown one of the image is SIGTERM.
pub fn stop_signal(config: &ContainerConfig, image: &ImageConfig) -> Result<i32, SpecError> {
    if let Some(name) = &config.stop_signal {
        return signal::number(name).ok_or_else(|| SpecError::Signal(name.clone()));
    }
    let of_image = image.stop_signal.as_deref().and_then(signal::number);
    Ok(of_image.unwrap_or(DEFAULT_STOP_SIGNAL))
}

fn absolute(field: &'static str, path: &str) -> Result<(), SpecError> {
    if path.contains('\0') {
        return Err(SpecError::Nul(field));
    }
    if path.starts_with('/') {
        return Ok(());
    }
    Err(SpecError::Relative {
        field,
        path: path.to_owned(),
    })
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
