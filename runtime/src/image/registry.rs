//! Asking registries: which endpoints, with which credentials, in which order, how often.
//!
//! An image's registry is reached through its configured mirrors first, then itself. For each
//! endpoint the credentials are tried in order. Failures that may pass are retried with
//! back-off; a definite answer ("no such image") beats "could not connect" in the error told.

use super::error::{ImageError, Result};
use super::layer::digest_of;
use super::reference::Reference;
use crate::error::chain;
use crate::service::RegistryAuth;
use futures::StreamExt as _;
use oci_client::client::{BlobResponse, ClientConfig, ClientProtocol};
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::manifest::{self, OciDescriptor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How registries are reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RegistryConfig {
    /// Registry host → mirrors asked before it, in order (`http://host:port[/path]`, `https://…`,
    /// or plain `host:port`, which is https unless listed in `insecure`). `*` is for registries
    /// without an entry of their own.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// `host:port` of registries spoken to by plain HTTP. Those on a loopback address are in any
    /// case, unless their port is 443 or a mirror says `https://`.
    pub insecure: Vec<String>,
    /// Never ask the registry itself when it has mirrors.
    pub only_mirrors: bool,
}

/// One place to ask.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Endpoint {
    /// `host[:port]`.
    pub(crate) host: String,
    /// Prefix of the repository, without outer slashes; mostly empty.
    pub(crate) path: String,
    /// Plain HTTP.
    pub(crate) plain: bool,
    /// Whether it stands in for another registry.
    pub(crate) mirror: bool,
}

impl RegistryConfig {
    /// Where to ask for images of `registry`, in order.
    pub(crate) fn endpoints(&self, registry: &str) -> Vec<Endpoint> {
        let mirrors = self.mirrors.get(registry).or_else(|| self.mirrors.get("*"));
        let mut endpoints: Vec<Endpoint> = mirrors
            .into_iter()
            .flatten()
            .map(|m| self.endpoint(m, true))
            .collect();
        if endpoints.is_empty() || !self.only_mirrors {
            let own = self.endpoint(registry, false);
            if !endpoints
                .iter()
                .any(|e| e.host == own.host && e.path.is_empty())
            {
                endpoints.push(own);
            }
        }
        endpoints
    }

    fn endpoint(&self, text: &str, mirror: bool) -> Endpoint {
        let (scheme, rest) = match text.split_once("://") {
            Some((scheme, rest)) => (Some(scheme), rest),
            None => (None, text),
        };
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let plain = match scheme {
            Some(scheme) => scheme == "http",
            None => is_loopback(host) || self.insecure.iter().any(|i| i == host),
        };
        let path = path.trim_matches('/').to_owned();
        Endpoint {
            host: host.to_owned(),
            path,
            plain,
            mirror,
        }
    }
}

/// Whether a registry, as `host[:port]`, is on the node itself and has no port that promises TLS:
/// such registries have no certificate anybody would trust.
fn is_loopback(host: &str) -> bool {
    if let Ok(address) = host.parse::<std::net::SocketAddr>() {
        return address.ip().is_loopback() && address.port() != 443;
    }
    let (name, port) = host.rsplit_once(':').unwrap_or((host, "80"));
    let address = || host.parse::<std::net::IpAddr>().or_else(|_| name.parse());
    (name == "localhost" || address().is_ok_and(|ip| ip.is_loopback())) && port != "443"
}

/// What a manifest request is answered with.
#[derive(Debug, Clone)]
pub(crate) struct Manifest {
    /// The manifest of the image for this platform.
    pub(crate) manifest: manifest::OciImageManifest,
    /// Its digest.
    pub(crate) digest: String,
    /// Digest of the index that named it, when there was one.
    pub(crate) index_digest: Option<String>,
}

/// Where an image was found: blobs are fetched from the same place.
#[derive(Clone)]
pub(crate) struct Source {
    client: oci_client::Client,
    reference: Reference,
    endpoint: Endpoint,
    image: String,
}

/// Clients by endpoint and credentials: connections and tokens are reused. Bounded, since
/// credentials come and go.
#[derive(Default)]
pub(crate) struct Registries {
    config: RegistryConfig,
    clients: Mutex<Vec<(Endpoint, RegistryAuth, oci_client::Client)>>,
}

/// More than a node's registries times credentials.
const MAX_CLIENTS: usize = 32;
/// Tries of one request; with the pauses below this spans about a second. The kubelet's own
/// back-off goes on from there.
const TRIES: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// For endpoints after one that answered "not found".
const SECOND_OPINION: Duration = Duration::from_secs(5);
/// Real manifests and configurations stay below 1 MiB; registries refuse more than 4.
const MAX_CONFIG_BYTES: usize = 8 << 20;

impl Registries {
    pub(crate) fn new(config: RegistryConfig) -> Self {
        Self {
            config,
            clients: Mutex::default(),
        }
    }

    fn client(&self, endpoint: &Endpoint, auth: &RegistryAuth) -> Result<oci_client::Client> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(i) = clients
            .iter()
            .position(|(e, a, _)| e == endpoint && a == auth)
        {
            let found = clients.remove(i);
            clients.push(found.clone());
            return Ok(found.2);
        }
        let client = new_client(endpoint)?;
        if clients.len() == MAX_CLIENTS {
            clients.remove(0);
        }
        clients.push((endpoint.clone(), auth.clone(), client.clone()));
        Ok(client)
    }

    /// Finds the manifest of `name`; also says which of the credentials were taken.
    pub(crate) async fn manifest(
        &self,
        name: &Reference,
        auths: &[RegistryAuth],
    ) -> Result<(Source, Manifest, Option<usize>)> {
        let anonymous = [RegistryAuth::Anonymous];
        let given = !auths.is_empty();
        let auths = if given { auths } else { &anonymous };
        let mut told: Option<ImageError> = None;
        for endpoint in self.config.endpoints(name.registry()) {
            for (index, auth) in auths.iter().enumerate() {
                let source = self.source(name, &endpoint, auth)?;
                // After a mirror's clear "not found" the rest gets one quick chance: where
                // only mirrors can be reached, users shall not wait for time-outs.
                let answer = match told {
                    Some(ImageError::NotFound { .. }) => {
                        tokio::time::timeout(SECOND_OPINION, source.manifest(auth))
                            .await
                            .unwrap_or_else(|_| Err(source.silent()))
                    }
                    _ => retry(|| source.manifest(auth)).await,
                };
                let error = match answer {
                    Ok(manifest) => return Ok((source, manifest, given.then_some(index))),
                    Err(error) => error,
                };
                let refused = matches!(error, ImageError::Unauthorized { .. });
                if told.as_ref().is_none_or(|t| weight(&error) >= weight(t)) {
                    told = Some(error);
                }
                // Other credentials help only against a refusal.
                if !refused {
                    break;
                }
            }
        }
        Err(told.unwrap_or_else(|| ImageError::Registry {
            image: name.whole(),
            endpoint: name.registry().to_owned(),
            message: "no endpoint is configured".to_owned(),
            transient: false,
        }))
    }

    fn source(&self, name: &Reference, endpoint: &Endpoint, auth: &RegistryAuth) -> Result<Source> {
        let repository = match endpoint.path.as_str() {
            "" => name.repository().to_owned(),
            path => format!("{path}/{}", name.repository()),
        };
        let registry = name.registry().to_owned();
        let mut reference = match (name.digest(), name.tag()) {
            (Some(digest), _) => Reference::with_digest(registry, repository, digest.to_owned()),
            (None, tag) => {
                Reference::with_tag(registry, repository, tag.unwrap_or("latest").to_owned())
            }
        };
        if endpoint.mirror {
            reference.set_mirror_registry(endpoint.host.clone());
        }
        Ok(Source {
            client: self.client(endpoint, auth)?,
            reference,
            endpoint: endpoint.clone(),
            image: name.whole(),
        })
    }
}

/// Which of two errors helps the user more.
fn weight(error: &ImageError) -> u8 {
    match error {
        ImageError::Registry {
            transient: true, ..
        } => 0,
        ImageError::Registry {
            transient: false, ..
        } => 1,
        ImageError::Unauthorized { .. } => 2,
        ImageError::NotFound { .. } => 3,
        ImageError::InvalidName { .. }
        | ImageError::NotStored(_)
        | ImageError::Ambiguous(_)
        | ImageError::Digest { .. }
        | ImageError::Unusable { .. }
        | ImageError::Unpack { .. }
        | ImageError::InUse(_)
        | ImageError::Cancelled(_)
        | ImageError::Io { .. } => 4,
    }
}

fn new_client(endpoint: &Endpoint) -> Result<oci_client::Client> {
    let config = ClientConfig {
        protocol: if endpoint.plain {
            ClientProtocol::Http
        } else {
            ClientProtocol::Https
        },
        // A plain endpoint needs no roots; loading them fails on nodes without any.
        accept_invalid_certificates: endpoint.plain,
        platform_resolver: Some(Box::new(oci_client::client::linux_amd64_resolver)),
        connect_timeout: Some(Duration::from_secs(10)),
        // Between two pieces of an answer, not for all of it.
        read_timeout: Some(Duration::from_secs(60)),
        user_agent: concat!("ferrule/", env!("CARGO_PKG_VERSION")),
        ..ClientConfig::default()
    };
    oci_client::Client::try_from(config).map_err(|e| ImageError::Registry {
        image: String::new(),
        endpoint: endpoint.host.clone(),
        message: chain(&e),
        transient: false,
    })
}

fn wire_auth(auth: &RegistryAuth) -> oci_client::secrets::RegistryAuth {
    use oci_client::secrets::RegistryAuth as Wire;
    match auth {
        RegistryAuth::Anonymous => Wire::Anonymous,
        RegistryAuth::Basic { username, password } => {
            Wire::Basic(username.clone(), password.clone())
        }
        RegistryAuth::Token(token) => Wire::Bearer(token.clone()),
    }
}

/// Repeats what failed transiently.
async fn retry<T, F: Future<Output = Result<T>>>(mut once: impl FnMut() -> F) -> Result<T> {
    let mut pause = FIRST_PAUSE;
    for _ in 1..TRIES {
        match once().await {
            Err(error) if error.transient() => {
                tracing::debug!(error = chain(&error), "retrying");
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
            done => return done,
        }
    }
    once().await
}

impl Source {
    fn fail(&self, error: OciDistributionError) -> ImageError {
        classify(&self.image, &self.endpoint.host, error)
    }

    async fn manifest(&self, auth: &RegistryAuth) -> Result<Manifest> {
        let auth = wire_auth(auth);
        // Asked for explicitly: on its own the client drops a refusal to give a token and goes
        // on without.
        self.client
            .auth(&self.reference, &auth, oci_client::RegistryOperation::Pull)
            .await
            .map_err(|e| self.fail(e))?;
        let (manifest, digest, index_digest) = self
            .client
            .pull_image_manifest_and_list_digest(&self.reference, &auth)
            .await
            .map_err(|e| self.fail(e))?;
        Ok(Manifest {
            manifest,
            digest,
            index_digest,
        })
    }

    /// It did not answer in time.
    fn silent(&self) -> ImageError {
        ImageError::Registry {
            image: self.image.clone(),
            endpoint: self.endpoint.host.clone(),
            message: "no answer".to_owned(),
            transient: true,
        }
    }

    /// A small blob, verified.
    pub(crate) async fn blob(&self, descriptor: &OciDescriptor, what: &str) -> Result<Vec<u8>> {
        let bytes = retry(async || {
            let mut stream = self.stream(descriptor, 0).await?;
            let mut bytes = Vec::new();
            while let Some(chunk) = stream.next().await {
                bytes.extend_from_slice(&chunk.map_err(|e| self.broken(&e))?);
                if bytes.len() > MAX_CONFIG_BYTES {
                    let reason = format!("larger than {MAX_CONFIG_BYTES} bytes");
                    return Err(ImageError::Unusable {
                        what: what.to_owned(),
                        reason,
                    });
                }
            }
            Ok(bytes)
        })
        .await?;
        let actual = digest_of(&bytes);
        if actual != descriptor.digest {
            let expected = descriptor.digest.clone();
            return Err(ImageError::Digest {
                what: what.to_owned(),
                expected,
                actual,
            });
        }
        Ok(bytes)
    }

    /// The blob's bytes from `offset` on. Not verified.
    pub(crate) async fn stream(
        &self,
        descriptor: &OciDescriptor,
        offset: u64,
    ) -> Result<futures::stream::BoxStream<'static, std::io::Result<bytes::Bytes>>> {
        let answer = self
            .client
            .pull_blob_stream_partial(&self.reference, descriptor, offset, None)
            .await
            .map_err(|e| self.fail(e))?;
        Ok(match answer {
            BlobResponse::Partial(sized) => sized.stream,
            // The registry does not do ranges: skip what we have.
            BlobResponse::Full(sized) => skip(sized.stream, offset),
        })
    }

    /// A stream that broke; fetching on from there may succeed.
    pub(crate) fn broken(&self, error: &std::io::Error) -> ImageError {
        ImageError::Registry {
            image: self.image.clone(),
            endpoint: self.endpoint.host.clone(),
            message: chain(error),
            transient: true,
        }
    }
}

fn skip(
    stream: futures::stream::BoxStream<'static, std::io::Result<bytes::Bytes>>,
    offset: u64,
) -> futures::stream::BoxStream<'static, std::io::Result<bytes::Bytes>> {
    let mut left = offset;
    let rest = stream.map(move |chunk| {
        chunk.map(|mut bytes| {
            let cut = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
            left -= cut as u64;
            bytes.split_off(cut)
        })
    });
    rest.boxed()
}

/// Sorts the client's errors by what can be done about them.
fn classify(image: &str, endpoint: &str, error: OciDistributionError) -> ImageError {
    let (image, endpoint) = (image.to_owned(), endpoint.to_owned());
    let message = chain(&error);
    let transient = match error {
        OciDistributionError::UnauthorizedError { .. }
        | OciDistributionError::AuthenticationFailure(_) => {
            return ImageError::Unauthorized {
                image,
                endpoint,
                message,
            };
        }
        OciDistributionError::RegistryError { envelope, .. } => {
            let has =
                |codes: &[OciErrorCode]| envelope.errors.iter().any(|e| codes.contains(&e.code));
            let words: Vec<String> = envelope.errors.iter().map(|e| e.message.clone()).collect();
            let message = words.join("; ");
            if has(&[OciErrorCode::Unauthorized, OciErrorCode::Denied]) {
                return ImageError::Unauthorized {
                    image,
                    endpoint,
                    message,
                };
            }
            if has(&[
                OciErrorCode::ManifestUnknown,
                OciErrorCode::NameUnknown,
                OciErrorCode::NotFound,
                OciErrorCode::BlobUnknown,
                OciErrorCode::ManifestBlobUnknown,
            ]) {
                return ImageError::NotFound {
                    image,
                    endpoint,
                    message,
                };
            }
            let transient = has(&[OciErrorCode::Toomanyrequests]);
            return ImageError::Registry {
                image,
                endpoint,
                message,
                transient,
            };
        }
        OciDistributionError::ServerError { code: 404, .. }
        | OciDistributionError::ImageManifestNotFoundError(_) => {
            return ImageError::NotFound {
                image,
                endpoint,
                message,
            };
        }
        OciDistributionError::ServerError {
            code: 401 | 403, ..
        } => {
            return ImageError::Unauthorized {
                image,
                endpoint,
                message,
            };
        }
        OciDistributionError::ServerError { code, .. } => code >= 500 || code == 429 || code == 408,
        OciDistributionError::RequestError(_) | OciDistributionError::IoError(_) => true,
        // The rest are answers that will not change: bad digests, media types, manifests.
        _ => false,
    };
    ImageError::Registry {
        image,
        endpoint,
        message,
        transient,
    }
}

/// Shared by all pulls of a process.
pub(crate) type SharedRegistries = Arc<Registries>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_come_before_the_registry_itself_and_wildcards_count() {
        let config = RegistryConfig {
            mirrors: BTreeMap::from([
                (
                    "registry.k8s.io".to_owned(),
                    vec!["http://10.0.0.1:5000".to_owned()],
                ),
                (
                    "*".to_owned(),
                    vec!["https://proxy/hub".to_owned(), "b:1".to_owned()],
                ),
            ]),
            insecure: vec!["b:1".to_owned()],
            only_mirrors: false,
        };
        let hosts = |registry| -> Vec<_> {
            let endpoints = config.endpoints(registry);
            endpoints
                .into_iter()
                .map(|e| (e.host, e.path, e.plain, e.mirror))
                .collect()
        };
        let e = |h: &str, p: &str, plain, mirror| (h.to_owned(), p.to_owned(), plain, mirror);
        assert_eq!(
            hosts("registry.k8s.io"),
            [
                e("10.0.0.1:5000", "", true, true),
                e("registry.k8s.io", "", false, false)
            ]
        );
        assert_eq!(
            hosts("docker.io"),
            [
                e("proxy", "hub", false, true),
                e("b:1", "", true, true),
                e("docker.io", "", false, false)
            ]
        );
        assert_eq!(hosts("b:1").len(), 2);
    }

    #[test]
    fn registries_on_the_node_itself_are_asked_by_plain_http() {
        let config = RegistryConfig::default();
        for (registry, plain) in [
            ("localhost:5000", true),
            ("localhost", true),
            ("127.0.0.1:5000", true),
            ("[::1]:5000", true),
            ("localhost:443", false),
            ("localhost.example:5000", false),
            ("10.0.0.1:5000", false),
        ] {
            assert_eq!(config.endpoints(registry)[0].plain, plain, "{registry}");
        }
    }
}
