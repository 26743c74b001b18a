//! The kubelet's HTTPS API (port 10250) and its plain `/healthz` (port 10248).
//!
//! Reads snapshots ([`PodIndex`]) and calls [`RuntimeService`]; writes nothing. One task accepts,
//! one task per connection serves; both end with the token. Every request but those on the
//! health port and the read-only port (off by default) is authenticated and authorized ([`auth`]).
//!
//! Bounds: connections ([`MAX_CONNECTIONS`], and of clients not known yet [`strangers`]), handshake and header time, request line and header
//! size (hyper's own), no request body is read.

pub mod auth;
mod debug;
mod health;
pub mod logs;
mod node_logs;
mod observe;
mod routes;
pub mod spdy;
mod strangers;
pub mod stream;
pub mod tls;
mod zpages;

use crate::config::Config;
use crate::node::machine::Machine;
use crate::pod::index::PodIndex;
use crate::stats::Stats;
use auth::{Auth, User};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use runtime::service::{ImageService, RuntimeService};
use rustls_pki_types::CertificateDer;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use strangers::{Stranger, Strangers};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Connections at once. The apiserver multiplexes; the rest are scrapers and people.
const MAX_CONNECTIONS: usize = 1024;
/// Time for a TLS handshake, and for a request's headers.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const HEADER_TIMEOUT: Duration = Duration::from_secs(32);
/// Headers of one request; their bytes are bounded by the read buffer.
const MAX_HEADERS: usize = 1000;

/// What the server needs.
pub struct Server<R> {
    /// Addresses, certificates, who may.
    pub config: Arc<Config>,
    /// The engine.
    pub runtime: Arc<R>,
    /// The node's pods.
    pub index: PodIndex,
    /// Asks the apiserver about tokens and access.
    pub auth: Auth,
    /// Owns connections and sessions.
    pub tracker: TaskTracker,
    /// Ends sessions that outlive their request (exec, port-forward).
    pub stop: CancellationToken,
    /// What node and pods take.
    pub stats: Arc<Stats<R>>,
    /// What the machine is.
    pub machine: Arc<Machine>,
    /// What is wrong with the pod loop, if anything is.
    pub problem: Problem,
    /// Life left of the node's certificate in seconds, while there is one.
    pub certificate_ttl_s: Arc<dyn Fn() -> Option<i64> + Send + Sync>,
    /// Whether the node has cgroup v2.
    pub cgroup_v2: bool,
    /// When the agent began.
    pub started: jiff::Timestamp,
}

/// Tells what is wrong with a part of the agent, if anything is.
pub type Problem = Arc<dyn Fn() -> Option<String> + Send + Sync>;

impl<R> std::fmt::Debug for Server<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("auth", &self.auth)
            .finish_non_exhaustive()
    }
}

/// Serves the HTTPS API until `shutdown`. The listener is bound before the first await, so that a
/// busy port is known at once.
///
/// # Errors
/// When the address cannot be bound or no serving certificate can be made.
pub async fn serve<R: RuntimeService + ImageService>(
    server: Server<R>,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let address = server.config.server.address;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = Arc::new(tls::serving(&server.config, provider)?);
    let listener = bind(address).await?;
    tracing::info!(%address, "Serving the HTTPS API");
    let server = Arc::new(server);
    let read_only = serve_read_only(Arc::clone(&server), shutdown.clone());
    tokio::try_join!(accept_all(listener, server, tls, shutdown), read_only).map(drop)
}

/// Serves the read-only port, when there is one, until `shutdown`.
async fn serve_read_only<R: RuntimeService + ImageService>(
    server: Arc<Server<R>>,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let address = server.config.server.read_only;
    if address.port() == 0 {
        return Ok(());
    }
    let tracker = server.tracker.clone();
    let answer = move |request| {
        let server = Arc::clone(&server);
        async move { server.handle_read_only(request).await }
    };
    serve_plain(address, answer, tracker, shutdown).await
}

/// Accepts connections of the HTTPS API until `shutdown`.
async fn accept_all<R: RuntimeService + ImageService>(
    listener: TcpListener,
    server: Arc<Server<R>>,
    tls: Arc<tls::ReloadingServer>,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let tracker = server.tracker.clone();
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let strangers = Arc::new(Strangers::default());
    loop {
        // Both arms are cancel-safe: an accepted connection is handed on before the next await.
        let (stream, permit) = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            accepted = accept(&listener, &slots) => accepted?,
        };
        let (server, tls, stop) = (Arc::clone(&server), Arc::clone(&tls), shutdown.clone());
        let stranger = strangers.enter();
        tracker.spawn(async move {
            let _permit = permit;
            tokio::select! {
                () = stop.cancelled() => {}
                () = stranger.displaced.cancelled() => {}
                () = connection(stream, server, &tls, &stranger) => {}
            }
        });
    }
}

async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|e| io::Error::new(e.kind(), format!("listen on {address}: {e}")))
}

/// The next connection, once there is room for it. Errors of single connections (it was reset,
/// descriptors ran out) are waited out, they do not end the server.
async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let permit = Arc::clone(slots)
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return Ok((stream, permit)),
            Err(error) => {
                tracing::warn!(%error, "Could not accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection<R: RuntimeService + ImageService>(
    stream: TcpStream,
    server: Arc<Server<R>>,
    tls: &tls::ReloadingServer,
    stranger: &Arc<Stranger>,
) {
    let Some(serving) = tls.get() else { return };
    let _ = stream.set_nodelay(true);
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::clone(&serving.config));
    let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await;
    let Ok(Ok(stream)) = handshake else { return };
    let shown = stream.get_ref().1.peer_certificates();
    let peer = Arc::new(serving.believed(shown).and_then(holder));
    if peer.is_some() {
        stranger.known();
    }
    let service = service_fn(move |mut request: hyper::Request<_>| {
        let (server, peer) = (Arc::clone(&server), Arc::clone(&peer));
        request.extensions_mut().insert(Arc::downgrade(stranger));
        async move {
            Ok::<_, std::convert::Infallible>(server.handle(request, peer.as_ref().as_ref()).await)
        }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .max_headers(MAX_HEADERS)
        .header_read_timeout(HEADER_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Some(Duration::from_secs(30)));
    let served = builder
        .serve_connection_with_upgrades(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "A connection ended early");
    }
}

/// The user of a certificate that TLS has verified.
fn holder(certificate: &CertificateDer<'_>) -> Option<User> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let (name, groups) = crate::api::tls::subject(&parsed);
    (!name.is_empty()).then(|| User::from_certificate(name, groups))
}

/// Serves `/healthz` in plain HTTP until `shutdown`: `ok`, or 500 with what `problem` says.
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve_health(
    address: SocketAddr,
    problem: Problem,
    tracker: TaskTracker,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let answer = move |request: hyper::Request<hyper::body::Incoming>| {
        let answer = health::answer(request.uri(), problem().as_deref());
        let missing = || routes::text(hyper::StatusCode::NOT_FOUND, "404 page not found\n");
        std::future::ready(answer.unwrap_or_else(missing))
    };
    serve_plain(address, answer, tracker, shutdown).await
}

/// Serves plain HTTP until `shutdown`.
async fn serve_plain<A, F>(
    address: SocketAddr,
    answer: A,
    tracker: TaskTracker,
    shutdown: CancellationToken,
) -> io::Result<()>
where
    A: Fn(hyper::Request<hyper::body::Incoming>) -> F + Send + Sync + 'static,
    F: Future<Output = hyper::Response<routes::Body>> + Send + 'static,
{
    let listener = bind(address).await?;
    let slots = Arc::new(Semaphore::new(64));
    let answer = Arc::new(answer);
    loop {
        let (stream, permit) = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            accepted = accept(&listener, &slots) => accepted?,
        };
        let (answer, stop) = (Arc::clone(&answer), shutdown.clone());
        let service = service_fn(move |request| {
            let answer = answer(request);
            async move { Ok::<_, std::convert::Infallible>(answer.await) }
        });
        tracker.spawn(async move {
            let _permit = permit;
            let mut builder = hyper::server::conn::http1::Builder::new();
            builder
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT);
            tokio::select! {
                () = stop.cancelled() => {}
                _ = builder.serve_connection(TokioIo::new(stream), service) => {}
            }
        });
    }
}

#[cfg(test)]
mod tests;
