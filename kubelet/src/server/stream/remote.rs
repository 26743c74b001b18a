//! exec and attach over SPDY: one stream each for error, stdin, stdout, stderr and resize.

use super::StreamOptions;
use super::channel::{self, Input};
use super::wire::{Incoming, Outgoing};
use crate::server::spdy::{Received, Session, Stream, StreamReader, StreamWriter};
use std::collections::VecDeque;
use std::io;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Protocols served, newest first (`X-Stream-Protocol-Version`).
pub(super) const PROTOCOLS: &[&str] = &[
    "v4.channel.k8s.io",
    "v3.channel.k8s.io",
    "v2.channel.k8s.io",
    "channel.k8s.io",
];
/// How long a client may take to open its streams.
pub(super) const CREATION_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest unread size of a terminal; one takes some twenty bytes.
const MAX_SIZE_BYTES: usize = 4096;

/// Which streams a protocol has beyond the first ones, and how results are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version {
    /// v3: terminals can change their size.
    resize: bool,
    /// v4: the result is a `Status`.
    status: bool,
}

impl Version {
    pub(super) fn of(protocol: &str) -> Self {
        Self {
            resize: matches!(protocol, "v4.channel.k8s.io" | "v3.channel.k8s.io"),
            status: protocol == "v4.channel.k8s.io",
        }
    }

    /// The streams a client of this version opens.
    fn expected(self, options: &StreamOptions) -> usize {
        let resize = options.tty && self.resize;
        let asked = [options.stdin, options.stdout, options.stderr, resize];
        1 + asked.iter().filter(|on| **on).count()
    }
}

/// Waits until the client has opened all its streams; none when it does not.
pub(super) async fn streams(
    mut session: Session,
    version: Version,
    options: &StreamOptions,
) -> Option<(Streams, StreamsOut)> {
    let collected = tokio::time::timeout(CREATION_TIMEOUT, async {
        let mut streams: Vec<(String, Stream)> = Vec::new();
        while streams.len() < version.expected(options) {
            let stream = session.next().await?;
            let kind = stream.headers.get("streamType").unwrap_or_default();
            let known = matches!(kind, "error" | "stdin" | "stdout" | "stderr" | "resize");
            let kind = kind.to_owned();
            if !known || streams.iter().any(|(k, _)| *k == kind) {
                tracing::debug!(kind, "Unexpected stream type");
                stream.refuse().await;
                continue;
            }
            stream.accept().await.ok()?;
            streams.push((kind, stream));
        }
        Some(streams)
    });
    let Ok(Some(collected)) = collected.await else {
        tracing::debug!("Timed out waiting for client to create streams");
        return None;
    };
    let mut input = Streams {
        stdin: None,
        resize: None,
        partial: Vec::new(),
        sizes: VecDeque::new(),
        closed: session.closed(),
    };
    let mut output = StreamsOut {
        stdout: None,
        stderr: None,
        error: None,
        others: Vec::new(),
        status: version.status,
        session,
    };
    for (kind, stream) in collected {
        match kind.as_str() {
            "stdin" => {
                input.stdin = Some(stream.reader);
                output.others.push(stream.writer);
            }
            "resize" => {
                input.resize = Some(stream.reader);
                output.others.push(stream.writer);
            }
            "stdout" => output.stdout = Some(stream.writer),
            "stderr" => output.stderr = Some(stream.writer),
            _ => output.error = Some(stream.writer),
        }
    }
    Some((input, output))
}

/// Streams from the client.
pub(super) struct Streams {
    stdin: Option<StreamReader>,
    resize: Option<StreamReader>,
    /// The beginning of a size.
    partial: Vec<u8>,
    sizes: VecDeque<(u16, u16)>,
    closed: CancellationToken,
}

async fn next_of(stream: &mut Option<StreamReader>) -> Received {
    match stream {
        Some(stream) => stream.next().await,
        None => std::future::pending().await,
    }
}

impl Incoming for Streams {
    async fn next(&mut self) -> Option<Input> {
        loop {
            if let Some((width, height)) = self.sizes.pop_front() {
                return Some(Input::Resize(width, height));
            }
            // All arms are cancel-safe: queues lose nothing when another arm wins.
            tokio::select! {
                biased;
                got = next_of(&mut self.stdin) => match got {
                    Received::Data(bytes) => return Some(Input::Stdin(bytes.to_vec())),
                    Received::End | Received::Reset => {
                        self.stdin = None;
                        return Some(Input::StdinClosed);
                    }
                },
                got = next_of(&mut self.resize) => match got {
                    Received::Data(bytes) => self.read_sizes(&bytes),
                    Received::End | Received::Reset => self.resize = None,
                },
                () = self.closed.cancelled() => return None,
            }
        }
    }
}

impl Streams {
    /// Sizes come as JSON objects one after the other, cut anywhere.
    fn read_sizes(&mut self, bytes: &[u8]) {
        self.partial.extend_from_slice(bytes);
        let mut parser =
            serde_json::Deserializer::from_slice(&self.partial).into_iter::<serde_json::Value>();
        let mut broken = false;
        for value in parser.by_ref() {
            match value {
                Ok(value) => {
                    self.sizes.extend(channel::size_of(&value));
                }
                Err(e) => {
                    broken = !e.is_eof();
                    break;
                }
            }
        }
        let done = parser.byte_offset().min(self.partial.len());
        self.partial.drain(..done);
        if broken || self.partial.len() > MAX_SIZE_BYTES {
            // Not what we understand; the terminal keeps its size from here on.
            self.resize = None;
            self.partial = Vec::new();
        }
    }
}

/// Streams to the client.
pub(super) struct StreamsOut {
    stdout: Option<StreamWriter>,
    stderr: Option<StreamWriter>,
    error: Option<StreamWriter>,
    /// Those nothing is written to; they end with the rest.
    others: Vec<StreamWriter>,
    status: bool,
    session: Session,
}

impl Outgoing for StreamsOut {
    async fn send(&mut self, channel: u8, bytes: &[u8]) -> io::Result<()> {
        let slot = match channel {
            channel::STDOUT => &mut self.stdout,
            channel::STDERR => &mut self.stderr,
            _ => &mut self.error,
        };
        let Some(writer) = slot else { return Ok(()) };
        match writer.write(bytes).await {
            // The client gave up this stream alone.
            Err(_) if !self.session.closed().is_cancelled() => {
                *slot = None;
                Ok(())
            }
            written => written,
        }
    }

    async fn end(mut self, result: Option<&Result<i32, String>>) {
        let text = result.and_then(|r| channel::result_message(self.status, r));
        if let (Some(text), Some(error)) = (text, &mut self.error) {
            let _ = error.write(&text).await;
        }
        let named = [&mut self.stdout, &mut self.stderr, &mut self.error];
        for writer in named.into_iter().flatten() {
            writer.finish().await;
        }
        for mut writer in self.others.drain(..) {
            writer.reset().await;
        }
        self.session.finish().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_of_each_version_open_what_it_has() {
        let options = StreamOptions {
            stdin: true,
            stdout: true,
            tty: true,
            ..StreamOptions::default()
        };
        let count = |protocol| Version::of(protocol).expected(&options);
        assert_eq!(count("v4.channel.k8s.io"), 4);
        assert_eq!(count("v2.channel.k8s.io"), 3);
        assert!(Version::of("v4.channel.k8s.io").status);
        assert!(!Version::of("v3.channel.k8s.io").status);
    }

    #[test]
    fn sizes_are_read_across_pieces_and_garbage_ends_them() {
        let mut streams = Streams {
            stdin: None,
            resize: None,
            partial: Vec::new(),
            sizes: VecDeque::new(),
            closed: CancellationToken::new(),
        };
        streams.read_sizes(b"{\"Width\":80,\"Height\":24}\n{\"Width\":1");
        streams.read_sizes(b"00,\"Height\":30}\n");
        assert_eq!(streams.sizes, [(80, 24), (100, 30)]);
        streams.read_sizes(b"]]");
        assert_eq!(streams.sizes.len(), 2);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_size_reader_panic(pieces: Vec<Vec<u8>>) {
            let mut streams = Streams {
                stdin: None,
                resize: None,
                partial: Vec::new(),
                sizes: VecDeque::new(),
                closed: CancellationToken::new(),
            };
            for piece in pieces {
                streams.read_sizes(&piece);
                proptest::prop_assert!(streams.partial.len() <= MAX_SIZE_BYTES + piece.len());
            }
        }
    }
}
