//! One connection: a future that reads and writes frames until either side is done.
//!
//! ```text
//!            +-- read frames --> per stream: bounded pieces --> StreamReader
//!  peer <--> |                       new streams --> Session::next
//!            +-- write frames <-- urgent (pings, resets, windows) <- reader, StreamReader
//!                             <-- orders (data, replies)          <- StreamWriter
//! ```
//! The reader never waits for the writer: a peer that does not read cannot keep us from reading.
//! Only data that its stream's user does not take holds the reader up.

use super::frame::{Control, FrameError, HEAD_BYTES, Head, ResetStatus, data_head};
use super::headers::{Deflater, Headers, Inflater};
use super::stream::{Event, Piece, Shared, Stream, StreamReader, StreamWriter};
use super::window::Windows;
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Streams open at once: port-forward uses two per connection it carries.
pub const MAX_STREAMS: usize = 4096;
/// Bytes that may wait for one stream's user, and for all users of a connection together.
const STREAM_BYTES: usize = 1 << 20;
const CONNECTION_BYTES: usize = 16 << 20;
/// Pieces that may wait for one stream's user: many small ones, as from a keyboard.
const STREAM_PIECES: usize = 1024;
/// Largest piece taken from the connection at once.
const PIECE_BYTES: usize = 32 * 1024;
/// Data frames that wait for the connection (each at most 32 KiB).
const ORDERS: usize = 16;
/// Small answers that wait for the connection; what finds no room is left out or sent later.
const URGENT: usize = 256;
/// New streams that wait to be answered.
const NEW_STREAMS: usize = 256;
/// How long the peer may take to hang up after we have said goodbye.
const GOODBYE: Duration = Duration::from_secs(5);

/// What the users of streams want written, in their order.
#[derive(Debug)]
pub(super) enum Order {
    Reply(u32),
    Data {
        stream: u32,
        bytes: Bytes,
        fin: bool,
    },
    Reset(u32, ResetStatus),
    /// Say that no more streams are taken, and hang up.
    Goodbye,
}

/// What is written before any data.
#[derive(Debug)]
pub(super) enum Urgent {
    Pong(u32),
    Window { stream: u32, delta: u32 },
    Reset(u32, ResetStatus),
}

/// The user's side of a connection.
#[derive(Debug)]
pub struct Session {
    streams: mpsc::Receiver<Stream>,
    orders: mpsc::Sender<Order>,
    closed: CancellationToken,
}

impl Session {
    /// The next stream the peer opens; none when the connection is gone. Cancel-safe.
    pub async fn next(&mut self) -> Option<Stream> {
        self.streams.recv().await
    }

    /// Says goodbye after all that was written, and waits (bounded) until the peer hangs up.
    pub async fn finish(self) {
        if self.orders.send(Order::Goodbye).await.is_ok() {
            self.closed.cancelled().await;
        }
    }

    /// Ends when the connection does.
    pub fn closed(&self) -> CancellationToken {
        self.closed.clone()
    }
}

/// Why a connection ended early.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The peer does not speak SPDY/3.1.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The transport failed.
    #[error("spdy connection")]
    Io(#[source] io::Error),
    /// Nothing came or went for so long.
    #[error("spdy connection: no traffic for {0:?}")]
    Idle(Duration),
}

/// A connection over a transport, and the future that keeps it going; both must be polled. The
/// future ends when the peer hangs up, after [`Session::finish`], when nothing moves for `idle`,
/// or with an error; all streams are closed then.
pub fn open<I, O>(
    input: I,
    output: O,
    idle: Duration,
) -> (Session, impl Future<Output = Result<(), ConnectionError>>)
where
    I: AsyncRead + Unpin,
    O: AsyncWrite + Unpin,
{
    let (orders, order_queue) = mpsc::channel(ORDERS);
    let (urgent, urgent_queue) = mpsc::channel(URGENT);
    let (new, streams) = mpsc::channel(NEW_STREAMS);
    let closed = CancellationToken::new();
    let session = Session {
        streams,
        orders: orders.clone(),
        closed: closed.clone(),
    };
    let activity = Arc::new(Activity::default());
    let reader = Reader {
        input,
        inflater: Inflater::default(),
        streams: HashMap::new(),
        newest: 0,
        room: Arc::new(Semaphore::new(CONNECTION_BYTES)),
        windows: Arc::default(),
        closed: closed.clone(),
        consumed: 0,
        new,
        orders,
        urgent,
        activity: Arc::clone(&activity),
    };
    let writer = Writer {
        output,
        deflater: Deflater::default(),
        orders: order_queue,
        urgent: urgent_queue,
        activity: Arc::clone(&activity),
    };
    let work = async move {
        // Streams are told however this future ends, also by being dropped.
        let _closed = closed.drop_guard();
        let writing = async {
            writer.run().await.map_err(ConnectionError::Io)?;
            // Goodbye was said; the reader ends when the peer hangs up.
            tokio::time::sleep(GOODBYE).await;
            Ok(())
        };
        // Nothing is lost by dropping the others: the connection is over.
        tokio::select! {
            ended = reader.run() => ended,
            ended = writing => ended,
            () = activity.idle(idle) => Err(ConnectionError::Idle(idle)),
        }
    };
    (session, work)
}

/// When a frame last came or went. Shared by reader, writer and the idle watch of one future;
/// the lock is held for an assignment only.
#[derive(Debug)]
struct Activity(Mutex<Instant>);

impl Default for Activity {
    fn default() -> Self {
        Self(Mutex::new(Instant::now()))
    }
}

impl Activity {
    fn touch(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    async fn idle(&self, limit: Duration) {
        loop {
            let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let until = last + limit;
            if until <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
    }
}

struct Entry {
    /// None after the peer's last data.
    events: Option<mpsc::Sender<Event>>,
    room: Arc<Semaphore>,
    closed: CancellationToken,
    shared: std::sync::Weak<Shared>,
}

struct Reader<I> {
    input: I,
    inflater: Inflater,
    streams: HashMap<u32, Entry>,
    newest: u32,
    room: Arc<Semaphore>,
    windows: Arc<Windows>,
    closed: CancellationToken,
    /// Bytes taken since the connection's window was opened.
    consumed: u32,
    new: mpsc::Sender<Stream>,
    orders: mpsc::Sender<Order>,
    urgent: mpsc::Sender<Urgent>,
    activity: Arc<Activity>,
}

impl<I: AsyncRead + Unpin> Reader<I> {
    async fn run(mut self) -> Result<(), ConnectionError> {
        let mut head = [0; HEAD_BYTES];
        loop {
            match self.input.read_exact(&mut head).await {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(e) => return Err(ConnectionError::Io(e)),
            }
            self.activity.touch();
            match Head::parse(head)? {
                Head::Data {
                    stream,
                    fin,
                    length,
                } => self.data(stream, fin, length).await?,
                Head::Control {
                    kind,
                    flags,
                    length,
                } => {
                    let mut payload = vec![0; length];
                    let read = self.input.read_exact(&mut payload).await;
                    read.map_err(ConnectionError::Io)?;
                    let frame = Control::parse(kind, flags, &payload, &mut self.inflater)?;
                    // Clients say it when they leave, with all their streams reset.
                    if matches!(frame, Control::GoAway { .. }) {
                        return Ok(());
                    }
                    self.control(frame);
                }
            }
        }
    }

    /// Takes the payload of a data frame piece by piece, as its stream's user makes room.
    async fn data(
        &mut self,
        stream: u32,
        fin: bool,
        mut left: usize,
    ) -> Result<(), ConnectionError> {
        while left > 0 {
            let mut piece = BytesMut::with_capacity(left.min(PIECE_BYTES));
            let read = (&mut self.input)
                .take(left.min(PIECE_BYTES) as u64)
                .read_buf(&mut piece)
                .await;
            let count = read.map_err(ConnectionError::Io)?;
            if count == 0 {
                return Err(ConnectionError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
            self.activity.touch();
            left -= count;
            self.deliver(stream, piece.freeze()).await;
        }
        if fin && let Some(entry) = self.streams.get_mut(&stream) {
            if let Some(events) = entry.events.take() {
                // The channel has one place more than pieces are let in; dropping it says the
                // same but for the difference between an end and a reset.
                let _ = events.send(Event::End).await;
            }
            self.sweep(stream);
        }
        Ok(())
    }

    async fn deliver(&mut self, stream: u32, bytes: Bytes) {
        let count = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        if let Some(entry) = self.streams.get(&stream)
            && let Some(events) = &entry.events
        {
            let (own, all) = (Arc::clone(&entry.room), Arc::clone(&self.room));
            let handing = async {
                let room = [
                    own.acquire_many_owned(count).await,
                    all.acquire_many_owned(count).await,
                ];
                if let [Ok(own), Ok(all)] = room {
                    let piece = Piece {
                        bytes,
                        _room: [own, all],
                    };
                    let _ = events.send(Event::Data(piece)).await;
                }
            };
            // What is for nobody any more is dropped.
            tokio::select! {
                () = handing => {}
                () = events.closed() => {}
                () = entry.closed.cancelled() => {}
            }
        }
        self.consumed = self.consumed.saturating_add(count);
        let delta = self.consumed;
        if delta >= PIECE_BYTES as u32
            && self
                .urgent
                .try_send(Urgent::Window { stream: 0, delta })
                .is_ok()
        {
            self.consumed = 0;
        }
    }

    fn control(&mut self, frame: Control) {
        match frame {
            Control::SynStream {
                stream,
                fin,
                headers,
            } => self.begin(stream, fin, headers),
            Control::Reset { stream, .. } => {
                if let Some(entry) = self.streams.remove(&stream) {
                    entry.closed.cancel();
                }
            }
            Control::Settings { initial_window } => {
                if let Some(size) = initial_window {
                    self.windows.set_initial(size);
                }
            }
            // Odd numbers are the client's own; even ones would answer pings of ours.
            Control::Ping(id) if id % 2 == 1 => self.answer(Urgent::Pong(id)),
            Control::Headers { stream, fin } => {
                if fin && let Some(entry) = self.streams.get_mut(&stream) {
                    entry.events = None;
                }
            }
            Control::Window { stream, delta } => self.windows.open(stream, delta),
            Control::Ping(_)
            | Control::SynReply { .. }
            | Control::GoAway { .. }
            | Control::Unknown(_) => {}
        }
    }

    /// A peer that asks faster than it reads goes without answers.
    fn answer(&self, urgent: Urgent) {
        let _ = self.urgent.try_send(urgent);
    }

    fn begin(&mut self, id: u32, fin: bool, headers: Headers) {
        if id.is_multiple_of(2) || id <= self.newest {
            return self.answer(Urgent::Reset(id, ResetStatus::ProtocolError));
        }
        self.newest = id;
        if self.streams.len() >= MAX_STREAMS {
            self.streams.retain(|_, entry| entry.in_use());
        }
        if self.streams.len() >= MAX_STREAMS {
            return self.answer(Urgent::Reset(id, ResetStatus::RefusedStream));
        }
        let (events, queue) = mpsc::channel(STREAM_PIECES);
        let closed = self.closed.child_token();
        self.windows.begin(id);
        let shared = Arc::new(Shared {
            id,
            closed: closed.clone(),
            orders: self.orders.clone(),
            urgent: self.urgent.clone(),
            windows: Arc::clone(&self.windows),
        });
        let entry = Entry {
            events: (!fin).then_some(events),
            room: Arc::new(Semaphore::new(STREAM_BYTES)),
            closed,
            shared: Arc::downgrade(&shared),
        };
        let stream = Stream {
            id,
            headers,
            reader: StreamReader {
                shared: Arc::clone(&shared),
                events: queue,
                ended: fin,
                credit: 0,
            },
            writer: StreamWriter {
                shared,
                finished: false,
            },
        };
        // Nobody takes streams fast enough, or at all: dropped, and so reset.
        if self.new.try_send(stream).is_ok() {
            self.streams.insert(id, entry);
        }
    }

    /// Forgets a stream that both sides are done with.
    fn sweep(&mut self, stream: u32) {
        if self.streams.get(&stream).is_some_and(|e| !e.in_use()) {
            self.streams.remove(&stream);
        }
    }
}

impl Entry {
    fn in_use(&self) -> bool {
        self.shared.strong_count() > 0 && !self.closed.is_cancelled()
    }
}

struct Writer<O> {
    output: O,
    deflater: Deflater,
    orders: mpsc::Receiver<Order>,
    urgent: mpsc::Receiver<Urgent>,
    activity: Arc<Activity>,
}

impl<O: AsyncWrite + Unpin> Writer<O> {
    /// Writes until goodbye; also when all who could order anything are gone.
    async fn run(mut self) -> io::Result<()> {
        loop {
            let idle = self.orders.is_empty() && self.urgent.is_empty();
            if idle {
                self.output.flush().await?;
            }
            // Both arms are cancel-safe: a queue loses nothing when it is not the one that won.
            let frame = tokio::select! {
                biased;
                Some(urgent) = self.urgent.recv() => self.urgent_frame(&urgent),
                order = self.orders.recv() => match order {
                    Some(Order::Data { stream, bytes, fin }) => {
                        let mut frame = data_head(stream, fin, bytes.len()).to_vec();
                        frame.extend_from_slice(&bytes);
                        frame
                    }
                    Some(Order::Reply(stream)) => {
                        let (fin, headers) = (false, Headers::default());
                        Control::SynReply { stream, fin, headers }.encode(&mut self.deflater)
                    }
                    Some(Order::Reset(stream, status)) => self.reset_frame(stream, status),
                    Some(Order::Goodbye) | None => break,
                },
            };
            self.output.write_all(&frame).await?;
            self.activity.touch();
        }
        let goodbye = Control::GoAway { last: 0 }.encode(&mut self.deflater);
        self.output.write_all(&goodbye).await?;
        self.output.flush().await?;
        self.output.shutdown().await
    }

    fn urgent_frame(&mut self, urgent: &Urgent) -> Vec<u8> {
        match *urgent {
            Urgent::Pong(id) => Control::Ping(id).encode(&mut self.deflater),
            Urgent::Window { stream, delta } => {
                Control::Window { stream, delta }.encode(&mut self.deflater)
            }
            Urgent::Reset(stream, status) => self.reset_frame(stream, status),
        }
    }

    fn reset_frame(&mut self, stream: u32, status: ResetStatus) -> Vec<u8> {
        let status = status as u32;
        Control::Reset { stream, status }.encode(&mut self.deflater)
    }
}
