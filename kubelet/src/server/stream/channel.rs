//! The channel protocols of remote commands over WebSocket (`*.channel.k8s.io`): one message is
//! one channel byte and its payload. Pure.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::borrow::Cow;

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

/// The names of [`PROTOCOLS`].
pub const NAMES: &[&str] = &[
    PROTOCOLS[0].name,
    PROTOCOLS[1].name,
    PROTOCOLS[2].name,
    PROTOCOLS[3].name,
    PROTOCOLS[4].name,
    PROTOCOLS[5].name,
];

/// A protocol by its name; the oldest for an unknown one.
pub fn named(name: &str) -> Protocol {
    let found = PROTOCOLS.iter().find(|p| p.name == name);
    *found.unwrap_or(&PROTOCOLS[5])
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
    /// The channel of a message and its payload; none when it has neither.
    pub fn split<'a>(&self, message: &'a [u8]) -> Option<(u8, Cow<'a, [u8]>)> {
        let (&first, payload) = message.split_first()?;
        if self.base64 {
            let payload = STANDARD.decode(payload).ok()?;
            Some((first.wrapping_sub(b'0'), Cow::Owned(payload)))
        } else {
            Some((first, Cow::Borrowed(payload)))
        }
    }

    /// Reads a message of exec or attach.
    pub fn decode(&self, message: &[u8]) -> Input {
        let Some((channel, payload)) = self.split(message) else {
            return Input::Ignored;
        };
        match channel {
            STDIN if payload.is_empty() => Input::Ignored,
            STDIN => Input::Stdin(payload.into_owned()),
            RESIZE => size(&payload).map_or(Input::Ignored, |(w, h)| Input::Resize(w, h)),
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
    size_of(&serde_json::from_slice(payload).ok()?)
}

/// The same, already read.
pub fn size_of(value: &serde_json::Value) -> Option<(u16, u16)> {
    let field = |name: &str| value.get(name)?.as_u64()?.try_into().ok();
    Some((field("Width")?, field("Height")?))
}

/// The last word on the error channel: a `Status` object, or for older protocols (without
/// `status`) a line of text and nothing on success.
pub fn result_message(status: bool, result: &Result<i32, String>) -> Option<Vec<u8>> {
    let failure = |message: &str| message.as_bytes().to_vec();
    let text = match (result, status) {
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
        let text = |p: usize, r| {
            result_message(PROTOCOLS[p].status, &r).map(|b| String::from_utf8(b).unwrap())
        };
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
