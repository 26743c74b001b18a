//! Connections into a sandbox's network, for port-forward.
//!
//! A socket belongs to the namespace it was made in, not to that of the thread which connects
//! it: a short-lived thread makes it inside, and everything else happens here, without a process
//! and without keeping a thread busy.

use crate::engine::{Sandbox, blocking};
use crate::error::{error, system};
use crate::sandbox::state::Phase;
use crate::service::{Result, RuntimeErrorKind};
use linux::netlink::in_netns;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::net::{TcpSocket, TcpStream};

/// Connects to a port on the loopback of a sandbox: IPv4, then IPv6.
pub(crate) async fn connect(sandbox: &Arc<Sandbox>, port: u16) -> Result<TcpStream> {
    let (phase, netns) = sandbox.with(|r| (r.phase, r.netns.clone()));
    match phase {
        Phase::Ready => {}
        Phase::Creating | Phase::Stopping | Phase::Stopped | Phase::Removing => {
            let message = format!("sandbox {} is not running", sandbox.id);
            return Err(error(RuntimeErrorKind::Conflict, message));
        }
    }
    connect_in(netns, sandbox.id.as_str(), port).await
}

/// The same for a namespace file; none is the namespace of this process.
pub(crate) async fn connect_in(netns: Option<PathBuf>, name: &str, port: u16) -> Result<TcpStream> {
    let (v4, v6) = match netns {
        Some(path) => {
            blocking(move || {
                let file = File::open(path).map_err(|e| system(&e))?;
                in_netns(file.as_fd(), sockets).map_err(|e| system(&e))
            })
            .await?
        }
        None => sockets(),
    };
    let first = dial(v4, Ipv4Addr::LOCALHOST.into(), port).await;
    let first = match first {
        Ok(stream) => return Ok(stream),
        Err(e) => e,
    };
    let second = match dial(v6, Ipv6Addr::LOCALHOST.into(), port).await {
        Ok(stream) => return Ok(stream),
        Err(e) => e,
    };
    let message = format!(
        "failed to connect to localhost:{port} inside namespace {name:?}, IPv4: {first} IPv6: {second}"
    );
    Err(error(RuntimeErrorKind::Network, message))
}

fn sockets() -> (io::Result<TcpSocket>, io::Result<TcpSocket>) {
    // Made by std's rules but registered with the runtime only when connected: this may run in a
    // thread that knows no runtime.
    (TcpSocket::new_v4(), TcpSocket::new_v6())
}

async fn dial(
    socket: io::Result<TcpSocket>,
    address: IpAddr,
    port: u16,
) -> std::result::Result<TcpStream, String> {
    let address = SocketAddr::new(address, port);
    let family = if address.is_ipv4() { "tcp4" } else { "tcp6" };
    let named = |e: &io::Error| {
        let why = match e.kind() {
            // The words people look for.
            io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
            io::ErrorKind::TimedOut => "connection timed out".to_owned(),
            _ => e.to_string(),
        };
        format!("dial {family} {address}: connect: {why}")
    };
    let socket = socket.map_err(|e| named(&e))?;
    let stream = socket.connect(address).await.map_err(|e| named(&e))?;
    // Bytes are passed on as they come; waiting to fill segments only delays them.
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use linux::netlink::new_netns;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn a_connection_reaches_a_port_on_ipv6_only_and_a_closed_one_is_named() {
        let Ok(listener) = TcpListener::bind("[::1]:0").await else {
            println!("skipped: this machine has no IPv6 loopback");
            return;
        };
        let port = listener.local_addr().unwrap().port();
        let serving = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"hello").await.unwrap();
        });
        let mut stream = connect_in(None, "node", port).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hello");
        serving.await.unwrap();
        let refused = connect_in(None, "node", port).await.unwrap_err();
        assert_eq!(refused.kind, RuntimeErrorKind::Network);
        let wanted = format!("dial tcp4 127.0.0.1:{port}: connect: connection refused");
        assert!(refused.message.contains(&wanted), "{}", refused.message);
    }

    /// Needs root.
    #[tokio::test]
    async fn a_connection_is_made_inside_the_given_namespace() {
        let netns = new_netns().unwrap();
        let listener = in_netns(netns.as_fd(), || {
            linux::process::namespace::loopback_up().unwrap();
            std::net::TcpListener::bind("127.0.0.1:7").unwrap()
        });
        let listener = listener.unwrap();
        let serving = std::thread::spawn(move || {
            use std::io::Write;
            listener.accept().unwrap().0.write_all(b"inside").unwrap();
        });
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&netns));
        let mut stream = connect_in(Some(path.into()), "pod", 7).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "inside");
        serving.join().unwrap();
    }
}
