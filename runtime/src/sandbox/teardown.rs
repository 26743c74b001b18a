//! Ending a sandbox: containers, network, shim, files. Every step may be repeated.

use super::state::{Phase, SandboxRecord};
use super::{shim, store};
use crate::container;
use crate::engine::{Inner, Sandbox, blocking};
use crate::error::error;
use crate::service::{Result, RuntimeErrorKind, RuntimeEventKind, SandboxId};
use std::sync::Arc;
use std::time::Duration;

/// First and last pause between tries to finish an end that failed.
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_LAST: Duration = Duration::from_secs(60);

/// Cgroup of the shared PID namespace's first process.
pub(super) fn helper_cgroup(record: &SandboxRecord) -> String {
    let parent = record.config.cgroup_parent.trim_end_matches('/');
    format!("{parent}/{}", record.id)
}

/// Stops the sandbox.
pub(crate) async fn stop(inner: Arc<Inner>, id: SandboxId) -> Result<()> {
    let Ok(sandbox) = inner.sandbox(&id) else {
        return Ok(());
    };
    let _turn = sandbox.turn.lock().await;
    stop_in_turn(&inner, &sandbox).await
}

async fn stop_in_turn(inner: &Arc<Inner>, sandbox: &Arc<Sandbox>) -> Result<()> {
    let phase = sandbox.with(|r| r.phase);
    match phase {
        Phase::Creating | Phase::Ready => {
            let record = sandbox.change(|r| r.phase = Phase::Stopping);
            mark(inner, record).await?;
        }
        // Every step below may be repeated, and finds nothing to do when it was done.
        Phase::Stopping | Phase::Removing => {}
        Phase::Stopped => return Ok(()),
    }
    stop_containers(inner, sandbox).await?;
    // Plugins see the namespace as long as it lives; its end releases what they overlooked.
    let detached = detach(inner, sandbox).await;
    shim::shutdown(sandbox).await?;
    let (with_inner, with_sandbox) = (Arc::clone(inner), Arc::clone(sandbox));
    blocking(move || release(&with_inner, &with_sandbox.record())).await?;
    detached?;
    let record = sandbox.change(|r| {
        if r.phase.may_become(Phase::Stopped) {
            r.phase = Phase::Stopped;
        }
        r.shim = None;
        r.netns = None;
    });
    mark(inner, record).await?;
    let uid = sandbox.pod_uid();
    inner
        .events
        .announce(&uid, &sandbox.id, None, RuntimeEventKind::SandboxGone);
    Ok(())
}

/// Writes down how far the end is. On a full disk it goes on unwritten: it is what frees space, and
/// a sandbox found without the mark has lost its shim, which says the same.
async fn mark(inner: &Arc<Inner>, record: SandboxRecord) -> Result<()> {
    let config = inner.config.clone();
    blocking(move || {
        if let Err(e) = store::save_existing(&config, &record) {
            tracing::warn!(sandbox = %record.id, error = %e, "its end is not recorded");
        }
        Ok(())
    })
    .await
}

async fn stop_containers(inner: &Arc<Inner>, sandbox: &Arc<Sandbox>) -> Result<()> {
    let all = inner.containers_of(&sandbox.id);
    let stops = all.iter().map(|container| {
        container::teardown::stop(Arc::clone(inner), container.id.clone(), Duration::ZERO)
    });
    let outcomes = futures::future::join_all(stops).await;
    outcomes
        .into_iter()
        .collect::<Result<Vec<()>>>()
        .map(|_| ())
}

async fn detach(inner: &Arc<Inner>, sandbox: &Arc<Sandbox>) -> Result<()> {
    let (with_inner, with_sandbox) = (Arc::clone(inner), Arc::clone(sandbox));
    blocking(move || {
        let record = with_sandbox.record();
        if !record.network_owed {
            return Ok(());
        }
        with_inner.network.detach(&record)?;
        with_sandbox.change(|r| r.network_owed = false);
        Ok(())
    })
    .await
}

/// What of it is in the kernel besides the shim. Blocking.
fn release(inner: &Inner, record: &SandboxRecord) -> Result<()> {
    let pin = store::pin(&inner.config, &record.id);
    linux::netns::unpin(&pin).map_err(|e| crate::error::system(&e))?;
    linux::fs::remove_file(&store::socket(&inner.config, &record.id))?;
    store::remove_shared_memory(&inner.config, &record.id)?;
    let helper = helper_cgroup(record);
    if inner.cgroups.exists(&helper) {
        inner.cgroups.kill(&helper)?;
        inner.cgroups.remove(&helper)?;
    }
    Ok(())
}

/// Stops and forgets the sandbox with its containers.
pub(crate) async fn remove(inner: Arc<Inner>, id: SandboxId) -> Result<()> {
    let Ok(sandbox) = inner.sandbox(&id) else {
        return Ok(());
    };
    let _turn = sandbox.turn.lock().await;
    stop_in_turn(&inner, &sandbox).await?;
    for container in inner.containers_of(&id) {
        container::teardown::remove(Arc::clone(&inner), container.id.clone()).await?;
    }
    let record = sandbox.change(|r| r.phase = Phase::Removing);
    mark(&inner, record).await?;
    let (config, doomed) = (inner.config.clone(), id.clone());
    blocking(move || store::delete(&config, &doomed)).await?;
    inner.sandboxes().remove(&id);
    Ok(())
}

/// Takes back a sandbox whose making failed. What cannot be taken back now is tried again in
/// the background, and again after a restart.
pub(crate) async fn undo(inner: &Arc<Inner>, sandbox: &Arc<Sandbox>) {
    if let Err(e) = remove(Arc::clone(inner), sandbox.id.clone()).await {
        tracing::warn!(sandbox = %sandbox.id, error = %e, "undo of a sandbox will be retried");
        finish_later(inner, sandbox.id.clone(), true);
    }
}

/// Finishes a half-done end in the background, with growing pauses, until it is done.
pub(crate) fn finish_later(inner: &Arc<Inner>, id: SandboxId, forget: bool) {
    let weak = Arc::downgrade(inner);
    tokio::spawn(async move {
        let mut pause = RETRY_FIRST;
        loop {
            tokio::time::sleep(pause).await;
            let Some(inner) = weak.upgrade() else {
                return;
            };
            let outcome = if forget {
                remove(Arc::clone(&inner), id.clone()).await
            } else {
                stop(Arc::clone(&inner), id.clone()).await
            };
            match outcome {
                Ok(()) => return,
                Err(e) => tracing::warn!(sandbox = %id, error = %e, "end of a sandbox is owed"),
            }
            pause = (pause * 2).min(RETRY_LAST);
        }
    });
}

/// Refuses what needs a sandbox that is ready.
pub(crate) fn ensure_ready(sandbox: &Sandbox) -> Result<()> {
    let phase = sandbox.with(|r| r.phase);
    if phase == Phase::Ready {
        return Ok(());
    }
    let message = format!("sandbox {} is {phase:?}, not ready", sandbox.id);
    Err(error(RuntimeErrorKind::Conflict, message))
}
