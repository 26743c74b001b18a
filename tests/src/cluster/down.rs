//! Taking a lab down: every process, link, cgroup and directory of it, in an order that lets an
//! interrupted `down` be run again. Works without a record too.

use super::layout::{CGROUP_TOP, Layout};
use super::state::LabState;
use super::{LabLock, cgroup, network};
use crate::paths;
use crate::process::{self, ProcessIdentity};
use crate::progress::Step;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Longest wait for a killed process.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// Removes the lab; "already gone" is success.
///
/// # Errors
/// When something cannot be removed. The rest has been tried; run it again.
pub fn down(name: &str) -> Result<()> {
    let lock = LabLock::take(name)?;
    let state = LabState::load(&paths::labs(), name)?;
    // Without a record the number does not matter: links and processes are found by name.
    let layout = Layout::new(
        &paths::labs(),
        name,
        state.as_ref().map_or(0, |state| state.index),
    )?;
    let step = Step::begin(format!("take down lab {name}"));
    let mut failures = Vec::new();
    let mut attempt = |result: Result<()>| {
        if let Err(error) = result {
            failures.push(format!("{error:#}"));
        }
    };
    attempt(remove_processes(name, state.as_ref()));
    attempt(network::remove(&layout));
    for dir in cgroup::existing(Some(name)) {
        attempt(cgroup::remove_tree(&dir));
    }
    if !failures.is_empty() {
        bail!("lab {name} is not wholly down: {}", failures.join("; "));
    }
    remove_directory(&layout.dir)?;
    lock.remove(name)?;
    remove_shared();
    step.done("nothing is left");
    Ok(())
}

/// Node processes first: a container must not be restarted while its agent is about to die.
fn remove_processes(name: &str, state: Option<&LabState>) -> Result<()> {
    let recorded = state.iter().flat_map(|state| {
        let processes = state
            .processes
            .values()
            .filter_map(|record| record.identity);
        processes.chain(state.nodes.values().filter_map(|node| node.holder))
    });
    let recorded: Vec<ProcessIdentity> = recorded.collect();
    for process in &recorded {
        process.signal(rustix::process::Signal::KILL)?;
    }
    let below = format!("{name}/");
    let owned = process::owned()
        .into_iter()
        .filter(|(_, owner)| owner == name || owner.starts_with(&below));
    for (process, _) in owned {
        process::kill(process, KILL_LIMIT)?;
    }
    cgroup::kill_all(&cgroup::existing(Some(name)), KILL_LIMIT)?;
    for process in recorded {
        process::kill(process, KILL_LIMIT)?;
    }
    Ok(())
}

/// Never through a mount: what lies behind one may be anybody's.
pub(super) fn remove_directory(dir: &Path) -> Result<()> {
    let mounts = mounts_below(dir)?;
    if let Some(mount) = mounts.first() {
        bail!("{mount} is still a mount point; {} stays", dir.display());
    }
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Mount points at or below `dir` in our mount namespace.
///
/// # Errors
/// When the mount table cannot be read.
pub fn mounts_below(dir: &Path) -> Result<Vec<String>> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("read the mount table")?;
    let below = table.lines().filter_map(|line| {
        let point = line.split(' ').nth(4)?;
        Path::new(point).starts_with(dir).then(|| point.to_owned())
    });
    Ok(below.collect())
}

/// The directories all labs share go with the last lab; while others use them, they are not empty.
fn remove_shared() {
    drop(fs::remove_dir(paths::labs()));
    for hierarchy in cgroup::hierarchies() {
        drop(fs::remove_dir(hierarchy.join(CGROUP_TOP)));
    }
}
