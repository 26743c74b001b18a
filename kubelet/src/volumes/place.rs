//! Where volumes are on the node, and their records.
//!
//! ```text
//! <root>/volumes.json                                   record of the shared tmpfs
//! <root>/volatile                                       one tmpfs for all secrets and tokens
//! <root>/volatile/<uid>/<plugin>/<name>/                a secret or projected volume
//! <root>/pods/<uid>/volumes.json                        record of the pod's volumes
//! <root>/pods/<uid>/volumes/<plugin>/<name>             a directory, a tmpfs of its own
//!                                                       (emptyDir Memory), or a link into volatile
//! ```
//!
//! Everything made is recorded before it is made. Teardown unmounts what is recorded and nothing
//! else, and never deletes through a mount. All functions block.

use super::VolumeError;
use super::plan::{FilesVolume, Kind, PLUGIN_EMPTY_DIR, Planned, fs_group, nested_mount_points};
use crate::errors::chain;
use k8s_openapi::api::core::v1::Pod;
use linux::fs::{Durability, create_dirs, remove_tree, write_atomic};
use linux::mount::MountAttrs;
use rustix::fs::{AtFlags, CWD, Gid};
use rustix::mount::UnmountFlags;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// Name of the shared tmpfs in the mount table.
const SHARED_SOURCE: &str = "ferrule-volatile";
/// Name of emptyDirs in memory in the mount table.
const EMPTY_DIR_SOURCE: &str = "ferrule-emptydir";
const VERSION: u32 = 1;
const RECORD: &str = "volumes.json";
/// A record longer than this is not ours.
const RECORD_LIMIT: usize = 4 << 20;

/// The shared tmpfs.
#[derive(Debug, Serialize, Deserialize)]
struct NodeRecord {
    version: u32,
    volatile: PathBuf,
}

/// A pod's volumes as far as they left traces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct PodRecord {
    version: u32,
    namespace: String,
    name: String,
    /// Names of emptyDirs with a tmpfs of their own.
    tmpfs: Vec<String>,
}

/// The node's directories of volumes.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    root: PathBuf,
}

/// One component that cannot lead elsewhere.
fn safe(uid: &str) -> Result<&str, VolumeError> {
    if uid.is_empty() || uid == "." || uid == ".." || uid.contains('/') {
        return Err(VolumeError::Teardown {
            uid: uid.to_owned(),
            message: "the UID is no directory name".to_owned(),
        });
    }
    Ok(uid)
}

impl Place {
    /// Opens the node's directories; mounts the shared tmpfs unless it is there.
    pub(crate) fn open(root: &Path) -> Result<Self, VolumeError> {
        let fail = |message| VolumeError::Node { message };
        create_dirs(root, 0o755).map_err(|e| fail(chain(&e)))?;
        // The mount table holds real paths.
        let root = std::fs::canonicalize(root)
            .map_err(|e| fail(format!("resolve {}: {e}", root.display())))?;
        let place = Self { root };
        create_dirs(&place.root.join("pods"), 0o750).map_err(|e| fail(chain(&e)))?;
        place.ensure_shared_tmpfs().map_err(fail)?;
        Ok(place)
    }

    /// The kubelet's root, a real path.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    fn volatile(&self) -> PathBuf {
        self.root.join("volatile")
    }

    fn pod(&self, uid: &str) -> PathBuf {
        self.root.join("pods").join(uid)
    }

    fn ensure_shared_tmpfs(&self) -> Result<(), String> {
        let at = self.volatile();
        let record = NodeRecord {
            version: VERSION,
            volatile: at.clone(),
        };
        save(&self.root.join(RECORD), &record)?;
        create_dirs(&at, 0o750).map_err(|e| chain(&e))?;
        let table = linux::mountinfo::read().map_err(|e| format!("read the mount table: {e}"))?;
        match table.iter().rev().find(|m| m.mount_point == at) {
            Some(mount) if mount.fstype == "tmpfs" && mount.source == SHARED_SOURCE => Ok(()),
            Some(mount) => Err(format!(
                "{} is a mount of {} ({}), not ours",
                at.display(),
                mount.source,
                mount.fstype
            )),
            None => mount_tmpfs(
                SHARED_SOURCE,
                &at,
                &["mode=0750".to_owned()],
                MountAttrs {
                    nosuid: true,
                    nodev: true,
                    ..MountAttrs::default()
                },
            ),
        }
    }

    /// Where a volume of files is written.
    pub(crate) fn files_dir(&self, uid: &str, name: &str, volume: &FilesVolume) -> PathBuf {
        if volume.volatile {
            self.volatile().join(uid).join(volume.plugin).join(name)
        } else {
            self.expected(uid, volume.plugin, name)
        }
    }

    /// Where users look for a volume.
    fn expected(&self, uid: &str, plugin: &str, name: &str) -> PathBuf {
        self.pod(uid).join("volumes").join(plugin).join(name)
    }

    /// Where an emptyDir is.
    pub(crate) fn empty_dir(&self, uid: &str, name: &str) -> PathBuf {
        self.expected(uid, PLUGIN_EMPTY_DIR, name)
    }

    /// Records the pod's volumes and makes their places; those there already are left alone.
    pub(crate) fn prepare(
        &self,
        pod: &Pod,
        uid: &str,
        volumes: &[Planned],
        memory_most: Option<i64>,
    ) -> Result<(), VolumeError> {
        safe(uid)?;
        let tmpfs = volumes
            .iter()
            .filter(|v| matches!(v.kind, Kind::EmptyDir { memory: Some(_) }))
            .map(|v| v.name.clone())
            .collect();
        let record = PodRecord {
            version: VERSION,
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            name: pod.metadata.name.clone().unwrap_or_default(),
            tmpfs,
        };
        let dir = self.pod(uid);
        let node = |message| VolumeError::Node { message };
        create_dirs(&dir, 0o750).map_err(|e| node(chain(&e)))?;
        let path = dir.join(RECORD);
        if load(&path)? != Some(Some(record.clone())) {
            save(&path, &record).map_err(node)?;
        }
        let group = fs_group(pod);
        for volume in volumes {
            match &volume.kind {
                Kind::EmptyDir { memory } => {
                    let options = memory.map(|limit| limit.into_iter().chain(memory_most).min());
                    self.make_empty_dir(uid, &volume.name, options, group)
                }
                // Mounted by others, once this record is there.
                Kind::Claim(_) | Kind::Csi(_) | Kind::Unused | Kind::Image => Ok(()),
                Kind::HostPath { path, kind } => super::host_path::prepare(path, *kind),
                Kind::Files(files) => self.make_files_dir(pod, uid, &volume.name, files),
            }
            .map_err(|message| VolumeError::set_up(&volume.name, message))?;
        }
        Ok(())
    }

    fn make_empty_dir(
        &self,
        uid: &str,
        name: &str,
        memory: Option<Option<i64>>,
        group: Option<u32>,
    ) -> Result<(), String> {
        let at = self.empty_dir(uid, name);
        let fresh = std::fs::symlink_metadata(&at).is_err();
        if let Some(parent) = at.parent() {
            create_dirs(parent, 0o750).map_err(|e| chain(&e))?;
        }
        linux::fs::ensure_dir(&at, 0o777).map_err(|e| chain(&e))?;
        let mut begin = fresh;
        if let Some(limit) = memory {
            let table =
                linux::mountinfo::read().map_err(|e| format!("read the mount table: {e}"))?;
            if !table.iter().any(|m| m.mount_point == at) {
                // With the sticky bit, as tmpfs has it by itself: programs and tests know it so.
                let mut options = vec!["mode=1777".to_owned()];
                options.extend(limit.map(|bytes| format!("size={bytes}")));
                mount_tmpfs(EMPTY_DIR_SOURCE, &at, &options, MountAttrs::default())?;
                begin = true;
            }
        }
        match group {
            Some(group) if begin => {
                let refused = |e: io::Error| format!("set group of {}: {e}", at.display());
                let gid = Some(Gid::from_raw(group));
                rustix::fs::chownat(CWD, &at, None, gid, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|e| refused(e.into()))?;
                let now = std::fs::metadata(&at)
                    .map_err(refused)?
                    .permissions()
                    .mode();
                let mode = std::fs::Permissions::from_mode(now & 0o7777 | 0o2777);
                std::fs::set_permissions(&at, mode).map_err(refused)
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Makes the directory's surroundings: the link into the tmpfs, nested mount points.
    fn make_files_dir(
        &self,
        pod: &Pod,
        uid: &str,
        name: &str,
        volume: &FilesVolume,
    ) -> Result<(), String> {
        let dir = self.files_dir(uid, name, volume);
        create_dirs(&dir, 0o755).map_err(|e| chain(&e))?;
        if volume.volatile {
            let link = self.expected(uid, volume.plugin, name);
            if let Some(parent) = link.parent() {
                create_dirs(parent, 0o750).map_err(|e| chain(&e))?;
            }
            match std::os::unix::fs::symlink(&dir, &link) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(format!("link {}: {e}", link.display()));
                }
                Ok(()) | Err(_) => {}
            }
        }
        for nested in nested_mount_points(pod, name) {
            // A file of the volume may be what is mounted on.
            if std::fs::symlink_metadata(dir.join(&nested)).is_err() {
                create_dirs(&dir.join(&nested), 0o755).map_err(|e| chain(&e))?;
            }
        }
        Ok(())
    }

    /// Removes everything of the pod: its tmpfs mounts by record, its directories. What somebody
    /// else mounted there stops it.
    pub(crate) fn teardown(&self, uid: &str) -> Result<(), VolumeError> {
        let fail = |message| VolumeError::Teardown {
            uid: uid.to_owned(),
            message,
        };
        let dir = self.pod(safe(uid)?);
        let record = load(&dir.join(RECORD))?;
        let recorded = |name: &str| match &record {
            Some(Some(record)) => record.tmpfs.iter().any(|n| n == name),
            // The record is damaged or lost: the mount's own name still proves it ours.
            Some(None) | None => true,
        };
        let table = linux::mountinfo::read().map_err(|e| fail(e.to_string()))?;
        let above = self.expected(uid, PLUGIN_EMPTY_DIR, "");
        for mount in table.iter().rev().filter(|m| m.source == EMPTY_DIR_SOURCE) {
            let at = &mount.mount_point;
            let name = at.strip_prefix(&above).ok().and_then(Path::to_str);
            if name.is_some_and(recorded) {
                rustix::mount::unmount(at, UnmountFlags::NOFOLLOW).map_err(|e| {
                    fail(format!("unmount {}: {}", at.display(), io::Error::from(e)))
                })?;
            }
        }
        remove_tree(&self.volatile().join(uid)).map_err(|e| fail(chain(&e)))?;
        // The record goes last: until then teardown can be repeated.
        for name in linux::fs::list_dir(&dir).map_err(|e| fail(chain(&e)))? {
            if name != RECORD {
                remove_tree(&dir.join(name)).map_err(|e| fail(chain(&e)))?;
            }
        }
        remove_tree(&dir).map_err(|e| fail(chain(&e)))
    }

    /// UIDs of pods that left something on the node.
    pub(crate) fn uids(&self) -> Vec<String> {
        let mut uids: Vec<String> = [self.root.join("pods"), self.volatile()]
            .iter()
            .flat_map(|dir| linux::fs::list_dir(dir).unwrap_or_default())
            .filter_map(|name| name.into_string().ok())
            .collect();
        uids.sort();
        uids.dedup();
        uids
    }
}

fn save<T: Serialize>(path: &Path, record: &T) -> Result<(), String> {
    let text = serde_json::to_vec(record).map_err(|e| e.to_string())?;
    // What is there already needs no room: an agent must come up on a full disk.
    if linux::fs::read_file(path, RECORD_LIMIT).is_ok_and(|old| old == text) {
        return Ok(());
    }
    write_atomic(path, &text, 0o600, Durability::Process).map_err(|e| chain(&e))
}

/// A pod's record: none when there is none, nothing in it when it cannot be understood (power
/// was lost while it was written).
fn load(path: &Path) -> Result<Option<Option<PodRecord>>, VolumeError> {
    match linux::fs::read_file(path, RECORD_LIMIT) {
        Ok(text) => match serde_json::from_slice::<PodRecord>(&text) {
            Ok(record) if record.version == VERSION => Ok(Some(Some(record))),
            Ok(_) | Err(_) => {
                tracing::warn!(path = %path.display(), "record of volumes is damaged");
                Ok(Some(None))
            }
        },
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => {
            tracing::warn!(error = chain(&error), "record of volumes cannot be read");
            Ok(Some(None))
        }
    }
}

/// Mounts a tmpfs that is never swapped, where the kernel knows how (6.3).
fn mount_tmpfs(
    source: &str,
    at: &Path,
    options: &[String],
    attrs: MountAttrs,
) -> Result<(), String> {
    let refused = |e: io::Error| format!("mount a tmpfs on {}: {e}", at.display());
    let mut wanted = options.to_vec();
    wanted.push("noswap".to_owned());
    let mount = linux::mount::filesystem("tmpfs", source, &wanted, attrs)
        .or_else(|_| linux::mount::filesystem("tmpfs", source, options, attrs))
        .map_err(refused)?;
    let target = linux::mount::open_path(at).map_err(refused)?;
    linux::mount::attach(mount.as_fd(), target.as_fd()).map_err(refused)
}
