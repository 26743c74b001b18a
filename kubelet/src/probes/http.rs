//! HTTP probes: one GET on a fresh connection, redirects followed on the same host.

use super::check::{MAX_ANSWER_BYTES, Outcome, authority, dial_error};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::header::{ACCEPT, CONNECTION, HOST, HeaderName, HeaderValue, LOCATION, USER_AGENT};
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::HTTPGetAction;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::{Arc, OnceLock};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// Go's clients give up here too.
const MAX_REDIRECTS: usize = 10;

/// Who asks; servers see it as the user agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asker {
    /// A probe.
    Probe,
    /// A lifecycle hook.
    Hook,
}

impl Asker {
    fn user_agent(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            Self::Probe => "kube-probe/1.36",
            Self::Hook => "kube-lifecycle/1.36",
        })
    }
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NoAnswer {
    /// In the words people know from Go.
    pub(super) message: String,
    /// The server speaks plain HTTP where TLS was asked for.
    pub(super) no_tls: bool,
}

impl From<String> for NoAnswer {
    fn from(message: String) -> Self {
        Self {
            message,
            no_tls: false,
        }
    }
}

/// Probes once; the caller bounds the time.
pub(super) async fn get(action: &HTTPGetAction, host: &str, port: u16) -> Outcome {
    match ask(action, host, port, Asker::Probe).await {
        Ok(answer) => answer.outcome(),
        Err(error) => Outcome::bad(error.message),
    }
}

/// Asks once, following redirects on the same host; the caller bounds the time.
pub(super) async fn ask(
    action: &HTTPGetAction,
    host: &str,
    port: u16,
    asker: Asker,
) -> Result<Answer, NoAnswer> {
    let mut url = first_url(action, host, port);
    let mut first_host = None;
    for _ in 0..MAX_REDIRECTS {
        let uri: Uri = url
            .parse()
            .map_err(|e| NoAnswer::from(format!("parse \"{url}\": {e}")))?;
        let home = first_host.get_or_insert_with(|| uri.host().map(str::to_owned));
        let answer = fetch(action, &uri, asker).await.map_err(|e| NoAnswer {
            message: format!("Get \"{url}\": {}", e.message),
            ..e
        })?;
        let next = answer.location.as_deref().and_then(|l| resolve(&uri, l));
        match next {
            // Another host is not ours to ask.
            Some(next) if next.host().map(str::to_owned) == *home => url = next.to_string(),
            Some(_) | None => return Ok(answer),
        }
    }
    Err(format!("Get \"{url}\": stopped after {MAX_REDIRECTS} redirects").into())
}

/// Where a check begins. What may not stand in a URL is encoded.
fn first_url(action: &HTTPGetAction, host: &str, port: u16) -> String {
    let https = action
        .scheme
        .as_deref()
        .is_some_and(|s| s.eq_ignore_ascii_case("https"));
    let scheme = if https { "https" } else { "http" };
    let given = action.path.as_deref().unwrap_or_default();
    let slash = if given.starts_with('/') { "" } else { "/" };
    let mut path = String::with_capacity(given.len());
    for byte in given.bytes() {
        if byte.is_ascii_graphic() && !b"\"<>\\^`{|}".contains(&byte) {
            path.push(char::from(byte));
        } else {
            path.push_str(&format!("%{byte:02X}"));
        }
    }
    format!("{scheme}://{}{slash}{path}", authority(host, port))
}

/// A redirect's target, absolute or relative to where we are.
fn resolve(from: &Uri, location: &str) -> Option<Uri> {
    if let Ok(uri) = location.parse::<Uri>()
        && uri.scheme().is_some()
    {
        return Some(uri);
    }
    let base = format!("{}://{}", from.scheme_str()?, from.authority()?);
    let directory = from.path().rsplit_once('/').map_or("", |(dir, _)| dir);
    if location.starts_with('/') {
        format!("{base}{location}").parse().ok()
    } else {
        format!("{base}{directory}/{location}").parse().ok()
    }
}

/// What a server said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    status: u16,
    body: String,
    /// Where it sends us, if it is a redirect to be followed.
    location: Option<String>,
}

impl Answer {
    /// What a probe makes of it. The body of a failure is not shown to users.
    fn outcome(self) -> Outcome {
        match self.status {
            200..300 => Outcome::good(self.body),
            300..400 => Outcome::warned(format!(
                "Probe terminated redirects, Response body: {}",
                self.body
            )),
            status => Outcome::bad(format!("HTTP probe failed with statuscode: {status}")),
        }
    }
}

async fn fetch(action: &HTTPGetAction, uri: &Uri, asker: Asker) -> Result<Answer, NoAnswer> {
    let host = uri
        .host()
        .unwrap_or_default()
        .trim_matches(['[', ']'])
        .to_owned();
    let https = uri.scheme_str() == Some("https");
    let port = uri.port_u16().unwrap_or(if https { 443 } else { 80 });
    let stream = TcpStream::connect((host.as_str(), port))
        .await
        .map_err(|e| format!("dial tcp {}: {}", authority(&host, port), dial_error(&e)))?;
    if https {
        let name = ServerName::try_from(host).map_err(|e| e.to_string())?;
        let connector = tokio_rustls::TlsConnector::from(trusting_config());
        let tls = connector
            .connect(name, stream)
            .await
            .map_err(|e| tls_error(&e))?;
        exchange(tls, action, uri, asker).await
    } else {
        exchange(stream, action, uri, asker).await
    }
}

/// A failed handshake; a server that answers in plain text is told apart.
fn tls_error(error: &std::io::Error) -> NoAnswer {
    let inner = error
        .get_ref()
        .and_then(|e| e.downcast_ref::<rustls::Error>());
    let no_tls = matches!(
        inner,
        Some(rustls::Error::InvalidMessage(
            rustls::InvalidMessage::InvalidContentType
                | rustls::InvalidMessage::UnknownProtocolVersion
        ))
    );
    NoAnswer {
        message: if no_tls {
            "http: server gave HTTP response to HTTPS client".to_owned()
        } else {
            error.to_string()
        },
        no_tls,
    }
}

async fn exchange<S>(
    stream: S,
    action: &HTTPGetAction,
    uri: &Uri,
    asker: Asker,
) -> Result<Answer, NoAnswer>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut builder = hyper::client::conn::http1::Builder::new();
    // As Go spells header names; old servers look at the case.
    let handshake = builder
        .title_case_headers(true)
        .handshake(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.map_err(|e| e.to_string())?;
    let asked = async {
        let response = sender.send_request(request(action, uri, asker)?).await;
        answer(response.map_err(|e| e.to_string())?).await
    };
    // The connection only moves while it is polled; both end together, no task is left behind.
    tokio::pin!(asked, connection);
    tokio::select! {
        biased;
        done = &mut asked => Ok(done?),
        ended = &mut connection => match ended {
            Ok(()) => Ok(asked.await?),
            Err(e) => Err(e.to_string().into()),
        },
    }
}

fn request(
    action: &HTTPGetAction,
    uri: &Uri,
    asker: Asker,
) -> Result<Request<Empty<Bytes>>, String> {
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    let mut request = Request::get(path)
        .body(Empty::new())
        .map_err(|e| format!("bad request: {e}"))?;
    let headers = request.headers_mut();
    for header in action.http_headers.iter().flatten() {
        let name: HeaderName = header
            .name
            .parse()
            .map_err(|e| format!("header {:?}: {e}", header.name))?;
        let value = HeaderValue::from_str(&header.value)
            .map_err(|e| format!("header {:?}: {e}", header.name))?;
        headers.append(name, value);
    }
    if !headers.contains_key(HOST) {
        let host = uri.authority().map_or("", |a| a.as_str());
        headers.insert(
            HOST,
            HeaderValue::from_str(host).map_err(|e| e.to_string())?,
        );
    }
    headers.entry(USER_AGENT).or_insert(asker.user_agent());
    headers
        .entry(ACCEPT)
        .or_insert(HeaderValue::from_static("*/*"));
    // Given empty, they are not sent at all.
    for name in [USER_AGENT, ACCEPT] {
        if headers.get(&name).is_some_and(HeaderValue::is_empty) {
            headers.remove(&name);
        }
    }
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    Ok(request)
}

async fn answer(response: Response<hyper::body::Incoming>) -> Result<Answer, String> {
    let status = response.status();
    let location = response.headers().get(LOCATION);
    let location = location.and_then(|l| l.to_str().ok()).map(str::to_owned);
    let mut body = response.into_body();
    let mut kept = Vec::new();
    // Only the first part is of interest; the connection is closed after it.
    while kept.len() < MAX_ANSWER_BYTES {
        let Some(frame) = body.frame().await else {
            break;
        };
        let frame = frame.map_err(|e| e.to_string())?;
        if let Some(data) = frame.data_ref() {
            kept.extend_from_slice(&data[..data.len().min(MAX_ANSWER_BYTES - kept.len())]);
        }
    }
    let followed = matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308);
    Ok(Answer {
        status: status.as_u16(),
        body: String::from_utf8_lossy(&kept).into_owned(),
        location: location.filter(|l| followed && !l.is_empty()),
    })
}

/// TLS without verification, as probes have always been: the pod is addressed by IP, and the
/// question is whether it answers, not who it is.
fn trusting_config() -> Arc<ClientConfig> {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    Arc::clone(CONFIG.get_or_init(|| {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = Arc::new(TrustAnything(Arc::clone(&provider)));
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the ring provider supports the default protocol versions")
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        Arc::new(config)
    }))
}

#[derive(Debug)]
struct TrustAnything(Arc<CryptoProvider>);

impl ServerCertVerifier for TrustAnything {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
