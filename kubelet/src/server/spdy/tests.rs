//! A connection against a client made of the same frames.

use super::frame::{Control, HEAD_BYTES, Head, data_head};
use super::headers::{Deflater, Inflater};
use super::*;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

const IDLE: Duration = Duration::from_secs(3600);

struct Client {
    io: DuplexStream,
    deflater: Deflater,
    inflater: Inflater,
}

#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Data(u32, Vec<u8>, bool),
    Control(Control),
    Closed,
}

impl Client {
    async fn send(&mut self, frame: Control) {
        let bytes = frame.encode(&mut self.deflater);
        self.io.write_all(&bytes).await.unwrap();
    }

    async fn open(&mut self, stream: u32, kind: &str) {
        let headers = Headers::new(&[("streamType", kind)]);
        let fin = false;
        self.send(Control::SynStream {
            stream,
            fin,
            headers,
        })
        .await;
    }

    async fn data(&mut self, stream: u32, bytes: &[u8], fin: bool) {
        let head = data_head(stream, fin, bytes.len());
        self.io.write_all(&head).await.unwrap();
        self.io.write_all(bytes).await.unwrap();
    }

    /// The next frame that is no opening of a window.
    async fn next(&mut self) -> Seen {
        loop {
            let mut head = [0; HEAD_BYTES];
            if self.io.read_exact(&mut head).await.is_err() {
                return Seen::Closed;
            }
            let (length, data) = match Head::parse(head).unwrap() {
                Head::Data { length, .. } => (length, true),
                Head::Control { length, .. } => (length, false),
            };
            let mut payload = vec![0; length];
            self.io.read_exact(&mut payload).await.unwrap();
            match Head::parse(head).unwrap() {
                Head::Data { stream, fin, .. } if data => return Seen::Data(stream, payload, fin),
                Head::Control { kind, flags, .. } => {
                    let frame = Control::parse(kind, flags, &payload, &mut self.inflater).unwrap();
                    if !matches!(frame, Control::Window { .. }) {
                        return Seen::Control(frame);
                    }
                }
                Head::Data { .. } => unreachable!(),
            }
        }
    }
}

fn pair(idle: Duration) -> (Client, Session, tokio::task::JoinHandle<bool>) {
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    let (input, output) = tokio::io::split(ours);
    let (session, work) = open(input, output, idle);
    let work = tokio::spawn(async move { work.await.is_ok() });
    let client = Client {
        io: theirs,
        deflater: Deflater::default(),
        inflater: Inflater::default(),
    };
    (client, session, work)
}

fn reply(stream: u32) -> Seen {
    let (fin, headers) = (false, Headers::default());
    Seen::Control(Control::SynReply {
        stream,
        fin,
        headers,
    })
}

fn reset(stream: u32, status: u32) -> Seen {
    Seen::Control(Control::Reset { stream, status })
}

#[tokio::test]
async fn a_stream_carries_bytes_both_ways_to_their_ends() {
    let (mut client, mut session, work) = pair(IDLE);
    client.open(1, "data").await;
    let mut stream = session.next().await.unwrap();
    assert_eq!(stream.headers.get("streamtype"), Some("data"));
    stream.accept().await.unwrap();
    assert_eq!(client.next().await, reply(1));
    client.data(1, b"ask", false).await;
    client.data(1, b"", true).await;
    assert_eq!(
        stream.reader.next().await,
        Received::Data(bytes::Bytes::from_static(b"ask"))
    );
    assert_eq!(stream.reader.next().await, Received::End);
    stream.writer.write(b"answer").await.unwrap();
    stream.writer.finish().await;
    assert_eq!(
        client.next().await,
        Seen::Data(1, b"answer".to_vec(), false)
    );
    assert_eq!(client.next().await, Seen::Data(1, Vec::new(), true));
    assert!(stream.writer.write(b"late").await.is_err());
    client.send(Control::Ping(3)).await;
    assert_eq!(client.next().await, Seen::Control(Control::Ping(3)));
    tokio::spawn(session.finish());
    assert_eq!(
        client.next().await,
        Seen::Control(Control::GoAway { last: 0 })
    );
    assert_eq!(client.next().await, Seen::Closed);
    drop(client);
    assert!(work.await.unwrap());
}

#[tokio::test]
async fn bad_stream_numbers_and_abandoned_streams_are_reset_and_the_rest_goes_on() {
    let (mut client, mut session, _work) = pair(IDLE);
    client.open(2, "data").await;
    assert_eq!(client.next().await, reset(2, 1));
    client.open(5, "data").await;
    client.open(3, "data").await;
    assert_eq!(client.next().await, reset(3, 1));
    drop(session.next().await.unwrap());
    assert_eq!(client.next().await, reset(5, 5));
    client.open(7, "data").await;
    let mut stream = session.next().await.unwrap();
    client
        .send(Control::Reset {
            stream: 7,
            status: 5,
        })
        .await;
    assert_eq!(stream.reader.next().await, Received::Reset);
    stream.writer.closed().await;
    assert!(stream.writer.write(b"x").await.is_err());
    client.open(9, "data").await;
    session.next().await.unwrap().refuse().await;
    assert_eq!(client.next().await, reset(9, 5));
}

#[tokio::test]
async fn a_slow_user_of_one_stream_bounds_what_is_kept_and_loses_nothing() {
    let (client, mut session, _work) = pair(IDLE);
    let total = 8 << 20;
    let sending = tokio::spawn(async move {
        let mut client = client;
        client.open(1, "data").await;
        let mut next = 0u8;
        for _ in 0..total / 65536 {
            let piece: Vec<u8> = (0..65536u32)
                .map(|_| {
                    next = next.wrapping_add(1);
                    next
                })
                .collect();
            client.data(1, &piece, false).await;
        }
        client.data(1, b"", true).await;
        client
    });
    let mut stream = session.next().await.unwrap();
    // The sender cannot end before its bytes are taken: more than the bound is on its way.
    let (mut received, mut expected) = (0, 0u8);
    loop {
        match stream.reader.next().await {
            Received::Data(bytes) => {
                assert!(received > 0 || !sending.is_finished());
                for byte in bytes {
                    expected = expected.wrapping_add(1);
                    assert_eq!(byte, expected);
                    received += 1;
                }
            }
            Received::End => break,
            Received::Reset => panic!("reset"),
        }
    }
    assert_eq!(received, total);
}

#[tokio::test]
async fn a_reset_of_a_stalled_stream_lets_the_others_go_on() {
    let (mut client, mut session, _work) = pair(IDLE);
    client.open(1, "data").await;
    client.open(3, "data").await;
    let stalled = session.next().await.unwrap();
    let mut other = session.next().await.unwrap();
    let sending = tokio::spawn(async move {
        for _ in 0..64 {
            client.data(1, &[0; 65536], false).await;
        }
        client.data(3, b"through", true).await;
        client
    });
    drop(stalled);
    let bytes = bytes::Bytes::from_static(b"through");
    assert_eq!(other.reader.next().await, Received::Data(bytes));
    assert_eq!(other.reader.next().await, Received::End);
    drop(sending);
}

#[tokio::test]
async fn the_end_of_the_connection_is_a_reset_for_all() {
    let (mut client, mut session, work) = pair(IDLE);
    client.open(1, "data").await;
    let mut stream = session.next().await.unwrap();
    client.data(1, b"last", false).await;
    drop(client);
    let last = bytes::Bytes::from_static(b"last");
    assert_eq!(stream.reader.next().await, Received::Data(last));
    assert_eq!(stream.reader.next().await, Received::Reset);
    assert!(session.next().await.is_none());
    assert!(work.await.unwrap());
}

#[tokio::test]
async fn garbage_ends_the_connection() {
    let (mut client, _session, work) = pair(IDLE);
    client.io.write_all(&[0xff; 64]).await.unwrap();
    assert!(!work.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_connection_without_traffic_ends() {
    let (_client, _session, work) = pair(Duration::from_secs(30));
    assert!(!work.await.unwrap());
}
