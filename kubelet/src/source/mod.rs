//! Where desired pods come from: the apiserver's watch. Static manifests will be a second one.
//!
//! A source sends [`PodChange`]s down one bounded channel. It tells when it has shown everything
//! once ([`PodChange::Synced`]); before that nothing may be taken for unknown.

pub mod apiserver;

use k8s_openapi::api::core::v1::Pod;
use std::sync::Arc;

/// Changes waiting for the manager. A full channel holds the watch back, nothing is lost.
pub const QUEUE: usize = 256;

/// News of desired pods.
#[derive(Debug, Clone)]
pub enum PodChange {
    /// A pod is new or changed. Repeats are harmless.
    Set(Arc<Pod>),
    /// The source no longer has the pod; its last object.
    Gone(Arc<Pod>),
    /// Everything that exists has been shown.
    Synced,
}
