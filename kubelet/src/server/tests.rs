//! The server over real TLS, with a scripted runtime.
