//! Sockets: CSI, registration, and a line for liveness probes.

use super::Service;
use super::authority::Tolerant;
use super::registration::Registrar;
use anyhow::{Context as _, Result};
use proto::csi::v1::controller_server::ControllerServer;
use proto::csi::v1::group_controller_server::GroupControllerServer;
use proto::csi::v1::identity_server::IdentityServer;
use proto::csi::v1::node_server::NodeServer;
use proto::registration::v1::registration_server::RegistrationServer;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

/// Longest request of a probe that is read.
const MAX_PROBE_BYTES: usize = 4096;

/// After this a probe has hung up, or should have.
const PROBE_LIMIT: Duration = Duration::from_secs(5);

/// Where a driver listens.
#[derive(Debug, Clone)]
pub struct Sockets {
    /// The CSI services.
    pub endpoint: PathBuf,
    /// Where the kubelet shall find this driver; none when somebody else registers it.
    pub registration: Option<RegistrationSocket>,
    /// `/healthz` over HTTP; none for no such thing.
    pub health: Option<SocketAddr>,
}

/// How the kubelet finds a driver.
#[derive(Debug, Clone)]
pub struct RegistrationSocket {
    /// The kubelet's directory of plugins (`plugins_registry`), as this program sees it.
    pub directory: PathBuf,
    /// The CSI socket, as the kubelet sees it.
    pub endpoint: PathBuf,
}

/// Serves until `stop` is done; requests under way come to their end.
///
/// # Errors
/// When a socket cannot be made.
pub async fn serve(
    service: Service,
    sockets: Sockets,
    stop: impl Future<Output = ()> + Send,
) -> Result<()> {
    let name = service.driver.config.name.clone();
    let csi = connections(&sockets.endpoint)?;
    let (ended, end) = watch::channel(false);
    let (accepted, answer) = watch::channel(None);
    let csi = Server::builder()
        .add_service(IdentityServer::new(service.clone()))
        .add_service(ControllerServer::new(service.clone()))
        .add_service(GroupControllerServer::new(service.clone()))
        .add_service(NodeServer::new(service))
        .serve_with_incoming_shutdown(csi, done(end.clone()));
    tracing::info!(endpoint = %sockets.endpoint.display(), "Serving");
    // Only now: who is told of the driver calls it.
    let registration = register(
        &name,
        sockets.registration.as_ref(),
        accepted,
        done(end.clone()),
    );
    let health = health(sockets.health, answer, done(end));
    let stop = async {
        stop.await;
        ended.send_replace(true);
        // Whoever looks for us finds nobody, and not a socket without an owner.
        if let Some(socket) = &sockets.registration {
            let _ = std::fs::remove_file(socket_in(&socket.directory, &name));
        }
        Ok(())
    };
    let csi = async { csi.await.context("serve CSI") };
    tokio::try_join!(csi, registration, health, stop)?;
    Ok(())
}

/// Done when the value has become true, or nobody can make it so.
async fn done(mut end: watch::Receiver<bool>) {
    let _ = end.wait_for(|ended| *ended).await;
}

async fn register(
    name: &str,
    socket: Option<&RegistrationSocket>,
    accepted: watch::Sender<Option<bool>>,
    stop: impl Future<Output = ()> + Send,
) -> Result<()> {
    let Some(socket) = socket else { return Ok(()) };
    let path = socket_in(&socket.directory, name);
    let registrar = Registrar {
        name: name.to_owned(),
        endpoint: socket.endpoint.display().to_string(),
        accepted,
    };
    let incoming = connections(&path)?;
    tracing::info!(socket = %path.display(), "Waiting for the kubelet");
    Server::builder()
        .add_service(RegistrationServer::new(registrar))
        .serve_with_incoming_shutdown(incoming, stop)
        .await
        .context("serve the registration")
}

fn socket_in(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}-reg.sock"))
}

type Connections = std::pin::Pin<
    Box<dyn tokio_stream::Stream<Item = std::io::Result<Tolerant<UnixStream>>> + Send>,
>;

fn connections(path: &Path) -> Result<Connections> {
    let incoming = UnixListenerStream::new(listen(path)?);
    Ok(Box::pin(incoming.map(|stream| stream.map(Tolerant::new))))
}

/// A listening socket in the place of one an earlier driver left. Anything else there stays.
fn listen(path: &Path) -> Result<UnixListener> {
    match path.symlink_metadata() {
        Ok(meta) if meta.file_type().is_socket() => {
            std::fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?;
        }
        Ok(_) => anyhow::bail!("{} exists and is no socket", path.display()),
        Err(_) => {}
    }
    if let Some(parent) = path.parent() {
        linux::fs::create_dirs(parent, 0o755)?;
    }
    UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))
}

/// Answers probes: well unless the kubelet refused us, which a restart may cure.
async fn health(
    address: Option<SocketAddr>,
    accepted: watch::Receiver<Option<bool>>,
    stop: impl Future<Output = ()> + Send,
) -> Result<()> {
    let Some(address) = address else {
        return Ok(());
    };
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("listen on {address}"))?;
    let serve = async {
        loop {
            // One after the other: whoever probes is alone.
            match listener.accept().await {
                Ok((stream, _)) => {
                    let well = *accepted.borrow() != Some(false);
                    let _ = tokio::time::timeout(PROBE_LIMIT, answer_probe(stream, well)).await;
                }
                Err(error) => tracing::warn!(%error, "A probe did not come through"),
            }
        }
    };
    tokio::select! {
        // Nothing is lost when it is dropped: a probe comes again.
        () = serve => {}
        () = stop => {}
    }
    Ok(())
}

async fn answer_probe(mut stream: TcpStream, well: bool) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") && request.len() < MAX_PROBE_BYTES {
        if stream.read_buf(&mut request).await? == 0 {
            break;
        }
    }
    let (status, body) = match (request.starts_with(b"GET /healthz "), well) {
        (true, true) => ("200 OK", "ok"),
        (true, false) => ("503 Service Unavailable", "the kubelet refused this driver"),
        (false, _) => ("404 Not Found", "only /healthz"),
    };
    let length = body.len();
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    );
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}
