//! Artefacts kept by the hash of their inputs: `~/.cache/ferrule/<name>-<hash>/`. A directory
//! that exists is complete: it is built under another name and renamed at the end. A lock file
//! keeps two builders apart; the second finds the first one's result.

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Everything that decides what an artefact will be.
#[derive(Debug, Default)]
pub struct Inputs {
    hash: Sha256,
}

impl Inputs {
    /// Adds a word, such as a flag or a version.
    pub fn word(&mut self, word: &str) -> &mut Self {
        self.bytes(word.as_bytes())
    }

    /// Adds a file's name and content.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn file(&mut self, path: &Path) -> Result<&mut Self> {
        let content = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Ok(self.word(&name).bytes(&content))
    }

    /// Adds every file directly in a directory whose name ends in one of `suffixes`, in order of
    /// their names.
    ///
    /// # Errors
    /// When the directory or a file cannot be read.
    pub fn directory(&mut self, dir: &Path, suffixes: &[&str]) -> Result<&mut Self> {
        let entries = fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
        let mut paths: Vec<PathBuf> = entries
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .filter(|path| {
                let name = path.to_string_lossy();
                path.is_file() && suffixes.iter().any(|suffix| name.ends_with(suffix))
            })
            .collect();
        paths.sort();
        for path in paths {
            self.file(&path)?;
        }
        Ok(self)
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        // Length first, so that moving a byte from one input to the next changes the hash.
        self.hash.update((bytes.len() as u64).to_le_bytes());
        self.hash.update(bytes);
        self
    }

    /// Sixteen hexadecimal digits.
    #[must_use]
    pub fn digest(&self) -> String {
        let digest = self.hash.clone().finalize();
        digest
            .iter()
            .take(8)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// The directory of the artefact `name` with these inputs; `build` fills it when it is not there.
///
/// # Errors
/// When `build` fails (nothing is kept then) or the cache cannot be written.
pub fn ensure(
    cache: &Path,
    name: &str,
    inputs: &Inputs,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let key = format!("{name}-{}", inputs.digest());
    let complete = cache.join(&key);
    if complete.is_dir() {
        return Ok(complete);
    }
    fs::create_dir_all(cache).with_context(|| format!("create {}", cache.display()))?;
    let lock_path = cache.join(format!("{key}.lock"));
    let lock = File::create(&lock_path)
        .with_context(|| format!("create lock file {}", lock_path.display()))?;
    lock.lock()
        .with_context(|| format!("lock {}", lock_path.display()))?;
    if complete.is_dir() {
        return Ok(complete);
    }
    let partial = cache.join(format!("{key}.partial"));
    if partial.exists() {
        // Ours by name and by the lock we hold: what a killed builder left.
        fs::remove_dir_all(&partial)
            .with_context(|| format!("remove unfinished {}", partial.display()))?;
    }
    fs::create_dir(&partial).with_context(|| format!("create {}", partial.display()))?;
    build(&partial)?;
    fs::rename(&partial, &complete)
        .with_context(|| format!("move finished {}", complete.display()))?;
    Ok(complete)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("ferrule-{name}-{}", std::process::id()));
        drop(fs::remove_dir_all(&dir));
        dir
    }

    #[test]
    fn the_same_inputs_are_built_once_and_others_again() {
        let cache = scratch("cache");
        let mut builds = 0;
        for word in ["a", "a", "b"] {
            let mut inputs = Inputs::default();
            inputs.word(word);
            let dir = ensure(&cache, "thing", &inputs, |dir| {
                builds += 1;
                Ok(fs::write(dir.join("out"), word)?)
            })
            .unwrap();
            assert_eq!(fs::read_to_string(dir.join("out")).unwrap(), word);
        }
        assert_eq!(builds, 2);
        fs::remove_dir_all(cache).unwrap();
    }

    #[test]
    fn a_failed_build_leaves_nothing_that_looks_complete() {
        let cache = scratch("cache-failed");
        let inputs = Inputs::default();
        let failed = ensure(&cache, "thing", &inputs, |dir| {
            fs::write(dir.join("half"), "")?;
            anyhow::bail!("killed")
        });
        assert!(failed.is_err());
        let dir = ensure(&cache, "thing", &inputs, |_| Ok(())).unwrap();
        assert!(!dir.join("half").exists());
        fs::remove_dir_all(cache).unwrap();
    }

    #[test]
    fn moving_a_letter_between_inputs_changes_the_digest() {
        let digest = |words: [&str; 2]| {
            let mut inputs = Inputs::default();
            inputs.word(words[0]).word(words[1]);
            inputs.digest()
        };
        assert_ne!(digest(["ab", "c"]), digest(["a", "bc"]));
    }
}
