//! The table of paths, and what each answers.

use super::Server;
use super::auth::{Denied, User, attributes};
use crate::pod::index::{ContainerRefs, PodEntry};
use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper::{Request, Response, StatusCode};
use runtime::service::{ImageService, RuntimeService};
use std::convert::Infallible;
use std::sync::Arc;

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

/// The answer of the health port.
pub(super) fn health(path: &str, problem: Option<&str>) -> Response<Full<Bytes>> {
    let (status, body) = match (path, problem) {
        ("/healthz/ping", _) | ("/healthz" | "/healthz/syncloop" | "/livez" | "/readyz", None) => {
            (StatusCode::OK, "ok".to_owned())
        }
        ("/healthz" | "/healthz/syncloop" | "/livez" | "/readyz", Some(problem)) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("{problem}\nhealthz check failed\n"),
        ),
        _ => (StatusCode::NOT_FOUND, "404 page not found\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
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

/// One container of one pod, as a path names it.
pub(super) struct Place {
    pub(super) entry: Arc<PodEntry>,
    pub(super) refs: ContainerRefs,
    pub(super) container: String,
}

impl<R: RuntimeService + ImageService> Server<R> {
    /// Answers one request.
    pub(super) async fn handle(
        self: Arc<Self>,
        request: Request<Incoming>,
        peer: Option<&User>,
    ) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let bearer = request
            .headers()
            .get(AUTHORIZATION)
            .and_then(|v| v.to_str().ok());
        let bearer = bearer
            .and_then(|v| v.strip_prefix("Bearer "))
            .map(str::trim);
        let checked = async {
            let user = self.auth.authenticate(peer, bearer).await?;
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

    async fn route(&self, request: Request<Incoming>, path: &str) -> Response<Body> {
        let parts: Vec<String> = path
            .trim_matches('/')
            .split('/')
            .map(|p| decode(p, false))
            .collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let debugging = self.config.server.debugging_handlers;
        match parts.as_slice() {
            ["healthz"] | ["healthz", "ping" | "syncloop" | "log"] => text(StatusCode::OK, "ok"),
            ["pods"] => self.pods(),
            ["configz"] => json(&serde_json::json!({ "kubeletconfig": self.config.effective })),
            ["containerLogs", namespace, pod, container] if debugging => {
                match self.find(namespace, pod, container) {
                    Ok(place) => self.container_logs(&request, &place),
                    Err(response) => *response,
                }
            }
            ["exec" | "attach" | "portForward" | "run", ..] if debugging => {
                self.streams(request, &parts).await
            }
            [
                "exec" | "attach" | "portForward" | "run" | "containerLogs",
                ..,
            ] => text(
                StatusCode::METHOD_NOT_ALLOWED,
                "Debug endpoints are disabled.\n",
            ),
            _ => text(StatusCode::NOT_FOUND, "404 page not found\n"),
        }
    }

    fn pods(&self) -> Response<Body> {
        let items: Vec<_> = self
            .index
            .list()
            .iter()
            .map(|e| e.pod_with_status())
            .collect();
        json(&serde_json::json!({
            "kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items,
        }))
    }

    fn find(
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
        Ok(Place {
            entry,
            refs,
            container: container.to_owned(),
        })
    }
}

/// Whether a pod has a container of that name, of any kind.
fn declares(entry: &PodEntry, name: &str) -> bool {
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
    fn queries_are_decoded_as_the_apiserver_writes_them() {
        let uri: hyper::Uri = "/exec/n/p/c?command=sh&command=-c&command=echo+a%26b%25&input=1"
            .parse()
            .unwrap();
        let values: Vec<_> = query(&uri).into_iter().map(|(_, v)| v).collect();
        assert_eq!(values, ["sh", "-c", "echo a&b%", "1"]);
        assert_eq!(decode("a%zz+%4", false), "a%zz+%4");
    }
}
