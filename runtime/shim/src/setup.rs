//! The pod's namespaces, made in the shim itself, and the process with id 1 of a shared PID
//! namespace.

use crate::child;
use linux::mount::{self, MountAttrs};
use linux::process::clone::{self, CloneFlags, Cloned};
use linux::process::namespace::{self, Namespaces};
use linux::process::userns::{self, IdRange};
use linux::process::{attrs, pidfd};
use pod_shim::protocol::{SandboxSpec, ShimError, ShimErrorKind, UserNamespace};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// The helper that is process 1 of the pod's shared PID namespace.
#[derive(Debug)]
pub(crate) struct Helper {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
}

/// The pod's user namespace. The shim itself stays among the node's users.
#[derive(Debug)]
pub(crate) struct UserNs {
    pub(crate) fd: OwnedFd,
}

/// Make what `spec` asks. Called once: what fails half-way ends with the shim itself.
pub(crate) fn make_sandbox(
    spec: &SandboxSpec,
) -> Result<(Option<Helper>, Option<UserNs>), ShimError> {
    for name in spec.sysctls.keys() {
        check_sysctl(name, spec)?;
    }
    if let Some(value) = spec.shim_oom_score_adj
        && let Err(error) = attrs::set_oom_score_adj(value)
    {
        eprintln!("oom_score_adj {value} was refused: {error}");
    }
    let own_uts = spec.hostname.is_some() || spec.domainname.is_some() || !spec.host_network;
    let which = Namespaces {
        net: !spec.host_network,
        ipc: !spec.host_ipc,
        uts: own_uts,
        ..Namespaces::default()
    };
    let system = |what: &str, e: io::Error| child::system(what, &e);
    let userns = match spec.user_namespace {
        Some(ids) => Some(make_user_namespace(spec, which, ids)?),
        None => {
            namespace::unshare(which).map_err(|e| system("make the pod's namespaces", e))?;
            None
        }
    };
    if !spec.host_network {
        namespace::loopback_up().map_err(|e| system("bring the loopback interface up", e))?;
        if let Some(path) = &spec.netns_path {
            namespace::pin_net(path)
                .map_err(|e| child::system(format_args!("pin the network at {path:?}"), &e))?;
        }
    }
    if let Some(name) = &spec.hostname {
        namespace::set_hostname(name)
            .map_err(|e| child::bad_request(format_args!("set host name {name:?}"), &e))?;
    }
    if let Some(name) = &spec.domainname {
        namespace::set_domainname(name)
            .map_err(|e| child::bad_request(format_args!("set domain name {name:?}"), &e))?;
    }
    if userns.is_none() {
        for (name, value) in &spec.sysctls {
            write_sysctl(name, value)
                .map_err(|e| child::bad_request(format_args!("set sysctl {name}={value}"), &e))?;
        }
    }
    let helper = if spec.share_pid {
        Some(spawn_helper(spec, userns.as_ref())?)
    } else {
        None
    };
    Ok((helper, userns))
}

/// Make the pod's namespaces inside a user namespace of its own, and move into all but that.
fn make_user_namespace(
    spec: &SandboxSpec,
    which: Namespaces,
    ids: UserNamespace,
) -> Result<UserNs, ShimError> {
    if spec.host_network || spec.host_ipc {
        return Err(ShimError {
            kind: ShimErrorKind::BadRequest,
            message: "a pod with a user namespace cannot use the host's network or IPC".into(),
            errno: None,
        });
    }
    let range = IdRange {
        first: ids.first,
        length: ids.length,
    };
    let flags = CloneFlags {
        new_net: which.net,
        new_ipc: which.ipc,
        new_uts: which.uts,
        ..CloneFlags::default()
    };
    // Settings belong to user 0 of the namespace, not to the node's root.
    let settings = || {
        let mut all = spec.sysctls.iter();
        all.try_for_each(|(name, value)| write_sysctl(name, value))
    };
    let created = userns::create(flags, range, settings).map_err(|e| {
        let names: Vec<&str> = spec.sysctls.keys().map(String::as_str).collect();
        child::system(
            format_args!("make the pod's user namespace (sysctls {names:?})"),
            &e,
        )
    })?;
    namespace::join(created.holder.pidfd.as_fd(), which)
        .map_err(|e| child::system("join the pod's namespaces", &e))?;
    Ok(UserNs { fd: created.user })
}

/// Only settings that live in one of the pod's own namespaces may be written: anything else
/// would change the node.
fn check_sysctl(name: &str, spec: &SandboxSpec) -> Result<(), ShimError> {
    let refuse = |why: &str| {
        Err(ShimError {
            kind: ShimErrorKind::BadRequest,
            message: format!("sysctl {name:?} {why}"),
            errno: None,
        })
    };
    let path = sysctl_path(name);
    if path
        .split('/')
        .any(|part| part.is_empty() || part == "." || part == "..")
    {
        return refuse("is not a valid name");
    }
    let ipc = ["kernel/shm", "kernel/msg", "kernel/sem", "fs/mqueue/"];
    if path.starts_with("net/") {
        if spec.host_network {
            return refuse("belongs to the host's network, which the pod uses");
        }
    } else if ipc.iter().any(|prefix| path.starts_with(prefix)) {
        if spec.host_ipc {
            return refuse("belongs to the host's IPC namespace, which the pod uses");
        }
    } else {
        return refuse("is not namespaced");
    }
    Ok(())
}

/// `net.ipv4.ip_forward` and `net/ipv4/conf/eth0.1/forwarding` as paths: whichever of the two
/// separators comes first is the separator, and the other is then part of a name.
fn sysctl_path(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(at) if name.as_bytes()[at] == b'.' => name
            .chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                c => c,
            })
            .collect(),
        Some(_) | None => name.to_owned(),
    }
}

fn write_sysctl(name: &str, value: &str) -> io::Result<()> {
    std::fs::OpenOptions::new()
        .write(true)
        .open(Path::new("/proc/sys").join(sysctl_path(name)))
        .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()))
}

/// Clone the helper and wait until it has shut itself away.
fn spawn_helper(spec: &SandboxSpec, userns: Option<&UserNs>) -> Result<Helper, ShimError> {
    let system = |what: &str, e: io::Error| child::system(what, &e);
    let (ours, theirs) = linux::event::pipe().map_err(|e| system("make a pipe", e))?;
    let cloned = match userns {
        None => clone::clone3(HELPER_NAMESPACES),
        Some(userns) => clone_in(userns, &spec.helper_cgroups),
    };
    let to_join: &[PathBuf] = match userns {
        None => &spec.helper_cgroups,
        // Done by whoever made it, while it still could.
        Some(_) => &[],
    };
    match cloned.map_err(|e| system("clone the pod's first process", e))? {
        Cloned::Child => run_helper(to_join, &theirs),
        Cloned::Parent { pid, pidfd } => {
            drop(theirs);
            let mut text = Vec::new();
            let mut chunk = [0u8; 256];
            while let Ok(count @ 1..) = linux::event::read(ours.as_fd(), &mut chunk) {
                text.extend_from_slice(&chunk[..count]);
            }
            if text == b"ready" {
                return Ok(Helper { pid, pidfd });
            }
            let _ = pidfd::send_signal_fd(pidfd.as_fd(), 9);
            Err(ShimError {
                kind: ShimErrorKind::System,
                message: format!(
                    "set up the pod's first process: {}",
                    String::from_utf8_lossy(&text)
                ),
                errno: None,
            })
        }
    }
}

const HELPER_NAMESPACES: CloneFlags = CloneFlags {
    new_pid: true,
    new_mount: true,
    new_user: false,
    new_net: false,
    new_ipc: false,
    new_uts: false,
    sibling: false,
};

/// Clone a child of ours whose namespaces belong to the user namespace: a first child goes there
/// and makes it as its sibling.
fn clone_in(userns: &UserNs, cgroups: &[PathBuf]) -> io::Result<Cloned> {
    let (ours, theirs) = linux::fdpass::message_pair()?;
    match clone::clone3(CloneFlags::default())? {
        Cloned::Child => {}
        Cloned::Parent { .. } => {
            drop(theirs);
            let (mut text, mut fds) = ([0u8; 4], Vec::new());
            let count = linux::fdpass::recv(ours.as_fd(), &mut text, &mut fds)?;
            return match fds.pop() {
                Some(pidfd) if count == text.len() => Ok(Cloned::Parent {
                    pid: i32::from_le_bytes(text),
                    pidfd,
                }),
                Some(_) | None => Err(io::Error::other("its maker died")),
            };
        }
    }
    drop(ours);
    let fail = |message: &dyn std::fmt::Display| -> ! {
        eprintln!("the maker of the pod's first process: {message}");
        clone::exit_child(1)
    };
    if let Err(error) = cgroups.iter().try_for_each(|dir| crate::cgroup::join(dir)) {
        fail(&error);
    }
    if let Err(error) = child::join_user_namespace(userns) {
        fail(&error.message);
    }
    let flags = CloneFlags {
        sibling: true,
        ..HELPER_NAMESPACES
    };
    match clone::clone3(flags) {
        Ok(Cloned::Child) => Ok(Cloned::Child),
        Ok(Cloned::Parent { pid, pidfd }) => {
            let _ = linux::fdpass::send(theirs.as_fd(), &pid.to_le_bytes(), &[pidfd.as_fd()]);
            clone::exit_child(0)
        }
        Err(error) => fail(&error),
    }
}

/// The helper's life: reap, nothing else. It lives in an empty filesystem without capabilities,
/// because containers of the pod can see it, and with CAP_SYS_PTRACE look into `/proc/1/root`.
fn run_helper(cgroups: &[PathBuf], report: &OwnedFd) -> ! {
    use std::os::fd::AsRawFd;
    let shut_away = || -> io::Result<()> {
        attrs::reset_signals();
        attrs::set_dumpable(false)?;
        attrs::die_with_parent()?;
        attrs::close_all_except(&[0, 1, 2, report.as_raw_fd()])?;
        attrs::install_stdio(child::dev_null()?.as_fd(), 2)?;
        attrs::new_session()?;
        attrs::set_name(c"pod-init")?;
        for dir in cgroups {
            crate::cgroup::join(dir)?;
        }
        let last = linux::caps::last_capability()?;
        mount::make_all_private()?;
        let attributes = MountAttrs {
            readonly: true,
            nosuid: true,
            nodev: true,
            noexec: true,
        };
        let options = [
            "size=4k".to_owned(),
            "nr_inodes=2".into(),
            "mode=555".into(),
        ];
        let empty = mount::filesystem("tmpfs", "empty", &options, attributes)?;
        mount::attach(empty.as_fd(), mount::open_path(Path::new("/proc"))?.as_fd())?;
        mount::pivot_into(empty.as_fd())?;
        linux::caps::limit_bounding(0, last)?;
        linux::caps::set(0, 0, 0)?;
        attrs::die_with_parent()?;
        drop(empty);
        Ok(())
    };
    match shut_away() {
        Ok(()) => {
            let _ = linux::event::write(report.as_fd(), b"ready");
        }
        Err(error) => {
            let _ = linux::event::write(report.as_fd(), error.to_string().as_bytes());
            clone::exit_child(1);
        }
    }
    let _ = attrs::close_all_except(&[0, 1, 2]);
    loop {
        let _ = linux::event::wait_child_signal();
        while let Ok(Some(_)) = pidfd::reap_any() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(host_network: bool, host_ipc: bool) -> SandboxSpec {
        SandboxSpec {
            sandbox_id: "s".into(),
            host_network,
            host_ipc,
            share_pid: false,
            netns_path: None,
            hostname: None,
            domainname: None,
            sysctls: Default::default(),
            shim_oom_score_adj: None,
            helper_cgroups: vec![],
            user_namespace: None,
        }
    }

    #[test]
    fn only_namespaced_settings_of_the_pods_own_namespaces_may_be_written() {
        for good in [
            "net.core.somaxconn",
            "net/ipv4/conf/eth0.1/forwarding",
            "kernel.shmmax",
            "kernel.sem",
        ] {
            assert!(check_sysctl(good, &spec(false, false)).is_ok(), "{good}");
        }
        for bad in [
            "kernel.panic",
            "vm.swappiness",
            "net..x",
            "net/../kernel/panic",
            "",
            "net.",
            "fs.file-max",
        ] {
            assert!(check_sysctl(bad, &spec(false, false)).is_err(), "{bad}");
        }
        assert!(check_sysctl("net.core.somaxconn", &spec(true, false)).is_err());
        assert!(check_sysctl("kernel.msgmax", &spec(false, true)).is_err());
    }

    #[test]
    fn the_first_separator_decides() {
        assert_eq!(
            sysctl_path("net.ipv4.conf.eth0/1.forwarding"),
            "net/ipv4/conf/eth0.1/forwarding"
        );
        assert_eq!(
            sysctl_path("net/ipv4/conf/eth0.1/x"),
            "net/ipv4/conf/eth0.1/x"
        );
    }
}
