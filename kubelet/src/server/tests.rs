//! The server over real TLS and WebSockets, with a scripted runtime; the apiserver's answers come
//! from a function.

use super::*;
use crate::config::{self, Flags};
use crate::pod::index::{ContainerRefs, PodEntry};
use futures::StreamExt;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Bytes;
use hyper::{Request, Response};
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::client::Body;
use rcgen::{CertificateParams, DnType, IsCa, Issuer, KeyPair};
use runtime::fake::FakeRuntime;
use runtime::service::{ContainerConfig, ExecOutput, ImageConfig, SandboxConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{PrivateKeyDer, ServerName};
use std::collections::BTreeMap;
use std::path::Path;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

/// A certificate authority and what it signed: `(certificate, key)` in PEM.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    fn sign(&self, user: &str, names: &[&str]) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<_> = names.iter().map(|n| (*n).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, user);
        (
            params.signed_by(&key, &self.issuer).unwrap().pem(),
            key.serialize_pem(),
        )
    }
}

/// A server on a port of its own.
pub(super) struct Node {
    address: SocketAddr,
    ca: Authority,
    stop: CancellationToken,
    pub(super) runtime: Arc<FakeRuntime>,
    _dir: tempfile::TempDir,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn write(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

pub(super) async fn node() -> Node {
    let dir = tempfile::tempdir().unwrap();
    let ca = Authority::new();
    let (cert, key) = ca.sign("node", &["localhost"]);
    let ca_file = write(dir.path(), "ca.crt", &ca.pem);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let text = format!(
        "kind: KubeletConfiguration\napiVersion: kubelet.config.k8s.io/v1beta1\naddress: 127.0.0.1\n\
         port: {}\ntlsCertFile: {}\ntlsPrivateKeyFile: {}\nauthentication:\n  anonymous: {{enabled: false}}\n  \
         webhook: {{enabled: true}}\n  x509: {{clientCAFile: {ca_file}}}\nauthorization: {{mode: Webhook}}\n\
         failCgroupV1: false\n",
        address.port(),
        write(dir.path(), "tls.crt", &cert),
        write(dir.path(), "tls.key", &key),
    );
    let file = write(dir.path(), "config.yaml", &text);
    let flags = Flags {
        config: Some(file.into()),
        kubeconfig: Some(dir.path().join("kubeconfig")),
        hostname_override: Some("node".to_owned()),
        node_ips: vec![[127, 0, 0, 1].into()],
        ..Flags::default()
    };
    let config = Arc::new(config::load(&flags).unwrap());
    let (runtime, index) = pod(dir.path()).await;
    let auth = Auth::new(apiserver(), "node", config.server.clone());
    let stop = CancellationToken::new();
    let tracker = TaskTracker::new();
    let volumes: crate::stats::VolumePaths = Arc::new(|_| Vec::new());
    let stats = Stats::new(
        Arc::clone(&runtime),
        Arc::clone(&config),
        index.clone(),
        volumes,
    );
    let server = Server {
        config,
        runtime: Arc::clone(&runtime),
        index,
        auth,
        tracker,
        stop: stop.clone(),
        stats: Arc::new(stats),
        machine: Arc::default(),
        problem: Arc::new(|| None),
        certificate_ttl_s: Arc::new(|| Some(60)),
        cgroup_v2: true,
        started: jiff::Timestamp::now(),
    };
    tokio::spawn(serve(server, stop.clone()));
    Node {
        address,
        ca,
        stop,
        runtime,
        _dir: dir,
    }
}

/// An apiserver that lets only `admin` in, and knows one token.
fn apiserver() -> kube::Client {
    let service = tower::service_fn(|request: Request<Body>| async move {
        let tokens = request.uri().path().contains("tokenreviews");
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let mut review: serde_json::Value = serde_json::from_slice(&body).unwrap();
        review["status"] = if tokens {
            let known = review["spec"]["token"] == "good";
            serde_json::json!({"authenticated": known, "user": {"username": "admin"}})
        } else {
            serde_json::json!({"allowed": review["spec"]["user"] == "admin"})
        };
        let answer = Full::new(Bytes::from(review.to_string()));
        Ok::<_, std::convert::Infallible>(Response::new(answer))
    });
    kube::Client::new(service, "default")
}

/// One running container `c` of pod `p`, with a log.
async fn pod(dir: &Path) -> (Arc<FakeRuntime>, PodIndex) {
    let runtime = Arc::new(FakeRuntime::new());
    runtime.preload("image", ImageConfig::default());
    let config = SandboxConfig {
        uid: "uid-1".to_owned(),
        log_directory: dir.to_owned(),
        ..SandboxConfig::default()
    };
    let sandbox = runtime.run_sandbox(config).await.unwrap();
    let config = ContainerConfig {
        name: "c".to_owned(),
        image: "image".to_owned(),
        log_path: "0.log".to_owned(),
        ..ContainerConfig::default()
    };
    let id = runtime.create_container(&sandbox.id, config).await.unwrap();
    runtime.start_container(&id).await.unwrap();
    let log = runtime.container_status(&id).unwrap().log_path;
    std::fs::write(log, "2026-01-01T00:00:00.000000001Z stdout F hello\n").unwrap();
    let index = PodIndex::new();
    index.insert(PodEntry {
        pod: Arc::new(Pod {
            metadata: ObjectMeta {
                name: Some("p".to_owned()),
                namespace: Some("ns".to_owned()),
                uid: Some("uid-1".to_owned()),
                ..ObjectMeta::default()
            },
            spec: Some(PodSpec {
                containers: vec![Container {
                    name: "c".to_owned(),
                    ..Container::default()
                }],
                ..PodSpec::default()
            }),
            status: None,
        }),
        status: Arc::default(),
        containers: BTreeMap::from([(
            "c".to_owned(),
            ContainerRefs {
                current: Some(id),
                previous: None,
            },
        )]),
    });
    (runtime, index)
}

/// Connects as the holder of a certificate for `user`, or as nobody.
pub(super) async fn connect(node: &Node, user: Option<&str>) -> TlsStream<TcpStream> {
    connect_by(node, user.map(|user| node.ca.sign(user, &[]))).await
}

async fn connect_by(node: &Node, identity: Option<(String, String)>) -> TlsStream<TcpStream> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(crate::api::tls::roots(node.ca.pem.as_bytes()).unwrap());
    let config = match identity {
        Some((cert, key)) => {
            let cert = CertificateDer::from_pem_slice(cert.as_bytes()).unwrap();
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
            builder.with_client_auth_cert(vec![cert], key).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    let stream = loop {
        // The server task may not have bound its port yet.
        match TcpStream::connect(node.address).await {
            Ok(stream) => break stream,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    let name = ServerName::try_from("localhost").unwrap();
    tokio_rustls::TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
        .unwrap()
}

async fn get(node: &Node, user: Option<&str>, bearer: Option<&str>, path: &str) -> (u16, String) {
    get_over(connect(node, user).await, bearer, path).await
}

async fn get_over(stream: TlsStream<TcpStream>, bearer: Option<&str>, path: &str) -> (u16, String) {
    let io = TokioIo::new(stream);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
    tokio::spawn(connection);
    let mut request = Request::get(path).header("host", "node");
    if let Some(token) = bearer {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let request = request.body(Empty::<Bytes>::new()).unwrap();
    let response = sender.send_request(request).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8_lossy(&body).into_owned())
}

#[tokio::test]
async fn only_known_and_allowed_clients_are_served() {
    let node = node().await;
    assert_eq!(
        get(&node, None, None, "/pods").await,
        (401, "Unauthorized".to_owned())
    );
    let (status, text) = get(&node, Some("guest"), None, "/pods").await;
    assert_eq!(status, 403);
    assert!(
        text.starts_with("Forbidden (user=guest, verb=get, resource=nodes"),
        "{text}"
    );
    assert_eq!(get(&node, None, Some("bad"), "/healthz").await.0, 401);
    assert_eq!(
        get(&node, None, Some("good"), "/healthz").await,
        (200, "ok".to_owned())
    );
    let (status, pods) = get(&node, Some("admin"), None, "/pods").await;
    assert!(status == 200 && pods.contains("\"PodList\"") && pods.contains("uid-1"));
    assert_eq!(
        get(&node, Some("admin"), None, "/portForward/ns/p/no-such-uid").await,
        (404, "pod not found".to_owned())
    );
    assert!(
        get(&node, Some("admin"), None, "/configz")
            .await
            .1
            .contains("kubeletconfig")
    );
}

#[tokio::test]
async fn whoever_connects_and_says_nothing_keeps_nobody_out() {
    use tokio::io::AsyncReadExt;
    let node = node().await;
    let early = connect(&node, Some("admin")).await;
    let mut silent = vec![connect(&node, None).await];
    for _ in 0..=strangers::MAX_STRANGERS {
        silent.push(connect(&node, None).await);
    }
    let mut byte = [0];
    let ended = silent[0].read(&mut byte).await;
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    assert_eq!(get(&node, None, Some("good"), "/healthz").await.0, 200);
    assert_eq!(get_over(early, None, "/pods").await.0, 200);
}

#[tokio::test]
async fn a_certificate_of_strangers_is_no_identity_and_no_hindrance_to_a_token() {
    let node = node().await;
    let stranger = Authority::new().sign("admin", &[]);
    let stream = connect_by(&node, Some(stranger.clone())).await;
    assert_eq!(get_over(stream, None, "/pods").await.0, 401);
    let stream = connect_by(&node, Some(stranger)).await;
    assert_eq!(get_over(stream, Some("good"), "/healthz").await.0, 200);
}

#[tokio::test]
async fn logs_are_served_and_wrong_requests_named() {
    let node = node().await;
    let admin = Some("admin");
    let logs = |path: &'static str| get(&node, admin, None, path);
    assert_eq!(
        logs("/containerLogs/ns/p/c?tailLines=1").await,
        (200, "hello\n".to_owned())
    );
    assert_eq!(logs("/containerLogs/ns/q/c").await.0, 404);
    assert_eq!(logs("/containerLogs/ns/p/d").await.0, 404);
    assert_eq!(logs("/containerLogs/ns/p/c?tailLines=-1").await.0, 422);
    let (status, text) = logs("/containerLogs/ns/p/c?previous=true").await;
    assert!(
        status == 400 && text.contains("previous terminated container"),
        "{text}"
    );
}

/// Runs a command over a WebSocket; the messages received, by channel.
async fn exec(node: &Node, protocol: &str) -> Vec<Vec<u8>> {
    let io = TokioIo::new(connect(node, Some("admin")).await);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
    tokio::spawn(connection.with_upgrades());
    let request = Request::get("/exec/ns/p/c?command=false&output=1")
        .header("host", "node")
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
        .header("sec-websocket-protocol", protocol)
        .body(Empty::<Bytes>::new())
        .unwrap();
    let mut response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 101);
    assert_eq!(
        response.headers()["sec-websocket-accept"],
        "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    );
    assert_eq!(response.headers()["sec-websocket-protocol"], protocol);
    let upgraded = hyper::upgrade::on(&mut response).await.unwrap();
    let mut socket =
        WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Client, None).await;
    let mut messages = Vec::new();
    let mut closed = None;
    while let Some(Ok(message)) = socket.next().await {
        match message {
            Message::Binary(bytes) => messages.push(bytes.to_vec()),
            Message::Close(frame) => closed = frame.map(|f| u16::from(f.code)),
            Message::Text(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
        }
    }
    // kubectl reports anything but a normal close as a lost connection.
    assert_eq!(closed, Some(1000));
    messages
}

#[tokio::test]
async fn an_exec_session_ends_with_its_exit_code() {
    let node = node().await;
    node.runtime.exec_result(
        "c",
        Ok(ExecOutput {
            exit_code: 3,
            ..ExecOutput::default()
        }),
    );
    let messages = exec(&node, "v5.channel.k8s.io").await;
    let last = String::from_utf8(messages.last().unwrap().clone()).unwrap();
    assert!(
        last.starts_with('\u{3}') && last.contains("NonZeroExitCode"),
        "{last}"
    );
    let messages = exec(&node, "channel.k8s.io").await;
    assert_eq!(
        messages.last().unwrap(),
        b"\x03command terminated with exit code 3"
    );
}

#[tokio::test]
async fn streaming_requests_that_cannot_be_served_get_the_stock_answers() {
    let node = node().await;
    let ask = |path: &'static str| get(&node, Some("admin"), None, path);
    assert_eq!(
        ask("/exec/ns/p/c?command=x&output=1").await,
        (500, "Upgrade request required".to_owned())
    );
    let (status, text) = ask("/exec/ns/p/c?command=x").await;
    assert!(
        status == 400 && text.contains("at least 1 of stdin"),
        "{text}"
    );
    assert_eq!(
        ask("/exec/ns/nobody/c?output=1").await,
        (404, "pod does not exist".to_owned())
    );
    assert_eq!(
        ask("/exec/ns/p/d?output=1").await,
        (500, "container not found (\"d\")".to_owned())
    );
    assert_eq!(ask("/exec/ns/p/uid-2/c?output=1").await.0, 500);
    assert_eq!(
        ask("/portForward/ns/nobody").await,
        (404, "pod does not exist".to_owned())
    );
    assert_eq!(ask("/run/ns/p/c?cmd=id").await.0, 405);
    assert_eq!(ask("/attach/ns").await.0, 404);
}
