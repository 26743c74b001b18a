//! System calls, netlink, cgroups, mounts and namespaces as safe, typed functions.
//!
//! The only crate that may say `unsafe`. Blocking throughout, no async runtime, no policy: what
//! is wanted is decided by the callers, here it is done.
pub mod blockfile;
pub mod caps;
pub mod cgroup;
pub mod command;
pub mod conntrack;
pub mod diskusage;
pub mod event;
pub mod failpoint;
pub mod fdpass;
pub mod fs;
pub mod loopdev;
pub mod mount;
pub mod mountinfo;
pub mod netdev;
pub mod netlink;
pub mod netns;
pub mod nft;
pub mod process;
pub mod seccomp;
pub mod sysconf;
pub mod sysctl;
pub mod tty;
pub mod user;
