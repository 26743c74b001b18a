//! A sandbox's shim: started, connected, watched, ended.

use super::state::{Phase, ShimProcess};
use super::store;
use crate::container;
use crate::engine::{Inner, Sandbox, blocking, lock, now_ns};
use crate::error::{chain, system};
use crate::service::{Result, RuntimeEventKind};
use crate::shim_client::{Handler, Incoming, ShimClient};
use linux::process::pidfd::{self, PidFd};
use pod_shim::client::{ShimStart, spawn_shim};
use pod_shim::protocol::{Event, Request, Snapshot};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How long a shim may take to end after it was told to; it has nothing left to do then.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(5);

/// Tries to reach a shim that lives but closed the connection.
const RECONNECTS: u32 = 3;

/// Starts the shim and watches its process. Blocking.
pub(super) fn start(inner: &Arc<Inner>, sandbox: &Arc<Sandbox>) -> Result<ShimProcess> {
    let program = inner.shim_program(None)?;
    let dir = store::dir(&inner.config, &sandbox.id);
    let started = spawn_shim(
        &program,
        &ShimStart {
            dir: &dir,
            socket: &store::socket(&inner.config, &sandbox.id),
            log: &dir.join("shim.log"),
        },
    )
    .map_err(|e| system(&e))?;
    let process = ShimProcess {
        pid: started.pid,
        start_time: started.start_time,
    };
    watch(inner, sandbox, started.pidfd.into());
    Ok(process)
}

/// Connects; from now on its events change our state.
pub(crate) async fn connect(inner: &Arc<Inner>, sandbox: &Arc<Sandbox>) -> Result<Snapshot> {
    let path = store::socket(&inner.config, &sandbox.id);
    let (weak_inner, weak_sandbox) = (Arc::downgrade(inner), Arc::downgrade(sandbox));
    let handler: Handler = Arc::new(move |incoming| {
        if let (Some(inner), Some(sandbox)) = (weak_inner.upgrade(), weak_sandbox.upgrade()) {
            on_incoming(&inner, &sandbox, incoming);
        }
    });
    let (client, snapshot) = ShimClient::connect(&path, handler).await?;
    sandbox.set_shim(Some(client));
    Ok(snapshot)
}

fn on_incoming(inner: &Arc<Inner>, sandbox: &Arc<Sandbox>, incoming: Incoming) {
    match incoming {
        Incoming::Event(Event::Exited { container_id, exit }) => {
            let inner = Arc::clone(inner);
            tokio::spawn(async move {
                let id = container_id.as_str().into();
                container::teardown::give_cgroup_back(&inner, &id).await;
                container::teardown::on_exit(&inner, &id, &exit);
            });
        }
        Incoming::Event(Event::Oom { container_id }) => {
            let id = container_id.as_str().into();
            let uid = sandbox.pod_uid();
            inner
                .events
                .announce(&uid, &sandbox.id, Some(&id), RuntimeEventKind::Oom);
        }
        Incoming::Event(Event::ExecExited { exec_id, exit_code }) => {
            if let Some(waiting) = lock(&sandbox.execs).remove(&exec_id) {
                // Whoever gave up does not want to know.
                let _ = waiting.send(exit_code);
            }
        }
        Incoming::Gone => {
            let (inner, sandbox) = (Arc::clone(inner), Arc::clone(sandbox));
            tokio::spawn(async move { on_gone(&inner, &sandbox).await });
        }
    }
}

/// The connection ended: the shim is dead, or something is wrong with it.
async fn on_gone(inner: &Arc<Inner>, sandbox: &Arc<Sandbox>) {
    // Nobody will answer these any more.
    lock(&sandbox.execs).clear();
    for _ in 0..RECONNECTS {
        let (phase, shim) = sandbox.with(|r| (r.phase, r.shim));
        if phase != Phase::Ready {
            // Whoever makes or ends it deals with this.
            return;
        }
        if !shim.is_some_and(is_alive) {
            break;
        }
        match connect(inner, sandbox).await {
            Ok(snapshot) => return container::teardown::on_snapshot(inner, sandbox, &snapshot),
            Err(e) => tracing::warn!(sandbox = %sandbox.id, error = %e, "shim unreachable"),
        }
    }
    lost(inner, sandbox).await;
}

/// Whether the process is still the one recorded.
pub(crate) fn is_alive(shim: ShimProcess) -> bool {
    let same = pidfd::start_time(shim.pid).is_ok_and(|t| t == shim.start_time);
    let fd = same.then(|| PidFd::open(shim.pid)).and_then(|fd| fd.ok());
    fd.is_some_and(|fd| !fd.has_exited().unwrap_or(true))
}

/// The shim is gone for good: its containers are over, whatever became of them.
pub(crate) async fn lost(inner: &Arc<Inner>, sandbox: &Arc<Sandbox>) {
    let _turn = sandbox.turn.lock().await;
    if sandbox.with(|r| r.phase) != Phase::Ready || sandbox.shim_alive() {
        return;
    }
    tracing::warn!(sandbox = %sandbox.id, "the shim is gone, its containers are lost");
    sandbox.set_shim(None);
    kill(sandbox).await;
    for container in inner.containers_of(&sandbox.id) {
        container::teardown::on_lost(inner, &container, now_ns()).await;
    }
    let uid = sandbox.pod_uid();
    inner
        .events
        .announce(&uid, &sandbox.id, None, RuntimeEventKind::SandboxGone);
}

/// Ends the shim's process if it is still there.
pub(crate) async fn kill(sandbox: &Sandbox) {
    let Some(shim) = sandbox.with(|r| r.shim).filter(|s| is_alive(*s)) else {
        return;
    };
    let outcome = blocking(move || {
        let fd = PidFd::open(shim.pid).map_err(|e| system(&e))?;
        // Checked again with the handle in hand: it names this process and no later one.
        if pidfd::start_time(shim.pid).is_ok_and(|t| t == shim.start_time) {
            fd.send_signal(9).map_err(|e| system(&e))?;
            fd.wait_exited(SHUTDOWN_LIMIT).map_err(|e| system(&e))?;
        }
        Ok(())
    });
    if let Err(e) = outcome.await {
        tracing::warn!(sandbox = %sandbox.id, error = %e, "the shim could not be killed");
    }
}

/// Ends the shim: asks it, then makes sure. Afterwards its process is gone.
pub(crate) async fn shutdown(sandbox: &Arc<Sandbox>) -> Result<()> {
    if let Ok(client) = sandbox.shim() {
        // It may end before it can answer.
        let asked = client.request(Request::Shutdown, &[]).await;
        if let Err(e) = asked {
            tracing::debug!(sandbox = %sandbox.id, error = %chain(&e), "shutdown request");
        }
    }
    if let Some(shim) = sandbox.with(|r| r.shim).filter(|s| is_alive(*s)) {
        let waited = blocking(move || {
            let fd = PidFd::open(shim.pid).map_err(|e| system(&e))?;
            fd.wait_exited(SHUTDOWN_LIMIT).map_err(|e| system(&e))
        });
        // Gone between the two looks is what we want.
        let _ = waited.await;
        kill(sandbox).await;
    }
    sandbox.set_shim(None);
    Ok(())
}

/// Reaps the shim when it is our child, and notices its death even while nobody talks to it.
pub(crate) fn watch(inner: &Arc<Inner>, sandbox: &Arc<Sandbox>, pidfd: OwnedFd) {
    let (inner, sandbox) = (Arc::downgrade(inner), Arc::downgrade(sandbox));
    let task = async move {
        #[expect(
            deprecated,
            reason = "its successor is unsafe, and an OwnedFd keeps its promise"
        )]
        let Ok(fd) = AsyncFd::with_interest(pidfd, Interest::READABLE) else {
            return;
        };
        if fd.readable().await.is_err() {
            return;
        }
        use rustix::process::{WaitId, WaitIdOptions, waitid};
        use std::os::fd::AsFd;
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        // ECHILD: started by an earlier agent, then init reaps it.
        let _ = waitid(WaitId::PidFd(fd.get_ref().as_fd()), options);
        after_death(inner, sandbox).await;
    };
    // Called from blocking threads too, which know their runtime.
    tokio::runtime::Handle::current().spawn(task);
}

async fn after_death(inner: Weak<Inner>, sandbox: Weak<Sandbox>) {
    if let (Some(inner), Some(sandbox)) = (inner.upgrade(), sandbox.upgrade()) {
        // The connection's reader sees the end too, after all that was sent before it.
        if !sandbox.shim_alive() {
            lost(&inner, &sandbox).await;
        }
    }
}
