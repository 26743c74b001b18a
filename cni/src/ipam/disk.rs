//! The store in files, under an exclusive lock held as long as the value lives.
//!
//! ```text
//! <dir>/lock                        flock
//!       state                       boot id, queues
//!       queue.<set>                 positions, 4 bytes each, a ring
//!       leases/<container>@<ifname> one lease
//!       claims/<address>            hard link to the lease of its holder: link(2) makes a second
//!                                   claim impossible
//! ```
//!
//! Text files are written by temp and rename and begin with a checksum; one that does not match
//! counts as absent. No fsync: after a power cut the boot id differs and all is void anyway.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use linux::failpoint;
use serde::{Deserialize, Serialize};

use super::{Cursor, Lease, Owner, Store};
use crate::state::{STAGED, boot_id, read_checked, remove_if_there, write_checked};

/// Where networks keep their leases unless configured otherwise: on a tmpfs.
pub const DEFAULT_DIR: &str = "/run/cni/ferrule";

/// Files under one directory.
#[derive(Debug)]
pub struct DirStore {
    dir: PathBuf,
    boot_id: String,
    /// Closing it gives the lock back; a kill does too.
    _lock: File,
}

#[derive(Serialize, Deserialize)]
struct State {
    boot_id: String,
    fingerprint: String,
    cursors: Vec<Cursor>,
}

#[derive(Serialize, Deserialize)]
struct LeaseFile {
    boot_id: String,
    lease: Lease,
}

impl DirStore {
    /// Opens the store of a network, waiting for others to leave it.
    ///
    /// # Errors
    /// When the directory or the lock cannot be made.
    pub fn open(base: &Path, network: &str) -> io::Result<Self> {
        Self::open_in_boot(&base.join(network), &boot_id()?)
    }

    /// The same with a given boot id.
    ///
    /// # Errors
    /// As [`DirStore::open`].
    pub fn open_in_boot(dir: &Path, boot_id: &str) -> io::Result<Self> {
        let lock_path = dir.join("lock");
        let open = || {
            OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&lock_path)
        };
        let lock = match open() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(dir.join("leases"))?;
                fs::create_dir_all(dir.join("claims"))?;
                open()?
            }
            other => other?,
        };
        lock.lock()?;
        let store = Self {
            dir: dir.to_owned(),
            boot_id: boot_id.to_owned(),
            _lock: lock,
        };
        store.begin()?;
        Ok(store)
    }

    /// Leaves of a former boot, of a directory made by halves or of a damaged state are cleared;
    /// valid leases of this boot stay.
    fn begin(&self) -> io::Result<()> {
        match read_checked::<State>(&self.dir.join("state")) {
            Some(state) if state.boot_id == self.boot_id => return Ok(()),
            Some(_) | None => {}
        }
        for sub in ["leases", "claims"] {
            fs::create_dir_all(self.dir.join(sub))?;
            for entry in fs::read_dir(self.dir.join(sub))? {
                let path = entry?.path();
                if self.read_lease(&path).is_none() {
                    remove_if_there(&path)?;
                }
            }
        }
        let state = State {
            boot_id: self.boot_id.clone(),
            fingerprint: String::new(),
            cursors: vec![],
        };
        write_checked(&self.dir.join("state"), &state)
    }

    fn lease_path(&self, owner: &Owner) -> PathBuf {
        self.dir
            .join("leases")
            .join(format!("{}@{}", owner.container_id, owner.ifname))
    }

    fn claim_path(&self, address: IpAddr) -> PathBuf {
        self.dir.join("claims").join(address.to_string())
    }

    fn read_lease(&self, path: &Path) -> Option<Lease> {
        let file: LeaseFile = read_checked(path)?;
        (file.boot_id == self.boot_id).then_some(file.lease)
    }
}

impl Store for DirStore {
    fn lease(&self, owner: &Owner) -> io::Result<Option<Lease>> {
        Ok(self
            .read_lease(&self.lease_path(owner))
            .filter(|lease| lease.owner == *owner))
    }

    fn put_lease(&mut self, lease: &Lease) -> io::Result<()> {
        let file = LeaseFile {
            boot_id: self.boot_id.clone(),
            lease: lease.clone(),
        };
        write_checked(&self.lease_path(&lease.owner), &file)
    }

    fn remove_lease(&mut self, owner: &Owner) -> io::Result<()> {
        remove_if_there(&self.lease_path(owner))
    }

    fn leases(&self) -> io::Result<Vec<Lease>> {
        let mut leases = Vec::new();
        for entry in fs::read_dir(self.dir.join("leases"))? {
            let entry = entry?;
            if entry.file_name() != STAGED {
                leases.extend(self.read_lease(&entry.path()));
            }
        }
        Ok(leases)
    }

    fn holder(&self, address: IpAddr) -> io::Result<Option<Owner>> {
        let lease = self.read_lease(&self.claim_path(address));
        Ok(lease
            .filter(|lease| lease.addresses.contains(&address))
            .map(|lease| lease.owner))
    }

    fn claim(&mut self, address: IpAddr, owner: &Owner) -> io::Result<()> {
        let (lease, claim) = (self.lease_path(owner), self.claim_path(address));
        failpoint::step();
        match fs::hard_link(&lease, &claim) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            other => return other,
        }
        match self.holder(address)? {
            Some(holder) if holder == *owner => Ok(()),
            Some(_) => Err(io::ErrorKind::AlreadyExists.into()),
            // Unreadable: nobody's.
            None => {
                remove_if_there(&claim)?;
                fs::hard_link(&lease, &claim)
            }
        }
    }

    fn release(&mut self, address: IpAddr) -> io::Result<()> {
        remove_if_there(&self.claim_path(address))
    }

    fn claimed(&self) -> io::Result<Vec<IpAddr>> {
        let mut claimed = Vec::new();
        for entry in fs::read_dir(self.dir.join("claims"))? {
            let name = entry?.file_name();
            let Some(address) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            if self.holder(address)?.is_some() {
                claimed.push(address);
            }
        }
        Ok(claimed)
    }

    fn cursors(&self, fingerprint: &str, sets: usize) -> io::Result<Vec<Cursor>> {
        let state = read_checked::<State>(&self.dir.join("state"));
        let known = state.filter(|s| s.fingerprint == fingerprint && s.cursors.len() == sets);
        Ok(known.map_or_else(|| vec![Cursor::default(); sets], |state| state.cursors))
    }

    fn put_cursors(&mut self, fingerprint: &str, cursors: &[Cursor]) -> io::Result<()> {
        let state = State {
            boot_id: self.boot_id.clone(),
            fingerprint: fingerprint.to_owned(),
            cursors: cursors.to_vec(),
        };
        write_checked(&self.dir.join("state"), &state)
    }

    fn queued(&self, set: usize, place: u64) -> io::Result<Option<u32>> {
        let file = match File::open(self.dir.join(format!("queue.{set}"))) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let mut bytes = [0; 4];
        match file.read_exact_at(&mut bytes, place.saturating_mul(4)) {
            Ok(()) => Ok(Some(u32::from_le_bytes(bytes))),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn enqueue(&mut self, set: usize, place: u64, position: u32) -> io::Result<()> {
        let path = self.dir.join(format!("queue.{set}"));
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)?;
        failpoint::step();
        file.write_all_at(&position.to_le_bytes(), place.saturating_mul(4))
    }
}
