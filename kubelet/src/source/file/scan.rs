//! One look at all manifests. Blocking.

use crate::source::Source;
use crate::source::manifest::{self, MAX_BYTES, Origin};
use k8s_openapi::api::core::v1::Pod;
use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// A file is read when nothing was written to it for this long: who writes in pieces is done.
pub(super) const QUIET: Duration = Duration::from_millis(100);
/// A file that never gets quiet is read after this long all the same.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a look found.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The pods, in the order of their files.
    pub(super) pods: Vec<Pod>,
    /// What cannot be used, and why.
    pub(super) problems: Vec<Problem>,
    /// Look again this soon: something is being written.
    pub(super) again: Option<Duration>,
    /// Whether the place could be looked at: if not, nothing may be concluded.
    pub(super) readable: bool,
}

/// Something that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum Problem {
    /// The place itself.
    #[error("Unable to read config path {path:?}: {message}")]
    Place {
        /// Where.
        path: PathBuf,
        /// Why.
        message: String,
    },
    /// One file.
    #[error("Could not process manifest file {path:?}: {message}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        message: String,
    },
}

/// What tells one content of a file from the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified_ns: i128,
    changed_ns: i128,
}

impl Stamp {
    fn of(meta: &Metadata) -> Self {
        let ns = |s: i64, n: i64| i128::from(s) * 1_000_000_000 + i128::from(n);
        Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified_ns: ns(meta.mtime(), meta.mtime_nsec()),
            changed_ns: ns(meta.ctime(), meta.ctime_nsec()),
        }
    }
}

/// A file known from the last look.
#[derive(Debug)]
struct Known {
    /// What was read; none before the first reading.
    stamp: Option<Stamp>,
    /// The pod of the last good content.
    pod: Option<Pod>,
    /// Why the newest content is not good.
    trouble: Option<String>,
    /// Since when it is waited for to get quiet.
    restless: Option<Instant>,
}

/// Remembers files between looks.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    path: PathBuf,
    node: String,
    files: BTreeMap<PathBuf, Known>,
    /// Since when the place is missing: it may be about to be replaced.
    missing: Option<Instant>,
}

impl Scanner {
    pub(super) fn new(path: &Path, node: &str) -> Self {
        Self {
            path: path.to_owned(),
            node: node.to_owned(),
            ..Self::default()
        }
    }

    /// Looks.
    pub(super) fn scan(&mut self) -> Found {
        let mut found = Found::default();
        let place = std::fs::metadata(&self.path);
        let files = match place {
            Ok(meta) if meta.is_dir() => self.list(),
            Ok(meta) if meta.is_file() => Ok(vec![self.path.clone()]),
            Ok(_) => Err(io::Error::other("path is not a directory or file")),
            Err(error) => Err(error),
        };
        match files {
            Ok(files) => {
                self.missing = None;
                found.readable = true;
                self.files.retain(|path, _| files.contains(path));
                for file in files {
                    self.file(&file, &mut found);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.gone(&mut found),
            Err(error) => found.problems.push(Problem::Place {
                path: self.path.clone(),
                message: error.to_string(),
            }),
        }
        found
    }

    /// No place, no pods; but a place that is being replaced is missing for a moment only.
    fn gone(&mut self, found: &mut Found) {
        let since = *self.missing.get_or_insert_with(Instant::now);
        if !self.files.is_empty() && since.elapsed() < QUIET {
            found.again = Some(QUIET);
            return;
        }
        self.files.clear();
        found.readable = true;
        found.problems.push(Problem::Place {
            path: self.path.clone(),
            message: "path does not exist, ignoring".to_owned(),
        });
    }

    fn list(&self) -> io::Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            let entry = entry?;
            if !is_left_alone(&entry.file_name().to_string_lossy()) {
                files.push(entry.path());
            }
        }
        files.sort();
        Ok(files)
    }

    /// Looks at one file.
    fn file(&mut self, path: &Path, found: &mut Found) {
        let meta = match std::fs::metadata(path) {
            Ok(meta) => meta,
            Err(error) => {
                // Gone between listing and looking, or a link to nothing.
                self.files.remove(path);
                if path.symlink_metadata().is_ok() {
                    found.problems.push(problem(path, error.to_string()));
                }
                return;
            }
        };
        if !meta.is_file() {
            self.files.remove(path);
            let what = if meta.is_dir() {
                "it is a directory, not recursing into manifest path"
            } else {
                "it is not a regular file"
            };
            found.problems.push(problem(path, what.to_owned()));
            return;
        }
        let known = self.files.entry(path.to_owned()).or_insert(Known {
            stamp: None,
            pod: None,
            trouble: None,
            restless: None,
        });
        let stamp = Stamp::of(&meta);
        if known.stamp != Some(stamp) {
            if let Some(wait) = restless_for(&meta, known) {
                found.again = Some(found.again.map_or(wait, |a| a.min(wait)));
            } else {
                known.restless = None;
                known.stamp = Some(stamp);
                let read = read(path, &self.node);
                known.trouble = read.as_ref().err().cloned();
                if let Ok(pod) = read {
                    known.pod = Some(pod);
                }
            }
        }
        if let Some(message) = &known.trouble {
            found.problems.push(problem(path, message.clone()));
        }
        found.pods.extend(known.pod.clone());
    }
}

fn problem(path: &Path, message: String) -> Problem {
    Problem::File {
        path: path.to_owned(),
        message,
    }
}

/// Names nobody means as a manifest: hidden files, and backups and probes of editors.
fn is_left_alone(name: &str) -> bool {
    name.starts_with('.') || name.ends_with('~') || name.starts_with('#') && name.ends_with('#')
}

/// How long to wait for a file that was written to just now; none when it is quiet, its time is
/// not to be believed, or it was waited for long enough.
fn restless_for(meta: &Metadata, known: &mut Known) -> Option<Duration> {
    let age = SystemTime::now()
        .duration_since(meta.modified().ok()?)
        .ok()?;
    if age >= QUIET {
        return None;
    }
    let since = *known.restless.get_or_insert_with(Instant::now);
    (since.elapsed() < PATIENCE).then(|| QUIET - age + Duration::from_millis(5))
}

/// Reads one file. Bounded, and never waits: a pipe put in its place has no writer.
fn read(path: &Path, node: &str) -> Result<Pod, String> {
    let open = || -> io::Result<Vec<u8>> {
        let nonblocking = rustix::fs::OFlags::NONBLOCK.bits();
        let flags = i32::try_from(nonblocking).unwrap_or(0);
        let file = File::options().read(true).custom_flags(flags).open(path)?;
        let mut bytes = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(io::Error::other(format!(
                "it is longer than {MAX_BYTES} bytes"
            )));
        }
        Ok(bytes)
    };
    let bytes = open().map_err(|e| e.to_string())?;
    let place = path.to_string_lossy();
    let origin = Origin {
        source: Source::File,
        place: &place,
        node,
    };
    manifest::pod(&bytes, &origin).map_err(|e| e.to_string())
}
