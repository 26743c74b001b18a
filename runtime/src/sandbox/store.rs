//! A sandbox's files.
//!
//! ```text
//! <root>/sandboxes/<id>/{sandbox.json, resolv.conf, hostname, shim.log}
//! <run>/shim/<id>.sock   <run>/netns/<id>   <run>/shm/<id>/
//! ```

use super::state::SandboxRecord;
use crate::config::EngineConfig;
use crate::error::system;
use crate::service::{DnsConfig, NamespaceMode, Result, SandboxId};
use linux::fs::{Durability, ensure_dir, list_dir, read_file, remove_tree, write_atomic};
use linux::mount::{MountAttrs, attach, filesystem, open_path};
use std::fmt::Write as _;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

/// A record larger than this was not written by us.
const MAX_RECORD_BYTES: usize = 8 << 20;

/// What a pod may keep in `/dev/shm`, as under other runtimes.
const SHARED_MEMORY_BYTES: u64 = 64 << 20;
/// Its name in the mount table.
const SHARED_MEMORY: &str = "ferrule-shm";

/// The sandbox's directory.
pub(crate) fn dir(config: &EngineConfig, id: &SandboxId) -> PathBuf {
    config.sandboxes().join(id.as_str())
}

/// Its shim's socket.
pub(crate) fn socket(config: &EngineConfig, id: &SandboxId) -> PathBuf {
    config.sockets().join(format!("{id}.sock"))
}

/// Where its network namespace is pinned.
pub(crate) fn pin(config: &EngineConfig, id: &SandboxId) -> PathBuf {
    config.pins().join(id.as_str())
}

/// Its shared memory.
pub(crate) fn shared_memory(config: &EngineConfig, id: &SandboxId) -> PathBuf {
    config.shared_memory().join(id.as_str())
}

/// Writes the record.
pub(crate) fn save(config: &EngineConfig, record: &SandboxRecord) -> Result<()> {
    let path = dir(config, &record.id).join("sandbox.json");
    let text = serde_json::to_vec(record).map_err(|e| system(&e))?;
    Ok(write_atomic(&path, &text, 0o600, Durability::Process)?)
}

/// Writes the record of a sandbox whose making may have failed before it had a directory.
pub(crate) fn save_existing(config: &EngineConfig, record: &SandboxRecord) -> Result<()> {
    if dir(config, &record.id).exists() {
        save(config, record)?;
    }
    Ok(())
}

/// Makes the sandbox's directories, the record first among its files.
pub(crate) fn create(config: &EngineConfig, record: &SandboxRecord) -> Result<()> {
    let dir = dir(config, &record.id);
    ensure_dir(&dir, 0o711)?;
    save(config, record)?;
    if record.config.ipc != NamespaceMode::Node {
        ensure_shared_memory(&shared_memory(config, &record.id))?;
    }
    if let Some(dns) = &record.config.dns {
        let text = resolv_conf(dns);
        std::fs::write(dir.join("resolv.conf"), text).map_err(|e| system(&e))?;
    }
    let hostname = &record.config.hostname;
    if !hostname.is_empty() {
        let text = format!("{hostname}\n");
        std::fs::write(dir.join("hostname"), text).map_err(|e| system(&e))?;
    }
    Ok(())
}

/// Deletes everything, the directory with the record last.
pub(crate) fn delete(config: &EngineConfig, id: &SandboxId) -> Result<()> {
    remove_shared_memory(config, id)?;
    linux::fs::remove_file(&socket(config, id))?;
    linux::netns::unpin(&pin(config, id)).map_err(|e| system(&e))?;
    Ok(remove_tree(&dir(config, id))?)
}

/// Mounts the pod's shared memory. What one pod keeps there must not be all of the node's.
fn ensure_shared_memory(path: &Path) -> Result<()> {
    ensure_dir(path, 0o711)?;
    let options = [
        "mode=1777".to_owned(),
        format!("size={SHARED_MEMORY_BYTES}"),
    ];
    let attributes = MountAttrs {
        nosuid: true,
        nodev: true,
        noexec: true,
        ..MountAttrs::default()
    };
    let mounted = filesystem("tmpfs", SHARED_MEMORY, &options, attributes)
        .and_then(|mount| attach(mount.as_fd(), open_path(path)?.as_fd()));
    mounted.map_err(|e| {
        let message = format!("mount a tmpfs at {}: {e}", path.display());
        crate::error::error(crate::service::RuntimeErrorKind::System, message)
    })
}

/// Gives the pod's shared memory back; nobody may use it any more. Idempotent.
pub(crate) fn remove_shared_memory(config: &EngineConfig, id: &SandboxId) -> Result<()> {
    use rustix::io::Errno;
    use rustix::mount::{UnmountFlags, unmount};
    let path = shared_memory(config, id);
    match unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        // Not there, or not mounted (made by an earlier version, or not made to the end).
        Ok(()) | Err(Errno::NOENT | Errno::INVAL) => Ok(remove_tree(&path)?),
        Err(e) => {
            let message = format!("unmount {}: {e}", path.display());
            Err(crate::error::error(
                crate::service::RuntimeErrorKind::System,
                message,
            ))
        }
    }
}

/// A record found on disk.
pub(crate) enum Found {
    /// It can be used.
    Record(Box<SandboxRecord>),
    /// The directory is ours and its record was never written or already deleted.
    Empty(SandboxId),
    /// Something else; why.
    Foreign(String),
}

/// All sandboxes on disk.
pub(crate) fn load_all(config: &EngineConfig) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for name in list_dir(&config.sandboxes())? {
        let name = name.to_string_lossy().into_owned();
        let path = config.sandboxes().join(&name);
        if !is_id(&name) {
            all.push(Found::Foreign(format!("unknown {}", path.display())));
            continue;
        }
        let file = path.join("sandbox.json");
        all.push(match read_file(&file, MAX_RECORD_BYTES) {
            Err(e) if e.is_not_found() => Found::Empty(SandboxId(name)),
            Err(e) => Found::Foreign(crate::error::chain(&e)),
            Ok(text) => match serde_json::from_slice::<SandboxRecord>(&text) {
                Ok(record) if record.id.0 == name => Found::Record(Box::new(record)),
                Ok(_) => Found::Foreign(format!("{} names another id", file.display())),
                Err(e) => Found::Foreign(format!("read {}: {e}", file.display())),
            },
        });
    }
    Ok(all)
}

/// Whether a name is an id of ours.
pub(crate) fn is_id(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The text of resolv.conf(5).
fn resolv_conf(dns: &DnsConfig) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.searches.is_empty() {
        let _ = writeln!(text, "search {}", dns.searches.join(" "));
    }
    if !dns.options.is_empty() {
        let _ = writeln!(text, "options {}", dns.options.join(" "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_has_one_line_per_server_and_one_each_for_search_and_options() {
        let dns = DnsConfig {
            servers: vec!["10.0.0.10".into(), "10.0.0.11".into()],
            searches: vec!["a.svc".into(), "svc".into()],
            options: vec!["ndots:5".into()],
        };
        let text = resolv_conf(&dns);
        let expected = "nameserver 10.0.0.10\nnameserver 10.0.0.11\n\
                        search a.svc svc\noptions ndots:5\n";
        assert_eq!(text, expected);
        assert_eq!(resolv_conf(&DnsConfig::default()), "");
    }
}
