//! Processes run in a container besides its own, and streams to its own.
//!
//! Descriptors: one end of each pipe goes to the shim, the other to the caller. Session ids are
//! the container's id, a dash and a number, so that the sandbox is found from the id alone.

use crate::container::state::Phase;
use crate::engine::{Container, Inner, Sandbox, lock};
use crate::error::{error, system};
use crate::service::{
    ContainerId, ExecOutput, ExecRequest, Result, RuntimeErrorKind, StreamSession,
};
use pod_shim::protocol::{ExecSpec, Request, Stdio};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

/// Bytes read from an output pipe at once.
const CHUNK_BYTES: usize = 16 << 10;

/// After a timed-out session was killed, how long its end is waited for.
const KILL_LIMIT: Duration = Duration::from_secs(5);

static NEXT: AtomicU64 = AtomicU64::new(1);

fn ensure_running(container: &Container) -> Result<()> {
    let running = container.with(|r| match &r.phase {
        Phase::Running { .. } => true,
        Phase::Creating | Phase::Created | Phase::Exited(_) | Phase::Removing(_) => false,
    });
    if running {
        return Ok(());
    }
    let message = format!("container {} is not running", container.id);
    Err(error(RuntimeErrorKind::Conflict, message))
}

/// Takes the waiter out again when the session could not be started or is given up.
struct Registered {
    sandbox: Arc<Sandbox>,
    id: String,
    keep: bool,
}

impl Drop for Registered {
    fn drop(&mut self) {
        if !self.keep {
            lock(&self.sandbox.execs).remove(&self.id);
        }
    }
}

/// Unique over agent restarts too, as sessions outlive the agent in the shim.
fn session_id(container: &ContainerId) -> String {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{container}-{}-{number}", std::process::id())
}

/// Starts a process in a running container.
pub(crate) async fn exec(
    inner: &Arc<Inner>,
    container: &Arc<Container>,
    request: ExecRequest,
) -> Result<StreamSession> {
    ensure_running(container)?;
    if request.command.is_empty() {
        let message = "exec: no command".to_owned();
        return Err(error(RuntimeErrorKind::Invalid, message));
    }
    let shim = container.sandbox.shim()?;
    let stdio = if request.tty {
        Stdio::default()
    } else {
        Stdio {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        }
    };
    let id = session_id(&container.id);
    let (tell, exit) = oneshot::channel();
    lock(&container.sandbox.execs).insert(id.clone(), tell);
    let mut registered = Registered {
        sandbox: Arc::clone(&container.sandbox),
        id: id.clone(),
        keep: false,
    };
    let mut ours = Ends::default();
    let theirs = ours.make(stdio)?;
    let spec = spec(inner, container, &id, &request, stdio)?;
    let fds: Vec<_> = theirs.iter().map(AsFd::as_fd).collect();
    let answer = shim.request(Request::Exec(Box::new(spec)), &fds).await;
    let (_, mut master) = answer?;
    registered.keep = true;
    if request.tty {
        let master = master.pop().ok_or_else(|| {
            let message = "the shim sent no terminal".to_owned();
            error(RuntimeErrorKind::System, message)
        })?;
        if request.stdin {
            ours.stdin = Some(master.try_clone().map_err(|e| system(&e))?);
        }
        ours.stdout = Some(master);
    }
    Ok(ours.session(id, exit))
}

fn spec(
    inner: &Inner,
    container: &Container,
    id: &str,
    request: &ExecRequest,
    stdio: Stdio,
) -> Result<ExecSpec> {
    let (mut process, cgroups, profile) = container.with(|r| {
        let launch = &r.launch;
        let profile = r.config.security.seccomp.clone();
        (launch.process.clone(), launch.cgroups.clone(), profile)
    });
    process.seccomp = inner.seccomp(&profile, &process.capabilities)?;
    process.argv.clone_from(&request.command);
    if request.tty && !process.env.iter().any(|e| e.starts_with("TERM=")) {
        process.env.push("TERM=xterm".to_owned());
    }
    Ok(ExecSpec {
        exec_id: id.to_owned(),
        container_id: container.id.0.clone(),
        process,
        tty: request.tty,
        stdio,
        cgroups,
    })
}

/// Our ends of the streams.
#[derive(Default)]
struct Ends {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

impl Ends {
    /// Makes the pipes asked for; gives back the other ends in the protocol's order.
    fn make(&mut self, stdio: Stdio) -> Result<Vec<OwnedFd>> {
        let mut theirs: Vec<OwnedFd> = Vec::new();
        if stdio.stdin {
            let (read, write) = io::pipe().map_err(|e| system(&e))?;
            theirs.push(read.into());
            self.stdin = Some(write.into());
        }
        for (wanted, slot) in [
            (stdio.stdout, &mut self.stdout),
            (stdio.stderr, &mut self.stderr),
        ] {
            if wanted {
                let (read, write) = io::pipe().map_err(|e| system(&e))?;
                theirs.push(write.into());
                *slot = Some(read.into());
            }
        }
        Ok(theirs)
    }

    fn session(self, id: String, exit: oneshot::Receiver<i32>) -> StreamSession {
        StreamSession {
            id,
            stdin: self.stdin,
            stdout: self.stdout,
            stderr: self.stderr,
            exit,
        }
    }
}

/// Runs a command to its end.
pub(crate) async fn exec_sync(
    inner: &Arc<Inner>,
    container: &Arc<Container>,
    command: Vec<String>,
    timeout: Duration,
    limit: usize,
) -> Result<ExecOutput> {
    let request = ExecRequest {
        command,
        stdout: true,
        stderr: true,
        ..ExecRequest::default()
    };
    let session = exec(inner, container, request).await?;
    let guard = KillOnDrop::new(inner, &session.id);
    let StreamSession {
        id,
        stdout,
        stderr,
        mut exit,
        ..
    } = session;
    let mut out = Collector::new(stdout, limit)?;
    let mut err = Collector::new(stderr, limit)?;
    let work = async {
        let code = loop {
            tokio::select! {
                biased;
                () = out.read(), if out.open() => {}
                () = err.read(), if err.open() => {}
                code = &mut exit => break code,
            }
        };
        // All that the command itself wrote is in the pipes now; who else holds them is not
        // waited for.
        out.drain();
        err.drain();
        code
    };
    let outcome = if timeout.is_zero() {
        Ok(work.await)
    } else {
        tokio::time::timeout(timeout, work).await
    };
    match outcome {
        Ok(Ok(exit_code)) => {
            guard.disarm();
            Ok(ExecOutput {
                exit_code,
                stdout: out.bytes,
                stderr: err.bytes,
            })
        }
        Ok(Err(_)) => {
            guard.disarm();
            let message = format!("container {} ended during exec", container.id);
            Err(error(RuntimeErrorKind::Conflict, message))
        }
        Err(_) => {
            guard.disarm();
            kill(inner, &id).await?;
            // Its waiter is told when all of it is dead.
            let _ = tokio::time::timeout(KILL_LIMIT, exit).await;
            let message = format!("command did not end within {} s", timeout.as_secs_f64());
            Err(error(RuntimeErrorKind::Timeout, message))
        }
    }
}

/// Kills the session when its caller gives up in the middle.
struct KillOnDrop {
    inner: Arc<Inner>,
    session: Option<String>,
}

impl KillOnDrop {
    fn new(inner: &Arc<Inner>, session: &str) -> Self {
        Self {
            inner: Arc::clone(inner),
            session: Some(session.to_owned()),
        }
    }

    fn disarm(mut self) {
        self.session = None;
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let (Some(session), Ok(handle)) =
            (self.session.take(), tokio::runtime::Handle::try_current())
        {
            let inner = Arc::clone(&self.inner);
            handle.spawn(async move {
                if let Err(e) = kill(&inner, &session).await {
                    tracing::debug!(session, error = %e, "kill of an abandoned session");
                }
            });
        }
    }
}

/// Reads an output pipe, keeping at most `limit` bytes.
struct Collector {
    pipe: Option<pipe::Receiver>,
    bytes: Vec<u8>,
    limit: usize,
}

impl Collector {
    fn new(fd: Option<OwnedFd>, limit: usize) -> Result<Self> {
        let pipe = fd.map(pipe::Receiver::from_owned_fd).transpose();
        Ok(Self {
            pipe: pipe.map_err(|e| system(&e))?,
            bytes: Vec::new(),
            limit,
        })
    }

    fn open(&self) -> bool {
        self.pipe.is_some()
    }

    fn keep(&mut self, chunk: &[u8]) {
        let room = self.limit.saturating_sub(self.bytes.len());
        self.bytes
            .extend_from_slice(&chunk[..chunk.len().min(room)]);
    }

    async fn read(&mut self) {
        let Some(pipe) = &mut self.pipe else {
            return;
        };
        let mut chunk = vec![0u8; CHUNK_BYTES];
        match pipe.read(&mut chunk).await {
            Ok(0) | Err(_) => self.pipe = None,
            Ok(count) => self.keep(&chunk[..count]),
        }
    }

    fn drain(&mut self) {
        let mut chunk = vec![0u8; CHUNK_BYTES];
        while let Some(pipe) = &self.pipe {
            match rustix::io::read(pipe, &mut chunk[..]) {
                Ok(0) | Err(_) => self.pipe = None,
                Ok(count) => self.keep(&chunk[..count]),
            }
        }
    }
}

/// The sandbox and, for attach, the container a session id belongs to.
fn find(inner: &Inner, session: &str) -> Result<Arc<Container>> {
    let container = session.split('-').next().unwrap_or(session);
    inner.container(&container.into())
}

/// Kills an exec session; one that has ended is fine.
pub(crate) async fn kill(inner: &Arc<Inner>, session: &str) -> Result<()> {
    let Ok(container) = find(inner, session) else {
        return Ok(());
    };
    let Ok(shim) = container.sandbox.shim() else {
        return Ok(());
    };
    let exec_id = session.to_owned();
    match shim.request(Request::ExecKill { exec_id }, &[]).await {
        Ok(_) => Ok(()),
        Err(e) => {
            let e: crate::service::RuntimeError = e.into();
            match e.kind {
                RuntimeErrorKind::NotFound => Ok(()),
                RuntimeErrorKind::Invalid
                | RuntimeErrorKind::StartFailed
                | RuntimeErrorKind::Network
                | RuntimeErrorKind::ImagePull
                | RuntimeErrorKind::Conflict
                | RuntimeErrorKind::Timeout
                | RuntimeErrorKind::System => Err(e),
            }
        }
    }
}

/// Connects to a running container's own streams.
pub(crate) async fn attach(container: &Arc<Container>, stdin: bool) -> Result<StreamSession> {
    ensure_running(container)?;
    let tty = container.with(|r| r.config.tty);
    let stdio = Stdio {
        stdin: stdin && container.with(|r| r.config.stdin),
        stdout: true,
        stderr: !tty,
    };
    let mut ours = Ends::default();
    let theirs = ours.make(stdio)?;
    let fds: Vec<_> = theirs.iter().map(AsFd::as_fd).collect();
    let request = Request::Attach {
        container_id: container.id.0.clone(),
        stdio,
    };
    container.sandbox.shim()?.request(request, &fds).await?;
    let (tell, exit) = oneshot::channel();
    let container = Arc::clone(container);
    let id = container.id.0.clone();
    tokio::spawn(async move {
        let mut tell = tell;
        let mut changed = container.changed.subscribe();
        loop {
            changed.borrow_and_update();
            if let Some(ended) = container.exit() {
                let _ = tell.send(ended.exit_code);
                return;
            }
            tokio::select! {
                () = tell.closed() => return,
                outcome = changed.changed() => if outcome.is_err() { return },
            }
        }
    });
    Ok(ours.session(id, exit))
}

/// Sets a terminal's size.
pub(crate) async fn resize(inner: &Inner, session: &str, width: u16, height: u16) -> Result<()> {
    let container = find(inner, session)?;
    let request = Request::Resize {
        target: session.to_owned(),
        width,
        height,
    };
    container.sandbox.shim()?.request(request, &[]).await?;
    Ok(())
}
