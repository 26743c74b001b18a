//! What the node runs now, for readers: the HTTPS server, probes, node status.
//!
//! Only the pod workers write; everybody else reads snapshots. No channel, no task, no IO.

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use runtime::service::ContainerId;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError, RwLock};
use tokio::sync::watch;

/// The instances of one container by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContainerRefs {
    /// The newest instance, running or not.
    pub current: Option<ContainerId>,
    /// The instance before it, as long as it is kept.
    pub previous: Option<ContainerId>,
}

/// One pod as the node sees it.
#[derive(Debug, Clone)]
pub struct PodEntry {
    /// The newest desired object.
    pub pod: Arc<Pod>,
    /// The newest status derived on this node (it may not have reached the apiserver yet).
    pub status: Arc<PodStatus>,
    /// Init, main and ephemeral containers by name.
    pub containers: BTreeMap<String, ContainerRefs>,
}

impl PodEntry {
    /// The pod's UID, empty when it has none.
    pub fn uid(&self) -> &str {
        self.pod.metadata.uid.as_deref().unwrap_or_default()
    }

    /// The pod with the node's own status in it: what the `/pods` endpoint shows.
    pub fn pod_with_status(&self) -> Pod {
        Pod {
            metadata: self.pod.metadata.clone(),
            spec: self.pod.spec.clone(),
            status: Some((*self.status).clone()),
        }
    }
}

/// All pods of the node. Cheap to clone; clones see the same pods.
#[derive(Debug, Clone, Default)]
pub struct PodIndex {
    inner: Arc<RwLock<HashMap<String, Arc<PodEntry>>>>,
    /// UIDs of mirror pods, and whose they are.
    mirrors: Arc<RwLock<HashMap<String, String>>>,
    /// Whether the sources have shown all there is.
    synced: Arc<watch::Sender<bool>>,
}

impl PodIndex {
    /// An empty index.
    pub fn new() -> Self {
        Self::default()
    }

    /// A pod by namespace and name. When an old pod of that name still terminates beside its
    /// successor, the one that is not being deleted wins.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<PodEntry>> {
        let pods = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        pods.values()
            .filter(|e| {
                e.pod.metadata.namespace.as_deref() == Some(namespace)
                    && e.pod.metadata.name.as_deref() == Some(name)
            })
            .min_by_key(|e| e.pod.metadata.deletion_timestamp.is_some())
            .cloned()
    }

    /// A pod by UID.
    pub fn by_uid(&self, uid: &str) -> Option<Arc<PodEntry>> {
        self.inner
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(uid)
            .cloned()
    }

    /// The UID of the pod that runs: users know a static pod by the UID of its mirror.
    pub fn resolve(&self, uid: &str) -> String {
        let mirrors = self.mirrors.read().unwrap_or_else(PoisonError::into_inner);
        mirrors.get(uid).map_or(uid, String::as_str).to_owned()
    }

    /// Notes the UID under which the apiserver shows a static pod; none when it does not any more.
    pub fn note_mirror(&self, static_uid: &str, mirror_uid: Option<&str>) {
        let mut mirrors = self.mirrors.write().unwrap_or_else(PoisonError::into_inner);
        mirrors.retain(|_, owner| owner != static_uid);
        if let Some(uid) = mirror_uid {
            mirrors.insert(uid.to_owned(), static_uid.to_owned());
        }
    }

    /// All pods, by namespace and name.
    pub fn list(&self) -> Vec<Arc<PodEntry>> {
        let pods = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = pods.values().cloned().collect();
        all.sort_by(|a, b| {
            let key = |e: &PodEntry| {
                (
                    e.pod.metadata.namespace.clone(),
                    e.pod.metadata.name.clone(),
                )
            };
            key(a).cmp(&key(b))
        });
        all
    }

    /// Puts or replaces a pod. For pod workers (and tests of readers).
    pub fn insert(&self, entry: PodEntry) {
        let uid = entry.uid().to_owned();
        self.inner
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(uid, Arc::new(entry));
    }

    /// The sources have shown every pod of this node once. For the pod manager.
    pub fn set_synced(&self) {
        self.synced.send_replace(true);
    }

    /// Waits for [`PodIndex::set_synced`]: before it, a pod that is not here may still come.
    pub async fn synced(&self) {
        // The sender lives as long as we do.
        let _ = self.synced.subscribe().wait_for(|synced| *synced).await;
    }

    /// Forgets a pod.
    pub fn remove(&self, uid: &str) {
        self.inner
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};

    fn entry(uid: &str, name: &str, deleting: bool) -> PodEntry {
        PodEntry {
            pod: Arc::new(Pod {
                metadata: ObjectMeta {
                    name: Some(name.to_owned()),
                    namespace: Some("ns".to_owned()),
                    uid: Some(uid.to_owned()),
                    deletion_timestamp: deleting.then_some(Time(jiff::Timestamp::UNIX_EPOCH)),
                    ..ObjectMeta::default()
                },
                ..Pod::default()
            }),
            status: Arc::default(),
            containers: BTreeMap::new(),
        }
    }

    #[test]
    fn a_mirrors_uid_leads_to_the_pod_that_runs() {
        let index = PodIndex::new();
        index.note_mirror("hash", Some("m1"));
        assert_eq!(index.resolve("m1"), "hash");
        index.note_mirror("hash", Some("m2"));
        assert_eq!(
            (index.resolve("m1"), index.resolve("m2")),
            ("m1".into(), "hash".into())
        );
        index.note_mirror("hash", None);
        assert_eq!(index.resolve("m2"), "m2");
    }

    #[test]
    fn a_successor_hides_its_terminating_namesake() {
        let index = PodIndex::new();
        index.insert(entry("old", "db-0", true));
        index.insert(entry("new", "db-0", false));
        assert_eq!(index.get("ns", "db-0").unwrap().uid(), "new");
        index.remove("new");
        assert_eq!(index.get("ns", "db-0").unwrap().uid(), "old");
        assert_eq!(index.list().len(), 1);
        assert!(index.by_uid("new").is_none());
    }
}
