//! The lab's record, `lab.json`: written before a thing is made, completed after, so that `down`
//! and a second `up` know what is there even when the program that made it was killed.
//!
//! A restart may assume: a process listed without an identity may or may not run (it is then found
//! by its owner variable); nodes listed may or may not have links. Pids of an earlier boot mean
//! nothing.

use super::addons::ProxyMode;
use super::layout::{Family, Layout, MAX_INDEX};
use super::podnet::Network;
use crate::process::ProcessIdentity;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Version of the record's form.
const VERSION: u32 = 1;

/// What a node runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeKind {
    /// Our kubelet with its own runtime.
    Ferrule,
    /// The stock kubelet on containerd and runc, for comparison.
    Stock,
}

/// A long-lived process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// What it was started with; another value means it has to be replaced.
    pub fingerprint: String,
    /// `None` while it is being started.
    pub identity: Option<ProcessIdentity>,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Number from 1, which decides its addresses.
    pub number: usize,
    /// What it runs.
    pub kind: NodeKind,
    /// The process that holds its namespaces; `None` while they are being made.
    pub holder: Option<ProcessIdentity>,
    /// The pods' networks the controller manager gave it, the first family first; empty before.
    #[serde(default)]
    pub pod_networks: Vec<String>,
    /// Size of a disk of its own; without one it shares the machine's.
    #[serde(default)]
    pub disk_bytes: Option<u64>,
}

/// The whole record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabState {
    version: u32,
    /// The lab's name.
    pub name: String,
    /// The lab's number.
    pub index: u8,
    /// Addresses of nodes, pods and services: decided once, when the control plane is made.
    #[serde(default)]
    pub family: Family,
    /// How pods of different nodes reach each other: decided with the first node.
    #[serde(default)]
    pub network: Network,
    /// How kube-proxy was told to write its rules, if it was.
    #[serde(default)]
    pub proxy_mode: Option<ProxyMode>,
    /// Boot the pids belong to.
    pub boot_id: String,
    /// Processes by name, such as `etcd` and `node-1/kubelet`.
    pub processes: BTreeMap<String, ProcessRecord>,
    /// Nodes by name.
    pub nodes: BTreeMap<String, NodeRecord>,
}

impl LabState {
    /// Reads the record of the lab `name`; `None` when there is no such lab.
    ///
    /// # Errors
    /// When the record cannot be read or is of another version.
    pub fn load(labs: &Path, name: &str) -> Result<Option<Self>> {
        let path = labs.join(name).join("lab.json");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        let mut state: Self =
            serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))?;
        if state.version != VERSION {
            bail!(
                "{} has version {}, not {VERSION}",
                path.display(),
                state.version
            );
        }
        let boot_id = boot_id()?;
        if state.boot_id != boot_id {
            state.forget_processes();
            state.boot_id = boot_id;
        }
        Ok(Some(state))
    }

    /// Reads the record of the lab `name`, or begins a new one with a free number. The default
    /// lab prefers number 0.
    ///
    /// # Errors
    /// When a record cannot be read or every number is taken.
    pub fn load_or_new(labs: &Path, name: &str) -> Result<Self> {
        if let Some(state) = Self::load(labs, name)? {
            return Ok(state);
        }
        let taken = taken(labs)?;
        let first = u8::from(name != super::DEFAULT_LAB);
        let index = (first..=MAX_INDEX)
            .find(|index| !taken.contains(index))
            .with_context(|| format!("all {MAX_INDEX} lab numbers are taken; take a lab down"))?;
        let layout = Layout::new(labs, name, index)?;
        let state = Self {
            version: VERSION,
            name: name.to_owned(),
            index,
            family: Family::default(),
            network: Network::default(),
            proxy_mode: None,
            boot_id: boot_id()?,
            processes: BTreeMap::new(),
            nodes: BTreeMap::new(),
        };
        fs::create_dir_all(&layout.dir)
            .with_context(|| format!("create {}", layout.dir.display()))?;
        state.save(labs)?;
        Ok(state)
    }

    /// Writes the record, whole or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, labs: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).context("serialise the lab's record")?;
        write_file(&labs.join(&self.name).join("lab.json"), &text, 0o644)
    }

    fn forget_processes(&mut self) {
        self.processes.clear();
        for node in self.nodes.values_mut() {
            node.holder = None;
        }
    }
}

/// Names of all labs on this machine.
///
/// # Errors
/// When the directory of labs cannot be listed.
pub fn lab_names(labs: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(labs) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("list {}", labs.display())),
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    Ok(names)
}

fn taken(labs: &Path) -> Result<BTreeSet<u8>> {
    let mut taken = BTreeSet::new();
    for name in lab_names(labs)? {
        if let Some(state) = LabState::load(labs, &name)? {
            taken.insert(state.index);
        }
    }
    Ok(taken)
}

fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    Ok(fs::read_to_string(path)
        .with_context(|| format!("read {path}"))?
        .trim()
        .to_owned())
}

/// Writes a file under another name and renames it, creating its directory.
///
/// # Errors
/// When it cannot be written.
pub fn write_file(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let dir = path.parent().context("a file needs a directory")?;
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = dir.join(name);
    let write = || -> std::io::Result<()> {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&temporary)?;
        file.write_all(content)?;
        fs::rename(&temporary, path)
    };
    write().with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> std::path::PathBuf {
        let dir = std::env::temp_dir().join(format!("ferrule-{name}-{}", std::process::id()));
        drop(fs::remove_dir_all(&dir));
        dir
    }

    #[test]
    fn labs_get_numbers_of_their_own_and_keep_them() {
        let labs = scratch("labs");
        let default = LabState::load_or_new(&labs, crate::cluster::DEFAULT_LAB).unwrap();
        let other = LabState::load_or_new(&labs, "other").unwrap();
        let third = LabState::load_or_new(&labs, "third").unwrap();
        assert_eq!((default.index, other.index, third.index), (0, 1, 2));
        assert_eq!(LabState::load_or_new(&labs, "other").unwrap(), other);
        fs::remove_dir_all(labs).unwrap();
    }

    #[test]
    fn pids_of_an_earlier_boot_are_forgotten() {
        let labs = scratch("boot");
        let mut state = LabState::load_or_new(&labs, "a").unwrap();
        let identity = Some(ProcessIdentity {
            pid: 1,
            start_time: 1,
        });
        state.boot_id = "earlier".into();
        state.processes.insert(
            "etcd".into(),
            ProcessRecord {
                fingerprint: String::new(),
                identity,
            },
        );
        state.save(&labs).unwrap();
        assert!(
            LabState::load(&labs, "a")
                .unwrap()
                .unwrap()
                .processes
                .is_empty()
        );
        fs::remove_dir_all(labs).unwrap();
    }
}
