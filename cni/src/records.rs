//! What was made for an attachment that cannot be found by its name in the kernel: host ports,
//! guarded hardware addresses. Written before the kernel is told, removed after it has forgotten,
//! so that DEL needs neither a namespace nor a previous result, and a flushed rule set can be put
//! back without the pods' help.
//!
//! ```text
//! <dir>/<network>/rules.lock                 held while records and rules change together
//!                 rules/<container>@<ifname> one record
//! ```
//!
//! An attachment without such things has no record: then this costs DEL one failed `open`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use linux::netlink::Mac;
use serde::{Deserialize, Serialize};

use crate::firewall::Forward;
use crate::ipam::Owner;
use crate::state::{STAGED, boot_id, read_checked, remove_if_there, write_checked};

/// What an attachment has in the kernel besides its links.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Whose.
    pub owner: Owner,
    /// Host ports.
    #[serde(default)]
    pub forwards: Vec<Forward>,
    /// Who keeps the host ports, and with which settings; opaque here.
    #[serde(default)]
    pub backend: Backend,
    /// The port of the bridge whose frames must have this source.
    #[serde(default)]
    pub guard: Option<Guard>,
    /// Addresses that the packet filter was told to let through.
    #[serde(default)]
    pub admitted: Vec<std::net::IpAddr>,
}

/// Which rule engine holds something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// nftables, in a table of our own.
    #[default]
    Nftables,
    /// iptables, in chains of our own.
    Iptables,
}

/// A port of a bridge that may send from one hardware address only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Guard {
    /// Name of the port.
    pub port: String,
    /// The address, six octets.
    pub mac: [u8; 6],
}

impl Guard {
    /// The address.
    #[must_use]
    pub fn mac(&self) -> Mac {
        Mac(self.mac)
    }
}

impl Record {
    /// Of an attachment that has nothing yet.
    #[must_use]
    pub fn of(owner: Owner) -> Self {
        Self {
            owner,
            forwards: Vec::new(),
            backend: Backend::default(),
            guard: None,
            admitted: Vec::new(),
        }
    }

    /// Whether there is nothing to write down.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.forwards.is_empty() && self.guard.is_none() && self.admitted.is_empty()
    }
}

#[derive(Serialize, Deserialize)]
struct RecordFile {
    boot_id: String,
    /// Nanoseconds of the clock: of two records about one port the later one counts.
    written: u64,
    record: Record,
}

fn now_nanoseconds() -> u64 {
    let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The records of one network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Records {
    dir: PathBuf,
}

/// Held while records and the kernel's rules are changed together. Closing it, or a kill, gives
/// it back.
#[derive(Debug)]
pub struct RulesLock(#[expect(dead_code, reason = "held, not read")] File);

impl Records {
    /// Those of a network below the directory its leases are in. Nothing is touched yet.
    #[must_use]
    pub fn of(base: &Path, network: &str) -> Self {
        Self {
            dir: base.join(network),
        }
    }

    fn path(&self, owner: &Owner) -> PathBuf {
        self.dir
            .join("rules")
            .join(format!("{}@{}", owner.container_id, owner.ifname))
    }

    /// Waits for others of this network to be done with its rules.
    ///
    /// # Errors
    /// When the directory or the lock cannot be made.
    pub fn lock(&self) -> io::Result<RulesLock> {
        let path = self.dir.join("rules.lock");
        let open = || {
            OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)
        };
        let lock = match open() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(self.dir.join("rules"))?;
                open()?
            }
            other => other?,
        };
        lock.lock()?;
        Ok(RulesLock(lock))
    }

    /// Writes a record down in place of the former one.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn put(&self, _lock: &RulesLock, record: &Record) -> io::Result<()> {
        let file = RecordFile {
            boot_id: boot_id()?,
            written: now_nanoseconds(),
            record: record.clone(),
        };
        let path = self.path(&record.owner);
        match write_checked(&path, &file) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(self.dir.join("rules"))?;
                write_checked(&path, &file)
            }
            other => other,
        }
    }

    /// The record of an owner; none when there is none that is whole and of this boot.
    ///
    /// # Errors
    /// When the boot id cannot be read.
    pub fn get(&self, owner: &Owner) -> io::Result<Option<Record>> {
        let found = read_checked::<RecordFile>(&self.path(owner));
        match found {
            None => Ok(None),
            Some(file) => {
                let now = boot_id()?;
                Ok(Some(file.record).filter(|r| file.boot_id == now && r.owner == *owner))
            }
        }
    }

    /// Whether there may be a record of this owner, whole or not.
    #[must_use]
    pub fn has(&self, owner: &Owner) -> bool {
        self.path(owner).exists()
    }

    /// Forgets an owner's record; none there is success.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn remove(&self, _lock: &RulesLock, owner: &Owner) -> io::Result<()> {
        remove_if_there(&self.path(owner))
    }

    /// All records of this boot, the oldest first. What is damaged or of a former boot is removed.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn all(&self, _lock: &RulesLock) -> io::Result<Vec<Record>> {
        let entries = match fs::read_dir(self.dir.join("rules")) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        let now = boot_id()?;
        let mut found: Vec<(u64, Record)> = Vec::new();
        for entry in entries {
            let entry = entry?;
            if entry.file_name() == STAGED {
                continue;
            }
            let path = entry.path();
            match read_checked::<RecordFile>(&path).filter(|file| file.boot_id == now) {
                Some(file) => found.push((file.written, file.record)),
                None => remove_if_there(&path)?,
            }
        }
        found.sort_by_key(|(written, _)| *written);
        Ok(found.into_iter().map(|(_, record)| record).collect())
    }

    /// Whether there is any record at all: one question, however many there are.
    #[must_use]
    pub fn any(&self) -> bool {
        let Ok(entries) = fs::read_dir(self.dir.join("rules")) else {
            return false;
        };
        entries.flatten().any(|entry| entry.file_name() != STAGED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::Forward;

    fn owner(n: usize) -> Owner {
        Owner {
            container_id: format!("c{n}"),
            ifname: "eth0".into(),
        }
    }

    fn sample(n: usize) -> Record {
        let forward = Forward {
            host_ip: None,
            protocol: 6,
            host_port: 8080,
            to: "10.1.0.2".parse().unwrap(),
            to_port: 80,
        };
        Record {
            forwards: vec![forward],
            ..Record::of(owner(n))
        }
    }

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir = Path::new("/dev/shm")
                .join(format!("ferrule-records-{}-{name}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            Self(dir)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_record_reads_back_and_is_forgotten() {
        let dir = Dir::new("reads-back");
        let records = Records::of(&dir.0, "net");
        assert!(!records.any() && !records.has(&owner(1)));
        assert_eq!(records.get(&owner(1)).unwrap(), None);
        let lock = records.lock().unwrap();
        records.put(&lock, &sample(1)).unwrap();
        records.put(&lock, &sample(2)).unwrap();
        assert_eq!(records.get(&owner(1)).unwrap(), Some(sample(1)));
        assert_eq!(records.all(&lock).unwrap(), [sample(1), sample(2)]);
        records.remove(&lock, &owner(1)).unwrap();
        records.remove(&lock, &owner(1)).unwrap();
        assert!(records.any() && !records.has(&owner(1)));
    }

    #[test]
    fn a_record_cut_at_any_byte_counts_as_none() {
        let dir = Dir::new("cut");
        let records = Records::of(&dir.0, "net");
        let lock = records.lock().unwrap();
        records.put(&lock, &sample(1)).unwrap();
        let path = records.path(&owner(1));
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(records.get(&owner(1)).unwrap(), None, "cut at {cut}");
            assert_eq!(records.all(&lock).unwrap(), []);
            assert!(!records.has(&owner(1)), "cleared");
        }
    }

    #[test]
    fn a_record_of_a_former_boot_does_not_exist() {
        let dir = Dir::new("boot");
        let records = Records::of(&dir.0, "net");
        let lock = records.lock().unwrap();
        let file = RecordFile {
            boot_id: "another".into(),
            written: 0,
            record: sample(1),
        };
        write_checked(&records.path(&owner(1)), &file).unwrap();
        assert_eq!(records.get(&owner(1)).unwrap(), None);
        assert_eq!(records.all(&lock).unwrap(), []);
    }
}
