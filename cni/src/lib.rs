//! What every network plugin and the runtime share of the Container Network Interface.
//!
//! * [`types`]: results, errors and versions; wire forms stop there.
//! * [`skel`]: the frame of a plugin executable: environment and standard input in, JSON out.
//! * [`invoke`]: the runtime's side: network lists, chaining, result cache, time limits.
//! * [`ipam`]: address allocation, pure over a [`ipam::Store`].
//! * [`firewall`]: masquerade as data, applied by `linux::nft`.
//!
//! Everything is blocking and single-threaded: no task, no channel, no async runtime. A plugin's
//! one-shot path must neither fork (except for a delegated IPAM plugin), sleep, dump kernel
//! tables, nor talk to the API server. No policy of any one plugin lives here.

pub mod firewall;
pub mod invoke;
pub mod ipam;
pub mod skel;
pub mod types;
