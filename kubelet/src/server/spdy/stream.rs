//! One stream, as its user holds it: what the peer sent, and what is sent to it.

use super::connection::{Order, Urgent};
use super::frame::ResetStatus;
use super::headers::Headers;
use super::window::Windows;
use bytes::Bytes;
use std::io;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;

/// Most bytes of one data frame, so that streams take turns.
pub(super) const FRAME_BYTES: usize = 32 * 1024;
/// Consumed bytes after which the peer's window is opened again.
const CREDIT_BYTES: u32 = 32 * 1024;

/// What both halves of a stream share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) id: u32,
    /// Reset by the peer, or the connection is gone.
    pub(super) closed: CancellationToken,
    pub(super) orders: mpsc::Sender<Order>,
    pub(super) urgent: mpsc::Sender<Urgent>,
    pub(super) windows: Arc<Windows>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.windows.end(self.id);
    }
}

/// A stream the peer has opened and nobody has answered yet.
#[derive(Debug)]
pub struct Stream {
    /// Its number.
    pub id: u32,
    /// What the peer says of it.
    pub headers: Headers,
    /// From the peer.
    pub reader: StreamReader,
    /// To the peer.
    pub writer: StreamWriter,
}

impl Stream {
    /// Answers that the stream is taken; the peer waits for it.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn accept(&self) -> io::Result<()> {
        self.writer.order(Order::Reply(self.id)).await
    }

    /// Answers that it is not.
    pub async fn refuse(mut self) {
        self.writer.reset().await;
    }
}

/// A piece of what the peer sent; its permits make room when it is dropped.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) bytes: Bytes,
    pub(super) _room: [OwnedSemaphorePermit; 2],
}

/// What comes of a stream.
#[derive(Debug)]
pub(super) enum Event {
    Data(Piece),
    End,
}

/// What [`StreamReader::next`] gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Received {
    /// Bytes.
    Data(Bytes),
    /// The peer has sent all.
    End,
    /// The peer gave the stream up, or the connection is gone.
    Reset,
}

/// The receiving half.
#[derive(Debug)]
pub struct StreamReader {
    pub(super) shared: Arc<Shared>,
    pub(super) events: mpsc::Receiver<Event>,
    pub(super) ended: bool,
    /// Consumed, but the peer was not told yet.
    pub(super) credit: u32,
}

impl StreamReader {
    /// The next piece. Cancel-safe. After the end or a reset always the same.
    pub async fn next(&mut self) -> Received {
        if self.ended {
            return Received::End;
        }
        match self.events.recv().await {
            Some(Event::Data(piece)) => {
                self.consumed(piece.bytes.len());
                Received::Data(piece.bytes)
            }
            Some(Event::End) => {
                self.ended = true;
                Received::End
            }
            None => Received::Reset,
        }
    }

    fn consumed(&mut self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.credit = self.credit.saturating_add(bytes);
        if self.credit >= CREDIT_BYTES {
            // When there is no room it is told with the next piece.
            let told = self.shared.urgent.try_send(Urgent::Window {
                stream: self.shared.id,
                delta: self.credit,
            });
            if told.is_ok() {
                self.credit = 0;
            }
        }
    }
}

/// The sending half. Dropping it unfinished resets the stream.
#[derive(Debug)]
pub struct StreamWriter {
    pub(super) shared: Arc<Shared>,
    pub(super) finished: bool,
}

impl StreamWriter {
    /// Sends bytes; waits while the peer or the connection cannot take more.
    ///
    /// # Errors
    /// `BrokenPipe` when the stream was reset or finished, or the connection is gone.
    pub async fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let wanted = bytes.len().min(FRAME_BYTES);
            let shared = &self.shared;
            let taken = tokio::select! {
                biased;
                () = shared.closed.cancelled() => return Err(io::ErrorKind::BrokenPipe.into()),
                taken = shared.windows.take(shared.id, wanted) => taken,
            };
            let (now, later) = bytes.split_at(taken.min(bytes.len()));
            bytes = later;
            self.data(Bytes::copy_from_slice(now), false).await?;
        }
        Ok(())
    }

    /// Says that nothing more comes. Repeating it is fine.
    pub async fn finish(&mut self) {
        if !self.finished {
            // Gone already: as good as finished.
            let _ = self.data(Bytes::new(), true).await;
            self.finished = true;
        }
    }

    /// Ends the stream in both directions, after what was written before.
    pub async fn reset(&mut self) {
        if !self.finished {
            self.finished = true;
            let status = ResetStatus::Cancel;
            let _ = self.order(Order::Reset(self.shared.id, status)).await;
        }
        self.shared.closed.cancel();
    }

    /// Resolves when the peer has reset the stream or the connection is gone.
    pub async fn closed(&self) {
        self.shared.closed.cancelled().await;
    }

    async fn data(&self, bytes: Bytes, fin: bool) -> io::Result<()> {
        let stream = self.shared.id;
        if self.finished {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.order(Order::Data { stream, bytes, fin }).await
    }

    async fn order(&self, order: Order) -> io::Result<()> {
        tokio::select! {
            biased;
            () = self.shared.closed.cancelled() => Err(io::ErrorKind::BrokenPipe.into()),
            sent = self.shared.orders.send(order) => {
                sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
            }
        }
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        if !self.finished && !self.shared.closed.is_cancelled() {
            // Abandoned. If there is no room the connection itself is ending or stuck.
            let status = ResetStatus::Cancel;
            let _ = self
                .shared
                .urgent
                .try_send(Urgent::Reset(self.shared.id, status));
            self.shared.closed.cancel();
        }
    }
}
