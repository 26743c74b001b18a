//! Attachment records: what was attached, with which configuration, with what result.
//!
//! One file per attachment, written by temp and rename. A record is written *before* the first
//! plugin runs and again with the result, so that after a kill at any point the next start knows
//! what to DEL. A record that cannot be read never blocks a DEL: it counts as absent.
//!
//! No fsync: a record is about a network namespace, which no power cut survives. Put the
//! directory on a tmpfs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Attachment;

const KIND: &str = "ferrule.cni.attachment.v1";

/// What a record holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    kind: String,
    /// Name of the network.
    pub(crate) network: String,
    /// File the list was read from, for messages.
    pub(crate) file: PathBuf,
    /// The network list as ADD used it.
    pub(crate) config: Value,
    /// What was asked for.
    pub(crate) attachment: Attachment,
    /// The last plugin's result; none while ADD runs.
    pub(crate) result: Option<Value>,
}

impl Record {
    pub(crate) fn new(network: &str, file: &Path, config: &Value, attachment: &Attachment) -> Self {
        Self {
            kind: KIND.to_owned(),
            network: network.to_owned(),
            file: file.to_owned(),
            config: config.clone(),
            attachment: attachment.clone(),
            result: None,
        }
    }
}

/// The directory of records.
#[derive(Debug, Clone)]
pub(crate) struct Records {
    dir: PathBuf,
}

impl Records {
    pub(crate) fn in_dir(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    /// The file of one attachment. Names are checked before: none can leave the directory.
    pub(crate) fn file(&self, network: &str, container_id: &str, ifname: &str) -> PathBuf {
        // '@' is in none of the three, so no two attachments share a file.
        self.dir
            .join(format!("{network}@{container_id}@{ifname}.json"))
    }

    pub(crate) fn write(&self, record: &Record) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let a = &record.attachment;
        let file = self.file(&record.network, &a.container_id, &a.ifname);
        let staged = file.with_extension("tmp");
        fs::write(&staged, serde_json::to_vec(record)?)?;
        fs::rename(&staged, &file)
    }

    /// The record, or none when there is none or it is unreadable.
    pub(crate) fn read(&self, network: &str, container_id: &str, ifname: &str) -> Option<Record> {
        load(&self.file(network, container_id, ifname))
    }

    pub(crate) fn remove(&self, network: &str, container_id: &str, ifname: &str) -> io::Result<()> {
        match fs::remove_file(self.file(network, container_id, ifname)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Every readable record.
    pub(crate) fn all(&self) -> io::Result<Vec<Record>> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        let mut records = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "json") {
                records.extend(load(&path));
            }
        }
        Ok(records)
    }
}

fn load(file: &Path) -> Option<Record> {
    let record: Record = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    (record.kind == KIND).then_some(record)
}
