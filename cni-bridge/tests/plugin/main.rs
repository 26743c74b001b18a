//! The built plugin against the kernel, as a runtime calls it. Needs root; every test has network
//! namespaces of its own and leaves nothing.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on shall stop")]

mod chains;
mod filters;
mod kills;
mod lab;
mod limits;
mod ports;
mod steps;
mod storm;
mod verbs;
