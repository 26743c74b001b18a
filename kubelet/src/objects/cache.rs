//! One kind of object, each followed by a watch of its own.
//!
//! The Node authorizer lets a node read a ConfigMap or Secret only by name, so every object in
//! use has its own watch (`fieldSelector metadata.name=…`). The first read is a GET, which the
//! apiserver answers from storage at once; the watch then starts with whatever the apiserver has
//! cached, and resource versions decide what is newer.
//!
//! Tasks: one per followed object, ended when its last pod lets go. When the apiserver is away
//! the last known object is served and the watch is tried again with back-off.

use super::{ObjectChange, ObjectError, ObjectKind};
use futures::{StreamExt as _, pin_mut};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, WatchEvent, WatchParams};
use kube::core::NamespaceResourceScope;
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::broadcast;
use tokio::task::AbortHandle;

/// Waits after a 403: the authorizer learns of a bound pod some milliseconds after we do.
pub(super) const FORBIDDEN_RETRIES: [u64; 6] = [5, 10, 20, 40, 80, 160];
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_MOST: Duration = Duration::from_secs(10);
/// A read that takes longer is given up.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// A watch silent for longer is begun anew: the apiserver sends a bookmark every minute.
const SILENCE_LIMIT: Duration = Duration::from_secs(150);
/// A watch that lived this long starts the back-off anew.
const HEALTHY: Duration = Duration::from_secs(1);

/// What the cache can hold.
pub(super) trait Cached:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + DeserializeOwned
    + Clone
    + Debug
    + Send
    + Sync
    + 'static
{
    const KIND: ObjectKind;
}

/// What is known of an object.
enum Known<K> {
    Unread,
    Missing { version: u64 },
    Present { version: u64, object: Arc<K> },
}

struct Entry<K> {
    namespace: String,
    name: String,
    known: Mutex<Known<K>>,
    /// Held while the object is fetched: concurrent readers share one GET.
    fetch: tokio::sync::Mutex<()>,
    pods: Mutex<HashSet<String>>,
    task: Mutex<Option<AbortHandle>>,
}

/// By namespace and name.
type Entries<K> = HashMap<(String, String), Arc<Entry<K>>>;

pub(super) struct Cache<K> {
    client: Client,
    entries: Mutex<Entries<K>>,
    changes: broadcast::Sender<ObjectChange>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn version_of(meta: &ObjectMeta) -> u64 {
    let text = meta.resource_version.as_deref();
    text.and_then(|v| v.parse().ok()).unwrap_or(0)
}

impl<K: Cached> Cache<K> {
    pub(super) fn new(client: Client, changes: broadcast::Sender<ObjectChange>) -> Self {
        Self {
            client,
            entries: Mutex::default(),
            changes,
        }
    }

    /// The object, followed from now on for the pod. None when it does not exist.
    pub(super) async fn get(
        &self,
        pod_uid: &str,
        namespace: &str,
        name: &str,
    ) -> Result<Option<Arc<K>>, ObjectError> {
        let entry = self.entry(pod_uid, namespace, name);
        if let Known::Present { object, .. } = &*lock(&entry.known) {
            return Ok(Some(object.clone()));
        }
        let _only = entry.fetch.lock().await;
        if let Known::Present { object, .. } = &*lock(&entry.known) {
            return Ok(Some(object.clone()));
        }
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        let found = with_forbidden_retries(|| api.get_opt(name)).await;
        let found = found.map_err(|error| ObjectError::Read {
            kind: K::KIND,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            message: api_message(&error),
        })?;
        match found {
            Some(object) => {
                entry.offer(object);
            }
            None => {
                let mut known = lock(&entry.known);
                if matches!(*known, Known::Unread) {
                    *known = Known::Missing { version: 0 };
                }
            }
        }
        self.follow(&entry);
        match &*lock(&entry.known) {
            Known::Present { object, .. } => Ok(Some(object.clone())),
            Known::Missing { .. } | Known::Unread => Ok(None),
        }
    }

    fn entry(&self, pod_uid: &str, namespace: &str, name: &str) -> Arc<Entry<K>> {
        let mut entries = lock(&self.entries);
        let key = (namespace.to_owned(), name.to_owned());
        let entry = entries.entry(key).or_insert_with(|| {
            Arc::new(Entry {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
                known: Mutex::new(Known::Unread),
                fetch: tokio::sync::Mutex::default(),
                pods: Mutex::default(),
                task: Mutex::default(),
            })
        });
        lock(&entry.pods).insert(pod_uid.to_owned());
        entry.clone()
    }

    fn follow(&self, entry: &Arc<Entry<K>>) {
        let mut task = lock(&entry.task);
        if task.is_none() && !lock(&entry.pods).is_empty() {
            let follow = follow(self.client.clone(), entry.clone(), self.changes.clone());
            *task = Some(tokio::spawn(follow).abort_handle());
        }
    }

    /// The pod needs none of them any more.
    pub(super) fn release(&self, pod_uid: &str) {
        lock(&self.entries).retain(|_, entry| {
            let mut pods = lock(&entry.pods);
            pods.remove(pod_uid);
            let keep = !pods.is_empty();
            drop(pods);
            if !keep {
                entry.stop();
            }
            keep
        });
    }

    /// How many objects are followed.
    pub(super) fn len(&self) -> usize {
        lock(&self.entries).len()
    }
}

impl<K> Drop for Cache<K> {
    fn drop(&mut self) {
        for entry in lock(&self.entries).values() {
            entry.stop();
        }
    }
}

impl<K> Entry<K> {
    fn stop(&self) {
        if let Some(task) = lock(&self.task).take() {
            task.abort();
        }
    }
}

impl<K: Cached> Entry<K> {
    /// Takes an object unless a newer state is known. Tells whether something changed.
    fn offer(&self, mut object: K) -> bool {
        object.meta_mut().managed_fields = None;
        let version = version_of(object.meta());
        let mut known = lock(&self.known);
        let newer = match &*known {
            Known::Unread => true,
            Known::Missing { version: old } | Known::Present { version: old, .. } => version > *old,
        };
        if newer {
            *known = Known::Present {
                version,
                object: Arc::new(object),
            };
        }
        newer
    }

    /// Notes that the object is gone as of `version`. Tells whether something changed.
    fn offer_missing(&self, version: u64) -> bool {
        let mut known = lock(&self.known);
        let gone = match &*known {
            Known::Present { version: old, .. } => version >= *old,
            Known::Unread => true,
            Known::Missing { .. } => false,
        };
        if gone {
            *known = Known::Missing { version };
        }
        gone
    }
}

/// Whether the watch can go on from where it was.
enum Ended {
    Resume,
    StartOver,
}

/// Follows one object for ever.
async fn follow<K: Cached>(
    client: Client,
    entry: Arc<Entry<K>>,
    changes: broadcast::Sender<ObjectChange>,
) {
    let api: Api<K> = Api::namespaced(client, &entry.namespace);
    let mut version: Option<String> = None;
    let mut pause = BACKOFF_FIRST;
    loop {
        let started = Instant::now();
        match watch_once(&api, &entry, &changes, &mut version).await {
            Ended::Resume => {}
            Ended::StartOver => version = None,
        }
        if started.elapsed() >= HEALTHY {
            pause = BACKOFF_FIRST;
        }
        tokio::time::sleep(jittered(pause)).await;
        pause = (pause * 2).min(BACKOFF_MOST);
    }
}

/// Between the pause and one and a half of it, so that nodes do not return in step.
fn jittered(pause: Duration) -> Duration {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let part = now.map_or(0, |n| n.subsec_nanos() % 512);
    pause + pause * part / 1024
}

async fn watch_once<K: Cached>(
    api: &Api<K>,
    entry: &Entry<K>,
    changes: &broadcast::Sender<ObjectChange>,
    version: &mut Option<String>,
) -> Ended {
    let mut params = WatchParams::default().fields(&format!("metadata.name={}", entry.name));
    if version.is_none() {
        params = params.initial_events();
    }
    let from = version.clone().unwrap_or_else(|| "0".to_owned());
    let opened = tokio::time::timeout(REQUEST_LIMIT, api.watch(&params, &from)).await;
    let stream = match opened {
        Ok(Ok(stream)) => stream,
        Err(_) => return Ended::Resume,
        Ok(Err(error)) => {
            tracing::debug!(kind = %K::KIND, namespace = entry.namespace, name = entry.name, %error, "watch refused");
            return if is_expired(&error) {
                Ended::StartOver
            } else {
                Ended::Resume
            };
        }
    };
    pin_mut!(stream);
    let mut seen = version.is_some();
    while let Ok(Some(event)) = tokio::time::timeout(SILENCE_LIMIT, stream.next()).await {
        let changed = match event {
            Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                seen = true;
                object.meta().resource_version.clone_into(version);
                entry.offer(object)
            }
            Ok(WatchEvent::Deleted(object)) => {
                seen = true;
                object.meta().resource_version.clone_into(version);
                entry.offer_missing(version_of(object.meta()))
            }
            Ok(WatchEvent::Bookmark(bookmark)) => {
                let at = bookmark.metadata.resource_version;
                *version = Some(at.clone());
                // All that exists has been told: what was not told is gone.
                let gone = !seen && entry.offer_missing(at.parse().unwrap_or(0));
                seen = true;
                gone
            }
            Ok(WatchEvent::Error(status)) if status.code == 410 => return Ended::StartOver,
            Ok(WatchEvent::Error(_)) | Err(_) => return Ended::Resume,
        };
        if changed {
            // Nobody listening is fine.
            let _ = changes.send(ObjectChange {
                kind: K::KIND,
                namespace: entry.namespace.clone(),
                name: entry.name.clone(),
            });
        }
    }
    Ended::Resume
}

fn is_expired(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 410)
}

/// Repeats a request while it is refused with 403, for about a third of a second. Each try has
/// ten seconds.
pub(crate) async fn with_forbidden_retries<T, F, R>(request: F) -> Result<T, kube::Error>
where
    F: Fn() -> R,
    R: Future<Output = Result<T, kube::Error>>,
{
    let limited = async || match tokio::time::timeout(REQUEST_LIMIT, request()).await {
        Ok(done) => done,
        Err(_) => Err(kube::Error::Service(
            format!("no answer within {} s", REQUEST_LIMIT.as_secs()).into(),
        )),
    };
    for pause in FORBIDDEN_RETRIES {
        match limited().await {
            Err(kube::Error::Api(status)) if status.code == 403 => {
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
            done => return done,
        }
    }
    limited().await
}

/// The apiserver's own words where it answered.
pub(crate) fn api_message(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}
