//! What the node's peer agent tells the plugin: one small file on tmpfs, written atomically.
//!
//! The file carries the boot id: of another boot it does not exist. The plugin needs nothing else
//! from the agent, so that pods come and go while the agent is down.

use std::io;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use linux::fs::{Durability, FsError, read_file, write_atomic};
use serde::{Deserialize, Serialize};

/// A few hundred bytes; more is not ours.
const MAX_STATE_BYTES: usize = 64 << 10;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const FILE: &str = "node.json";
const VERSION: u32 = 1;

/// The node's part of the pod network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeState {
    /// Addresses for the pods of this node: one network per family.
    pub pod_cidrs: Vec<IpNet>,
    /// MTU of a pod's interface in bytes.
    pub mtu_bytes: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    version: u32,
    boot_id: String,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Vec<IpNet>,
    mtu: u32,
}

/// There is no usable state.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The agent has not written it yet (since this boot).
    #[error("{0} is not there yet: does the peer agent run on this node?")]
    Missing(PathBuf),
    /// It cannot be read.
    #[error("read the peer agent's state")]
    Unreadable(#[source] FsError),
    /// It is not what an agent writes.
    #[error("{path} {problem}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The boot id cannot be read.
    #[error("read {BOOT_ID}")]
    BootId(#[source] io::Error),
    /// It cannot be written.
    #[error("write the peer agent's state")]
    Unwritable(#[source] FsError),
}

/// Reads the state in `dir`.
///
/// # Errors
/// [`StateError`]; [`StateError::Missing`] also for a file of another boot.
pub fn read(dir: &Path) -> Result<NodeState, StateError> {
    let path = dir.join(FILE);
    let bytes = match read_file(&path, MAX_STATE_BYTES) {
        Ok(bytes) => bytes,
        Err(error) if error.is_not_found() => return Err(StateError::Missing(path)),
        Err(error) => return Err(StateError::Unreadable(error)),
    };
    let (state, written_in) = parse(&bytes).map_err(|problem| StateError::Malformed {
        path: path.clone(),
        problem,
    })?;
    if written_in == boot_id()? {
        Ok(state)
    } else {
        Err(StateError::Missing(path))
    }
}

/// State and boot id; or what is wrong.
fn parse(bytes: &[u8]) -> Result<(NodeState, String), String> {
    let wire: Wire =
        serde_json::from_slice(bytes).map_err(|e| format!("is not an agent's state: {e}"))?;
    if wire.version != VERSION {
        return Err(format!("has version {}, not {VERSION}", wire.version));
    }
    if wire.pod_cidrs.is_empty() {
        return Err("holds no podCIDRs".into());
    }
    if let Some(bad) = wire.pod_cidrs.iter().find(|net| net.trunc() != **net) {
        return Err(format!("has host bits set in podCIDRs {bad}"));
    }
    let state = NodeState {
        pod_cidrs: wire.pod_cidrs,
        mtu_bytes: wire.mtu,
    };
    Ok((state, wire.boot_id))
}

/// Puts the state in place, unless it is so already; returns whether it had to.
///
/// # Errors
/// [`StateError`].
pub fn ensure(dir: &Path, state: &NodeState) -> Result<bool, StateError> {
    let path = dir.join(FILE);
    let wire = Wire {
        version: VERSION,
        boot_id: boot_id()?,
        pod_cidrs: state.pod_cidrs.clone(),
        mtu: state.mtu_bytes,
    };
    // Plain values always serialise.
    let text = serde_json::to_vec(&wire).unwrap_or_default();
    if read_file(&path, MAX_STATE_BYTES).is_ok_and(|found| found == text) {
        return Ok(false);
    }
    linux::fs::create_dirs(dir, 0o755).map_err(StateError::Unwritable)?;
    write_atomic(&path, &text, 0o644, Durability::Process).map_err(StateError::Unwritable)?;
    Ok(true)
}

fn boot_id() -> Result<String, StateError> {
    let text = std::fs::read_to_string(BOOT_ID).map_err(StateError::BootId)?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> NodeState {
        NodeState {
            pod_cidrs: vec![
                "10.244.1.0/24".parse().unwrap(),
                "fd00:1::/64".parse().unwrap(),
            ],
            mtu_bytes: 1450,
        }
    }

    #[test]
    fn what_the_agent_writes_the_plugin_reads() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/b");
        assert!(matches!(read(&inner), Err(StateError::Missing(_))));
        assert!(ensure(&inner, &state()).unwrap());
        assert!(!ensure(&inner, &state()).unwrap());
        assert_eq!(read(&inner).unwrap(), state());
    }

    #[test]
    fn state_of_another_boot_does_not_exist() {
        let dir = tempfile::tempdir().unwrap();
        ensure(dir.path(), &state()).unwrap();
        let path = dir.path().join(FILE);
        let boot = boot_id().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace(&boot, "another")).unwrap();
        assert!(matches!(read(dir.path()), Err(StateError::Missing(_))));
    }

    #[test]
    fn a_file_cut_anywhere_is_refused_and_written_again() {
        let dir = tempfile::tempdir().unwrap();
        ensure(dir.path(), &state()).unwrap();
        let path = dir.path().join(FILE);
        let text = std::fs::read(&path).unwrap();
        for length in 0..text.len() {
            std::fs::write(&path, &text[..length]).unwrap();
            let error = read(dir.path()).unwrap_err();
            assert!(
                matches!(error, StateError::Malformed { .. }),
                "{length}: {error}"
            );
        }
        assert!(ensure(dir.path(), &state()).unwrap());
        assert_eq!(read(dir.path()).unwrap(), state());
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
