//! WebSockets: as a wire of exec and attach, and as a pipe of bytes for tunnels.

use super::channel::{self, Input, Protocol};
use super::wire::{Incoming, Outgoing};
use futures::stream::{SplitSink, SplitStream};
use futures::{Sink, SinkExt, StreamExt};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Bytes, Message, Utf8Bytes};
use tokio_util::io::StreamReader;

/// Largest message of a client; kubectl sends at most 32 KiB at a time.
const MAX_MESSAGE: usize = 4 << 20;

type Socket = WebSocketStream<TokioIo<Upgraded>>;
/// To the client.
pub(super) type Output = SplitSink<Socket, Message>;
/// From the client.
pub(super) type Messages = SplitStream<Socket>;

/// The two halves of an upgraded connection.
pub(super) async fn halves(upgraded: Upgraded) -> (Messages, Output) {
    let config = WebSocketConfig::default()
        .read_buffer_size(16 << 10)
        .write_buffer_size(0)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    let io = TokioIo::new(upgraded);
    let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await;
    let (output, input) = socket.split();
    (input, output)
}

/// The end kubectl expects: any other code, also none, it takes for a lost connection.
pub(super) fn normal_close() -> Message {
    Message::Close(Some(CloseFrame {
        code: CloseCode::Normal,
        reason: Utf8Bytes::default(),
    }))
}

/// A message of a channel protocol.
pub(super) fn message(protocol: Protocol, channel: u8, payload: &[u8]) -> Message {
    let bytes = protocol.encode(channel, payload);
    if protocol.base64 {
        Message::text(String::from_utf8_lossy(&bytes).into_owned())
    } else {
        Message::Binary(Bytes::from(bytes))
    }
}

/// The next message with a payload; none when the client is gone.
pub(super) async fn payload(input: &mut Messages) -> Option<Bytes> {
    loop {
        match input.next().await? {
            Ok(Message::Binary(bytes)) => return Some(bytes),
            Ok(Message::Text(text)) => return Some(text.into()),
            Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => {}
            Ok(Message::Close(_)) | Err(_) => return None,
        }
    }
}

/// Channels of a client of exec or attach.
pub(super) struct Channels {
    pub(super) input: Messages,
    pub(super) protocol: Protocol,
}

impl Incoming for Channels {
    async fn next(&mut self) -> Option<Input> {
        let bytes = payload(&mut self.input).await?;
        Some(self.protocol.decode(&bytes))
    }
}

/// Channels to a client of exec or attach.
pub(super) struct ChannelsOut {
    pub(super) output: Output,
    pub(super) protocol: Protocol,
}

impl Outgoing for ChannelsOut {
    async fn send(&mut self, channel: u8, bytes: &[u8]) -> io::Result<()> {
        let message = message(self.protocol, channel, bytes);
        self.output.send(message).await.map_err(io::Error::other)
    }

    async fn end(mut self, result: Option<&Result<i32, String>>) {
        let text = result.and_then(|r| channel::result_message(self.protocol.status, r));
        if let Some(text) = text {
            let _ = self.send(channel::ERROR, &text).await;
        }
        let _ = self.output.send(normal_close()).await;
    }
}

/// The bytes in a client's messages.
pub(super) fn tunnel_reader(input: Messages) -> impl AsyncRead + Unpin {
    let bytes = futures::stream::unfold(input, |mut input| async move {
        Some((Ok::<_, io::Error>(payload(&mut input).await?), input))
    });
    StreamReader::new(Box::pin(bytes))
}

/// Writes bytes as messages, and says goodbye when shut down.
pub(super) struct TunnelWriter {
    output: Output,
    closing: bool,
}

impl TunnelWriter {
    pub(super) fn new(output: Output) -> Self {
        Self {
            output,
            closing: false,
        }
    }

    fn start(&mut self, cx: &mut Context<'_>, message: Message) -> Poll<io::Result<()>> {
        let mut output = Pin::new(&mut self.output);
        ready!(output.as_mut().poll_ready(cx)).map_err(io::Error::other)?;
        Poll::Ready(output.start_send(message).map_err(io::Error::other))
    }
}

impl AsyncWrite for TunnelWriter {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let message = Message::Binary(Bytes::copy_from_slice(bytes));
        ready!(self.start(cx, message))?;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let output = Pin::new(&mut self.output);
        output.poll_flush(cx).map_err(io::Error::other)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.closing {
            ready!(self.start(cx, normal_close()))?;
            self.closing = true;
        }
        self.poll_flush(cx)
    }
}
