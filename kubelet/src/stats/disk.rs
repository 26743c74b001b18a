//! Disk use of directories, measured by walking them and remembered.
//!
//! A reader never waits long: what was measured before is told at once, and measured again
//! beside it when it is old. How old it may get depends on what measuring costs, so that walking
//! takes at most about one percent of a core however full the node is.

use linux::diskusage::{DiskUsage, measure};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Entries looked at per directory tree; a greater one is told as far as it was seen.
const BUDGET: u64 = 2_000_000;
/// A result is good for a hundred times what it took to get, within these bounds.
const FRESH_LEAST: Duration = Duration::from_secs(10);
const FRESH_MOST: Duration = Duration::from_secs(900);
const COST_FACTOR: u32 = 100;
/// A reader measures new directories itself for so long; the rest is done beside it.
const PATIENCE: Duration = Duration::from_secs(2);
/// What nobody asked for so long is forgotten.
const FORGET: Duration = Duration::from_secs(1800);

#[derive(Debug, Clone, Copy)]
struct Known {
    usage: Option<DiskUsage>,
    at: Instant,
    fresh_for: Duration,
    asked: Instant,
}

#[derive(Debug, Default)]
struct State {
    known: HashMap<PathBuf, Known>,
    queue: Vec<PathBuf>,
    walking: bool,
}

/// Remembered measurements. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct DiskCache {
    state: Arc<Mutex<State>>,
}

/// One reader's patience.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    cache: &'a DiskCache,
    until: Instant,
}

impl DiskCache {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A reader, who may wait a little for what is new.
    pub(super) fn reader(&self) -> Reader<'_> {
        Reader {
            cache: self,
            until: Instant::now() + PATIENCE,
        }
    }

    /// Measures one directory now and remembers the result.
    fn look(&self, path: &Path) -> Option<DiskUsage> {
        let began = Instant::now();
        let usage = measure(path, BUDGET).ok();
        let fresh_for = (began.elapsed() * COST_FACTOR).clamp(FRESH_LEAST, FRESH_MOST);
        let known = Known {
            usage,
            at: Instant::now(),
            fresh_for,
            asked: began,
        };
        self.lock().known.insert(path.to_owned(), known);
        usage
    }

    /// Has a directory measured by the one walker, which is started when it does not run.
    fn later(&self, path: &Path) {
        let mut state = self.lock();
        if !state.queue.iter().any(|p| p == path) {
            state.queue.push(path.to_owned());
        }
        if std::mem::replace(&mut state.walking, true) {
            return;
        }
        drop(state);
        let cache = self.clone();
        let walk = move || {
            loop {
                let next = {
                    let mut state = cache.lock();
                    let next = state.queue.pop();
                    state.walking = next.is_some();
                    next
                };
                let Some(path) = next else { return };
                cache.look(&path);
            }
        };
        let spawned = std::thread::Builder::new()
            .name("disk-usage".to_owned())
            .spawn(walk);
        if spawned.is_err() {
            self.lock().walking = false;
        }
    }

    /// Forgets what nobody asks for any more.
    pub(super) fn prune(&self) {
        let now = Instant::now();
        let mut state = self.lock();
        state
            .known
            .retain(|_, k| now.saturating_duration_since(k.asked) < FORGET);
    }
}

impl Reader<'_> {
    /// What a directory takes; none when it is not there, or not known yet.
    pub(super) fn usage(&self, path: &Path) -> Option<DiskUsage> {
        let now = Instant::now();
        let known = {
            let mut state = self.cache.lock();
            state.known.get_mut(path).map(|known| {
                known.asked = now;
                *known
            })
        };
        match known {
            Some(known) => {
                if now.saturating_duration_since(known.at) > known.fresh_for {
                    self.cache.later(path);
                }
                known.usage
            }
            None if now < self.until => self.cache.look(path),
            None => {
                self.cache.later(path);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_remembered_and_a_missing_directory_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let cache = DiskCache::default();
        let reader = cache.reader();
        let empty = reader.usage(dir.path()).unwrap();
        std::fs::write(dir.path().join("f"), "x").unwrap();
        assert_eq!(reader.usage(dir.path()), Some(empty));
        assert_eq!(cache.look(dir.path()).unwrap().inodes, empty.inodes + 1);
        assert_eq!(reader.usage(Path::new("/nonexistent")), None);
    }

    #[test]
    fn an_impatient_reader_has_it_measured_beside() {
        let dir = tempfile::tempdir().unwrap();
        let cache = DiskCache::default();
        let reader = Reader {
            cache: &cache,
            until: Instant::now(),
        };
        assert_eq!(reader.usage(dir.path()), None);
        while cache.lock().walking {
            std::thread::yield_now();
        }
        assert!(reader.usage(dir.path()).is_some());
    }
}
