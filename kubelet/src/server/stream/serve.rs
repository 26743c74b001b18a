//! Answers `/exec` and `/attach`.

use super::{StreamOptions, accept, pump};
use crate::server::Server;
use crate::server::routes::{Body, Place, query, text};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use runtime::service::{ContainerId, ContainerState, ImageService, RuntimeService};
use std::sync::Arc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

/// Largest message of a streaming client; kubectl sends at most 32 KiB at a time.
const MAX_MESSAGE: usize = 4 << 20;

impl<R: RuntimeService + ImageService> Server<R> {
    pub(in crate::server) async fn exec(
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

    pub(in crate::server) async fn attach(
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
        let (protocol, response) = match accept(request.headers()) {
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
