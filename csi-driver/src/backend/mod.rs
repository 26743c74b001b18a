//! Bytes, devices, filesystems, mounts. Knows no request and no promise.
//!
//! Filesystems are made here only on files that were just created for it ([`format`]); nothing on
//! the way to a mount ever formats or repairs.

pub mod attach;
pub mod format;
pub mod freeze;
pub mod grow;
pub mod image;
pub mod mounts;
pub mod superblock;
