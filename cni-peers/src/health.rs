//! `/healthz` (the process turns), `/readyz` (pods of this node reach everything they should, or
//! why not) and `/metrics` (text for Prometheus).

use std::convert::Infallible;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tracing::debug;

use crate::kernel::Report;

/// Probes and one scraper; more at once wait.
const MAX_CONNECTIONS: usize = 16;
/// A caller that says nothing is let go.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Everything that `/readyz` and `/metrics` tell.
#[derive(Debug, Clone, Default)]
pub(crate) struct Health {
    pub(crate) report: Report,
    /// The full list of nodes was seen.
    pub(crate) listed: bool,
    pub(crate) nodes: usize,
    /// Why this node's annotations are not as they should be.
    pub(crate) unpublished: Option<String>,
    /// Why the network list is not in place.
    pub(crate) unlisted: Option<String>,
}

impl Health {
    /// Why this node is not ready; none when it is. That the apiserver is away is no reason: the
    /// kernel is kept as the nodes were.
    pub(crate) fn trouble(&self) -> Option<String> {
        let unlisted = (!self.listed).then(|| "the nodes have not been listed yet".to_owned());
        let report = self.report.trouble.clone();
        let all = [
            unlisted,
            report,
            self.unpublished.clone(),
            self.unlisted.clone(),
        ];
        let mut all: Vec<String> = all.into_iter().flatten().collect();
        all.dedup();
        (!all.is_empty()).then(|| all.join("; "))
    }

    fn metrics(&self) -> String {
        let report = &self.report;
        let mut text = String::new();
        let mut put = |name: &str, kind: &str, help: &str, value: f64| {
            // Writing to a String cannot fail.
            let _ = write!(
                text,
                "# HELP ferrule_peers_{name} {help}\n# TYPE ferrule_peers_{name} {kind}\nferrule_peers_{name} {value}\n"
            );
        };
        let count = |number: usize| number as f64;
        let flag = |yes: bool| if yes { 1.0 } else { 0.0 };
        put(
            "ready",
            "gauge",
            "Whether /readyz says so.",
            flag(self.trouble().is_none()),
        );
        put("nodes", "gauge", "Nodes of the cluster.", count(self.nodes));
        put(
            "reached",
            "gauge",
            "Peer networks that routes lead to.",
            count(report.reached),
        );
        put(
            "skipped",
            "gauge",
            "Peers left out, wholly or in one family; the log says which and why.",
            count(report.skipped.len()),
        );
        put(
            "pod_mtu_bytes",
            "gauge",
            "MTU of new pods.",
            f64::from(report.mtu_bytes.unwrap_or(0)),
        );
        put(
            "changes_total",
            "counter",
            "Changes made to the kernel.",
            report.changes as f64,
        );
        put(
            "repairs_total",
            "counter",
            "Changes that mended what others altered.",
            report.repairs as f64,
        );
        put(
            "failures_total",
            "counter",
            "Changes the kernel refused.",
            report.failures as f64,
        );
        put(
            "looks_total",
            "counter",
            "Looks at the kernel.",
            report.looks as f64,
        );
        put(
            "overruns_total",
            "counter",
            "Times that kernel events were lost and everything was looked at.",
            report.overruns as f64,
        );
        put(
            "look_seconds",
            "gauge",
            "Duration of the last look.",
            report.seconds,
        );
        text
    }

    fn answer(&self, path: &str) -> (StatusCode, String) {
        match path {
            "/healthz" => (StatusCode::OK, "ok\n".into()),
            "/readyz" => match self.trouble() {
                None => (StatusCode::OK, "ok\n".into()),
                Some(why) => (
                    StatusCode::SERVICE_UNAVAILABLE,
                    format!("not ready: {why}\n"),
                ),
            },
            "/metrics" => (StatusCode::OK, self.metrics()),
            _ => (
                StatusCode::NOT_FOUND,
                "there are /healthz, /readyz and /metrics\n".into(),
            ),
        }
    }
}

/// Opens the port.
///
/// # Errors
/// When it cannot be had.
pub(crate) async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    use anyhow::Context as _;
    let problem = || format!("serve /healthz on {address} (--listen)");
    TcpListener::bind(address).await.with_context(problem)
}

/// Serves for ever.
pub(crate) async fn serve(listener: TcpListener, health: watch::Receiver<Health>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                debug!("A caller was lost: {error}");
                continue;
            }
        };
        let health = health.clone();
        connections.spawn(async move {
            let service = service_fn(|request: Request<_>| answer(request, &health));
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                debug!("A caller was lost: {error}");
            }
            drop(place);
        });
    }
}

async fn answer(
    request: Request<hyper::body::Incoming>,
    health: &watch::Receiver<Health>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, text) = health.borrow().answer(request.uri().path());
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_means_that_everything_is_in_place_and_says_what_is_not() {
        let mut health = Health {
            listed: true,
            ..Health::default()
        };
        assert_eq!(health.answer("/readyz").0, StatusCode::OK);
        health.report.trouble = Some("interface eth0 is down".into());
        let (status, text) = health.answer("/readyz");
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(text, "not ready: interface eth0 is down\n");
        assert_eq!(health.answer("/healthz").0, StatusCode::OK);
        assert!(
            health
                .answer("/metrics")
                .1
                .contains("\nferrule_peers_ready 0\n")
        );
    }
}
