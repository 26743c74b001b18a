//! Make a child with `clone3` and go on in Rust code in it, as `fork` does.
//!
//! Sound only in a process with one thread: a copy of a multi-threaded process may find the
//! allocator's locks held by threads that do not exist in it. [`clone3`] therefore refuses.

#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// New namespaces the child starts in (`CLONE_NEW*`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CloneFlags {
    /// A PID namespace in which the child is process 1.
    pub new_pid: bool,
    /// A copy of the mount namespace.
    pub new_mount: bool,
    /// A user namespace, whose maps the parent writes ([`super::userns::write_maps`]); the other
    /// new namespaces belong to it.
    pub new_user: bool,
    /// A network namespace.
    pub new_net: bool,
    /// A namespace of System V IPC and POSIX message queues.
    pub new_ipc: bool,
    /// A namespace of host and domain name.
    pub new_uts: bool,
    /// The child's parent is the caller's parent.
    pub sibling: bool,
}

impl CloneFlags {
    fn bits(self) -> u64 {
        let all = [
            (self.new_pid, libc::CLONE_NEWPID),
            (self.new_mount, libc::CLONE_NEWNS),
            (self.new_user, libc::CLONE_NEWUSER),
            (self.new_net, libc::CLONE_NEWNET),
            (self.new_ipc, libc::CLONE_NEWIPC),
            (self.new_uts, libc::CLONE_NEWUTS),
            (self.sibling, libc::CLONE_PARENT),
        ];
        all.iter()
            .filter(|(on, _)| *on)
            .fold(libc::CLONE_PIDFD as u64, |bits, (_, flag)| {
                bits | *flag as u64
            })
    }
}

/// Where the caller of [`clone3`] finds itself.
#[derive(Debug)]
pub enum Cloned {
    /// In the child. It must end by `execve` or [`exit_child`], never by returning from `main`.
    Child,
    /// In the parent.
    Parent {
        /// Process id of the child in the parent's PID namespace.
        pid: i32,
        /// Handle on the child.
        pidfd: OwnedFd,
    },
}

/// Clone the calling process (clone3(2)); the child gets a copy of the memory.
///
/// # Errors
/// `EBUSY` when the process has more than one thread, else the kernel's refusal.
pub fn clone3(flags: CloneFlags) -> io::Result<Cloned> {
    if thread_count()? != 1 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    let mut pidfd: RawFd = -1;
    // SAFETY: all-zero is a valid `clone_args` (every field is an integer).
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags.bits();
    args.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    // A sibling sends what the caller sends: the kernel wants no other word on it.
    if !flags.sibling {
        args.exit_signal = libc::SIGCHLD as u64;
    }
    // SAFETY: needed because no safe wrapper of clone3 exists. Without CLONE_VM the child has its
    // own copy of the memory and continues on its own copy of this stack; the process has one
    // thread (checked above), so no lock of the allocator or of std can be held in the copy.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            std::ptr::from_mut(&mut args),
            size_of::<libc::clone_args>(),
        )
    };
    match pid {
        0 => Ok(Cloned::Child),
        pid if pid > 0 => {
            // SAFETY: the kernel stored a fresh descriptor that nobody else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Cloned::Parent {
                pid: pid as i32,
                pidfd,
            })
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// End a child at once: no destructors, no atexit handlers of the parent's copy.
pub fn exit_child(code: i32) -> ! {
    // SAFETY: `_exit` takes any number and does not return.
    unsafe { libc::_exit(code) }
}

/// Threads of this process: the link count of its task directory less `.` and `..`.
fn thread_count() -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata("/proc/self/task")?
        .nlink()
        .saturating_sub(2))
}
