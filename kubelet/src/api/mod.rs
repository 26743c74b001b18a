//! Our way to the apiserver: clients that carry the node's certificate and nothing else.
//!
//! Two [`kube::Client`]s with pools of their own, so that a Lease never waits behind a hundred
//! status patches. HTTP/1.1 with a connection per request in flight and per watch. Certificate,
//! key and CA bundle are taken from their files at each handshake (see [`reload`]); a bad or
//! missing one means that requests fail and are tried again, never that the agent ends.
//! No task is started here. Forbidden: any other credential, and calls without a time limit
//! (kube has none of its own: use [`within`]).

pub mod endpoint;
mod late;
mod pool;
pub mod reload;
pub mod tls;

use crate::config::Config;
use endpoint::{Endpoint, KubeconfigError};
use hyper_rustls::{FixedServerNameResolver, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use kube::Client;
use kube::client::ClientBuilder;
use kube::client::middleware::BaseUriLayer;
use pool::FreshPool;
use reload::Reloading;
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::ServerName;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tls::Identity;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Longest time for a TCP connection to come up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Unacknowledged data is given up after this long, so that a dead link ends its watches.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);
/// First and longest wait between looks at a kubeconfig that cannot be used.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LONGEST: Duration = Duration::from_secs(30);
/// The usual limit of one request.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The kubeconfig.
    #[error(transparent)]
    Kubeconfig(#[from] KubeconfigError),
    /// TLS cannot be set up.
    #[error("set up TLS towards the apiserver: {0}")]
    Tls(String),
}

/// Clients of this node.
#[derive(Clone)]
pub struct Clients {
    /// For everything but heartbeats.
    pub main: Client,
    /// For the Lease and the Node's status.
    pub heartbeat: Client,
    /// Who we are.
    pub credentials: Credentials,
}

impl std::fmt::Debug for Clients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clients")
            .field("credentials", &self.credentials)
            .finish_non_exhaustive()
    }
}

/// The node's certificate and where it is shown, for explaining refusals.
#[derive(Debug, Clone)]
pub struct Credentials {
    node: String,
    /// What the kubeconfig says; empty while there is none that can be used.
    known: Arc<OnceLock<Known>>,
    /// The certificate's problem that was logged last; shared, so that it is logged once.
    complained: Arc<Mutex<Option<String>>>,
}

/// What a kubeconfig says.
#[derive(Debug, Clone)]
struct Known {
    server: String,
    place: String,
    identity: Arc<Reloading<Identity>>,
}

impl Credentials {
    /// What is wrong with our certificate, if anything is.
    pub fn problem(&self) -> Option<String> {
        let known = self.known.get()?;
        if let Some(problem) = known.identity.problem() {
            return Some(format!("the node certificate cannot be used: {problem}"));
        }
        let identity = known.identity.get()?;
        let now = jiff::Timestamp::now().as_second();
        let objection = tls::objection(&identity, &self.node, now)?;
        Some(format!(
            "the node certificate {} cannot be used: {objection}",
            known.place
        ))
    }

    /// Seconds until our certificate ends, negative when it has; none while there is none.
    pub fn ttl_s(&self) -> Option<i64> {
        let identity = self.known.get()?.identity.get()?;
        Some(identity.not_after - jiff::Timestamp::now().as_second())
    }

    /// Logs why `doing` ("renew the node lease") failed, once per reason: `said` is what this
    /// caller said last; trouble with the certificate is said once for all callers.
    pub fn complain(&self, doing: &str, error: &kube::Error, said: &mut String) {
        let problem = self.problem();
        let known = {
            let mut last = self
                .complained
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *last, problem.clone()) == problem
        };
        match problem {
            Some(_) if known => {}
            Some(problem) => warn!("Waiting for a certificate: {problem}"),
            None => {
                let why = self.explain(error);
                if why != *said {
                    warn!("Cannot {doing}: {why}");
                    *said = why;
                }
            }
        }
    }

    /// Why a request failed, in one line that names what a person can mend.
    pub fn explain(&self, error: &kube::Error) -> String {
        if let Some(problem) = self.problem() {
            return problem;
        }
        let Some(known) = self.known.get() else {
            return crate::errors::chain(error);
        };
        match error {
            kube::Error::Api(status) if status.code == 401 => {
                let identity = known.identity.get();
                let (user, issuer) = identity
                    .map(|i| (i.user.clone(), i.issuer.clone()))
                    .unwrap_or_default();
                format!(
                    "{} does not accept the node certificate {} (CN={user:?}, issued by {issuer:?}): \
                     is it from this cluster's CA?",
                    known.server, known.place
                )
            }
            kube::Error::Api(status) => status.message.clone(),
            other => {
                let text = crate::errors::chain(other);
                let text = text.trim_start_matches("ServiceError: ");
                format!("{}: {text}", known.server)
            }
        }
    }
}

/// Limits a request in time; a late one is an error like any other.
pub async fn within<T>(
    limit: Duration,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, kube::Error> {
    match tokio::time::timeout(limit, request).await {
        Ok(result) => result,
        Err(_) => Err(kube::Error::Service(
            format!("no answer within {} s", limit.as_secs()).into(),
        )),
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn build(
    endpoint: &Endpoint,
    tls: rustls::ClientConfig,
    identity: Arc<Reloading<Identity>>,
) -> Result<Client, ApiError> {
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_nodelay(true);
    http.set_connect_timeout(Some(CONNECT_TIMEOUT));
    http.set_keepalive(Some(Duration::from_secs(15)));
    http.set_keepalive_interval(Some(Duration::from_secs(5)));
    http.set_keepalive_retries(Some(3));
    http.set_tcp_user_timeout(Some(TCP_USER_TIMEOUT));
    let name = match endpoint.server_name.as_str() {
        "" => None,
        name => Some(
            ServerName::try_from(name.to_owned())
                .map_err(|e| ApiError::Tls(format!("tls-server-name {name:?}: {e}")))?,
        ),
    };
    let connect = move || {
        let mut tls = tls.clone();
        tls.resumption = Resumption::default();
        let builder = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_only();
        let builder = match &name {
            None => builder,
            Some(name) => {
                builder.with_server_name_resolver(FixedServerNameResolver::new(name.clone()))
            }
        };
        builder.enable_http1().wrap_connector(http.clone())
    };
    let client = FreshPool::new(connect, identity);
    let service = tower::ServiceBuilder::new()
        .layer(BaseUriLayer::new(endpoint.server.clone()))
        .service(client);
    Ok(ClientBuilder::new(service, "default").build())
}

/// Makes the clients. Reads the kubeconfig only; nothing is sent.
pub fn connect(config: &Config) -> Result<Clients, ApiError> {
    let endpoint = endpoint::read(&config.kubeconfig)?;
    let identity = Arc::new(tls::node_identity(&endpoint, provider()));
    let tls = tls::client_config(&endpoint, Arc::clone(&identity), provider())
        .map_err(|e| ApiError::Tls(e.to_string()))?;
    Ok(Clients {
        main: build(&endpoint, tls.clone(), Arc::clone(&identity))?,
        heartbeat: build(&endpoint, tls, Arc::clone(&identity))?,
        credentials: Credentials {
            node: config.node_name.clone(),
            known: Arc::new(OnceLock::from(Known {
                server: endpoint.server.to_string(),
                place: endpoint.certificate.to_string(),
                identity,
            })),
            complained: Arc::default(),
        },
    })
}

/// Clients that can be used at once, whatever there is of an apiserver.
#[derive(Debug)]
pub struct Opened {
    /// The clients. Until there is a kubeconfig that can be used, every request fails at once.
    pub clients: Clients,
    /// Waits for such a kubeconfig, when it is missing.
    pub waiting: Option<Waiting>,
}

/// The wait for a kubeconfig.
#[derive(Debug)]
pub struct Waiting {
    main: late::Slot,
    heartbeat: late::Slot,
    credentials: Credentials,
}

impl Waiting {
    /// Waits until the clients can be used, or until told to stop.
    pub async fn run(self, config: Arc<Config>, stop: CancellationToken) {
        let Some(clients) = connect_when_possible(&config, &stop).await else {
            return;
        };
        if let Some(known) = clients.credentials.known.get() {
            let _ = self.credentials.known.set(known.clone());
        }
        self.main.fill(clients.main);
        self.heartbeat.fill(clients.heartbeat);
    }
}

/// Makes the clients without waiting for anything: static pods must run before there is an
/// apiserver, or without one. Needs a tokio runtime.
pub fn open(config: &Config) -> Opened {
    let why = if config.is_standalone() {
        "this node runs without an apiserver (no --kubeconfig)"
    } else if let Ok(clients) = connect(config) {
        return Opened {
            clients,
            waiting: None,
        };
    } else {
        "there is no kubeconfig that can be used yet"
    };
    let (main, main_slot) = late::client(why);
    let (heartbeat, heartbeat_slot) = late::client(why);
    let credentials = Credentials {
        node: config.node_name.clone(),
        known: Arc::default(),
        complained: Arc::default(),
    };
    let waiting = (!config.is_standalone()).then(|| Waiting {
        main: main_slot,
        heartbeat: heartbeat_slot,
        credentials: credentials.clone(),
    });
    Opened {
        clients: Clients {
            main,
            heartbeat,
            credentials,
        },
        waiting,
    }
}

/// One client of this node, with a pool of its own.
pub fn client(config: &Config) -> Result<Client, ApiError> {
    connect(config).map(|c| c.main)
}

/// Makes the clients, waiting for a kubeconfig that can be used. None when told to stop.
pub async fn connect_when_possible(config: &Config, stop: &CancellationToken) -> Option<Clients> {
    let mut said = String::new();
    let mut wait = RETRY_FIRST;
    loop {
        match connect(config) {
            Ok(clients) => {
                if !said.is_empty() {
                    info!("The kubeconfig can be used now");
                }
                return Some(clients);
            }
            Err(error) => {
                let text = error.to_string();
                if text != said {
                    warn!("Waiting for a kubeconfig: {text}");
                    said = text;
                }
            }
        }
        tokio::select! {
            () = stop.cancelled() => return None,
            () = tokio::time::sleep(wait) => wait = (wait * 2).min(RETRY_LONGEST),
        }
    }
}

#[cfg(test)]
mod tests;
