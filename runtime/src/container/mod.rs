//! Containers: a root filesystem, limits, and one process with what it starts.

pub(crate) mod create;
pub(crate) mod rootfs;
pub(crate) mod signal;
pub mod spec;
pub mod state;
pub(crate) mod store;
pub(crate) mod teardown;
pub mod users;
