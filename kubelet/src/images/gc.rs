//! Makes room by removing images nobody uses, as the stock kubelet: when the filesystem is fuller
//! than the high threshold, the longest unused go until it is as full as the low one; images
//! unused for longer than the maximal age go in any case.
//!
//! In use is what a container of this node has (running or not), mounts, or what a pod of this
//! node names, whether it has begun or not. Images younger than the minimal age stay. A timer, as
//! no event tells of a filling disk; what is decided is decided by pure functions.

use super::access::Access;
use crate::config::ImageSettings;
use crate::events::{EventSink, EventType};
use crate::pod::index::PodIndex;
use crate::pod::spec;
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use runtime::service::{FsUsage, ImageId, ImageService, ImageStatus, RuntimeService};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// How often the disk is looked at.
const PERIOD: Duration = Duration::from_secs(300);
/// After the pods of this node are known, their workers get this long to say what they need.
const SETTLE: Duration = Duration::from_secs(5);

/// When images are collected, and which may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Use in percent from which images are collected.
    pub high_percent: u8,
    /// Use in percent down to which they are collected.
    pub low_percent: u8,
    /// Images known for less than this stay.
    pub min_age: Duration,
    /// Images unused for longer than this go; zero is never.
    pub max_age: Duration,
}

impl From<&ImageSettings> for Policy {
    fn from(settings: &ImageSettings) -> Self {
        Self {
            high_percent: settings.gc_high_percent,
            low_percent: settings.gc_low_percent,
            min_age: settings.minimum_gc_age,
            max_age: settings.maximum_gc_age,
        }
    }
}

/// Asks the collector for room at once. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Reclaim {
    asked: mpsc::Sender<oneshot::Sender<()>>,
}

impl Reclaim {
    /// Has every image removed that nobody uses, however young; returns when that is done.
    pub async fn all_unused(&self) {
        let (done, wait) = oneshot::channel();
        // A collector that is gone has nothing to give; the agent stops.
        if self.asked.send(done).await.is_ok() {
            let _ = wait.await;
        }
    }
}

/// What is remembered of an image from look to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    first: Instant,
    last_used: Option<Instant>,
}

/// An image that may go.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Candidate {
    id: ImageId,
    size_bytes: u64,
    seen: Seen,
}

/// Why a collection failed. Displays as the event's message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum GcError {
    #[error("invalid capacity 0 on image filesystem")]
    NoCapacity,
    #[error(
        "Insufficient free disk space on the node's image filesystem ({percent}% of {capacity} \
         used). Failed to free sufficient space by deleting unused images (freed {freed} bytes). \
         Investigate disk usage, as it could be used by active images, logs, volumes, or other \
         data."
    )]
    NotEnough {
        percent: u64,
        capacity: String,
        freed: u64,
    },
    #[error("{0}")]
    Removal(String),
}

/// How many percent of the filesystem are used; none without a capacity.
fn used_percent(usage: &FsUsage) -> Option<u64> {
    let available = usage.available_bytes.min(usage.capacity_bytes);
    let free = u128::from(available) * 100;
    let free = free.checked_div(u128::from(usage.capacity_bytes))?;
    Some(100 - u64::try_from(free).unwrap_or(100))
}

/// Bytes to free to come down to the low threshold; none below the high one.
fn excess(usage: &FsUsage, policy: &Policy) -> Option<u64> {
    if used_percent(usage)? < u64::from(policy.high_percent) {
        return None;
    }
    let share = u128::from(100 - policy.low_percent.min(100));
    let wanted = u128::from(usage.capacity_bytes) * share / 100;
    let wanted = u64::try_from(wanted).unwrap_or(u64::MAX);
    Some(wanted.saturating_sub(usage.available_bytes))
}

/// Takes notice of what is stored and used now. What is not used and not pinned may go, the
/// longest unused first, then the longest known.
fn candidates(
    records: &mut BTreeMap<ImageId, Seen>,
    images: &[ImageStatus],
    used: &BTreeSet<ImageId>,
    now: Instant,
) -> Vec<Candidate> {
    records.retain(|id, _| images.iter().any(|image| image.id == *id));
    let mut may_go = Vec::new();
    for image in images {
        let seen = records.entry(image.id.clone()).or_insert(Seen {
            first: now,
            last_used: None,
        });
        if used.contains(&image.id) {
            seen.last_used = Some(now);
        } else if !image.pinned {
            may_go.push(Candidate {
                id: image.id.clone(),
                size_bytes: image.size_bytes,
                seen: *seen,
            });
        }
    }
    may_go.sort_by_key(|image| (image.seen.last_used, image.seen.first));
    may_go
}

/// Whether an image was unused for too long. Nothing is before the agent has run for that time:
/// it has not seen what was used before.
fn too_old(seen: &Seen, began: Instant, now: Instant, max_age: Duration) -> bool {
    if max_age.is_zero() || now.duration_since(began) <= max_age {
        return false;
    }
    let since = seen.last_used.map(|used| now.duration_since(used));
    since.is_none_or(|unused| unused > max_age)
}

/// A size as people read it.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// Collects images. One per agent.
#[derive(Debug)]
pub struct ImageGc<R> {
    runtime: Arc<R>,
    index: PodIndex,
    events: EventSink,
    node: String,
    policy: Policy,
    records: BTreeMap<ImageId, Seen>,
    began: Instant,
    failed: bool,
    access: Option<Arc<Access>>,
    asks: (
        mpsc::Sender<oneshot::Sender<()>>,
        mpsc::Receiver<oneshot::Sender<()>>,
    ),
}

impl<R: RuntimeService + ImageService> ImageGc<R> {
    /// Has looked at nothing yet.
    pub fn new(
        runtime: Arc<R>,
        index: PodIndex,
        events: EventSink,
        node: &str,
        policy: Policy,
    ) -> Self {
        Self {
            runtime,
            index,
            events,
            node: node.to_owned(),
            policy,
            records: BTreeMap::new(),
            began: Instant::now(),
            failed: false,
            access: None,
            asks: mpsc::channel(1),
        }
    }

    /// For those who need room before the next look.
    pub fn reclaim(&self) -> Reclaim {
        Reclaim {
            asked: self.asks.0.clone(),
        }
    }

    /// Also forgets who could use the images that are gone.
    #[must_use]
    pub fn with_access(mut self, access: Arc<Access>) -> Self {
        self.access = Some(access);
        self
    }

    /// Looks every [`PERIOD`], for the first time when the node's pods are known.
    pub async fn run(mut self, stop: CancellationToken) {
        let is_off = self.policy.high_percent >= 100 && self.policy.max_age.is_zero();
        if is_off {
            info!("Image collection is switched off: imageGCHighThresholdPercent is 100");
        }
        let known = async {
            self.index.synced().await;
            tokio::time::sleep(SETTLE).await;
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = known => {}
        }
        let mut timer = tokio::time::interval(PERIOD);
        timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(done) = self.asks.1.recv() => {
                    self.remove_all_unused().await;
                    // Who asked may have given up.
                    let _ = done.send(());
                    continue;
                }
                _ = timer.tick(), if !is_off => {}
            }
            let result = self.collect().await;
            if let Some(access) = &self.access {
                access.prune(|| self.runtime.list());
            }
            if result.is_err() {
                // Images that were too young by now may help, before the next look is due.
                timer.reset_after(self.policy.min_age.clamp(SETTLE, PERIOD));
            }
            self.tell(result);
        }
    }

    /// One failure may be chance; from the second on users are told.
    fn tell(&mut self, result: Result<(), GcError>) {
        match result {
            Ok(()) => self.failed = false,
            Err(error) => {
                warn!(%error, "Image collection failed");
                if std::mem::replace(&mut self.failed, true) {
                    self.event("ImageGCFailed", &error);
                }
            }
        }
    }

    fn event(&self, reason: &str, error: &GcError) {
        let node = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(self.node.clone()),
            ..ObjectReference::default()
        };
        let text = error.to_string();
        self.events
            .object_event(node, EventType::Warning, reason, text);
    }

    async fn collect(&mut self) -> Result<(), GcError> {
        let now = Instant::now();
        let images = self.runtime.list();
        let used = self.in_use();
        let unused = candidates(&mut self.records, &images, &used, now);
        let (old, young): (Vec<_>, Vec<_>) = unused
            .into_iter()
            .partition(|image| too_old(&image.seen, self.began, now, self.policy.max_age));
        let mut failures = Vec::new();
        for image in old {
            if let Err(error) = self.remove(&image, "age").await {
                failures.push(error);
            }
        }
        if !failures.is_empty() {
            let failures = failures.join(", ");
            let age = crate::config::duration::format(self.policy.max_age);
            let text = format!(
                "wanted to free images older than {age}, encountered errors in image deletion: \
                 [{failures}]"
            );
            return Err(GcError::Removal(text));
        }
        self.make_room(young, now).await
    }

    /// Removes what nobody uses, the longest unused first.
    async fn remove_all_unused(&mut self) {
        let (images, used) = (self.runtime.list(), self.in_use());
        let unused = candidates(&mut self.records, &images, &used, Instant::now());
        for image in unused {
            if let Err(error) = self.remove(&image, "pressure").await {
                warn!(image = image.id.as_str(), error, "Unused image not removed");
            }
        }
        if let Some(access) = &self.access {
            access.prune(|| self.runtime.list());
        }
    }

    /// Frees space when there is too little.
    async fn make_room(&self, unused: Vec<Candidate>, now: Instant) -> Result<(), GcError> {
        let usage = self.runtime.fs_usage();
        let Some(percent) = used_percent(&usage) else {
            self.event("InvalidDiskCapacity", &GcError::NoCapacity);
            return Err(GcError::NoCapacity);
        };
        let Some(wanted) = excess(&usage, &self.policy) else {
            return Ok(());
        };
        info!(
            percent,
            wanted, "The image filesystem is too full, removing unused images"
        );
        let (mut freed, mut failures) = (0u64, Vec::new());
        for image in unused {
            if freed >= wanted {
                break;
            }
            if now.duration_since(image.seen.first) < self.policy.min_age {
                continue;
            }
            // Layers it shares with others stay: what counts is what the store has less.
            let before = self.runtime.fs_usage().used_bytes;
            match self.remove(&image, "space").await {
                Ok(()) => {
                    let after = self.runtime.fs_usage().used_bytes;
                    freed = freed.saturating_add(before.saturating_sub(after));
                }
                Err(error) => failures.push(error),
            }
        }
        if !failures.is_empty() {
            let failures = failures.join(", ");
            return Err(GcError::Removal(format!(
                "wanted to free {wanted} bytes, but freed {freed} bytes space with errors in \
                 image deletion: [{failures}]"
            )));
        }
        if freed < wanted {
            let capacity = size(usage.capacity_bytes);
            let error = GcError::NotEnough {
                percent,
                capacity,
                freed,
            };
            self.event("FreeDiskSpaceFailed", &error);
            return Err(error);
        }
        Ok(())
    }

    async fn remove(&self, image: &Candidate, reason: &str) -> Result<(), String> {
        let id = image.id.as_str();
        // A pod may have come since the list was made; a container's own lease guards the rest.
        if self.in_use().contains(&image.id) {
            return Ok(());
        }
        info!(
            image = id,
            bytes = image.size_bytes,
            reason,
            "Removing unused image"
        );
        match self.runtime.remove(id).await {
            Ok(()) => Ok(()),
            Err(error) if error.kind == runtime::service::RuntimeErrorKind::Conflict => Ok(()),
            Err(error) => Err(error.message),
        }
    }

    /// Images of containers, and those that pods of this node name.
    fn in_use(&self) -> BTreeSet<ImageId> {
        let containers = self.runtime.list_containers(None);
        let mut used: BTreeSet<ImageId> = BTreeSet::new();
        for container in containers {
            let mounts = container.config.mounts.iter();
            used.extend(mounts.filter_map(|mount| mount.image.clone()));
            used.insert(container.image_id);
        }
        let pods = self.index.list();
        let alive = pods.iter().filter(|entry| !spec::is_terminal(&entry.pod));
        let names: BTreeSet<&str> = alive.flat_map(|entry| named(&entry.pod)).collect();
        let known = names
            .into_iter()
            .filter_map(|name| self.runtime.status(name));
        used.extend(known.map(|status| status.id));
        used
    }
}

/// Images a pod's spec names: of all its containers and of its image volumes.
fn named(pod: &Pod) -> impl Iterator<Item = &str> {
    let spec = pod.spec.as_ref();
    let containers = spec.into_iter().flat_map(spec::containers);
    let containers = containers.filter_map(|container| container.spec.image.as_deref());
    let ephemeral = spec.and_then(|spec| spec.ephemeral_containers.as_deref());
    let ephemeral = ephemeral.into_iter().flatten();
    let ephemeral = ephemeral.filter_map(|container| container.image.as_deref());
    let volumes = spec.and_then(|spec| spec.volumes.as_deref());
    let volumes = volumes.into_iter().flatten();
    let volumes = volumes.filter_map(|volume| volume.image.as_ref()?.reference.as_deref());
    containers.chain(ephemeral).chain(volumes)
}

#[cfg(test)]
#[path = "gc_tests.rs"]
mod tests;
