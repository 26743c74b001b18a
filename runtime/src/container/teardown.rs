//! Stopping a container, taking notice of its end, removing it.

use super::state::{Exit, Phase};
use super::{create, store};
use crate::engine::{Container, Inner, Sandbox, blocking};
use crate::error::error;
use crate::service::{ContainerId, Result, RuntimeErrorKind, RuntimeEventKind};
use pod_shim::protocol::{ExitRecord, Request, Snapshot};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// SIGKILL.
const SIGKILL: i32 = 9;

/// After SIGKILL the end is a matter of milliseconds; what takes longer hangs in the kernel.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// An end is told at the latest after so long, whatever is left of the cgroup.
const GIVE_BACK_LIMIT: Duration = Duration::from_millis(500);

/// Stops a container: its signal, then SIGKILL after `grace`. Several calls share one deadline,
/// the earliest.
pub(crate) async fn stop(inner: Arc<Inner>, id: ContainerId, grace: Duration) -> Result<()> {
    let Ok(container) = inner.container(&id) else {
        return Ok(());
    };
    // A grace beyond all bounds is no deadline at all.
    let deadline = Instant::now().checked_add(grace);
    let first = ratchet(&container, deadline);
    let running = container.with(|r| match &r.phase {
        Phase::Running { .. } => true,
        Phase::Creating | Phase::Created | Phase::Exited(_) | Phase::Removing(_) => false,
    });
    if !running {
        // Not started yet: a start in flight holds the turn; look again after it.
        let _turn = container.turn.lock().await;
        let started = container.with(|r| matches!(r.phase, Phase::Running { .. }));
        if !started {
            return Ok(());
        }
    }
    if first && !grace.is_zero() {
        let signal = container.with(|r| r.stop_signal);
        send(&container, signal, false).await;
    }
    if !wait_until_deadline(&container).await {
        send(&container, SIGKILL, true).await;
        let killed = tokio::time::timeout(KILL_LIMIT, wait_exit(&container)).await;
        if killed.is_err() {
            kill_by_cgroup(&inner, &container).await?;
        }
    }
    Ok(())
}

/// Moves the deadline closer; says whether it is the first.
fn ratchet(container: &Container, deadline: Option<Instant>) -> bool {
    let far = Instant::now() + Duration::from_secs(86_400 * 365);
    let deadline = deadline.unwrap_or(far);
    let mut first = false;
    container.deadline.send_if_modified(|current| {
        first = current.is_none();
        let closer = current.is_none_or(|old| deadline < old);
        if closer {
            *current = Some(deadline);
        }
        closer
    });
    first
}

async fn send(container: &Container, signal: i32, all: bool) {
    let request = Request::Signal {
        container_id: container.id.0.clone(),
        signal,
        all,
    };
    let outcome = match container.sandbox.shim() {
        Ok(shim) => shim.request(request, &[]).await.map_err(|e| e.to_string()),
        Err(e) => Err(e.to_string()),
    };
    if let Err(e) = outcome {
        // It may have ended meanwhile, which is what the signal is for.
        tracing::debug!(container = %container.id, error = %e, "signal not delivered");
    }
}

async fn wait_exit(container: &Container) {
    let mut changed = container.changed.subscribe();
    loop {
        changed.borrow_and_update();
        let ended = container.with(|r| match &r.phase {
            Phase::Running { .. } => false,
            Phase::Creating | Phase::Created | Phase::Exited(_) | Phase::Removing(_) => true,
        });
        if ended || changed.changed().await.is_err() {
            return;
        }
    }
}

/// Waits for the end or the deadline, which may move closer meanwhile. Says whether it ended.
async fn wait_until_deadline(container: &Container) -> bool {
    let mut deadline = container.deadline.subscribe();
    let exit = wait_exit(container);
    tokio::pin!(exit);
    loop {
        let at = (*deadline.borrow_and_update()).unwrap_or_else(Instant::now);
        tokio::select! {
            biased;
            () = &mut exit => return true,
            () = tokio::time::sleep_until(at) => return false,
            _ = deadline.changed() => {}
        }
    }
}

/// The shim did not bring it about: the cgroup names every process.
async fn kill_by_cgroup(inner: &Arc<Inner>, container: &Arc<Container>) -> Result<()> {
    let cgroup = container.with(|r| r.cgroup.clone());
    let with_inner = Arc::clone(inner);
    blocking(move || Ok(with_inner.cgroups.kill(&cgroup)?)).await?;
    let ended = tokio::time::timeout(KILL_LIMIT, wait_exit(container)).await;
    ended.map_err(|_| {
        let message = format!("container {} does not end", container.id);
        error(RuntimeErrorKind::Timeout, message)
    })
}

/// The shim says it ended; its exit record is on disk.
pub(crate) fn on_exit(inner: &Inner, id: &ContainerId, exit: &ExitRecord) {
    let Ok(container) = inner.container(id) else {
        return;
    };
    let running_since = container.with(|r| match &r.phase {
        Phase::Created => Some(exit.started_at_ns),
        Phase::Creating | Phase::Running { .. } | Phase::Exited(_) | Phase::Removing(_) => None,
    });
    if let Some(started_at_ns) = running_since {
        // The news overtook the answer to the launch.
        create::set_running(inner, &container, started_at_ns, 0);
    }
    note_exit(inner, &container, Exit::from_record(exit));
}

/// Removes the cgroup of a container that has ended, before its end is told: limits of a dead
/// container would bind those of its pod (sched-bwc(7): a child may not have more than its
/// parent). What cannot be removed in time goes with the container.
pub(crate) async fn give_cgroup_back(inner: &Arc<Inner>, id: &ContainerId) {
    let Ok(container) = inner.container(id) else {
        return;
    };
    let (with_inner, cgroup) = (Arc::clone(inner), container.with(|r| r.cgroup.clone()));
    let removed = blocking(move || {
        if with_inner.cgroups.exists(&cgroup) {
            with_inner.cgroups.kill(&cgroup)?;
            with_inner.cgroups.remove(&cgroup)?;
        }
        Ok(())
    });
    match tokio::time::timeout(GIVE_BACK_LIMIT, removed).await {
        Ok(Ok(())) => {}
        Ok(Err(e)) => tracing::debug!(container = %id, error = %e, "cgroup of a dead container"),
        Err(_) => tracing::debug!(container = %id, "cgroup of a dead container is busy"),
    }
}

pub(crate) fn note_exit(inner: &Inner, container: &Container, exit: Exit) {
    let changed = container.change(|r| {
        let may = match &r.phase {
            Phase::Created | Phase::Running { .. } => true,
            Phase::Creating | Phase::Exited(_) | Phase::Removing(_) => false,
        };
        if may {
            r.phase = Phase::Exited(exit);
        }
        may
    });
    if changed {
        let uid = container.sandbox.pod_uid();
        let kind = RuntimeEventKind::Exited;
        inner
            .events
            .announce(&uid, &container.sandbox.id, Some(&container.id), kind);
    }
}

/// A shim that was out of reach tells all it knows.
pub(crate) fn on_snapshot(inner: &Inner, sandbox: &Sandbox, snapshot: &Snapshot) {
    for state in &snapshot.containers {
        let id = state.container_id.as_str().into();
        let Ok(container) = inner.container(&id) else {
            tracing::warn!(sandbox = %sandbox.id, container = %id, "shim runs an unknown container");
            continue;
        };
        create::set_running(inner, &container, state.started_at_ns, state.pid);
        if let Some(exit) = &state.exit {
            on_exit(inner, &id, exit);
        }
    }
}

/// Its shim is gone: it is over, by its exit record or without one. Ends what is left of it.
pub(crate) async fn on_lost(inner: &Arc<Inner>, container: &Arc<Container>, now_ns: i64) {
    let (phase, cgroup) = container.with(|r| (r.phase.clone(), r.cgroup.clone()));
    let started_at_ns = match phase {
        Phase::Creating | Phase::Exited(_) | Phase::Removing(_) => return,
        Phase::Created => 0,
        Phase::Running { started_at_ns, .. } => started_at_ns,
    };
    let (with_inner, with_container) = (Arc::clone(inner), Arc::clone(container));
    let killed = container.deadline.borrow().is_some();
    let outcome = blocking(move || {
        with_inner.cgroups.kill(&cgroup)?;
        let found = store::exit_record(&with_inner.config, &with_container.id);
        let exit = found.unwrap_or_else(|| Exit::unknown(started_at_ns, now_ns, killed));
        let record = with_container.with(|r| {
            let mut record = r.clone();
            record.phase = Phase::Exited(exit.clone());
            record
        });
        if let Err(e) = store::save(&with_inner.config, &record) {
            tracing::warn!(container = %record.id, error = %e, "its end is not recorded");
        }
        Ok(exit)
    });
    match outcome.await {
        Ok(exit) => note_exit(inner, container, exit),
        Err(e) => {
            tracing::warn!(container = %container.id, error = %e, "end of a lost container");
            note_exit(
                inner,
                container,
                Exit::unknown(started_at_ns, now_ns, killed),
            );
        }
    }
}

/// Kills if need be and forgets the container.
pub(crate) async fn remove(inner: Arc<Inner>, id: ContainerId) -> Result<()> {
    let Ok(container) = inner.container(&id) else {
        return Ok(());
    };
    stop(Arc::clone(&inner), id.clone(), Duration::ZERO).await?;
    let _turn = container.turn.lock().await;
    if let Ok(shim) = container.sandbox.shim() {
        let container_id = id.0.clone();
        // Unknown there is fine; a dead shim has forgotten everything.
        let _ = shim.request(Request::Forget { container_id }, &[]).await;
    }
    let (with_inner, with_container) = (Arc::clone(&inner), Arc::clone(&container));
    blocking(move || {
        let exit = with_container.exit();
        let record = with_container.change(|r| {
            r.phase = Phase::Removing(exit);
            r.clone()
        });
        if store::dir(&with_inner.config, &record.id).exists()
            && let Err(e) = store::save(&with_inner.config, &record)
        {
            // Found again it is an ended container, to be removed all the same; on a full disk
            // its removal is what makes space.
            tracing::warn!(container = %record.id, error = %e, "its removal is not recorded");
        }
        delete(&with_inner, &record.cgroup, &record.id)
    })
    .await?;
    inner.containers().remove(&id);
    Ok(())
}

/// Removes cgroup and files. Blocking.
pub(crate) fn delete(inner: &Inner, cgroup: &str, id: &ContainerId) -> Result<()> {
    if inner.cgroups.exists(cgroup) {
        inner.cgroups.kill(cgroup)?;
        inner.cgroups.remove(cgroup)?;
    }
    store::delete(&inner.config, id)
}
