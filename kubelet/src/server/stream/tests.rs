//! SPDY and port-forward over real TLS, by a client made of the same frames.

use crate::server::spdy::Headers;
use crate::server::spdy::frame::{Control, HEAD_BYTES, Head, data_head};
use crate::server::spdy::headers::{Deflater, Inflater};
use crate::server::tests::{Node, connect, node};
use futures::{SinkExt, StreamExt};
use http_body_util::Empty;
use hyper::Request;
use hyper::body::Bytes;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use runtime::service::ExecOutput;
use std::collections::BTreeMap;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

async fn upgrade(node: &Node, path: &str, headers: &[(&str, &str)]) -> TokioIo<Upgraded> {
    let io = TokioIo::new(connect(node, Some("admin")).await);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
    tokio::spawn(connection.with_upgrades());
    let mut request = Request::post(path)
        .header("host", "node")
        .header("connection", "Upgrade");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Empty::<Bytes>::new()).unwrap();
    let mut response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 101);
    TokioIo::new(hyper::upgrade::on(&mut response).await.unwrap())
}

/// A SPDY client that keeps what it gets by stream.
struct Client<T> {
    io: T,
    deflater: Deflater,
    inflater: Inflater,
    data: BTreeMap<u32, Vec<u8>>,
    ended: Vec<u32>,
    reset: Vec<u32>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Client<T> {
    fn new(io: T) -> Self {
        Self {
            io,
            deflater: Deflater::default(),
            inflater: Inflater::default(),
            data: BTreeMap::new(),
            ended: Vec::new(),
            reset: Vec::new(),
        }
    }

    async fn open(&mut self, stream: u32, headers: &[(&str, &str)]) {
        let frame = Control::SynStream {
            stream,
            fin: false,
            headers: Headers::new(headers),
        };
        let bytes = frame.encode(&mut self.deflater);
        self.io.write_all(&bytes).await.unwrap();
        self.io.flush().await.unwrap();
    }

    async fn data(&mut self, stream: u32, bytes: &[u8], fin: bool) {
        let mut frame = data_head(stream, fin, bytes.len()).to_vec();
        frame.extend_from_slice(bytes);
        self.io.write_all(&frame).await.unwrap();
        self.io.flush().await.unwrap();
    }

    /// Reads until `done`, or the end of the connection.
    async fn until(&mut self, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            let mut head = [0; HEAD_BYTES];
            if self.io.read_exact(&mut head).await.is_err() {
                return;
            }
            match Head::parse(head).unwrap() {
                Head::Data {
                    stream,
                    fin,
                    length,
                } => {
                    let mut bytes = vec![0; length];
                    self.io.read_exact(&mut bytes).await.unwrap();
                    self.data.entry(stream).or_default().extend(bytes);
                    if fin {
                        self.ended.push(stream);
                    }
                }
                Head::Control {
                    kind,
                    flags,
                    length,
                } => {
                    let mut bytes = vec![0; length];
                    self.io.read_exact(&mut bytes).await.unwrap();
                    let frame = Control::parse(kind, flags, &bytes, &mut self.inflater);
                    if let Control::Reset { stream, .. } = frame.unwrap() {
                        self.reset.push(stream);
                    }
                }
            }
        }
    }

    fn text(&self, stream: u32) -> String {
        let bytes = self.data.get(&stream).cloned().unwrap_or_default();
        String::from_utf8(bytes).unwrap()
    }

    /// Opens a pair as kubectl does: the error stream first, which it does not write to.
    async fn forward(&mut self, first: u32, id: &str, port: u16) {
        let port = port.to_string();
        let headers = |kind| [("streamType", kind), ("port", &*port), ("requestID", id)];
        self.open(first, &headers("error")).await;
        self.data(first, b"", true).await;
        self.open(first + 2, &headers("data")).await;
    }
}

/// A server on this machine's loopback that says everything back, and then `bye`.
async fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                tokio::io::copy(&mut from, &mut to).await?;
                to.write_all(b"bye").await?;
                to.shutdown().await
            });
        }
    });
    port
}

const SPDY: (&str, &str) = ("upgrade", "SPDY/3.1");

#[tokio::test]
async fn exec_by_spdy_ends_with_its_exit_code() {
    let node = node().await;
    let failed = ExecOutput {
        exit_code: 3,
        ..ExecOutput::default()
    };
    node.runtime.exec_result("c", Ok(failed));
    for (protocol, wanted) in [
        ("v4.channel.k8s.io", "NonZeroExitCode"),
        ("channel.k8s.io", "command terminated with exit code 3"),
    ] {
        let path = "/exec/ns/p/c?command=false&output=1&error=1";
        let headers = [SPDY, ("x-stream-protocol-version", protocol)];
        let mut client = Client::new(upgrade(&node, path, &headers).await);
        for (stream, kind) in [(1, "error"), (3, "stdout"), (5, "stderr")] {
            client.open(stream, &[("streamtype", kind)]).await;
        }
        client.until(|_| false).await;
        assert!(client.text(1).contains(wanted), "{:?}", client.text(1));
        assert_eq!(client.ended, [3, 5, 1]);
    }
}

async fn forwards_by_pairs<T: AsyncRead + AsyncWrite + Unpin>(io: T) {
    let port = echo().await;
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = closed.local_addr().unwrap().port();
    drop(closed);
    let mut client = Client::new(io);
    client.forward(1, "0", port).await;
    client.data(3, b"one", false).await;
    client.until(|c| c.text(3) == "one").await;
    // A connection that fails beside it tells why, and is alone with it.
    client.forward(5, "1", refused).await;
    client
        .until(|c| c.ended.contains(&5) && c.reset.contains(&7))
        .await;
    let why = client.text(5);
    assert!(
        why.starts_with(&format!("error forwarding port {refused} to pod "))
            && why.contains("connection refused"),
        "{why}"
    );
    // Half-closed, the other direction still comes to its end.
    client.data(3, b"two", true).await;
    client
        .until(|c| c.ended.contains(&1) && c.ended.contains(&3))
        .await;
    assert_eq!(client.text(3), "onetwobye");
    assert_eq!(client.text(1), "");
    // Bad streams are refused, and big ones come whole.
    client.open(9, &[("streamType", "data")]).await;
    client.until(|c| c.reset.contains(&9)).await;
    client.forward(11, "2", port).await;
    let big = vec![b'x'; 3 << 20];
    let (mut input, mut output) = tokio::io::split(client.io);
    let sent = big.clone();
    let sending = async move {
        for piece in sent.chunks(20_000) {
            let mut frame = data_head(13, false, piece.len()).to_vec();
            frame.extend_from_slice(piece);
            output.write_all(&frame).await.unwrap();
        }
        output.write_all(&data_head(13, true, 0)).await.unwrap();
        output.flush().await.unwrap();
        output
    };
    let receiving = async move {
        let mut received = 0;
        let mut head = [0; HEAD_BYTES];
        loop {
            input.read_exact(&mut head).await.unwrap();
            let (length, ours, end) = match Head::parse(head).unwrap() {
                Head::Data {
                    stream,
                    fin,
                    length,
                } => (length, stream == 13, fin && stream == 13),
                Head::Control { length, .. } => (length, false, false),
            };
            let mut bytes = vec![0; length];
            input.read_exact(&mut bytes).await.unwrap();
            received += if ours { length } else { 0 };
            if end {
                return (received, input);
            }
        }
    };
    let (_output, (received, _input)) = tokio::join!(sending, receiving);
    assert_eq!(received, big.len() + 3);
}

#[tokio::test]
async fn port_forward_by_spdy_carries_connections_of_their_own() {
    let node = node().await;
    let headers = [SPDY, ("x-stream-protocol-version", "portforward.k8s.io")];
    forwards_by_pairs(upgrade(&node, "/portForward/ns/p", &headers).await).await;
}

async fn websocket(node: &Node, path: &str, protocol: &str) -> WebSocketStream<TokioIo<Upgraded>> {
    let headers = [
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("sec-websocket-protocol", protocol),
    ];
    let io = upgrade(node, path, &headers).await;
    WebSocketStream::from_raw_socket(io, Role::Client, None).await
}

#[tokio::test]
async fn port_forward_by_spdy_in_a_websocket_carries_the_same() {
    let node = node().await;
    let protocol = "SPDY/3.1+portforward.k8s.io";
    let socket = websocket(&node, "/portForward/ns/p/uid-1", protocol).await;
    let (mut sink, mut stream) = socket.split();
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    let (mut from, mut to) = tokio::io::split(theirs);
    // Frames are cut anywhere between messages.
    tokio::spawn(async move {
        let mut buffer = vec![0; 7001];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            let message = Message::Binary(Bytes::copy_from_slice(&buffer[..count]));
            sink.send(message).await.map_err(io::Error::other)?;
        }
        Ok::<_, io::Error>(())
    });
    tokio::spawn(async move {
        while let Some(Ok(message)) = stream.next().await {
            to.write_all(&message.into_data()).await?;
        }
        Ok::<_, io::Error>(())
    });
    forwards_by_pairs(ours).await;
}

#[tokio::test]
async fn port_forward_by_channels_begins_with_the_ports() {
    let node = node().await;
    let port = echo().await;
    let path = format!("/portForward/ns/p?port={port}");
    let mut socket = websocket(&node, &path, "v4.channel.k8s.io").await;
    let [low, high] = port.to_le_bytes();
    let next = |message: Option<Result<Message, _>>| match message {
        Some(Ok::<_, tokio_tungstenite::tungstenite::Error>(message)) => message.into_data(),
        _ => Bytes::new(),
    };
    assert_eq!(next(socket.next().await), [0, low, high].as_slice());
    assert_eq!(next(socket.next().await), [1, low, high].as_slice());
    let hello = Message::Binary(Bytes::from_static(b"\0hello"));
    socket.send(hello).await.unwrap();
    assert_eq!(next(socket.next().await), b"\0hello".as_slice());
}
