//! System calls, netlink, cgroups, mounts and namespaces as safe, typed functions.
//!
//! The only crate that may say `unsafe`. Blocking throughout, no async runtime, no policy: what
//! is wanted is decided by the callers, here it is done.
pub mod cgroup;
pub mod command;
pub mod netlink;
pub mod nft;
pub mod seccomp;
pub mod sysctl;
pub mod fs;
pub mod mountinfo;
pub mod netns;
pub mod caps;
pub mod event;
pub mod fdpass;
pub mod mount;
pub mod process;
pub mod tty;
pub mod user;
