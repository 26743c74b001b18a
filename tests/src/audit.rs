//! What is left on the machine that belongs to a lab, or to the product, and has no owner any
//! more: after `down` and after a test this must be empty.

use crate::cluster::down::mounts_below;
use crate::cluster::layout::CGROUP_TOP;
use crate::cluster::state::{LabState, lab_names};
use crate::cluster::{LabLock, cgroup, network};
use crate::{paths, process};
use anyhow::{Context, Result};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Kinds of things that can be left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A running process.
    Process,
    /// A mount point of our own mount namespace.
    Mount,
    /// A pinned network namespace.
    NetworkNamespace,
    /// A network link of our own network namespace.
    Link,
    /// A route of our own network namespace over a lab's bridge.
    Route,
    /// A loop device with a file of ours behind it.
    LoopDevice,
    /// A cgroup.
    Cgroup,
    /// A file or directory.
    Directory,
    /// An address a lab's network plugin still holds for a pod that is gone.
    AddressLease,
}

/// One thing that is left.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// What it is.
    pub kind: Kind,
    /// Which one.
    pub object: String,
    /// Why it is taken for ours.
    pub because: String,
}

/// Directories of the product that exist only while it runs on this machine itself.
const PRODUCT_DIRECTORIES: [&str; 3] = ["/run/ferrule", "/var/lib/ferrule", "/run/cni/ferrule"];

/// Lists what is left. Things of a lab that is up have an owner and are not listed.
///
/// # Errors
/// When a source of truth cannot be read.
pub fn audit() -> Result<Vec<Finding>> {
    let live = live_labs()?;
    let mut findings = Vec::new();
    processes(&live, &mut findings);
    cgroups(&live, &mut findings);
    links(&live, &mut findings);
    directories(&live, &mut findings)?;
    mounts_and_namespaces(&mut findings)?;
    loop_devices(&mut findings);
    for lab in live.values() {
        sandbox_leftovers(lab, &mut findings);
    }
    findings.sort();
    findings.dedup();
    Ok(findings)
}

/// Labs whose record names at least one living process, or that are being worked on.
fn live_labs() -> Result<BTreeMap<String, LabState>> {
    let mut live = BTreeMap::new();
    for name in lab_names(&paths::labs())? {
        let Some(state) = LabState::load(&paths::labs(), &name)? else {
            continue;
        };
        let runs = state
            .processes
            .values()
            .filter_map(|record| record.identity)
            .any(process::ProcessIdentity::is_alive);
        // One that is being brought up may not have a process yet.
        if runs || LabLock::is_held(&name) {
            live.insert(name, state);
        }
    }
    Ok(live)
}

fn lab_of(owner: &str) -> &str {
    owner.split('/').next().unwrap_or(owner)
}

fn processes(live: &BTreeMap<String, LabState>, findings: &mut Vec<Finding>) {
    for (process, owner) in process::owned() {
        if live.contains_key(lab_of(&owner)) || process.pid == our_pid() {
            continue;
        }
        findings.push(Finding {
            kind: Kind::Process,
            object: format!("{} {}", process.pid, command_line(process.pid)),
            because: format!("started by lab {owner}"),
        });
    }
}

fn our_pid() -> i32 {
    i32::try_from(std::process::id()).unwrap_or(0)
}

fn command_line(pid: i32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes).replace('\0', " ");
    text.chars().take(100).collect::<String>().trim().to_owned()
}

fn cgroups(live: &BTreeMap<String, LabState>, findings: &mut Vec<Finding>) {
    for top in cgroup::existing(None) {
        let Ok(labs) = fs::read_dir(&top) else {
            continue;
        };
        for lab in labs.flatten().filter(|entry| entry.path().is_dir()) {
            let name = lab.file_name().to_string_lossy().into_owned();
            if live.contains_key(&name) {
                continue;
            }
            let processes = cgroup::processes(&lab.path()).len();
            findings.push(Finding {
                kind: Kind::Cgroup,
                object: lab.path().display().to_string(),
                because: format!("below {CGROUP_TOP}, {processes} processes, no such lab is up"),
            });
        }
        if live.is_empty()
            && fs::read_dir(&top).is_ok_and(|mut dirs| {
                !dirs.any(|entry| entry.is_ok_and(|entry| entry.path().is_dir()))
            })
        {
            findings.push(Finding {
                kind: Kind::Cgroup,
                object: top.display().to_string(),
                because: "no lab is up".into(),
            });
        }
    }
}

fn links(live: &BTreeMap<String, LabState>, findings: &mut Vec<Finding>) {
    for (link, lab) in network::lab_links() {
        if !live.contains_key(&lab) {
            findings.push(Finding {
                kind: Kind::Link,
                object: link,
                because: format!("its alias names lab {lab}"),
            });
        }
    }
    let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let bridges: BTreeSet<String> = live
        .values()
        .map(|state| format!("ferrule{}", state.index))
        .collect();
    for line in routes.lines().skip(1) {
        let link = line.split_whitespace().next().unwrap_or_default();
        let number = link
            .strip_prefix("ferrule")
            .and_then(|rest| rest.parse::<u8>().ok());
        if number.is_some() && !bridges.contains(link) {
            findings.push(Finding {
                kind: Kind::Route,
                object: line.to_owned(),
                because: format!("leads to {link}, which no lab owns"),
            });
        }
    }
}

fn directories(live: &BTreeMap<String, LabState>, findings: &mut Vec<Finding>) -> Result<()> {
    let labs = paths::labs();
    let mut found: Vec<PathBuf> = PRODUCT_DIRECTORIES.iter().map(PathBuf::from).collect();
    if labs.exists() {
        let entries = fs::read_dir(&labs).with_context(|| format!("list {}", labs.display()))?;
        let owned = |path: &Path| {
            live.keys()
                .any(|lab| path == labs.join(lab) || path == LabLock::path(lab))
        };
        let mut stray: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| !owned(path))
            .collect();
        if stray.is_empty() && live.is_empty() {
            stray.push(labs);
        }
        found.extend(stray);
    }
    for path in found.into_iter().filter(|path| path.exists()) {
        findings.push(Finding {
            kind: Kind::Directory,
            object: path.display().to_string(),
            because: "no lab that is up owns it".into(),
        });
    }
    Ok(())
}

fn mounts_and_namespaces(findings: &mut Vec<Finding>) -> Result<()> {
    // Nodes mount in their own mount namespaces only: any of these in ours has leaked.
    let labs = paths::labs();
    let mut places: Vec<&Path> = PRODUCT_DIRECTORIES.iter().map(Path::new).collect();
    places.extend([labs.as_path(), Path::new("/var/lib/kubelet")]);
    for place in places {
        for mount in mounts_below(place)? {
            let namespace = mount.contains("/netns/");
            findings.push(Finding {
                kind: if namespace {
                    Kind::NetworkNamespace
                } else {
                    Kind::Mount
                },
                object: mount,
                because: format!("lies below {}", place.display()),
            });
        }
    }
    Ok(())
}

fn loop_devices(findings: &mut Vec<Finding>) {
    let Ok(entries) = fs::read_dir("/sys/block") else {
        return;
    };
    let labs = paths::labs();
    for entry in entries.flatten() {
        let backing = entry.path().join("loop/backing_file");
        let Ok(file) = fs::read_to_string(backing) else {
            continue;
        };
        if Path::new(file.trim()).starts_with(&labs) {
            findings.push(Finding {
                kind: Kind::LoopDevice,
                object: entry.file_name().to_string_lossy().into_owned(),
                because: format!("its file is {}", file.trim()),
            });
        }
    }
}

/// In a lab that is up, whatever a node keeps per sandbox must belong to a sandbox that exists.
fn sandbox_leftovers(lab: &LabState, findings: &mut Vec<Finding>) {
    for (node, record) in &lab.nodes {
        let Some(holder) = record.holder.filter(|holder| holder.is_alive()) else {
            continue;
        };
        let run = PathBuf::from(format!("/proc/{}/root/run", holder.pid));
        let records = paths::labs().join(&lab.name).join("nodes").join(node);
        // Listed first: a sandbox that is made meanwhile must not look like a stray.
        let kept = kept_per_sandbox(&run);
        let sandboxes: BTreeSet<String> = names(&records.join("ferrule/sandboxes"))
            .into_iter()
            .collect();
        for (kind, file) in kept {
            let name = file
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let sandbox = sandbox_of(&name);
            // Gone since it was listed is as good as never there.
            if !sandboxes.contains(sandbox) && file.symlink_metadata().is_ok() {
                findings.push(Finding {
                    kind,
                    object: format!("{}/{node}: {name}", lab.name),
                    because: format!("no sandbox {sandbox} is recorded"),
                });
            }
        }
    }
}

/// Files and directories of a node that are named after a sandbox.
fn kept_per_sandbox(run: &Path) -> Vec<(Kind, PathBuf)> {
    let mut places = vec![
        (Kind::NetworkNamespace, run.join("ferrule/netns")),
        (Kind::Directory, run.join("ferrule/shm")),
        (Kind::Process, run.join("ferrule/shim")),
        (Kind::AddressLease, run.join("ferrule/cni")),
    ];
    for network in names(&run.join("cni/ferrule")) {
        places.push((
            Kind::AddressLease,
            run.join("cni/ferrule").join(network).join("leases"),
        ));
    }
    let entries = places.into_iter().flat_map(|(kind, dir)| {
        names(&dir)
            .into_iter()
            .map(move |name| (kind, dir.join(name)))
    });
    entries.collect()
}

/// The sandbox in a name such as `<network>@<sandbox>@eth0.json`, `<sandbox>@eth0` or
/// `<sandbox>.sock`.
fn sandbox_of(name: &str) -> &str {
    let longest = name.split(['@', '.']).max_by_key(|part| part.len());
    longest.unwrap_or(name)
}

fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// Findings as lines for people.
#[must_use]
pub fn render(findings: &[Finding]) -> String {
    let mut out = String::new();
    for finding in findings {
        out.push_str(&format!(
            "{:?}: {} ({})\n",
            finding.kind, finding.object, finding.because
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_is_recognised_in_every_name() {
        let id = "2c06f3f81358fd49c6969bb0a7797a107b7baefd4b6d0da1934364ee142d7377";
        for name in [
            format!("net@{id}@eth0.json"),
            format!("{id}@eth0"),
            format!("{id}.sock"),
        ] {
            assert_eq!(sandbox_of(&name), id, "{name}");
        }
    }
}
