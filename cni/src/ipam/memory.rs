//! The store in memory, for tests of everything above it.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::IpAddr;

use super::{Cursor, Lease, Owner, Store};

/// Keeps everything in maps.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore {
    leases: BTreeMap<Owner, Lease>,
    claims: BTreeMap<IpAddr, Owner>,
    cursors: Option<(String, Vec<Cursor>)>,
    queue: HashMap<(usize, u64), u32>,
}

impl Store for MemoryStore {
    fn lease(&self, owner: &Owner) -> io::Result<Option<Lease>> {
        Ok(self.leases.get(owner).cloned())
    }

    fn put_lease(&mut self, lease: &Lease) -> io::Result<()> {
        self.leases.insert(lease.owner.clone(), lease.clone());
        Ok(())
    }

    fn remove_lease(&mut self, owner: &Owner) -> io::Result<()> {
        self.leases.remove(owner);
        Ok(())
    }

    fn leases(&self) -> io::Result<Vec<Lease>> {
        Ok(self.leases.values().cloned().collect())
    }

    fn holder(&self, address: IpAddr) -> io::Result<Option<Owner>> {
        Ok(self.claims.get(&address).cloned())
    }

    fn claim(&mut self, address: IpAddr, owner: &Owner) -> io::Result<()> {
        let holder = self.claims.entry(address).or_insert_with(|| owner.clone());
        if holder == owner {
            Ok(())
        } else {
            Err(io::ErrorKind::AlreadyExists.into())
        }
    }

    fn release(&mut self, address: IpAddr) -> io::Result<()> {
        self.claims.remove(&address);
        Ok(())
    }

    fn claimed(&self) -> io::Result<Vec<IpAddr>> {
        Ok(self.claims.keys().copied().collect())
    }

    fn cursors(&self, fingerprint: &str, sets: usize) -> io::Result<Vec<Cursor>> {
        let known = self.cursors.as_ref().filter(|(of, _)| of == fingerprint);
        Ok(known.map_or_else(
            || vec![Cursor::default(); sets],
            |(_, cursors)| cursors.clone(),
        ))
    }

    fn put_cursors(&mut self, fingerprint: &str, cursors: &[Cursor]) -> io::Result<()> {
        self.cursors = Some((fingerprint.to_owned(), cursors.to_vec()));
        Ok(())
    }

    fn queued(&self, set: usize, place: u64) -> io::Result<Option<u32>> {
        Ok(self.queue.get(&(set, place)).copied())
    }

    fn enqueue(&mut self, set: usize, place: u64, position: u32) -> io::Result<()> {
        self.queue.insert((set, place), position);
        Ok(())
    }
}
