//! The network list that runtimes read: written once pods can be served, whole by rename, and kept
//! when the agent ends, for pods come and go without it.

use std::path::{Path, PathBuf};

use cni_routed::Routed;
use linux::fs::{Durability, FsError, read_file, write_atomic};
use serde_json::{Value, json};

/// Ours is a few hundred bytes.
const MAX_BYTES: usize = 1 << 20;

/// Where and what.
#[derive(Debug, Clone)]
pub(crate) struct NetworkList {
    path: PathBuf,
    text: String,
}

impl NetworkList {
    /// The list of a network with our plugin alone.
    pub(crate) fn new(
        dir: &Path,
        file: &str,
        network: &str,
        plugin: Routed,
        state_dir: &Path,
    ) -> Self {
        let mut own = json!({
            "type": plugin.kind,
            "capabilities": {"bandwidth": true, "ips": true, "mac": true, "portMappings": true},
        });
        if state_dir != Path::new(plugin.state_dir) {
            own["stateDir"] = Value::String(state_dir.display().to_string());
        }
        let list = json!({"cniVersion": "1.1.0", "name": network, "plugins": [own]});
        Self {
            path: dir.join(file),
            // A value of strings and flags always prints.
            text: serde_json::to_string_pretty(&list).unwrap_or_default() + "\n",
        }
    }

    /// Puts it in place unless it is so; returns whether it had to.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn ensure(&self) -> Result<bool, FsError> {
        if read_file(&self.path, MAX_BYTES).is_ok_and(|found| found == self.text.as_bytes()) {
            return Ok(false);
        }
        if let Some(dir) = self.path.parent() {
            linux::fs::create_dirs(dir, 0o755)?;
        }
        write_atomic(
            &self.path,
            self.text.as_bytes(),
            0o644,
            Durability::PowerLoss,
        )?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_one_a_runtime_takes_and_is_written_once() {
        let dir = tempfile::tempdir().unwrap();
        let state_dir = Path::new("/run/elsewhere");
        let list = NetworkList::new(
            dir.path(),
            "10-x.conflist",
            "x",
            cni_routed::VXLAN,
            state_dir,
        );
        assert!(list.ensure().unwrap());
        assert!(!list.ensure().unwrap());
        let text = std::fs::read(dir.path().join("10-x.conflist")).unwrap();
        let value: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(value["plugins"][0]["type"], "cni-vxlan");
        assert_eq!(value["plugins"][0]["stateDir"], "/run/elsewhere");
        std::fs::write(&list.path, "{").unwrap();
        assert!(list.ensure().unwrap());
    }
}
