//! What is kept on disk about an image: `<root>/images/<hex of the id>.json`.

use super::error::{ImageError, Result};
use super::reference::is_sha256;
use crate::service::{ImageConfig, ImageId, ImageStatus};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Format written by this version.
pub(crate) const VERSION: u32 = 1;

/// A stored image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Format of the file.
    pub(crate) version: u32,
    /// `sha256:…` of the configuration.
    pub(crate) id: String,
    /// `registry/repository:tag` names.
    pub(crate) tags: Vec<String>,
    /// `registry/repository@digest` names.
    pub(crate) digests: Vec<String>,
    /// The configuration as it came.
    pub(crate) config: String,
    /// Diff ids, lowest first.
    pub(crate) diff_ids: Vec<String>,
    /// Directories below `layers`, lowest first: the layers, and one more with attributes of
    /// implicit parents if need be.
    pub(crate) overlay: Vec<String>,
    /// Bytes of file content in all layers.
    pub(crate) size_bytes: u64,
    /// When it was stored, nanoseconds since the epoch.
    pub(crate) stored_at_ns: i64,
    /// Never collected.
    #[serde(default)]
    pub(crate) pinned: bool,
    /// Boot in which it was written; while that lasts, the page cache makes good for what has
    /// not reached the disk.
    pub(crate) boot_id: String,
    /// All its layers have reached the disk.
    pub(crate) durable: bool,
}

impl Record {
    /// File name below `images`.
    pub(crate) fn file_name(&self) -> String {
        format!("{}.json", self.hex())
    }

    /// The id without `sha256:`.
    pub(crate) fn hex(&self) -> &str {
        self.id.trim_start_matches("sha256:")
    }

    /// As the engine's callers see it.
    pub(crate) fn status(&self) -> ImageStatus {
        let config = parse_config(self.config.as_bytes())
            .map(|c| c.image)
            .unwrap_or_default();
        ImageStatus {
            id: ImageId(self.id.clone()),
            repo_tags: self.tags.clone(),
            repo_digests: self.digests.clone(),
            size_bytes: self.size_bytes,
            pinned: self.pinned,
            user: config.user.clone(),
            config,
        }
    }
}

/// A parsed configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ParsedConfig {
    /// What matters to run it.
    pub(crate) image: ImageConfig,
    /// Diff ids, lowest layer first.
    pub(crate) diff_ids: Vec<String>,
}

// Docker writes `null` for what is empty, hence the options (OCI image-spec config.md).
#[derive(Deserialize)]
struct WireConfig {
    config: Option<WireRun>,
    rootfs: WireRootfs,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct WireRun {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    volumes: Option<BTreeMap<String, serde_json::Value>>,
    stop_signal: Option<String>,
    labels: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct WireRootfs {
    diff_ids: Option<Vec<String>>,
}

/// Parses an image configuration.
///
/// # Errors
/// [`ImageError::Unusable`] naming what is wrong.
pub(crate) fn parse_config(blob: &[u8]) -> Result<ParsedConfig> {
    let unusable = |reason: String| ImageError::Unusable {
        what: "image configuration".to_owned(),
        reason,
    };
    let wire: WireConfig = serde_json::from_slice(blob).map_err(|e| unusable(e.to_string()))?;
    let run = wire.config.unwrap_or_default();
    let diff_ids = wire.rootfs.diff_ids.unwrap_or_default();
    if let Some(bad) = diff_ids.iter().find(|d| !is_sha256(d)) {
        return Err(unusable(format!("diff id {bad:?} is not a sha256 digest")));
    }
    Ok(ParsedConfig {
        image: ImageConfig {
            entrypoint: run.entrypoint.unwrap_or_default(),
            cmd: run.cmd.unwrap_or_default(),
            env: run.env.unwrap_or_default(),
            working_dir: run.working_dir.unwrap_or_default(),
            user: run.user.unwrap_or_default(),
            volumes: run.volumes.unwrap_or_default().into_keys().collect(),
            stop_signal: run.stop_signal.filter(|s| !s.is_empty()),
            labels: run.labels.unwrap_or_default(),
        },
        diff_ids,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_full_of_nulls_is_an_empty_one() {
        let parsed = parse_config(
            br#"{"config":{"Env":null,"Cmd":null,"Volumes":null,"Labels":null,"StopSignal":""},
                "rootfs":{"type":"layers","diff_ids":null}}"#,
        )
        .unwrap();
        assert_eq!(parsed.image, ImageConfig::default());
        assert!(parsed.diff_ids.is_empty());
    }

    #[test]
    fn a_diff_id_that_is_no_digest_is_refused() {
        let error = parse_config(br#"{"rootfs":{"diff_ids":["sha256:../../etc"]}}"#).unwrap_err();
        assert!(error.to_string().contains("../../etc"), "{error}");
    }
}
