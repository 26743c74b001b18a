//! Answers `/exec`, `/attach`, `/portForward` and `/run`.

use super::upgrade::{Agreed, Served, Transport, agree, is_websocket, offers_tunnel};
use super::websocket::{Channels, ChannelsOut, TunnelWriter, halves, tunnel_reader};
use super::wire::{Incoming, Outgoing};
use super::{StreamOptions, channel, channels, forward, pump, remote};
use crate::pod::index::PodEntry;
use crate::server::Server;
use crate::server::routes::{Body, query, text};
use crate::server::spdy;
use http_body_util::BodyExt;
use hyper::body::Incoming as RequestBody;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use pump::Kind;
use runtime::service::{
    ContainerId, ContainerState, ImageService, RuntimeService, SandboxId, SandboxState,
    StreamSession,
};
use std::sync::Arc;
use std::time::Duration;

/// Protocols of exec and attach.
const REMOTE: Served = Served {
    tunnel: &[],
    websocket: channel::NAMES,
    spdy: remote::PROTOCOLS,
};
/// Protocols of port-forward.
const FORWARD: Served = Served {
    tunnel: &["SPDY/3.1+portforward.k8s.io"],
    websocket: &["v4.channel.k8s.io", "v4.base64.channel.k8s.io", ""],
    spdy: &["portforward.k8s.io"],
};
/// Output of `/run` beyond this is dropped.
const RUN_BYTES: usize = 16 << 20;

/// What a path names: namespace, pod, UID when given, container.
#[derive(Debug, Clone, Copy)]
struct Address<'a> {
    namespace: &'a str,
    pod: &'a str,
    uid: Option<&'a str>,
    /// Empty for port-forward.
    container: &'a str,
}

impl<'a> Address<'a> {
    fn of_container(path: &[&'a str]) -> Option<Self> {
        let (namespace, pod, uid, container) = match *path {
            [namespace, pod, container] => (namespace, pod, None, container),
            [namespace, pod, uid, container] => (namespace, pod, Some(uid), container),
            _ => return None,
        };
        Some(Self {
            namespace,
            pod,
            uid,
            container,
        })
    }

    fn of_pod(path: &[&'a str]) -> Option<Self> {
        let (namespace, pod, uid) = match *path {
            [namespace, pod] => (namespace, pod, None),
            [namespace, pod, uid] => (namespace, pod, Some(uid)),
            _ => return None,
        };
        Some(Self {
            namespace,
            pod,
            uid,
            container: "",
        })
    }
}

type Refusal = Box<Response<Body>>;

fn refusal(status: StatusCode, message: impl Into<String>) -> Refusal {
    Box::new(text(status, message))
}

/// A request's options, its container and what was agreed on.
struct Remote {
    options: StreamOptions,
    container: ContainerId,
    kind: Kind,
    idle: Duration,
}

impl Remote {
    async fn open<R: RuntimeService>(&self, runtime: &R) -> Result<StreamSession, String> {
        let options = &self.options;
        match self.kind {
            Kind::Exec => {
                let opened = runtime.exec(&self.container, options.request()).await;
                opened.map_err(|e| format!("error executing command in container: {e}"))
            }
            Kind::Attach { .. } => {
                let opened = runtime.attach(&self.container, options.stdin).await;
                let mut session =
                    opened.map_err(|e| format!("error attaching to container: {e}"))?;
                session.stdout = session.stdout.filter(|_| options.stdout);
                session.stderr = session.stderr.filter(|_| options.stderr);
                Ok(session)
            }
        }
    }

    async fn pump<R: RuntimeService, I: Incoming, O: Outgoing>(
        self,
        runtime: Arc<R>,
        input: I,
        output: O,
    ) {
        let session = self.open(&*runtime).await;
        pump::run(input, output, self.kind, runtime, session, self.idle).await;
    }

    /// Serves the session on the upgraded connection.
    async fn serve<R: RuntimeService>(
        self,
        runtime: Arc<R>,
        transport: Transport,
        protocol: &'static str,
        upgraded: Upgraded,
    ) {
        match transport {
            Transport::WebSocket | Transport::Tunnel => {
                let protocol = channel::named(protocol);
                let (input, output) = halves(upgraded).await;
                let (input, output) = (
                    Channels { input, protocol },
                    ChannelsOut { output, protocol },
                );
                self.pump(runtime, input, output).await;
            }
            Transport::Spdy => {
                let (input, output) = tokio::io::split(TokioIo::new(upgraded));
                let (session, work) = spdy::open(input, output, self.idle);
                let version = remote::Version::of(protocol);
                let user = async {
                    let streams = remote::streams(session, version, &self.options).await;
                    if let Some((input, output)) = streams {
                        self.pump(runtime, input, output).await;
                    }
                };
                drive(work, user).await;
            }
        }
    }
}

/// Runs a SPDY connection beside its user. The user sees the connection end by itself; a user
/// that ends first takes the connection along.
async fn drive(
    work: impl Future<Output = Result<(), spdy::connection::ConnectionError>>,
    user: impl Future<Output = ()>,
) {
    let work = async {
        if let Err(error) = work.await {
            tracing::debug!(
                error = &error as &dyn std::error::Error,
                "A SPDY connection ended early"
            );
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = work => {}
        () = user => {}
    }
}

impl<R: RuntimeService + ImageService> Server<R> {
    /// Answers the paths whose first part is `exec`, `attach`, `portForward` or `run`.
    pub(in crate::server) async fn streams(
        &self,
        request: Request<RequestBody>,
        path: &[&str],
    ) -> Response<Body> {
        let (verb, rest) = path.split_first().unwrap_or((&"", &[]));
        let at = match *verb {
            "portForward" => Address::of_pod(rest),
            _ => Address::of_container(rest),
        };
        let Some(at) = at else {
            return text(StatusCode::NOT_FOUND, "404 page not found\n");
        };
        let post = request.method() == Method::POST;
        if !post && (*verb == "run" || request.method() != Method::GET) {
            let message = "405: Method Not Allowed";
            return text(StatusCode::METHOD_NOT_ALLOWED, message);
        }
        let answer = match *verb {
            "exec" => self.remote(request, at, Kind::Exec),
            "attach" => {
                let until_input_ends = false;
                self.remote(request, at, Kind::Attach { until_input_ends })
            }
            "portForward" => self.forward(request, at),
            _ => self.run(&request, at).await,
        };
        answer.unwrap_or_else(|refusal| *refusal)
    }

    fn remote(
        &self,
        mut request: Request<RequestBody>,
        at: Address<'_>,
        kind: Kind,
    ) -> Result<Response<Body>, Refusal> {
        let bad = |message| refusal(StatusCode::BAD_REQUEST, message);
        let options = StreamOptions::from_query(&query(request.uri())).map_err(bad)?;
        let container = self.running(at, kind)?;
        let kind = match kind {
            Kind::Exec => Kind::Exec,
            Kind::Attach { .. } => Kind::Attach {
                until_input_ends: options.stdin && self.keeps_input(&container),
            },
        };
        let agreed = agree_on(&request, REMOTE)?;
        let remote = Remote {
            options,
            container,
            kind,
            idle: self.config.server.streaming_idle_timeout,
        };
        let upgrade = hyper::upgrade::on(&mut request);
        let (runtime, transport) = (Arc::clone(&self.runtime), agreed.transport);
        let protocol = agreed.protocol;
        self.attend(upgrade, move |upgraded| {
            remote.serve(runtime, transport, protocol, upgraded)
        });
        Ok(agreed.response.map(|empty| empty.boxed()))
    }

    /// Whether a container's input outlives the client that is attached to it.
    fn keeps_input(&self, id: &ContainerId) -> bool {
        let status = self.runtime.container_status(id);
        status.is_some_and(|s| s.config.stdin && (s.config.tty || !s.config.stdin_once))
    }

    /// Runs a session on the connection once it is upgraded, until it ends or the agent stops.
    fn attend<F>(&self, upgrade: OnUpgrade, session: impl FnOnce(Upgraded) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send,
    {
        let stop = self.stop.clone();
        self.tracker.spawn(async move {
            let served = async {
                if let Ok(upgraded) = upgrade.await {
                    session(upgraded).await;
                }
            };
            tokio::select! {
                () = stop.cancelled() => {}
                () = served => {}
            }
        });
    }

    fn pod_at(&self, at: Address<'_>) -> Result<Arc<PodEntry>, Refusal> {
        let entry = self.index.get(at.namespace, at.pod);
        entry.ok_or_else(|| refusal(StatusCode::NOT_FOUND, "pod does not exist"))
    }

    /// The running container at an address. The status of a missing one is the stock kubelet's.
    fn running(&self, at: Address<'_>, kind: Kind) -> Result<ContainerId, Refusal> {
        let entry = self.pod_at(at)?;
        let refs = entry.containers.get(at.container);
        let id = refs.and_then(|refs| refs.current.clone()).filter(|id| {
            let status = self.runtime.container_status(id);
            let runs = status.is_some_and(|s| matches!(s.state, ContainerState::Running { .. }));
            runs && at
                .uid
                .is_none_or(|uid| entry.uid() == self.index.resolve(uid))
        });
        id.ok_or_else(|| {
            let message = match kind {
                Kind::Exec => format!("container not found ({:?})", at.container),
                Kind::Attach { .. } => format!(
                    "container {} not found in pod {}_{}",
                    at.container, at.pod, at.namespace
                ),
            };
            refusal(StatusCode::INTERNAL_SERVER_ERROR, message)
        })
    }

    fn forward(
        &self,
        mut request: Request<RequestBody>,
        at: Address<'_>,
    ) -> Result<Response<Body>, Refusal> {
        let headers = request.headers();
        let ports = if is_websocket(headers) && !offers_tunnel(headers) {
            let bad = |message| refusal(StatusCode::BAD_REQUEST, message);
            channels::ports(&query(request.uri())).map_err(bad)?
        } else {
            Vec::new()
        };
        let entry = self.pod_at(at)?;
        if at
            .uid
            .is_some_and(|uid| entry.uid() != self.index.resolve(uid))
        {
            return Err(refusal(StatusCode::NOT_FOUND, "pod not found"));
        }
        let target = forward::Target {
            runtime: Arc::clone(&self.runtime),
            sandbox: self.sandbox_of(&entry, at)?,
        };
        let agreed = agree_on(&request, FORWARD)?;
        let idle = self.config.server.streaming_idle_timeout;
        let upgrade = hyper::upgrade::on(&mut request);
        let (transport, protocol) = (agreed.transport, agreed.protocol);
        self.attend(upgrade, move |upgraded| async move {
            match transport {
                Transport::Spdy => {
                    let (input, output) = tokio::io::split(TokioIo::new(upgraded));
                    let (session, work) = spdy::open(input, output, idle);
                    drive(work, forward::run(session, target)).await;
                }
                Transport::Tunnel => {
                    let (input, output) = halves(upgraded).await;
                    let output = TunnelWriter::new(output);
                    let (session, work) = spdy::open(tunnel_reader(input), output, idle);
                    drive(work, forward::run(session, target)).await;
                }
                Transport::WebSocket => {
                    let (input, output) = halves(upgraded).await;
                    let protocol = channel::named(protocol);
                    channels::run(input, output, protocol, ports, target, idle).await;
                }
            }
        });
        Ok(agreed.response.map(|empty| empty.boxed()))
    }

    /// The newest sandbox of a pod that is ready.
    fn sandbox_of(&self, entry: &PodEntry, at: Address<'_>) -> Result<SandboxId, Refusal> {
        let sandboxes = self.runtime.list_pod_sandboxes(entry.uid());
        let ready = sandboxes
            .into_iter()
            .filter(|s| s.state == SandboxState::Ready);
        let newest = ready.max_by_key(|s| (s.config.attempt, s.created_at_ns));
        newest.map(|s| s.id).ok_or_else(|| {
            let message = format!("pod not found (\"{}_{}\")", at.pod, at.namespace);
            refusal(StatusCode::INTERNAL_SERVER_ERROR, message)
        })
    }

    /// Runs a command to its end and answers its output, both streams one after the other.
    async fn run(
        &self,
        request: &Request<RequestBody>,
        at: Address<'_>,
    ) -> Result<Response<Body>, Refusal> {
        let container = self.running(at, Kind::Exec)?;
        let query = query(request.uri());
        let line = query.iter().find(|(name, _)| name == "cmd");
        let line = line.map_or("", |(_, value)| value);
        let command: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let ran = self
            .runtime
            .exec_sync(&container, command, Duration::ZERO, RUN_BYTES)
            .await;
        let failed = |message| refusal(StatusCode::INTERNAL_SERVER_ERROR, message);
        let mut output = ran.map_err(|e| failed(e.message))?;
        output.stdout.append(&mut output.stderr);
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        match output.exit_code {
            0 => Ok(text(StatusCode::OK, out)),
            code => Err(failed(format!(
                "command '{line}' exited with {code}: {out}"
            ))),
        }
    }
}

fn agree_on(request: &Request<RequestBody>, served: Served) -> Result<Agreed, Refusal> {
    agree(request.headers(), served).map_err(|refused| {
        let mut response = text(refused.status, refused.message.clone());
        refused.mark(&mut response);
        Box::new(response)
    })
}
