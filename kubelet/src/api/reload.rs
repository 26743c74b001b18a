//! Things read from files that others replace under us: certificates, keys, CA bundles.
//!
//! A [`Reloading`] value is looked at when it is needed (a TLS handshake); it then compares the
//! files' identity with what it read last, at most once a second, and reads them again when they
//! changed. No task, no timer, and a symlink swapped by a certificate manager is seen like any
//! other change. A bad new version is reported once and the old one stays in use.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longest time a replaced file may go unnoticed.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Longest file read: a CA bundle of a whole operating system has about 250 kB.
const MAX_BYTES: u64 = 4 << 20;

/// Where PEM text comes from.
#[derive(Clone)]
pub enum PemSource {
    /// A file, read again when it changes.
    File(PathBuf),
    /// Text inside another file (`…-data` in a kubeconfig), found again when that changes.
    Inside {
        /// The file.
        file: PathBuf,
        /// Where in it, for messages.
        place: &'static str,
        /// Finds the text.
        find: fn(&Path) -> Result<Vec<u8>, String>,
    },
}

impl fmt::Debug for PemSource {
    /// Never prints a key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for PemSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Inside { file, place, .. } => write!(f, "{place} of {}", file.display()),
        }
    }
}

/// What identifies a version of a file: device, inode, size, mtime. None: it is not there.
type Version = Option<(u64, u64, u64, i64, i64)>;

impl PemSource {
    fn version(&self) -> Version {
        match self {
            Self::File(path) | Self::Inside { file: path, .. } => version(path),
        }
    }

    fn read(&self) -> Result<Vec<u8>, String> {
        match self {
            Self::File(path) => {
                let failed = |e: std::io::Error| format!("read {}: {e}", path.display());
                let meta = std::fs::metadata(path).map_err(failed)?;
                if meta.len() > MAX_BYTES {
                    return Err(format!(
                        "read {}: more than {MAX_BYTES} bytes",
                        path.display()
                    ));
                }
                std::fs::read(path).map_err(failed)
            }
            Self::Inside { file, find, .. } => find(file),
        }
    }
}

fn version(path: &Path) -> Version {
    let meta = std::fs::metadata(path).ok()?;
    Some((
        meta.dev(),
        meta.ino(),
        meta.len(),
        meta.mtime(),
        meta.mtime_nsec(),
    ))
}

type Build<T> = dyn Fn(&[Vec<u8>]) -> Result<T, String> + Send + Sync;

/// A value made of some PEM files, as new as they are.
pub struct Reloading<T> {
    what: &'static str,
    sources: Vec<PemSource>,
    build: Box<Build<T>>,
    state: Mutex<State<T>>,
}

struct State<T> {
    looked: Option<Instant>,
    versions: Vec<Version>,
    value: Option<Arc<T>>,
    problem: Option<String>,
    generation: u64,
}

impl<T> fmt::Debug for Reloading<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reloading")
            .field("what", &self.what)
            .field("sources", &self.sources)
            .finish_non_exhaustive()
    }
}

impl<T> Reloading<T> {
    /// Will make a value (`what`, for messages) of these sources; nothing is read yet.
    pub fn new(
        what: &'static str,
        sources: Vec<PemSource>,
        build: impl Fn(&[Vec<u8>]) -> Result<T, String> + Send + Sync + 'static,
    ) -> Self {
        Self {
            what,
            sources,
            build: Box::new(build),
            state: Mutex::new(State {
                looked: None,
                versions: Vec::new(),
                value: None,
                problem: None,
                generation: 0,
            }),
        }
    }

    /// The newest value that could be read, if there ever was one.
    pub fn get(&self) -> Option<Arc<T>> {
        self.refreshed().value.clone()
    }

    /// The value with a number that grows whenever it was read anew.
    pub fn versioned(&self) -> Option<(u64, Arc<T>)> {
        let state = self.refreshed();
        state.value.clone().map(|v| (state.generation, v))
    }

    /// Why the files as they are now cannot be used.
    pub fn problem(&self) -> Option<String> {
        self.refreshed().problem.clone()
    }

    fn refreshed(&self) -> std::sync::MutexGuard<'_, State<T>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.looked.is_some_and(|at| at.elapsed() < LOOK_AGAIN) {
            return state;
        }
        let first = state.looked.is_none();
        state.looked = Some(Instant::now());
        let versions: Vec<_> = self.sources.iter().map(PemSource::version).collect();
        if !first && versions == state.versions {
            return state;
        }
        state.versions = versions;
        match self.load() {
            Ok(value) => {
                if !first {
                    tracing::info!(sources = ?self.sources, "Read {} anew", self.what);
                }
                state.value = Some(Arc::new(value));
                state.problem = None;
                state.generation += 1;
            }
            Err(problem) => {
                if state.problem.as_ref() != Some(&problem) {
                    // Without a value the caller fails and says why; with one nobody else would.
                    if state.value.is_some() {
                        tracing::warn!("Keeping the old {}: {problem}", self.noun());
                    }
                }
                state.problem = Some(problem);
            }
        }
        state
    }

    fn noun(&self) -> &str {
        self.what.trim_start_matches("the ")
    }

    fn load(&self) -> Result<T, String> {
        let texts: Vec<_> = self
            .sources
            .iter()
            .map(PemSource::read)
            .collect::<Result<_, _>>()?;
        (self.build)(&texts)
    }

    /// Forgets when it last looked, so that a test need not wait.
    #[cfg(test)]
    pub fn look_now(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.looked = state.looked.and_then(|at| at.checked_sub(LOOK_AGAIN * 2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(path: &Path) -> Reloading<u32> {
        Reloading::new(
            "a number",
            vec![PemSource::File(path.to_owned())],
            |texts| {
                let text = String::from_utf8_lossy(&texts[0]);
                text.trim()
                    .parse()
                    .map_err(|_| format!("{text:?} is no number"))
            },
        )
    }

    #[test]
    fn a_replaced_file_is_read_again_and_a_bad_one_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("n");
        let reloading = number(&path);
        assert_eq!(reloading.get(), None);
        assert!(reloading.problem().unwrap().contains("No such file"));
        std::fs::write(&path, "1").unwrap();
        reloading.look_now();
        assert_eq!(reloading.get().as_deref(), Some(&1));
        std::fs::write(&path, "22").unwrap();
        reloading.look_now();
        assert_eq!(reloading.versioned(), Some((2, Arc::new(22))));
        std::fs::write(&path, "bad").unwrap();
        reloading.look_now();
        assert_eq!(reloading.get().as_deref(), Some(&22));
        assert_eq!(reloading.problem().unwrap(), "\"bad\" is no number");
    }

    #[test]
    fn a_swapped_symlink_is_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("current");
        for (name, text) in [("a", "7"), ("b", "8")] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        std::os::unix::fs::symlink("a", &link).unwrap();
        let reloading = number(&link);
        assert_eq!(reloading.get().as_deref(), Some(&7));
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink("b", &link).unwrap();
        reloading.look_now();
        assert_eq!(reloading.get().as_deref(), Some(&8));
    }
}
