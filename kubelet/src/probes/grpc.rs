//! gRPC probes: one call of `grpc.health.v1.Health/Check` (gRPC health checking protocol).
//!
//! The two messages have one field each, so they are written by hand here instead of pulling a
//! gRPC stack into the agent for them.

use super::check::{Outcome, authority};
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::time::Duration;
use tokio::net::TcpStream;

/// A health answer is a few bytes.
const MAX_BODY_BYTES: usize = 64 * 1024;

/// Asks once; the caller bounds the time, `timeout` is for its words.
pub(super) async fn health(host: &str, port: u16, service: &str, timeout: Duration) -> Outcome {
    let address = authority(host, port);
    let status = match call(host, port, service).await {
        Ok(status) => status,
        Err(CallError::Connect) => {
            return Outcome::bad(format!(
                "timeout: failed to connect service {address:?} within {}s: context deadline exceeded",
                timeout.as_secs()
            ));
        }
        Err(CallError::Call(e)) => {
            return Outcome::bad(format!(
                "error: health rpc probe failed: rpc error: code = Unavailable desc = {e}"
            ));
        }
    };
    match (status.code, status.serving) {
        (0, Some(1)) => Outcome::good("service healthy"),
        (0, serving) => {
            let word = match serving {
                Some(2) => "NOT_SERVING",
                Some(3) => "SERVICE_UNKNOWN",
                Some(_) | None => "UNKNOWN",
            };
            Outcome::bad(format!("service unhealthy (responded with {word:?})"))
        }
        (12, _) => Outcome::bad(format!(
            "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): {}",
            status.message
        )),
        (code, _) => Outcome::bad(format!(
            "error: health rpc probe failed: rpc error: code = {} desc = {}",
            code_name(code),
            status.message
        )),
    }
}

/// The names of gRPC status codes.
fn code_name(code: u32) -> String {
    const NAMES: [&str; 17] = [
        "OK",
        "Canceled",
        "Unknown",
        "InvalidArgument",
        "DeadlineExceeded",
        "NotFound",
        "AlreadyExists",
        "PermissionDenied",
        "ResourceExhausted",
        "FailedPrecondition",
        "Aborted",
        "OutOfRange",
        "Unimplemented",
        "Internal",
        "Unavailable",
        "DataLoss",
        "Unauthenticated",
    ];
    let known = usize::try_from(code).ok().and_then(|c| NAMES.get(c));
    known.map_or_else(|| format!("Code({code})"), |name| (*name).to_owned())
}

/// Why a call has no status.
#[derive(Debug, PartialEq, Eq)]
enum CallError {
    /// Nobody listens. Stock probes try again until their time is up; so little is lost by saying
    /// it at once.
    Connect,
    /// Something else.
    Call(String),
}

impl From<String> for CallError {
    fn from(message: String) -> Self {
        Self::Call(message)
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Status {
    code: u32,
    message: String,
    serving: Option<u64>,
}

async fn call(host: &str, port: u16, service: &str) -> Result<Status, CallError> {
    let stream = TcpStream::connect((host, port))
        .await
        .map_err(|_| CallError::Connect)?;
    let io = TokioIo::new(stream);
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
        .await
        .map_err(|e| e.to_string())?;
    let request = Request::post(format!(
        "http://{}/grpc.health.v1.Health/Check",
        authority(host, port)
    ))
    .header("content-type", "application/grpc")
    .header("te", "trailers")
    .header("user-agent", "kube-probe/1.36")
    .body(Full::new(encode(service)))
    .map_err(|e| e.to_string())?;
    let asked = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(|e| e.to_string())?;
        let headers = response.headers().clone();
        let body = Limited::new(response.into_body(), MAX_BODY_BYTES);
        let body = body.collect().await.map_err(|e| e.to_string())?;
        let trailers = body.trailers().cloned().unwrap_or_default();
        // A call that fails at once carries its status in the headers.
        let find = |name: &str| {
            let value = trailers.get(name).or_else(|| headers.get(name))?;
            value.to_str().ok().map(str::to_owned)
        };
        let code = find("grpc-status")
            .and_then(|c| c.parse().ok())
            .unwrap_or(2);
        let message = find("grpc-message").unwrap_or_default();
        Ok::<_, String>(Status {
            code,
            message,
            serving: decode(&body.to_bytes()),
        })
    };
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

/// A length-prefixed `HealthCheckRequest{service}`.
fn encode(service: &str) -> Bytes {
    let mut message = Vec::new();
    if !service.is_empty() {
        message.push(0x0a);
        varint(service.len() as u64, &mut message);
        message.extend_from_slice(service.as_bytes());
    }
    let mut frame = vec![0];
    frame.extend_from_slice(
        &u32::try_from(message.len())
            .unwrap_or(u32::MAX)
            .to_be_bytes(),
    );
    frame.extend_from_slice(&message);
    Bytes::from(frame)
}

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push((value as u8 & 0x7f) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// `status` of a length-prefixed `HealthCheckResponse`; none when there is no message. An empty
/// message means 0, UNKNOWN.
fn decode(body: &[u8]) -> Option<u64> {
    let mut message = body.get(5..)?;
    while let Some((tag, rest)) = read_varint(message) {
        if tag != 0x08 {
            return Some(0);
        }
        let (value, rest) = read_varint(rest)?;
        if rest.is_empty() {
            return Some(value);
        }
        message = rest;
    }
    Some(0)
}

fn read_varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0u64;
    for (i, byte) in bytes.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f).checked_shl(7 * i as u32)?;
        if byte & 0x80 == 0 {
            return Some((value, &bytes[i + 1..]));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_answers_have_the_form_of_the_protocol() {
        assert_eq!(&encode("")[..], [0, 0, 0, 0, 0]);
        assert_eq!(&encode("ab")[..], [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        assert_eq!(decode(&[0, 0, 0, 0, 2, 8, 1]), Some(1));
        assert_eq!(decode(&[0, 0, 0, 0, 0]), Some(0));
        assert_eq!(decode(&[]), None);
    }

    proptest::proptest! {
        #[test]
        fn no_answer_makes_the_decoder_panic(bytes: Vec<u8>) {
            let _ = decode(&bytes);
        }
    }
}
