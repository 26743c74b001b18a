//! Port-forward over SPDY: a data and an error stream per connection, paired by request id.
//!
//! A connection that fails takes its own pair of streams with it and nothing else
//! (kubernetes/kubernetes#74551).

use super::remote::CREATION_TIMEOUT;
use crate::server::spdy::{Headers, Received, Session, Stream, StreamReader, StreamWriter};
use runtime::service::{RuntimeService, SandboxId};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// How much is read from a pod's connection at a time.
const CHUNK: usize = 32 * 1024;

/// Where to: connections into one sandbox.
pub(super) struct Target<R> {
    /// The engine.
    pub(super) runtime: Arc<R>,
    /// The pod's sandbox.
    pub(super) sandbox: SandboxId,
}

impl<R> Clone for Target<R> {
    fn clone(&self) -> Self {
        Self {
            runtime: Arc::clone(&self.runtime),
            sandbox: self.sandbox.clone(),
        }
    }
}

impl<R: RuntimeService> Target<R> {
    /// Connects to a port.
    ///
    /// # Errors
    /// The sentence the client is told.
    pub(super) async fn connect(&self, port: u16) -> Result<TcpStream, String> {
        let connected = self.runtime.connect(&self.sandbox, port).await;
        connected.map_err(|e| {
            let sandbox = &self.sandbox;
            format!("error forwarding port {port} to pod {sandbox}, uid : {e}")
        })
    }
}

/// Reads a port as clients write it.
///
/// # Errors
/// The words of the stock kubelet.
pub(super) fn port(text: &str) -> Result<u16, String> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match text.parse::<u16>() {
        Ok(0) => Err(format!("port {text:?} must be > 0")),
        Ok(port) if digits => Ok(port),
        Err(_) if digits => Err(format!(
            "unable to parse {text:?} as a port: strconv.ParseUint: parsing {text:?}: value out of range"
        )),
        Ok(_) | Err(_) => Err(format!(
            "unable to parse {text:?} as a port: strconv.ParseUint: parsing {text:?}: invalid syntax"
        )),
    }
}

/// Which of a pair a stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Data,
    Error,
}

/// What a stream's headers ask for.
fn request(id: u32, headers: &Headers) -> Result<(String, Role, u16), String> {
    let text = headers.get("port").unwrap_or_default();
    if text.is_empty() {
        return Err("\"port\" header is required".to_owned());
    }
    let port = port(text)?;
    let role = match headers.get("streamType").unwrap_or_default() {
        "data" => Role::Data,
        "error" => Role::Error,
        "" => return Err("\"streamType\" header is required".to_owned()),
        other => return Err(format!("invalid stream type {other:?}")),
    };
    let pair = match headers.get("requestID").filter(|id| !id.is_empty()) {
        Some(id) => id.to_owned(),
        // Clients of before request ids open the error stream, then the data stream.
        None => match role {
            Role::Error => id.to_string(),
            Role::Data => id.saturating_sub(2).to_string(),
        },
    };
    Ok((pair, role, port))
}

/// A pair that is not complete.
struct Half {
    role: Role,
    stream: Stream,
    since: Instant,
}

/// Serves a connection until the client is gone. All its forwarded connections end with it.
pub(super) async fn run<R: RuntimeService>(mut session: Session, target: Target<R>) {
    let mut halves: HashMap<String, Half> = HashMap::new();
    // Owned here, so that dropping this future ends them.
    let mut pairs = JoinSet::new();
    loop {
        let oldest = halves.values().map(|h| h.since).min();
        let expiry = async {
            match oldest {
                Some(since) => tokio::time::sleep_until(since + CREATION_TIMEOUT).await,
                None => std::future::pending().await,
            }
        };
        // All arms are cancel-safe: queues and sets lose nothing, a timer is set anew.
        tokio::select! {
            stream = session.next() => match stream {
                Some(stream) => {
                    if let Some((data, error, port)) = pair_up(&mut halves, stream).await {
                        pairs.spawn(forward(data, error, port, target.clone()));
                    }
                }
                None => return,
            },
            Some(_) = pairs.join_next() => {}
            () = expiry => expire(&mut halves, Instant::now()).await,
        }
    }
}

/// Accepts a stream and gives its pair when it is complete.
async fn pair_up(
    halves: &mut HashMap<String, Half>,
    stream: Stream,
) -> Option<(Stream, Stream, u16)> {
    let (pair, role, port) = match request(stream.id, &stream.headers) {
        Ok(request) => request,
        Err(reason) => {
            tracing::debug!(reason, "Stream rejected");
            stream.refuse().await;
            return None;
        }
    };
    stream.accept().await.ok()?;
    match halves.remove(&pair) {
        Some(other) if other.role != role => Some(match role {
            Role::Data => (stream, other.stream, port),
            Role::Error => (other.stream, stream, port),
        }),
        Some(mut first) => {
            let name = match role {
                Role::Data => "data",
                Role::Error => "error",
            };
            let text = format!(
                "error processing stream for request {pair}: {name} stream already assigned"
            );
            if role == Role::Error {
                let _ = first.stream.writer.write(text.as_bytes()).await;
            }
            stream.refuse().await;
            halves.insert(pair, first);
            None
        }
        None => {
            let since = Instant::now();
            halves.insert(
                pair,
                Half {
                    role,
                    stream,
                    since,
                },
            );
            None
        }
    }
}

/// Gives up pairs whose other stream did not come.
async fn expire(halves: &mut HashMap<String, Half>, now: Instant) {
    let old = halves.extract_if(|_, half| half.since + CREATION_TIMEOUT <= now);
    let old: Vec<_> = old.collect();
    for (pair, mut half) in old {
        if half.role == Role::Error {
            let text = format!("(request={pair}) timed out waiting for streams");
            let _ = half.stream.writer.write(text.as_bytes()).await;
            half.stream.writer.finish().await;
        }
        // Dropping the stream resets what is left of it.
    }
}

/// One forwarded connection, from the first byte to the last of both directions.
async fn forward<R: RuntimeService>(data: Stream, mut error: Stream, port: u16, target: Target<R>) {
    let Stream {
        mut reader,
        mut writer,
        ..
    } = data;
    let connected = tokio::select! {
        connected = target.connect(port) => connected,
        () = writer.closed() => return error.writer.finish().await,
    };
    match connected {
        Ok(socket) => {
            if copy(&mut reader, &mut writer, socket).await.is_err() {
                writer.reset().await;
            }
        }
        Err(message) => {
            tracing::debug!(message, "Port-forward failed");
            let _ = error.writer.write(message.as_bytes()).await;
            writer.reset().await;
        }
    }
    // Clients read this stream to its end before they are done with the connection.
    error.writer.finish().await;
}

/// Copies both ways until both have ended; each end is passed on when it comes.
///
/// # Errors
/// When the pod reset the connection, or the client its stream.
async fn copy(
    reader: &mut StreamReader,
    writer: &mut StreamWriter,
    socket: TcpStream,
) -> io::Result<()> {
    let (from_pod, to_pod) = socket.into_split();
    let up = client_to_pod(reader, to_pod);
    let down = pod_to_client(from_pod, writer);
    tokio::try_join!(up, down).map(drop)
}

async fn client_to_pod(reader: &mut StreamReader, mut pod: OwnedWriteHalf) -> io::Result<()> {
    loop {
        match reader.next().await {
            Received::Data(bytes) => {
                if pod.write_all(&bytes).await.is_err() {
                    // The pod reads no more, but it may still write. What else the client sends
                    // is taken and dropped, so that it holds up nothing.
                    while matches!(reader.next().await, Received::Data(_)) {}
                    return Ok(());
                }
            }
            Received::End => {
                let _ = pod.shutdown().await;
                return Ok(());
            }
            Received::Reset => return Err(io::ErrorKind::ConnectionReset.into()),
        }
    }
}

async fn pod_to_client(mut pod: OwnedReadHalf, writer: &mut StreamWriter) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let read = tokio::select! {
            read = pod.read(&mut buffer) => read?,
            () = writer.closed() => return Err(io::ErrorKind::ConnectionReset.into()),
        };
        if read == 0 {
            writer.finish().await;
            return Ok(());
        }
        writer.write(&buffer[..read]).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(pairs: &[(&str, &str)]) -> Result<(String, Role, u16), String> {
        request(5, &Headers::new(pairs))
    }

    #[test]
    fn streams_without_a_good_port_or_type_are_named_as_the_stock_kubelet_does() {
        let wrong = |pairs: &[(&str, &str)]| asked(pairs).unwrap_err();
        assert_eq!(wrong(&[]), "\"port\" header is required");
        assert_eq!(
            wrong(&[("port", "abc")]),
            "unable to parse \"abc\" as a port: strconv.ParseUint: parsing \"abc\": invalid syntax"
        );
        assert_eq!(
            wrong(&[("port", "-1")]),
            "unable to parse \"-1\" as a port: strconv.ParseUint: parsing \"-1\": invalid syntax"
        );
        assert!(wrong(&[("port", "65536")]).ends_with("value out of range"));
        assert_eq!(wrong(&[("port", "0")]), "port \"0\" must be > 0");
        assert_eq!(
            wrong(&[("port", "80")]),
            "\"streamType\" header is required"
        );
        assert_eq!(
            wrong(&[("port", "80"), ("streamtype", "foo")]),
            "invalid stream type \"foo\""
        );
    }

    #[test]
    fn streams_pair_by_request_id_or_by_number() {
        let data = [("port", "80"), ("streamType", "data")];
        assert_eq!(asked(&data), Ok(("3".to_owned(), Role::Data, 80)));
        let error = [("port", "80"), ("streamType", "error")];
        assert_eq!(asked(&error), Ok(("5".to_owned(), Role::Error, 80)));
        let named = [("port", "1"), ("streamtype", "data"), ("requestid", "9")];
        assert_eq!(asked(&named), Ok(("9".to_owned(), Role::Data, 1)));
    }
}
