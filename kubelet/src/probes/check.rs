//! Asks a container once, by exec, HTTP, TCP or gRPC.

use super::{grpc, http};
use crate::launch::expand::expand_env;
use k8s_openapi::api::core::v1::{
    Container, ExecAction, GRPCAction, HTTPGetAction, Probe, TCPSocketAction,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use runtime::service::{ContainerId, RuntimeErrorKind, RuntimeService};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;

/// How much of an answer is kept for events and messages.
pub const MAX_ANSWER_BYTES: usize = 10 * 1024;

/// What one probe found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Good or bad.
    pub success: bool,
    /// The probe could not be made at all: says nothing about the container.
    pub errored: bool,
    /// Good, but somebody should look (`ProbeWarning`).
    pub warning: bool,
    /// What it said.
    pub message: String,
}

impl Outcome {
    pub(super) fn good(message: impl Into<String>) -> Self {
        Self {
            success: true,
            errored: false,
            warning: false,
            message: message.into(),
        }
    }

    pub(super) fn warned(message: impl Into<String>) -> Self {
        Self {
            warning: true,
            ..Self::good(message)
        }
    }

    pub(super) fn bad(message: impl Into<String>) -> Self {
        Self {
            success: false,
            errored: false,
            warning: false,
            message: message.into(),
        }
    }

    fn error(message: impl Into<String>) -> Self {
        Self {
            success: false,
            errored: true,
            warning: false,
            message: message.into(),
        }
    }
}

/// How asking for a hook went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HttpReach {
    /// Somebody answered.
    Answered,
    /// This host speaks no TLS.
    NoTls(String),
    /// Nobody answered, and why.
    Failed(String),
}

/// Whom to ask, and how long to wait.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// The container.
    pub container_id: &'a ContainerId,
    /// Its specification (for port names).
    pub container: &'a Container,
    /// Where to connect when the probe names no host.
    pub pod_ip: Option<IpAddr>,
    /// timeoutSeconds.
    pub timeout: Duration,
}

/// Makes probes.
#[derive(Debug)]
pub struct Checker<R> {
    runtime: Arc<R>,
}

impl<R: RuntimeService> Checker<R> {
    /// A checker that runs exec probes through `runtime`.
    pub fn new(runtime: Arc<R>) -> Self {
        Self { runtime }
    }

    /// Asks once. Never takes much longer than the target's timeout.
    pub async fn check(&self, probe: &Probe, target: &Target<'_>) -> Outcome {
        if let Some(exec) = &probe.exec {
            return self.exec(exec, target).await;
        }
        let asked = async {
            if let Some(action) = &probe.http_get {
                let (host, port) = address(action.host.as_deref(), &action.port, target)?;
                Ok(http::get(action, &host, port).await)
            } else if let Some(action) = &probe.tcp_socket {
                tcp(action, target).await
            } else if let Some(action) = &probe.grpc {
                grpc_check(action, target).await
            } else {
                Err("no exec, httpGet, tcpSocket or grpc action given".to_owned())
            }
        };
        match tokio::time::timeout(target.timeout, asked).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(message)) => Outcome::error(message),
            Err(_) => Outcome::bad(timed_out(probe, target)),
        }
    }

    /// Asks over HTTP for a hook, which cares for an answer only.
    pub async fn reach(&self, action: &HTTPGetAction, target: &Target<'_>) -> HttpReach {
        let asked = async {
            let (host, port) = address(action.host.as_deref(), &action.port, target)?;
            match http::ask(action, &host, port, http::Asker::Hook).await {
                Ok(_) => Ok(HttpReach::Answered),
                Err(e) if e.no_tls => Ok(HttpReach::NoTls(authority(&host, port))),
                Err(e) => Err(e.message),
            }
        };
        match tokio::time::timeout(target.timeout, asked).await {
            Ok(Ok(reach)) => reach,
            Ok(Err(message)) => HttpReach::Failed(message),
            Err(_) => HttpReach::Failed("context deadline exceeded".to_owned()),
        }
    }

    /// Runs the command of a probe, with the container's literal environment expanded in it.
    async fn exec(&self, action: &ExecAction, target: &Target<'_>) -> Outcome {
        let env: Vec<(String, String)> =
            target
                .container
                .env
                .iter()
                .flatten()
                .fold(Vec::new(), |mut all, variable| {
                    let value = variable.value.clone().unwrap_or_default();
                    all.push((variable.name.clone(), value));
                    all
                });
        let words = action.command.iter().flatten();
        self.run(words.map(|w| expand_env(w, &env)).collect(), target)
            .await
    }

    /// Runs a command as it is given.
    pub async fn run(&self, command: Vec<String>, target: &Target<'_>) -> Outcome {
        let shown = command.join(" ");
        let run = self.runtime.exec_sync(
            target.container_id,
            command,
            target.timeout,
            MAX_ANSWER_BYTES,
        );
        match run.await {
            Ok(done) => {
                let mut bytes = done.stdout;
                bytes.extend_from_slice(&done.stderr);
                bytes.truncate(MAX_ANSWER_BYTES);
                let text = String::from_utf8_lossy(&bytes).into_owned();
                if done.exit_code == 0 {
                    Outcome::good(text)
                } else {
                    Outcome::bad(text)
                }
            }
            Err(e) => match e.kind {
                RuntimeErrorKind::Timeout => Outcome::bad(format!(
                    "command timed out: {shown:?} timed out after {}s",
                    target.timeout.as_secs()
                )),
                // A program that is missing says nothing about the container, as people know it.
                RuntimeErrorKind::StartFailed
                | RuntimeErrorKind::Invalid
                | RuntimeErrorKind::NotFound
                | RuntimeErrorKind::Network
                | RuntimeErrorKind::ImagePull
                | RuntimeErrorKind::Conflict
                | RuntimeErrorKind::System => Outcome::error(e.to_string()),
            },
        }
    }
}

fn timed_out(probe: &Probe, target: &Target<'_>) -> String {
    let seconds = target.timeout.as_secs();
    if probe.grpc.is_some() {
        return format!("timeout: health rpc did not complete within {seconds}s");
    }
    if let Some(action) = &probe.tcp_socket {
        return match address(action.host.as_deref(), &action.port, target) {
            Ok((host, port)) => format!("dial tcp {}: i/o timeout", authority(&host, port)),
            Err(e) => e,
        };
    }
    let Some(action) = &probe.http_get else {
        return format!("timed out after {seconds}s");
    };
    let scheme = action.scheme.as_deref().unwrap_or("HTTP").to_lowercase();
    let path = action.path.as_deref().unwrap_or("/");
    match address(action.host.as_deref(), &action.port, target) {
        Ok((host, port)) => format!(
            "Get \"{scheme}://{}{path}\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)",
            authority(&host, port)
        ),
        Err(e) => e,
    }
}

/// `host:port`, with brackets around an IPv6 address.
pub(super) fn authority(host: &str, port: u16) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

/// Where a probe goes: its own host or the pod, and a port by number or name.
fn address(
    host: Option<&str>,
    port: &IntOrString,
    target: &Target<'_>,
) -> Result<(String, u16), String> {
    let port = resolve_port(port, target.container)?;
    let host = match host.filter(|h| !h.is_empty()) {
        Some(host) => host.to_owned(),
        None => target
            .pod_ip
            .ok_or("the pod has no IP address yet")?
            .to_string(),
    };
    Ok((host, port))
}

/// A port by number, by the name of a container port, or by a number written as text.
fn resolve_port(port: &IntOrString, container: &Container) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(n) => *n,
        IntOrString::String(name) => {
            let mut ports = container.ports.iter().flatten();
            let named = ports.find(|p| p.name.as_deref() == Some(name.as_str()));
            match named {
                Some(port) => port.container_port,
                None => name
                    .parse()
                    .map_err(|_| format!("strconv.Atoi: parsing {name:?}: invalid syntax"))?,
            }
        }
    };
    u16::try_from(number)
        .ok()
        .filter(|n| *n > 0)
        .ok_or_else(|| format!("invalid port number: {number}"))
}

async fn tcp(action: &TCPSocketAction, target: &Target<'_>) -> Result<Outcome, String> {
    let (host, port) = address(action.host.as_deref(), &action.port, target)?;
    Ok(match TcpStream::connect((host.as_str(), port)).await {
        Ok(_) => Outcome::good(""),
        Err(e) => Outcome::bad(format!(
            "dial tcp {}: {}",
            authority(&host, port),
            dial_error(&e)
        )),
    })
}

/// The words Go programs use for the common connect failures; people grep for them.
pub(super) fn dial_error(e: &std::io::Error) -> String {
    match e.kind() {
        std::io::ErrorKind::ConnectionRefused => "connect: connection refused".to_owned(),
        std::io::ErrorKind::HostUnreachable => "connect: no route to host".to_owned(),
        std::io::ErrorKind::NetworkUnreachable => "connect: network is unreachable".to_owned(),
        std::io::ErrorKind::ConnectionReset => "read: connection reset by peer".to_owned(),
        _ => e.to_string(),
    }
}

async fn grpc_check(action: &GRPCAction, target: &Target<'_>) -> Result<Outcome, String> {
    let port = u16::try_from(action.port).map_err(|_| format!("invalid port {}", action.port))?;
    let host = target
        .pod_ip
        .ok_or("the pod has no IP address yet")?
        .to_string();
    let service = action.service.as_deref().unwrap_or_default();
    Ok(grpc::health(&host, port, service, target.timeout).await)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ContainerPort;

    #[test]
    fn ports_are_found_by_number_name_and_text() {
        let container = Container {
            name: "web".to_owned(),
            ports: Some(vec![ContainerPort {
                name: Some("http".to_owned()),
                container_port: 8080,
                ..ContainerPort::default()
            }]),
            ..Container::default()
        };
        let text = |s: &str| IntOrString::String(s.to_owned());
        assert_eq!(resolve_port(&IntOrString::Int(80), &container), Ok(80));
        assert_eq!(resolve_port(&text("http"), &container), Ok(8080));
        assert_eq!(resolve_port(&text("81"), &container), Ok(81));
        assert_eq!(
            resolve_port(&text("https"), &container),
            Err("strconv.Atoi: parsing \"https\": invalid syntax".to_owned())
        );
        assert!(resolve_port(&IntOrString::Int(70000), &container).is_err());
        assert!(resolve_port(&IntOrString::Int(0), &container).is_err());
    }

    #[test]
    fn ipv6_hosts_are_bracketed() {
        assert_eq!(authority("fd00::1", 80), "[fd00::1]:80");
        assert_eq!(authority("10.0.0.1", 80), "10.0.0.1:80");
    }
}
