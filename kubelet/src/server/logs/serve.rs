//! Answers `/containerLogs`.

use super::{BadOptions, LogFile, LogOptions, follow};
use crate::pod::index::PodEntry;
use crate::server::Server;
use crate::server::routes::{Body, query, text};
use futures::StreamExt;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Request, Response, StatusCode};
use runtime::service::{
    ContainerId, ContainerState, ContainerStatus, ImageService, RuntimeEventKind, RuntimeService,
};
use std::sync::Arc;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;

/// Chunks of a log that wait for a slow reader.
const LOG_QUEUE: usize = 16;

impl<R: RuntimeService + ImageService> Server<R> {
    /// Options are looked at before the pod, as the stock kubelet does.
    pub(in crate::server) fn container_logs(
        &self,
        request: &Request<Incoming>,
        namespace: &str,
        pod: &str,
        container: &str,
    ) -> Response<Body> {
        let options = LogOptions::from_query(&query(request.uri()), jiff::Timestamp::now());
        let options = match options {
            Ok(options) => options,
            Err(bad @ BadOptions::Undecodable) => {
                return text(StatusCode::BAD_REQUEST, bad.to_string());
            }
            Err(bad @ BadOptions::Invalid) => {
                return text(StatusCode::UNPROCESSABLE_ENTITY, bad.to_string());
            }
        };
        let place = match self.find(namespace, pod, container) {
            Ok(place) => place,
            Err(missing) => return *missing,
        };
        let id = if options.previous {
            &place.refs.previous
        } else {
            &place.refs.current
        };
        let status = id.as_ref().and_then(|id| self.runtime.container_status(id));
        let has_log = |status: &ContainerStatus| match status.state {
            ContainerState::Created => false,
            ContainerState::Running { .. } | ContainerState::Exited { .. } => true,
        };
        let Some(status) = status.filter(has_log) else {
            let message = if options.previous {
                format!("previous terminated container {container:?} in pod {pod:?} not found")
            } else {
                no_log_yet(&place.entry, container, pod)
            };
            return text(StatusCode::BAD_REQUEST, message);
        };
        if let Err(e) = std::fs::File::open(&status.log_path) {
            let path = status.log_path.display();
            let message = format!("failed to open log file {path:?}: {e}");
            return text(StatusCode::BAD_REQUEST, message);
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
}

/// Why there is no log, from the node's own status.
fn no_log_yet(entry: &PodEntry, container: &str, pod: &str) -> String {
    let status = &entry.status;
    let mut all = status
        .container_statuses
        .iter()
        .chain(&status.init_container_statuses)
        .chain(&status.ephemeral_container_statuses)
        .flatten();
    let Some(found) = all.find(|c| c.name == container) else {
        return format!("container {container:?} in pod {pod:?} is not available");
    };
    let state = found.state.as_ref();
    if state.is_some_and(|s| s.terminated.is_some()) {
        return format!("container {container:?} in pod {pod:?} is terminated");
    }
    let reason = state.and_then(|s| s.waiting.as_ref()?.reason.as_deref());
    let why = match reason {
        Some("ErrImagePull") => ": image can't be pulled",
        Some("ImagePullBackOff") => ": trying and failing to pull image",
        Some(reason) => &format!(": {reason}"),
        None => " - no logs yet",
    };
    format!("container {container:?} in pod {pod:?} is waiting to start{why}")
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
pub(in crate::server) struct SyncBody<B> {
    inner: std::sync::Mutex<std::pin::Pin<Box<B>>>,
}

impl<B> SyncBody<B> {
    pub(in crate::server) fn new(body: B) -> Self {
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
