//! The table of paths, and what each answers.

use super::Server;
use super::auth::{Denied, User, attributes};
use super::logs::serve::SyncBody;
use super::observe::{bucket, debugging_disabled};
use super::strangers::Stranger;
use crate::metrics::{Gauge, Histogram, metrics};
use crate::pod::index::{ContainerRefs, PodEntry};
use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use runtime::service::{ImageService, RuntimeService};
use std::convert::Infallible;
use std::sync::{Arc, Weak};

/// Body of every answer.
pub(super) type Body = BoxBody<Bytes, Infallible>;

pub(super) fn text(status: StatusCode, message: impl Into<String>) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(message.into())).boxed());
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, plain);
    response
}

pub(super) fn json(value: &impl serde::Serialize) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(bytes) => {
            let mut response = Response::new(Full::new(Bytes::from(bytes)).boxed());
            let json = HeaderValue::from_static("application/json");
            response.headers_mut().insert(CONTENT_TYPE, json);
            response
        }
        Err(e) => text(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("encode the answer: {e}"),
        ),
    }
}

/// A body that comes piece by piece.
pub(super) fn stream_body(
    stream: impl futures::Stream<Item = Result<hyper::body::Frame<Bytes>, Infallible>> + Send + 'static,
) -> Body {
    BodyExt::boxed(SyncBody::new(http_body_util::StreamBody::new(stream)))
}

/// Splits and decodes a query string.
pub(super) fn query(uri: &hyper::Uri) -> Vec<(String, String)> {
    let pairs = uri
        .query()
        .unwrap_or_default()
        .split('&')
        .filter(|p| !p.is_empty());
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(name, true), decode(value, true))
        })
        .collect()
}

/// Percent-decodes (RFC 3986); in queries a plus is a space. Bad escapes stay as they are.
fn decode(text: &str, plus: bool) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = |at: usize| bytes.get(at).and_then(|b| (*b as char).to_digit(16));
        match bytes[i] {
            b'%' => match (hex(i + 1), hex(i + 2)) {
                (Some(high), Some(low)) => {
                    out.push((high * 16 + low) as u8);
                    i += 2;
                }
                _ => out.push(b'%'),
            },
            b'+' if plus => out.push(b' '),
            other => out.push(other),
        }
        i += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The decoded parts of a path.
fn parts(path: &str) -> Vec<String> {
    let parts = path.trim_matches('/').split('/');
    parts.map(|p| decode(p, false)).collect()
}

/// A request under way.
struct InFlight {
    gauge: Arc<Gauge>,
    durations: Arc<Histogram>,
    began: std::time::Instant,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.gauge.add(-1);
        self.durations.observe_time(self.began.elapsed());
    }
}

/// The method as it is counted: what clients make up is all one.
fn counted_method(method: &hyper::Method) -> &'static str {
    const KNOWN: [&str; 8] = [
        "OPTIONS", "GET", "HEAD", "POST", "PUT", "DELETE", "TRACE", "CONNECT",
    ];
    let known = KNOWN.into_iter().find(|k| *k == method.as_str());
    known.unwrap_or("other")
}

/// The token of an `Authorization` header (RFC 6750); the scheme is in any case.
fn bearer_token(header: &str) -> Option<&str> {
    let (scheme, token) = header.trim().split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

/// One container of one pod.
pub(super) struct Place {
    pub(super) entry: Arc<PodEntry>,
    pub(super) refs: ContainerRefs,
}

impl<R: RuntimeService + ImageService> Server<R> {
    /// Answers one request and counts it.
    pub(super) async fn handle(
        self: Arc<Self>,
        request: Request<Incoming>,
        peer: Option<&User>,
    ) -> Response<Body> {
        let method = counted_method(request.method());
        let path = bucket(request.uri().path());
        let long = matches!(path, "exec" | "attach" | "portForward" | "debug");
        let long = if long { "true" } else { "false" };
        let labels = [method, path, "readwrite", long];
        let all = metrics();
        all.http_requests.with(labels).inc();
        // Dropped with a client that leaves, too.
        let counted = InFlight {
            gauge: all.http_inflight.with(labels),
            durations: all.http_durations.with(labels),
            began: std::time::Instant::now(),
        };
        counted.gauge.add(1);
        self.answer(request, peer).await
    }

    async fn answer(&self, request: Request<Incoming>, peer: Option<&User>) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let bearer = request
            .headers()
            .get(AUTHORIZATION)
            .and_then(|v| v.to_str().ok())
            .and_then(bearer_token);
        let checked = async {
            let user = self.auth.authenticate(peer, bearer).await?;
            let stranger = request.extensions().get::<Weak<Stranger>>();
            if let Some(stranger) = stranger.and_then(Weak::upgrade)
                && !user.is_anonymous()
            {
                stranger.known();
            }
            self.auth
                .authorize(&user, &attributes(request.method(), &path))
                .await
        };
        match checked.await {
            Ok(()) => {}
            Err(Denied::Unauthenticated) => {
                return text(StatusCode::UNAUTHORIZED, "Unauthorized");
            }
            Err(Denied::Forbidden(message)) => return text(StatusCode::FORBIDDEN, message),
            Err(Denied::Unavailable(message)) => {
                return text(StatusCode::INTERNAL_SERVER_ERROR, message);
            }
        }
        self.route(request, &path).await
    }

    /// Answers on the port where nobody is asked who they are: only what harms nobody.
    pub(super) async fn handle_read_only(&self, request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let method = counted_method(request.method());
        let labels = [method, bucket(&path), "readonly", "false"];
        metrics().http_requests.with(labels).inc();
        let parts = parts(&path);
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        if let Some(answer) = self.observe(&request, &parts).await {
            return answer;
        }
        match bucket(&path) {
            "run" | "exec" | "attach" | "portForward" | "containerLogs" | "runningpods"
            | "logs" => debugging_disabled(),
            _ => text(StatusCode::NOT_FOUND, "404 page not found\n"),
        }
    }

    async fn route(&self, request: Request<Incoming>, path: &str) -> Response<Body> {
        let parts = parts(path);
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        if let Some(answer) = self.observe(&request, &parts).await {
            return answer;
        }
        if let Some(answer) = self.inspect(&request, path, &parts).await {
            return answer;
        }
        let debugging = self.config.server.debugging_handlers;
        match parts.as_slice() {
            ["containerLogs", namespace, pod, container] if debugging => {
                self.container_logs(&request, namespace, pod, container)
            }
            ["checkpoint", namespace, pod, container]
                if debugging && *request.method() == Method::POST =>
            {
                self.checkpoint(&request, namespace, pod, container)
            }
            ["exec" | "attach" | "portForward" | "run", ..] if debugging => {
                self.streams(request, &parts).await
            }
            [
                "exec" | "attach" | "portForward" | "run" | "containerLogs",
                ..,
            ] if !debugging => text(
                StatusCode::METHOD_NOT_ALLOWED,
                "Debug endpoints are disabled.\n",
            ),
            _ => text(StatusCode::NOT_FOUND, "404 page not found\n"),
        }
    }

    pub(super) fn find(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
    ) -> Result<Place, Box<Response<Body>>> {
        let missing = |message: String| Box::new(text(StatusCode::NOT_FOUND, message));
        let Some(entry) = self.index.get(namespace, pod) else {
            return Err(missing(format!("pod {pod:?} does not exist")));
        };
        if !declares(&entry, container) {
            return Err(missing(format!(
                "container {container:?} not found in pod {pod:?}"
            )));
        }
        let refs = entry.containers.get(container).cloned().unwrap_or_default();
        Ok(Place { entry, refs })
    }
}

/// Whether a pod has a container of that name, of any kind.
pub(super) fn declares(entry: &PodEntry, name: &str) -> bool {
    let Some(spec) = &entry.pod.spec else {
        return false;
    };
    spec.containers.iter().any(|c| c.name == name)
        || spec
            .init_containers
            .iter()
            .flatten()
            .any(|c| c.name == name)
        || spec
            .ephemeral_containers
            .iter()
            .flatten()
            .any(|c| c.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bearer_token_is_found_in_any_spelling_of_its_scheme() {
        assert_eq!(bearer_token("Bearer abc"), Some("abc"));
        assert_eq!(bearer_token("bearer  abc "), Some("abc"));
        assert_eq!(bearer_token("Basic abc"), None);
        assert_eq!(bearer_token("Bearer "), None);
    }

    #[test]
    fn queries_are_decoded_as_the_apiserver_writes_them() {
        let uri: hyper::Uri = "/exec/n/p/c?command=sh&command=-c&command=echo+a%26b%25&input=1"
            .parse()
            .unwrap();
        let values: Vec<_> = query(&uri).into_iter().map(|(_, v)| v).collect();
        assert_eq!(values, ["sh", "-c", "echo a&b%", "1"]);
        assert_eq!(decode("a%zz+%4", false), "a%zz+%4");
    }
}
