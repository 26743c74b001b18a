//! After a restart: read what is recorded, adopt what runs, finish what was half done.
//!
//! Order matters: sandboxes are known before containers, shims are asked before anything is
//! declared dead, and only then is anything removed. What carries none of our records is
//! reported by [`audit`] and left alone, unless its place and name prove it ours (a pin, a
//! socket or shared memory of a sandbox whose record is gone).

use crate::container::state::{ContainerRecord, Phase as ContainerPhase};
use crate::container::{self, store as container_store};
use crate::engine::{Container, Inner, Sandbox, blocking, now_ns};
use crate::error::chain;
use crate::sandbox::state::Phase;
use crate::sandbox::{self, store as sandbox_store};
use crate::service::{ContainerId, Result, SandboxId};
use linux::process::pidfd::PidFd;
use pod_shim::protocol::{Request, Snapshot};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Shims connected at once; each holds two descriptors and a little memory meanwhile.
const CONNECTS: usize = 32;

/// Does it all.
pub(crate) async fn recover(inner: &Arc<Inner>) -> Result<()> {
    load_sandboxes(inner).await?;
    let damaged = load_containers(inner).await?;
    let snapshots = reach_shims(inner).await;
    settle_containers(inner, &snapshots).await;
    settle_sandboxes(inner, &snapshots).await;
    remove_damaged(inner, damaged).await;
    remove_strays(inner).await;
    let with_inner = Arc::clone(inner);
    // Plugins take their time; pods need not wait for the collection.
    tokio::task::spawn_blocking(move || collect_network(&with_inner));
    Ok(())
}

async fn load_sandboxes(inner: &Arc<Inner>) -> Result<()> {
    let config = inner.config.clone();
    let found = blocking(move || sandbox_store::load_all(&config)).await?;
    for entry in found {
        match entry {
            sandbox_store::Found::Record(record) => {
                let sandbox = Sandbox::new(*record);
                inner.sandboxes().insert(sandbox.id.clone(), sandbox);
            }
            sandbox_store::Found::Empty(id) => {
                let config = inner.config.clone();
                let gone = blocking(move || sandbox_store::delete(&config, &id)).await;
                report("remains of a sandbox", gone);
            }
            sandbox_store::Found::Foreign(why) => tracing::warn!(why, "left alone"),
        }
    }
    Ok(())
}

/// Returns the containers whose records cannot be read.
async fn load_containers(inner: &Arc<Inner>) -> Result<Vec<ContainerId>> {
    let config = inner.config.clone();
    let found = blocking(move || container_store::load_all(&config)).await?;
    let mut damaged = Vec::new();
    for entry in found {
        match entry {
            container_store::Found::Record(record) => {
                let owner = inner.sandbox(&record.sandbox_id);
                match owner {
                    Ok(sandbox) => load_container(inner, *record, sandbox),
                    Err(_) => remove_container(inner, &record).await,
                }
            }
            container_store::Found::Empty(id) => {
                let config = inner.config.clone();
                let gone = blocking(move || container_store::delete(&config, &id)).await;
                report("remains of a container", gone);
            }
            container_store::Found::Damaged(id, why) => {
                tracing::warn!(container = %id, why, "the record of a container is damaged");
                damaged.push(id);
            }
            container_store::Found::Foreign(why) => tracing::warn!(why, "left alone"),
        }
    }
    Ok(damaged)
}

/// Files of containers that nobody can tell anything about any more. Their processes were ended
/// with what shims run without a record.
async fn remove_damaged(inner: &Arc<Inner>, damaged: Vec<ContainerId>) {
    for id in damaged {
        let with_inner = Arc::clone(inner);
        let gone = blocking(move || {
            // Its place was in the record; the name is its id, whoever the pod was.
            for cgroup in cgroups_of_ids(&with_inner, "/") {
                if cgroup.rsplit('/').next() == Some(id.as_str()) {
                    with_inner.cgroups.kill(&cgroup)?;
                    with_inner.cgroups.remove(&cgroup)?;
                }
            }
            container_store::delete(&with_inner.config, &id)
        });
        report("a container with a damaged record", gone.await);
    }
}

fn load_container(inner: &Inner, record: ContainerRecord, sandbox: Arc<Sandbox>) {
    let images = crate::container::create::leases(inner, &record.image_id, &record.config);
    let leases = images.unwrap_or_else(|e| {
        tracing::warn!(container = %record.id, error = %e, "its image is gone");
        Vec::new()
    });
    let container = Container::new(record, sandbox, leases);
    inner.containers().insert(container.id.clone(), container);
}

async fn remove_container(inner: &Arc<Inner>, record: &ContainerRecord) {
    let (with_inner, cgroup, id) = (Arc::clone(inner), record.cgroup.clone(), record.id.clone());
    let gone = blocking(move || container::teardown::delete(&with_inner, &cgroup, &id)).await;
    report("a container without a sandbox", gone);
}

fn report(what: &str, outcome: Result<()>) {
    match outcome {
        Ok(()) => tracing::info!(what, "removed"),
        Err(e) => tracing::warn!(what, error = %e, "not removed"),
    }
}

/// Connects to every shim that lives.
async fn reach_shims(inner: &Arc<Inner>) -> BTreeMap<SandboxId, Snapshot> {
    use futures::StreamExt as _;
    let all: Vec<Arc<Sandbox>> = inner.sandboxes().values().cloned().collect();
    let reach = |sandbox: Arc<Sandbox>| {
        let inner = Arc::clone(inner);
        async move {
            let snapshot = reach_shim(&inner, &sandbox).await?;
            Some((sandbox.id.clone(), snapshot))
        }
    };
    let reached = futures::stream::iter(all).map(reach);
    reached
        .buffer_unordered(CONNECTS)
        .filter_map(|found| async { found })
        .collect()
        .await
}

async fn reach_shim(inner: &Arc<Inner>, sandbox: &Arc<Sandbox>) -> Option<Snapshot> {
    let record = sandbox.record();
    if record.boot_id != inner.boot_id || record.phase == Phase::Stopped {
        return None;
    }
    if record
        .shim
        .is_some_and(|shim| !sandbox::shim::is_alive(shim))
    {
        return None;
    }
    let snapshot = match sandbox::shim::connect(inner, sandbox).await {
        Ok(snapshot) => snapshot,
        Err(e) => {
            tracing::warn!(sandbox = %sandbox.id, error = %e, "no shim answers");
            // It lives and cannot be asked: nobody may run on while its pod is begun anew.
            sandbox::shim::kill(sandbox).await;
            return None;
        }
    };
    let claimed = snapshot.sandbox_id.as_deref();
    if claimed.is_some_and(|id| id != sandbox.id.as_str()) {
        tracing::warn!(sandbox = %sandbox.id, ?claimed, "the shim belongs to another sandbox");
        sandbox.set_shim(None);
        return None;
    }
    adopt(inner, sandbox, snapshot.shim_pid);
    Some(snapshot)
}

/// Takes over the shim's process. The socket cannot tell who serves it (its credentials are
/// those of the agent that made it), so the shim's own word is checked against its command line.
fn adopt(inner: &Arc<Inner>, sandbox: &Arc<Sandbox>, pid: i32) {
    let dir = sandbox_store::dir(&inner.config, &sandbox.id);
    let Ok(fd) = PidFd::open(pid) else {
        return;
    };
    let start_time = linux::process::pidfd::start_time(pid);
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let ours = command
        .split(|b| *b == 0)
        .any(|word| word == dir.as_os_str().as_encoded_bytes());
    let (Ok(start_time), true) = (start_time, ours) else {
        tracing::warn!(sandbox = %sandbox.id, pid, "the shim's process is not what it says");
        return;
    };
    let process = sandbox::state::ShimProcess { pid, start_time };
    sandbox.change(|r| r.shim = Some(process));
    sandbox::shim::watch(inner, sandbox, fd.into());
    if let Err(e) = inner.shim_program(Some(pid)) {
        tracing::warn!(error = %e, "the shim program cannot be loaded");
    }
}

async fn settle_containers(inner: &Arc<Inner>, snapshots: &BTreeMap<SandboxId, Snapshot>) {
    let all: Vec<Arc<Container>> = inner.containers().values().cloned().collect();
    for container in all {
        let half_done = container.with(|r| match &r.phase {
            ContainerPhase::Creating | ContainerPhase::Removing(_) => true,
            ContainerPhase::Created
            | ContainerPhase::Running { .. }
            | ContainerPhase::Exited(_) => false,
        });
        if half_done {
            let record = container.record();
            remove_container(inner, &record).await;
            inner.containers().remove(&container.id);
            continue;
        }
        match snapshots.get(&container.sandbox.id) {
            Some(_) => {}
            None => container::teardown::on_lost(inner, &container, now_ns()).await,
        }
    }
    for (id, snapshot) in snapshots {
        let Ok(sandbox) = inner.sandbox(id) else {
            continue;
        };
        container::teardown::on_snapshot(inner, &sandbox, snapshot);
        end_unknown(inner, &sandbox, snapshot).await;
        forgotten_exits(inner, id);
    }
}

/// Ends what a shim still runs although its record is gone (its removal was under way).
async fn end_unknown(inner: &Arc<Inner>, sandbox: &Arc<Sandbox>, snapshot: &Snapshot) {
    for state in &snapshot.containers {
        let id: ContainerId = state.container_id.as_str().into();
        if inner.container(&id).is_ok() {
            continue;
        }
        let Ok(shim) = sandbox.shim() else {
            return;
        };
        let container_id = state.container_id.clone();
        let signal = Request::Signal {
            container_id: container_id.clone(),
            signal: 9,
            all: true,
        };
        if state.exit.is_none() {
            let _ = shim.request(signal, &[]).await;
        }
        let _ = shim.request(Request::Forget { container_id }, &[]).await;
    }
}

/// A container the shim no longer knows may have left its exit record.
fn forgotten_exits(inner: &Inner, sandbox: &SandboxId) {
    for container in inner.containers_of(sandbox) {
        if let Some(exit) = container_store::exit_record(&inner.config, &container.id) {
            container::teardown::note_exit(inner, &container, exit);
        }
    }
}

async fn settle_sandboxes(inner: &Arc<Inner>, snapshots: &BTreeMap<SandboxId, Snapshot>) {
    let all: Vec<Arc<Sandbox>> = inner.sandboxes().values().cloned().collect();
    for sandbox in all {
        let record = sandbox.record();
        if record.boot_id != inner.boot_id {
            // Its process id, if reused, is somebody else's.
            sandbox.change(|r| r.shim = None);
        }
        match record.phase {
            Phase::Creating => sandbox::teardown::undo(inner, &sandbox).await,
            Phase::Removing => sandbox::teardown::undo(inner, &sandbox).await,
            Phase::Stopping => {
                let stopped = sandbox::teardown::stop(Arc::clone(inner), sandbox.id.clone()).await;
                if let Err(e) = stopped {
                    tracing::warn!(sandbox = %sandbox.id, error = %e, "its end is owed");
                    sandbox::teardown::finish_later(inner, sandbox.id.clone(), false);
                }
            }
            Phase::Ready if !snapshots.contains_key(&sandbox.id) => {
                tracing::warn!(sandbox = %sandbox.id, "its shim is gone");
            }
            Phase::Ready | Phase::Stopped => {}
        }
    }
}

/// Pins, sockets and shared memory of sandboxes that are no more.
async fn remove_strays(inner: &Arc<Inner>) {
    let with_inner = Arc::clone(inner);
    let outcome = blocking(move || {
        for id in strays(&with_inner) {
            tracing::info!(sandbox = %id, "removing what an unknown sandbox left");
            end_stray_shim(&with_inner, &id);
            if let Err(e) = sandbox_store::delete(&with_inner.config, &id) {
                tracing::warn!(sandbox = %id, error = %e, "not removed");
            }
        }
        Ok(())
    });
    if let Err(e) = outcome.await {
        tracing::warn!(error = %e, "what unknown sandboxes left is not removed");
    }
}

/// Ids of ours in the run directory without a sandbox.
fn strays(inner: &Inner) -> Vec<SandboxId> {
    let config = &inner.config;
    let places = [config.pins(), config.sockets(), config.shared_memory()];
    let mut found = Vec::new();
    for place in places {
        for name in linux::fs::list_dir(&place).unwrap_or_default() {
            let name = name.to_string_lossy().into_owned();
            let id = name.strip_suffix(".sock").unwrap_or(&name);
            if sandbox_store::is_id(id) && inner.sandbox(&id.into()).is_err() {
                found.push(SandboxId(id.to_owned()));
            }
        }
    }
    found.sort();
    found.dedup();
    found
}

/// Tells a shim without a record to end; a dead socket has none.
fn end_stray_shim(inner: &Inner, id: &SandboxId) {
    use pod_shim::client::Connection;
    let socket = sandbox_store::socket(&inner.config, id);
    let Ok(mut connection) = Connection::open(&socket) else {
        return;
    };
    let message = pod_shim::protocol::ToShim {
        id: 1,
        request: Request::Shutdown,
    };
    let limit = std::time::Duration::from_secs(5);
    let asked = connection
        .set_timeout(limit)
        .and_then(|()| connection.send(&message, Vec::new()));
    // Until it closes the connection.
    while asked.is_ok() && connection.receive().is_ok() {}
}

fn collect_network(inner: &Inner) {
    let valid = || {
        let all = inner.sandboxes();
        let owed = all.values().filter(|s| s.with(|r| r.network_owed));
        owed.map(|s| s.id.0.clone()).collect()
    };
    match inner.network.collect(valid) {
        Ok(0) => {}
        Ok(count) => tracing::info!(count, "released network attachments of nobody"),
        Err(e) => tracing::info!(error = %e, "network not collected"),
    }
}

/// What is there and is not ours or not known.
pub(crate) fn audit(inner: &Inner) -> Vec<String> {
    let mut found = Vec::new();
    for id in strays(inner) {
        found.push(format!(
            "remains of unknown sandbox {id} in the run directory"
        ));
    }
    for entry in sandbox_store::load_all(&inner.config).into_iter().flatten() {
        match entry {
            sandbox_store::Found::Foreign(why) => found.push(why),
            sandbox_store::Found::Empty(id) => found.push(format!("sandbox {id} without record")),
            sandbox_store::Found::Record(record) => {
                if inner.sandbox(&record.id).is_err() {
                    found.push(format!("sandbox {} on disk only", record.id));
                }
            }
        }
    }
    for entry in container_store::load_all(&inner.config)
        .into_iter()
        .flatten()
    {
        match entry {
            container_store::Found::Damaged(_, why) | container_store::Found::Foreign(why) => {
                found.push(why);
            }
            container_store::Found::Empty(id) => {
                found.push(format!("container {id} without record"));
            }
            container_store::Found::Record(record) => {
                if inner.container(&record.id).is_err() {
                    found.push(format!("container {} on disk only", record.id));
                }
            }
        }
    }
    found.extend(stray_cgroups(inner));
    if let Err(e) = linux::mountinfo::read() {
        found.push(format!("mount table unreadable: {}", chain(&e)));
    }
    found
}

/// Cgroups named like containers of ours that are none.
fn stray_cgroups(inner: &Inner) -> Vec<String> {
    let unknown = |cgroup: &String| {
        let name = cgroup.rsplit('/').next().unwrap_or_default();
        inner.container(&name.into()).is_err() && inner.sandbox(&name.into()).is_err()
    };
    let strays = cgroups_of_ids(inner, "/").into_iter().filter(unknown);
    strays
        .map(|cgroup| format!("cgroup {cgroup} of no known container"))
        .collect()
}

/// Cgroups named by an id of ours, below a path.
fn cgroups_of_ids(inner: &Inner, path: &str) -> Vec<String> {
    /// kubepods / class / pod / container.
    const DEPTH: usize = 5;
    if path.matches('/').count() > DEPTH {
        return Vec::new();
    }
    let mut found = Vec::new();
    for child in inner.cgroups.children(path) {
        let below = format!("{}/{child}", path.trim_end_matches('/'));
        if sandbox_store::is_id(&child) {
            found.push(below);
        } else {
            found.extend(cgroups_of_ids(inner, &below));
        }
    }
    found
}
