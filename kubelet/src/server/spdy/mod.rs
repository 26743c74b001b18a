//! SPDY/3.1, the server's side: many streams over one connection, as clients of exec, attach and
//! port-forward still speak it (plain after `Upgrade: SPDY/3.1`, or inside a WebSocket).
//!
//! [`frame`] and [`headers`] are pure; [`connection`] owns the two tasks' work of one connection
//! (one future, no spawn); [`stream`] is what the users of a stream hold.
//!
//! Bounds: control frames and header blocks 64 KiB, streams per connection, bytes that wait for
//! a stream's user and for all of a connection's ([`connection`]). Beyond them nothing more is
//! read, so that TCP holds the peer back: the implementation in Kubernetes' clients knows no
//! windows. A peer that does use them is obeyed.

pub mod connection;
mod dictionary;
pub mod frame;
pub mod headers;
pub mod stream;
mod window;

pub use connection::{Session, open};
pub use headers::Headers;
pub use stream::{Received, Stream, StreamReader, StreamWriter};

#[cfg(test)]
mod tests;
