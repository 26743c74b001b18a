//! Paths beneath a root that may hold hostile symlinks: looked up, or made, without ever
//! leaving the root.
//!
//! Look-ups go through openat2(RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS). Making what is missing
//! needs a walk of our own, component by component on descriptors, because the kernel cannot
//! create along the way: each symlink is read and followed by us, `..` pops our own stack and so
//! can never climb above the root, and an absolute link starts again at the root.

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Symlinks followed before a path counts as a loop; the kernel's own number.
const MAX_SYMLINKS: usize = 40;

/// Open (O_PATH) an existing path beneath `root`, following symlinks within it.
///
/// # Errors
/// `ENOENT` when it does not exist.
pub fn lookup(root: BorrowedFd<'_>, path: &str) -> io::Result<OwnedFd> {
    open_in_root(root, path, OFlags::PATH | OFlags::CLOEXEC)
}

/// Open (O_PATH) a path beneath `base` that must not lead outside by any symlink or `..`, not
/// even one that comes back; missing directories are made with `mode`.
///
/// # Errors
/// `EXDEV` when it leads outside.
pub fn beneath(base: BorrowedFd<'_>, path: &str, mode: u32) -> io::Result<OwnedFd> {
    let open = || {
        rustix::fs::openat2(
            base,
            path,
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
        )
    };
    match retry_again(open) {
        Ok(fd) => Ok(fd),
        Err(Errno::NOENT) => {
            if path.split('/').any(|part| part == "..") || path.starts_with('/') {
                return Err(Errno::XDEV.into());
            }
            walk(base, path, Kind::Directory, mode, Escape::Refuse)
        }
        Err(error) => Err(error.into()),
    }
}

/// Open (O_PATH) a directory beneath `root`, making what is missing with `mode`.
///
/// # Errors
/// `ENOTDIR` when a file is in the way.
pub fn make_dirs(root: BorrowedFd<'_>, path: &str, mode: u32) -> io::Result<OwnedFd> {
    walk(root, path, Kind::Directory, mode, Escape::Contain)
}

/// Open (O_PATH) a file or whatever else is at `path` beneath `root`; an empty file is made when
/// there is nothing, with its directories.
///
/// # Errors
/// `ENOTDIR` when a file is in the way.
pub fn make_file(root: BorrowedFd<'_>, path: &str) -> io::Result<OwnedFd> {
    walk(root, path, Kind::File, 0o755, Escape::Contain)
}

/// Whether an O_PATH descriptor refers to a directory.
///
/// # Errors
/// Never in practice.
pub fn is_dir(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let stat = rustix::fs::fstat(fd)?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

/// A device node as [`make_node`] wants it.
#[derive(Debug, Clone, Copy)]
pub struct Node {
    /// Block instead of character device.
    pub block: bool,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Make a device node in the directory `dir`; one that is there with the same numbers is fine.
///
/// # Errors
/// `EEXIST` when something else is there, `EPERM` when nodes may not be made here.
pub fn make_node(dir: BorrowedFd<'_>, name: &str, node: Node) -> io::Result<()> {
    let kind = if node.block {
        FileType::BlockDevice
    } else {
        FileType::CharacterDevice
    };
    let dev = rustix::fs::makedev(node.major, node.minor);
    let mode = Mode::from_raw_mode(node.mode & 0o7777);
    match rustix::fs::mknodat(dir, name, kind, mode, dev) {
        Ok(()) => {}
        Err(Errno::EXIST) => {
            let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
            let same = FileType::from_raw_mode(stat.st_mode) == kind && stat.st_rdev == dev;
            return if same {
                Ok(())
            } else {
                Err(Errno::EXIST.into())
            };
        }
        Err(error) => return Err(error.into()),
    }
    // Again, because the umask took its share.
    rustix::fs::chmodat(dir, name, mode, AtFlags::empty())?;
    let (uid, gid) = (
        rustix::fs::Uid::from_raw(node.uid),
        rustix::fs::Gid::from_raw(node.gid),
    );
    Ok(rustix::fs::chownat(
        dir,
        name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

/// Make a symlink in the directory `dir`; anything already there is left as it is.
///
/// # Errors
/// The kernel's refusal.
pub fn ensure_symlink(dir: BorrowedFd<'_>, name: &str, target: &str) -> io::Result<()> {
    match rustix::fs::symlinkat(target, dir, name) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Directory,
    File,
}

/// What a link out of the root means.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Escape {
    /// As in a chroot: absolute links start at the root, `..` stops there.
    Contain,
    /// Refused with `EXDEV`.
    Refuse,
}

fn walk(
    root: BorrowedFd<'_>,
    path: &str,
    kind: Kind,
    mode: u32,
    escape: Escape,
) -> io::Result<OwnedFd> {
    let mut todo: VecDeque<String> = parts(path);
    let mut stack: Vec<OwnedFd> = Vec::new();
    let mut links = 0;
    while let Some(part) = todo.pop_front() {
        if part == ".." {
            if stack.pop().is_none() && escape == Escape::Refuse {
                return Err(Errno::XDEV.into());
            }
            continue;
        }
        let here = stack.last().map_or(root, AsFd::as_fd);
        let last = todo.is_empty();
        let next = open_or_make(here, &part, if last { kind } else { Kind::Directory }, mode)?;
        let stat = rustix::fs::fstat(&next)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => {
                links += 1;
                if links > MAX_SYMLINKS {
                    return Err(Errno::LOOP.into());
                }
                let target = rustix::fs::readlinkat(&next, "", Vec::new())?;
                let target = String::from_utf8(target.into_bytes())
                    .map_err(|_| io::Error::from(Errno::ILSEQ))?;
                if target.starts_with('/') {
                    if escape == Escape::Refuse {
                        return Err(Errno::XDEV.into());
                    }
                    stack.clear();
                }
                for part in parts(&target).into_iter().rev() {
                    todo.push_front(part);
                }
            }
            FileType::Directory => stack.push(next),
            _ if last && kind == Kind::File => return Ok(next),
            _ => return Err(Errno::NOTDIR.into()),
        }
    }
    match stack.pop() {
        Some(fd) => Ok(fd),
        None => Ok(rustix::io::fcntl_dupfd_cloexec(root, 0)?),
    }
}

fn open_or_make(dir: BorrowedFd<'_>, name: &str, kind: Kind, mode: u32) -> io::Result<OwnedFd> {
    // Two rounds: another container sharing a volume may make or remove it in between.
    for _ in 0..8 {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(dir, name, flags, Mode::empty()) {
            Ok(fd) => return Ok(fd),
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let made = match kind {
            Kind::Directory => rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(mode)),
            Kind::File => rustix::fs::openat(
                dir,
                name,
                OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::WRONLY,
                Mode::from_raw_mode(0o644),
            )
            .map(drop),
        };
        match made {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::AGAIN.into())
}

fn parts(path: &str) -> VecDeque<String> {
    path.split('/')
        .filter(|p| !p.is_empty() && *p != ".")
        .map(str::to_owned)
        .collect()
}

fn open_in_root(root: BorrowedFd<'_>, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
    let open = || {
        rustix::fs::openat2(
            root,
            path,
            flags,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        )
    };
    Ok(retry_again(open)?)
}

/// openat2 says EAGAIN when a rename raced with a `..`; a few tries are enough in practice.
fn retry_again(
    mut open: impl FnMut() -> rustix::io::Result<OwnedFd>,
) -> rustix::io::Result<OwnedFd> {
    for _ in 0..32 {
        match open() {
            Err(Errno::AGAIN) => {}
            other => return other,
        }
    }
    Err(Errno::AGAIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::path::{Path, PathBuf};

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("resolve-{}-{name}", std::process::id()));
            std::fs::create_dir_all(path.join("root")).unwrap();
            Self(path)
        }
        fn root(&self) -> OwnedFd {
            crate::mount::open_path(&self.0.join("root")).unwrap()
        }
        fn at(&self, path: &str) -> PathBuf {
            self.0.join("root").join(path)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn same(fd: &OwnedFd, path: &Path) {
        use std::os::unix::fs::MetadataExt;
        let (a, b) = (
            rustix::fs::fstat(fd).unwrap(),
            std::fs::metadata(path).unwrap(),
        );
        assert_eq!((a.st_dev, a.st_ino), (b.dev(), b.ino()));
    }

    #[test]
    fn missing_directories_and_files_are_made_beneath_the_root() {
        let dir = Dir::new("make");
        same(
            &make_dirs(dir.root().as_fd(), "/a/b/../c", 0o755).unwrap(),
            &dir.at("a/c"),
        );
        same(
            &make_file(dir.root().as_fd(), "/etc/x/hosts").unwrap(),
            &dir.at("etc/x/hosts"),
        );
        let error = make_dirs(dir.root().as_fd(), "/etc/x/hosts/y", 0o755).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTDIR));
    }

    #[test]
    fn links_never_lead_outside_when_making() {
        let dir = Dir::new("links");
        symlink("/run/stub/resolv.conf", dir.at("dangling")).unwrap();
        symlink("../../../../../up", dir.at("climb")).unwrap();
        symlink("loop", dir.at("loop")).unwrap();
        same(
            &make_file(dir.root().as_fd(), "/dangling").unwrap(),
            &dir.at("run/stub/resolv.conf"),
        );
        same(
            &make_dirs(dir.root().as_fd(), "/climb/x", 0o755).unwrap(),
            &dir.at("up/x"),
        );
        let error = make_dirs(dir.root().as_fd(), "/loop", 0o755).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn a_sub_path_that_leads_outside_is_refused() {
        let dir = Dir::new("beneath");
        symlink("/etc", dir.at("absolute")).unwrap();
        symlink("..", dir.at("up")).unwrap();
        std::fs::create_dir(dir.at("in")).unwrap();
        symlink("in", dir.at("fine")).unwrap();
        same(
            &beneath(dir.root().as_fd(), "fine", 0o750).unwrap(),
            &dir.at("in"),
        );
        same(
            &beneath(dir.root().as_fd(), "fine/new/er", 0o750).unwrap(),
            &dir.at("in/new/er"),
        );
        for bad in [
            "absolute",
            "up",
            "up/missing",
            "absolute/missing/x",
            "../x",
            "in/../../x",
        ] {
            let error = beneath(dir.root().as_fd(), bad, 0o750).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EXDEV), "{bad}: {error}");
        }
    }
}
