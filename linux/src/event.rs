//! What an event loop waits on: epoll, a descriptor for SIGCHLD, eventfd, inotify.

#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use rustix::event::epoll;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

/// A set of descriptors waited on together (epoll, level-triggered).
#[derive(Debug)]
pub struct Poller(OwnedFd);

/// What to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interest {
    /// Readable, or the other side closed.
    pub read: bool,
    /// Writable.
    pub write: bool,
}

impl Interest {
    /// Readable only.
    pub const READ: Interest = Interest {
        read: true,
        write: false,
    };
    /// Writable only.
    pub const WRITE: Interest = Interest {
        read: false,
        write: true,
    };
    /// Both.
    pub const BOTH: Interest = Interest {
        read: true,
        write: true,
    };
    /// Neither: only errors and hang-ups are told.
    pub const NONE: Interest = Interest {
        read: false,
        write: false,
    };

    fn flags(self) -> epoll::EventFlags {
        let mut flags = epoll::EventFlags::empty();
        flags.set(epoll::EventFlags::IN, self.read);
        flags.set(epoll::EventFlags::OUT, self.write);
        flags
    }
}

/// One descriptor is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    /// As given to [`Poller::add`].
    pub token: u64,
    /// There is something to read, or the end.
    pub read: bool,
    /// It can be written.
    pub write: bool,
    /// The other side is gone or the descriptor is in error.
    pub hangup: bool,
}

impl Poller {
    /// An empty set.
    ///
    /// # Errors
    /// When no descriptor can be had.
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Wait on one more descriptor. `EPERM` means it is always ready (a regular file).
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn add(&self, fd: BorrowedFd<'_>, token: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(
            &self.0,
            fd,
            epoll::EventData::new_u64(token),
            interest.flags(),
        )?)
    }

    /// Change what is waited for.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn modify(&self, fd: BorrowedFd<'_>, token: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::modify(
            &self.0,
            fd,
            epoll::EventData::new_u64(token),
            interest.flags(),
        )?)
    }

    /// Stop waiting on a descriptor.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn remove(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(epoll::delete(&self.0, fd)?)
    }

    /// Wait for events, at most `timeout_ms` (none: for ever), and append them to `out`.
    ///
    /// # Errors
    /// Never by a signal: that is an empty result.
    pub fn wait(&self, out: &mut Vec<Ready>, timeout_ms: Option<u64>) -> io::Result<()> {
        let timeout = timeout_ms.map(|ms| rustix::event::Timespec {
            tv_sec: (ms / 1000) as i64,
            tv_nsec: (ms % 1000) as i64 * 1_000_000,
        });
        let mut space = [MaybeUninit::<epoll::Event>::uninit(); 32];
        let events = match epoll::wait(&self.0, &mut space, timeout.as_ref()) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        for event in events {
            let flags = event.flags;
            let hangup = flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
            out.push(Ready {
                token: event.data.u64(),
                read: flags.contains(epoll::EventFlags::IN) || hangup,
                write: flags.contains(epoll::EventFlags::OUT),
                hangup,
            });
        }
        Ok(())
    }
}

/// Block SIGCHLD in this thread and get a descriptor that becomes readable when a child's state
/// changed (signalfd(2)).
///
/// # Errors
/// When no descriptor can be had.
pub fn child_signal() -> io::Result<OwnedFd> {
    // SAFETY: sigset calls over a local set; signalfd returns a fresh descriptor.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        if libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(OwnedFd::from_raw_fd(fd))
        }
    }
}

/// Wait until SIGCHLD is pending in this thread (which must have it blocked).
///
/// # Errors
/// Only by another signal's handler.
pub fn wait_child_signal() -> io::Result<()> {
    // SAFETY: sigset calls over a local set; a null siginfo is allowed.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        if libc::sigwaitinfo(&set, std::ptr::null_mut()) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A counter that wakes a poller.
///
/// # Errors
/// When no descriptor can be had.
pub fn eventfd() -> io::Result<OwnedFd> {
    use rustix::event::EventfdFlags;
    Ok(rustix::event::eventfd(
        0,
        EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
    )?)
}

/// A descriptor that becomes readable when the file at `path` is modified (inotify).
///
/// # Errors
/// When there is no such file or no watch left.
pub fn watch_modify(path: &std::path::Path) -> io::Result<OwnedFd> {
    use rustix::fs::inotify;
    let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(&fd, path, inotify::WatchFlags::MODIFY)?;
    Ok(fd)
}

/// Empty a non-blocking event descriptor (signalfd, eventfd, inotify), ignoring its content.
pub fn drain(fd: BorrowedFd<'_>) {
    let mut buffer = [0u8; 1024];
    // Bounded: the loop around will come back for the rest.
    for _ in 0..64 {
        match rustix::io::read(fd.as_fd(), &mut buffer) {
            Ok(n) if n > 0 => {}
            Ok(_) | Err(_) => return,
        }
    }
}

/// A pipe, both ends close-on-exec: (read, write).
///
/// # Errors
/// When no descriptor can be had.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?)
}

/// Make a descriptor's reads and writes return `WouldBlock` instead of waiting.
///
/// # Errors
/// Never in practice.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(
        fd,
        flags | rustix::fs::OFlags::NONBLOCK,
    )?)
}

/// Read into a buffer; retried when a signal interrupts.
///
/// # Errors
/// `WouldBlock` on an empty non-blocking descriptor, and any other refusal.
pub fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    Ok(rustix::io::retry_on_intr(|| {
        rustix::io::read(fd, &mut *buffer)
    })?)
}

/// Write a part of a buffer; retried when a signal interrupts.
///
/// # Errors
/// `WouldBlock` on a full non-blocking descriptor, and any other refusal.
pub fn write(fd: BorrowedFd<'_>, buffer: &[u8]) -> io::Result<usize> {
    Ok(rustix::io::retry_on_intr(|| rustix::io::write(fd, buffer))?)
}

/// Take over a socket that the parent left open under a number, as [`crate::process::spawn`]
/// does with descriptor 3. None when there is nothing or no socket. Call once per number, before
/// anything else is opened.
pub fn inherited_socket(number: i32) -> Option<OwnedFd> {
    // SAFETY: only asks for flags; any number may be asked.
    if number < 3 || unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return None;
    }
    // SAFETY: the descriptor is open (checked above) and the doc obliges the caller to ask before
    // anyone else could own it.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::net::sockopt::socket_type(&fd).ok()?;
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC).ok()?;
    Some(fd)
}
