//! Manifests in a file or in a directory.
//!
//! inotify says that something changed, a timer (`fileCheckFrequency`) makes up for file systems
//! that have none and for targets of symbolic links; both only lead to a look at everything. A
//! file that is being written is waited for until it is quiet. One that cannot be used is named in
//! the log and on the Node, and harms nobody: the pod of its last good content goes on, for as
//! long as the file is there.
//!
//! Read are regular files and links to them, whose name does not begin with a dot (and is not an
//! editor's backup); the path itself may be a link.

mod scan;

use super::published::{self, Published};
use super::{PodChange, QUEUE, Source};
use crate::events::{EventSink, EventType};
use crate::node::notify::PathWatch;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use scan::{Problem, Scanner};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

/// The event's reason for a manifest that cannot be used.
const FAILED_VALIDATION: &str = "FailedValidation";
/// Most events about manifests remembered, so that each is told once.
const TOLD: usize = QUEUE;

/// Where manifests are, and for whom.
#[derive(Debug, Clone)]
pub struct FileSettings {
    /// A directory or a file.
    pub path: PathBuf,
    /// The node's name.
    pub node: String,
    /// Longest time between two looks.
    pub check: Duration,
    /// Cancelled after the first look: who must come later waits for it.
    pub looked: CancellationToken,
}

/// Sends the pods of the manifests until cancelled or until nobody listens.
pub async fn run(
    settings: FileSettings,
    events: EventSink,
    changes: mpsc::Sender<PodChange>,
    cancel: CancellationToken,
) {
    info!(path = %settings.path.display(), "Adding static pod path");
    let mut source = FileSource {
        scanner: Scanner::new(&settings.path, &settings.node),
        published: Published::new(Source::File),
        told: BTreeSet::new(),
        events,
        settings,
    };
    loop {
        // Watched before looked at: nothing falls between.
        let mut watch = Watched::start(&source.settings.path);
        let Some(wait) = source.look(&changes).await else {
            return;
        };
        source.settings.looked.cancel();
        tokio::select! {
            () = cancel.cancelled() => return,
            () = watch.changed() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

struct FileSource {
    settings: FileSettings,
    scanner: Scanner,
    published: Published,
    events: EventSink,
    told: BTreeSet<String>,
}

impl FileSource {
    /// Looks at everything and tells what is new. How long to wait for the next look; none when
    /// nobody listens.
    async fn look(&mut self, changes: &mpsc::Sender<PodChange>) -> Option<Duration> {
        let mut scanner = std::mem::take(&mut self.scanner);
        let scanned = tokio::task::spawn_blocking(move || {
            let found = scanner.scan();
            (scanner, found)
        });
        let (scanner, found) = match scanned.await {
            Ok(done) => done,
            Err(error) => {
                error!(%error, "Look at static pod manifests failed");
                self.scanner = Scanner::new(&self.settings.path, &self.settings.node);
                return Some(self.settings.check);
            }
        };
        self.scanner = scanner;
        for problem in &found.problems {
            self.complain(problem);
        }
        let complete = found.again.is_none() && found.readable;
        if found.readable {
            let news = self
                .published
                .replace(found.pods, complete, Timestamp::now());
            for pod in &news.duplicates {
                let message = published::duplicate_message(pod, Source::File);
                if self.is_news(&message) {
                    warn!("{message}");
                    let warning = EventType::Warning;
                    self.events
                        .pod_event(pod, None, warning, FAILED_VALIDATION, message);
                }
            }
            for change in news.changes {
                changes.send(change).await.ok()?;
            }
        }
        let again = found.again.unwrap_or(self.settings.check);
        Some(again.min(self.settings.check))
    }

    /// Names a manifest that cannot be used, in the log and on the Node; once.
    fn complain(&mut self, problem: &Problem) {
        let message = problem.to_string();
        if !self.is_news(&message) {
            return;
        }
        match problem {
            // Most nodes have none of these directories, and no use for them.
            Problem::Place { .. } => return warn!("{message}"),
            Problem::File { .. } => error!("{message}"),
        }
        let node = ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(self.settings.node.clone()),
            uid: Some(self.settings.node.clone()),
            ..ObjectReference::default()
        };
        let warning = EventType::Warning;
        self.events
            .object_event(node, warning, FAILED_VALIDATION, message);
    }

    fn is_news(&mut self, message: &str) -> bool {
        if self.told.len() >= TOLD {
            self.told.clear();
        }
        self.told.insert(message.to_owned())
    }
}

/// The inotify side: the directory, or the directory of the file, or that in which the path will
/// appear. None where there is no inotify: the timer is enough.
struct Watched {
    watches: Vec<PathWatch>,
}

impl Watched {
    fn start(path: &Path) -> Self {
        let own = path.is_dir().then_some(path);
        // The parent tells of the path itself: made, replaced, a link that now points elsewhere.
        let around = path.parent().filter(|p| !p.as_os_str().is_empty());
        let places = own.into_iter().chain(around);
        Self {
            watches: places
                .filter_map(|p| PathWatch::directory(p).ok())
                .collect(),
        }
    }

    async fn changed(&mut self) {
        let waits: Vec<_> = self
            .watches
            .iter_mut()
            .map(|w| Box::pin(w.changed()))
            .collect();
        if waits.is_empty() {
            return std::future::pending().await;
        }
        // An error ends the watch; the timer looks instead.
        let (result, _, _) = futures::future::select_all(waits).await;
        if result.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests;
