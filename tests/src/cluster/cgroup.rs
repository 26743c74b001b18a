//! The lab's cgroups: `/ferrule-lab/<lab>/<node>` in every hierarchy. Being below one of them is
//! also what proves that a process of a node, whatever its environment, belongs to the lab.

use super::layout::{CGROUP_TOP, Layout};
use crate::process::{self, ProcessIdentity};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where the hierarchies are mounted: each v1 controller's, or the one of v2.
#[must_use]
pub fn hierarchies() -> Vec<PathBuf> {
    let base = Path::new("/sys/fs/cgroup");
    if base.join("cgroup.controllers").exists() {
        return vec![base.to_path_buf()];
    }
    let Ok(entries) = fs::read_dir(base) else {
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        // Symlinks name the same hierarchy twice (`cpu` and `cpu,cpuacct`).
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .filter(|path| path.join("cgroup.procs").exists())
        .collect();
    found.sort();
    found
}

/// Makes the node's cgroup in every hierarchy and returns the directories.
///
/// # Errors
/// When the kernel refuses.
pub fn ensure_node(layout: &Layout, node: &str) -> Result<Vec<PathBuf>> {
    let below = layout.cgroup_root(node);
    let mut made = Vec::new();
    for hierarchy in hierarchies() {
        let mut dir = hierarchy;
        for part in below.trim_start_matches('/').split('/') {
            let parent = dir.clone();
            dir = dir.join(part);
            ensure_directory(&parent, &dir)?;
        }
        made.push(dir);
    }
    Ok(made)
}

fn ensure_directory(parent: &Path, dir: &Path) -> Result<()> {
    match fs::create_dir(dir) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => {
            return Err(error).with_context(|| format!("create cgroup {}", dir.display()));
        }
    }
    // A new cpuset of v1 is empty and takes no process before it has processors and memory.
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let empty = fs::read_to_string(dir.join(file)).is_ok_and(|text| text.trim().is_empty());
        if empty && dir.join("cgroup.clone_children").exists() {
            let value = fs::read_to_string(parent.join(file))
                .with_context(|| format!("read {file} of {}", parent.display()))?;
            fs::write(dir.join(file), value.trim())
                .with_context(|| format!("write {file} of {}", dir.display()))?;
        }
    }
    Ok(())
}

/// Directories of one lab (or, without a name, of all labs) that exist.
#[must_use]
pub fn existing(lab: Option<&str>) -> Vec<PathBuf> {
    hierarchies()
        .into_iter()
        .map(|hierarchy| match lab {
            Some(lab) => hierarchy.join(CGROUP_TOP).join(lab),
            None => hierarchy.join(CGROUP_TOP),
        })
        .filter(|dir| dir.exists())
        .collect()
}

/// Living processes in `dir` and below.
#[must_use]
pub fn processes(dir: &Path) -> Vec<ProcessIdentity> {
    let mut found: Vec<ProcessIdentity> = fs::read_to_string(dir.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| ProcessIdentity::of(line.trim().parse().ok()?))
        .collect();
    for child in children(dir) {
        found.extend(processes(&child));
    }
    found
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// Kills everything in the cgroups `dirs`, again and again until nothing is left: what forks
/// while it is killed is caught by the next round.
///
/// # Errors
/// When something survives `limit`.
pub fn kill_all(dirs: &[PathBuf], limit: Duration) -> Result<()> {
    let start = Instant::now();
    loop {
        let mut left: Vec<ProcessIdentity> = dirs.iter().flat_map(|dir| processes(dir)).collect();
        left.sort_unstable();
        left.dedup();
        if left.is_empty() {
            return Ok(());
        }
        if start.elapsed() > limit {
            bail!(
                "{} processes survive SIGKILL, first {}",
                left.len(),
                left[0].pid
            );
        }
        for process in &left {
            process.signal(rustix::process::Signal::KILL)?;
        }
        for process in left {
            process::kill(process, limit)?;
        }
    }
}

/// Removes `dir` and every cgroup below it; "already gone" is success.
///
/// # Errors
/// When one still holds processes.
pub fn remove_tree(dir: &Path) -> Result<()> {
    // Frozen processes cannot die; a cgroup that was frozen when its owner died must be thawed.
    drop(fs::write(dir.join("freezer.state"), "THAWED"));
    for child in children(dir) {
        remove_tree(&child)?;
    }
    // A process that has been waited for may still be listed for a moment while it is torn down.
    process::until(
        "a cgroup to empty",
        Duration::from_secs(10),
        || Ok(()),
        || match fs::remove_dir(dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove cgroup {}", dir.display()))
            }
            _ => Ok(()),
        },
    )
}
