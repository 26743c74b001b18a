//! `pod-shim`: the small process that stays with a pod, and the protocol the agent speaks to it.
//!
//! The library holds the wire types ([`protocol`]) and the framing, so that agent and shim share
//! one definition. Nothing here may depend on tokio or Kubernetes types.

pub mod protocol;
