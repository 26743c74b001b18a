//! What every network plugin and the runtime share of the Container Network Interface.
//!
//! * [`types`]: results, errors and versions; wire forms stop there.
//! * [`skel`]: the frame of a plugin executable: environment and standard input in, JSON out.
//! * [`invoke`]: the runtime's side: network lists, chaining, result cache, time limits.
//! * [`install`]: a program into a runtime's directory.
//! * [`ipam`]: address allocation, pure over a [`ipam::Store`].
//! * [`attach`]: names, addresses and routes of an attachment.
//! * [`firewall`]: masquerade, host ports, isolation as data, applied by `linux::nft` or iptables.
//! * [`bandwidth`], [`tuning`]: the keys of the plugins of these names.
//! * [`records`]: what of an attachment cannot be found by name in the kernel.
//! * [`keys`]: reading configurations; a bad key names itself.
//!
//! Everything is blocking and single-threaded: no task, no channel, no async runtime. A plugin's
//! one-shot path must neither fork (except for a delegated IPAM plugin), sleep, dump kernel
//! tables, nor talk to the API server. No policy of any one plugin lives here.

pub mod attach;
pub mod bandwidth;
pub mod firewall;
pub mod install;
pub mod invoke;
pub mod ipam;
pub mod keys;
pub mod records;
pub mod skel;
mod state;
pub mod tuning;
pub mod types;
