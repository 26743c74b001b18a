//! A container's standard streams on the shim's side: read, logged, copied to who is attached.

use crate::logfile::LogFile;
use crate::logline::{self, Splitter};
use linux::event;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Bytes one read takes. Small, because the buffer stays resident in every shim.
pub(crate) const READ_BYTES: usize = 16 * 1024;
/// Reads per wake-up, so that one loud container cannot starve the others.
const READS_PER_TURN: usize = 8;
/// What an attached client may lag behind before the container's output is not read any further,
/// so that a slow terminal sees all of it. One that takes nothing at all for a while is cut off
/// (`STALL_MS`): nobody stops a container for longer.
const MAX_BEHIND_BYTES: usize = 256 * 1024;
/// What is kept of an attached client's input while the container does not read.
const MAX_INPUT_BYTES: usize = 64 * 1024;

/// Which output stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamName {
    /// stdout, or a terminal.
    Stdout,
    /// stderr.
    Stderr,
}

impl StreamName {
    pub(crate) fn index(self) -> usize {
        match self {
            StreamName::Stdout => 0,
            StreamName::Stderr => 1,
        }
    }

    fn text(self) -> &'static str {
        match self {
            StreamName::Stdout => "stdout",
            StreamName::Stderr => "stderr",
        }
    }
}

/// One stream the container writes.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) fd: OwnedFd,
    pub(crate) token: u64,
    splitter: Splitter,
}

/// Bytes on their way to a descriptor that may not take them at once.
#[derive(Debug)]
pub(crate) struct Sink {
    pub(crate) fd: OwnedFd,
    pub(crate) token: u64,
    pub(crate) queue: VecDeque<u8>,
    /// Something was taken since this was last looked at.
    pub(crate) moved: bool,
}

impl Sink {
    pub(crate) fn new(fd: OwnedFd, token: u64) -> Self {
        Self {
            fd,
            token,
            queue: VecDeque::new(),
            moved: false,
        }
    }

    /// Write what the descriptor takes; `Ok(true)` when nothing is left.
    pub(crate) fn flush(&mut self) -> io::Result<bool> {
        while !self.queue.is_empty() {
            let (front, _) = self.queue.as_slices();
            match event::write(self.fd.as_fd(), front) {
                Ok(count) => {
                    self.moved = true;
                    drop(self.queue.drain(..count));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        self.queue = VecDeque::new();
        Ok(true)
    }

    /// Whether it lags so far behind that the container is held.
    pub(crate) fn is_behind(&self) -> bool {
        self.queue.len() > MAX_BEHIND_BYTES
    }

    /// Whether more input may be taken for it.
    pub(crate) fn has_room(&self) -> bool {
        self.queue.len() < MAX_INPUT_BYTES
    }
}

/// A client attached to a container.
#[derive(Debug)]
pub(crate) struct Attachment {
    /// Its input, copied into the container's stdin.
    pub(crate) input: Option<(OwnedFd, u64)>,
    /// Copies of stdout and stderr.
    pub(crate) outputs: [Option<Sink>; 2],
}

/// What one turn of reading a stream came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// More may come.
    Open,
    /// The last writer is gone.
    End,
}

/// All output of one container.
#[derive(Debug, Default)]
pub(crate) struct Output {
    pub(crate) log: Option<LogFile>,
    pub(crate) streams: [Option<Stream>; 2],
    pub(crate) attachments: Vec<Attachment>,
    /// Not read for now, because an attached client is too far behind.
    pub(crate) held: bool,
}

impl Output {
    /// Add a stream (its descriptor must not block).
    pub(crate) fn add(&mut self, name: StreamName, fd: OwnedFd, token: u64) {
        self.streams[name.index()] = Some(Stream {
            fd,
            token,
            splitter: Splitter::default(),
        });
    }

    /// Whether every stream has ended.
    pub(crate) fn is_done(&self) -> bool {
        self.streams.iter().all(Option::is_none)
    }

    /// Read what is there, up to a share per turn, and log it.
    pub(crate) fn read(&mut self, name: StreamName, scratch: &mut Vec<u8>, now_ns: i64) -> Turn {
        let Some(stream) = &mut self.streams[name.index()] else {
            return Turn::End;
        };
        scratch.resize(READ_BYTES, 0);
        let mut lines = Vec::new();
        let stamp = logline::stamp(now_ns);
        let mut turn = Turn::Open;
        for _ in 0..READS_PER_TURN {
            match event::read(stream.fd.as_fd(), scratch) {
                Ok(0) => turn = Turn::End,
                Ok(count) => {
                    let bytes = &scratch[..count];
                    if self.log.is_some() {
                        stream.splitter.feed(bytes, &stamp, name.text(), &mut lines);
                    }
                    copy_to_attached(&mut self.attachments, name, bytes);
                    if count == READ_BYTES {
                        continue;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // A terminal says EIO when its last user is gone.
                Err(_) => turn = Turn::End,
            }
            break;
        }
        if let Some(log) = &mut self.log {
            log.append(&lines, now_ns);
        }
        turn
    }

    /// Log an unfinished line and let go of the stream.
    pub(crate) fn close(&mut self, name: StreamName, now_ns: i64) -> Option<Stream> {
        let mut stream = self.streams[name.index()].take()?;
        let mut lines = Vec::new();
        stream
            .splitter
            .finish(&logline::stamp(now_ns), name.text(), &mut lines);
        if let Some(log) = &mut self.log {
            log.append(&lines, now_ns);
        }
        Some(stream)
    }

    /// What attached clients still have to take.
    pub(crate) fn sinks(&mut self) -> impl Iterator<Item = &mut Option<Sink>> {
        self.attachments.iter_mut().flat_map(|a| &mut a.outputs)
    }

    /// Whether an attached client is too far behind.
    pub(crate) fn is_behind(&mut self) -> bool {
        self.sinks().flatten().any(|sink| sink.is_behind())
    }

    /// The descriptor of a terminal's master side, which is the stdout stream.
    pub(crate) fn terminal(&self) -> Option<BorrowedFd<'_>> {
        self.streams[0].as_ref().map(|stream| stream.fd.as_fd())
    }
}

fn copy_to_attached(attachments: &mut [Attachment], name: StreamName, bytes: &[u8]) {
    for attachment in attachments {
        let slot = &mut attachment.outputs[name.index()];
        let Some(sink) = slot else { continue };
        sink.queue.extend(bytes);
        if sink.flush().is_err() {
            *slot = None;
        }
    }
}
