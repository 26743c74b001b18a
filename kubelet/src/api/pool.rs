//! A connection pool that starts anew when the node certificate changes.
//!
//! A connection keeps the identity it was opened with: one opened before the certificate was
//! there would stay anonymous for as long as it is used, and so would every TLS session resumed
//! from it. Requests in flight and open watches end on the old pool; new ones go to a new pool
//! with no remembered sessions. Requests are counted here, where all of them pass.

use super::reload::Reloading;
use super::tls::Identity;
use crate::metrics::metrics;
use futures::future::BoxFuture;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::Body;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// Idle connections are closed after this long: the apiserver closes them itself after 90 s.
const IDLE: Duration = Duration::from_secs(60);
/// Idle connections kept, enough for a burst of status patches.
const MOST_IDLE: usize = 32;

/// Makes a connector with a TLS configuration of its own.
type Connect = dyn Fn() -> HttpsConnector<HttpConnector> + Send + Sync;
type Pool = Client<HttpsConnector<HttpConnector>, Body>;

/// The service below a [`kube::Client`].
#[derive(Clone)]
pub(super) struct FreshPool {
    connect: Arc<Connect>,
    identity: Arc<Reloading<Identity>>,
    /// The pool and the version of the certificate it was made for.
    current: Arc<Mutex<(u64, Pool)>>,
}

impl FreshPool {
    /// Nothing is connected yet.
    pub(super) fn new(
        connect: impl Fn() -> HttpsConnector<HttpConnector> + Send + Sync + 'static,
        identity: Arc<Reloading<Identity>>,
    ) -> Self {
        let version = version(&identity);
        let current = Arc::new(Mutex::new((version, pool(connect()))));
        Self {
            connect: Arc::new(connect),
            identity,
            current,
        }
    }

    fn pool(&self) -> Pool {
        let version = version(&self.identity);
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.0 != version {
            *current = (version, pool((self.connect)()));
        }
        current.1.clone()
    }
}

/// 0 as long as there is no certificate.
fn version(identity: &Reloading<Identity>) -> u64 {
    identity.versioned().map_or(0, |(version, _)| version)
}

fn pool(connector: HttpsConnector<HttpConnector>) -> Pool {
    Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE)
        .pool_max_idle_per_host(MOST_IDLE)
        .build(connector)
}

impl tower::Service<http::Request<Body>> for FreshPool {
    type Response = http::Response<hyper::body::Incoming>;
    type Error = hyper_util::client::legacy::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let method = request.method().clone();
        let host = request.uri().authority().map(ToString::to_string);
        let answer = self.pool().request(request);
        Box::pin(async move {
            let began = Instant::now();
            let answer = answer.await;
            let code = answer.as_ref().map(|r| r.status().as_u16().to_string());
            let code = code.as_deref().unwrap_or("<error>");
            let (host, method) = (host.unwrap_or_default(), method.as_str());
            let all = metrics();
            all.client_requests.with([code, &host, method]).inc();
            all.client_durations
                .with([&host, method])
                .observe_time(began.elapsed());
            answer
        })
    }
}
