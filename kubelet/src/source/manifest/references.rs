//! Objects of the API a pod asks for. A static pod may not: it has to run without an apiserver,
//! and must not be a way around what its node is allowed to read (PreventStaticPodAPIReferences).

use super::fields::{items, set, text};
use serde_json::Value;

/// Volumes that need no object of the API.
const OWN: [&str; 22] = [
    "awsElasticBlockStore",
    "azureDisk",
    "cephfs",
    "cinder",
    "downwardAPI",
    "emptyDir",
    "fc",
    "flexVolume",
    "flocker",
    "gcePersistentDisk",
    "gitRepo",
    "hostPath",
    "image",
    "iscsi",
    "nfs",
    "photonPersistentDisk",
    "portworxVolume",
    "quobyte",
    "rbd",
    "scaleIO",
    "storageos",
    "vsphereVolume",
];

/// Volumes that do, and the words for it.
const FOREIGN: [(&str, &str); 7] = [
    ("configMap", "configmaps (via configmap volumes)"),
    ("secret", "secrets (via secret volumes)"),
    ("csi", "csidrivers (via CSI volumes)"),
    ("glusterfs", "endpoints (via glusterFS volumes)"),
    ("persistentVolumeClaim", "persistentvolumeclaims"),
    (
        "ephemeral",
        "persistentvolumeclaims (via ephemeral volumes)",
    ),
    ("azureFile", "secrets (via azureFile volumes)"),
];

/// Sources of projected volumes that need one.
const PROJECTED: [(&str, &str); 5] = [
    ("configMap", "configmaps (via projected volumes)"),
    ("secret", "secrets (via projected volumes)"),
    (
        "serviceAccountToken",
        "serviceaccounts (via projected volumes)",
    ),
    ("clusterTrustBundle", "clustertrustbundles"),
    ("podCertificate", "podcertificates"),
];

/// The first kind of object asked for.
pub(super) fn found(pod: &Value) -> Option<&'static str> {
    let spec = pod.get("spec")?;
    // The second is the old name of the first.
    if ["serviceAccountName", "serviceAccount"]
        .iter()
        .any(|f| !text(spec, f).is_empty())
    {
        return Some("serviceaccounts");
    }
    if secrets(spec) {
        return Some("secrets");
    }
    if config_maps(spec) {
        return Some("configmaps");
    }
    if items(spec, "resourceClaims").next().is_some() {
        return Some("resourceclaims");
    }
    items(spec, "volumes").find_map(volume)
}

fn volume(volume: &Value) -> Option<&'static str> {
    if OWN.iter().any(|kind| set(volume, kind).is_some()) {
        return None;
    }
    let foreign = FOREIGN.iter().find(|(kind, _)| set(volume, kind).is_some());
    if let Some((_, words)) = foreign {
        return Some(words);
    }
    let projected = set(volume, "projected")?;
    items(projected, "sources").find_map(|source| {
        let known = PROJECTED
            .iter()
            .find(|(kind, _)| set(source, kind).is_some());
        known.map(|(_, words)| *words)
    })
}

/// Containers of all kinds.
fn containers(spec: &Value) -> impl Iterator<Item = &Value> {
    ["initContainers", "containers", "ephemeralContainers"]
        .into_iter()
        .flat_map(|kind| items(spec, kind))
}

/// Whether an environment reads a key (`secretKeyRef`) or all (`secretRef`) of a named object.
fn environment(spec: &Value, one: &str, all: &str) -> bool {
    let named = |reference: Option<&Value>| reference.is_some_and(|r| !text(r, "name").is_empty());
    containers(spec).any(|container| {
        items(container, "envFrom").any(|from| named(from.get(all)))
            || items(container, "env")
                .filter_map(|env| env.get("valueFrom"))
                .any(|from| named(from.get(one)))
    })
}

fn secrets(spec: &Value) -> bool {
    let named = |reference: Option<&Value>| reference.is_some_and(|r| !text(r, "name").is_empty());
    items(spec, "imagePullSecrets").any(|s| !text(s, "name").is_empty())
        || environment(spec, "secretKeyRef", "secretRef")
        || items(spec, "volumes").any(|volume| {
            let of = |kind: &str| volume.get(kind);
            let reference = |kind: &str| named(of(kind).and_then(|v| v.get("secretRef")));
            let secret_name =
                |kind: &str| of(kind).is_some_and(|v| !text(v, "secretName").is_empty());
            let publish = |v: &Value| named(v.get("nodePublishSecretRef"));
            secret_name("azureFile")
                || secret_name("secret")
                || [
                    "cephfs",
                    "cinder",
                    "flexVolume",
                    "rbd",
                    "scaleIO",
                    "iscsi",
                    "storageos",
                ]
                .into_iter()
                .any(reference)
                || of("csi").is_some_and(publish)
                || of("projected")
                    .is_some_and(|p| items(p, "sources").any(|s| named(s.get("secret"))))
        })
}

fn config_maps(spec: &Value) -> bool {
    let named = |reference: Option<&Value>| reference.is_some_and(|r| !text(r, "name").is_empty());
    environment(spec, "configMapKeyRef", "configMapRef")
        || items(spec, "volumes").any(|volume| {
            named(volume.get("configMap"))
                || volume
                    .get("projected")
                    .is_some_and(|p| items(p, "sources").any(|s| named(s.get("configMap"))))
        })
}
