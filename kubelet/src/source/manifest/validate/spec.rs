//! The pod's own fields and its volumes.

use super::super::fields::{items, set, text};
use super::{Path, Problems, container, is_label};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

pub(super) fn check(spec: &Value, path: &Path, found: &mut Problems) {
    let volumes = volumes(spec, &path.child("volumes"), found);
    container::all(spec, &volumes, path, found);
    if items(spec, "ephemeralContainers").next().is_some() {
        let path = path.child("ephemeralContainers");
        found.forbidden(&path, "cannot be set on create");
    }
    if items(spec, "schedulingGates").next().is_some() {
        let why = "cannot be set until all schedulingGates have been cleared";
        found.forbidden(&path.child("nodeName"), why);
    }
    found.word(
        spec,
        "restartPolicy",
        path,
        &["Always", "OnFailure", "Never"],
    );
    let policies = ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"];
    found.word(spec, "dnsPolicy", path, &policies);
    let servers = spec.pointer("/dnsConfig/nameservers");
    if text(spec, "dnsPolicy") == "None"
        && servers.and_then(Value::as_array).is_none_or(Vec::is_empty)
    {
        let why = "must provide at least one DNS nameserver when `dnsPolicy` is None";
        found.required(&path.child("dnsConfig").child("nameservers"), why);
    }
    found.natural(spec, "terminationGracePeriodSeconds", path);
    let deadline = spec.get("activeDeadlineSeconds").and_then(Value::as_i64);
    if let Some(seconds) = deadline.filter(|s| !(1..=i64::from(i32::MAX)).contains(s)) {
        let why = "must be between 1 and 2147483647, inclusive";
        found.number(&path.child("activeDeadlineSeconds"), seconds, why);
    }
    for key in ["hostname", "subdomain"] {
        let name = text(spec, key);
        if !name.is_empty() {
            found.label(&path.child(key), name);
        }
    }
    super::labels(spec, "nodeSelector", path, found);
    tolerations(spec, &path.child("tolerations"), found);
    for (index, alias) in items(spec, "hostAliases").enumerate() {
        let path = path.child("hostAliases").index(index).child("ip");
        let ip = text(alias, "ip");
        if ip.parse::<IpAddr>().is_err() {
            let why = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
            found.invalid(&path, ip, why);
        }
    }
    users(spec, path, found);
}

fn tolerations(spec: &Value, path: &Path, found: &mut Problems) {
    for (index, toleration) in items(spec, "tolerations").enumerate() {
        let path = path.index(index);
        let operator = text(toleration, "operator");
        if text(toleration, "key").is_empty() && operator != "Exists" {
            let why = "operator must be Exists when `key` is empty, which means \"match all values \
                and all keys\"";
            found.invalid(&path.child("operator"), operator, why);
        }
        let operators = ["", "Equal", "Exists", "Lt", "Gt"];
        found.word(toleration, "operator", &path, &operators);
        let effects = ["", "NoSchedule", "PreferNoSchedule", "NoExecute"];
        found.word(toleration, "effect", &path, &effects);
    }
}

/// Fields that contradict user namespaces, and ids out of range.
fn users(spec: &Value, path: &Path, found: &mut Problems) {
    if spec.get("hostUsers") == Some(&Value::Bool(false)) {
        for (field, shown) in [
            ("hostNetwork", "hostNetwork"),
            ("hostPID", "HostPID"),
            ("hostIPC", "HostIPC"),
        ] {
            if spec.get(field) == Some(&Value::Bool(true)) {
                found.forbidden(&path.child(shown), "when `hostUsers` is false");
            }
        }
    }
    if spec.get("shareProcessNamespace") == Some(&Value::Bool(true))
        && spec.get("hostPID") == Some(&Value::Bool(true))
    {
        let why = "ShareProcessNamespace and HostPID cannot both be enabled";
        found.invalid(
            &path.child("securityContext").child("shareProcessNamespace"),
            "true",
            why,
        );
    }
    if let Some(context) = set(spec, "securityContext") {
        ids(context, &path.child("securityContext"), found);
    }
}

/// User and group ids of a security context.
pub(super) fn ids(context: &Value, path: &Path, found: &mut Problems) {
    for key in ["runAsUser", "runAsGroup", "fsGroup"] {
        let id = context.get(key).and_then(Value::as_i64);
        if let Some(id) = id.filter(|id| !(0..=i64::from(i32::MAX)).contains(id)) {
            let why = "must be between 0 and 2147483647, inclusive";
            found.number(&path.child(key), id, why);
        }
    }
}

/// Names of volumes with their kinds.
pub(super) type VolumeKinds<'a> = BTreeMap<&'a str, &'a str>;

const HOST_PATH_TYPES: [&str; 8] = [
    "",
    "DirectoryOrCreate",
    "Directory",
    "FileOrCreate",
    "File",
    "Socket",
    "CharDevice",
    "BlockDevice",
];

fn volumes<'a>(spec: &'a Value, path: &Path, found: &mut Problems) -> VolumeKinds<'a> {
    let mut all = VolumeKinds::new();
    for (index, volume) in items(spec, "volumes").enumerate() {
        let path = path.index(index);
        let name = text(volume, "name");
        let name_path = path.child("name");
        if name.is_empty() {
            found.required(&name_path, "");
        } else if !is_label(name) {
            found.invalid(&name_path, name, super::LABEL);
        } else if all.contains_key(name) {
            found.duplicate(&name_path, name);
        }
        let keys = volume.as_object().into_iter().flat_map(|m| m.keys());
        let kinds: BTreeSet<&str> = keys.map(String::as_str).filter(|k| *k != "name").collect();
        let mut kinds = kinds.into_iter();
        let Some(kind) = kinds.next() else {
            found.required(&path, "must specify a volume type");
            continue;
        };
        for more in kinds {
            found.forbidden(&path.child(more), "may not specify more than 1 volume type");
        }
        source(volume, kind, &path.child(kind), found);
        all.insert(name, kind);
    }
    all
}

fn source(volume: &Value, kind: &str, path: &Path, found: &mut Problems) {
    let Some(source) = volume.get(kind) else {
        return;
    };
    let mut need = |keys: &[&str]| {
        for key in keys.iter().filter(|key| text(source, key).is_empty()) {
            found.required(&path.child(key), "");
        }
    };
    match kind {
        "hostPath" => {
            need(&["path"]);
            let host = text(source, "path");
            if host.split('/').any(|part| part == "..") {
                found.invalid(&path.child("path"), host, "must not contain '..'");
            }
            found.word(source, "type", path, &HOST_PATH_TYPES);
        }
        "nfs" => need(&["server", "path"]),
        "emptyDir" => {
            let limit = text(source, "sizeLimit");
            container::amount(&path.child("sizeLimit"), limit, found);
        }
        "downwardAPI" => {
            for (index, item) in items(source, "items").enumerate() {
                let path = path.child("items").index(index).child("path");
                match text(item, "path") {
                    "" => found.required(&path, ""),
                    inner => found.descending(&path, inner),
                }
            }
        }
        // Only asks for what references refuses, or is the driver's to judge.
        _ => {}
    }
}
