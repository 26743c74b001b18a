//! The agent's end of the wire to one `pod-shim`.
//!
//! Tasks: one reader per connection, which ends with it. Channels: one oneshot per request in
//! flight. Events are handed to a callback on the reader's task, in order, so a slow callback
//! slows the shim and loses nothing. Reconnecting is the engine's business.

use linux::fdpass;
use pod_shim::frame::FrameReader;
use pod_shim::protocol::{Event, FromShim, Reply, Request, ShimError, Snapshot, ToShim};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::oneshot;

/// A live shim answers in milliseconds; one that takes this long is broken.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);

/// A snapshot comes at once on every connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// A request to a shim failed.
#[derive(Debug, thiserror::Error)]
pub enum ShimClientError {
    /// No connection can be had.
    #[error("connect to shim at {path}")]
    Connect {
        /// Its socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The connection broke before the answer came.
    #[error("the shim of the sandbox went away during {0}")]
    Gone(&'static str),
    /// No answer came.
    #[error("the shim of the sandbox did not answer {0} in time")]
    Silent(&'static str),
    /// The shim refused.
    #[error("{}", .0.message)]
    Refused(ShimError),
    /// The shim was started by an agent before, and does not know what is asked of it.
    #[error(
        "the shim of the sandbox speaks version {version} of its protocol and {request} needs \
         version {needed}: the pod has to be made anew"
    )]
    TooOld {
        /// What was asked.
        request: &'static str,
        /// What it speaks.
        version: u32,
        /// What would be needed.
        needed: u32,
    },
    /// Something that is no message of this protocol.
    #[error("the shim of the sandbox sent what it must not: {0}")]
    Protocol(String),
}

/// What comes without being asked for.
#[derive(Debug)]
pub enum Incoming {
    /// News.
    Event(Event),
    /// The connection is over; nothing more comes.
    Gone,
}

/// Receives what comes without being asked for.
pub type Handler = Arc<dyn Fn(Incoming) + Send + Sync>;

/// An answer and the descriptors that came with it.
pub type Answer = (Reply, Vec<OwnedFd>);

type Waiting = oneshot::Sender<Result<Answer, ShimClientError>>;

struct Pending {
    tell: Waiting,
    wants_fd: bool,
}

struct Shared {
    stream: UnixStream,
    /// Held while one frame is written, as frames must not mix.
    writing: tokio::sync::Mutex<()>,
    /// None once the connection is over.
    pending: Mutex<Option<HashMap<u64, Pending>>>,
    next: AtomicU64,
}

/// A connection; clones share it. It closes when all clones are dropped or the shim goes.
#[derive(Clone)]
pub struct ShimClient {
    shared: Arc<Shared>,
    /// Of the protocol, as the shim speaks it.
    version: u32,
    /// Ends the reader when the last clone is dropped.
    _reader: Arc<AbortOnDrop>,
}

impl std::fmt::Debug for ShimClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShimClient").finish_non_exhaustive()
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl ShimClient {
    /// Connects and takes the snapshot; from then on news go to `handler`.
    ///
    /// # Errors
    /// [`ShimClientError::Connect`] when nobody listens, others when what answers is no shim.
    pub async fn connect(
        path: &Path,
        handler: Handler,
    ) -> Result<(Self, Snapshot), ShimClientError> {
        let refused = |source| ShimClientError::Connect {
            path: path.to_owned(),
            source,
        };
        let stream = connect_long_path(path).map_err(refused)?;
        let mut reader = FrameReader::default();
        let first = tokio::time::timeout(CONNECT_LIMIT, next(&mut reader, &stream)).await;
        let snapshot = match first {
            Err(_) => return Err(ShimClientError::Silent("the connection")),
            Ok(Err(e)) => return Err(refused(e)),
            Ok(Ok(FromShim::Snapshot(snapshot))) => snapshot,
            Ok(Ok(FromShim::Reply { .. } | FromShim::Event(_))) => {
                let message = "no snapshot on connection".to_owned();
                return Err(ShimClientError::Protocol(message));
            }
        };
        let shared = Arc::new(Shared {
            stream,
            writing: tokio::sync::Mutex::new(()),
            pending: Mutex::new(Some(HashMap::new())),
            next: AtomicU64::new(1),
        });
        let task = tokio::spawn(read_all(Arc::clone(&shared), reader, handler));
        let client = Self {
            shared,
            version: snapshot.version,
            _reader: Arc::new(AbortOnDrop(task.abort_handle())),
        };
        Ok((client, snapshot))
    }

    /// Whether the connection is still up.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.shared.lock().is_some()
    }

    /// Asks and waits for the answer. `fds` travel with the request.
    ///
    /// # Errors
    /// [`ShimClientError`].
    pub async fn request(
        &self,
        request: Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Answer, ShimClientError> {
        let name = request_name(&request);
        let (version, needed) = (self.version, request.since());
        if needed > version {
            return Err(ShimClientError::TooOld {
                request: name,
                version,
                needed,
            });
        }
        let wants_fd = matches!(&request, Request::Exec(exec) if exec.tty);
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let (tell, answer) = oneshot::channel();
        match self.shared.lock().as_mut() {
            Some(pending) => pending.insert(id, Pending { tell, wants_fd }),
            None => return Err(ShimClientError::Gone(name)),
        };
        let sent = self.shared.send(&ToShim { id, request }, fds).await;
        if sent.is_err() {
            self.shared.forget(id);
            return Err(ShimClientError::Gone(name));
        }
        match tokio::time::timeout(REQUEST_LIMIT, answer).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(ShimClientError::Gone(name)),
            Err(_) => {
                self.shared.forget(id);
                Err(ShimClientError::Silent(name))
            }
        }
    }
}

/// A path beyond the 107 bytes of a socket address is reached through its directory.
fn connect_long_path(path: &Path) -> io::Result<UnixStream> {
    let (dir, name) = match (path.parent(), path.file_name()) {
        (Some(dir), Some(name)) => (std::fs::File::open(dir)?, name),
        (None, _) | (_, None) => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let stream = std::os::unix::net::UnixStream::connect(through(&dir, name))?;
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

fn through(dir: &std::fs::File, name: &std::ffi::OsStr) -> PathBuf {
    use std::os::fd::AsRawFd;
    PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name)
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<HashMap<u64, Pending>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self, id: u64) {
        if let Some(pending) = self.lock().as_mut() {
            pending.remove(&id);
        }
    }

    async fn send(&self, message: &ToShim, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let frame = pod_shim::frame::encode(message).map_err(io::Error::other)?;
        let _turn = self.writing.lock().await;
        let mut sent = 0;
        while sent < frame.len() {
            self.stream.writable().await?;
            let with = if sent == 0 { fds } else { &[] };
            let attempt = self.stream.try_io(Interest::WRITABLE, || {
                fdpass::send(self.stream.as_fd(), &frame[sent..], with)
            });
            match attempt {
                Ok(count) => sent += count,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// Waits for the next whole message.
async fn next(reader: &mut FrameReader, stream: &UnixStream) -> io::Result<FromShim> {
    loop {
        if let Some(message) = reader.next_message().map_err(io::Error::other)? {
            return Ok(message);
        }
        stream.readable().await?;
        match stream.try_io(Interest::READABLE, || reader.fill(stream.as_fd())) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
}

async fn read_all(shared: Arc<Shared>, mut reader: FrameReader, handler: Handler) {
    loop {
        match next(&mut reader, &shared.stream).await {
            Ok(FromShim::Reply { id, result }) => {
                let waiting = shared.lock().as_mut().and_then(|p| p.remove(&id));
                let Some(waiting) = waiting else {
                    continue;
                };
                let mut fds = Vec::new();
                if waiting.wants_fd && result.is_ok() {
                    fds = reader.take_fds(1).unwrap_or_default();
                }
                let outcome = result.map(|reply| (reply, fds));
                // The caller may have given up; then the descriptors close here.
                let _ = waiting.tell.send(outcome.map_err(ShimClientError::Refused));
            }
            Ok(FromShim::Event(event)) => handler(Incoming::Event(event)),
            // Only sent on connection; a second one would say nothing new.
            Ok(FromShim::Snapshot(_)) => {}
            Err(error) => {
                if error.kind() != io::ErrorKind::UnexpectedEof {
                    tracing::debug!(%error, "shim connection ended");
                }
                break;
            }
        }
    }
    // Dropping the senders tells everybody who waits.
    drop(shared.lock().take());
    handler(Incoming::Gone);
}

fn request_name(request: &Request) -> &'static str {
    match request {
        Request::Setup(_) => "setup",
        Request::Launch(_) => "launch",
        Request::Signal { .. } => "signal",
        Request::Exec(_) => "exec",
        Request::ExecKill { .. } => "exec kill",
        Request::Resize { .. } => "resize",
        Request::ReopenLog { .. } => "reopen log",
        Request::Forget { .. } => "forget",
        Request::Attach { .. } => "attach",
        Request::Shutdown => "shutdown",
    }
}

#[cfg(test)]
#[path = "shim_client_tests.rs"]
mod tests;
