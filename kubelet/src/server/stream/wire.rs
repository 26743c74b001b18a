//! What exec and attach need of a connection, however its streams are carried.

use super::channel::Input;
use std::io;

/// What the client sends.
pub trait Incoming: Send {
    /// The next thing; none when the client is gone. Cancel-safe.
    fn next(&mut self) -> impl Future<Output = Option<Input>> + Send;
}

/// What is sent to the client.
pub trait Outgoing: Send {
    /// Sends output on a channel; an empty piece only says that the session is open.
    ///
    /// # Errors
    /// When the client is gone.
    fn send(&mut self, channel: u8, bytes: &[u8]) -> impl Future<Output = io::Result<()>> + Send;

    /// Says how it ended (nothing, when the client left first) and hangs up.
    fn end(self, result: Option<&Result<i32, String>>) -> impl Future<Output = ()> + Send;
}
