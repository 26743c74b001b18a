//! Who a static pod is: UID, name on this node, namespace, annotations.

use super::Origin;
use crate::source::{
    ANNOTATION_HASH, ANNOTATION_MIRROR, ANNOTATION_SEEN, ANNOTATION_SOURCE, Source,
};
use k8s_openapi::api::core::v1::{Pod, Toleration};

/// The priority classes every cluster has, by which a node without an apiserver can go.
const CLASSES: [(&str, i32); 2] = [
    ("system-node-critical", 2_000_001_000),
    ("system-cluster-critical", 2_000_000_000),
];

/// Completes what the manifest says with what only the node knows.
pub(super) fn give(mut pod: Pod, origin: &Origin<'_>) -> Pod {
    let metadata = &mut pod.metadata;
    for own in [
        ANNOTATION_SOURCE,
        ANNOTATION_SEEN,
        ANNOTATION_MIRROR,
        ANNOTATION_HASH,
    ] {
        metadata.annotations.iter_mut().for_each(|a| {
            a.remove(own);
        });
    }
    // Whose business these are is decided elsewhere.
    metadata.deletion_timestamp = None;
    metadata.deletion_grace_period_seconds = None;
    metadata.resource_version = None;
    metadata.managed_fields = None;
    metadata.generation = None;
    metadata.self_link = None;
    pod.status = None;
    let uid = match pod.metadata.uid.take().filter(|uid| !uid.is_empty()) {
        Some(given) => given,
        None => hash(&pod, origin),
    };
    let metadata = &mut pod.metadata;
    let name = metadata.name.take().unwrap_or_default();
    metadata.name = Some(format!("{name}-{}", origin.node.to_lowercase()));
    if metadata.namespace.as_deref().unwrap_or_default().is_empty() {
        metadata.namespace = Some("default".to_owned());
    }
    let annotations = metadata.annotations.get_or_insert_default();
    annotations.insert(ANNOTATION_HASH.to_owned(), uid.clone());
    let source = origin.source.as_str().to_owned();
    annotations.insert(ANNOTATION_SOURCE.to_owned(), source);
    metadata.uid = Some(uid);
    let spec = pod.spec.get_or_insert_default();
    spec.node_name = Some(origin.node.to_owned());
    if spec.priority.is_none() {
        let class = spec.priority_class_name.as_deref().unwrap_or_default();
        let known = CLASSES.iter().find(|(name, _)| *name == class);
        spec.priority = known.map(|(_, value)| *value);
    }
    if origin.source == Source::File {
        tolerate_no_execute(spec.tolerations.get_or_insert_default());
    }
    pod
}

/// Static pods stay when the node has problems.
fn tolerate_no_execute(tolerations: &mut Vec<Toleration>) {
    let all = Toleration {
        operator: Some("Exists".to_owned()),
        effect: Some("NoExecute".to_owned()),
        ..Toleration::default()
    };
    let same = |t: &Toleration| {
        let set = |s: &Option<String>| s.clone().filter(|s| !s.is_empty());
        set(&t.key).is_none()
            && set(&t.value).is_none()
            && t.effect == all.effect
            && t.operator == all.operator
    };
    match tolerations.iter_mut().find(|t| same(t)) {
        Some(known) => *known = all,
        None => tolerations.push(all),
    }
}

/// 128 bits in hexadecimal over what the manifest says and where it lies.
fn hash(pod: &Pod, origin: &Origin<'_>) -> String {
    let mut state = Fnv::default();
    // Keys of maps are sorted, fields without a value are left out.
    state.add(
        serde_json::to_value(pod)
            .unwrap_or_default()
            .to_string()
            .as_bytes(),
    );
    match origin.source {
        Source::File => {
            state.add(format!("host:{}", origin.node).as_bytes());
            state.add(format!("file:{}", origin.place).as_bytes());
        }
        Source::Http | Source::Api => state.add(format!("url:{}", origin.place).as_bytes()),
    }
    format!("{:032x}", state.0)
}

/// FNV-1a of 128 bits: no secret is kept by it, and it never changes.
struct Fnv(u128);

impl Default for Fnv {
    fn default() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }
}

impl Fnv {
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 ^= u128::from(*byte);
            self.0 = self
                .0
                .wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_fnv_1a() {
        let mut state = Fnv::default();
        state.add(b"a");
        assert_eq!(
            format!("{:032x}", state.0),
            "d228cb696f1a8caf78912b704e4a8964"
        );
    }
}
