//! Where things lie: the workspace, the user's cache, a lab.

use anyhow::{Context, Result};
use std::env;
use std::path::{Path, PathBuf};

/// Root of the workspace this program was compiled from.
#[must_use]
pub fn workspace() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}

/// Where built artefacts that depend on their inputs only are kept, shared by all clones.
///
/// # Errors
/// When neither `XDG_CACHE_HOME` nor `HOME` is set.
pub fn cache() -> Result<PathBuf> {
    if let Some(dir) = env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
        return Ok(PathBuf::from(dir).join("ferrule"));
    }
    let home = env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?;
    Ok(PathBuf::from(home).join(".cache/ferrule"))
}

/// Cargo's target directory, as cargo itself would choose it.
#[must_use]
pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(
        || workspace().join("target"),
        |dir| workspace().join(PathBuf::from(dir)),
    )
}

/// Directory that holds one directory per lab. It must not lie below `/etc`, `/opt` or `/var`:
/// nodes see those through an overlay whose writable layer is in here.
#[must_use]
pub fn labs() -> PathBuf {
    PathBuf::from("/srv/ferrule-lab")
}
