//! Sandboxes: a pod's namespaces, kept by one shim process, and its place in the network.

pub(crate) mod create;
pub(crate) mod shim;
pub mod state;
pub(crate) mod store;
pub(crate) mod teardown;
