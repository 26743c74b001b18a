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
    let mut bits = libc::CLONE_PIDFD as u64;
    if flags.new_pid {
        bits |= libc::CLONE_NEWPID as u64;
    }
    if flags.new_mount {
        bits |= libc::CLONE_NEWNS as u64;
    }
    // SAFETY: all-zero is a valid `clone_args` (every field is an integer).
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = bits;
    args.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
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
