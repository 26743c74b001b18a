//! A container's files.
//!
//! ```text
//! <root>/containers/<id>/{container.json, exit.json (the shim's), upper/, work/}
//! <root>/volumes/<id>/<number>/{upper/, work/}      volumes the image declares
//! ```
//! Volumes are beside the container's directory because the shim mounts the root filesystem
//! over that directory, in the container's own mount namespace.

use super::state::{ContainerRecord, Exit};
use crate::config::EngineConfig;
use crate::error::system;
use crate::sandbox::store::is_id;
use crate::service::{ContainerId, Result};
use linux::fs::{Durability, ensure_dir, list_dir, read_file, remove_tree, write_atomic};
use pod_shim::protocol::{ExitRecord, MountSource};
use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// A record larger than this was not written by us.
const MAX_RECORD_BYTES: usize = 16 << 20;

/// The container's directory.
pub(crate) fn dir(config: &EngineConfig, id: &ContainerId) -> PathBuf {
    config.containers().join(id.as_str())
}

/// Where the volumes of its image are.
pub(crate) fn volumes(config: &EngineConfig, id: &ContainerId) -> PathBuf {
    config.volumes().join(id.as_str())
}

/// Writes the record.
pub(crate) fn save(config: &EngineConfig, record: &ContainerRecord) -> Result<()> {
    let path = dir(config, &record.id).join("container.json");
    let text = serde_json::to_vec(record).map_err(|e| system(&e))?;
    Ok(write_atomic(&path, &text, 0o600, Durability::Process)?)
}

/// Makes the directories, the record first among the files.
///
/// `first_id` is the first id of the pod's user namespace: what changes is written there without
/// a mapped mount in between, so the directories belong to the namespace's users.
pub(crate) fn create(config: &EngineConfig, record: &ContainerRecord, first_id: u32) -> Result<()> {
    let dir = dir(config, &record.id);
    ensure_dir(&dir, 0o711)?;
    save(config, record)?;
    ensure_dir(&dir.join("work"), 0o700)?;
    let upper = dir.join("upper");
    ensure_dir(&upper, 0o755)?;
    // The writable layer's top directory is the container's `/`: it looks like the image's.
    if let Some(top) = record.launch.rootfs.lower.first() {
        let image = std::fs::metadata(top).map_err(|e| system(&e))?;
        let (uid, gid) = (
            image.uid().saturating_add(first_id),
            image.gid().saturating_add(first_id),
        );
        if (uid, gid) != (0, 0) {
            std::os::unix::fs::chown(&upper, Some(uid), Some(gid)).map_err(|e| system(&e))?;
        }
        let bits = std::fs::Permissions::from_mode(image.mode() & 0o7777);
        std::fs::set_permissions(&upper, bits).map_err(|e| system(&e))?;
    }
    Ok(())
}

/// Deletes everything, the record last.
pub(crate) fn delete(config: &EngineConfig, id: &ContainerId) -> Result<()> {
    let dir = dir(config, id);
    for part in ["upper", "work"] {
        remove_tree(&dir.join(part))?;
    }
    remove_tree(&volumes(config, id))?;
    Ok(remove_tree(&dir)?)
}

/// How it ended, when its shim left word.
pub(crate) fn exit_record(config: &EngineConfig, id: &ContainerId) -> Option<Exit> {
    let file = dir(config, id).join("exit.json");
    let text = read_file(&file, 1 << 16).ok()?;
    match serde_json::from_slice::<ExitRecord>(&text) {
        Ok(record) => Some(Exit::from_record(&record)),
        Err(e) => {
            tracing::warn!(file = %file.display(), error = %e, "unreadable exit record");
            None
        }
    }
}

/// A record found on disk.
pub(crate) enum Found {
    /// It can be used.
    Record(Box<ContainerRecord>),
    /// The directory is ours and its record was never written or already deleted.
    Empty(ContainerId),
    /// The directory is ours and its record cannot be read; why.
    Damaged(ContainerId, String),
    /// Something else; why.
    Foreign(String),
}

/// All containers on disk.
pub(crate) fn load_all(config: &EngineConfig) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for name in list_dir(&config.containers())? {
        let name = name.to_string_lossy().into_owned();
        let path = config.containers().join(&name);
        if !is_id(&name) {
            all.push(Found::Foreign(format!("unknown {}", path.display())));
            continue;
        }
        let file = path.join("container.json");
        all.push(match read_file(&file, MAX_RECORD_BYTES) {
            Err(e) if e.is_not_found() => Found::Empty(ContainerId(name)),
            Err(e) => Found::Damaged(ContainerId(name), crate::error::chain(&e)),
            Ok(text) => match serde_json::from_slice::<ContainerRecord>(&text) {
                Ok(record) if record.id.0 == name => Found::Record(Box::new(record)),
                Ok(_) => {
                    let why = format!("{} names another id", file.display());
                    Found::Damaged(ContainerId(name), why)
                }
                Err(e) => {
                    Found::Damaged(ContainerId(name), format!("read {}: {e}", file.display()))
                }
            },
        });
    }
    Ok(all)
}

/// Names of the layers that containers on disk are made of, whether their images are known or
/// not. A record that cannot be read names none: its container is not run on.
pub(crate) fn layers_in_use(root: &Path) -> std::io::Result<BTreeSet<String>> {
    let (containers, layers) = (root.join("containers"), root.join("layers"));
    let mut found = BTreeSet::new();
    let names = list_dir(&containers).map_err(std::io::Error::other)?;
    for name in names {
        let file = containers.join(name).join("container.json");
        let Ok(text) = read_file(&file, MAX_RECORD_BYTES) else {
            continue;
        };
        let Ok(record) = serde_json::from_slice::<ContainerRecord>(&text) else {
            continue;
        };
        let mounted = record.launch.mounts.iter().flat_map(|m| match &m.source {
            MountSource::Layers { lower, .. } => lower.as_slice(),
            MountSource::Bind { .. } | MountSource::Filesystem { .. } | MountSource::Cgroup => &[],
        });
        for dir in record.launch.rootfs.lower.iter().chain(mounted) {
            let below = dir.strip_prefix(&layers).ok();
            let layer = below.and_then(|path| path.components().next());
            found.extend(layer.map(|l| l.as_os_str().to_string_lossy().into_owned()));
        }
    }
    Ok(found)
}
