//! Values of the specification: versions, results and errors.
//!
//! The inner types ([`AttachResult`] and its parts) know no version and are not serialisable;
//! `wire` converts at the rim, so that a new specification version touches one file.

mod error;
mod result;
mod version;
mod wire;

pub use error::{CniError, ErrorCode};
pub use result::{AttachResult, Dns, Interface, IpConfig, Route};
pub use version::{SpecVersion, UnknownVersion};
pub use wire::ResultError;
