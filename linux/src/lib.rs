//! (being written)
pub mod command;
pub mod netlink;
pub mod nft;
pub mod seccomp;
pub mod sysctl;
