//! Frames on a Unix stream socket: a 4-byte little-endian length, then that much JSON; file
//! descriptors ride on the first byte of the frame they belong to.
//!
//! [`FrameReader`] and [`FrameWriter`] keep half-done frames between calls, so they serve
//! blocking sockets, epoll loops and async wrappers alike. Descriptors are handed out in the
//! order they came: the kernel may deliver a frame without descriptors and the start of the next
//! one together, but never changes their order, and a message itself tells how many are its own.

use crate::protocol::MAX_FRAME_BYTES;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Most descriptors waiting to be claimed; a peer that sends more is broken.
const MAX_PENDING_FDS: usize = 16;

/// Why a frame could not be decoded or encoded.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The length is above [`MAX_FRAME_BYTES`].
    #[error("frame of {0} bytes is larger than the limit of {MAX_FRAME_BYTES}")]
    TooLarge(usize),
    /// The JSON is not the message expected.
    #[error("frame cannot be understood")]
    Json(#[source] serde_json::Error),
    /// Fewer descriptors came than the message needs.
    #[error("message came with {got} descriptors instead of {wanted}")]
    MissingFds {
        /// How many it needs.
        wanted: usize,
        /// How many are there.
        got: usize,
    },
    /// More unclaimed descriptors than any message carries.
    #[error("too many descriptors")]
    TooManyFds,
}

/// A message as one frame.
///
/// # Errors
/// [`FrameError::TooLarge`], or JSON that cannot be made.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message).map_err(FrameError::Json)?;
    let length = bytes.len() - 4;
    if length > MAX_FRAME_BYTES {
        return Err(FrameError::TooLarge(length));
    }
    bytes[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(bytes)
}

/// Collects bytes and descriptors, gives out messages.
#[derive(Debug, Default)]
pub struct FrameReader {
    bytes: Vec<u8>,
    fds: VecDeque<OwnedFd>,
}

impl FrameReader {
    /// Receive once from a socket; 0 is the end of the connection.
    ///
    /// # Errors
    /// `WouldBlock` on an empty non-blocking socket; any other refusal.
    pub fn fill(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut chunk = [0u8; 8192];
        let mut fds = Vec::new();
        let count = linux::fdpass::recv(socket, &mut chunk, &mut fds)?;
        self.push(&chunk[..count], fds);
        Ok(count)
    }

    /// Add bytes and descriptors received elsewhere.
    pub fn push(&mut self, bytes: &[u8], fds: impl IntoIterator<Item = OwnedFd>) {
        self.bytes.extend_from_slice(bytes);
        self.fds.extend(fds);
    }

    /// The next complete message, if there is one.
    ///
    /// # Errors
    /// Any [`FrameError`]: the connection cannot be used further.
    pub fn next_message<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        if self.fds.len() > MAX_PENDING_FDS {
            return Err(FrameError::TooManyFds);
        }
        let Some(head) = self.bytes.first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*head) as usize;
        if length > MAX_FRAME_BYTES {
            return Err(FrameError::TooLarge(length));
        }
        let Some(body) = self.bytes.get(4..4 + length) else {
            return Ok(None);
        };
        let message = serde_json::from_slice(body).map_err(FrameError::Json)?;
        self.bytes.drain(..4 + length);
        if self.bytes.is_empty() && self.bytes.capacity() > 16384 {
            self.bytes = Vec::new();
        }
        Ok(Some(message))
    }

    /// Claim the descriptors of the message just read.
    ///
    /// # Errors
    /// [`FrameError::MissingFds`].
    pub fn take_fds(&mut self, count: usize) -> Result<Vec<OwnedFd>, FrameError> {
        if self.fds.len() < count {
            return Err(FrameError::MissingFds {
                wanted: count,
                got: self.fds.len(),
            });
        }
        Ok(self.fds.drain(..count).collect())
    }
}

/// Frames waiting to be sent.
#[derive(Debug, Default)]
pub struct FrameWriter {
    queue: VecDeque<Outgoing>,
    queued_bytes: usize,
}

#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

impl FrameWriter {
    /// Queue a message with descriptors (at most [`linux::fdpass::MAX_FDS`]).
    ///
    /// # Errors
    /// See [`encode`].
    pub fn push<T: Serialize>(&mut self, message: &T, fds: Vec<OwnedFd>) -> Result<(), FrameError> {
        let bytes = encode(message)?;
        self.queued_bytes += bytes.len();
        self.queue.push_back(Outgoing {
            bytes,
            sent: 0,
            fds,
        });
        Ok(())
    }

    /// Bytes not sent yet: the caller's bound.
    pub fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// Send as much as the socket takes; `true` when nothing is left.
    ///
    /// # Errors
    /// `WouldBlock` is not an error here (it returns `false`); anything else is.
    pub fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        while let Some(frame) = self.queue.front_mut() {
            let fds: Vec<BorrowedFd<'_>> = frame.fds.iter().map(AsFd::as_fd).collect();
            match linux::fdpass::send(socket, &frame.bytes[frame.sent..], &fds) {
                Ok(count) => {
                    frame.sent += count;
                    self.queued_bytes -= count;
                    // They went with the first byte; the copies here are done.
                    frame.fds.clear();
                    if frame.sent == frame.bytes.len() {
                        self.queue.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn descriptors_arrive_with_the_message_they_belong_to() {
        let (a, b) = UnixStream::pair().unwrap();
        let (read, write) = linux::event::pipe().unwrap();
        let mut writer = FrameWriter::default();
        writer.push(&"plain", vec![]).unwrap();
        writer.push(&"with one", vec![write]).unwrap();
        writer.push(&"plain again", vec![]).unwrap();
        assert!(writer.flush(a.as_fd()).unwrap());
        drop(a);
        let mut reader = FrameReader::default();
        while reader.fill(b.as_fd()).unwrap() > 0 {}
        assert_eq!(reader.next_message::<String>().unwrap().unwrap(), "plain");
        assert_eq!(
            reader.next_message::<String>().unwrap().unwrap(),
            "with one"
        );
        let fds = reader.take_fds(1).unwrap();
        linux::event::write(fds[0].as_fd(), b"x").unwrap();
        let mut buffer = [0; 4];
        assert_eq!(linux::event::read(read.as_fd(), &mut buffer).unwrap(), 1);
        assert_eq!(
            reader.next_message::<String>().unwrap().unwrap(),
            "plain again"
        );
        assert!(reader.next_message::<String>().unwrap().is_none());
        assert!(matches!(
            reader.take_fds(1),
            Err(FrameError::MissingFds { .. })
        ));
    }

    #[test]
    fn an_absurd_length_or_foreign_text_is_an_error() {
        let mut reader = FrameReader::default();
        reader.push(&u32::MAX.to_le_bytes(), []);
        assert!(matches!(
            reader.next_message::<String>(),
            Err(FrameError::TooLarge(_))
        ));
        let mut reader = FrameReader::default();
        reader.push(b"\x02\0\0\0{]", []);
        assert!(matches!(
            reader.next_message::<String>(),
            Err(FrameError::Json(_))
        ));
    }

    proptest! {
        #[test]
        fn frames_survive_any_cutting(
            messages in proptest::collection::vec(".{0,200}", 0..12),
            cuts in proptest::collection::vec(1usize..60, 1..40),
        ) {
            let bytes: Vec<u8> = messages.iter().flat_map(|m| encode(m).unwrap()).collect();
            let mut reader = FrameReader::default();
            let mut got: Vec<String> = Vec::new();
            let (mut at, mut cut) = (0, cuts.iter().cycle());
            while at < bytes.len() {
                let end = (at + cut.next().unwrap()).min(bytes.len());
                reader.push(&bytes[at..end], []);
                at = end;
                while let Some(message) = reader.next_message().unwrap() {
                    got.push(message);
                }
            }
            prop_assert_eq!(got, messages);
        }

        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut reader = FrameReader::default();
            reader.push(&bytes, []);
            for _ in 0..400 {
                match reader.next_message::<crate::protocol::ToShim>() {
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => break,
                }
            }
        }
    }
}
