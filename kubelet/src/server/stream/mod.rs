//! exec and attach over WebSocket: the upgrade and who may be addressed.

pub mod channel;
pub mod pump;
mod serve;

use channel::Protocol;
use http_body_util::Empty;
use hyper::body::Bytes;
use hyper::header::{
    CONNECTION, HeaderMap, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::{Response, StatusCode};
use runtime::service::ExecRequest;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// What a client wants of a session, from the query.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StreamOptions {
    /// Program and arguments (exec).
    pub command: Vec<String>,
    /// Connect standard input.
    pub stdin: bool,
    /// Connect standard output.
    pub stdout: bool,
    /// Connect standard error.
    pub stderr: bool,
    /// Terminal.
    pub tty: bool,
}

impl StreamOptions {
    /// Reads the kubelet's parameters (`input`, `output`, `error`) and the API's (`stdin`, …).
    ///
    /// # Errors
    /// When no stream is asked for.
    pub fn from_query(query: &[(String, String)]) -> Result<Self, String> {
        let mut options = Self::default();
        for (name, value) in query {
            let on = matches!(value.as_str(), "1" | "true");
            match name.as_str() {
                "command" => options.command.push(value.clone()),
                "input" | "stdin" => options.stdin |= on,
                "output" | "stdout" => options.stdout |= on,
                "error" | "stderr" => options.stderr |= on,
                "tty" => options.tty |= on,
                _ => {}
            }
        }
        // A terminal has one output.
        options.stderr &= !options.tty;
        if !(options.stdin || options.stdout || options.stderr) {
            return Err("you must specify at least 1 of stdin, stdout, stderr".to_owned());
        }
        Ok(options)
    }

    /// The engine's request.
    pub fn request(&self) -> ExecRequest {
        ExecRequest {
            command: self.command.clone(),
            tty: self.tty,
            stdin: self.stdin,
            stdout: self.stdout,
            stderr: self.stderr,
        }
    }
}

/// The protocol agreed on, and the answer that says so.
pub type Accepted = (Protocol, Response<Empty<Bytes>>);
/// The status and the sentence of a refusal.
pub type Refused = (StatusCode, String);

/// Checks an upgrade request (RFC 6455 §4.2) and makes its answer.
///
/// # Errors
/// The status and sentence for a request that is no WebSocket upgrade we can serve.
pub fn accept(headers: &HeaderMap) -> Result<Accepted, Refused> {
    let has = |name, word: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|v| v.to_str().ok())
            .any(|v| v.split(',').any(|w| w.trim().eq_ignore_ascii_case(word)))
    };
    if has(UPGRADE, "SPDY/3.1") {
        let text = "unable to upgrade: this kubelet serves exec and attach over WebSocket \
                    (v5.channel.k8s.io), not SPDY/3.1";
        return Err((StatusCode::BAD_REQUEST, text.to_owned()));
    }
    if !has(CONNECTION, "upgrade") || !has(UPGRADE, "websocket") {
        return Err((
            StatusCode::BAD_REQUEST,
            "Upgrade request required".to_owned(),
        ));
    }
    let key = headers.get(SEC_WEBSOCKET_KEY);
    let Some(key) = key.filter(|_| has(SEC_WEBSOCKET_VERSION, "13")) else {
        let text = "a WebSocket upgrade needs Sec-WebSocket-Key and Sec-WebSocket-Version: 13";
        return Err((StatusCode::BAD_REQUEST, text.to_owned()));
    };
    let offers: Vec<String> = headers
        .get_all(SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .map(|w| w.trim().to_owned())
        .filter(|w| !w.is_empty())
        .collect();
    let Some(protocol) = channel::negotiate(&offers) else {
        let text = format!(
            "unable to upgrade: no protocol of {} is served",
            offers.join(", ")
        );
        return Err((StatusCode::BAD_REQUEST, text));
    };
    let mut response = Response::new(Empty::new());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let answer = response.headers_mut();
    answer.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.insert(UPGRADE, HeaderValue::from_static("websocket"));
    if let Ok(accept) = HeaderValue::from_str(&derive_accept_key(key.as_bytes())) {
        answer.insert(SEC_WEBSOCKET_ACCEPT, accept);
    }
    if !protocol.name.is_empty() {
        answer.insert(
            SEC_WEBSOCKET_PROTOCOL,
            HeaderValue::from_static(protocol.name),
        );
    }
    Ok((protocol, response))
}
