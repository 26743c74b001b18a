//! A small apiserver in memory: get and watch by name, services, tokens.

use crate::volumes::unsigned_token;
use bytes::Bytes;
use futures::StreamExt as _;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, StreamBody, combinators::BoxBody};
use hyper::body::Frame;
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;

type Sender = mpsc::UnboundedSender<Bytes>;

#[derive(Default)]
struct State {
    version: u64,
    objects: HashMap<String, Value>,
    watchers: Vec<(String, Sender)>,
    requests: Vec<String>,
    down: bool,
    forbid: usize,
    token_life: i64,
    refuse_tokens: bool,
}

/// The apiserver. Clones are the same.
#[derive(Clone)]
pub(crate) struct FakeApi {
    state: Arc<Mutex<State>>,
    watching: Arc<watch::Sender<usize>>,
}

fn key(kind: &str, ns: &str, name: &str) -> String {
    format!("{kind}/{ns}/{name}")
}

fn line(kind: &str, object: &Value) -> Bytes {
    let mut text = json!({"type": kind, "object": object}).to_string();
    text.push('\n');
    text.into()
}

impl FakeApi {
    pub(crate) fn new() -> Self {
        let state = State {
            version: 100,
            token_life: 3600,
            ..State::default()
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            watching: Arc::new(watch::channel(0).0),
        }
    }

    pub(crate) fn client(&self) -> Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move { api.answer(request).await }
        });
        Client::new(service, "default")
    }

    /// Creates or changes an object; watchers are told.
    pub(crate) fn put(&self, kind: &str, ns: &str, name: &str, mut object: Value) {
        let mut state = self.state.lock().unwrap();
        state.version += 1;
        object["metadata"] = json!({
            "name": name, "resourceVersion": state.version.to_string(),
        });
        // Objects of the cluster have none.
        if !ns.is_empty() {
            object["metadata"]["namespace"] = json!(ns);
        }
        let key = key(kind, ns, name);
        let event = if state.objects.contains_key(&key) {
            "MODIFIED"
        } else {
            "ADDED"
        };
        state.objects.insert(key.clone(), object.clone());
        state
            .watchers
            .retain(|(k, s)| *k != key || s.send(line(event, &object)).is_ok());
    }

    pub(crate) fn delete(&self, kind: &str, ns: &str, name: &str) {
        let mut state = self.state.lock().unwrap();
        state.version += 1;
        let key = key(kind, ns, name);
        let mut object = state.objects.remove(&key).unwrap();
        object["metadata"]["resourceVersion"] = json!(state.version.to_string());
        state
            .watchers
            .retain(|(k, s)| *k != key || s.send(line("DELETED", &object)).is_ok());
    }

    /// Ends all watches; with `down` refuses everything from now on.
    pub(crate) fn outage(&self, down: bool) {
        let mut state = self.state.lock().unwrap();
        state.down = down;
        state.watchers.clear();
    }

    /// Refuses the next requests with 403.
    pub(crate) fn forbid(&self, times: usize) {
        self.state.lock().unwrap().forbid = times;
    }

    pub(crate) fn tokens(&self, life: i64, refuse: bool) {
        let mut state = self.state.lock().unwrap();
        (state.token_life, state.refuse_tokens) = (life, refuse);
    }

    /// Requests so far that contain `text`.
    pub(crate) fn count(&self, text: &str) -> usize {
        let state = self.state.lock().unwrap();
        state.requests.iter().filter(|r| r.contains(text)).count()
    }

    /// Waits until so many watches were opened.
    pub(crate) async fn watches(&self, count: usize) {
        self.watching
            .subscribe()
            .wait_for(|n| *n >= count)
            .await
            .unwrap();
    }

    async fn answer(
        &self,
        request: Request<Body>,
    ) -> Result<Response<BoxBody<Bytes, Infallible>>, std::io::Error> {
        let (parts, body) = request.into_parts();
        let body = body
            .collect()
            .await
            .map_err(std::io::Error::other)?
            .to_bytes();
        let uri = parts.uri.to_string();
        let path: Vec<&str> = parts
            .uri
            .path()
            .trim_start_matches("/api/v1/")
            .trim_start_matches("/apis/storage.k8s.io/v1/")
            .split('/')
            .collect();
        let mut state = self.state.lock().unwrap();
        state.requests.push(format!("{} {uri}", parts.method));
        if state.down {
            return Err(std::io::Error::from(std::io::ErrorKind::ConnectionRefused));
        }
        if state.forbid > 0 && !uri.contains("/services") {
            state.forbid -= 1;
            return Ok(refused(403, "forbidden"));
        }
        match path[..] {
            ["services"] if uri.contains("watch=true") => Ok(forever()),
            ["services"] => {
                let items: Vec<&Value> = state
                    .objects
                    .iter()
                    .filter(|(k, _)| k.starts_with("services/"))
                    .map(|(_, v)| v)
                    .collect();
                let metadata = json!({"resourceVersion": "1"});
                Ok(answer(
                    200,
                    &json!({"kind": "ServiceList", "apiVersion": "v1", "metadata": metadata, "items": items}),
                ))
            }
            ["csidrivers"] if uri.contains("watch=true") => Ok(forever()),
            ["csidrivers"] => {
                let items: Vec<&Value> = state
                    .objects
                    .iter()
                    .filter(|(k, _)| k.starts_with("csidrivers/"))
                    .map(|(_, v)| v)
                    .collect();
                let (kind, version) = ("CSIDriverList", "storage.k8s.io/v1");
                let metadata = json!({"resourceVersion": "1"});
                Ok(answer(
                    200,
                    &json!({"kind": kind, "apiVersion": version, "metadata": metadata, "items": items}),
                ))
            }
            ["namespaces", ns, kind, name, "status"] => {
                let patch = String::from_utf8_lossy(&body).into_owned();
                state.requests.push(patch);
                match state.objects.get(&key(kind, ns, name)) {
                    Some(object) => Ok(answer(200, object)),
                    None => Ok(refused(404, "no such object")),
                }
            }
            ["namespaces", _, "serviceaccounts", _, "token"] => Ok(token(&state, &body)),
            ["namespaces", ns, kind, name] => match state.objects.get(&key(kind, ns, name)) {
                Some(object) => Ok(answer(200, object)),
                None => Ok(refused(404, &format!("{kind} \"{name}\" not found"))),
            },
            [kind @ ("persistentvolumes" | "volumeattachments"), name] => {
                match state.objects.get(&key(kind, "", name)) {
                    Some(object) => Ok(answer(200, object)),
                    None => Ok(refused(404, &format!("{kind} \"{name}\" not found"))),
                }
            }
            ["namespaces", ns, kind] => {
                let name = uri
                    .split("metadata.name%3D")
                    .nth(1)
                    .unwrap()
                    .split('&')
                    .next()
                    .unwrap();
                let key = key(kind, ns, name);
                let (sender, receiver) = mpsc::unbounded_channel();
                if uri.contains("sendInitialEvents") {
                    if let Some(object) = state.objects.get(&key) {
                        sender.send(line("ADDED", object)).unwrap();
                    }
                    let metadata = json!({
                        "resourceVersion": state.version.to_string(),
                        "annotations": {"k8s.io/initial-events-end": "true"},
                    });
                    sender
                        .send(line(
                            "BOOKMARK",
                            &json!({"kind": "x", "apiVersion": "v1", "metadata": metadata}),
                        ))
                        .unwrap();
                }
                state.watchers.push((key, sender));
                self.watching.send_modify(|n| *n += 1);
                let frames = UnboundedReceiverStream::new(receiver).map(|b| Ok(Frame::data(b)));
                Ok(Response::new(BoxBody::new(StreamBody::new(frames))))
            }
            _ => Ok(refused(404, "no such path")),
        }
    }
}

fn token(state: &State, body: &[u8]) -> Response<BoxBody<Bytes, Infallible>> {
    if state.refuse_tokens {
        return refused(500, "no tokens today");
    }
    let mut request: Value = serde_json::from_slice(body).unwrap();
    let now = jiff::Timestamp::now();
    let expires = now
        .checked_add(std::time::Duration::from_secs(
            state.token_life.unsigned_abs(),
        ))
        .unwrap();
    request["status"] = json!({
        "token": format!("{}{}", unsigned_token(now.as_second(), expires.as_second()), state.requests.len()),
        "expirationTimestamp": expires.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
    });
    answer(201, &request)
}

fn answer(code: u16, value: &Value) -> Response<BoxBody<Bytes, Infallible>> {
    let body = http_body_util::Full::new(Bytes::from(value.to_string()));
    let mut response = Response::new(BoxBody::new(body));
    *response.status_mut() = StatusCode::from_u16(code).unwrap();
    response
}

fn refused(code: u16, message: &str) -> Response<BoxBody<Bytes, Infallible>> {
    let reason = match code {
        403 => "Forbidden",
        404 => "NotFound",
        _ => "InternalError",
    };
    answer(
        code,
        &json!({
            "kind": "Status", "apiVersion": "v1", "status": "Failure",
            "message": message, "reason": reason, "code": code, "metadata": {},
        }),
    )
}

fn forever() -> Response<BoxBody<Bytes, Infallible>> {
    Response::new(BoxBody::new(StreamBody::new(futures::stream::pending::<
        Result<Frame<Bytes>, Infallible>,
    >())))
}
