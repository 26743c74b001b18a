//! Programs the lab needs, built from source: Go programs kept by content in the user's cache
//! (another clone with the same inputs does not build them again), ours by cargo.

pub mod cache;
pub mod go;
pub mod ours;
