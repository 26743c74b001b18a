//! The agent's side of a shim's life: start one, and speak to it without an async runtime.
//!
//! The agent makes the listening socket and hands it to the shim, so it can connect at once: the
//! first connection waits in the socket's backlog until the shim looks.

use crate::frame::{FrameError, FrameReader, FrameWriter};
use crate::protocol::{FromShim, ToShim};
use linux::process::pidfd::{self, PidFd};
use linux::process::spawn::{SealedProgram, SpawnOptions};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Why a shim could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The socket could not be made.
    #[error("cannot make the shim's socket {path}")]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The shim's own log could not be opened.
    #[error("cannot open the shim's log {path}")]
    Log {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The program could not be executed.
    #[error("cannot start pod-shim")]
    Spawn(#[source] io::Error),
}

/// How a shim is started.
#[derive(Debug)]
pub struct ShimStart<'a> {
    /// The sandbox's state directory (`--dir`).
    pub dir: &'a Path,
    /// Where its socket is to be; an older socket there is replaced.
    pub socket: &'a Path,
    /// Where its own complaints go.
    pub log: &'a Path,
}

/// A shim that was started.
#[derive(Debug)]
pub struct ShimProcess {
    /// Its process id. It is a child of the caller, who must reap it.
    pub pid: i32,
    /// With the process id, proof that it is still the same process after a restart.
    pub start_time: u64,
    /// A handle on it.
    pub pidfd: PidFd,
}

/// Start a shim from its sealed program.
///
/// # Errors
/// See [`SpawnError`]; the socket is removed again when the program cannot be started.
pub fn spawn_shim(
    program: &SealedProgram,
    start: &ShimStart<'_>,
) -> Result<ShimProcess, SpawnError> {
    let socket_error = |source| SpawnError::Socket {
        path: start.socket.to_owned(),
        source,
    };
    if let Some(parent) = start.socket.parent() {
        std::fs::create_dir_all(parent).map_err(socket_error)?;
    }
    match std::fs::remove_file(start.socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(socket_error(error)),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(start.socket).map_err(socket_error)?;
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o640)
        .open(start.log)
        .map_err(|source| SpawnError::Log {
            path: start.log.to_owned(),
            source,
        })?;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let argv = [
        "pod-shim".to_owned(),
        "--dir".into(),
        text(start.dir),
        "--socket".into(),
        text(start.socket),
    ];
    let options = SpawnOptions {
        argv: &argv,
        env: &[],
        stderr: log.as_fd(),
        fd3: Some(listener.as_fd()),
    };
    let started = program.spawn(&options).and_then(|pid| {
        // Not reaped by anyone yet, so the id cannot have been re-used.
        Ok(ShimProcess {
            pid,
            start_time: pidfd::start_time(pid)?,
            pidfd: PidFd::open(pid)?,
        })
    });
    started.map_err(|error| {
        let _ = std::fs::remove_file(start.socket);
        SpawnError::Spawn(error)
    })
}

/// Why a blocking conversation with a shim ended.
#[derive(Debug, thiserror::Error)]
pub enum TalkError {
    /// The socket failed.
    #[error("shim connection failed")]
    Io(#[source] io::Error),
    /// The shim closed the connection.
    #[error("shim closed the connection")]
    Closed,
    /// A frame could not be understood.
    #[error("shim sent a bad frame")]
    Frame(#[source] FrameError),
}

/// A blocking connection to a shim, for tools and tests.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    reader: FrameReader,
}

impl Connection {
    /// Connect.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn open(path: &Path) -> Result<Self, TalkError> {
        let socket = UnixStream::connect(path).map_err(TalkError::Io)?;
        Ok(Self {
            socket,
            reader: FrameReader::default(),
        })
    }

    /// Give up waiting in [`Connection::receive`] after this long.
    ///
    /// # Errors
    /// Only for a zero duration.
    pub fn set_timeout(&self, timeout: std::time::Duration) -> Result<(), TalkError> {
        self.socket
            .set_read_timeout(Some(timeout))
            .map_err(TalkError::Io)
    }

    /// Send a request with its descriptors.
    ///
    /// # Errors
    /// See [`TalkError`].
    pub fn send(&mut self, message: &ToShim, fds: Vec<OwnedFd>) -> Result<(), TalkError> {
        let mut writer = FrameWriter::default();
        writer.push(message, fds).map_err(TalkError::Frame)?;
        while !writer.flush(self.socket.as_fd()).map_err(TalkError::Io)? {}
        Ok(())
    }

    /// Wait for the next message.
    ///
    /// # Errors
    /// See [`TalkError`].
    pub fn receive(&mut self) -> Result<FromShim, TalkError> {
        loop {
            if let Some(message) = self.reader.next_message().map_err(TalkError::Frame)? {
                return Ok(message);
            }
            match self.reader.fill(self.socket.as_fd()) {
                Ok(0) => return Err(TalkError::Closed),
                Ok(_) => {}
                Err(error) => return Err(TalkError::Io(error)),
            }
        }
    }

    /// Claim descriptors that came with the message just received.
    ///
    /// # Errors
    /// When there are fewer.
    pub fn take_fds(&mut self, count: usize) -> Result<Vec<OwnedFd>, TalkError> {
        self.reader.take_fds(count).map_err(TalkError::Frame)
    }
}
