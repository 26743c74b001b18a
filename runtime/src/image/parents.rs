//! Attributes of directories an archive uses but does not list.
//!
//! A layer that holds `a/b` without an entry for `a` gets an implicit `a` (0755, root), and in
//! overlayfs the topmost directory's attributes win: a `/tmp` of mode 1777 below would become
//! 0755. Where that happens an image gets one more layer on top, of directories only, with the
//! attributes a stack of plain unpacking would have given. It is named by its content.

use super::error::{ImageError, Result};
use super::layer::{LayerInfo, digest_of, partial_name, remove_dir};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, openat2};
use rustix::io::Errno;
use serde::Serialize;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;

/// What is known of the stored layer `diff_id`.
///
/// # Errors
/// [`ImageError::Io`] when its file cannot be read.
pub(crate) fn read_info(layers: &Path, diff_id: &str) -> Result<LayerInfo> {
    let path = layers
        .join(diff_id.trim_start_matches("sha256:"))
        .join("layer.json");
    let text = std::fs::read(&path).map_err(ImageError::io("read", &path))?;
    serde_json::from_slice(&text).map_err(|e| ImageError::io("parse", &path)(e.into()))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Attributes {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: i64,
}

impl Attributes {
    /// What an implicit directory has.
    fn implicit(self) -> bool {
        (self.mode, self.uid, self.gid) == (0o755, 0, 0)
    }
}

/// What a layer has at a path.
enum Found {
    Nothing,
    /// A directory with an entry of its own, or implicit.
    Dir {
        attributes: Attributes,
        explicit: bool,
        opaque: bool,
    },
    /// Something that hides a lower directory: file, link, whiteout.
    Other,
}

struct Layer {
    root: OwnedFd,
    implicit: Vec<String>,
}

impl Layer {
    fn open(layers: &Path, diff_id: &str) -> Result<Self> {
        let path = layers
            .join(diff_id.trim_start_matches("sha256:"))
            .join("fs");
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let root = rustix::fs::open(&path, flags, Mode::empty())
            .map_err(|e| ImageError::io("open", &path)(e.into()))?;
        Ok(Self {
            root,
            implicit: read_info(layers, diff_id)?.implicit_dirs,
        })
    }

    fn find(&self, path: &str) -> Result<Found> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let failed = |e: Errno| ImageError::io("look up", path)(e.into());
        let dir = match openat2(&self.root, path, flags, Mode::empty(), within) {
            Ok(dir) => dir,
            Err(Errno::NOENT) => return Ok(Found::Nothing),
            Err(Errno::NOTDIR | Errno::LOOP) => return Ok(Found::Other),
            Err(errno) => return Err(failed(errno)),
        };
        let stat = rustix::fs::fstat(&dir).map_err(failed)?;
        let mut value = [0u8; 1];
        let opaque = rustix::fs::fgetxattr(&dir, "trusted.overlay.opaque", &mut value).is_ok();
        Ok(Found::Dir {
            attributes: Attributes {
                mode: stat.st_mode & 0o7777,
                uid: stat.st_uid,
                gid: stat.st_gid,
                mtime: stat.st_mtime,
            },
            explicit: !self.implicit.iter().any(|p| p == path),
            opaque,
        })
    }
}

/// Attributes the merged view should show for the directory `path`; none when the top view has
/// no such directory or nothing but implicit ones. Pure but for look-ups.
fn effective(stack: &[Layer], path: &str) -> Result<Option<Attributes>> {
    let ancestors: Vec<&str> = path
        .match_indices('/')
        .map(|(end, _)| &path[..end])
        .collect();
    for layer in stack.iter().rev() {
        for ancestor in &ancestors {
            match layer.find(ancestor)? {
                Found::Other => return Ok(None),
                Found::Dir { opaque: true, .. } => {
                    return Ok(match layer.find(path)? {
                        Found::Dir {
                            attributes,
                            explicit: true,
                            ..
                        } => Some(attributes),
                        Found::Dir {
                            explicit: false, ..
                        }
                        | Found::Nothing
                        | Found::Other => None,
                    });
                }
                Found::Dir { opaque: false, .. } | Found::Nothing => {}
            }
        }
        match layer.find(path)? {
            Found::Other => return Ok(None),
            Found::Dir {
                attributes,
                explicit: true,
                ..
            } => return Ok(Some(attributes)),
            Found::Dir { opaque: true, .. } => return Ok(None),
            Found::Dir { .. } | Found::Nothing => {}
        }
    }
    Ok(None)
}

/// Whether the topmost directory at `path` is an implicit one, so that it shows wrong attributes.
fn shows_implicit(stack: &[Layer], path: &str) -> Result<bool> {
    for layer in stack.iter().rev() {
        match layer.find(path)? {
            Found::Nothing => {}
            Found::Other => return Ok(false),
            Found::Dir { explicit, .. } => return Ok(!explicit),
        }
    }
    Ok(false)
}

/// Directories to put on top, with their parents.
fn plan(stack: &[Layer]) -> Result<BTreeMap<String, Attributes>> {
    let mut wanted = BTreeMap::new();
    for path in stack.iter().flat_map(|l| &l.implicit) {
        if wanted.contains_key(path) || !shows_implicit(stack, path)? {
            continue;
        }
        let Some(attributes) = effective(stack, path)?.filter(|a| !a.implicit()) else {
            continue;
        };
        for (end, _) in path.match_indices('/') {
            let parent = &path[..end];
            let plain = Attributes {
                mode: 0o755,
                uid: 0,
                gid: 0,
                mtime: 0,
            };
            wanted.insert(
                parent.to_owned(),
                effective(stack, parent)?.unwrap_or(plain),
            );
        }
        wanted.insert(path.clone(), attributes);
    }
    Ok(wanted)
}

/// Makes the extra layer if these layers (lowest first) need one; returns its directory name.
///
/// # Errors
/// [`ImageError::Io`]; nothing half made keeps its name.
pub(crate) fn ensure(layers: &Path, diff_ids: &[String]) -> Result<Option<String>> {
    let stack: Vec<Layer> = diff_ids
        .iter()
        .map(|d| Layer::open(layers, d))
        .collect::<Result<_>>()?;
    if stack.iter().all(|l| l.implicit.is_empty()) {
        return Ok(None);
    }
    let wanted = plan(&stack)?;
    if wanted.is_empty() {
        return Ok(None);
    }
    let content =
        serde_json::to_vec(&wanted).map_err(|e| ImageError::io("write", layers)(e.into()))?;
    let name = format!(
        "parents{}",
        digest_of(&content).trim_start_matches("sha256:")
    );
    let target = layers.join(&name);
    if target.is_dir() {
        return Ok(Some(name));
    }
    let partial = layers.join(partial_name(&name));
    let made = make(&partial, &wanted).and_then(|()| {
        std::fs::rename(&partial, &target).map_err(ImageError::io("store layer", &target))
    });
    if let Err(error) = made {
        remove_dir(&partial);
        return Err(error);
    }
    Ok(Some(name))
}

fn make(dir: &Path, wanted: &BTreeMap<String, Attributes>) -> Result<()> {
    let fs = dir.join("fs");
    std::fs::create_dir_all(&fs).map_err(ImageError::io("make", &fs))?;
    for path in wanted.keys() {
        let path = fs.join(path);
        std::fs::create_dir(&path).map_err(ImageError::io("make", &path))?;
    }
    // Children first, so that a parent's mtime is set last.
    for (path, attributes) in wanted.iter().rev() {
        let path = fs.join(path);
        let failed = |e: Errno| ImageError::io("set attributes of", &path)(e.into());
        let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
        rustix::fs::chown(&path, Some(uid), Some(gid)).map_err(failed)?;
        rustix::fs::chmod(&path, Mode::from_raw_mode(attributes.mode)).map_err(failed)?;
        let mtime = Timespec {
            tv_sec: attributes.mtime,
            tv_nsec: 0,
        };
        let times = Timestamps {
            last_access: mtime,
            last_modification: mtime,
        };
        rustix::fs::utimensat(rustix::fs::CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed)?;
    }
    Ok(())
}
