//! Images, their registries' credentials and the service that keeps them.

use super::{ImageId, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// An image as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStatus {
    /// Its id.
    pub id: ImageId,
    /// `repository:tag` names.
    pub repo_tags: Vec<String>,
    /// `repository@sha256:…` names.
    pub repo_digests: Vec<String>,
    /// Unpacked size in bytes.
    pub size_bytes: u64,
    /// Never collected.
    pub pinned: bool,
    /// The image's USER as written.
    pub user: String,
    /// Configuration needed to run it.
    pub config: ImageConfig,
}

/// The part of an image's configuration that matters to run it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// ENTRYPOINT.
    pub entrypoint: Vec<String>,
    /// CMD.
    pub cmd: Vec<String>,
    /// ENV, `NAME=value`.
    pub env: Vec<String>,
    /// WORKDIR.
    pub working_dir: String,
    /// USER.
    pub user: String,
    /// VOLUME paths.
    pub volumes: Vec<String>,
    /// STOPSIGNAL.
    pub stop_signal: Option<String>,
    /// LABEL.
    pub labels: BTreeMap<String, String>,
}

/// Credentials for a registry.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum RegistryAuth {
    /// None.
    #[default]
    Anonymous,
    /// User and password.
    Basic {
        /// User.
        username: String,
        /// Password.
        password: String,
    },
    /// A bearer (registry or identity) token.
    Token(String),
}

impl fmt::Debug for RegistryAuth {
    /// Never prints a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("Anonymous"),
            Self::Basic { username, .. } => write!(f, "Basic({username})"),
            Self::Token(_) => f.write_str("Token"),
        }
    }
}

/// Use of the image filesystem.
#[derive(Debug, Clone, Default)]
pub struct FsUsage {
    /// Mount point or directory.
    pub path: PathBuf,
    /// Bytes used by images.
    pub used_bytes: u64,
    /// Capacity of the filesystem.
    pub capacity_bytes: u64,
    /// Bytes available.
    pub available_bytes: u64,
    /// Inodes.
    pub inodes: u64,
    /// Free inodes.
    pub inodes_free: u64,
}

/// An image that was pulled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// The image.
    pub status: ImageStatus,
    /// Which of the credentials the registry took; none when none was given.
    pub credential: Option<usize>,
}

/// Images.
pub trait ImageService: Send + Sync + 'static {
    /// The image behind a name, digest or id; none when not stored.
    fn status(&self, image: &str) -> Option<ImageStatus>;
    /// All images (from memory).
    fn list(&self) -> Vec<ImageStatus>;
    /// Pulls; identical pulls in flight share one download. Credentials are tried in order.
    fn pull(
        &self,
        image: &str,
        auth: &[RegistryAuth],
    ) -> impl Future<Output = Result<Pulled>> + Send;
    /// Removes a name or, by id, all names and the layers nobody else uses. Idempotent.
    fn remove(&self, image: &str) -> impl Future<Output = Result<()>> + Send;
    /// Disk use.
    fn fs_usage(&self) -> FsUsage;
}
