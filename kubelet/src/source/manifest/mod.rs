//! A manifest: YAML or JSON in, pods out, with everything filled in that the apiserver would fill
//! in, and refused with the field's name where the apiserver would refuse it. Pure.
//!
//! Steps: [`decode`] (text to values to a Pod), [`identity`] (UID, name, node), [`defaults`],
//! [`validate`], [`references`] (what a pod without an apiserver may not ask for).
//!
//! The UID is a hash of what the manifest says, of its place and of the node's name: stable while
//! nothing changes, over restarts of the agent and of the machine. It is taken before defaults, so
//! that an agent that knows one more default does not restart a control plane.

mod decode;
mod defaults;
mod fields;
mod identity;
mod references;
#[cfg(test)]
mod tests;
mod validate;

use super::Source;
use crate::launch::qos;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use serde_json::Value;

/// Longest manifest read, as the stock kubelet.
pub const MAX_BYTES: u64 = 10 << 20;

/// Why a manifest cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Neither YAML nor JSON, or a field of the wrong type.
    #[error("couldn't parse as pod({0}), please check config file")]
    Parse(String),
    /// Something else than a pod.
    #[error("invalid pod: {0}")]
    Kind(String),
    /// Fields the apiserver would refuse.
    #[error("invalid pod: {}", listed(.0))]
    Invalid(Vec<String>),
    /// It needs an object of the API.
    #[error("static pods may not reference {0}")]
    Reference(&'static str),
}

fn listed(problems: &[String]) -> String {
    match problems {
        [only] => only.clone(),
        many => format!("[{}]", many.join(", ")),
    }
}

/// Where a manifest was found.
#[derive(Debug, Clone, Copy)]
pub struct Origin<'a> {
    /// The kind of source.
    pub source: Source,
    /// Path or URL.
    pub place: &'a str,
    /// The node's name.
    pub node: &'a str,
}

/// Reads the one pod of a file.
///
/// # Errors
/// See [`ManifestError`].
pub fn pod(text: &[u8], origin: &Origin<'_>) -> Result<Pod, ManifestError> {
    let tree = decode::tree(text)?;
    decode::expect_kind(&tree, "Pod")?;
    complete(tree, text, origin)
}

/// Reads a pod or a `PodList`.
///
/// # Errors
/// See [`ManifestError`]; one bad pod spoils its list.
pub fn pods(text: &[u8], origin: &Origin<'_>) -> Result<Vec<Pod>, ManifestError> {
    let mut tree = decode::tree(text)?;
    if tree.get("kind").and_then(Value::as_str) != Some("PodList") {
        decode::expect_kind(&tree, "Pod")?;
        return Ok(vec![complete(tree, text, origin)?]);
    }
    decode::expect_kind(&tree, "PodList")?;
    let items = match tree.get_mut("items").map(Value::take) {
        Some(Value::Array(items)) => items,
        Some(_) => {
            return Err(ManifestError::Parse("items is not a list".to_owned()));
        }
        None => Vec::new(),
    };
    let pods = items.into_iter().map(|item| complete(item, text, origin));
    pods.collect()
}

/// From a tree of values to a pod that can run.
fn complete(tree: Value, text: &[u8], origin: &Origin<'_>) -> Result<Pod, ManifestError> {
    let said = decode::typed(tree, text)?;
    if said.metadata.name.as_deref().unwrap_or_default().is_empty() {
        let what = "name is needed for the pod".to_owned();
        return Err(ManifestError::Kind(what));
    }
    let pod = identity::give(said, origin);
    // Through values: defaults and checks are a walk over named fields.
    let mut tree = serde_json::to_value(&pod).map_err(|e| ManifestError::Parse(e.to_string()))?;
    defaults::apply(&mut tree);
    let problems = validate::problems(&tree);
    if !problems.is_empty() {
        return Err(ManifestError::Invalid(problems));
    }
    if let Some(resource) = references::found(&tree) {
        return Err(ManifestError::Reference(resource));
    }
    let pod = serde_json::from_value::<Pod>(tree);
    let mut pod = pod.map_err(|e| ManifestError::Parse(e.to_string()))?;
    let class = qos::class(&pod).as_str().to_owned();
    pod.status = Some(PodStatus {
        phase: Some("Pending".to_owned()),
        qos_class: Some(class),
        ..PodStatus::default()
    });
    Ok(pod)
}
