//! Files handled so that a kill, a hostile tree or a foreign mount can do no harm.
//!
//! * [`write_atomic`]: a reader sees the old or the new content, never a part.
//! * [`open_in_root`], [`read_in_root`]: paths chosen by somebody else, resolved with openat2(2)
//!   so that neither `..` nor a symbolic link leads out.
//! * [`remove_tree`]: deletes without following a symbolic link or entering a mount.
//!
//! Everything blocks. Nothing here decides what may be deleted: the caller proves it is his.

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, fsync, mkdirat, openat, openat2,
    renameat, unlinkat,
};
use rustix::io::Errno;
use std::ffi::{CStr, CString, OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Directories held open at once by [`remove_tree`]; deeper ones are first moved up.
const MAX_OPEN_DIRS: usize = 64;

/// openat2 may be told to try again when a rename races with `..` inside the root.
const RESOLVE_ATTEMPTS: u32 = 32;

/// Whether a written file must survive power loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// It must survive a kill of this process only.
    Process,
    /// It must survive power loss: fsync of file and directory.
    PowerLoss,
}

/// A file operation failed.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The kernel refused.
    #[error("{operation} {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A tree to be removed holds a mount; nothing behind it was touched.
    #[error("remove {path}: a filesystem is mounted there")]
    Mounted {
        /// The mount point.
        path: PathBuf,
    },
    /// A file is longer than its reader accepts.
    #[error("read {path}: longer than {limit} bytes")]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The most accepted.
        limit: usize,
    },
    /// A path that names no entry of a directory (empty, `/`, ends in `..`).
    #[error("{path} names no file")]
    NoName {
        /// The path.
        path: PathBuf,
    },
}

impl FsError {
    fn io(operation: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io {
            operation,
            path: path.to_owned(),
            source: source.into(),
        }
    }

    /// The kernel's error number, when it was the kernel that refused.
    #[must_use]
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Io { source, .. } => source.raw_os_error(),
            Self::Mounted { .. } | Self::TooLong { .. } | Self::NoName { .. } => None,
        }
    }

    /// Whether the object simply is not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.raw_os_error() == Some(Errno::NOENT.raw_os_error())
    }
}

/// Replaces the content of `path` in one step, with permission bits `mode`.
///
/// The new content is written beside it as `.<name>.new` and renamed; a kill leaves at most that
/// file, which the next write uses again. Two writers of one path must exclude each other.
///
/// # Errors
/// [`FsError::Io`] naming the step; the old content is intact then.
pub fn write_atomic(
    path: &Path,
    content: &[u8],
    mode: u32,
    durability: Durability,
) -> Result<(), FsError> {
    let (parent, name) = split(path)?;
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(".new");
    let temporary_path = parent.join(&temporary);
    let dir = openat(CWD, parent, dir_flags(), Mode::empty())
        .map_err(|e| FsError::io("open", parent, e))?;
    let flags =
        OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = openat(&dir, &temporary, flags, Mode::from_raw_mode(mode))
        .map_err(|e| FsError::io("create", &temporary_path, e))?;
    rustix::fs::fchmod(&fd, Mode::from_raw_mode(mode))
        .map_err(|e| FsError::io("set the mode of", &temporary_path, e))?;
    let mut file = std::fs::File::from(fd);
    if let Err(e) = file.write_all(content) {
        // On a full disk not even half of it may stay.
        let _ = unlinkat(&dir, &temporary, AtFlags::empty());
        return Err(FsError::io("write", &temporary_path, e));
    }
    if durability == Durability::PowerLoss {
        fsync(&file).map_err(|e| FsError::io("sync", &temporary_path, e))?;
    }
    renameat(&dir, &temporary, &dir, name).map_err(|e| FsError::io("rename to", path, e))?;
    if durability == Durability::PowerLoss {
        fsync(&dir).map_err(|e| FsError::io("sync", parent, e))?;
    }
    Ok(())
}

/// Opens `path` as a process whose root is `root` would: symbolic links and `..` stay inside.
///
/// # Errors
/// What openat2(2) says.
pub fn open_in_root(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    mode: Mode,
) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    for _ in 1..RESOLVE_ATTEMPTS {
        match openat2(root, path, flags | OFlags::CLOEXEC, mode, resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            outcome => return outcome,
        }
    }
    openat2(root, path, flags | OFlags::CLOEXEC, mode, resolve)
}

/// Reads a regular file inside a root, refusing one longer than `limit` bytes.
///
/// # Errors
/// [`FsError::Io`] (not found included), or [`FsError::TooLong`].
pub fn read_in_root(root: &Path, path: &Path, limit: usize) -> Result<Vec<u8>, FsError> {
    let full = root.join(path.strip_prefix("/").unwrap_or(path));
    let dir = open_dir(root)?;
    // O_NONBLOCK: a fifo planted in an image must not hang us.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = open_in_root(dir.as_fd(), path, flags, Mode::empty())
        .map_err(|e| FsError::io("open", &full, e))?;
    let stat = rustix::fs::fstat(&fd).map_err(|e| FsError::io("inspect", &full, e))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(FsError::io("read", &full, Errno::INVAL));
    }
    read_limited(std::fs::File::from(fd), &full, limit)
}

/// Reads a whole file of our own, refusing one longer than `limit` bytes, and anything that is no
/// regular file: whoever opens a FIFO waits for its other end.
///
/// # Errors
/// [`FsError::Io`] (not found included), or [`FsError::TooLong`].
pub fn read_file(path: &Path, limit: usize) -> Result<Vec<u8>, FsError> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::File::options();
    options.read(true).custom_flags(libc::O_NONBLOCK);
    let file = options
        .open(path)
        .map_err(|e| FsError::io("open", path, e))?;
    let metadata = file
        .metadata()
        .map_err(|e| FsError::io("inspect", path, e))?;
    if metadata.is_dir() {
        return Err(FsError::io("read", path, Errno::ISDIR));
    }
    if !metadata.is_file() {
        return Err(FsError::io("read", path, Errno::INVAL));
    }
    read_limited(file, path, limit)
}

fn read_limited(file: std::fs::File, path: &Path, limit: usize) -> Result<Vec<u8>, FsError> {
    let mut content = Vec::new();
    file.take(limit as u64 + 1)
        .read_to_end(&mut content)
        .map_err(|e| FsError::io("read", path, e))?;
    if content.len() > limit {
        return Err(FsError::TooLong {
            path: path.to_owned(),
            limit,
        });
    }
    Ok(content)
}

/// Makes a directory and its missing parents with permission bits `mode` (less the umask).
///
/// # Errors
/// [`FsError::Io`] naming the directory.
pub fn create_dirs(path: &Path, mode: u32) -> Result<(), FsError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(|e| FsError::io("make directory", path, e))
}

/// Makes one directory with exactly these permission bits; an existing one is fine.
///
/// # Errors
/// [`FsError::Io`] naming the directory.
pub fn ensure_dir(path: &Path, mode: u32) -> Result<(), FsError> {
    match mkdirat(CWD, path, Mode::from_raw_mode(mode)) {
        Ok(()) => {
            // mkdir takes the umask away.
            let bits = std::os::unix::fs::PermissionsExt::from_mode(mode);
            std::fs::set_permissions(path, bits).map_err(|e| FsError::io("set mode of", path, e))
        }
        Err(Errno::EXIST) if path.is_dir() => Ok(()),
        Err(e) => Err(FsError::io("make directory", path, e)),
    }
}

/// Names in a directory, sorted; none when it does not exist.
///
/// # Errors
/// [`FsError::Io`] when it cannot be read.
pub fn list_dir(path: &Path) -> Result<Vec<OsString>, FsError> {
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(FsError::io("list", path, e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| FsError::io("list", path, e))?;
        names.push(entry.file_name());
    }
    names.sort();
    Ok(names)
}

/// Removes one file (or symbolic link). One that is not there is fine.
///
/// # Errors
/// [`FsError::Io`].
pub fn remove_file(path: &Path) -> Result<(), FsError> {
    match unlinkat(CWD, path, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(FsError::io("remove", path, e)),
    }
}

/// Removes `path` and all below it. Symbolic links are removed, not followed; a mount anywhere
/// in the tree (also one of the same filesystem) stops it before anything behind the mount is
/// touched. A path that does not exist is fine. Holds a bounded number of descriptors however
/// deep the tree.
///
/// # Errors
/// [`FsError::Mounted`], or [`FsError::Io`] naming the entry.
pub fn remove_tree(path: &Path) -> Result<(), FsError> {
    let (parent_path, name) = split(path)?;
    let parent = match openat(CWD, parent_path, dir_flags(), Mode::empty()) {
        Ok(parent) => parent,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        Err(e) => return Err(FsError::io("open", parent_path, e)),
    };
    let name = cstring(name, path)?;
    let Entry::Directory(top) = unlink_or_open(parent.as_fd(), &name, path)? else {
        return Ok(());
    };
    let mut moved = 0u64;
    // Each round empties the top but for what was moved up to it during the round.
    loop {
        let before = moved;
        empty(&top, path, &mut moved)?;
        if moved == before {
            break;
        }
    }
    remove_empty(parent.as_fd(), &name, path)
}

/// One directory on the way down.
struct Level {
    fd: OwnedFd,
    names: Vec<CString>,
    /// The name it has in the level above; none for the top.
    name: Option<CString>,
}

fn empty(top: &OwnedFd, path: &Path, moved: &mut u64) -> Result<(), FsError> {
    let first = top
        .try_clone()
        .map_err(|e| FsError::io("duplicate descriptor of", path, e))?;
    let mut here = path.to_owned();
    let mut levels = vec![level(first, None, path)?];
    while let Some(last) = levels.last_mut() {
        let Some(name) = last.names.pop() else {
            let done = levels.pop().and_then(|l| l.name);
            if let (Some(name), Some(above)) = (done, levels.last()) {
                remove_empty(above.fd.as_fd(), &name, &here)?;
                here.pop();
            }
            continue;
        };
        let child = here.join(OsStr::from_bytes(name.to_bytes()));
        match unlink_or_open(last.fd.as_fd(), &name, &child)? {
            Entry::Gone => {}
            Entry::Directory(fd) if levels.len() < MAX_OPEN_DIRS => {
                levels.push(level(fd, Some(name), &child)?);
                here = child;
            }
            Entry::Directory(_) => {
                *moved += 1;
                let up = format!(".ferrule-removing-{moved}");
                let from = &levels[levels.len() - 1].fd;
                renameat(from, &name, top, up).map_err(|e| FsError::io("move", &child, e))?;
            }
        }
    }
    Ok(())
}

fn level(fd: OwnedFd, name: Option<CString>, path: &Path) -> Result<Level, FsError> {
    let mut names = Vec::new();
    for entry in Dir::read_from(&fd).map_err(|e| FsError::io("list", path, e))? {
        let entry = entry.map_err(|e| FsError::io("list", path, e))?;
        let entry = entry.file_name();
        if entry != c"." && entry != c".." {
            names.push(entry.to_owned());
        }
    }
    Ok(Level { fd, names, name })
}

enum Entry {
    Gone,
    Directory(OwnedFd),
}

/// Unlinks what is no directory; opens what is one, unless it is on another mount.
fn unlink_or_open(dir: BorrowedFd<'_>, name: &CStr, path: &Path) -> Result<Entry, FsError> {
    match unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(Entry::Gone),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(Errno::BUSY) => return Err(mounted(path)),
        Err(e) => return Err(FsError::io("remove", path, e)),
    }
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
    match openat2(dir, name, dir_flags(), Mode::empty(), resolve) {
        Ok(fd) => Ok(Entry::Directory(fd)),
        Err(Errno::NOENT) => Ok(Entry::Gone),
        Err(Errno::XDEV) => Err(mounted(path)),
        Err(e) => Err(FsError::io("open", path, e)),
    }
}

fn remove_empty(dir: BorrowedFd<'_>, name: &CStr, path: &Path) -> Result<(), FsError> {
    match unlinkat(dir, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::BUSY) => Err(mounted(path)),
        Err(e) => Err(FsError::io("remove", path, e)),
    }
}

fn mounted(path: &Path) -> FsError {
    FsError::Mounted {
        path: path.to_owned(),
    }
}

/// Opens a directory of our own (the last component may not be a symbolic link).
///
/// # Errors
/// [`FsError::Io`].
pub fn open_dir(path: &Path) -> Result<OwnedFd, FsError> {
    openat(CWD, path, dir_flags(), Mode::empty()).map_err(|e| FsError::io("open", path, e))
}

fn dir_flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

fn split(path: &Path) -> Result<(&Path, &OsStr), FsError> {
    let none = || FsError::NoName {
        path: path.to_owned(),
    };
    let name = path.file_name().ok_or_else(none)?;
    let parent = path.parent().ok_or_else(none)?;
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    Ok((parent, name))
}

fn cstring(name: &OsStr, path: &Path) -> Result<CString, FsError> {
    CString::new(name.as_bytes()).map_err(|_| FsError::NoName {
        path: path.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A directory under the system's temporary one, gone with the value.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("fs-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = remove_tree(&self.0);
        }
    }

    #[test]
    fn an_atomic_write_replaces_content_and_leaves_nothing_beside_it() {
        let scratch = Scratch::new("atomic");
        let file = scratch.0.join("a.json");
        write_atomic(&file, b"one", 0o600, Durability::Process).unwrap();
        write_atomic(&file, b"two", 0o600, Durability::PowerLoss).unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"two");
        assert_eq!(list_dir(&scratch.0).unwrap(), ["a.json"]);
    }

    #[test]
    fn a_link_in_a_root_cannot_lead_out_of_it() {
        let scratch = Scratch::new("inroot");
        let root = scratch.0.join("root");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        std::fs::write(scratch.0.join("secret"), "outside").unwrap();
        std::fs::write(root.join("secret"), "inside").unwrap();
        symlink("/secret", root.join("etc/abs")).unwrap();
        symlink("../../../secret", root.join("etc/up")).unwrap();
        for link in ["/etc/abs", "etc/up"] {
            let read = read_in_root(&root, Path::new(link), 100).unwrap();
            assert_eq!(read, b"inside");
        }
    }

    #[test]
    fn a_file_longer_than_the_limit_is_refused() {
        let scratch = Scratch::new("limit");
        std::fs::write(scratch.0.join("f"), "12345").unwrap();
        let read = read_in_root(&scratch.0, Path::new("f"), 4);
        assert!(matches!(read, Err(FsError::TooLong { .. })));
    }

    #[test]
    fn removing_a_tree_removes_links_but_not_what_they_name() {
        let scratch = Scratch::new("links");
        let kept = scratch.0.join("kept");
        std::fs::create_dir(&kept).unwrap();
        std::fs::write(kept.join("f"), "x").unwrap();
        let tree = scratch.0.join("tree");
        std::fs::create_dir(&tree).unwrap();
        symlink(&kept, tree.join("link")).unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
        assert!(kept.join("f").exists());
        remove_tree(&tree).unwrap();
    }

    #[test]
    fn a_tree_deeper_than_the_descriptor_limit_is_removed() {
        let scratch = Scratch::new("deep");
        let tree = scratch.0.join("tree");
        std::fs::create_dir(&tree).unwrap();
        let mut dir = open_dir(&tree).unwrap();
        for _ in 0..3000 {
            mkdirat(&dir, "d", Mode::from_raw_mode(0o700)).unwrap();
            dir = openat(&dir, "d", dir_flags(), Mode::empty()).unwrap();
        }
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
    }

    #[test]
    fn removing_never_enters_a_mount_not_even_one_of_the_same_filesystem() {
        let scratch = Scratch::new("mount");
        let foreign = scratch.0.join("foreign");
        let point = scratch.0.join("tree/a/point");
        std::fs::create_dir_all(&foreign).unwrap();
        std::fs::create_dir_all(&point).unwrap();
        std::fs::write(foreign.join("precious"), "x").unwrap();
        // A mount namespace belongs to a thread here: nothing outside sees this mount.
        let outcome = std::thread::scope(|scope| {
            let body = || {
                // SAFETY: only this thread's filesystem context is unshared.
                #[expect(unsafe_code, reason = "unshare is unsafe in rustix")]
                let unshared =
                    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) };
                unshared.expect("a mount namespace needs CAP_SYS_ADMIN");
                rustix::mount::mount_change(
                    "/",
                    rustix::mount::MountPropagationFlags::PRIVATE
                        | rustix::mount::MountPropagationFlags::REC,
                )
                .unwrap();
                rustix::mount::mount_bind(&foreign, &point).unwrap();
                remove_tree(&scratch.0.join("tree"))
            };
            scope.spawn(body).join().unwrap()
        });
        assert!(matches!(outcome, Err(FsError::Mounted { .. })));
        assert!(foreign.join("precious").exists());
    }
}
