//! Volumes of pods on the node, and their upkeep.
//!
//! ```text
//!  worker --prepare(pod)--> plan (pure) --> place: record, directories, mounts   (blocking pool)
//!                              |---------> objects, token request                (concurrently)
//!                              v
//!                      payload (pure) --> atomic writer                          (blocking pool)
//!  Objects::changes --> live task --> payload, writer of the volumes concerned
//!  token refresh: one sleeping task per pod with tokens
//! ```
//!
//! Volumes of files are rewritten when an object, the pod's metadata or a token changes; see
//! [`live`]. Secrets and tokens live on one tmpfs per node (docs/decisions/0010). Forbidden here:
//! deleting through a mount, mounts without a record, blocking calls on the async threads.
//!
//! Claims and inline volumes ([`remote`]) are mounted by their drivers ([`csi`]) or are of this
//! node ([`local`]); each has its own time, and none holds up another.

mod atomic;
mod claims;
pub(crate) mod csi;
mod error;
mod host_path;
mod live;
mod local;
mod ownership;
mod payload;
mod place;
mod plan;
mod remote;
#[cfg(test)]
mod tests;
mod token;

use crate::events::EventSink;
use crate::launch::qos::pod_resources;
use crate::launch::{LaunchContext, pod_namespace, pod_uid};
use crate::node::NodeHandle;
use crate::objects::Objects;
use crate::quantity::Quantity;
use arc_swap::ArcSwap;
use futures::future::{join, join_all, try_join};
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use live::Live;
use local::LocalVolumes;
use payload::{Fetched, Owner, payload};
use place::Place;
use plan::{FilesVolume, Kind, Planned, Source, TokenSpec, common_user, fs_group, volumes_of};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use token::Token;
#[cfg(test)]
pub(crate) use token::unsigned as unsigned_token;
use tokio_util::sync::CancellationToken;

use csi::Csi;
pub use csi::{Drivers, Usage};
pub use error::{Step, VolumeError};
use remote::Remote;

/// A volume on the node, ready to be mounted into containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostVolume {
    /// What containers mount; empty for the content of an image, which they mount by its id.
    pub path: PathBuf,
    /// Whether containers may only read it, whatever their mount says.
    pub readonly: bool,
    /// A device, not a directory.
    pub block: bool,
}

/// A volume as statistics see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumePlace {
    /// Its name in the pod.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// How full it is.
    pub fill: Fill,
}

/// How to learn how full a volume is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// Ask the kernel.
    Ask,
    /// Its driver told; none when it has not, or cannot. The kernel is not asked: what a driver
    /// mounted may hang.
    Told(Option<Usage>),
}

/// The volumes of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodVolumes {
    /// By volume name.
    pub by_name: BTreeMap<String, HostVolume>,
}

/// Settings of [`Volumes`].
#[derive(Debug, Clone)]
pub struct VolumesConfig {
    /// The kubelet's root (`/var/lib/kubelet`).
    pub root_dir: PathBuf,
    /// The node as launches see it, for resources in downward API volumes.
    pub context: Arc<ArcSwap<LaunchContext>>,
    /// Events for users: what goes wrong while volumes are kept up to date.
    pub events: EventSink,
    /// Name of the Node.
    pub node_name: String,
    /// The Node.
    pub node: NodeHandle,
    /// The node's CSI drivers.
    pub drivers: Drivers,
}

/// The volumes of all pods. Cheap to clone; clones are the same.
#[derive(Clone)]
pub struct Volumes {
    inner: Arc<Inner>,
    _live: Arc<Live>,
}

impl std::fmt::Debug for Volumes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Volumes")
            .field("pods", &lock(&self.inner.pods).len())
            .finish_non_exhaustive()
    }
}

struct Inner {
    place: Place,
    local: LocalVolumes,
    csi: Csi,
    node: NodeHandle,
    node_name: String,
    context: Arc<ArcSwap<LaunchContext>>,
    objects: Arc<Objects>,
    client: Client,
    events: EventSink,
    pods: Mutex<HashMap<String, Arc<PodState>>>,
    /// Pods that had volumes when this process began: their tokens may still be good.
    from_before: HashSet<String>,
}

/// A pod whose volumes are kept.
struct PodState {
    uid: String,
    planned: Vec<Planned>,
    pod: Mutex<Arc<Pod>>,
    /// Held while its files are written, so that an older state never overwrites a newer one.
    writing: tokio::sync::Mutex<()>,
    /// By volume name and index of the source.
    tokens: Mutex<HashMap<(String, usize), Token>>,
    refresh: Mutex<Option<tokio::task::AbortHandle>>,
    ready: Mutex<Option<PodVolumes>>,
    /// Volumes behind claims and of drivers that are mounted, by name.
    remote: Mutex<BTreeMap<String, Remote>>,
    upkeep: Mutex<Option<tokio::task::AbortHandle>>,
    /// The pod ends: nobody waits for others any more.
    ended: CancellationToken,
    /// A rewrite waits for its turn: another would find nothing more to do.
    rewrite_waits: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Volumes {
    /// Opens the node's volumes: mounts the shared tmpfs, begins to follow changes. Blocks
    /// shortly; needs a tokio runtime. The tasks end with the last clone.
    ///
    /// # Errors
    /// [`VolumeError::Node`].
    pub fn new(
        config: VolumesConfig,
        objects: Arc<Objects>,
        client: Client,
    ) -> Result<Self, VolumeError> {
        let place = Place::open(&config.root_dir)?;
        let csi = Csi::open(csi::Settings {
            root: place.root(),
            node_name: config.node_name.clone(),
            node: config.node.clone(),
            drivers: config.drivers,
            events: config.events.clone(),
            client: client.clone(),
        });
        let inner = Arc::new(Inner {
            from_before: place.uids().into_iter().collect(),
            local: LocalVolumes::new(place.root()),
            csi,
            node: config.node,
            node_name: config.node_name,
            place,
            context: config.context,
            objects,
            client,
            events: config.events,
            pods: Mutex::default(),
        });
        let live = Arc::new(Live::start(&inner));
        Ok(Self { inner, _live: live })
    }

    /// Where the volumes of a pod are: those that are ready.
    pub fn places(&self, uid: &str) -> Vec<VolumePlace> {
        let state = lock(&self.inner.pods).get(uid).cloned();
        let Some(state) = state else {
            return Vec::new();
        };
        let ready = lock(&state.ready).clone();
        let volumes = ready.map(|v| v.by_name).unwrap_or_default();
        let told = remote::usages(&state);
        let place = |(name, volume): (String, HostVolume)| VolumePlace {
            fill: told
                .get(&name)
                .map_or(Fill::Ask, |usage| Fill::Told(*usage)),
            name,
            path: volume.path,
        };
        volumes.into_iter().map(place).collect()
    }

    /// Makes the pod's volumes and keeps them up to date from then on. Idempotent: a pod whose
    /// volumes are there is answered at once.
    ///
    /// # Errors
    /// The first volume that failed; call again later, what is there stays.
    pub async fn prepare(&self, pod: &Arc<Pod>) -> Result<PodVolumes, VolumeError> {
        let uid = pod_uid(pod);
        let known = lock(&self.inner.pods).get(uid).cloned();
        let state = match known {
            Some(state) => {
                if let Some(ready) = &*lock(&state.ready) {
                    return Ok(ready.clone());
                }
                *lock(&state.pod) = pod.clone();
                state
            }
            None => {
                let state = Arc::new(PodState::new(pod, volumes_of(pod)?));
                let mut pods = lock(&self.inner.pods);
                pods.entry(uid.to_owned()).or_insert(state).clone()
            }
        };
        let _only = state.writing.lock().await;
        let ready = lock(&state.ready).clone();
        if let Some(ready) = ready {
            return Ok(ready);
        }
        let fetched = async { Ok(self.inner.fetch_all(&state).await) };
        let (fetched, ()) = try_join(fetched, self.inner.make_places(&state)).await?;
        // Both to their ends: a driver's call is not broken off for a missing ConfigMap.
        let written = self.inner.write(&state, fetched);
        let (written, mounted) = join(written, self.inner.mount_remote(&state)).await;
        written.and(mounted)?;
        let volumes = self.inner.result(&state);
        *lock(&state.ready) = Some(volumes.clone());
        live::schedule_refresh(&self.inner, &state);
        remote::schedule_upkeep(&self.inner, &state);
        Ok(volumes)
    }

    /// The pod ends: a volume that is to be attached is not waited for any longer.
    pub fn stop_waiting(&self, uid: &str) {
        if let Some(state) = lock(&self.inner.pods).get(uid) {
            state.ended.cancel();
        }
    }

    /// The pod's metadata changed: downward API files are rewritten. Pods that are not prepared
    /// are left alone.
    ///
    /// # Errors
    /// The first volume that failed.
    pub async fn update(&self, pod: &Arc<Pod>) -> Result<(), VolumeError> {
        let state = lock(&self.inner.pods).get(pod_uid(pod)).cloned();
        let Some(state) = state else {
            return Ok(());
        };
        let shows_metadata = state.uses(|source| matches!(source, Source::Downward(_)));
        let old = std::mem::replace(&mut *lock(&state.pod), pod.clone());
        let same = old.metadata.labels == pod.metadata.labels
            && old.metadata.annotations == pod.metadata.annotations
            && old.spec.as_ref().map(|s| &s.containers) == pod.spec.as_ref().map(|s| &s.containers);
        if !shows_metadata || same || lock(&state.ready).is_none() {
            return Ok(());
        }
        self.inner.rewrite(&state).await
    }

    /// Removes everything of the pod, by records: also of pods nobody knows any more. The pod's
    /// containers have to be gone. Idempotent.
    ///
    /// # Errors
    /// [`VolumeError::Teardown`]: call again later.
    pub async fn teardown(&self, uid: &str) -> Result<(), VolumeError> {
        let state = lock(&self.inner.pods).remove(uid);
        let _only = match &state {
            Some(state) => {
                state.ended.cancel();
                state.stop_refresh();
                Some(state.writing.lock().await)
            }
            None => None,
        };
        self.inner.objects.release_pod(uid);
        let failed = |message| VolumeError::Teardown {
            uid: uid.to_owned(),
            message,
        };
        self.inner.csi.unmount_pod(uid).await.map_err(failed)?;
        let (place, local) = (self.inner.place.clone(), self.inner.local.clone());
        let uid = uid.to_owned();
        blocking(move || {
            local
                .unmount_pod(&uid)
                .map_err(|message| VolumeError::Teardown {
                    uid: uid.clone(),
                    message,
                })?;
            place.teardown(&uid)
        })
        .await
    }

    /// UIDs of pods that left something on the node, for orphan clean-up.
    pub fn list_on_disk(&self) -> Vec<String> {
        self.inner.place.uids()
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, VolumeError> + Send + 'static,
) -> Result<T, VolumeError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(VolumeError::Node {
            message: format!("file work did not end: {error}"),
        }),
    }
}

impl PodState {
    fn new(pod: &Arc<Pod>, planned: Vec<Planned>) -> Self {
        Self {
            uid: pod_uid(pod).to_owned(),
            planned,
            pod: Mutex::new(pod.clone()),
            writing: tokio::sync::Mutex::default(),
            tokens: Mutex::default(),
            refresh: Mutex::default(),
            ready: Mutex::default(),
            remote: Mutex::default(),
            upkeep: Mutex::default(),
            ended: CancellationToken::new(),
            rewrite_waits: AtomicBool::new(false),
        }
    }

    fn pod(&self) -> Arc<Pod> {
        lock(&self.pod).clone()
    }

    /// The volumes of files.
    fn files(&self) -> impl Iterator<Item = (&str, &FilesVolume)> {
        self.planned.iter().filter_map(|v| match &v.kind {
            Kind::Files(files) => Some((v.name.as_str(), files)),
            Kind::EmptyDir { .. }
            | Kind::HostPath { .. }
            | Kind::Image
            | Kind::Claim(_)
            | Kind::Csi(_)
            | Kind::Unused => None,
        })
    }

    fn uses(&self, test: impl Fn(&Source) -> bool) -> bool {
        self.files()
            .any(|(_, files)| files.sources.iter().any(&test))
    }

    fn stop_refresh(&self) {
        for task in [&self.refresh, &self.upkeep] {
            if let Some(task) = lock(task).take() {
                task.abort();
            }
        }
    }
}

impl Drop for PodState {
    fn drop(&mut self) {
        self.stop_refresh();
    }
}

/// The most an emptyDir in memory may hold: the node's allocatable memory, or the pod's limit.
fn memory_limit(pod: &Pod, context: &LaunchContext) -> Option<i64> {
    let node = context.allocatable.get("memory");
    let node = node
        .and_then(|q| Quantity::try_from(q).ok())
        .map(|q| q.value());
    let pod = pod_resources(pod, context)
        .ok()
        .and_then(|r| r.memory_limit_bytes);
    node.into_iter().chain(pod).filter(|bytes| *bytes > 0).min()
}

/// What the sources of each volume of files gave, in the order of [`PodState::files`].
type AllFetched = Vec<Vec<Fetched>>;

impl Inner {
    async fn make_places(&self, state: &PodState) -> Result<(), VolumeError> {
        let (place, pod) = (self.place.clone(), state.pod());
        let context = self.context.load_full();
        let (uid, planned) = (state.uid.clone(), state.planned.clone());
        blocking(move || place.prepare(&pod, &uid, &planned, memory_limit(&pod, &context))).await
    }

    /// Everything all volumes need, concurrently.
    async fn fetch_all(&self, state: &PodState) -> AllFetched {
        let pod = state.pod();
        let volumes = state.files().map(|(name, files)| {
            let sources = files.sources.iter().enumerate();
            let pod = &pod;
            join_all(
                sources.map(move |(index, source)| self.fetch(state, pod, name, index, source)),
            )
        });
        join_all(volumes).await
    }

    async fn fetch(
        &self,
        state: &PodState,
        pod: &Pod,
        volume: &str,
        index: usize,
        source: &Source,
    ) -> Fetched {
        let namespace = pod_namespace(pod);
        let failed = |error: &dyn std::fmt::Display| Fetched::Failed(error.to_string());
        match source {
            Source::ConfigMap(keys) => {
                let found = self.objects.config_map(&state.uid, namespace, &keys.name);
                found.await.map_or_else(|e| failed(&e), Fetched::ConfigMap)
            }
            Source::Secret(keys) => {
                let found = self.objects.secret(&state.uid, namespace, &keys.name);
                found.await.map_or_else(|e| failed(&e), Fetched::Secret)
            }
            Source::Downward(_) => Fetched::Downward,
            Source::Token(spec) => {
                let key = (volume.to_owned(), index);
                let now = jiff::Timestamp::now();
                let held = lock(&state.tokens).get(&key).cloned();
                if let Some(token) = held.as_ref().filter(|t| now < t.refresh_at) {
                    return Fetched::Token(token.text.clone());
                }
                let held = match held {
                    Some(token) => Some(token),
                    None => self.token_on_disk(state, pod, volume, spec).await,
                };
                if let Some(token) = held.as_ref().filter(|t| now < t.refresh_at) {
                    let text = token.text.clone();
                    lock(&state.tokens).insert(key, token.clone());
                    return Fetched::Token(text);
                }
                match token::request(&self.client, pod, spec).await {
                    Ok(token) => {
                        let text = token.text.clone();
                        lock(&state.tokens).insert(key, token);
                        Fetched::Token(text)
                    }
                    // The old one is better than none.
                    Err(error) => match held.filter(|t| now < t.expires_at) {
                        Some(token) => Fetched::Token(token.text),
                        None => Fetched::Failed(error),
                    },
                }
            }
        }
    }

    /// The token a process before us wrote, when it is good for longer.
    async fn token_on_disk(
        &self,
        state: &PodState,
        pod: &Pod,
        volume: &str,
        spec: &TokenSpec,
    ) -> Option<Token> {
        if !self.from_before.contains(&state.uid) {
            return None;
        }
        let (_, files) = state.files().find(|(name, _)| *name == volume)?;
        let dir = self.place.files_dir(&state.uid, volume, files);
        let text = tokio::fs::read_to_string(dir.join("..data").join(&spec.path)).await;
        token::reuse(text.ok()?, pod)
    }

    /// Writes what was fetched: all volumes that can be, then tells the first that could not.
    async fn write(&self, state: &PodState, fetched: AllFetched) -> Result<(), VolumeError> {
        let pod = state.pod();
        let context = self.context.load();
        let owner = Owner {
            user: common_user(&pod),
            group: fs_group(&pod),
        };
        let mut failed = None;
        let mut jobs = Vec::new();
        for ((name, files), got) in state.files().zip(fetched) {
            match payload(files, &got, &pod, &context, owner) {
                Ok(payload) => {
                    let dir = self.place.files_dir(&state.uid, name, files);
                    jobs.push((name.to_owned(), dir, payload));
                }
                Err(message) => {
                    failed.get_or_insert(VolumeError::set_up(name, message));
                }
            }
        }
        if !jobs.is_empty() {
            blocking(move || {
                for (name, dir, payload) in &jobs {
                    atomic::write(dir, payload, owner.group)
                        .map_err(|e| VolumeError::set_up(name, e.to_string()))?;
                }
                Ok(())
            })
            .await?;
        }
        failed.map_or(Ok(()), Err)
    }

    /// Brings the files of a prepared pod up to date.
    async fn rewrite(&self, state: &PodState) -> Result<(), VolumeError> {
        if state.rewrite_waits.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let _only = state.writing.lock().await;
        state.rewrite_waits.store(false, Ordering::Release);
        let kept = lock(&self.pods).contains_key(&state.uid);
        if !kept || lock(&state.ready).is_none() {
            return Ok(());
        }
        let fetched = self.fetch_all(state).await;
        self.write(state, fetched).await
    }

    fn result(&self, state: &PodState) -> PodVolumes {
        let directory = |path: PathBuf, readonly: bool| HostVolume {
            path,
            readonly,
            block: false,
        };
        let volume = |v: &Planned| {
            let host = match &v.kind {
                Kind::EmptyDir { .. } => {
                    directory(self.place.empty_dir(&state.uid, &v.name), false)
                }
                Kind::HostPath { path, .. } => directory(path.clone(), false),
                Kind::Image => directory(PathBuf::new(), true),
                Kind::Files(files) => {
                    directory(self.place.files_dir(&state.uid, &v.name, files), true)
                }
                Kind::Claim(_) | Kind::Csi(_) => lock(&state.remote).get(&v.name)?.host.clone(),
                Kind::Unused => return None,
            };
            Some((v.name.clone(), host))
        };
        PodVolumes {
            by_name: state.planned.iter().filter_map(volume).collect(),
        }
    }
}
