//! The channel protocols of remote commands over WebSocket (`*.channel.k8s.io`): one message is
//! one channel byte and its payload. Pure.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// Channel numbers.
pub const STDIN: u8 = 0;
/// Output.
pub const STDOUT: u8 = 1;
/// Error output.
pub const STDERR: u8 = 2;
/// The result of the command.
pub const ERROR: u8 = 3;
/// Terminal sizes.
pub const RESIZE: u8 = 4;
/// v5: closes the channel named by the payload's byte.
const CLOSE: u8 = 255;

/// A protocol by what it can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Protocol {
    /// Name to echo; empty for a client that asked for none.
    pub name: &'static str,
    /// The result is a `Status` object, not a line of text.
    pub status: bool,
    /// A channel can be closed by the client.
    pub close: bool,
    /// Text messages with base64 payload.
    pub base64: bool,
}

const fn protocol(name: &'static str, status: bool, close: bool, base64: bool) -> Protocol {
    Protocol {
        name,
        status,
        close,
        base64,
    }
}

/// All protocols served.
pub const PROTOCOLS: [Protocol; 6] = [
    protocol("v5.channel.k8s.io", true, true, false),
    protocol("v4.channel.k8s.io", true, false, false),
    protocol("v4.base64.channel.k8s.io", true, false, true),
    protocol("channel.k8s.io", false, false, false),
    protocol("base64.channel.k8s.io", false, false, true),
    protocol("", false, false, false),
];

/// The first protocol a client offers that we serve; without an offer, the oldest.
pub fn negotiate(offers: &[String]) -> Option<Protocol> {
    if offers.is_empty() {
        return Some(PROTOCOLS[5]);
    }
    let named = |offer: &String| {
        PROTOCOLS
            .iter()
            .find(|p| !p.name.is_empty() && p.name == offer)
    };
    offers.iter().find_map(named).copied()
}

/// What a client sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// Bytes for standard input.
    Stdin(Vec<u8>),
    /// Standard input has ended.
    StdinClosed,
    /// A new terminal size: columns, rows.
    Resize(u16, u16),
    /// Nothing to act on.
    Ignored,
}

impl Protocol {
    /// Reads a message.
    pub fn decode(&self, message: &[u8]) -> Input {
        let Some((&first, payload)) = message.split_first() else {
            return Input::Ignored;
        };
        let decoded;
        let (channel, payload) = if self.base64 {
            match STANDARD.decode(payload) {
                Ok(bytes) => decoded = bytes,
                Err(_) => return Input::Ignored,
            }
            (first.wrapping_sub(b'0'), decoded.as_slice())
        } else {
            (first, payload)
        };
        match channel {
            STDIN if payload.is_empty() => Input::Ignored,
            STDIN => Input::Stdin(payload.to_vec()),
            RESIZE => size(payload).map_or(Input::Ignored, |(w, h)| Input::Resize(w, h)),
            CLOSE if self.close && payload.first() == Some(&STDIN) => Input::StdinClosed,
            _ => Input::Ignored,
        }
    }

    /// Writes a message.
    pub fn encode(&self, channel: u8, payload: &[u8]) -> Vec<u8> {
        let mut message = Vec::with_capacity(payload.len() + 1);
        if self.base64 {
            message.push(b'0' + channel);
            message.extend_from_slice(STANDARD.encode(payload).as_bytes());
        } else {
            message.push(channel);
            message.extend_from_slice(payload);
        }
        message
    }
}

/// `{"Width":80,"Height":24}`.
fn size(payload: &[u8]) -> Option<(u16, u16)> {
    let value: serde_json::Value = serde_json::from_slice(payload).ok()?;
    let field = |name: &str| value.get(name)?.as_u64()?.try_into().ok();
    Some((field("Width")?, field("Height")?))
}

/// The last word on the error channel: a `Status` object, or for the oldest protocols a line of
/// text (nothing on success).
pub fn result_message(protocol: &Protocol, result: &Result<i32, String>) -> Option<Vec<u8>> {
    let failure = |message: &str| message.as_bytes().to_vec();
    let text = match (result, protocol.status) {
        (Ok(0), false) => return None,
        (Ok(0), true) => serde_json::json!({"metadata": {}, "status": "Success"}),
        (Ok(code), false) => {
            return Some(failure(&format!(
                "command terminated with exit code {code}"
            )));
        }
        (Ok(code), true) => serde_json::json!({
            "metadata": {},
            "status": "Failure",
            "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "reason": "NonZeroExitCode",
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
        }),
        (Err(message), false) => return Some(failure(message)),
        (Err(message), true) => serde_json::json!({
            "metadata": {},
            "status": "Failure",
            "message": format!("Internal error occurred: {message}"),
            "reason": "InternalError",
            "details": {"causes": [{"message": message}]},
            "code": 500,
        }),
    };
    Some(text.to_string().into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offers(names: &[&str]) -> Option<&'static str> {
        let names: Vec<_> = names.iter().map(|n| (*n).to_owned()).collect();
        negotiate(&names).map(|p| p.name)
    }

    #[test]
    fn the_clients_first_known_protocol_wins() {
        assert_eq!(
            offers(&["v5.channel.k8s.io", "v4.channel.k8s.io"]),
            Some("v5.channel.k8s.io")
        );
        assert_eq!(
            offers(&["v9.channel.k8s.io", "channel.k8s.io"]),
            Some("channel.k8s.io")
        );
        assert_eq!(offers(&[]), Some(""));
        assert_eq!(offers(&["SPDY/3.1+portforward.k8s.io"]), None);
    }

    #[test]
    fn messages_are_read_by_channel() {
        let v5 = PROTOCOLS[0];
        assert_eq!(v5.decode(b"\x00hi"), Input::Stdin(b"hi".to_vec()));
        assert_eq!(v5.decode(&[255, 0]), Input::StdinClosed);
        assert_eq!(PROTOCOLS[1].decode(&[255, 0]), Input::Ignored);
        assert_eq!(
            v5.decode(b"\x04{\"Width\":80,\"Height\":24}"),
            Input::Resize(80, 24)
        );
        assert_eq!(v5.decode(b"\x04{\"Width\":-1}"), Input::Ignored);
        assert_eq!(PROTOCOLS[4].decode(b"0aGk="), Input::Stdin(b"hi".to_vec()));
        assert_eq!(PROTOCOLS[4].encode(STDOUT, b"hi"), b"1aGk=");
    }

    #[test]
    fn the_result_has_the_form_clients_parse() {
        let text =
            |p: usize, r| result_message(&PROTOCOLS[p], &r).map(|b| String::from_utf8(b).unwrap());
        assert_eq!(text(3, Ok(0)), None);
        assert!(text(0, Ok(0)).unwrap().contains("\"Success\""));
        let failed = text(1, Ok(3)).unwrap();
        assert!(failed.contains("NonZeroExitCode") && failed.contains("\"message\":\"3\""));
        assert!(
            text(0, Err("gone".to_owned()))
                .unwrap()
                .contains("InternalError")
        );
    }

    proptest::proptest! {
        #[test]
        fn no_message_makes_the_decoder_panic(bytes: Vec<u8>, p in 0usize..6) {
            let _ = PROTOCOLS[p].decode(&bytes);
        }
    }
}
