//! Port-forward over the channels of a WebSocket: two per port of the query, data at `2i` and
//! error at `2i + 1`; the first message of each is the port, in two bytes, low one first.

use super::channel::Protocol;
use super::forward::{Target, port};
use super::websocket::{Messages, Output, message, normal_close, payload};
use futures::SinkExt;
use runtime::service::RuntimeService;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Mutex, mpsc};

/// Ports of one request; a channel number is a byte.
const MAX_PORTS: usize = 64;
/// Messages that wait for a slow pod.
const QUEUE: usize = 16;
const CHUNK: usize = 32 * 1024;
/// How long a client may take to answer our goodbye.
const CLOSE_ANSWER: Duration = Duration::from_secs(5);

/// The ports of a query.
///
/// # Errors
/// The words of the stock kubelet.
pub(super) fn ports(query: &[(String, String)]) -> Result<Vec<u16>, String> {
    let values: Vec<_> = query.iter().filter(|(name, _)| name == "port").collect();
    if values.is_empty() {
        return Err("query parameter \"port\" is required".to_owned());
    }
    let mut ports = Vec::new();
    for (_, value) in values {
        if value.is_empty() {
            return Err("query parameter \"port\" cannot be empty".to_owned());
        }
        for text in value.split(',') {
            ports.push(port(text)?);
        }
    }
    if ports.len() > MAX_PORTS {
        return Err(format!("more than {MAX_PORTS} ports in one request"));
    }
    Ok(ports)
}

/// Serves a connection: one connection into the pod per port, until all have ended or the
/// client is gone.
pub(super) async fn run<R: RuntimeService>(
    mut input: Messages,
    output: Output,
    protocol: Protocol,
    ports: Vec<u16>,
    target: Target<R>,
    idle: Duration,
) {
    // The ports take turns at the connection.
    let output = Mutex::new(output);
    let (mut feeds, mut pairs) = (Vec::new(), Vec::new());
    for (i, &port) in ports.iter().enumerate() {
        let data = u8::try_from(2 * i).unwrap_or(u8::MAX);
        let (feed, fed) = mpsc::channel(QUEUE);
        feeds.push(feed);
        let pair = Pair {
            data,
            port,
            protocol,
            output: &output,
        };
        if pair.announce().await.is_err() {
            return;
        }
        pairs.push(pair.run(&target, fed));
    }
    let listening = async {
        while let Ok(Some(bytes)) = tokio::time::timeout(idle, payload(&mut input)).await {
            let Some((channel, bytes)) = protocol.split(&bytes) else {
                continue;
            };
            let feed = feeds.get(usize::from(channel / 2));
            // Error channels are ours to write; a connection that has ended takes nothing more.
            if let Some(feed) = feed.filter(|_| channel % 2 == 0 && !bytes.is_empty()) {
                let _ = feed.send(bytes.into_owned()).await;
            }
        }
    };
    // The client is gone, or all connections have ended: nothing of the other is wanted then.
    tokio::select! {
        () = listening => return,
        _ = futures::future::join_all(pairs) => {}
    }
    let _ = output.into_inner().send(normal_close()).await;
    let rest = async { while payload(&mut input).await.is_some() {} };
    let _ = tokio::time::timeout(CLOSE_ANSWER, rest).await;
}

/// One port's two channels.
struct Pair<'a> {
    data: u8,
    port: u16,
    protocol: Protocol,
    output: &'a Mutex<Output>,
}

impl Pair<'_> {
    async fn send(&self, channel: u8, bytes: &[u8]) -> io::Result<()> {
        let message = message(self.protocol, channel, bytes);
        let mut output = self.output.lock().await;
        output.send(message).await.map_err(io::Error::other)
    }

    async fn announce(&self) -> io::Result<()> {
        let port = self.port.to_le_bytes();
        self.send(self.data, &port).await?;
        self.send(self.data + 1, &port).await
    }

    async fn run<R: RuntimeService>(self, target: &Target<R>, mut fed: mpsc::Receiver<Vec<u8>>) {
        let socket = match target.connect(self.port).await {
            Ok(socket) => socket,
            Err(message) => {
                let _ = self.send(self.data + 1, message.as_bytes()).await;
                return;
            }
        };
        let (mut from_pod, mut to_pod) = socket.into_split();
        let up = async {
            while let Some(bytes) = fed.recv().await {
                if to_pod.write_all(&bytes).await.is_err() {
                    break;
                }
            }
            // These channels have no half-close: the pod's side alone says when it is over.
            std::future::pending::<()>().await;
        };
        let down = async {
            let mut buffer = vec![0; CHUNK];
            while let Ok(count @ 1..) = from_pod.read(&mut buffer).await {
                if self.send(self.data, &buffer[..count]).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = up => {}
            () = down => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(values: &[&str]) -> Result<Vec<u16>, String> {
        let pair = |v: &&str| ("port".to_owned(), (*v).to_owned());
        ports(&values.iter().map(pair).collect::<Vec<_>>())
    }

    #[test]
    fn ports_come_by_repetition_and_by_commas() {
        assert_eq!(read(&["80,90", "100"]), Ok(vec![80, 90, 100]));
        assert_eq!(
            read(&[]).unwrap_err(),
            "query parameter \"port\" is required"
        );
        assert_eq!(
            read(&[""]).unwrap_err(),
            "query parameter \"port\" cannot be empty"
        );
        assert!(read(&["80,x"]).is_err());
        assert!(read(&vec!["1"; 65]).is_err());
    }
}
