//! User namespaces with one range of ids (user_namespaces(7)).

use super::clone::{self, CloneFlags, Cloned};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// The ids of a user namespace: 0 and up inside are `first` and up outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// First id outside.
    pub first: u32,
    /// How many.
    pub length: u32,
}

impl IdRange {
    /// The id outside of one inside; none beyond the range.
    #[must_use]
    pub fn outside(self, id: u32) -> Option<u32> {
        (id < self.length).then(|| self.first.checked_add(id))?
    }
}

/// Write both maps of the user namespace of a process; once only, by its parent.
///
/// # Errors
/// `EPERM` without CAP_SETUID and CAP_SETGID over the ids, or when they are written already.
pub fn write_maps(pid: i32, range: IdRange) -> io::Result<()> {
    let text = format!("0 {} {}\n", range.first, range.length);
    std::fs::write(format!("/proc/{pid}/uid_map"), &text)?;
    std::fs::write(format!("/proc/{pid}/gid_map"), &text)
}

/// Namespaces made by [`create`].
#[derive(Debug)]
pub struct Created {
    /// The user namespace; it lives as long as this descriptor or a process in it.
    pub user: OwnedFd,
    /// Handle on the process that made them, which ends when this is dropped.
    pub holder: Holder,
}

/// A process that waits inside new namespaces until it is let go.
#[derive(Debug)]
pub struct Holder {
    /// Handle on it, for [`super::namespace::join`].
    pub pidfd: OwnedFd,
    /// What it waits for the end of.
    _wait: OwnedFd,
}

/// Make a user namespace with the given ids and the other namespaces of `flags` belonging to it.
/// As user 0 inside, the new process runs `inside`, whose failure is the result; the caller gets
/// it once that is done. The process must have one thread, and reaps the holder later.
///
/// # Errors
/// The kernel's refusal, or the error `inside` came to (by its number only).
pub fn create(
    flags: CloneFlags,
    range: IdRange,
    inside: impl FnOnce() -> io::Result<()>,
) -> io::Result<Created> {
    let (mapped, tell_mapped) = crate::event::pipe()?;
    let (done, tell_done) = crate::event::pipe()?;
    let flags = CloneFlags {
        new_user: true,
        ..flags
    };
    match clone::clone3(flags)? {
        Cloned::Child => {
            drop((tell_mapped, done));
            let code = run_holder(&mapped, &tell_done, inside);
            clone::exit_child(code)
        }
        Cloned::Parent { pid, pidfd } => {
            drop((mapped, tell_done));
            write_maps(pid, range)?;
            crate::event::write(tell_mapped.as_fd(), b"m")?;
            let mut answer = [0u8; 4];
            if crate::event::read(done.as_fd(), &mut answer)? != answer.len() {
                return Err(io::Error::other("the namespaces' first process died"));
            }
            match i32::from_le_bytes(answer) {
                0 => {}
                errno => return Err(io::Error::from_raw_os_error(errno)),
            }
            let user = std::fs::File::open(format!("/proc/{pid}/ns/user"))?.into();
            let holder = Holder {
                pidfd,
                _wait: tell_mapped,
            };
            Ok(Created { user, holder })
        }
    }
}

fn run_holder(
    mapped: &OwnedFd,
    tell_done: &OwnedFd,
    inside: impl FnOnce() -> io::Result<()>,
) -> i32 {
    let _ = super::attrs::die_with_parent();
    let mut byte = [0u8; 1];
    if crate::event::read(mapped.as_fd(), &mut byte).unwrap_or(0) != 1 {
        return 1;
    }
    let outcome = crate::user::become_user(0, 0, &[])
        // Cleared by the change of user.
        .and_then(|()| super::attrs::die_with_parent())
        .and_then(|()| inside());
    let errno = match outcome {
        Ok(()) => 0,
        Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
    };
    let _ = crate::event::write(tell_done.as_fd(), &errno.to_le_bytes());
    let _ = crate::event::read(mapped.as_fd(), &mut byte);
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_inside_are_counted_from_the_first_outside() {
        let range = IdRange {
            first: 65536,
            length: 65536,
        };
        assert_eq!(range.outside(0), Some(65536));
        assert_eq!(range.outside(65535), Some(131_071));
        assert_eq!(range.outside(65536), None);
        let end = IdRange {
            first: u32::MAX - 1,
            length: 10,
        };
        assert_eq!(end.outside(5), None);
    }
}
