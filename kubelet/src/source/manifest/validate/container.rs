//! Containers of all kinds.

use super::super::fields::{items, object, set, text, unset};
use super::spec::{VolumeKinds, ids};
use super::{Path, Problems};
use crate::quantity::Quantity;
use serde_json::Value;
use std::collections::BTreeSet;

/// Checks main and init containers.
pub(super) fn all(spec: &Value, volumes: &VolumeKinds<'_>, path: &Path, found: &mut Problems) {
    let mut names = BTreeSet::new();
    let mut ports = BTreeSet::new();
    let mains = path.child("containers");
    if items(spec, "containers").next().is_none() {
        found.required(&mains, "");
    }
    for (index, container) in items(spec, "containers").enumerate() {
        let path = mains.index(index);
        common(container, volumes, &path, found);
        unique(container, &mut names, &path, found);
        behaviour(container, &path, found);
        host_ports(spec, container, &mut ports, &path, found);
    }
    for (index, container) in items(spec, "initContainers").enumerate() {
        let path = path.child("initContainers").index(index);
        common(container, volumes, &path, found);
        unique(container, &mut names, &path, found);
        if text(container, "restartPolicy") == "Always" {
            behaviour(container, &path, found);
        } else {
            for key in [
                "lifecycle",
                "livenessProbe",
                "readinessProbe",
                "startupProbe",
            ] {
                if set(container, key).is_some() {
                    let why = "may not be set for init containers without restartPolicy=Always";
                    found.forbidden(&path.child(key), why);
                }
            }
        }
        // They run one by one: only their own ports can collide.
        host_ports(spec, container, &mut BTreeSet::new(), &path, found);
    }
}

fn unique<'a>(
    container: &'a Value,
    names: &mut BTreeSet<&'a str>,
    path: &Path,
    found: &mut Problems,
) {
    let name = text(container, "name");
    if !name.is_empty() && !names.insert(name) {
        found.duplicate(&path.child("name"), name);
    }
}

/// What holds for every kind of container.
fn common(container: &Value, volumes: &VolumeKinds<'_>, path: &Path, found: &mut Problems) {
    found.label(&path.child("name"), text(container, "name"));
    if text(container, "image").is_empty() {
        found.required(&path.child("image"), "");
    }
    let policies = ["File", "FallbackToLogsOnError"];
    found.word(container, "terminationMessagePolicy", path, &policies);
    ports(container, &path.child("ports"), found);
    environment(container, path, found);
    mounts(container, volumes, &path.child("volumeMounts"), found);
    found.word(
        container,
        "imagePullPolicy",
        path,
        &["Always", "IfNotPresent", "Never"],
    );
    resources(container, &path.child("resources"), found);
    if let Some(context) = set(container, "securityContext") {
        security(context, &path.child("securityContext"), found);
    }
}

fn ports(container: &Value, path: &Path, found: &mut Problems) {
    let mut names = BTreeSet::new();
    for (index, port) in items(container, "ports").enumerate() {
        let path = path.index(index);
        let name = text(port, "name");
        if !name.is_empty() {
            if !is_port_name(name) {
                let why = "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-), \
                    at least one letter, and be no more than 15 characters";
                found.invalid(&path.child("name"), name, why);
            } else if !names.insert(name) {
                found.duplicate(&path.child("name"), name);
            }
        }
        if unset(port.get("containerPort")) {
            found.required(&path.child("containerPort"), "");
        } else {
            found.port(port, "containerPort", &path);
        }
        if !unset(port.get("hostPort")) {
            found.port(port, "hostPort", &path);
        }
        found.word(port, "protocol", &path, &["SCTP", "TCP", "UDP"]);
    }
}

fn is_port_name(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    name.len() <= 15
        && name.bytes().all(inner)
        && name.bytes().any(|b| b.is_ascii_lowercase())
        && !name.contains("--")
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// On the node's network a container's port is the node's; no two may want the same.
fn host_ports(
    spec: &Value,
    container: &Value,
    taken: &mut BTreeSet<String>,
    path: &Path,
    found: &mut Problems,
) {
    let host_network = spec.get("hostNetwork") == Some(&Value::Bool(true));
    for (index, port) in items(container, "ports").enumerate() {
        let number = |key| port.get(key).and_then(Value::as_i64).unwrap_or(0);
        let (inner, outer) = (number("containerPort"), number("hostPort"));
        if outer == 0 {
            continue;
        }
        let path = path.child("ports").index(index);
        if host_network && inner != outer {
            let why = "must match `hostPort` when `hostNetwork` is true";
            found.number(&path.child("containerPort"), inner, why);
        }
        let key = format!(
            "{}/{}/{outer}",
            text(port, "protocol"),
            text(port, "hostIP")
        );
        if !taken.insert(key.clone()) {
            found.duplicate(&path.child("hostPort"), &key);
        }
    }
}

const SOURCES: [&str; 5] = [
    "fieldRef",
    "resourceFieldRef",
    "configMapKeyRef",
    "secretKeyRef",
    "fileKeyRef",
];

fn environment(container: &Value, path: &Path, found: &mut Problems) {
    for (index, variable) in items(container, "env").enumerate() {
        let path = path.child("env").index(index);
        let name = text(variable, "name");
        if name.is_empty() {
            found.required(&path.child("name"), "");
        } else if name
            .bytes()
            .any(|b| b == b'=' || !(b' '..=b'~').contains(&b))
        {
            let why = "a valid environment variable name must consist only of printable ASCII \
                characters other than '='";
            found.invalid(&path.child("name"), name, why);
        }
        let Some(from) = set(variable, "valueFrom") else {
            continue;
        };
        let path = path.child("valueFrom");
        let sources = SOURCES.iter().filter(|s| set(from, s).is_some()).count();
        if sources == 0 {
            let why = "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, \
                `secretKeyRef` or `fileKeyRef`";
            found.invalid(&path, "", why);
        } else if !text(variable, "value").is_empty() {
            found.invalid(&path, "", "may not be specified when `value` is not empty");
        } else if sources > 1 {
            let why = "may not have more than one field specified at a time";
            found.invalid(&path, "", why);
        }
    }
    for (index, from) in items(container, "envFrom").enumerate() {
        let path = path.child("envFrom").index(index);
        match ["configMapRef", "secretRef"]
            .iter()
            .filter(|s| set(from, s).is_some())
            .count()
        {
            0 => found.invalid(
                &path,
                "",
                "must specify one of: `configMapRef` or `secretRef`",
            ),
            1 => {}
            _ => {
                let why = "may not have more than one field specified at a time";
                found.invalid(&path, "", why);
            }
        }
    }
}

fn mounts(container: &Value, volumes: &VolumeKinds<'_>, path: &Path, found: &mut Problems) {
    let mut places = BTreeSet::new();
    for (index, mount) in items(container, "volumeMounts").enumerate() {
        let here = path.index(index);
        let name = text(mount, "name");
        if name.is_empty() {
            found.required(&here.child("name"), "");
        }
        if !volumes.contains_key(name) {
            found.not_found(&here.child("name"), name);
        }
        let place = text(mount, "mountPath");
        if place.is_empty() {
            found.required(&here.child("mountPath"), "");
        }
        if !places.insert(place) {
            found.invalid(&here.child("mountPath"), place, "must be unique");
        }
        found.descending(&path.child("subPath"), text(mount, "subPath"));
        let expression = text(mount, "subPathExpr");
        found.descending(&path.child("subPathExpr"), expression);
        if !expression.is_empty() && !text(mount, "subPath").is_empty() {
            let why = "subPathExpr and subPath are mutually exclusive";
            found.invalid(&here.child("subPathExpr"), expression, why);
        }
        let kinds = ["", "None", "HostToContainer", "Bidirectional"];
        found.word(mount, "mountPropagation", path, &kinds);
        let privileged = container.pointer("/securityContext/privileged");
        if text(mount, "mountPropagation") == "Bidirectional"
            && privileged != Some(&Value::Bool(true))
        {
            let why = "Bidirectional mount propagation is available only to privileged containers";
            found.forbidden(&path.child("mountPropagation"), why);
        }
    }
    for (index, device) in items(container, "volumeDevices").enumerate() {
        let name = text(device, "name");
        let path = Path(path.0.replace("volumeMounts", "volumeDevices"));
        if !volumes.contains_key(name) {
            found.not_found(&path.index(index).child("name"), name);
        }
    }
}

/// One amount; absent is fine.
pub(super) fn amount(path: &Path, text: &str, found: &mut Problems) -> Option<Quantity> {
    if text.is_empty() {
        return None;
    }
    match Quantity::parse(text) {
        Ok(quantity) if quantity.is_negative() => {
            found.invalid(path, text, "must be greater than or equal to 0");
            None
        }
        Ok(quantity) => Some(quantity),
        Err(error) => {
            found.invalid(path, text, &error.to_string());
            None
        }
    }
}

fn resources(container: &Value, path: &Path, found: &mut Problems) {
    let Some(resources) = container.get("resources") else {
        return;
    };
    let read = |kind: &str, found: &mut Problems| {
        let list = object(resources, kind).into_iter().flatten();
        let amounts = list.filter_map(|(name, value)| {
            let path = path.child(kind).key(name);
            let amount = amount(&path, value.as_str().unwrap_or_default(), found)?;
            Some((name.clone(), amount))
        });
        amounts.collect::<Vec<_>>()
    };
    let limits = read("limits", found);
    for (name, request) in read("requests", found) {
        let Some((_, limit)) = limits.iter().find(|(n, _)| *n == name) else {
            continue;
        };
        let path = path.child("requests");
        // Amounts of devices and huge pages cannot be promised twice.
        let shared = !name.contains('/') && !name.starts_with("hugepages-");
        if !shared && request != *limit {
            let why = format!("must be equal to {name} limit of {limit}");
            found.invalid(&path, &request.to_string(), &why);
        } else if request > *limit {
            let why = format!("must be less than or equal to {name} limit of {limit}");
            found.invalid(&path, &request.to_string(), &why);
        }
    }
}

fn security(context: &Value, path: &Path, found: &mut Problems) {
    ids(context, path, found);
    let yes = |key: &str| context.get(key) == Some(&Value::Bool(true));
    let no = |key: &str| context.get(key) == Some(&Value::Bool(false));
    if yes("privileged") && no("allowPrivilegeEscalation") {
        let why = "cannot set `allowPrivilegeEscalation` to false and `privileged` to true";
        found.invalid(path, "", why);
    }
    let admin = context
        .pointer("/capabilities/add")
        .and_then(Value::as_array);
    let admin = admin.is_some_and(|c| c.iter().any(|c| c.as_str() == Some("CAP_SYS_ADMIN")));
    if admin && no("allowPrivilegeEscalation") {
        let why = "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` \
            CAP_SYS_ADMIN";
        found.invalid(path, "", why);
    }
}

/// Probes and hooks.
fn behaviour(container: &Value, path: &Path, found: &mut Problems) {
    for kind in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let Some(probe) = set(container, kind) else {
            continue;
        };
        let path = path.child(kind);
        handler(
            probe,
            &["exec", "httpGet", "tcpSocket", "grpc"],
            &path,
            found,
        );
        for key in [
            "initialDelaySeconds",
            "timeoutSeconds",
            "periodSeconds",
            "successThreshold",
            "failureThreshold",
        ] {
            found.natural(probe, key, &path);
        }
        let successes = probe.get("successThreshold").and_then(Value::as_i64);
        if let Some(n) = successes.filter(|n| kind != "readinessProbe" && *n != 1) {
            found.number(&path.child("successThreshold"), n, "must be 1");
        }
        let grace = probe
            .get("terminationGracePeriodSeconds")
            .and_then(Value::as_i64);
        if let Some(seconds) = grace.filter(|s| *s <= 0) {
            let path = path.child("terminationGracePeriodSeconds");
            found.number(&path, seconds, "must be greater than 0");
        }
        if kind == "readinessProbe" && grace.is_some() {
            let path = path.child("terminationGracePeriodSeconds");
            let why = "must not be set for readinessProbes";
            found.number(&path, grace.unwrap_or(0), why);
        }
    }
    for hook in ["postStart", "preStop"] {
        if let Some(action) = container.get("lifecycle").and_then(|l| set(l, hook)) {
            let path = path.child("lifecycle").child(hook);
            handler(
                action,
                &["exec", "httpGet", "tcpSocket", "sleep"],
                &path,
                found,
            );
        }
    }
}

/// Exactly one way to act.
fn handler(object: &Value, kinds: &[&str], path: &Path, found: &mut Problems) {
    let mut given = kinds.iter().filter(|kind| set(object, kind).is_some());
    let Some(kind) = given.next() else {
        return found.required(path, "must specify a handler type");
    };
    for more in given {
        let why = "may not specify more than 1 handler type";
        found.forbidden(&path.child(more), why);
    }
    let path = path.child(kind);
    let action = &object[*kind];
    match *kind {
        "exec" if items(action, "command").next().is_none() => {
            found.required(&path.child("command"), "");
        }
        "httpGet" => {
            found.port(action, "port", &path);
            found.word(action, "scheme", &path, &["HTTP", "HTTPS"]);
        }
        "tcpSocket" | "grpc" => found.port(action, "port", &path),
        _ => {}
    }
}
