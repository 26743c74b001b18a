//! Why a request was not carried out. What each means to a caller is decided in
//! `service/status.rs` only.

use crate::parameters::ParameterError;
use linux::command::ShortCommandError;
use linux::fs::FsError;
use std::io;
use std::path::PathBuf;

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The request itself is wrong.
    #[error("{what}")]
    Invalid {
        /// What is wrong with it.
        what: String,
    },
    /// A parameter is not understood.
    #[error(transparent)]
    Parameter(#[from] ParameterError),
    /// There is no such thing.
    #[error("{what} {id} does not exist")]
    NotFound {
        /// Volume, snapshot, path …
        what: &'static str,
        /// Which.
        id: String,
    },
    /// The name is taken by something else.
    #[error("{what} {name:?} exists already, {how}")]
    Exists {
        /// Volume, snapshot …
        what: &'static str,
        /// Its name.
        name: String,
        /// How it differs from what was asked for.
        how: String,
    },
    /// Another request is at work on the same thing.
    #[error("another operation on {id} is under way")]
    Busy {
        /// On what.
        id: String,
    },
    /// The pool has no room for it.
    #[error("the pool has {available} bytes left, {wanted} are needed")]
    NoRoom {
        /// What is needed, in bytes.
        wanted: u64,
        /// What can be given away, in bytes.
        available: u64,
    },
    /// It was asked for at places that this node is not.
    #[error("this is node {node}, which is not among the places asked for")]
    Elsewhere {
        /// This node.
        node: String,
    },
    /// A size that cannot be.
    #[error("{what}")]
    OutOfRange {
        /// Why it cannot be.
        what: String,
    },
    /// The state of the thing forbids it.
    #[error("{what}")]
    Precondition {
        /// What stands against it.
        what: String,
    },
    /// A token of a list is not one that we gave.
    #[error("starting token {token:?} is not one that was given out")]
    BadToken {
        /// The token.
        token: String,
    },
    /// The bytes on the pool are not what the record says; nothing was changed.
    #[error("volume {id} is damaged: {what}")]
    Damaged {
        /// Which.
        id: String,
        /// What is wrong.
        what: String,
    },
    /// A file could not be handled.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// The kernel refused.
    #[error("{operation} {object}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A program did not run to its end.
    #[error("format or check {image}")]
    Command {
        /// The image.
        image: PathBuf,
        /// Why.
        #[source]
        source: ShortCommandError,
    },
    /// A program ended with an error.
    #[error("{program} of {image} failed ({status}): {output}")]
    Program {
        /// The program.
        program: String,
        /// The image.
        image: PathBuf,
        /// How it ended.
        status: String,
        /// What it said, cut.
        output: String,
    },
}

impl DriverError {
    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid { what: what.into() }
    }

    pub(crate) fn precondition(what: impl Into<String>) -> Self {
        Self::Precondition { what: what.into() }
    }

    pub(crate) fn not_found(what: &'static str, id: impl ToString) -> Self {
        Self::NotFound {
            what,
            id: id.to_string(),
        }
    }

    /// For `map_err` on a system call.
    pub(crate) fn io<E: Into<io::Error>>(
        operation: &'static str,
        object: impl std::fmt::Display,
    ) -> impl FnOnce(E) -> Self {
        let object = object.to_string();
        move |source| Self::Io {
            operation,
            object,
            source: source.into(),
        }
    }
}

/// The error and its sources in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(": ");
        text.push_str(&source.to_string());
        next = source.source();
    }
    text
}
