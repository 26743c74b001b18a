//! `pod-shim`: the small process that stays with a pod, and the protocol the agent speaks to it.
//!
//! The library holds what both sides share: the wire types ([`protocol`]), the framing
//! ([`frame`]) and the start of a shim ([`client`]). Nothing here may depend on tokio or
//! Kubernetes types; everything works on plain descriptors, blocking or not.

pub mod client;
pub mod frame;
pub mod protocol;
