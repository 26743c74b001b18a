//! Turns one layer archive into one directory in overlayfs form.
//!
//! A layer is unpacked alone, without its parents: whiteouts become character devices 0/0,
//! opaque directories carry `trusted.overlay.opaque` (kernel: filesystems/overlayfs, "whiteouts
//! and opaque directories"), so layers can be unpacked in parallel and shared by images.
//!
//! The archive is hostile. Every path is resolved by `openat2(RESOLVE_IN_ROOT)` on the layer's
//! own directory: a symlink in the archive can only lead to another place in the same layer.
//! Sizes, entry counts and header sizes are bounded. The `tar` crate is only the parser.
//!
//! Blocking; runs on a thread of its own.

use super::error::UnpackError;
use super::tree::{At, Tree};
use rustix::fs::{FileType, Mode, Timespec, Timestamps};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::rc::Rc;

/// Bounds on what a layer may hold. They stop bombs, not users: real layers stay far below.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of file content.
    pub bytes: u64,
    /// Entries.
    pub entries: u64,
    /// Bytes the parser may read between two entries (long names, PAX records).
    pub header_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: 256 << 30,
            entries: 8 << 20,
            header_bytes: 4 << 20,
        }
    }
}

/// What was unpacked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Applied {
    /// Bytes of file content.
    pub bytes: u64,
    /// Entries read.
    pub entries: u64,
    /// Directories that had to be made though the archive has no entry for them, in order.
    /// Their owner and mode are those of the layer below, see `parents`.
    pub implicit_dirs: Vec<String>,
}

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Unpacks the tar stream below `root`, an empty directory of our own.
///
/// # Errors
/// See [`UnpackError`]; what was written so far stays and is the caller's to remove.
pub(crate) fn apply<R: Read>(
    tar: R,
    root: OwnedFd,
    limits: Limits,
) -> Result<Applied, UnpackError> {
    let budget = Rc::new(Cell::new(limits.header_bytes));
    let mut archive = tar::Archive::new(HeaderGuard {
        inner: tar,
        budget: Rc::clone(&budget),
    });
    let mut applier = Applier {
        tree: Tree::new(root),
        limits,
        done: Applied::default(),
        dirs: BTreeMap::new(),
    };
    let mut entries = archive.entries().map_err(UnpackError::Archive)?;
    loop {
        budget.set(limits.header_bytes);
        let Some(entry) = entries.next() else { break };
        let mut entry = entry.map_err(UnpackError::Archive)?;
        budget.set(u64::MAX);
        applier.entry(&mut entry)?;
        // What an entry's handler left unread must not count as header.
        io::copy(&mut entry, &mut io::sink()).map_err(UnpackError::Archive)?;
    }
    applier.finish()
}

/// Bounds what the parser reads on its own account: the `tar` crate collects long names and PAX
/// records in memory whatever their announced size.
struct HeaderGuard<R> {
    inner: R,
    budget: Rc<Cell<u64>>,
}

impl<R: Read> Read for HeaderGuard<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buf)?;
        let left = self.budget.get();
        if left != u64::MAX {
            let left = left.checked_sub(read as u64).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, "entry header is too large")
            })?;
            self.budget.set(left);
        }
        Ok(read)
    }
}

/// Attributes of one entry.
struct Meta {
    uid: u32,
    gid: u32,
    mode: Mode,
    times: Timestamps,
    xattrs: Vec<(String, Vec<u8>)>,
}

struct Applier {
    tree: Tree,
    limits: Limits,
    done: Applied,
    /// Directories whose attributes are set at the end: making entries inside changes mtime,
    /// and a mode without `w` must not hinder us.
    dirs: BTreeMap<Vec<u8>, Meta>,
}

impl Applier {
    fn entry<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>) -> Result<(), UnpackError> {
        self.done.entries += 1;
        if self.done.entries > self.limits.entries {
            return Err(UnpackError::TooLarge {
                limit: self.limits.entries,
                unit: "entries",
            });
        }
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() {
            return Ok(());
        }
        let raw = entry.path_bytes().into_owned();
        let path = clean(&raw)?;
        let Some((parent, name)) = split(&path) else {
            // The layer's root itself.
            let meta = meta(entry)?;
            self.dirs.insert(Vec::new(), meta);
            return Ok(());
        };
        if name.starts_with(WHITEOUT) {
            return self.whiteout(parent, name);
        }
        let at = self.parent(parent)?.at(name);
        let meta = meta(entry)?;
        let is_dir = kind.is_dir() || (kind.is_file() && raw.ends_with(b"/"));
        if is_dir {
            return self.directory(&at, &path, meta);
        }
        let replaced = at.clear()?;
        if replaced.was_dir {
            self.forget_dirs(&path);
        }
        match kind {
            tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse => {
                self.regular(&at, entry, &meta)?;
            }
            tar::EntryType::Link => return self.hardlink(&at, entry, &path),
            tar::EntryType::Symlink => {
                let target = link_target(entry, &path)?;
                at.symlink(&target)?;
            }
            tar::EntryType::Char => at.node(FileType::CharacterDevice, device(entry)?)?,
            tar::EntryType::Block => at.node(FileType::BlockDevice, device(entry)?)?,
            tar::EntryType::Fifo => at.node(FileType::Fifo, 0)?,
            other => {
                return Err(UnpackError::Entry {
                    path: lossy(&path),
                    reason: format!("type {:?} is not supported", char::from(other.as_byte())),
                });
            }
        }
        if kind.is_file() || kind == tar::EntryType::GNUSparse || kind.is_contiguous() {
            return Ok(());
        }
        at.set_owner(meta.uid, meta.gid)?;
        if kind != tar::EntryType::Symlink {
            at.set_mode(meta.mode)?;
        }
        at.set_xattrs(&meta.xattrs)?;
        at.set_times(&meta.times)
    }

    /// The directory `path`, made with its missing parents if need be.
    fn parent(&mut self, path: &[u8]) -> Result<&mut Tree, UnpackError> {
        let made = self.tree.enter(path)?;
        self.done.implicit_dirs.extend(made);
        Ok(&mut self.tree)
    }

    fn whiteout(&mut self, parent: &[u8], name: &[u8]) -> Result<(), UnpackError> {
        let opaque = name == OPAQUE;
        let hidden = &name[WHITEOUT.len()..];
        if !opaque && (hidden.starts_with(WHITEOUT) || matches!(hidden, b"" | b"." | b"..")) {
            // aufs bookkeeping (.wh..wh.plnk, .wh..wh.aufs), or nonsense: hides nothing.
            return Ok(());
        }
        let tree = self.parent(parent)?;
        if opaque {
            return tree.set_opaque();
        }
        // A whiteout speaks of lower layers only: an entry of the same name in this layer stays,
        // and hides a lower file anyway; a directory must not merge with a lower one.
        let at = tree.at(hidden);
        match at.kind()? {
            None => at.node(FileType::CharacterDevice, 0),
            Some(FileType::Directory) => at.set_opaque(),
            Some(_) => Ok(()),
        }
    }

    fn directory(&mut self, at: &At, path: &[u8], meta: Meta) -> Result<(), UnpackError> {
        if at.kind()? != Some(FileType::Directory) {
            let replaced = at.clear()?;
            at.mkdir()?;
            if replaced.was_whiteout {
                at.set_opaque()?;
            }
        }
        let text = lossy(path);
        // Now it has an entry.
        if let Some(found) = self.done.implicit_dirs.iter().position(|d| *d == text) {
            self.done.implicit_dirs.remove(found);
        }
        self.dirs.insert(path.to_vec(), meta);
        Ok(())
    }

    fn regular<R: Read>(
        &mut self,
        at: &At,
        entry: &mut tar::Entry<'_, R>,
        meta: &Meta,
    ) -> Result<(), UnpackError> {
        let left = self.limits.bytes - self.done.bytes;
        let mut file = at.create()?;
        let written = copy(&mut entry.take(left), &mut file, at)?;
        self.done.bytes += written;
        if written == left && entry.read(&mut [0]).map_err(UnpackError::Archive)? > 0 {
            return Err(UnpackError::TooLarge {
                limit: self.limits.bytes,
                unit: "bytes",
            });
        }
        at.finish_file(
            &file,
            meta.uid,
            meta.gid,
            meta.mode,
            &meta.xattrs,
            &meta.times,
        )
    }

    fn hardlink<R: Read>(
        &mut self,
        at: &At,
        entry: &tar::Entry<'_, R>,
        path: &[u8],
    ) -> Result<(), UnpackError> {
        let target = clean(&link_target(entry, path)?)?;
        let Some((parent, name)) = split(&target) else {
            return Err(UnpackError::Entry {
                path: lossy(path),
                reason: "hard link to the root".to_owned(),
            });
        };
        self.tree.link(parent, name, at)
    }

    fn forget_dirs(&mut self, path: &[u8]) {
        let inside = |p: &[u8]| {
            p == path || (p.len() > path.len() && p.starts_with(path) && p[path.len()] == b'/')
        };
        self.dirs.retain(|p, _| !inside(p));
        self.done.implicit_dirs.retain(|p| !inside(p.as_bytes()));
    }

    fn finish(mut self) -> Result<Applied, UnpackError> {
        // Children before parents, so that a parent's mtime is the last thing to change.
        for (path, meta) in self.dirs.iter().rev() {
            let Some(at) = self.tree.find_dir(path)? else {
                continue;
            };
            at.set_owner(meta.uid, meta.gid)?;
            at.set_mode(meta.mode)?;
            at.set_xattrs(&meta.xattrs)?;
            at.set_times(&meta.times)?;
        }
        Ok(self.done)
    }
}

/// Copies content; tells a broken archive from a failing disk.
fn copy(from: &mut impl Read, to: &mut impl io::Write, at: &At) -> Result<u64, UnpackError> {
    let mut buf = vec![0u8; 128 << 10];
    let mut total = 0;
    loop {
        let read = match from.read(&mut buf) {
            Ok(0) => return Ok(total),
            Ok(read) => read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(UnpackError::Archive(e)),
        };
        to.write_all(&buf[..read])
            .map_err(|source| UnpackError::Io {
                operation: "write",
                path: at.display(),
                source,
            })?;
        total += read as u64;
    }
}

fn meta<R: Read>(entry: &mut tar::Entry<'_, R>) -> Result<Meta, UnpackError> {
    let header = entry.header();
    let id = |v: io::Result<u64>| -> Result<u32, UnpackError> {
        let v = v.map_err(UnpackError::Archive)?;
        u32::try_from(v).map_err(|_| {
            UnpackError::Archive(io::Error::new(
                io::ErrorKind::InvalidData,
                "owner out of range",
            ))
        })
    };
    let fields = header.as_old();
    let uid = id(filled(&fields.uid, header.uid()))?;
    let gid = id(filled(&fields.gid, header.gid()))?;
    let mode = filled(&fields.mode, header.mode()).map_err(UnpackError::Archive)? & 0o7777;
    let mut mtime = Timespec {
        tv_sec: header.mtime().unwrap_or(0).cast_signed().max(0),
        tv_nsec: 0,
    };
    let mut xattrs = Vec::new();
    if let Some(pax) = entry.pax_extensions().map_err(UnpackError::Archive)? {
        for record in pax {
            let record = record.map_err(UnpackError::Archive)?;
            let Ok(key) = record.key() else { continue };
            if key == "mtime" {
                mtime = record.value().ok().and_then(pax_time).unwrap_or(mtime);
            } else if let Some(name) = key.strip_prefix("SCHILY.xattr.")
                && xattr_allowed(name)
            {
                xattrs.push((name.to_owned(), record.value_bytes().to_vec()));
            }
        }
    }
    let times = Timestamps {
        last_access: mtime,
        last_modification: mtime,
    };
    Ok(Meta {
        uid,
        gid,
        mode: Mode::from_raw_mode(mode),
        times,
        xattrs,
    })
}

/// A number, 0 when its field was left empty: some writers do, and others read it so.
fn filled<T: Default>(field: &[u8], read: io::Result<T>) -> io::Result<T> {
    let empty = field.iter().all(|b| matches!(b, 0 | b' '));
    if empty { Ok(T::default()) } else { read }
}

/// `trusted.overlay.*` would let an archive redirect into other layers; labels of a security
/// module belong to the node.
fn xattr_allowed(name: &str) -> bool {
    name == "security.capability" || name.starts_with("user.")
}

/// `seconds[.fraction]` with an optional sign.
fn pax_time(text: &str) -> Option<Timespec> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = seconds.parse().ok()?;
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanoseconds: i64 = digits.parse().ok()?;
    Some(match text.starts_with('-') && nanoseconds > 0 {
        true => Timespec {
            tv_sec: seconds.checked_sub(1)?,
            tv_nsec: 1_000_000_000 - nanoseconds,
        },
        false => Timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds,
        },
    })
}

fn link_target<R: Read>(entry: &tar::Entry<'_, R>, path: &[u8]) -> Result<Vec<u8>, UnpackError> {
    match entry.link_name_bytes() {
        Some(target) if !target.is_empty() && !target.contains(&0) => Ok(target.into_owned()),
        _ => Err(UnpackError::Entry {
            path: lossy(path),
            reason: "link without a target".to_owned(),
        }),
    }
}

fn device<R: Read>(entry: &tar::Entry<'_, R>) -> Result<u64, UnpackError> {
    let header = entry.header();
    let major = header
        .device_major()
        .map_err(UnpackError::Archive)?
        .unwrap_or(0);
    let minor = header
        .device_minor()
        .map_err(UnpackError::Archive)?
        .unwrap_or(0);
    Ok(rustix::fs::makedev(major, minor))
}

/// The path without `.`, doubled or outer slashes; `..` may not climb out.
fn clean(path: &[u8]) -> Result<Vec<u8>, UnpackError> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                if parts.pop().is_none() {
                    return Err(UnpackError::Escape(lossy(path)));
                }
            }
            _ if part.contains(&0) || part.len() > 255 => {
                return Err(UnpackError::Entry {
                    path: lossy(&path[..path.len().min(300)]),
                    reason: "a component is too long or has a zero byte".to_owned(),
                });
            }
            _ => parts.push(part),
        }
    }
    Ok(parts.join(&b'/'))
}

/// Directory part and last component; none for the root.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.is_empty() {
        return None;
    }
    Some(match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    })
}

pub(crate) fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

#[cfg(test)]
#[path = "unpack_tests.rs"]
pub(super) mod tests;
