//! Moves bytes between a WebSocket and the descriptors of an exec or attach session.

use super::channel::{self, Input, Protocol};
use futures::{SinkExt, StreamExt};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use runtime::service::{RuntimeService, StreamSession};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Bytes, Error, Message, Utf8Bytes};

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// How much is read from a pipe at a time.
const CHUNK: usize = 32 * 1024;
/// Messages from the pipes that wait for the socket; each is at most a chunk.
const QUEUE: usize = 8;
/// How long output may come after the process has ended: what it left in the pipes is read at
/// once, a child that keeps them open does not hold the client for ever.
const AFTER_EXIT: Duration = Duration::from_secs(1);
/// How long a client may take to answer our close.
const CLOSE_ANSWER: Duration = Duration::from_secs(5);

/// What ends a session.
enum Step {
    Socket(Option<Result<Message, Error>>),
    Output(Option<(u8, Vec<u8>)>),
    Exit(Option<i32>),
    Idle,
}

/// Serves one session to its end: output to the client, input to the process, the result last.
pub async fn run<R: RuntimeService>(
    mut socket: Socket,
    protocol: Protocol,
    runtime: Arc<R>,
    session: Result<StreamSession, String>,
    idle_timeout: Duration,
) {
    let result = match session {
        Ok(session) => serve(&mut socket, protocol, &*runtime, session, idle_timeout).await,
        Err(message) => Some(Err(message)),
    };
    if let Some(result) = result
        && let Some(text) = channel::result_message(&protocol, &result)
    {
        let _ = socket.send(message(protocol, channel::ERROR, &text)).await;
    }
    close(socket).await;
}

/// Ends the connection as clients expect: with code 1000 (kubectl takes any other, also none, for
/// a lost connection), and only after theirs has come, so that no reset overtakes the last bytes.
async fn close(mut socket: Socket) {
    let normal = CloseFrame {
        code: CloseCode::Normal,
        reason: Utf8Bytes::default(),
    };
    if socket.close(Some(normal)).await.is_err() {
        return;
    }
    let rest = async { while let Some(Ok(_)) = socket.next().await {} };
    // A client that never answers has all there is; its connection is dropped.
    let _ = tokio::time::timeout(CLOSE_ANSWER, rest).await;
}

/// The exit code, an error, or nothing when the client left.
async fn serve<R: RuntimeService>(
    socket: &mut Socket,
    protocol: Protocol,
    runtime: &R,
    session: StreamSession,
    idle_timeout: Duration,
) -> Option<Result<i32, String>> {
    let StreamSession {
        id,
        stdin,
        stdout,
        stderr,
        mut exit,
    } = session;
    let (tx, mut output) = mpsc::channel(QUEUE);
    let lowest = if stdout.is_some() {
        channel::STDOUT
    } else {
        channel::STDERR
    };
    let copy = async {
        tokio::join!(
            copy_out(stdout, channel::STDOUT, tx.clone()),
            copy_out(stderr, channel::STDERR, tx)
        )
    };
    tokio::pin!(copy);
    let mut input = match stdin.map(nonblocking).transpose() {
        Ok(input) => input,
        Err(e) => return Some(Err(format!("open stdin of the session: {e}"))),
    };
    // An empty message tells clients that the session is open.
    if socket.send(message(protocol, lowest, &[])).await.is_err() {
        return None;
    }
    let (mut copied, mut exited) = (false, None);
    let idle = tokio::time::sleep(idle_timeout);
    tokio::pin!(idle);
    loop {
        // Every arm is cancel-safe: channel and socket reads lose nothing, `copy` and `exit` are
        // polled by reference.
        let step = tokio::select! {
            biased;
            // The copies only move while polled; their output arrives in `output`.
            _ = &mut copy, if !copied => { copied = true; continue }
            out = output.recv() => Step::Output(out),
            code = &mut exit, if exited.is_none() => Step::Exit(code.ok()),
            message = socket.next() => Step::Socket(message),
            () = &mut idle => Step::Idle,
        };
        match step {
            Step::Output(Some((channel, bytes))) => {
                if socket
                    .send(message(protocol, channel, &bytes))
                    .await
                    .is_err()
                {
                    let _ = runtime.kill_exec(&id).await;
                    return None;
                }
            }
            // Both outputs have ended; only the exit code is missing.
            Step::Output(None) => {
                return match exited {
                    Some(code) => Some(code),
                    None => Some(wait_for_exit(&mut exit).await),
                };
            }
            Step::Exit(code) => {
                exited = Some(code.ok_or_else(|| "the session was lost".to_owned()));
                idle.as_mut()
                    .reset(tokio::time::Instant::now() + AFTER_EXIT);
                continue;
            }
            Step::Socket(Some(Ok(received))) => {
                if matches!(received, Message::Close(_)) {
                    let _ = runtime.kill_exec(&id).await;
                    return None;
                }
                act(received, protocol, runtime, &id, &mut input).await;
            }
            Step::Socket(Some(Err(_)) | None) => {
                let _ = runtime.kill_exec(&id).await;
                return None;
            }
            Step::Idle => {
                if exited.is_none() {
                    let _ = runtime.kill_exec(&id).await;
                }
                return Some(exited.unwrap_or_else(|| {
                    Err(format!("no traffic for {} s", idle_timeout.as_secs()))
                }));
            }
        }
        let rest = if exited.is_some() {
            AFTER_EXIT
        } else {
            idle_timeout
        };
        idle.as_mut().reset(tokio::time::Instant::now() + rest);
    }
}

async fn wait_for_exit(exit: &mut tokio::sync::oneshot::Receiver<i32>) -> Result<i32, String> {
    exit.await.map_err(|_| "the session was lost".to_owned())
}

/// Input, resize and half-close from the client.
async fn act<R: RuntimeService>(
    received: Message,
    protocol: Protocol,
    runtime: &R,
    id: &str,
    input: &mut Option<AsyncFd<OwnedFd>>,
) {
    let bytes = match &received {
        Message::Binary(bytes) => bytes.as_ref(),
        Message::Text(text) => text.as_bytes(),
        Message::Ping(_) | Message::Pong(_) | Message::Close(_) | Message::Frame(_) => return,
    };
    match protocol.decode(bytes) {
        Input::Stdin(bytes) => {
            if let Some(fd) = input
                && write_all(fd, &bytes).await.is_err()
            {
                // The process closed its input; what else comes is for nobody.
                *input = None;
            }
        }
        Input::StdinClosed => *input = None,
        Input::Resize(width, height) => {
            let _ = runtime.resize_tty(id, width, height).await;
        }
        Input::Ignored => {}
    }
}

fn message(protocol: Protocol, channel: u8, payload: &[u8]) -> Message {
    let bytes = protocol.encode(channel, payload);
    if protocol.base64 {
        Message::text(String::from_utf8_lossy(&bytes).into_owned())
    } else {
        Message::Binary(Bytes::from(bytes))
    }
}

/// Copies a pipe or terminal into the channel until its end.
async fn copy_out(fd: Option<OwnedFd>, channel: u8, out: mpsc::Sender<(u8, Vec<u8>)>) {
    let Some(Ok(fd)) = fd.map(nonblocking) else {
        return;
    };
    let mut buffer = vec![0; CHUNK];
    loop {
        let Ok(mut guard) = fd.readable().await else {
            return;
        };
        let read = guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut buffer)?));
        match read {
            // A terminal whose last user has gone answers EIO: its end.
            Ok(Ok(0) | Err(_)) => return,
            Ok(Ok(n)) => {
                if out.send((channel, buffer[..n].to_vec())).await.is_err() {
                    return;
                }
            }
            Err(_would_block) => {}
        }
    }
}

async fn write_all(fd: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut guard = fd.writable().await?;
        match guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?)) {
            Ok(Ok(n)) => bytes = &bytes[n..],
            Ok(Err(e)) => return Err(e),
            Err(_would_block) => {}
        }
    }
    Ok(())
}

fn nonblocking(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
    #[expect(
        deprecated,
        reason = "its successor is unsafe; the descriptor lives as long as its owner"
    )]
    AsyncFd::new(fd)
}
