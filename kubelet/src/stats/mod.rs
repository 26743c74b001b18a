//! What the node, its pods and their containers take: CPU, memory, disk, network.
//!
//! ```text
//!  engine: cgroups, sandboxes, writable layers --+
//!  /proc (machine)                               +--> collect --> summary (JSON of /stats/summary)
//!  pod index, volumes                            |            \-> resource (text for metrics-server)
//!  disk (walks, remembered), rates (CPU now) ----+   cadvisor  --> text of /metrics/cadvisor
//! ```
//!
//! Nothing is polled: a reader's request reads the kernel's counters, and only what cannot be had
//! that way (sizes of directories) is remembered between requests. Everything here blocks shortly;
//! call it off the async threads. Forbidden: any decision about pods; those who decide (eviction)
//! read a [`summary::Summary`].

pub mod cadvisor;
mod claims;
pub mod collect;
mod disk;
pub mod machine;
mod rates;
pub mod resource;
mod samples;
pub mod summary;
#[cfg(test)]
mod tests;

pub use collect::{Stats, VolumePaths};
