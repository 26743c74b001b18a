//! What a node that is up still holds of pods that the apiserver no longer has: directories, logs,
//! records, cgroups, mounts, processes, links, half-unpacked layers. After a scenario that deleted
//! its pods the list must become empty.

use crate::cluster::kubectl::Kubectl;
use crate::cluster::{Lab, cgroup, node};
use crate::process;
use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// What belongs to no pod of the apiserver, one line each.
///
/// # Errors
/// When the apiserver cannot be asked or the node is not up.
pub fn of_node(lab: &str, name: &str) -> Result<Vec<String>> {
    let (context, kubectl) = {
        let lab = Lab::open(lab)?;
        (node::existing(&lab, name)?, lab.kubectl.clone())
    };
    let root = PathBuf::from(format!("/proc/{}/root", context.holder));
    let pods = pods_of(&kubectl, name)?;
    let mut found = Vec::new();
    let sandboxes = sandboxes(&root, &pods, &mut found);
    containers(&root, &sandboxes, &mut found);
    directories(&root, &pods, &mut found);
    cgroups(&context.cgroups, &pods, &mut found);
    mounts(context.holder, &pods, &sandboxes, &mut found)?;
    shims(&context.cgroups, &sandboxes, &mut found);
    links(context.holder, sandboxes.len(), &mut found);
    found.sort();
    found.dedup();
    Ok(found)
}

fn pods_of(kubectl: &Kubectl, node: &str) -> Result<BTreeSet<String>> {
    let field = format!("spec.nodeName={node}");
    let list = kubectl.json(&[
        "get",
        "pods",
        "--all-namespaces",
        "--field-selector",
        &field,
    ])?;
    let items = list["items"].as_array().context("a list without items")?;
    let uids = items
        .iter()
        .filter_map(|pod| pod.pointer("/metadata/uid")?.as_str().map(str::to_owned));
    Ok(uids.collect())
}

fn record(path: &Path) -> Value {
    let text = fs::read(path).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

/// Sandboxes with a pod, by id; the others are found.
fn sandboxes(
    root: &Path,
    pods: &BTreeSet<String>,
    found: &mut Vec<String>,
) -> BTreeMap<String, String> {
    let dir = root.join("var/lib/ferrule/sandboxes");
    let mut known = BTreeMap::new();
    for id in names(&dir) {
        let record = record(&dir.join(&id).join("sandbox.json"));
        let uid = record.pointer("/config/uid").and_then(Value::as_str);
        match uid.filter(|uid| pods.contains(*uid)) {
            Some(uid) => drop(known.insert(id, uid.to_owned())),
            None => found.push(format!("sandbox {id} of pod {}", uid.unwrap_or("unknown"))),
        }
    }
    known
}

fn containers(root: &Path, sandboxes: &BTreeMap<String, String>, found: &mut Vec<String>) {
    let dir = root.join("var/lib/ferrule/containers");
    for id in names(&dir) {
        let record = record(&dir.join(&id).join("container.json"));
        let sandbox = record["sandbox_id"].as_str().unwrap_or("unknown");
        if !sandboxes.contains_key(sandbox) {
            found.push(format!("container {id} of sandbox {sandbox}"));
        }
    }
}

fn directories(root: &Path, pods: &BTreeSet<String>, found: &mut Vec<String>) {
    for uid in names(&root.join("var/lib/kubelet/pods")) {
        if !pods.contains(&uid) {
            found.push(format!("pod directory {uid}"));
        }
    }
    for name in names(&root.join("var/log/pods")) {
        let uid = name.rsplit('_').next().unwrap_or_default();
        if !pods.contains(uid) {
            found.push(format!("log directory {name}"));
        }
    }
    for name in names(&root.join("var/lib/ferrule/layers")) {
        if name.contains(".partial-") {
            found.push(format!("half-unpacked layer {name}"));
        }
    }
}

fn cgroups(hierarchies: &[PathBuf], pods: &BTreeSet<String>, found: &mut Vec<String>) {
    for hierarchy in hierarchies {
        let kubepods = hierarchy.join("kubepods");
        let classes = [
            kubepods.clone(),
            kubepods.join("burstable"),
            kubepods.join("besteffort"),
        ];
        for class in classes {
            for name in names(&class) {
                let uid = name.strip_prefix("pod");
                if uid.is_some_and(|uid| !pods.contains(uid)) {
                    found.push(format!("cgroup {}", class.join(name).display()));
                }
            }
        }
    }
}

fn mounts(
    holder: i32,
    pods: &BTreeSet<String>,
    sandboxes: &BTreeMap<String, String>,
    found: &mut Vec<String>,
) -> Result<()> {
    let path = format!("/proc/{holder}/mountinfo");
    let table = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    for point in table.lines().filter_map(|line| line.split(' ').nth(4)) {
        let uid = point.strip_prefix("/var/lib/kubelet/pods/");
        let uid = uid.and_then(|rest| rest.split('/').next());
        let pin = point.strip_prefix("/run/ferrule/netns/");
        let stray = uid.is_some_and(|uid| !pods.contains(uid))
            || pin.is_some_and(|id| !sandboxes.contains_key(id))
            || point.starts_with("/var/lib/ferrule/");
        if stray {
            found.push(format!("mount {point}"));
        }
    }
    Ok(())
}

/// Shims carry their sandbox's directory on their command line.
fn shims(hierarchies: &[PathBuf], sandboxes: &BTreeMap<String, String>, found: &mut Vec<String>) {
    for (process, id) in shims_of_node(hierarchies) {
        if !sandboxes.contains_key(&id) {
            found.push(format!("shim {} of sandbox {id}", process.pid));
        }
    }
}

/// All shims of a node, with their sandboxes.
#[must_use]
pub fn shims_of_node(hierarchies: &[PathBuf]) -> Vec<(process::ProcessIdentity, String)> {
    let all: BTreeSet<_> = hierarchies
        .iter()
        .flat_map(|dir| cgroup::processes(dir))
        .collect();
    all.into_iter()
        .filter_map(|process| Some((process, sandbox_of_shim(process.pid)?)))
        .collect()
}

/// The sandbox whose shim this process is.
fn sandbox_of_shim(pid: i32) -> Option<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let line = String::from_utf8_lossy(&line).into_owned();
    let mut words = line.split('\0').filter(|word| word.contains("/sandboxes/"));
    let id = words.next_back()?.rsplit('/').next()?;
    (id.len() == 64).then(|| id.to_owned())
}

/// Ends of pods' links on the node: never more than sandboxes.
fn links(holder: i32, sandboxes: usize, found: &mut Vec<String>) {
    let table = fs::read_to_string(format!("/proc/{holder}/net/dev")).unwrap_or_default();
    let names = table
        .lines()
        .filter_map(|line| line.trim().split(':').next());
    let count = names
        .filter(|name| name.starts_with("fv") && !name.starts_with("fvx"))
        .count();
    if count > sandboxes {
        found.push(format!("{count} links for {sandboxes} sandboxes"));
    }
}

/// Processes in the cgroup of a pod.
#[must_use]
pub fn processes_of_pod(hierarchies: &[PathBuf], uid: &str) -> Vec<process::ProcessIdentity> {
    let mut all = BTreeSet::new();
    for hierarchy in hierarchies {
        for class in ["kubepods", "kubepods/burstable", "kubepods/besteffort"] {
            let dir = hierarchy.join(class).join(format!("pod{uid}"));
            all.extend(cgroup::processes(&dir));
        }
    }
    all.into_iter().collect()
}

fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let names = entries.flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.into_string().ok()).collect()
}
