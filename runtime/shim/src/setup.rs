//! The pod's namespaces, made in the shim itself, and the process with id 1 of a shared PID
//! namespace.

use crate::child;
use linux::mount::{self, MountAttrs};
use linux::process::clone::{self, CloneFlags, Cloned};
use linux::process::namespace::{self, Namespaces};
use linux::process::{attrs, pidfd};
use pod_shim::protocol::{SandboxSpec, ShimError, ShimErrorKind};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// The helper that is process 1 of the pod's shared PID namespace.
#[derive(Debug)]
pub(crate) struct Helper {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
}

/// Make what `spec` asks. Called once: what fails half-way ends with the shim itself.
pub(crate) fn make_sandbox(spec: &SandboxSpec) -> Result<Option<Helper>, ShimError> {
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
    namespace::unshare(which).map_err(|e| system("make the pod's namespaces", e))?;
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
    for (name, value) in &spec.sysctls {
        write_sysctl(name, value)
            .map_err(|e| child::bad_request(format_args!("set sysctl {name}={value}"), &e))?;
    }
    if spec.share_pid {
        spawn_helper(spec).map(Some)
    } else {
        Ok(None)
    }
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
fn spawn_helper(spec: &SandboxSpec) -> Result<Helper, ShimError> {
    let system = |what: &str, e: io::Error| child::system(what, &e);
    let (ours, theirs) = linux::event::pipe().map_err(|e| system("make a pipe", e))?;
    let flags = CloneFlags {
        new_pid: true,
        new_mount: true,
    };
    match clone::clone3(flags).map_err(|e| system("clone the pod's first process", e))? {
        Cloned::Child => run_helper(spec, &theirs),
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

/// The helper's life: reap, nothing else. It lives in an empty filesystem without capabilities,
/// because containers of the pod can see it, and with CAP_SYS_PTRACE look into `/proc/1/root`.
fn run_helper(spec: &SandboxSpec, report: &OwnedFd) -> ! {
    use std::os::fd::AsRawFd;
    let shut_away = || -> io::Result<()> {
        attrs::reset_signals();
        attrs::set_dumpable(false)?;
        attrs::die_with_parent()?;
        attrs::close_all_except(&[0, 1, 2, report.as_raw_fd()])?;
        attrs::install_stdio(child::dev_null()?.as_fd(), 2)?;
        attrs::new_session()?;
        attrs::set_name(c"pod-init")?;
        for dir in &spec.helper_cgroups {
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
