//! Address allocation. [`allocate`], [`free`] and friends are pure over a [`Store`]; the stores
//! are [`DirStore`] (files, under a lock) and [`MemoryStore`] (tests), held to one contract suite.
//!
//! ```text
//!  never used ──fresh──▶ claimed by a lease ──free──▶ back of the queue ──front──▶ claimed …
//! ```
//!
//! * First every address once in order, then the one that has been free the longest: an address
//!   is reused as late as possible, yet no cooldown ever makes an ADD wait. O(1) per operation.
//! * **The claim decides, the queue only advises.** An address is in use when its claim names an
//!   owner, and a second claim is impossible; a queue that a kill left behind, doubled or damaged
//!   costs order, never a double use. What the queue lost is found when it runs dry.
//! * Order of writes: lease, claims, queue when allocating; claims, queue, lease when freeing.
//!   After a kill in between, repeating the operation or [`collect`] finishes it.
//! * Leases are about network namespaces, which no reboot survives: each carries the boot id, and
//!   those of another boot do not exist.

mod allocator;
mod config;
mod disk;
mod memory;
mod range;
mod store;

pub use allocator::{AllocateError, allocate, available, collect, free};
pub use config::{ConfigError, HostLocal};
pub use disk::{DEFAULT_DIR, DirStore};
pub use memory::MemoryStore;
pub use range::{Pool, Range, RangeError, RangeSet};
pub use store::{Cursor, Lease, Owner, Store};

#[cfg(test)]
mod tests;
