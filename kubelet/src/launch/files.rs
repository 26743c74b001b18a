//! Files on the node that a container mounts: planned purely, written here.

use crate::volumes::PodVolumes;
use k8s_openapi::api::core::v1::Container;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags};
use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Component, Path, PathBuf};

/// Something to have on the node before a container is created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostFile {
    /// A file with this content, replaced at once when it exists with another.
    Text {
        /// Where.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
        /// What.
        content: String,
    },
    /// An empty file, emptied when it exists.
    Empty {
        /// Where.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
    },
    /// Something below a volume, never outside of it.
    SubPath {
        /// The volume on the node.
        volume: PathBuf,
        /// Relative path in it.
        sub_path: String,
        /// Make it, as a directory, when it is missing.
        make: bool,
        /// The mount's name, for messages.
        mount: String,
        /// The container's name, for messages.
        container: String,
    },
}

/// A file could not be made.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// One of ours.
    #[error("cannot make {path}: {source}")]
    Own {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A subPath leads out of its volume or cannot be made. Users are not told more: it would
    /// describe the node's files to them.
    #[error(
        "failed to {verb} subPath {object}for volumeMount {mount:?} of container {container:?}"
    )]
    SubPath {
        /// `create` or `prepare`.
        verb: &'static str,
        /// What of it.
        object: &'static str,
        /// The mount's name.
        mount: String,
        /// The container's name.
        container: String,
    },
}

impl FileError {
    /// The waiting reason of the container.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Own { .. } => "CreateContainerError",
            Self::SubPath { .. } => "CreateContainerConfigError",
        }
    }
}

/// Makes all of them; doing it twice is harmless. Blocking: a handful of system calls.
///
/// # Errors
/// Names the first that could not be made.
pub fn write(files: &[HostFile]) -> Result<(), FileError> {
    for file in files {
        let (path, done) = match file {
            HostFile::Text {
                path,
                mode,
                content,
            } => (path, text(path, *mode, content)),
            HostFile::Empty { path, mode } => (path, empty(path, *mode)),
            HostFile::SubPath {
                volume,
                sub_path,
                make,
                mount,
                container,
            } => {
                let failed = |verb, object| FileError::SubPath {
                    verb,
                    object,
                    mount: mount.clone(),
                    container: container.clone(),
                };
                if *make && let Err(error) = make_sub_path(volume, sub_path) {
                    tracing::warn!(volume = %volume.display(), sub_path, %error, "subPath not made");
                    return Err(failed("create", "directory "));
                }
                if let Err(error) = stays_inside(volume, sub_path) {
                    tracing::warn!(volume = %volume.display(), sub_path, %error, "subPath refused");
                    return Err(failed("prepare", ""));
                }
                continue;
            }
        };
        let path = path.clone();
        done.map_err(|source| FileError::Own { path, source })?;
    }
    Ok(())
}

fn parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => std::fs::create_dir_all(parent),
        None => Ok(()),
    }
}

/// The inode stays: running containers have the file itself mounted.
fn text(path: &Path, mode: u32, content: &str) -> io::Result<()> {
    if std::fs::read(path).is_ok_and(|old| old == content.as_bytes()) {
        return Ok(());
    }
    parent(path)?;
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)?;
    file.write_all(content.as_bytes())?;
    file.set_permissions(std::fs::Permissions::from_mode(mode))
}

fn empty(path: &Path, mode: u32) -> io::Result<()> {
    parent(path)?;
    let file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)?;
    file.set_permissions(std::fs::Permissions::from_mode(mode))
}

/// Makes the directories of `sub_path` that are missing, with mode and group of the volume.
/// Links in the volume are followed within the volume: what the container put there cannot lead
/// us out.
fn make_sub_path(volume: &Path, sub_path: &str) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(volume, flags, Mode::empty())?;
    if open_in(&root, Path::new(sub_path), OFlags::PATH | OFlags::CLOEXEC).is_ok() {
        return Ok(());
    }
    let stat = rustix::fs::fstat(&root)?;
    let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
    let mut so_far = PathBuf::new();
    for part in Path::new(sub_path).components() {
        let Component::Normal(name) = part else {
            if part == Component::CurDir {
                continue;
            }
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        };
        let above = if so_far.as_os_str().is_empty() {
            root.try_clone()?
        } else {
            open_in(&root, &so_far, flags)?
        };
        so_far.push(name);
        match rustix::fs::mkdirat(&above, name, mode) {
            Ok(()) => {
                // The umask may have cut the mode, and the group has to be the volume's.
                let own = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = rustix::fs::openat(&above, name, own, Mode::empty())?;
                let group = rustix::fs::Gid::from_raw(stat.st_gid);
                rustix::fs::fchown(&made, None, Some(group))?;
                rustix::fs::fchmod(&made, mode)?;
            }
            Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Whether there is something at `sub_path`, and every link on the way stays in the volume.
fn stays_inside(volume: &Path, sub_path: &str) -> io::Result<()> {
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(volume, directory, Mode::empty())?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::openat2(&root, sub_path, flags, Mode::empty(), resolve)?;
    Ok(())
}

fn open_in(root: &OwnedFd, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    Ok(rustix::fs::openat2(
        root,
        path,
        flags,
        Mode::empty(),
        resolve,
    )?)
}

/// The longest environment file.
const ENV_FILE_LIMIT: usize = 1 << 20;

/// The environment files a container speaks of. Links are followed within the volume.
pub fn env_files(
    container: &Container,
    volumes: &PodVolumes,
) -> BTreeMap<(String, String), Result<String, String>> {
    let sources = container.env.iter().flatten();
    let keys = sources.filter_map(|e| e.value_from.as_ref()?.file_key_ref.as_ref());
    let mut files = BTreeMap::new();
    for key in keys {
        let place = (key.volume_name.clone(), key.path.clone());
        files.entry(place).or_insert_with(|| {
            let volume = volumes.by_name.get(&key.volume_name);
            let volume = volume.filter(|v| !v.path.as_os_str().is_empty());
            let volume = volume.ok_or_else(|| {
                let name = &key.volume_name;
                format!("cannot find the volume {name:?} referenced by FileKeyRef")
            })?;
            let read = linux::fs::read_in_root(&volume.path, Path::new(&key.path), ENV_FILE_LIMIT);
            let bytes = read.map_err(|e| e.to_string())?;
            String::from_utf8(bytes).map_err(|e| e.to_string())
        });
    }
    files
}

/// Whether something is at `path`, without following a link at its end.
pub fn exists(path: &Path) -> bool {
    rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn text_is_replaced_in_place_and_modes_hold() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/etc-hosts");
        let plan = |content: &str| HostFile::Text {
            path: path.clone(),
            mode: 0o644,
            content: content.into(),
        };
        write(&[plan("one")]).unwrap();
        let before = std::fs::metadata(&path).unwrap();
        write(&[plan("two, longer")]).unwrap();
        let after = std::fs::metadata(&path).unwrap();
        assert_eq!(before.ino(), after.ino());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "two, longer");
        let log = dir.path().join("c/0");
        std::fs::create_dir_all(log.parent().unwrap()).unwrap();
        std::fs::write(&log, "old").unwrap();
        write(&[HostFile::Empty {
            path: log.clone(),
            mode: 0o666,
        }])
        .unwrap();
        let meta = std::fs::metadata(&log).unwrap();
        assert_eq!((meta.len(), meta.mode() & 0o7777), (0, 0o666));
    }

    #[test]
    fn a_sub_path_is_made_inside_and_never_outside_the_volume() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, outside) = (dir.path().join("v"), dir.path().join("outside"));
        std::fs::create_dir(&volume).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::set_permissions(&volume, std::fs::Permissions::from_mode(0o2777)).unwrap();
        let sub = |sub_path: &str| HostFile::SubPath {
            volume: volume.clone(),
            sub_path: sub_path.into(),
            make: true,
            mount: "v".into(),
            container: "c".into(),
        };
        write(&[sub("a/b"), sub("a/b")]).unwrap();
        assert_eq!(
            std::fs::metadata(volume.join("a/b")).unwrap().mode() & 0o7777,
            0o2777
        );
        std::os::unix::fs::symlink(&outside, volume.join("link")).unwrap();
        std::os::unix::fs::symlink("../../../..", volume.join("up")).unwrap();
        let _ = write(&[sub("up/y")]);
        let refused = write(&[sub("link/x")]).unwrap_err();
        assert_eq!(refused.reason(), "CreateContainerConfigError");
        std::fs::create_dir(outside.join("there")).unwrap();
        std::os::unix::fs::symlink("/etc", volume.join("etc")).unwrap();
        assert_eq!(
            write(&[sub("etc")]).unwrap_err().to_string(),
            "failed to prepare subPath for volumeMount \"v\" of container \"c\""
        );
        assert!(!outside.join("x").exists() && !dir.path().join("y").exists());
        assert!(write(&[sub("../z")]).is_err());
        assert!(!dir.path().join("z").exists());
    }
}
