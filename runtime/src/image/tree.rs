//! A directory tree that paths cannot leave: the layer being unpacked.
//!
//! [`Tree`] resolves directories by `openat2(RESOLVE_IN_ROOT)`, [`At`] is one name in one
//! resolved directory; every change is made relative to that directory and never follows a link.

use super::error::UnpackError;
use super::unpack::lossy;
use rustix::fd::AsRawFd;
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timestamps, Uid, XattrFlags, openat2,
};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;

/// Symlinks followed while making missing parents; the kernel's own limit.
const MAX_LINKS: u32 = 40;

/// A resolved directory and how it was reached.
struct Dir {
    fd: OwnedFd,
    path: Vec<u8>,
}

/// The layer's directory, with the directory last entered kept open: archives list a directory's
/// entries together.
pub(crate) struct Tree {
    root: Rc<Dir>,
    current: Rc<Dir>,
    /// Whether a directory may have been replaced since `current` was resolved.
    stale: Rc<std::cell::Cell<bool>>,
}

/// A name in a resolved directory.
pub(crate) struct At {
    dir: Rc<Dir>,
    name: Vec<u8>,
    stale: Rc<std::cell::Cell<bool>>,
}

/// What [`At::clear`] removed.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Replaced {
    /// A directory with all in it.
    pub(crate) was_dir: bool,
    /// A whiteout.
    pub(crate) was_whiteout: bool,
}

fn failed(operation: &'static str, path: &[u8]) -> impl FnOnce(Errno) -> UnpackError + use<> {
    let path = lossy(path);
    move |errno| UnpackError::Io {
        operation,
        path,
        source: errno.into(),
    }
}

impl Tree {
    pub(crate) fn new(root: OwnedFd) -> Self {
        let root = Rc::new(Dir {
            fd: root,
            path: Vec::new(),
        });
        Self {
            current: Rc::clone(&root),
            root,
            stale: Rc::default(),
        }
    }

    /// Makes `path` the current directory; missing directories are made (0755, root) and
    /// returned.
    pub(crate) fn enter(&mut self, path: &[u8]) -> Result<Vec<String>, UnpackError> {
        if !self.stale.get() && self.current.path == path {
            return Ok(Vec::new());
        }
        self.stale.set(false);
        if path.is_empty() {
            self.current = Rc::clone(&self.root);
            return Ok(Vec::new());
        }
        let mut made = Vec::new();
        let fd = match self.resolve(path) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => self.make(path, &mut made, MAX_LINKS)?,
            Err(errno) => return Err(failed("enter directory", path)(errno)),
        };
        self.current = Rc::new(Dir {
            fd,
            path: path.to_vec(),
        });
        Ok(made)
    }

    fn resolve(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        loop {
            let opened = openat2(
                &self.root.fd,
                path,
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV,
            );
            // EAGAIN: something in the path was renamed meanwhile; nobody but us is here, so
            // this ends.
            if opened.as_ref().err() != Some(&Errno::AGAIN) {
                return opened;
            }
        }
    }

    /// Makes the missing directories of `path`, following links that stay in the layer.
    fn make(
        &self,
        path: &[u8],
        made: &mut Vec<String>,
        links_left: u32,
    ) -> Result<OwnedFd, UnpackError> {
        let mut prefix: Vec<u8> = Vec::with_capacity(path.len());
        let mut dir: Option<OwnedFd> = None;
        for part in path.split(|b| *b == b'/') {
            let above = prefix.clone();
            if !prefix.is_empty() {
                prefix.push(b'/');
            }
            prefix.extend_from_slice(part);
            let next = match self.resolve(&prefix) {
                Ok(fd) => fd,
                Err(Errno::NOENT) => {
                    let parent = dir.as_ref().unwrap_or(&self.root.fd);
                    match rustix::fs::mkdirat(parent, part, Mode::from_raw_mode(0o755)) {
                        Ok(()) => made.push(lossy(&prefix)),
                        // A link whose target is missing: make the target.
                        Err(Errno::EXIST) => {
                            let target = self.link_target(parent, part, &above, &prefix)?;
                            if links_left == 0 {
                                return Err(failed("follow links of", path)(Errno::LOOP));
                            }
                            self.make(&target, made, links_left - 1)?;
                        }
                        Err(errno) => return Err(failed("make directory", &prefix)(errno)),
                    }
                    self.resolve(&prefix)
                        .map_err(failed("enter directory", &prefix))?
                }
                Err(errno) => return Err(failed("enter directory", &prefix)(errno)),
            };
            dir = Some(next);
        }
        dir.ok_or_else(|| failed("enter directory", path)(Errno::NOENT))
    }

    /// Where the link `name` in the directory `above` leads, as a path from the layer's root.
    fn link_target(
        &self,
        parent: &OwnedFd,
        name: &[u8],
        above: &[u8],
        path: &[u8],
    ) -> Result<Vec<u8>, UnpackError> {
        let target = rustix::fs::readlinkat(parent, name, Vec::new())
            .map_err(failed("make directory", path))?;
        let target = target.as_bytes();
        let mut parts: Vec<&[u8]> = match target.starts_with(b"/") {
            true => Vec::new(),
            false => above
                .split(|b| *b == b'/')
                .filter(|p| !p.is_empty())
                .collect(),
        };
        for part in target.split(|b| *b == b'/') {
            match part {
                b"" | b"." => {}
                // As in a chroot, the root is its own parent.
                b".." => drop(parts.pop()),
                _ => parts.push(part),
            }
        }
        if parts.is_empty() {
            return Err(failed("follow link", path)(Errno::NOENT));
        }
        Ok(parts.join(&b'/'))
    }

    /// A name in the current directory.
    pub(crate) fn at(&self, name: &[u8]) -> At {
        At {
            dir: Rc::clone(&self.current),
            name: name.to_vec(),
            stale: Rc::clone(&self.stale),
        }
    }

    /// Hides all lower content of the current directory.
    pub(crate) fn set_opaque(&self) -> Result<(), UnpackError> {
        set_opaque(&self.current.fd, &self.current.path)
    }

    /// The directory `path` if it is (still) one; the root for the empty path.
    pub(crate) fn find_dir(&mut self, path: &[u8]) -> Result<Option<At>, UnpackError> {
        let (parent, name) = match path.iter().rposition(|b| *b == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&[][..], path),
        };
        if !parent.is_empty() {
            match self.resolve(parent) {
                Ok(_) => {}
                Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
                Err(errno) => return Err(failed("enter directory", parent)(errno)),
            }
        }
        self.enter(parent)?;
        let at = self.at(if name.is_empty() { b"." } else { name });
        Ok((at.kind()? == Some(FileType::Directory)).then_some(at))
    }

    /// Makes `at` a hard link to `name` in `parent`.
    pub(crate) fn link(&self, parent: &[u8], name: &[u8], at: &At) -> Result<(), UnpackError> {
        let resolved;
        let dir = if parent.is_empty() {
            &self.root.fd
        } else {
            resolved = self
                .resolve(parent)
                .map_err(|errno| missing_target(at, parent, errno))?;
            &resolved
        };
        rustix::fs::linkat(dir, name, &at.dir.fd, at.name.as_slice(), AtFlags::empty())
            .map_err(|errno| missing_target(at, name, errno))
    }
}

fn missing_target(at: &At, target: &[u8], errno: Errno) -> UnpackError {
    if errno == Errno::NOENT {
        let reason = format!(
            "hard link to {:?}, which is not in this layer",
            lossy(target)
        );
        return UnpackError::Entry {
            path: at.display(),
            reason,
        };
    }
    failed("link", &at.path())(errno)
}

fn set_opaque(dir: &OwnedFd, path: &[u8]) -> Result<(), UnpackError> {
    rustix::fs::fsetxattr(dir, "trusted.overlay.opaque", b"y", XattrFlags::empty())
        .map_err(failed("mark opaque", path))
}

impl At {
    fn path(&self) -> Vec<u8> {
        let mut path = self.dir.path.clone();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(&self.name);
        path
    }

    /// The whole path for messages.
    pub(crate) fn display(&self) -> String {
        lossy(&self.path())
    }

    fn fail(&self, operation: &'static str) -> impl FnOnce(Errno) -> UnpackError + use<> {
        failed(operation, &self.path())
    }

    /// What is there now.
    pub(crate) fn kind(&self) -> Result<Option<FileType>, UnpackError> {
        Ok(self.stat()?.map(|s| FileType::from_raw_mode(s.st_mode)))
    }

    fn stat(&self) -> Result<Option<rustix::fs::Stat>, UnpackError> {
        match rustix::fs::statat(
            &self.dir.fd,
            self.name.as_slice(),
            AtFlags::SYMLINK_NOFOLLOW,
        ) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(self.fail("stat")(errno)),
        }
    }

    /// Removes what is there.
    pub(crate) fn clear(&self) -> Result<Replaced, UnpackError> {
        let Some(stat) = self.stat()? else {
            return Ok(Replaced::default());
        };
        // It may have been part of the way to the current directory.
        self.stale.set(true);
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            // std's removal works by descriptors and follows no link.
            let below = format!("/proc/self/fd/{}", self.dir.fd.as_raw_fd());
            let path = Path::new(&below).join(OsStr::from_bytes(&self.name));
            std::fs::remove_dir_all(path).map_err(|source| UnpackError::Io {
                operation: "replace directory",
                path: self.display(),
                source,
            })?;
            return Ok(Replaced {
                was_dir: true,
                was_whiteout: false,
            });
        }
        rustix::fs::unlinkat(&self.dir.fd, self.name.as_slice(), AtFlags::empty())
            .map_err(self.fail("replace"))?;
        let was_whiteout =
            FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0;
        Ok(Replaced {
            was_dir: false,
            was_whiteout,
        })
    }

    /// Makes a directory whose attributes come later.
    pub(crate) fn mkdir(&self) -> Result<(), UnpackError> {
        rustix::fs::mkdirat(
            &self.dir.fd,
            self.name.as_slice(),
            Mode::from_raw_mode(0o755),
        )
        .map_err(self.fail("make directory"))
    }

    /// Makes an empty file, for us alone.
    pub(crate) fn create(&self) -> Result<File, UnpackError> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(
            &self.dir.fd,
            self.name.as_slice(),
            flags,
            Mode::from_raw_mode(0o600),
        )
        .map(File::from)
        .map_err(self.fail("create"))
    }

    /// Makes a symbolic link.
    pub(crate) fn symlink(&self, target: &[u8]) -> Result<(), UnpackError> {
        rustix::fs::symlinkat(target, &self.dir.fd, self.name.as_slice())
            .map_err(self.fail("make symlink"))
    }

    /// Makes a device, fifo or whiteout.
    pub(crate) fn node(&self, kind: FileType, device: u64) -> Result<(), UnpackError> {
        let mode = Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(&self.dir.fd, self.name.as_slice(), kind, mode, device)
            .map_err(self.fail("make node"))
    }

    /// Owner; not through a link.
    pub(crate) fn set_owner(&self, uid: u32, gid: u32) -> Result<(), UnpackError> {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        rustix::fs::chownat(&self.dir.fd, self.name.as_slice(), uid, gid, flags)
            .map_err(self.fail("set owner of"))
    }

    /// Mode; never called for a link.
    pub(crate) fn set_mode(&self, mode: Mode) -> Result<(), UnpackError> {
        rustix::fs::chmodat(&self.dir.fd, self.name.as_slice(), mode, AtFlags::empty())
            .map_err(self.fail("set mode of"))
    }

    /// Times; not through a link.
    pub(crate) fn set_times(&self, times: &Timestamps) -> Result<(), UnpackError> {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::utimensat(&self.dir.fd, self.name.as_slice(), times, flags)
            .map_err(self.fail("set times of"))
    }

    /// Extended attributes; not through a link.
    pub(crate) fn set_xattrs(&self, xattrs: &[(String, Vec<u8>)]) -> Result<(), UnpackError> {
        for (name, value) in xattrs {
            let mut path = format!("/proc/self/fd/{}/", self.dir.fd.as_raw_fd()).into_bytes();
            path.extend_from_slice(&self.name);
            let set =
                rustix::fs::lsetxattr(path.as_slice(), name.as_str(), value, XattrFlags::empty());
            // Links and devices take no user attributes; a filesystem may know none.
            match set {
                Ok(()) | Err(Errno::PERM | Errno::OPNOTSUPP) => {}
                Err(errno) => return Err(self.fail("set attribute of")(errno)),
            }
        }
        Ok(())
    }

    /// Hides all lower content of this directory.
    pub(crate) fn set_opaque(&self) -> Result<(), UnpackError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(&self.dir.fd, self.name.as_slice(), flags, Mode::empty())
            .map_err(self.fail("mark opaque"))?;
        set_opaque(&dir, &self.path())
    }

    /// Attributes of a file just written. Order matters: chown clears setuid and capabilities.
    pub(crate) fn finish_file(
        &self,
        file: &File,
        uid: u32,
        gid: u32,
        mode: Mode,
        xattrs: &[(String, Vec<u8>)],
        times: &Timestamps,
    ) -> Result<(), UnpackError> {
        rustix::fs::fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .map_err(self.fail("set owner of"))?;
        rustix::fs::fchmod(file, mode).map_err(self.fail("set mode of"))?;
        for (name, value) in xattrs {
            match rustix::fs::fsetxattr(file, name.as_str(), value, XattrFlags::empty()) {
                Ok(()) | Err(Errno::OPNOTSUPP) => {}
                Err(errno) => return Err(self.fail("set attribute of")(errno)),
            }
        }
        rustix::fs::futimens(file, times).map_err(self.fail("set times of"))
    }
}
