//! Namespaces: leave, join, pin, and the few settings that belong to one.

#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use rustix::thread::UnshareFlags;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// A set of namespaces, for [`unshare`] and [`join`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// Network.
    pub net: bool,
    /// System V IPC and POSIX message queues.
    pub ipc: bool,
    /// Host and domain name.
    pub uts: bool,
    /// Mounts.
    pub mount: bool,
    /// Cgroup root.
    pub cgroup: bool,
    /// Process ids (of children made afterwards).
    pub pid: bool,
    /// Users; joining gives all capabilities in it and none outside.
    pub user: bool,
}

impl Namespaces {
    fn bits(self) -> u32 {
        let all = [
            (self.net, libc::CLONE_NEWNET),
            (self.ipc, libc::CLONE_NEWIPC),
            (self.uts, libc::CLONE_NEWUTS),
            (self.mount, libc::CLONE_NEWNS),
            (self.cgroup, libc::CLONE_NEWCGROUP),
            (self.pid, libc::CLONE_NEWPID),
            (self.user, libc::CLONE_NEWUSER),
        ];
        all.iter()
            .filter(|(on, _)| *on)
            .fold(0, |bits, (_, flag)| bits | *flag as u32)
    }
}

/// Move this process (thread) into new namespaces (unshare(2)).
///
/// # Errors
/// The kernel's refusal.
pub fn unshare(which: Namespaces) -> io::Result<()> {
    // SAFETY: the flags are namespace flags only, never CLONE_FILES, so no descriptor's owner is
    // changed under Rust's feet.
    Ok(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::from_bits_retain(which.bits())) }?)
}

/// Join namespaces of the process behind a pidfd (setns(2), Linux 5.8).
///
/// # Errors
/// `ESRCH` when the process is gone.
pub fn join(pidfd: BorrowedFd<'_>, which: Namespaces) -> io::Result<()> {
    setns(pidfd, which.bits() as i32)
}

/// Join the user namespace of the given `/proc/<pid>/ns/user` descriptor: all capabilities there,
/// none outside. The ids of this process stay as they are, mapped or not.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN in it.
pub fn join_user_file(ns: BorrowedFd<'_>) -> io::Result<()> {
    setns(ns, libc::CLONE_NEWUSER)
}

/// Let children be made in the PID namespace of the given `/proc/<pid>/ns/pid` descriptor.
///
/// # Errors
/// The kernel's refusal.
pub fn join_pid_file(ns: BorrowedFd<'_>) -> io::Result<()> {
    setns(ns, libc::CLONE_NEWPID)
}

/// A descriptor of this process's own PID namespace, to return to after [`join`].
///
/// # Errors
/// When /proc cannot be read.
pub fn own_pid_namespace() -> io::Result<OwnedFd> {
    Ok(std::fs::File::open("/proc/self/ns/pid")?.into())
}

/// The user namespace that owns the namespace behind a `/proc/<pid>/ns/*` descriptor
/// (ioctl_ns(2), Linux 4.9).
///
/// # Errors
/// `EPERM` when it is not among this process's own and their descendants.
pub fn owner(ns: impl AsFd) -> io::Result<OwnedFd> {
    const NS_GET_USERNS: libc::Ioctl = 0xb701;
    // SAFETY: takes no argument; the result is a fresh descriptor or -1.
    let fd = unsafe { libc::ioctl(ns.as_fd().as_raw_fd(), NS_GET_USERNS) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it and nobody else has it.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) })
}

fn setns(fd: BorrowedFd<'_>, kind: i32) -> io::Result<()> {
    // SAFETY: plain system call over a live descriptor and flags.
    if unsafe { libc::setns(fd.as_raw_fd(), kind) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Bind this process's network namespace onto the file `path` (made when missing), so that it
/// lives on without a process. Repeating replaces an older pin at that path.
///
/// # Errors
/// Any refusal of the file or the mount.
pub fn pin_net(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match unpin_net(path) {
        Ok(()) => {}
        Err(error) => return Err(error),
    }
    std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    Ok(rustix::mount::mount_bind("/proc/thread-self/ns/net", path)?)
}

/// Undo [`pin_net`]; a path that is gone or not mounted is fine.
///
/// # Errors
/// Any other refusal.
pub fn unpin_net(path: &Path) -> io::Result<()> {
    use rustix::io::Errno;
    use rustix::mount::UnmountFlags;
    match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Set the host name of this UTS namespace.
///
/// # Errors
/// `EINVAL` when longer than 64 bytes.
pub fn set_hostname(name: &str) -> io::Result<()> {
    Ok(rustix::system::sethostname(name.as_bytes())?)
}

/// Set the NIS domain name of this UTS namespace.
///
/// # Errors
/// `EINVAL` when longer than 64 bytes.
pub fn set_domainname(name: &str) -> io::Result<()> {
    Ok(rustix::system::setdomainname(name.as_bytes())?)
}

/// Bring the loopback interface of this network namespace up.
///
/// # Errors
/// Any refusal of the ioctl.
pub fn loopback_up() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    let socket = rustix::net::socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: all-zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    // SAFETY: SIOCSIFFLAGS reads one `ifreq` that lives over the call.
    let rc = unsafe {
        libc::ioctl(
            socket.as_fd().as_raw_fd(),
            libc::SIOCSIFFLAGS,
            std::ptr::from_ref(&request),
        )
    };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
