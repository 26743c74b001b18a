//! What the allocator needs kept, and nothing more.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Who holds an address. Both parts are file names by the specification.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Owner {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.container_id, self.ifname)
    }
}

/// Addresses held by one owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Lease {
    /// Who.
    pub owner: Owner,
    /// One per range set.
    pub addresses: Vec<IpAddr>,
    /// Path of the network namespace, for people.
    pub netns: PathBuf,
}

/// The queue of one range set: positions below `fresh` were given away at least once, and those
/// free again wait at queue places `head..tail`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// First position never given away.
    pub fresh: u32,
    /// Place of the longest free position.
    pub head: u64,
    /// Place after the last freed one.
    pub tail: u64,
}

/// Keeps leases, claims and queues. A call either happens wholly or, killed, not at all;
/// nothing more is assumed. Whatever cannot be read back whole does not exist.
pub trait Store {
    /// The lease of an owner.
    ///
    /// # Errors
    /// When the store itself fails; so for every method.
    fn lease(&self, owner: &Owner) -> io::Result<Option<Lease>>;
    /// Keeps a lease in place of the owner's former one.
    ///
    /// # Errors
    /// As above.
    fn put_lease(&mut self, lease: &Lease) -> io::Result<()>;
    /// Forgets an owner's lease, if there is one.
    ///
    /// # Errors
    /// As above.
    fn remove_lease(&mut self, owner: &Owner) -> io::Result<()>;
    /// All leases, in no order.
    ///
    /// # Errors
    /// As above.
    fn leases(&self) -> io::Result<Vec<Lease>>;

    /// Who claims an address.
    ///
    /// # Errors
    /// As above.
    fn holder(&self, address: IpAddr) -> io::Result<Option<Owner>>;
    /// Claims an address for an owner whose lease was put before; refused with `AlreadyExists`
    /// while another holds it.
    ///
    /// # Errors
    /// As above.
    fn claim(&mut self, address: IpAddr, owner: &Owner) -> io::Result<()>;
    /// Drops a claim, if there is one.
    ///
    /// # Errors
    /// As above.
    fn release(&mut self, address: IpAddr) -> io::Result<()>;
    /// All claimed addresses, in no order.
    ///
    /// # Errors
    /// As above.
    fn claimed(&self) -> io::Result<Vec<IpAddr>>;

    /// The queues, or fresh ones when there are none for this pool.
    ///
    /// # Errors
    /// As above.
    fn cursors(&self, fingerprint: &str, sets: usize) -> io::Result<Vec<Cursor>>;
    /// Keeps the queues.
    ///
    /// # Errors
    /// As above.
    fn put_cursors(&mut self, fingerprint: &str, cursors: &[Cursor]) -> io::Result<()>;
    /// The position waiting at a place of a set's queue, if it can be read.
    ///
    /// # Errors
    /// As above.
    fn queued(&self, set: usize, place: u64) -> io::Result<Option<u32>>;
    /// Puts a position at a place of a set's queue.
    ///
    /// # Errors
    /// As above.
    fn enqueue(&mut self, set: usize, place: u64, position: u32) -> io::Result<()>;
}
