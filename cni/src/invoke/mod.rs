//! The runtime's side of CNI: network lists, chains of plugins, records of what was attached.
//!
//! All calls block (they exec plugins and wait for them); call them from a blocking thread.
//! ADDs and DELs of different attachments may run at the same time; GC waits for them and keeps
//! new ones out while it runs. One attachment must not be worked on by two callers at once.
//!
//! ```text
//! load ──▶ Networks ── add(&Attachment) ──▶ Attached { ips, … }
//!                      check / del / gc / status
//! ```
//!
//! What survives a kill: a record is written before the first plugin runs; [`Networks::recorded`]
//! lists them, [`Networks::del`] undoes a half-done ADD, and [`Networks::gc`] frees what belongs
//! to nobody. DEL needs neither the network namespace nor the present configuration: it uses the
//! configuration that ADD used.

mod chain;
mod conflist;
mod error;
mod record;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::conflist::NetworkList;
pub(crate) use self::conflist::valid_name;
use self::record::{Record, Records};
use crate::types::{AttachResult, Dns, Interface, SpecVersion};

pub use self::error::{InvokeError, LoadError, Verb};

/// How long one plugin may take. A healthy one takes milliseconds, a delegated DHCP many seconds.
const DEFAULT_TIME_LIMIT: Duration = Duration::from_secs(60);

/// The network that containers are attached to, as found in the configuration directory.
#[derive(Debug)]
pub struct Networks {
    list: NetworkList,
    rejected: Vec<LoadError>,
    bin_dirs: Vec<PathBuf>,
    records: Records,
    conf_dir: PathBuf,
    stamp: Option<Stamp>,
    settled: bool,
    time_limit: Duration,
    /// Read by ADD, DEL and CHECK, written by GC: the specification forbids them side by side.
    gate: RwLock<()>,
}

/// What tells that the configuration directory changed.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    dir: SystemTime,
    file: SystemTime,
}

/// One container's place in the network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// The sandbox's id: letters, digits, `.`, `_`, `-`.
    pub container_id: String,
    /// Path of the pinned network namespace. Empty or dead is fine for DEL.
    pub netns: PathBuf,
    /// Interface to make in it, usually `eth0`.
    pub ifname: String,
    /// Passed as `K8S_POD_NAME`.
    pub pod_name: String,
    /// Passed as `K8S_POD_NAMESPACE`.
    pub pod_namespace: String,
    /// Passed as `K8S_POD_UID`.
    pub pod_uid: String,
    /// Values for plugins that declared the capability: `portMappings`, `bandwidth`, `dns`, …
    #[serde(default)]
    pub capability_args: BTreeMap<String, Value>,
}

/// Names an attachment for [`Networks::gc`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttachmentKey {
    /// The sandbox's id.
    pub container_id: String,
    /// The interface in it.
    pub ifname: String,
}

impl std::fmt::Display for AttachmentKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.container_id, self.ifname)
    }
}

impl Attachment {
    /// Its name.
    #[must_use]
    pub fn key(&self) -> AttachmentKey {
        AttachmentKey {
            container_id: self.container_id.clone(),
            ifname: self.ifname.clone(),
        }
    }
}

/// What an ADD gave the container.
#[derive(Debug, Clone, PartialEq)]
pub struct Attached {
    /// Addresses of the container with their prefix lengths, the primary one first.
    pub ips: Vec<IpNet>,
    /// Interfaces made, on the node (empty `sandbox`) and in the container.
    pub interfaces: Vec<Interface>,
    /// Resolver settings of the network.
    pub dns: Dns,
    /// The last plugin's result as it printed it.
    pub raw: Value,
}

impl Attached {
    fn from_raw(raw: Value) -> Result<Self, crate::types::ResultError> {
        let result = AttachResult::from_value(&raw)?;
        Ok(Self {
            ips: result.container_addresses(),
            interfaces: result.interfaces,
            dns: result.dns,
            raw,
        })
    }
}

impl Networks {
    /// Reads the first valid `.conflist`, `.conf` or `.json` of `conf_dir` in the order of names.
    /// Executables are looked up in `bin_dirs` at each call; records live in `record_dir`, which
    /// should be on a tmpfs and is made when needed.
    ///
    /// # Errors
    /// [`LoadError`] naming the file and field when no file is valid (the first broken one), or
    /// the directory when it holds none.
    pub fn load(
        conf_dir: &Path,
        bin_dirs: &[PathBuf],
        record_dir: &Path,
    ) -> Result<Self, LoadError> {
        let begun = SystemTime::now();
        let (list, rejected) = conflist::first_valid(conf_dir)?;
        let stamp = stamp(conf_dir, &list.file);
        Ok(Self {
            settled: stamp
                .as_ref()
                .is_some_and(|s| s.dir.max(s.file) + CLOCK_TICK < begun),
            stamp,
            list,
            rejected,
            bin_dirs: bin_dirs.to_vec(),
            records: Records::in_dir(record_dir),
            conf_dir: conf_dir.to_owned(),
            time_limit: DEFAULT_TIME_LIMIT,
            gate: RwLock::new(()),
        })
    }

    /// The same with another limit on each plugin's run time.
    #[must_use]
    pub fn with_time_limit(mut self, limit: Duration) -> Self {
        self.time_limit = limit;
        self
    }

    /// Name of the network.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.list.name
    }

    /// The file it was read from.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.list.file
    }

    /// Why files before [`Networks::file`] were passed over; worth a warning each.
    #[must_use]
    pub fn rejected(&self) -> &[LoadError] {
        &self.rejected
    }

    /// Whether the directory still looks as it did (two `stat` calls): when not, load again.
    ///
    /// What was loaded within a tick of the kernel's clock of a change never counts as current: a
    /// second change in that tick would leave the same times behind.
    #[must_use]
    pub fn is_current(&self) -> bool {
        let now = stamp(&self.conf_dir, &self.list.file);
        now.is_some() && now == self.stamp && self.settled
    }

    /// Runs the chain in order, each plugin given the result of the one before, and records the
    /// last result. An attachment already made is given back as recorded, without running
    /// anything.
    ///
    /// # Errors
    /// [`InvokeError`]. Nothing is undone here: call [`Networks::del`], which is needed after a
    /// failed ADD anyway (the specification asks for it).
    pub fn add(&self, attachment: &Attachment) -> Result<Attached, InvokeError> {
        let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        validate(attachment)?;
        if let Some(raw) = self.recorded_result(attachment)
            && let Ok(attached) = Attached::from_raw(raw)
        {
            return Ok(attached);
        }
        let mut record = Record::new(
            &self.list.name,
            &self.list.file,
            &self.list.source,
            attachment,
        );
        self.write(Verb::Add, &record)?;
        let raw = self.chain(&self.list).add(attachment)?;
        let last = &self.list.plugins[self.list.plugins.len() - 1].kind;
        let attached = Attached::from_raw(raw.clone()).map_err(|source| InvokeError::Answer {
            verb: Verb::Add,
            network: self.list.name.clone(),
            plugin: last.clone(),
            source,
        })?;
        record.result = Some(raw);
        self.write(Verb::Add, &record)?;
        Ok(attached)
    }

    /// Runs the chain backwards and forgets the attachment. Idempotent; works with an empty or
    /// dead namespace, after a failed or interrupted ADD, and after the configuration changed.
    ///
    /// # Errors
    /// [`InvokeError`] of the plugin that failed; the record is kept, so that calling again (or
    /// [`Networks::gc`]) goes on.
    pub fn del(&self, attachment: &Attachment) -> Result<(), InvokeError> {
        let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        validate(attachment)?;
        self.del_inside_gate(attachment)
    }

    fn del_inside_gate(&self, attachment: &Attachment) -> Result<(), InvokeError> {
        let (id, ifname) = (&attachment.container_id, &attachment.ifname);
        let record = self.records.read(&self.list.name, id, ifname);
        let then = record
            .as_ref()
            .and_then(|r| conflist::parse(&r.file, r.config.clone()).ok());
        let list = then.as_ref().unwrap_or(&self.list);
        let previous = record.as_ref().and_then(|r| r.result.as_ref());
        // What ADD was given names what must be freed (host ports, ranges), whatever holds today.
        let mut attachment = attachment.clone();
        if let Some(record) = &record {
            let then = &record.attachment.capability_args;
            attachment.capability_args.clone_from(then);
        }
        if !attachment.netns.exists() {
            attachment.netns = PathBuf::new();
        }
        self.chain(list).del(&attachment, previous)?;
        self.records
            .remove(&self.list.name, id, ifname)
            .map_err(|source| InvokeError::Record {
                verb: Verb::Del,
                network: self.list.name.clone(),
                operation: "remove",
                file: self.records.file(&self.list.name, id, ifname),
                source,
            })
    }

    /// Asks every plugin whether the attachment is still as its ADD made it. Succeeds without
    /// asking when the list disables CHECK or its version has none.
    ///
    /// # Errors
    /// [`InvokeError::Refused`] with the first difference, [`InvokeError::NoResult`] when no ADD
    /// is recorded.
    pub fn check(&self, attachment: &Attachment) -> Result<(), InvokeError> {
        let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        validate(attachment)?;
        if self.list.disable_check || !self.list.version.has_check() {
            return Ok(());
        }
        let Some(previous) = self.recorded_result(attachment) else {
            let network = self.list.name.clone();
            return Err(InvokeError::NoResult {
                network,
                key: attachment.key().to_string(),
            });
        };
        self.chain(&self.list).check(attachment, &previous)
    }

    /// Frees everything of this network that belongs to none of `valid`: DEL for recorded
    /// attachments, then GC of every plugin (1.1.0 lists, unless disabled).
    ///
    /// `valid` is called after new ADDs have been locked out, so that an attachment made while
    /// the caller gathered his list is never taken for garbage. It must name every attachment
    /// whose ADD was begun and not yet undone.
    ///
    /// # Errors
    /// The first [`InvokeError`], after everything else has been tried.
    pub fn gc(&self, valid: impl FnOnce() -> Vec<AttachmentKey>) -> Result<GcReport, InvokeError> {
        let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let valid = valid();
        let mut report = GcReport::default();
        let mut failed = None;
        for record in self.records_of(Verb::Gc)? {
            let key = record.attachment.key();
            if record.network != self.list.name || valid.contains(&key) {
                continue;
            }
            match self.del_inside_gate(&record.attachment) {
                Ok(()) => report.detached.push(key),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        if self.list.version.has_gc_and_status() && !self.list.disable_gc {
            let outcome = self.chain(&self.list).gc(&valid);
            failed = failed.or(outcome.err());
        }
        failed.map_or(Ok(report), Err)
    }

    /// Whether ADD can be served: every executable is there and, from 1.1.0 on, says so.
    ///
    /// # Errors
    /// [`InvokeError`] of the first plugin that is missing or not ready.
    pub fn status(&self) -> Result<(), InvokeError> {
        self.chain(&self.list).status()
    }

    /// Attachments of this network whose ADD was begun and not undone, with what they got (none
    /// when the ADD did not finish). For adoption after a restart.
    ///
    /// # Errors
    /// [`InvokeError::Record`] when the directory cannot be listed.
    pub fn recorded(&self) -> Result<Vec<(Attachment, Option<Attached>)>, InvokeError> {
        let records = self.records_of(Verb::Add)?.into_iter();
        Ok(records
            .filter(|record| record.network == self.list.name)
            .map(|record| {
                let attached = record.result.and_then(|raw| Attached::from_raw(raw).ok());
                (record.attachment, attached)
            })
            .collect())
    }

    /// The version spoken with this network's plugins.
    #[must_use]
    pub fn version(&self) -> SpecVersion {
        self.list.version
    }

    fn recorded_result(&self, attachment: &Attachment) -> Option<Value> {
        let (id, ifname) = (&attachment.container_id, &attachment.ifname);
        let record = self.records.read(&self.list.name, id, ifname)?;
        record
            .result
            .filter(|_| record.attachment.netns == attachment.netns)
    }

    fn records_of(&self, verb: Verb) -> Result<Vec<Record>, InvokeError> {
        self.records.all().map_err(|source| InvokeError::Record {
            verb,
            network: self.list.name.clone(),
            operation: "list",
            file: self.records.file(&self.list.name, "*", "*"),
            source,
        })
    }

    fn write(&self, verb: Verb, record: &Record) -> Result<(), InvokeError> {
        let a = &record.attachment;
        self.records
            .write(record)
            .map_err(|source| InvokeError::Record {
                verb,
                network: self.list.name.clone(),
                operation: "write",
                file: self
                    .records
                    .file(&self.list.name, &a.container_id, &a.ifname),
                source,
            })
    }

    fn chain<'a>(&'a self, list: &'a NetworkList) -> chain::Chain<'a> {
        chain::Chain {
            list,
            bin_dirs: &self.bin_dirs,
            time_limit: self.time_limit,
        }
    }
}

/// What a garbage collection did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Recorded attachments that were detached; plugins may have freed more by themselves.
    pub detached: Vec<AttachmentKey>,
}

/// More than one tick of the clock that files are stamped with (10 ms at CONFIG_HZ=100).
const CLOCK_TICK: Duration = Duration::from_millis(20);

fn stamp(dir: &Path, file: &Path) -> Option<Stamp> {
    let modified = |path: &Path| path.metadata().and_then(|m| m.modified()).ok();
    Some(Stamp {
        dir: modified(dir)?,
        file: modified(file)?,
    })
}

/// The kernel's rule for interface names, and none that would not be a file name.
pub(crate) fn valid_ifname(name: &str) -> bool {
    let forbidden = |c: char| c == '/' || c == ':' || c == '@' || c.is_whitespace();
    // IFNAMSIZ is 16 with the closing zero.
    (1..=15).contains(&name.len()) && name != "." && name != ".." && !name.contains(forbidden)
}

/// Everything here becomes part of environment variables and file names.
fn validate(attachment: &Attachment) -> Result<(), InvokeError> {
    let bad = |field, value: &str, problem| InvokeError::BadAttachment {
        key: attachment.key().to_string(),
        field,
        value: value.to_owned(),
        problem,
    };
    if !valid_name(&attachment.container_id) {
        let problem = "may hold only letters, digits, '.', '_', '-'";
        return Err(bad("container id", &attachment.container_id, problem));
    }
    if !valid_ifname(&attachment.ifname) {
        return Err(bad(
            "interface",
            &attachment.ifname,
            "is not an interface name",
        ));
    }
    for (field, value) in [
        ("pod name", &attachment.pod_name),
        ("pod namespace", &attachment.pod_namespace),
        ("pod uid", &attachment.pod_uid),
    ] {
        // ';' and '=' separate CNI_ARGS.
        if value.contains([';', '=', '\0']) {
            return Err(bad(field, value, "holds ';', '=' or a zero byte"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
