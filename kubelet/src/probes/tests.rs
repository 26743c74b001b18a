//! Probes against a runtime and servers in this process.
use super::*;
