//! Agreeing on a streaming protocol: which upgrade a request asks for, and the answer. Pure.

use http_body_util::Empty;
use hyper::body::Bytes;
use hyper::header::{
    CONNECTION, HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::{Response, StatusCode};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

const SPDY: &str = "SPDY/3.1";
/// Protocols a SPDY client offers, and the one agreed on.
const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
/// What is served, for a client that offers none of it.
const ACCEPTED_PROTOCOLS: HeaderName =
    HeaderName::from_static("x-accepted-stream-protocol-versions");

/// The protocols a path serves, by what carries them.
#[derive(Debug, Clone, Copy)]
pub struct Served {
    /// SPDY inside a WebSocket (`SPDY/3.1+…`): looked at before the plain WebSocket ones.
    pub tunnel: &'static [&'static str],
    /// Channels in a WebSocket; the empty name is for clients that ask for none.
    pub websocket: &'static [&'static str],
    /// SPDY.
    pub spdy: &'static [&'static str],
}

/// What carries the streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Channels in messages of a WebSocket.
    WebSocket,
    /// SPDY frames in messages of a WebSocket.
    Tunnel,
    /// SPDY frames.
    Spdy,
}

/// An agreement and the answer that says so.
#[derive(Debug)]
pub struct Agreed {
    /// What carries the streams.
    pub transport: Transport,
    /// Its protocol.
    pub protocol: &'static str,
    /// The answer.
    pub response: Response<Empty<Bytes>>,
}

/// A refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Status of the answer.
    pub status: StatusCode,
    /// Its body.
    pub message: String,
    /// Protocols to name in the answer's header.
    pub accepted: &'static [&'static str],
}

fn refused(status: StatusCode, message: impl Into<String>) -> Refused {
    Refused {
        status,
        message: message.into(),
        accepted: &[],
    }
}

/// The words of all values of a header.
fn words(headers: &HeaderMap, name: &HeaderName) -> Vec<String> {
    let values = headers.get_all(name).iter();
    values
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .map(|w| w.trim().to_owned())
        .filter(|w| !w.is_empty())
        .collect()
}

fn has(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    let words = words(headers, name);
    words.iter().any(|w| w.eq_ignore_ascii_case(word))
}

/// Whether a request asks for a WebSocket.
pub fn is_websocket(headers: &HeaderMap) -> bool {
    has(headers, &CONNECTION, "upgrade") && has(headers, &UPGRADE, "websocket")
}

/// Whether a request offers one of these in a WebSocket.
pub fn offers_tunnel(headers: &HeaderMap) -> bool {
    let tunnels = |w: &String| w.starts_with("SPDY/3.1+") && w.ends_with(".k8s.io");
    is_websocket(headers) && words(headers, &SEC_WEBSOCKET_PROTOCOL).iter().any(tunnels)
}

/// Agrees on a protocol.
///
/// # Errors
/// [`Refused`] for what is no upgrade we can serve.
pub fn agree(headers: &HeaderMap, served: Served) -> Result<Agreed, Refused> {
    if !has(headers, &CONNECTION, "upgrade") {
        // The stock kubelet's proxy answers so.
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        return Err(refused(status, "Upgrade request required"));
    }
    if has(headers, &UPGRADE, "websocket") {
        agree_websocket(headers, served)
    } else {
        agree_spdy(headers, served.spdy)
    }
}

fn switching(upgrade: &'static str) -> Response<Empty<Bytes>> {
    let mut response = Response::new(Empty::new());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let answer = response.headers_mut();
    answer.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.insert(UPGRADE, HeaderValue::from_static(upgrade));
    response
}

/// RFC 6455 §4.2. The first protocol of the client's that is served is taken.
fn agree_websocket(headers: &HeaderMap, served: Served) -> Result<Agreed, Refused> {
    let key = headers.get(SEC_WEBSOCKET_KEY);
    let Some(key) = key.filter(|_| has(headers, &SEC_WEBSOCKET_VERSION, "13")) else {
        let text = "a WebSocket upgrade needs Sec-WebSocket-Key and Sec-WebSocket-Version: 13";
        return Err(refused(StatusCode::BAD_REQUEST, text));
    };
    let mut offers = words(headers, &SEC_WEBSOCKET_PROTOCOL);
    if offers.is_empty() {
        offers.push(String::new());
    }
    let among = |names: &'static [&'static str]| {
        let known = |offer: &String| names.iter().find(|name| *name == offer).copied();
        offers.iter().find_map(known)
    };
    let (transport, protocol) = match (among(served.tunnel), among(served.websocket)) {
        (Some(protocol), _) => (Transport::Tunnel, protocol),
        (None, Some(protocol)) => (Transport::WebSocket, protocol),
        (None, None) => {
            let text = format!(
                "requested protocol(s) are not supported: {offers:?}; supports {:?}",
                served.websocket
            );
            return Err(refused(StatusCode::FORBIDDEN, text));
        }
    };
    let mut response = switching("websocket");
    if let Ok(accept) = HeaderValue::from_str(&derive_accept_key(key.as_bytes())) {
        response.headers_mut().insert(SEC_WEBSOCKET_ACCEPT, accept);
    }
    if !protocol.is_empty() {
        let name = HeaderValue::from_static(protocol);
        response.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, name);
    }
    Ok(Agreed {
        transport,
        protocol,
        response,
    })
}

fn agree_spdy(headers: &HeaderMap, served: &'static [&'static str]) -> Result<Agreed, Refused> {
    if !headers.contains_key(&STREAM_PROTOCOL) {
        let text = format!(
            "unable to upgrade: header X-Stream-Protocol-Version does not exist in request with \
             {} headers",
            headers.len()
        );
        return Err(refused(StatusCode::BAD_REQUEST, text));
    }
    let offers = words(headers, &STREAM_PROTOCOL);
    if offers.is_empty() {
        let text = "unable to upgrade: header X-Stream-Protocol-Version is empty";
        return Err(refused(StatusCode::BAD_REQUEST, text));
    }
    let known = |offer: &String| served.iter().find(|name| *name == offer).copied();
    let Some(protocol) = offers.iter().find_map(known) else {
        return Err(Refused {
            status: StatusCode::FORBIDDEN,
            message: format!(
                "unable to upgrade: unable to negotiate protocol: client supports [{}], server \
                 accepts [{}]",
                offers.join(" "),
                served.join(" ")
            ),
            accepted: served,
        });
    };
    if !has(headers, &UPGRADE, SPDY) {
        let text = "unable to upgrade: missing upgrade headers in request";
        return Err(refused(StatusCode::BAD_REQUEST, text));
    }
    let mut response = switching(SPDY);
    let name = HeaderValue::from_static(protocol);
    response.headers_mut().insert(STREAM_PROTOCOL, name);
    Ok(Agreed {
        transport: Transport::Spdy,
        protocol,
        response,
    })
}

impl Refused {
    /// Adds the headers of the refusal to its answer.
    pub fn mark<B>(&self, response: &mut Response<B>) {
        for name in self.accepted {
            let value = HeaderValue::from_static(name);
            response.headers_mut().append(ACCEPTED_PROTOCOLS, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVED: Served = Served {
        tunnel: &["SPDY/3.1+portforward.k8s.io"],
        websocket: &["", "v4.channel.k8s.io"],
        spdy: &["v4.channel.k8s.io", "channel.k8s.io"],
    };

    fn ask(pairs: &[(&'static str, &'static str)]) -> Result<(Transport, &'static str), Refused> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        agree(&headers, SERVED).map(|a| (a.transport, a.protocol))
    }

    fn websocket(protocols: &'static str) -> Result<(Transport, &'static str), Refused> {
        ask(&[
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "WebSocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-protocol", protocols),
        ])
    }

    #[test]
    fn the_clients_first_known_protocol_wins_and_a_tunnel_before_all() {
        use Transport::{Spdy, Tunnel, WebSocket};
        assert_eq!(
            websocket("v9.channel.k8s.io, v4.channel.k8s.io"),
            Ok((WebSocket, "v4.channel.k8s.io"))
        );
        assert_eq!(websocket(""), Ok((WebSocket, "")));
        assert_eq!(
            websocket("v4.channel.k8s.io,SPDY/3.1+portforward.k8s.io"),
            Ok((Tunnel, "SPDY/3.1+portforward.k8s.io"))
        );
        let spdy = [
            ("connection", "Upgrade"),
            ("upgrade", "SPDY/3.1"),
            ("x-stream-protocol-version", "v7.channel.k8s.io"),
            ("x-stream-protocol-version", "channel.k8s.io"),
        ];
        assert_eq!(ask(&spdy), Ok((Spdy, "channel.k8s.io")));
    }

    #[test]
    fn refusals_have_the_stock_status() {
        let status = |pairs: &[(&'static str, &'static str)]| ask(pairs).unwrap_err();
        assert_eq!(status(&[]).message, "Upgrade request required");
        let upgrade = ("connection", "Upgrade");
        assert_eq!(
            status(&[upgrade, ("upgrade", "SPDY/3.1")]).status,
            StatusCode::BAD_REQUEST
        );
        let refused = status(&[
            upgrade,
            ("upgrade", "SPDY/3.1"),
            ("x-stream-protocol-version", "v9"),
        ]);
        assert_eq!(refused.status, StatusCode::FORBIDDEN);
        assert_eq!(refused.accepted, SERVED.spdy);
        assert_eq!(
            websocket("v9.channel.k8s.io").unwrap_err().status,
            StatusCode::FORBIDDEN
        );
    }
}
