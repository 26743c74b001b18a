//! Manifests behind a URL: a Pod or a PodList, asked for every `httpCheckFrequency`.
//!
//! While the server is away, or answers with what cannot be used, its last good answer holds. An
//! empty answer means that there are no pods.

use super::manifest::{self, MAX_BYTES, Origin};
use super::published::{self, Published};
use super::{PodChange, Source};
use crate::errors::chain;
use crate::events::{EventSink, EventType};
use http::{HeaderMap, HeaderName, HeaderValue};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// Longest time for one answer, as the stock kubelet.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Failures in a row that are told; more are only repeats.
const TOLD: u32 = 3;

/// Where manifests are, and for whom.
#[derive(Debug, Clone)]
pub struct HttpSettings {
    /// The URL, `http` or `https`.
    pub url: String,
    /// Headers of the request.
    pub headers: BTreeMap<String, Vec<String>>,
    /// The node's name.
    pub node: String,
    /// Time between two requests.
    pub check: Duration,
}

/// Why there is no new answer.
#[derive(Debug, thiserror::Error)]
enum HttpError {
    #[error("build the HTTP client: {0}")]
    Client(String),
    #[error("header {name:?} cannot be sent: {message}")]
    Header { name: String, message: String },
    #[error("get {url}: {message}")]
    Get { url: String, message: String },
    #[error("{url}: {status}")]
    Status { url: String, status: String },
    #[error("{url}: the answer is longer than {MAX_BYTES} bytes")]
    TooLong { url: String },
    #[error("{url}: {message}")]
    Manifest { url: String, message: String },
}

/// Sends the pods of the URL until cancelled or until nobody listens.
pub async fn run(
    settings: HttpSettings,
    events: EventSink,
    changes: mpsc::Sender<PodChange>,
    cancel: CancellationToken,
) {
    info!(url = settings.url, "Adding pod URL");
    let mut published = Published::new(Source::Http);
    let mut last: Option<Vec<u8>> = None;
    let mut failures = 0;
    let mut ticks = tokio::time::interval(settings.check.max(Duration::from_millis(100)));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let answer = tokio::select! {
            () = cancel.cancelled() => return,
            answer = ask(&settings) => answer,
        };
        let pods = answer.and_then(|body| understand(&settings, &mut last, body));
        match pods {
            Ok(pods) => {
                if std::mem::take(&mut failures) > 0 {
                    info!("Successfully read pods from URL");
                }
                let Some(pods) = pods else { continue };
                let news = published.replace(pods, true, Timestamp::now());
                for pod in &news.duplicates {
                    let message = published::duplicate_message(pod, Source::Http);
                    warn!("{message}");
                    let warning = EventType::Warning;
                    events.pod_event(pod, None, warning, "FailedValidation", message);
                }
                for change in news.changes {
                    if changes.send(change).await.is_err() {
                        return;
                    }
                }
            }
            Err(error) => {
                failures += 1;
                if failures <= TOLD {
                    warn!(%error, "Failed to read pods from URL");
                } else {
                    debug!(%error, "Failed to read pods from URL");
                }
            }
        }
    }
}

/// The pods of an answer; none when it is the last one again.
fn understand(
    settings: &HttpSettings,
    last: &mut Option<Vec<u8>>,
    body: Vec<u8>,
) -> Result<Option<Vec<Pod>>, HttpError> {
    if last.as_ref() == Some(&body) {
        return Ok(None);
    }
    if body.is_empty() {
        *last = Some(body);
        return Ok(Some(Vec::new()));
    }
    let origin = Origin {
        source: Source::Http,
        place: &settings.url,
        node: &settings.node,
    };
    let pods = manifest::pods(&body, &origin).map_err(|e| HttpError::Manifest {
        url: settings.url.clone(),
        message: e.to_string(),
    })?;
    *last = Some(body);
    Ok(Some(pods))
}

/// One request. A client each time: certificates of authorities may have changed, and nothing is
/// gained by keeping a connection for 20 seconds.
async fn ask(settings: &HttpSettings) -> Result<Vec<u8>, HttpError> {
    let url = &settings.url;
    let client = reqwest::Client::builder()
        .timeout(TIMEOUT)
        .pool_max_idle_per_host(0)
        .build()
        .map_err(|e| HttpError::Client(chain(&e)))?;
    let request = client.get(url).headers(headers(&settings.headers)?);
    let failed = |e: reqwest::Error| HttpError::Get {
        url: url.clone(),
        message: chain(&e.without_url()),
    };
    let mut answer = request.send().await.map_err(failed)?;
    if answer.status() != http::StatusCode::OK {
        return Err(HttpError::Status {
            url: url.clone(),
            status: answer.status().to_string(),
        });
    }
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(failed)? {
        body.extend_from_slice(&chunk);
        if body.len() as u64 > MAX_BYTES {
            return Err(HttpError::TooLong { url: url.clone() });
        }
    }
    Ok(body)
}

/// The configured headers. Values may be secrets: no message shows one.
fn headers(given: &BTreeMap<String, Vec<String>>) -> Result<HeaderMap, HttpError> {
    let mut headers = HeaderMap::new();
    for (name, values) in given {
        let bad = |message: String| HttpError::Header {
            name: name.clone(),
            message,
        };
        let key = HeaderName::try_from(name).map_err(|e| bad(e.to_string()))?;
        for value in values {
            let value = HeaderValue::try_from(value).map_err(|e| bad(e.to_string()))?;
            headers.append(key.clone(), value);
        }
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::spec;
    use std::sync::{Arc, Mutex};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// A server that answers what it is told to, and notes what it was asked.
    async fn serve(answer: Arc<Mutex<String>>, asked: Arc<Mutex<String>>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 4096];
                let n = stream.read(&mut request).await.unwrap();
                *asked.lock().unwrap() = String::from_utf8_lossy(&request[..n]).into_owned();
                let text = answer.lock().unwrap().clone();
                stream.write_all(text.as_bytes()).await.unwrap();
            }
        });
        format!("http://{address}/pods")
    }

    fn ok(body: &str) -> String {
        format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
    }

    fn list(names: &[&str]) -> String {
        let item = |name: &&str| {
            format!(
                "{{\"metadata\": {{\"name\": \"{name}\"}}, \"spec\": {{\"containers\": \
                 [{{\"name\": \"c\", \"image\": \"i\"}}]}}}}"
            )
        };
        let items: Vec<_> = names.iter().map(item).collect();
        ok(&format!(
            "{{\"apiVersion\": \"v1\", \"kind\": \"PodList\", \"items\": [{}]}}",
            items.join(",")
        ))
    }

    #[tokio::test]
    async fn the_last_good_answer_holds_and_headers_are_sent() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let answer = Arc::new(Mutex::new(
            "HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n".to_owned(),
        ));
        let asked = Arc::new(Mutex::new(String::new()));
        let url = serve(answer.clone(), asked.clone()).await;
        let settings = HttpSettings {
            url,
            headers: [("X-Key".to_owned(), vec!["secret".to_owned()])].into(),
            node: "n".to_owned(),
            check: Duration::from_millis(100),
        };
        let (tx, mut changes) = mpsc::channel(8);
        let cancel = CancellationToken::new();
        tokio::spawn(run(settings, EventSink::memory(), tx, cancel.clone()));
        let mut next = async |steps: usize| {
            let mut words = Vec::new();
            for _ in 0..steps {
                words.push(match changes.recv().await.unwrap() {
                    PodChange::Set(pod) => format!("set {}", spec::name(&pod)),
                    PodChange::Gone(pod) => format!("gone {}", spec::name(&pod)),
                    PodChange::Synced(_) => "synced".to_owned(),
                });
            }
            words
        };
        *answer.lock().unwrap() = list(&["a", "b"]);
        let mut first = next(3).await;
        first.sort();
        assert_eq!(first, ["set a-n", "set b-n", "synced"]);
        assert!(
            asked
                .lock()
                .unwrap()
                .to_lowercase()
                .contains("x-key: secret")
        );
        // Neither an error nor nonsense takes a pod away.
        *answer.lock().unwrap() = "HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n".to_owned();
        *answer.lock().unwrap() = ok("nonsense");
        *answer.lock().unwrap() = list(&["b"]);
        assert_eq!(next(1).await, ["gone a-n"]);
        *answer.lock().unwrap() = ok("");
        assert_eq!(next(1).await, ["gone b-n"]);
        cancel.cancel();
    }
}
