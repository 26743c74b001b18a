//! Plugins that register with the node: sockets that appear in `plugins_registry`.
//!
//! ```text
//!  inotify --> scan (sockets, who they are) --> plan (pure) --> register | deregister
//!                                                                |   GetInfo, validate, register,
//!                                                                v   NotifyRegistrationStatus
//!                                                             Handler (CSI drivers)
//! ```
//!
//! A socket is known by its path and its inode: one that was made anew is another plugin. One
//! step at a time for each path; a step that failed is tried again later and later.

mod csi;
mod handshake;

pub use csi::CsiPlugins;

use crate::node::notify::PathWatch;
use futures::future::BoxFuture;
pub use handshake::Info;
use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// Directories below the registry that are looked into.
const DEPTH: usize = 8;
/// Sockets looked at: a node has some ten.
const MOST: usize = 1024;
/// Pauses before a plugin that failed is tried again.
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_MOST: Duration = Duration::from_secs(122);
/// The directory is looked at so often even if nothing is heard of it.
const LOOK: Duration = Duration::from_secs(60);

/// What becomes of plugins of one type.
pub trait Handler: Send + Sync + 'static {
    /// The type plugins say they are, `CSIPlugin`.
    fn kind(&self) -> &'static str;
    /// Whether the plugin could be registered.
    ///
    /// # Errors
    /// What the plugin is told.
    fn validate(&self, info: &Info) -> Result<(), String>;
    /// Takes the plugin in use.
    ///
    /// # Errors
    /// What the plugin is told.
    fn register<'a>(&'a self, info: &'a Info) -> BoxFuture<'a, Result<(), String>>;
    /// Takes the plugin out of use. Has to end.
    fn deregister<'a>(&'a self, name: &'a str) -> BoxFuture<'a, ()>;
}

/// Device and inode of a socket, and when it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    changed: (i64, i64),
}

/// What is known of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// Nothing is registered; a try may have failed.
    Idle { failures: u32, retry_at: Instant },
    /// A step is under way.
    Busy { failures: u32 },
    /// Registered.
    Registered {
        identity: Identity,
        kind: String,
        name: String,
    },
}

/// What is to be done for a path.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Register(PathBuf, Identity),
    Deregister {
        path: PathBuf,
        kind: String,
        name: String,
    },
}

/// What to do now, and when to look again for the sake of a retry.
fn plan(
    found: &BTreeMap<PathBuf, Identity>,
    known: &HashMap<PathBuf, State>,
    now: Instant,
) -> (Vec<Step>, Option<Instant>) {
    let (mut steps, mut wake) = (Vec::new(), None::<Instant>);
    for (path, state) in known {
        if let State::Registered {
            identity,
            kind,
            name,
        } = state
            && found.get(path) != Some(identity)
        {
            steps.push(Step::Deregister {
                path: path.clone(),
                kind: kind.clone(),
                name: name.clone(),
            });
        }
    }
    for (path, identity) in found {
        match known.get(path) {
            Some(State::Busy { .. } | State::Registered { .. }) => {}
            Some(State::Idle { retry_at, .. }) if *retry_at > now => {
                wake = Some(wake.map_or(*retry_at, |w| w.min(*retry_at)));
            }
            Some(State::Idle { .. }) | None => {
                steps.push(Step::Register(path.clone(), *identity));
            }
        }
    }
    (steps, wake)
}

/// How a step ended.
enum Ended {
    Registered {
        path: PathBuf,
        identity: Identity,
        kind: String,
        name: String,
    },
    Failed {
        path: PathBuf,
    },
    Deregistered {
        path: PathBuf,
    },
}

impl Ended {
    /// Notes it.
    fn note(self, known: &mut HashMap<PathBuf, State>, now: Instant) {
        match self {
            Self::Registered {
                path,
                identity,
                kind,
                name,
            } => {
                let state = State::Registered {
                    identity,
                    kind,
                    name,
                };
                known.insert(path, state);
            }
            Self::Failed { path } => {
                let failures = match known.get(&path) {
                    Some(State::Busy { failures } | State::Idle { failures, .. }) => failures + 1,
                    Some(State::Registered { .. }) | None => 1,
                };
                let pause = RETRY_FIRST * 2u32.saturating_pow(failures.min(16) - 1);
                let retry_at = now + pause.min(RETRY_MOST);
                known.insert(path, State::Idle { failures, retry_at });
            }
            Self::Deregistered { path } => {
                known.remove(&path);
            }
        }
    }
}

/// The node's plugins, not followed yet.
pub struct Plugins {
    dir: PathBuf,
    handlers: Arc<Vec<Box<dyn Handler>>>,
}

impl std::fmt::Debug for Plugins {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plugins")
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

impl Plugins {
    /// Plugins with sockets in this directory.
    pub fn new(dir: PathBuf, handlers: Vec<Box<dyn Handler>>) -> Self {
        Self {
            dir,
            handlers: Arc::new(handlers),
        }
    }

    /// Registers what comes and deregisters what goes until told to stop. What is registered
    /// then stays so: the next agent finds the same sockets.
    pub async fn run(self, stop: CancellationToken) {
        let mut known: HashMap<PathBuf, State> = HashMap::new();
        let mut steps: JoinSet<Ended> = JoinSet::new();
        let mut watch = None;
        loop {
            if watch.is_none() {
                watch = self.watch();
            }
            let found = scan(&self.dir, watch.as_mut());
            known.retain(|path, state| {
                found.contains_key(path) || !matches!(state, State::Idle { .. })
            });
            let now = Instant::now();
            let (todo, wake) = plan(&found, &known, now);
            for step in todo {
                self.begin(step, &mut known, &mut steps);
            }
            let look = now + LOOK;
            // Every arm is cancel-safe: a set of tasks, a kernel queue, timers.
            tokio::select! {
                () = stop.cancelled() => return,
                Some(ended) = steps.join_next(), if !steps.is_empty() => match ended {
                    Ok(ended) => ended.note(&mut known, Instant::now()),
                    Err(error) => warn!(%error, "A plugin's step broke off"),
                },
                () = changed(&mut watch) => {}
                () = tokio::time::sleep_until(wake.map_or(look, |w| w.min(look))) => {}
            }
        }
    }

    fn watch(&self) -> Option<PathWatch> {
        if let Err(error) = linux::fs::create_dirs(&self.dir, 0o755) {
            warn!(%error, "Plugins cannot register");
            return None;
        }
        PathWatch::directory(&self.dir)
            .inspect_err(|error| warn!(%error, "Plugins are not noticed at once"))
            .ok()
    }

    fn begin(&self, step: Step, known: &mut HashMap<PathBuf, State>, steps: &mut JoinSet<Ended>) {
        let handlers = self.handlers.clone();
        match step {
            Step::Register(path, identity) => {
                let failures = match known.get(&path) {
                    Some(State::Idle { failures, .. } | State::Busy { failures }) => *failures,
                    Some(State::Registered { .. }) | None => 0,
                };
                known.insert(path.clone(), State::Busy { failures });
                steps.spawn(async move {
                    match handshake::register(&path, &handlers).await {
                        Ok(info) => {
                            info!(plugin = info.name, kind = info.kind, "Plugin registered");
                            Ended::Registered {
                                path,
                                identity,
                                kind: info.kind,
                                name: info.name,
                            }
                        }
                        Err(error) => {
                            warn!(error, "Plugin not registered");
                            Ended::Failed { path }
                        }
                    }
                });
            }
            Step::Deregister { path, kind, name } => {
                known.insert(path.clone(), State::Busy { failures: 0 });
                steps.spawn(async move {
                    info!(plugin = name, kind, "Plugin is gone");
                    if let Some(handler) = handlers.iter().find(|h| h.kind() == kind) {
                        handler.deregister(&name).await;
                    }
                    Ended::Deregistered { path }
                });
            }
        }
    }
}

/// Resolves when something changed in the directories; never without a watch.
async fn changed(watch: &mut Option<PathWatch>) {
    match watch {
        None => std::future::pending().await,
        Some(open) => {
            if open.changed().await.is_err() {
                *watch = None;
            }
        }
    }
}

/// The sockets below a directory; directories found are watched, too. Blocks for a moment.
fn scan(dir: &Path, mut watch: Option<&mut PathWatch>) -> BTreeMap<PathBuf, Identity> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![(dir.to_owned(), 0)];
    while let Some((dir, depth)) = waiting.pop() {
        for name in linux::fs::list_dir(&dir).unwrap_or_default() {
            if name.to_string_lossy().starts_with('.') || found.len() >= MOST {
                continue;
            }
            let path = dir.join(name);
            let Ok(stat) = std::fs::symlink_metadata(&path) else {
                continue;
            };
            if stat.file_type().is_socket() {
                let identity = Identity {
                    device: stat.dev(),
                    inode: stat.ino(),
                    changed: (stat.mtime(), stat.mtime_nsec()),
                };
                found.insert(path, identity);
            } else if stat.is_dir() && depth < DEPTH {
                if let Some(watch) = watch.as_deref_mut()
                    && let Err(error) = watch.also(&path)
                {
                    debug!(path = %path.display(), %error, "Directory of plugins not watched");
                }
                waiting.push((path, depth + 1));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests;
