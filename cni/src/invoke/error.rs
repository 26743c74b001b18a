//! Why a network could not be loaded or an operation on it failed.

use std::io;
use std::path::PathBuf;

use crate::types::{CniError, ErrorCode, ResultError};

/// Why no network could be loaded. Every variant names the file, and the field where it can.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The directory cannot be listed.
    #[error("list network configurations in {dir}")]
    List {
        /// The directory.
        dir: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The directory holds no `.conflist`, `.conf` or `.json` file.
    #[error("no network configuration in {dir}")]
    Empty {
        /// The directory.
        dir: PathBuf,
    },
    /// A file cannot be read.
    #[error("read network configuration {file}")]
    Read {
        /// The file.
        file: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file is larger than any sane configuration.
    #[error("network configuration {file} has more than {limit_bytes} bytes")]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// The limit.
        limit_bytes: u64,
    },
    /// A file is not JSON.
    #[error("network configuration {file} is not JSON")]
    Syntax {
        /// The file.
        file: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A field is missing or wrong.
    #[error("network configuration {file}: {field} {problem}")]
    Field {
        /// The file.
        file: PathBuf,
        /// Path of the field, as `plugins[1].type`.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// Why an operation on an attachment or a network failed.
#[derive(Debug, thiserror::Error)]
pub enum InvokeError {
    /// A plugin's executable is in none of the directories.
    #[error(
        "{verb} on network {network:?}: plugin {plugin:?}, named in {file}, is in none of {searched:?}"
    )]
    PluginMissing {
        /// The CNI verb.
        verb: Verb,
        /// The network's name.
        network: String,
        /// `type` in the configuration.
        plugin: String,
        /// The configuration.
        file: PathBuf,
        /// Where it was looked for.
        searched: Vec<PathBuf>,
    },
    /// A plugin could not be run to its end (missing rights, time limit, endless output).
    #[error("{verb} on network {network:?}: run plugin {plugin:?}")]
    Run {
        /// The CNI verb.
        verb: Verb,
        /// The network's name.
        network: String,
        /// `type` in the configuration.
        plugin: String,
        /// Why.
        #[source]
        source: linux::command::ShortCommandError,
    },
    /// A plugin refused.
    #[error("{verb} on network {network:?}: plugin {plugin:?}")]
    Refused {
        /// The CNI verb.
        verb: Verb,
        /// The network's name.
        network: String,
        /// `type` in the configuration.
        plugin: String,
        /// Its error.
        #[source]
        source: CniError,
    },
    /// A plugin's answer cannot be understood.
    #[error("{verb} on network {network:?}: read the answer of plugin {plugin:?}")]
    Answer {
        /// The CNI verb.
        verb: Verb,
        /// The network's name.
        network: String,
        /// `type` in the configuration.
        plugin: String,
        /// Why.
        #[source]
        source: ResultError,
    },
    /// The record of an attachment cannot be kept.
    #[error("{verb} on network {network:?}: {operation} attachment record {file}")]
    Record {
        /// The CNI verb.
        verb: Verb,
        /// The network's name.
        network: String,
        /// "write", "read" or "remove".
        operation: &'static str,
        /// The record.
        file: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// CHECK without a result of an earlier ADD.
    #[error("CHECK on network {network:?}: no result of an ADD is recorded for {key}")]
    NoResult {
        /// The network's name.
        network: String,
        /// The attachment.
        key: String,
    },
    /// A container id, interface name or argument that cannot be passed to a plugin.
    #[error("attachment {key}: {field} {value:?} {problem}")]
    BadAttachment {
        /// The attachment.
        key: String,
        /// Which field.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

impl InvokeError {
    /// Whether trying again later, with nothing changed by us, may succeed.
    #[must_use]
    pub fn retryable(&self) -> bool {
        match self {
            // An installer or the administrator may be about to put the file there.
            Self::PluginMissing { .. } | Self::Run { .. } | Self::Record { .. } => true,
            Self::Refused { source, .. } => match source.code {
                ErrorCode::TryAgain
                | ErrorCode::NotAvailable
                | ErrorCode::LimitedConnectivity
                | ErrorCode::Io
                | ErrorCode::Kernel
                | ErrorCode::NoAddress
                | ErrorCode::Delegate
                | ErrorCode::Other(_) => true,
                ErrorCode::IncompatibleVersion
                | ErrorCode::UnsupportedField
                | ErrorCode::UnknownContainer
                | ErrorCode::InvalidEnvironment
                | ErrorCode::Decode
                | ErrorCode::InvalidConfig
                | ErrorCode::StateDiffers => false,
            },
            Self::Answer { .. } | Self::NoResult { .. } | Self::BadAttachment { .. } => false,
        }
    }
}

/// The verbs of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Attach a container.
    Add,
    /// Detach it.
    Del,
    /// See whether it is attached as told.
    Check,
    /// Free what belongs to no valid attachment.
    Gc,
    /// See whether ADD can be served.
    Status,
    /// List the versions spoken.
    Version,
}

impl Verb {
    /// As in `CNI_COMMAND`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }
}

impl std::fmt::Display for Verb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
