//! Where desired pods come from: the apiserver's watch, and manifests in a directory or behind a
//! URL ("static" pods, which need no apiserver).
//!
//! ```text
//! apiserver --watch--------------------------+
//! file: inotify -> scan -> manifest --+      +--PodChange--> pod::manager
//! http: poll ------------> manifest --+-> published (what is new, changed, gone)
//! ```
//!
//! Every source sends [`PodChange`]s down one bounded channel and tells when it has shown
//! everything once ([`PodChange::Synced`]); before all have, nothing may be taken for unknown.
//! [`manifest`] is pure: bytes in, a complete and checked Pod out.

pub mod apiserver;
pub mod file;
pub mod http;
pub mod manifest;
mod published;

use k8s_openapi::api::core::v1::Pod;
use std::sync::Arc;

/// Changes waiting for the manager. A full channel holds the watch back, nothing is lost.
pub const QUEUE: usize = 256;

/// Annotation: which source a pod came from.
pub const ANNOTATION_SOURCE: &str = "kubernetes.io/config.source";
/// Annotation: when this agent first saw the manifest.
pub const ANNOTATION_SEEN: &str = "kubernetes.io/config.seen";
/// Annotation: hash of the manifest; equals the UID.
pub const ANNOTATION_HASH: &str = "kubernetes.io/config.hash";
/// Annotation: the pod is the apiserver's image of a static pod with that hash.
pub const ANNOTATION_MIRROR: &str = "kubernetes.io/config.mirror";

/// A source of pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// The apiserver.
    Api,
    /// A file or a directory of files.
    File,
    /// A URL.
    Http,
}

impl Source {
    /// The word in [`ANNOTATION_SOURCE`].
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::File => "file",
            Self::Http => "http",
        }
    }
}

/// News of desired pods.
#[derive(Debug, Clone)]
pub enum PodChange {
    /// A pod is new or changed. Repeats are harmless.
    Set(Arc<Pod>),
    /// The source no longer has the pod; its last object.
    Gone(Arc<Pod>),
    /// Everything the source has was shown.
    Synced(Source),
}

fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    let annotations = pod.metadata.annotations.as_ref()?;
    annotations.get(key).map(String::as_str)
}

/// Whether a pod comes from a manifest of this node. The apiserver's pods never do: their source
/// drops the annotation whoever wrote it.
pub fn is_static(pod: &Pod) -> bool {
    annotation(pod, ANNOTATION_SOURCE).is_some_and(|s| s != Source::Api.as_str())
}

/// Whether a pod of the apiserver is the image of a static pod: nothing to run.
pub fn is_mirror(pod: &Pod) -> bool {
    mirror_hash(pod).is_some()
}

/// The hash of the static pod that a mirror pod shows.
pub fn mirror_hash(pod: &Pod) -> Option<&str> {
    annotation(pod, ANNOTATION_MIRROR)
}

/// The hash of a static pod's manifest.
pub fn static_hash(pod: &Pod) -> Option<&str> {
    annotation(pod, ANNOTATION_HASH)
}
