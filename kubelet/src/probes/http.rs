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

/// Asks once; the caller bounds the time.
pub(super) async fn get(action: &HTTPGetAction, host: &str, port: u16) -> Outcome {
    let https = action
        .scheme
        .as_deref()
        .is_some_and(|s| s.eq_ignore_ascii_case("https"));
    let scheme = if https { "https" } else { "http" };
    let path = action
        .path
        .as_deref()
        .filter(|p| !p.is_empty())
        .unwrap_or("/");
    let slash = if path.starts_with('/') { "" } else { "/" };
    let mut url = format!("{scheme}://{}{slash}{path}", authority(host, port));
    for _ in 0..=MAX_REDIRECTS {
        let uri: Uri = match url.parse() {
            Ok(uri) => uri,
            Err(e) => return Outcome::bad(format!("parse \"{url}\": {e}")),
        };
        let answer = match fetch(action, &uri).await {
            Ok(answer) => answer,
            Err(e) => return Outcome::bad(format!("Get \"{url}\": {e}")),
        };
        if !answer.redirect {
            return answer.outcome;
        }
        let Some(next) = answer.location.and_then(|l| resolve(&uri, &l)) else {
            return answer.outcome;
        };
        if next.host() != uri.host() {
            // Another host is not ours to ask: alive enough to redirect is a success.
            return Outcome::warned(format!(
                "Probe terminated redirects, Response body: {}",
                answer.outcome.message
            ));
        }
        url = next.to_string();
    }
    Outcome::bad(format!(
        "Get \"{url}\": stopped after {MAX_REDIRECTS} redirects"
    ))
}

/// A redirect's target, absolute or relative to where we are.
fn resolve(from: &Uri, location: &str) -> Option<Uri> {
    if let Ok(uri) = location.parse::<Uri>()
        && uri.scheme().is_some()
    {
        return Some(uri);
    }
    let base = format!("{}://{}", from.scheme_str()?, from.authority()?);
    let slash = if location.starts_with('/') { "" } else { "/" };
    format!("{base}{slash}{location}").parse().ok()
}

struct Answer {
    outcome: Outcome,
    redirect: bool,
    location: Option<String>,
}

async fn fetch(action: &HTTPGetAction, uri: &Uri) -> Result<Answer, String> {
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
            .map_err(|e| e.to_string())?;
        exchange(tls, action, uri).await
    } else {
        exchange(stream, action, uri).await
    }
}

async fn exchange<S>(stream: S, action: &HTTPGetAction, uri: &Uri) -> Result<Answer, String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.map_err(|e| e.to_string())?;
    let asked = async {
        let response = sender.send_request(request(action, uri)?).await;
        answer(response.map_err(|e| e.to_string())?).await
    };
    // The connection only moves while it is polled; both end together, no task is left behind.
    tokio::pin!(asked, connection);
    tokio::select! {
        biased;
        done = &mut asked => done,
        ended = &mut connection => match ended {
            Ok(()) => asked.await,
            Err(e) => Err(e.to_string()),
        },
    }
}

fn request(action: &HTTPGetAction, uri: &Uri) -> Result<Request<Empty<Bytes>>, String> {
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
    headers
        .entry(USER_AGENT)
        .or_insert(HeaderValue::from_static("kube-probe/1.36"));
    headers
        .entry(ACCEPT)
        .or_insert(HeaderValue::from_static("*/*"));
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
    let outcome = if (200..400).contains(&status.as_u16()) {
        Outcome::good(String::from_utf8_lossy(&kept))
    } else {
        Outcome::bad(format!(
            "HTTP probe failed with statuscode: {}",
            status.as_u16()
        ))
    };
    Ok(Answer {
        outcome,
        redirect: status.is_redirection(),
        location,
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
