//! Messages from a child that is being set up to its shim, over a socket that closes when the
//! program executes: [`Note::Ready`] followed by the end means it runs.

use pod_shim::protocol::ShimError;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Longest note; more of an error text is not sent.
const MAX_NOTE_BYTES: usize = 8192;

/// What a child has to say.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Note {
    /// Something was not done as asked, but the container goes on.
    Warning(String),
    /// The terminal's master side comes with this message.
    Terminal,
    /// Another process goes on as the container's first; its handle comes with this message.
    Replaced {
        /// Its id in the shim's PID namespace.
        pid: i32,
    },
    /// All is set up; the program is executed next.
    Ready,
    /// It cannot be started.
    Failed(ShimError),
}

/// The child's end.
#[derive(Debug)]
pub(crate) struct NoteSender(OwnedFd);

impl NoteSender {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Send a note. When the shim is gone nobody needs it: this child is about to be killed.
    pub(crate) fn send(&self, note: &Note, fd: Option<BorrowedFd<'_>>) {
        let Ok(mut bytes) = serde_json::to_vec(note) else {
            return;
        };
        if bytes.len() > MAX_NOTE_BYTES
            && let Note::Failed(error) = note
        {
            let message: String = error.message.chars().take(512).collect();
            let short = Note::Failed(ShimError {
                message,
                ..error.clone()
            });
            bytes = serde_json::to_vec(&short).unwrap_or_default();
        }
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        let _ = linux::fdpass::send(self.0.as_fd(), &bytes, &fds);
    }
}

impl AsFd for NoteSender {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// One step of reading notes.
#[derive(Debug)]
pub(crate) enum Received {
    /// A note, with a descriptor if one came.
    Note(Note, Option<OwnedFd>),
    /// Nothing there yet.
    Nothing,
    /// The child executed or died.
    End,
}

/// Read one note from the shim's (non-blocking) end.
pub(crate) fn receive(fd: BorrowedFd<'_>) -> Received {
    let mut buffer = [0u8; MAX_NOTE_BYTES];
    let mut fds = Vec::new();
    match linux::fdpass::recv(fd, &mut buffer, &mut fds) {
        Ok(0) => Received::End,
        Ok(count) => match serde_json::from_slice(&buffer[..count]) {
            Ok(note) => Received::Note(note, fds.pop()),
            Err(error) => Received::Note(Note::Warning(format!("unreadable note: {error}")), None),
        },
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Received::Nothing,
        Err(_) => Received::End,
    }
}
