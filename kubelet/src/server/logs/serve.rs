//! Answers `/containerLogs`.

use super::{LogFile, LogOptions, follow};
use crate::pod::index::PodEntry;
use crate::server::Server;
use crate::server::routes::{Body, Place, query, text};
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
    pub(in crate::server) fn container_logs(
        &self,
        request: &Request<Incoming>,
        place: &Place,
    ) -> Response<Body> {
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
