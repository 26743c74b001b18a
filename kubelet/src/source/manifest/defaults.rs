//! What the apiserver fills in when a pod is created (`pkg/apis/core/v1/defaults.go`): a static
//! pod must run the same with and without one. Pure.

use super::fields::{items_mut, unset};
use crate::launch::resources::pod_totals;
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use serde_json::{Map, Value, json};

/// Fills in.
pub(super) fn apply(pod: &mut Value) {
    let Some(spec) = pod.get_mut("spec") else {
        return;
    };
    for kind in ["initContainers", "containers"] {
        items_mut(spec, kind).for_each(requests_of_limits);
    }
    pod_requests(spec);
    let host_network = spec.get("hostNetwork") == Some(&Value::Bool(true));
    for kind in ["initContainers", "containers", "ephemeralContainers"] {
        for c in items_mut(spec, kind) {
            container(c);
            if host_network {
                items_mut(c, "ports").for_each(host_port);
            }
        }
    }
    items_mut(spec, "volumes").for_each(volume);
    or(spec, "enableServiceLinks", json!(true));
    or(spec, "dnsPolicy", json!("ClusterFirst"));
    or(spec, "restartPolicy", json!("Always"));
    or(spec, "securityContext", json!({}));
    // Zero is a grace of its own here.
    if spec.get("terminationGracePeriodSeconds").is_none() {
        or(spec, "terminationGracePeriodSeconds", json!(30));
    }
    or(spec, "schedulerName", json!("default-scheduler"));
}

/// Sets a field that is not set.
fn or(object: &mut Value, key: &str, value: Value) {
    if let Value::Object(map) = object
        && unset(map.get(key))
    {
        map.insert(key.to_owned(), value);
    }
}

/// Amounts a container limits but does not ask for are asked for.
fn requests_of_limits(container: &mut Value) {
    let Some(resources) = container
        .get_mut("resources")
        .and_then(Value::as_object_mut)
    else {
        return;
    };
    let Some(Value::Object(limits)) = resources.get("limits").cloned() else {
        return;
    };
    let requests = resources.entry("requests").or_insert_with(|| json!({}));
    if let Value::Object(requests) = requests {
        for (name, amount) in limits {
            requests.entry(name).or_insert(amount);
        }
    }
}

/// A pod with limits of its own (KEP-2837): what its containers ask for together, then what it
/// limits, is what it asks for.
fn pod_requests(spec: &mut Value) {
    let limits = spec.pointer("/resources/limits").and_then(Value::as_object);
    let Some(limits) = limits.filter(|l| !l.is_empty()).cloned() else {
        return;
    };
    let sums = container_sums(spec);
    let Some(resources) = spec.get_mut("resources").and_then(Value::as_object_mut) else {
        return;
    };
    let requests = resources.entry("requests").or_insert_with(|| json!({}));
    if let Value::Object(requests) = requests {
        for (name, amount) in sums {
            let shared = name == "cpu" || name == "memory";
            if shared {
                requests.entry(name).or_insert(amount);
            }
        }
        for (name, amount) in limits {
            let supported = name == "cpu" || name == "memory" || name.starts_with("hugepages-");
            if supported {
                requests.entry(name).or_insert(amount);
            }
        }
    }
}

/// What the containers ask for together; nothing when an amount cannot be read (the checks say
/// which).
fn container_sums(spec: &Value) -> Map<String, Value> {
    let Ok(mut spec) = serde_json::from_value::<PodSpec>(spec.clone()) else {
        return Map::new();
    };
    spec.resources = None;
    spec.overhead = None;
    let pod = Pod {
        spec: Some(spec),
        ..Pod::default()
    };
    let sums = pod_totals(&pod).unwrap_or_default().requests.into_iter();
    sums.map(|(name, amount)| (name, Value::String(amount.to_string())))
        .collect()
}

fn container(container: &mut Value) {
    let image = container.get("image").and_then(Value::as_str);
    let policy = pull_policy(image.unwrap_or_default());
    or(container, "imagePullPolicy", json!(policy));
    or(
        container,
        "terminationMessagePath",
        json!("/dev/termination-log"),
    );
    or(container, "terminationMessagePolicy", json!("File"));
    for port in items_mut(container, "ports") {
        or(port, "protocol", json!("TCP"));
    }
    for env in items_mut(container, "env") {
        if let Some(field) = env.pointer_mut("/valueFrom/fieldRef") {
            or(field, "apiVersion", json!("v1"));
        }
        if let Some(key) = env.pointer_mut("/valueFrom/fileKeyRef") {
            or(key, "optional", json!(false));
        }
    }
    for kind in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(p) = container.get_mut(kind) {
            probe(p);
        }
    }
    for hook in ["postStart", "preStop"] {
        if let Some(get) = container.pointer_mut(&format!("/lifecycle/{hook}/httpGet")) {
            http_get(get);
        }
    }
}

/// `Always` for what may move: tag `latest`, or neither tag nor digest.
fn pull_policy(image: &str) -> &'static str {
    let (name, digest) = match image.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (image, None),
    };
    let name = name.rsplit('/').next().unwrap_or_default();
    match (name.split_once(':'), digest) {
        (Some((_, "latest")), _) | (None, None) => "Always",
        (Some(_), _) | (None, Some(_)) => "IfNotPresent",
    }
}

fn probe(probe: &mut Value) {
    for (key, value) in [
        ("timeoutSeconds", 1),
        ("periodSeconds", 10),
        ("successThreshold", 1),
        ("failureThreshold", 3),
    ] {
        or(probe, key, json!(value));
    }
    if let Some(get) = probe.get_mut("httpGet") {
        http_get(get);
    }
    if let Some(Value::Object(grpc)) = probe.get_mut("grpc") {
        grpc.entry("service").or_insert_with(|| json!(""));
    }
}

fn http_get(get: &mut Value) {
    or(get, "path", json!("/"));
    or(get, "scheme", json!("HTTP"));
}

fn host_port(port: &mut Value) {
    let inner = port.get("containerPort").cloned();
    if let Some(inner) = inner {
        or(port, "hostPort", inner);
    }
}

fn volume(volume: &mut Value) {
    let Value::Object(map) = &*volume else { return };
    if !map.keys().any(|key| key != "name") {
        or(volume, "emptyDir", json!({}));
    }
    for (kind, field, value) in [
        ("hostPath", "type", json!("")),
        ("secret", "defaultMode", json!(0o644)),
        ("configMap", "defaultMode", json!(0o644)),
        ("downwardAPI", "defaultMode", json!(0o644)),
        ("projected", "defaultMode", json!(0o644)),
        ("iscsi", "iscsiInterface", json!("default")),
        ("rbd", "pool", json!("rbd")),
        ("rbd", "user", json!("admin")),
        ("rbd", "keyring", json!("/etc/ceph/keyring")),
    ] {
        // A mode of 0 was chosen.
        if let Some(source) = volume.get_mut(kind)
            && (field != "defaultMode" || source.get(field).is_none())
        {
            or(source, field, value);
        }
    }
    if let Some(image) = volume.get_mut("image") {
        let reference = image.get("reference").and_then(Value::as_str);
        let policy = pull_policy(reference.unwrap_or_default());
        or(image, "pullPolicy", json!(policy));
    }
    if let Some(api) = volume.get_mut("downwardAPI") {
        items_mut(api, "items").for_each(downward_item);
    }
    if let Some(projected) = volume.get_mut("projected") {
        for source in items_mut(projected, "sources") {
            if let Some(api) = source.get_mut("downwardAPI") {
                items_mut(api, "items").for_each(downward_item);
            }
        }
    }
}

fn downward_item(item: &mut Value) {
    if let Some(field) = item.get_mut("fieldRef") {
        or(field, "apiVersion", json!("v1"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pull_policy_follows_the_tag() {
        for (image, policy) in [
            ("a", "Always"),
            ("a:latest", "Always"),
            ("host:5000/a", "Always"),
            ("host:5000/a:1", "IfNotPresent"),
            ("a@sha256:00", "IfNotPresent"),
            ("a:latest@sha256:00", "Always"),
        ] {
            assert_eq!(pull_policy(image), policy, "{image}");
        }
    }
}
