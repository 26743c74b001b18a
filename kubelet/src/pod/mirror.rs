//! Mirror pods: what the apiserver shows of static pods.
//!
//! The manager notes which static pods run and which mirrors the watch shows ([`Mirrors`]); one
//! task ([`Keeper`]) makes the apiserver's side agree: a mirror for every static pod that runs,
//! made again when somebody deletes it, replaced when the manifest changes, gone when the pod is
//! gone — and not before: while it ends, users still see it. Nothing waits for this task.
//!
//! The decision is pure ([`plan`]); every deletion has the UID as precondition.

use crate::api::{REQUEST_TIMEOUT, within};
use crate::node::NodeHandle;
use crate::pod::index::PodIndex;
use crate::pod::spec;
use crate::source::{ANNOTATION_MIRROR, is_mirror, mirror_hash, static_hash};
use crate::status::publish::StatusPublisher;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Api;
use kube::api::{DeleteParams, PostParams, Preconditions};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Back-off of a refused request.
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(15);

/// Namespace and name.
type Name = (String, String);

fn name(pod: &Pod) -> Name {
    (spec::namespace(pod).to_owned(), spec::name(pod).to_owned())
}

/// A static pod of this node.
#[derive(Debug, Clone)]
enum Wanted {
    /// It runs: it shall have a mirror.
    Shown(Arc<Pod>),
    /// It ends: a mirror it has stays.
    Ending(Arc<Pod>),
}

impl Wanted {
    fn pod(&self) -> &Pod {
        match self {
            Self::Shown(pod) | Self::Ending(pod) => pod,
        }
    }
}

/// All that is known.
#[derive(Debug, Default)]
struct Book {
    wanted: BTreeMap<Name, Wanted>,
    mirrors: BTreeMap<Name, Arc<Pod>>,
    /// The watch has shown every mirror there is.
    api_synced: bool,
    /// Every source has shown its pods: a mirror without a pod is an orphan.
    all_synced: bool,
}

/// Where the manager notes what it sees. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Mirrors {
    book: Arc<Mutex<Book>>,
    changed: Arc<Notify>,
    publisher: StatusPublisher,
    index: PodIndex,
}

impl Mirrors {
    /// Statuses of static pods go to their mirrors by `publisher`; readers find them by `index`.
    pub fn new(publisher: StatusPublisher, index: PodIndex) -> Self {
        Self {
            publisher,
            index,
            ..Self::default()
        }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A static pod runs (or will in a moment).
    pub fn shown(&self, pod: &Arc<Pod>) {
        let mut book = self.book();
        book.wanted.insert(name(pod), Wanted::Shown(pod.clone()));
        self.pair(&book, &name(pod));
    }

    /// A static pod is being ended.
    pub fn ending(&self, pod: &Arc<Pod>) {
        let mut book = self.book();
        if book.is(pod) {
            book.wanted.insert(name(pod), Wanted::Ending(pod.clone()));
        }
    }

    /// Nothing of a static pod is left.
    pub fn ended(&self, pod: &Pod) {
        let mut book = self.book();
        if book.is(pod) {
            book.wanted.remove(&name(pod));
        }
        self.publisher.set_mirror(spec::uid(pod), None);
        self.index.note_mirror(spec::uid(pod), None);
        drop(book);
        self.changed.notify_one();
    }

    /// The watch shows a mirror, or one was made just now.
    pub fn seen(&self, mirror: &Arc<Pod>) {
        let mut book = self.book();
        book.mirrors.insert(name(mirror), mirror.clone());
        self.pair(&book, &name(mirror));
    }

    /// A mirror is gone.
    pub fn unseen(&self, mirror: &Pod) {
        let mut book = self.book();
        let key = name(mirror);
        let same = book
            .mirrors
            .get(&key)
            .is_some_and(|m| spec::uid(m) == spec::uid(mirror));
        if !same {
            return;
        }
        book.mirrors.remove(&key);
        if let Some(wanted) = book.wanted.get(&key) {
            self.publisher.set_mirror(spec::uid(wanted.pod()), None);
            self.index.note_mirror(spec::uid(wanted.pod()), None);
        }
        drop(book);
        self.changed.notify_one();
    }

    /// The apiserver's pods were all shown (`all`: and those of every other source).
    pub fn synced(&self, all: bool) {
        let mut book = self.book();
        book.api_synced = true;
        book.all_synced |= all;
        drop(book);
        self.changed.notify_one();
    }

    /// Joins a static pod and its mirror, for the status and for readers.
    fn pair(&self, book: &Book, key: &Name) {
        if let (Some(wanted), Some(mirror)) = (book.wanted.get(key), book.mirrors.get(key))
            && mirror_hash(mirror) == static_hash(wanted.pod())
        {
            let uid = spec::uid(wanted.pod());
            self.publisher.set_mirror(uid, Some(mirror));
            self.index.note_mirror(uid, mirror.metadata.uid.as_deref());
        }
        self.changed.notify_one();
    }
}

impl Book {
    /// Whether the pod noted under that name is this one.
    fn is(&self, pod: &Pod) -> bool {
        let noted = self.wanted.get(&name(pod));
        noted.is_some_and(|w| spec::uid(w.pod()) == spec::uid(pod))
    }
}

/// One thing to do at the apiserver.
#[derive(Debug, Clone)]
enum Action {
    Create(Arc<Pod>),
    Delete(Arc<Pod>),
}

impl Action {
    fn pod(&self) -> &Arc<Pod> {
        match self {
            Self::Create(pod) | Self::Delete(pod) => pod,
        }
    }
}

/// Decides. Pure.
fn plan(book: &Book, node_is_there: bool) -> Vec<Action> {
    let mut actions = Vec::new();
    for (key, mirror) in &book.mirrors {
        let delete = match book.wanted.get(key) {
            Some(Wanted::Shown(pod)) => {
                mirror.metadata.deletion_timestamp.is_some()
                    || mirror_hash(mirror) != static_hash(pod)
            }
            Some(Wanted::Ending(_)) => false,
            None => book.all_synced,
        };
        if delete {
            actions.push(Action::Delete(mirror.clone()));
        }
    }
    if !book.api_synced || !node_is_there {
        return actions;
    }
    for (key, wanted) in &book.wanted {
        if let Wanted::Shown(pod) = wanted
            && !book.mirrors.contains_key(key)
        {
            actions.push(Action::Create(pod.clone()));
        }
    }
    actions
}

/// The mirror of a static pod, owned by the Node.
fn mirror_of(pod: &Pod, mut owner: OwnerReference) -> Pod {
    let mut mirror = pod.clone();
    let hash = static_hash(pod).unwrap_or_default().to_owned();
    let metadata = &mut mirror.metadata;
    let annotations = metadata.annotations.get_or_insert_default();
    annotations.insert(ANNOTATION_MIRROR.to_owned(), hash);
    owner.controller = Some(true);
    metadata.owner_references = Some(vec![owner]);
    metadata.uid = None;
    metadata.resource_version = None;
    mirror.status = None;
    mirror
}

/// When a name may be tried again.
#[derive(Debug)]
struct Pause {
    until: Instant,
    delay: Duration,
    said: String,
}

/// The task that makes the apiserver's side agree.
pub struct Keeper {
    mirrors: Mirrors,
    client: kube::Client,
    node: NodeHandle,
    pauses: BTreeMap<Name, Pause>,
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keeper")
            .field("mirrors", &self.mirrors)
            .finish_non_exhaustive()
    }
}

impl Keeper {
    /// Acts for the node behind `node`.
    pub fn new(mirrors: Mirrors, client: kube::Client, node: NodeHandle) -> Self {
        Self {
            mirrors,
            client,
            node,
            pauses: BTreeMap::new(),
        }
    }

    /// Runs until cancelled.
    pub async fn run(mut self, cancel: CancellationToken) {
        let mut node = self.node.subscribe();
        loop {
            let owner = self
                .node
                .owner_reference()
                .filter(|_| !self.node_is_going());
            let actions = plan(&self.mirrors.book(), owner.is_some());
            let names: Vec<_> = actions.iter().map(|a| name(a.pod())).collect();
            self.pauses.retain(|key, _| names.contains(key));
            for action in actions {
                let now = Instant::now();
                if self
                    .pauses
                    .get(&name(action.pod()))
                    .is_some_and(|p| p.until > now)
                {
                    continue;
                }
                tokio::select! {
                    () = cancel.cancelled() => return,
                    () = self.act(&action, owner.as_ref()) => {}
                }
            }
            let next = self.pauses.values().map(|p| p.until).min();
            let sleep = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = cancel.cancelled() => return,
                () = self.mirrors.changed.notified() => {}
                changed = node.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                () = sleep => {}
            }
        }
    }

    fn node_is_going(&self) -> bool {
        let node = self.node.node();
        node.is_some_and(|n| n.metadata.deletion_timestamp.is_some())
    }

    async fn act(&mut self, action: &Action, owner: Option<&OwnerReference>) {
        let key = name(action.pod());
        let result = match action {
            Action::Create(pod) => match owner {
                Some(owner) => self.create(pod, owner.clone()).await,
                None => Ok(()),
            },
            Action::Delete(mirror) => self.delete(mirror).await,
        };
        let Err(error) = result else {
            self.pauses.remove(&key);
            return;
        };
        let text = match &error {
            kube::Error::Api(status) => status.message.clone(),
            other => other.to_string(),
        };
        let before = self.pauses.remove(&key);
        let delay = before
            .as_ref()
            .map_or(RETRY_FIRST, |p| RETRY_MAX.min(p.delay * 2));
        if before.is_none_or(|p| p.said != text) {
            let pod = spec::describe(action.pod());
            match action {
                Action::Create(_) => warn!(pod, "Failed creating a mirror pod: {text}"),
                Action::Delete(_) => warn!(pod, "Failed deleting a mirror pod: {text}"),
            }
        }
        let until = Instant::now() + delay;
        let pause = Pause {
            until,
            delay,
            said: text,
        };
        self.pauses.insert(key, pause);
    }

    fn api(&self, pod: &Pod) -> Api<Pod> {
        Api::namespaced(self.client.clone(), spec::namespace(pod))
    }

    async fn create(&self, pod: &Pod, owner: OwnerReference) -> Result<(), kube::Error> {
        info!(
            pod = spec::describe(pod),
            "Creating a mirror pod for static pod"
        );
        let mirror = mirror_of(pod, owner);
        let params = PostParams::default();
        let api = self.api(pod);
        let made = match within(REQUEST_TIMEOUT, api.create(&params, &mirror)).await {
            // Made before, and the watch has not shown it (again).
            Err(kube::Error::Api(status)) if status.code == 409 => {
                let found = within(REQUEST_TIMEOUT, api.get(spec::name(pod))).await?;
                if !is_mirror(&found) {
                    return Err(kube::Error::Api(status));
                }
                found
            }
            made => made?,
        };
        // The watch shows it as well; until then it must not be made again.
        self.mirrors.seen(&Arc::new(made));
        Ok(())
    }

    async fn delete(&self, mirror: &Pod) -> Result<(), kube::Error> {
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: mirror.metadata.uid.clone(),
                resource_version: None,
            }),
            ..DeleteParams::default().grace_period(0)
        };
        let api = self.api(mirror);
        let deleted = within(REQUEST_TIMEOUT, api.delete(spec::name(mirror), &params)).await;
        match deleted {
            Ok(_) => info!(pod = spec::describe(mirror), "Deleted mirror pod"),
            // It is gone, or another one has its name.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
            Err(error) => return Err(error),
        }
        self.mirrors.unseen(mirror);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn own(hash: &str) -> Arc<Pod> {
        let pod = json!({"metadata": {"name": "etcd-n", "namespace": "kube-system", "uid": hash,
            "annotations": {"kubernetes.io/config.source": "file",
                "kubernetes.io/config.hash": hash}}});
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn mirror(uid: &str, hash: &str) -> Arc<Pod> {
        let pod = json!({"metadata": {"name": "etcd-n", "namespace": "kube-system", "uid": uid,
            "annotations": {"kubernetes.io/config.mirror": hash}}});
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn words(mirrors: &Mirrors, node: bool) -> Vec<String> {
        let word = |action: &Action| match action {
            Action::Create(pod) => format!("create {}", spec::uid(pod)),
            Action::Delete(pod) => format!("delete {}", spec::uid(pod)),
        };
        plan(&mirrors.book(), node).iter().map(word).collect()
    }

    #[test]
    fn a_mirror_is_made_once_node_and_apiserver_are_there() {
        let mirrors = Mirrors::default();
        mirrors.shown(&own("h1"));
        assert!(words(&mirrors, true).is_empty(), "the watch has not synced");
        mirrors.synced(false);
        assert!(words(&mirrors, false).is_empty(), "no Node to own it");
        assert_eq!(words(&mirrors, true), ["create h1"]);
        mirrors.seen(&mirror("m1", "h1"));
        assert!(words(&mirrors, true).is_empty());
        assert_eq!(mirrors.index.resolve("m1"), "h1");
    }

    #[test]
    fn a_deleted_mirror_is_made_again_and_one_being_deleted_is_helped() {
        let mirrors = Mirrors::default();
        mirrors.shown(&own("h1"));
        mirrors.synced(true);
        let mut going = (*mirror("m1", "h1")).clone();
        going.metadata.deletion_timestamp = Some(
            k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::UNIX_EPOCH),
        );
        mirrors.seen(&Arc::new(going));
        assert_eq!(words(&mirrors, true), ["delete m1"]);
        mirrors.unseen(&mirror("m0", "h1"));
        assert_eq!(
            words(&mirrors, true),
            ["delete m1"],
            "an older one is gone, not this"
        );
        mirrors.unseen(&mirror("m1", "h1"));
        assert_eq!(words(&mirrors, true), ["create h1"]);
    }

    #[test]
    fn a_mirror_outlives_the_end_of_its_pod_and_not_the_pod() {
        let mirrors = Mirrors::default();
        mirrors.synced(true);
        let (old, new) = (own("h1"), own("h2"));
        mirrors.shown(&old);
        mirrors.seen(&mirror("m1", "h1"));
        mirrors.ending(&old);
        assert!(words(&mirrors, true).is_empty());
        // Deleted by a user while the pod ends: not made again.
        mirrors.unseen(&mirror("m1", "h1"));
        assert!(words(&mirrors, true).is_empty());
        mirrors.seen(&mirror("m1", "h1"));
        mirrors.ended(&old);
        assert_eq!(words(&mirrors, true), ["delete m1"]);
        mirrors.shown(&new);
        assert_eq!(
            words(&mirrors, true),
            ["delete m1"],
            "first the old one goes"
        );
        mirrors.unseen(&mirror("m1", "h1"));
        assert_eq!(words(&mirrors, true), ["create h2"]);
    }

    #[test]
    fn orphans_are_deleted_only_when_every_source_was_read() {
        let mirrors = Mirrors::default();
        mirrors.seen(&mirror("m1", "h1"));
        mirrors.synced(false);
        assert!(words(&mirrors, true).is_empty());
        mirrors.synced(true);
        assert_eq!(words(&mirrors, true), ["delete m1"]);
    }

    #[test]
    fn a_mirror_is_owned_by_the_node() {
        let owner = OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: "n".to_owned(),
            uid: "nu".to_owned(),
            ..OwnerReference::default()
        };
        let made = mirror_of(&own("h1"), owner);
        let owners = serde_json::to_value(&made.metadata.owner_references).unwrap();
        assert_eq!(
            owners,
            json!([{"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "nu",
                "controller": true}])
        );
        assert_eq!(mirror_hash(&made), Some("h1"));
        assert_eq!(made.metadata.uid, None);
    }
}
