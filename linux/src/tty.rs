//! Pseudo terminals.

#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Device number of the multiplexer, in /dev and in every devpts instance.
const PTMX_MAJOR: u32 = 5;
const PTMX_MINOR: u32 = 2;

/// A new terminal pair.
#[derive(Debug)]
pub struct Pty {
    /// The side that sees what the program writes.
    pub master: OwnedFd,
    /// The program's side.
    pub slave: OwnedFd,
    /// Its number: the slave is `/dev/pts/<number>` in the devpts instance it was made in.
    pub number: u32,
}

/// Make a pair from the devpts instance whose multiplexer is at `ptmx` (`/dev/pts/ptmx`), with
/// the slave owned by `uid`.
///
/// # Errors
/// Any refusal; `ENOENT` when no devpts is mounted there.
pub fn open_pty(ptmx: &str, uid: u32) -> io::Result<Pty> {
    let master = rustix::fs::open(
        ptmx,
        OFlags::RDWR | OFlags::NOCTTY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    // The container may have put anything there; only a real multiplexer is spoken to.
    let stat = rustix::fs::fstat(&master)?;
    if stat.st_rdev != rustix::fs::makedev(PTMX_MAJOR, PTMX_MINOR) {
        return Err(io::Error::from_raw_os_error(libc::ENOTTY));
    }
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(
        &master,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )?;
    let owner = rustix::fs::Uid::from_raw(uid);
    rustix::fs::fchown(&slave, Some(owner), None)?;
    let mut number: libc::c_uint = 0;
    // SAFETY: TIOCGPTN writes one unsigned int that lives over the call.
    let rc = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &mut number) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Pty {
        master,
        slave,
        number,
    })
}

/// Make a terminal the controlling terminal of this session.
///
/// # Errors
/// `EPERM` when this is no session leader or has one.
pub fn make_controlling(slave: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::process::ioctl_tiocsctty(slave)?)
}

/// Change the window size; the foreground process group receives SIGWINCH.
///
/// # Errors
/// `ENOTTY` when this is no terminal.
pub fn resize(master: BorrowedFd<'_>, width: u16, height: u16) -> io::Result<()> {
    let size = rustix::termios::Winsize {
        ws_row: height,
        ws_col: width,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(rustix::termios::tcsetwinsize(master.as_fd(), size)?)
}
