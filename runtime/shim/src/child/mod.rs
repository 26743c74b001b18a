//! What a freshly cloned child does until it executes the user's program.
//!
//! Runs in a copy of the single-threaded shim, so ordinary Rust code is sound here; but nothing
//! of the shim's state may be used, no destructor of it may run, and the child ends by execve or
//! `exit_child`. Every failure goes back over the note socket with the words a user should see.
//!
//! * [`rootfs`]: overlay, mounts, devices, masks, pivot
//! * [`cgroupview`]: `/sys/fs/cgroup` as the container sees it
//! * [`identity`]: limits, user, capabilities, filter, execve

pub(crate) mod cgroupview;
pub(crate) mod identity;
pub(crate) mod rootfs;

use crate::note::{Note, NoteSender};
use crate::setup::UserNs;
use linux::process::clone::{CloneFlags, Cloned};
use linux::process::namespace::Namespaces;
use linux::process::{attrs, clone, exec, namespace};
use pod_shim::protocol::{ExecSpec, LaunchSpec, PidNamespace, ShimError, ShimErrorKind};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

/// Descriptors of the child's standard streams; with a terminal none are needed.
#[derive(Debug)]
pub(crate) struct ChildStdio {
    /// stdin, stdout, stderr.
    pub(crate) streams: [OwnedFd; 3],
}

/// An operating system refusal as a shim error.
pub(crate) fn system(what: impl std::fmt::Display, error: &io::Error) -> ShimError {
    failure(ShimErrorKind::System, what, error)
}

/// A part of the request that cannot be used.
pub(crate) fn bad_request(what: impl std::fmt::Display, error: &io::Error) -> ShimError {
    failure(ShimErrorKind::BadRequest, what, error)
}

fn failure(kind: ShimErrorKind, what: impl std::fmt::Display, error: &io::Error) -> ShimError {
    ShimError {
        kind,
        message: format!("{what}: {}", exec::errno_text(error)),
        errno: error.raw_os_error(),
    }
}

/// The child of a container launch: never returns.
pub(crate) fn run_container(
    spec: &LaunchSpec,
    userns: Option<&UserNs>,
    stdio: ChildStdio,
    note: OwnedFd,
) -> ! {
    let note = NoteSender::new(note);
    let Err(error) = container(spec, userns, &stdio, &note);
    fail(&note, error)
}

/// The child of an exec session: never returns.
pub(crate) fn run_exec(
    spec: &ExecSpec,
    target: (BorrowedFd<'_>, Namespaces),
    cgroups: &[PathBuf],
    stdio: ChildStdio,
    note: OwnedFd,
) -> ! {
    let note = NoteSender::new(note);
    let Err(error) = exec_session(spec, target, cgroups, &stdio, &note);
    fail(&note, error)
}

fn fail(note: &NoteSender, error: ShimError) -> ! {
    note.send(&Note::Failed(error), None);
    clone::exit_child(1)
}

fn container(
    spec: &LaunchSpec,
    userns: Option<&UserNs>,
    stdio: &ChildStdio,
    note: &NoteSender,
) -> Result<std::convert::Infallible, ShimError> {
    let kept: Vec<RawFd> = userns.iter().map(|u| u.fd.as_raw_fd()).collect();
    isolate(stdio, note, &kept)?;
    join_cgroups(&spec.cgroups)?;
    adjust_oom_score(spec.process.oom_score_adj, note)?;
    let last_capability =
        linux::caps::last_capability().map_err(|e| system("read the last capability", &e))?;
    let prepared = rootfs::prepare(spec, userns)?;
    if let Some(userns) = userns {
        enter(userns, spec, note)?;
    }
    if spec.cgroup_namespace {
        let which = Namespaces {
            cgroup: true,
            ..Namespaces::default()
        };
        namespace::unshare(which).map_err(|e| system("make a cgroup namespace", &e))?;
    }
    rootfs::assemble(spec, prepared)?;
    if spec.tty {
        let slave = terminal(spec.process.uid, note)?;
        rootfs::mount_console(slave.as_fd())?;
        install_terminal(&slave)?;
    } else {
        install(stdio)?;
    }
    identity::become_and_execute(&spec.process, last_capability, note)
}

/// Go on as user 0 of the pod's user namespace, in mount and PID namespaces that belong to it.
/// From here on nothing of the node can be changed or mounted any more.
///
/// A PID namespace begins with its next process, so a sibling goes on in this one's place.
fn enter(userns: &UserNs, spec: &LaunchSpec, note: &NoteSender) -> Result<(), ShimError> {
    join_user_namespace(userns)?;
    if spec.pid_namespace != PidNamespace::Container {
        let which = Namespaces {
            mount: true,
            ..Namespaces::default()
        };
        return namespace::unshare(which).map_err(|e| system("make a mount namespace", &e));
    }
    let (told, tell) = linux::event::pipe().map_err(|e| system("make a pipe", &e))?;
    let flags = CloneFlags {
        new_pid: true,
        new_mount: true,
        sibling: true,
        ..CloneFlags::default()
    };
    match clone::clone3(flags).map_err(|e| system("clone into a new PID namespace", &e))? {
        Cloned::Parent { pid, pidfd } => {
            note.send(&Note::Replaced { pid }, Some(pidfd.as_fd()));
            clone::exit_child(0)
        }
        Cloned::Child => {
            drop(tell);
            attrs::die_with_parent().map_err(|e| system("tie the child to the shim", &e))?;
            // The shim must know of this process before it can end: the other one's exit says so.
            let mut byte = [0u8; 1];
            linux::event::read(told.as_fd(), &mut byte)
                .map(drop)
                .map_err(|e| system("wait for the first child", &e))
        }
    }
}

/// All capabilities in the pod's user namespace, as its user 0.
pub(crate) fn join_user_namespace(userns: &UserNs) -> Result<(), ShimError> {
    namespace::join_user_file(userns.fd.as_fd())
        .and_then(|()| linux::user::become_user(0, 0, &[]))
        .map_err(|e| system("join the pod's user namespace", &e))?;
    // The change of user has made this process visible and cleared its tie.
    attrs::set_dumpable(false)
        .and_then(|()| attrs::die_with_parent())
        .map_err(|e| system("tie the child to the shim", &e))
}

fn exec_session(
    spec: &ExecSpec,
    (target, which): (BorrowedFd<'_>, Namespaces),
    cgroups: &[PathBuf],
    stdio: &ChildStdio,
    note: &NoteSender,
) -> Result<std::convert::Infallible, ShimError> {
    isolate(stdio, note, &[target.as_raw_fd()])?;
    join_cgroups(cgroups)?;
    adjust_oom_score(spec.process.oom_score_adj, note)?;
    let last_capability =
        linux::caps::last_capability().map_err(|e| system("read the last capability", &e))?;
    namespace::join(target, which).map_err(|e| system("join the container's namespaces", &e))?;
    if which.user {
        // The node's root is nobody there.
        linux::user::become_user(0, 0, &[]).map_err(|e| system("become user 0:0", &e))?;
    }
    if spec.tty {
        let slave = terminal(spec.process.uid, note)?;
        install_terminal(&slave)?;
    } else {
        install(stdio)?;
    }
    identity::become_and_execute(&spec.process, last_capability, note)
}

/// Cut the child off from the shim: default signals, no way for others to look in, killed with
/// the shim, none of its descriptors, a session of its own.
fn isolate(stdio: &ChildStdio, note: &NoteSender, keep: &[RawFd]) -> Result<(), ShimError> {
    attrs::reset_signals();
    let step = |what: &'static str, result: io::Result<()>| result.map_err(|e| system(what, &e));
    step("make the child undumpable", attrs::set_dumpable(false))?;
    step("tie the child to the shim", attrs::die_with_parent())?;
    let mut fds: Vec<RawFd> = stdio.streams.iter().map(AsRawFd::as_raw_fd).collect();
    fds.extend([0, 1, 2, note.as_fd().as_raw_fd()]);
    fds.extend(keep);
    step("close inherited descriptors", attrs::close_all_except(&fds))?;
    step("start a session", attrs::new_session())?;
    attrs::new_session_keyring();
    attrs::set_umask(0);
    Ok(())
}

fn join_cgroups(dirs: &[PathBuf]) -> Result<(), ShimError> {
    for dir in dirs {
        crate::cgroup::join(dir)
            .map_err(|e| system(format_args!("join cgroup {}", dir.display()), &e))?;
    }
    Ok(())
}

/// Without CAP_SYS_RESOURCE a lower value than the shim's own is refused: a warning, because the
/// container is otherwise fine.
fn adjust_oom_score(value: Option<i32>, note: &NoteSender) -> Result<(), ShimError> {
    let Some(value) = value else { return Ok(()) };
    match attrs::set_oom_score_adj(value) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            note.send(
                &Note::Warning(format!("oom_score_adj {value} was refused")),
                None,
            );
            Ok(())
        }
        Err(error) => Err(system(format_args!("set oom_score_adj {value}"), &error)),
    }
}

/// Make a terminal in the container's own devpts and send its master side to the shim.
fn terminal(uid: u32, note: &NoteSender) -> Result<OwnedFd, ShimError> {
    let pty = linux::tty::open_pty("/dev/pts/ptmx", uid)
        .map_err(|e| system("make a terminal in /dev/pts", &e))?;
    note.send(&Note::Terminal, Some(pty.master.as_fd()));
    Ok(pty.slave)
}

fn install_terminal(slave: &OwnedFd) -> Result<(), ShimError> {
    linux::tty::make_controlling(slave.as_fd())
        .map_err(|e| system("make the terminal controlling", &e))?;
    for target in 0..=2 {
        attrs::install_stdio(slave.as_fd(), target)
            .map_err(|e| system("install the terminal", &e))?;
    }
    Ok(())
}

fn install(stdio: &ChildStdio) -> Result<(), ShimError> {
    for (target, fd) in stdio.streams.iter().enumerate() {
        attrs::install_stdio(fd.as_fd(), target as RawFd)
            .map_err(|e| system("install standard streams", &e))?;
    }
    Ok(())
}

/// `/dev/null`, for streams nobody connected.
pub(crate) fn dev_null() -> io::Result<OwnedFd> {
    Ok(std::fs::File::options()
        .read(true)
        .write(true)
        .open(Path::new("/dev/null"))?
        .into())
}
