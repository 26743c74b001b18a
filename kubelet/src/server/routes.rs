//! The table of paths, and what each answers.

use super::Server;
use super::auth::{Denied, User, attributes};
use super::logs::{LogFile, LogOptions, follow};
use super::stream::{self, StreamOptions, pump};
use crate::pod::index::{ContainerRefs, PodEntry};
use bytes::Bytes;
use futures::StreamExt;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use runtime::service::{
    ContainerId, ContainerState, ContainerStatus, ImageService, RuntimeEventKind, RuntimeService,
};
use std::convert::Infallible;
use std::sync::Arc;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

/// Body of every answer.
pub(super) type Body = BoxBody<Bytes, Infallible>;

/// Chunks of a log that wait for a slow reader.
const LOG_QUEUE: usize = 16;
/// Largest message of a streaming client; kubectl sends at most 32 KiB at a time.
const MAX_MESSAGE: usize = 4 << 20;

fn text(status: StatusCode, message: impl Into<String>) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(message.into())).boxed());
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, plain);
    response
}

fn json(value: &impl serde::Serialize) -> Response<Body> {
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
fn query(uri: &hyper::Uri) -> Vec<(String, String)> {
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
struct Place {
    entry: Arc<PodEntry>,
    refs: ContainerRefs,
    container: String,
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
                match self.find(namespace, pod, None, container) {
                    Ok(place) => self.container_logs(&request, &place),
                    Err(response) => *response,
                }
            }
            ["exec", namespace, pod, container] if debugging => {
                self.exec(request, self.find(namespace, pod, None, container))
                    .await
            }
            ["exec", namespace, pod, uid, container] if debugging => {
                self.exec(request, self.find(namespace, pod, Some(uid), container))
                    .await
            }
            ["attach", namespace, pod, container] if debugging => {
                self.attach(request, self.find(namespace, pod, None, container))
                    .await
            }
            ["attach", namespace, pod, uid, container] if debugging => {
                self.attach(request, self.find(namespace, pod, Some(uid), container))
                    .await
            }
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
        uid: Option<&str>,
        container: &str,
    ) -> Result<Place, Box<Response<Body>>> {
        let missing = |message: String| Box::new(text(StatusCode::NOT_FOUND, message));
        let entry = self
            .index
            .get(namespace, pod)
            .filter(|e| uid.is_none_or(|u| e.uid() == u));
        let Some(entry) = entry else {
            return Err(missing("pod does not exist".to_owned()));
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

    fn container_logs(&self, request: &Request<Incoming>, place: &Place) -> Response<Body> {
        let options = LogOptions::from_query(&query(request.uri()), jiff::Timestamp::now());
        let options = match options {
            Ok(options) => options,
            Err(message) => return text(StatusCode::UNPROCESSABLE_ENTITY, message),
        };
        let id = if options.previous {
            &place.refs.previous
        } else {
            &place.refs.current
        };
        let status = id.as_ref().and_then(|id| self.runtime.container_status(id));
        let Some(status) = status else {
            let pod = place.entry.pod.metadata.name.as_deref().unwrap_or_default();
            let message = if options.previous {
                format!(
                    "previous terminated container {:?} in pod {pod:?} not found",
                    place.container
                )
            } else {
                let why = waiting_reason(&place.entry, &place.container);
                format!(
                    "container {:?} in pod {pod:?} is waiting to start: {why}",
                    place.container
                )
            };
            return text(StatusCode::BAD_REQUEST, message);
        };
        if let Err(e) = std::fs::File::open(&status.log_path) {
            let message = format!(
                "failed to open log file of container {:?}: {e}",
                place.container
            );
            return text(StatusCode::INTERNAL_SERVER_ERROR, message);
        }
        self.stream_log(status, options)
    }

    /// The body is produced by the connection's own task: when the client leaves, it is dropped.
    fn stream_log(&self, status: ContainerStatus, options: LogOptions) -> Response<Body> {
        let (tx, rx) = mpsc::channel(LOG_QUEUE);
        let ended = ended(Arc::clone(&self.runtime), self.runtime.events(), status.id);
        let log = LogFile {
            path: status.log_path,
            options,
        };
        let reading = async move {
            if let Err(error) = follow::send(log, ended, tx).await {
                tracing::warn!(%error, "Reading a container log failed");
            }
        };
        let chunks = ReceiverStream::new(rx).map(|bytes| Ok(Frame::data(bytes)));
        let reading = futures::stream::once(reading).filter_map(|()| async { None });
        let body = StreamBody::new(futures::stream::select(chunks, reading));
        let mut response = Response::new(BodyExt::boxed(SyncBody::new(body)));
        let plain = HeaderValue::from_static("text/plain; charset=utf-8");
        response.headers_mut().insert(CONTENT_TYPE, plain);
        response
    }

    async fn exec(
        &self,
        request: Request<Incoming>,
        place: Result<Place, Box<Response<Body>>>,
    ) -> Response<Body> {
        self.session(request, place, |runtime, id, options| async move {
            if options.command.is_empty() {
                return Err("you must specify at least one command for the container".to_owned());
            }
            runtime
                .exec(&id, options.request())
                .await
                .map_err(|e| e.message)
        })
        .await
    }

    async fn attach(
        &self,
        request: Request<Incoming>,
        place: Result<Place, Box<Response<Body>>>,
    ) -> Response<Body> {
        self.session(request, place, |runtime, id, options| async move {
            runtime
                .attach(&id, options.stdin)
                .await
                .map_err(|e| e.message)
        })
        .await
    }

    /// Upgrades the connection and serves what `open` opens on it.
    async fn session<O, F>(
        &self,
        mut request: Request<Incoming>,
        place: Result<Place, Box<Response<Body>>>,
        open: O,
    ) -> Response<Body>
    where
        O: FnOnce(Arc<R>, ContainerId, StreamOptions) -> F + Send + 'static,
        F: Future<Output = Result<runtime::service::StreamSession, String>> + Send,
    {
        let place = match place {
            Ok(place) => place,
            Err(response) => return *response,
        };
        let options = match StreamOptions::from_query(&query(request.uri())) {
            Ok(options) => options,
            Err(message) => return text(StatusCode::BAD_REQUEST, message),
        };
        let running = place.refs.current.filter(|id| {
            let status = self.runtime.container_status(id);
            status.is_some_and(|s| matches!(s.state, ContainerState::Running { .. }))
        });
        let Some(id) = running else {
            let message = format!("container not found ({:?})", place.container);
            return text(StatusCode::NOT_FOUND, message);
        };
        let (protocol, response) = match stream::accept(request.headers()) {
            Ok(accepted) => accepted,
            Err((status, message)) => return text(status, message),
        };
        let upgrade = hyper::upgrade::on(&mut request);
        let runtime = Arc::clone(&self.runtime);
        let idle = self.config.server.streaming_idle_timeout;
        self.tracker.spawn(async move {
            let Ok(upgraded) = upgrade.await else { return };
            let config = WebSocketConfig::default()
                .read_buffer_size(16 << 10)
                .write_buffer_size(0)
                .max_message_size(Some(MAX_MESSAGE))
                .max_frame_size(Some(MAX_MESSAGE));
            let io = TokioIo::new(upgraded);
            let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await;
            let session = open(Arc::clone(&runtime), id, options).await;
            pump::run(socket, protocol, runtime, session, idle).await;
        });
        response.map(|empty| empty.boxed())
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

/// Why a container waits, from the node's own status.
fn waiting_reason(entry: &PodEntry, name: &str) -> String {
    let status = &entry.status;
    let all = status
        .container_statuses
        .iter()
        .chain(&status.init_container_statuses)
        .flatten();
    all.filter(|c| c.name == name)
        .find_map(|c| c.state.as_ref()?.waiting.as_ref()?.reason.clone())
        .unwrap_or_else(|| "ContainerCreating".to_owned())
}

/// Resolves when the container no longer runs.
async fn ended<R: RuntimeService>(
    runtime: Arc<R>,
    mut events: broadcast::Receiver<runtime::service::RuntimeEvent>,
    id: ContainerId,
) {
    use runtime::service::RuntimeEvent::Changed;
    loop {
        let status = runtime.container_status(&id);
        if !status.is_some_and(|s| matches!(s.state, ContainerState::Running { .. })) {
            return;
        }
        loop {
            match events.recv().await {
                Ok(Changed {
                    container: Some(changed),
                    kind: RuntimeEventKind::Exited,
                    ..
                }) if changed == id => {
                    break;
                }
                Ok(Changed {
                    kind: RuntimeEventKind::SandboxGone,
                    ..
                })
                | Err(broadcast::error::RecvError::Lagged(_)) => break,
                Ok(Changed { .. }) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    }
}

/// Gives a body that is only polled from one task the `Sync` that a boxed body must have.
struct SyncBody<B> {
    inner: std::sync::Mutex<std::pin::Pin<Box<B>>>,
}

impl<B> SyncBody<B> {
    fn new(body: B) -> Self {
        Self {
            inner: std::sync::Mutex::new(Box::pin(body)),
        }
    }
}

impl<B: hyper::body::Body> hyper::body::Body for SyncBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let inner = self
            .inner
            .get_mut()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        inner.as_mut().poll_frame(cx)
    }
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
