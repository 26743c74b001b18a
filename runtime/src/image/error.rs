//! Why an image operation failed, and whether trying again can help.

use crate::error::chain;
use crate::service::{RuntimeError, RuntimeErrorKind};
use std::path::PathBuf;

/// A failed image operation. Says the operation and the object; the cause is the source.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The name does not parse.
    #[error("couldn't parse image name {name:?}: {reason}")]
    InvalidName {
        /// As given.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Nothing of this name, digest or id is stored.
    #[error("image {0:?} is not stored here")]
    NotStored(String),
    /// The id prefix fits several images.
    #[error("image id {0:?} is ambiguous")]
    Ambiguous(String),
    /// The registry has no such image.
    #[error("failed to pull image {image:?}: {endpoint}: not found: {message}")]
    NotFound {
        /// Normalised name.
        image: String,
        /// Registry or mirror asked.
        endpoint: String,
        /// Its words.
        message: String,
    },
    /// The registry wants other credentials.
    #[error("failed to pull image {image:?}: {endpoint}: authorization failed: {message}")]
    Unauthorized {
        /// Normalised name.
        image: String,
        /// Registry or mirror asked.
        endpoint: String,
        /// Its words.
        message: String,
    },
    /// The registry could not be reached or refused.
    #[error("failed to pull image {image:?}: {endpoint}: {message}")]
    Registry {
        /// Normalised name.
        image: String,
        /// Registry or mirror asked.
        endpoint: String,
        /// The whole cause chain.
        message: String,
        /// Whether the same request may succeed soon.
        transient: bool,
    },
    /// Content differs from its digest.
    #[error("{what} is corrupt: expected {expected}, got {actual}")]
    Digest {
        /// Which blob.
        what: String,
        /// Announced digest.
        expected: String,
        /// Digest of what came.
        actual: String,
    },
    /// A manifest or configuration cannot be used.
    #[error("unusable {what}: {reason}")]
    Unusable {
        /// Manifest, index, configuration, archive …
        what: String,
        /// Why.
        reason: String,
    },
    /// A layer cannot be unpacked.
    #[error("failed to unpack layer {layer}")]
    Unpack {
        /// Digest or diff id.
        layer: String,
        /// Why.
        #[source]
        source: UnpackError,
    },
    /// Someone uses the image.
    #[error("image {0} is in use")]
    InUse(String),
    /// The pull was given up because nobody waited for it any more, or its task died.
    #[error("pull of {0:?} was cancelled")]
    Cancelled(String),
    /// Disk or kernel.
    #[error("failed to {operation} {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// Why a layer archive was refused.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The archive or its compression is broken.
    #[error("archive is broken")]
    Archive(#[source] std::io::Error),
    /// The stream ended before its end mark (the download failed).
    #[error("layer stream was cut off")]
    Cut,
    /// A path leaves the layer.
    #[error("path {0:?} leaves the layer")]
    Escape(String),
    /// An entry that can not be.
    #[error("entry {path:?}: {reason}")]
    Entry {
        /// Its path.
        path: String,
        /// Why.
        reason: String,
    },
    /// Larger than we accept.
    #[error("layer exceeds the limit of {limit} {unit}")]
    TooLarge {
        /// The bound.
        limit: u64,
        /// Of what.
        unit: &'static str,
    },
    /// Disk or kernel.
    #[error("failed to {operation} {path:?}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which entry.
        path: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// Result of an image operation.
pub(crate) type Result<T> = std::result::Result<T, ImageError>;

impl ImageError {
    /// Whether the same call may succeed without anybody changing anything.
    pub fn transient(&self) -> bool {
        match self {
            Self::Registry { transient, .. } => *transient,
            Self::Digest { .. } | Self::Cancelled(_) => true,
            Self::Unpack { source, .. } => matches!(source, UnpackError::Cut),
            Self::InvalidName { .. }
            | Self::NotStored(_)
            | Self::Ambiguous(_)
            | Self::NotFound { .. }
            | Self::Unauthorized { .. }
            | Self::Unusable { .. }
            | Self::InUse(_)
            | Self::Io { .. } => false,
        }
    }

    /// Makes the `map_err` for an operation on a path.
    pub(crate) fn io(
        operation: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            operation,
            path,
            source,
        }
    }

    /// Class of the error at the engine's border.
    pub fn kind(&self) -> RuntimeErrorKind {
        match self {
            Self::InvalidName { .. } | Self::Ambiguous(_) => RuntimeErrorKind::Invalid,
            Self::NotStored(_) => RuntimeErrorKind::NotFound,
            Self::NotFound { .. }
            | Self::Unauthorized { .. }
            | Self::Registry { .. }
            | Self::Digest { .. }
            | Self::Unusable { .. }
            | Self::Unpack { .. }
            | Self::Cancelled(_) => RuntimeErrorKind::ImagePull,
            Self::InUse(_) => RuntimeErrorKind::Conflict,
            Self::Io { .. } => RuntimeErrorKind::System,
        }
    }
}

impl From<&ImageError> for RuntimeError {
    fn from(error: &ImageError) -> Self {
        Self {
            kind: error.kind(),
            message: chain(error),
        }
    }
}

impl From<ImageError> for RuntimeError {
    fn from(error: ImageError) -> Self {
        Self::from(&error)
    }
}
