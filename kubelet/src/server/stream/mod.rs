//! exec, attach and port-forward: streams over WebSockets and SPDY.
//!
//! ```text
//!  upgrade   which protocol, and the answer                                        pure
//!  channel   what messages of the WebSocket channel protocols mean                 pure
//!  wire      a client of exec or attach: [`wire::Incoming`], [`wire::Outgoing`]
//!  websocket, remote   the two kinds of wire: WebSocket and SPDY
//!  pump      bytes between a wire and a session of the engine
//!  forward, channels   port-forward over SPDY, and over WebSocket channels
//!  serve     the handlers: who is addressed, upgrade, run
//! ```

pub mod channel;
mod channels;
mod forward;
pub mod pump;
mod remote;
mod serve;
#[cfg(test)]
mod tests;
pub mod upgrade;
mod websocket;
pub mod wire;

use runtime::service::ExecRequest;

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
