//! Pulling: manifest, configuration, then all missing layers at once, each unpacked while it
//! downloads.
//!
//! ```text
//! pull(name) ── one task per (name, credentials) in flight; callers wait for the same task
//!   └ layer(diff id) ── one task per layer in flight, whoever wants it
//!        downloader (async) ──bounded channel──▶ unpacker (blocking thread)
//! ```
//! A task nobody waits for any more is aborted; its partial directory goes with it. Small layers
//! have a lane of their own, so that a tiny image does not wait behind a slow big one.

use super::error::{ImageError, Result};
use super::layer::{Expected, Feed, FeedReader, StagedLayer, stage};
use super::record::{Record, parse_config};
use super::reference::{self, Reference, is_sha256};
use super::registry::{SharedRegistries, Source};
use super::store::{CommitError, NewImage, Store};
use super::unpack::Limits;
use crate::error::chain;
use crate::service::RegistryAuth;
use futures::future::{BoxFuture, FutureExt as _, Shared};
use futures::{StreamExt as _, TryFutureExt as _};
use oci_client::manifest::OciDescriptor;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc, watch};

/// Layers of up to this size use the small lane.
const SMALL_BYTES: i64 = 8 << 20;
/// Unpacking is bound by CPU and disk; more at once only costs memory and threads.
const BIG_LANE: usize = 4;
const SMALL_LANE: usize = 12;
/// Chunks between downloader and unpacker; a chunk is some 10 KiB, at most 1 MiB.
const FEED_CHUNKS: usize = 32;
/// A broken stream is taken up where it broke, this often in a row without progress.
const RESUMES: u32 = 4;
/// Manifests with more layers than overlayfs can stack are refused.
const MAX_LAYERS: usize = 500;

/// How far a layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerProgress {
    /// In the queue.
    Waiting,
    /// So many compressed bytes came.
    Downloading(u64),
    /// It is complete and verified.
    Done,
}

/// A layer of a pull in progress.
#[derive(Debug, Clone)]
pub struct LayerHandle {
    /// Digest of the blob.
    pub digest: String,
    /// Compressed bytes, as announced.
    pub size_bytes: u64,
    /// How far it is.
    pub progress: watch::Receiver<LayerProgress>,
}

/// Told once per pull, when the layers are known.
pub type Observer = Arc<dyn Fn(&[LayerHandle]) + Send + Sync>;

type Outcome<T> = std::result::Result<T, Arc<ImageError>>;

/// A task in flight and its result, for everybody who wants the same. The last one who drops it
/// aborts it.
#[derive(Debug)]
struct Job<T: Clone> {
    result: Shared<BoxFuture<'static, Outcome<T>>>,
    abort: tokio::task::AbortHandle,
}

impl<T: Clone> Drop for Job<T> {
    fn drop(&mut self) {
        self.abort.abort();
    }
}

impl<T: Clone + Send + Sync + 'static> Job<T> {
    fn spawn(name: String, work: impl Future<Output = Outcome<T>> + Send + 'static) -> Self {
        let task = tokio::spawn(work);
        let abort = task.abort_handle();
        let result = task
            .unwrap_or_else(move |_| Err(Arc::new(ImageError::Cancelled(name))))
            .boxed()
            .shared();
        Self { result, abort }
    }
}

/// Jobs by key.
type Jobs<K, T> = Mutex<HashMap<K, std::sync::Weak<T>>>;

/// The running job of this key, or a new one. Finished ones are forgotten by their weak link.
fn join<K: Hash + Eq, T>(jobs: &Jobs<K, T>, key: K, start: impl FnOnce() -> T) -> Arc<T> {
    let mut jobs = jobs.lock().unwrap_or_else(PoisonError::into_inner);
    jobs.retain(|_, job| job.strong_count() > 0);
    if let Some(running) = jobs.get(&key).and_then(std::sync::Weak::upgrade) {
        return running;
    }
    let job = Arc::new(start());
    jobs.insert(key, Arc::downgrade(&job));
    job
}

struct LayerJob {
    job: Job<Arc<StagedLayer>>,
    progress: watch::Receiver<LayerProgress>,
}

/// An image that was pulled, and which of the credentials the registry took.
type PulledRecord = (Arc<Record>, Option<usize>);

/// Pulls into one store.
pub(crate) struct Puller {
    store: Arc<Store>,
    registries: SharedRegistries,
    limits: Limits,
    small: Arc<Semaphore>,
    big: Arc<Semaphore>,
    images: Jobs<(String, Vec<AuthKey>), Job<PulledRecord>>,
    layers: Jobs<String, LayerJob>,
}

/// Credentials as a map key, without keeping them.
type AuthKey = String;

fn auth_key(auth: &RegistryAuth) -> AuthKey {
    match auth {
        RegistryAuth::Anonymous => String::new(),
        RegistryAuth::Basic { username, password } => {
            super::layer::digest_of(format!("basic\0{username}\0{password}").as_bytes())
        }
        RegistryAuth::Token(token) => super::layer::digest_of(format!("token\0{token}").as_bytes()),
    }
}

impl Puller {
    pub(crate) fn new(store: Arc<Store>, registries: SharedRegistries, limits: Limits) -> Self {
        Self {
            store,
            registries,
            limits,
            small: Arc::new(Semaphore::new(SMALL_LANE)),
            big: Arc::new(Semaphore::new(BIG_LANE)),
            images: Jobs::default(),
            layers: Jobs::default(),
        }
    }

    /// Pulls `image`, or waits for the same pull already running.
    pub(crate) async fn pull(
        self: &Arc<Self>,
        image: &str,
        auths: &[RegistryAuth],
        observer: Option<Observer>,
    ) -> Outcome<PulledRecord> {
        let name = reference::parse(image)?;
        let key = (name.whole(), auths.iter().map(auth_key).collect());
        let job = join(&self.images, key, || {
            let (this, auths) = (Arc::clone(self), auths.to_vec());
            let label = name.whole();
            Job::spawn(label, async move {
                this.pull_alone(&name, &auths, observer)
                    .await
                    .map_err(|e| match e {
                        Failure::Own(error) => Arc::new(error),
                        Failure::Layer(error) => error,
                    })
            })
        });
        job.result.clone().await
    }

    async fn pull_alone(
        self: Arc<Self>,
        name: &Reference,
        auths: &[RegistryAuth],
        observer: Option<Observer>,
    ) -> std::result::Result<PulledRecord, Failure> {
        let (source, found, credential) = self.registries.manifest(name, auths).await?;
        let config = source
            .blob(&found.manifest.config, "image configuration")
            .await?;
        let parsed = parse_config(&config)?;
        let config = String::from_utf8(config).map_err(|_| unusable("is not UTF-8"))?;
        let layers = pair(&found.manifest.layers, &parsed.diff_ids)?;
        let mut digests = vec![reference::digest_name(name, &found.digest)];
        // The name a user can pull again by comes first.
        digests.splice(
            0..0,
            found
                .index_digest
                .iter()
                .map(|d| reference::digest_name(name, d)),
        );
        // Another process may remove a layer between our look and the commit; then look again.
        for _ in 0..3 {
            let _pins = Pins::new(&self.store, &parsed.diff_ids);
            let staged = self.layers(&source, &layers, observer.as_ref()).await?;
            let new = NewImage {
                id: found.manifest.config.digest.clone(),
                tags: reference::tag_name(name).into_iter().collect(),
                digests: digests.clone(),
                config: config.clone(),
                diff_ids: parsed.diff_ids.clone(),
            };
            match commit(&self.store, new, staged).await {
                Err(CommitError::LayerGone(layer)) => {
                    tracing::debug!(layer, "layer vanished during the pull, fetching it again");
                }
                Err(CommitError::Failed(error)) => return Err(error.into()),
                Ok(record) => return Ok((record, credential)),
            }
        }
        Err(unusable("its layers are removed faster than pulled").into())
    }

    /// All layers that are not stored yet.
    async fn layers(
        self: &Arc<Self>,
        source: &Source,
        layers: &[(OciDescriptor, String)],
        observer: Option<&Observer>,
    ) -> std::result::Result<Vec<Arc<StagedLayer>>, Failure> {
        let mut handles = Vec::new();
        let mut jobs = Vec::new();
        for (descriptor, diff_id) in layers {
            let progress = if self.store.has_layer(diff_id) {
                watch::channel(LayerProgress::Done).1
            } else {
                let job = join(&self.layers, diff_id.clone(), || {
                    Arc::clone(self).layer_job(source.clone(), descriptor.clone(), diff_id.clone())
                });
                jobs.push(Arc::clone(&job));
                job.progress.clone()
            };
            let size_bytes = u64::try_from(descriptor.size).unwrap_or(0);
            handles.push(LayerHandle {
                digest: descriptor.digest.clone(),
                size_bytes,
                progress,
            });
        }
        if let Some(observer) = observer {
            observer(&handles);
        }
        let results = jobs.iter().map(|job| job.job.result.clone());
        futures::future::try_join_all(results)
            .await
            .map_err(Failure::Layer)
    }

    fn layer_job(
        self: Arc<Self>,
        source: Source,
        descriptor: OciDescriptor,
        diff_id: String,
    ) -> LayerJob {
        let (report, progress) = watch::channel(LayerProgress::Waiting);
        let job = Job::spawn(descriptor.digest.clone(), async move {
            let lane = if descriptor.size <= SMALL_BYTES {
                &self.small
            } else {
                &self.big
            };
            // The semaphores are never closed.
            let _permit = lane.acquire().await;
            let expected = Expected {
                digest: Some(descriptor.digest.clone()),
                diff_id,
            };
            let mut result = self.fetch(&source, &descriptor, &expected, &report).await;
            if matches!(result, Err(ImageError::Digest { .. })) {
                // A middle box may have spoilt it; once more, from the start.
                result = self.fetch(&source, &descriptor, &expected, &report).await;
            }
            let staged = result.map_err(Arc::new)?;
            report.send_replace(LayerProgress::Done);
            Ok(Arc::new(staged))
        });
        LayerJob { job, progress }
    }

    async fn fetch(
        &self,
        source: &Source,
        descriptor: &OciDescriptor,
        expected: &Expected,
        report: &watch::Sender<LayerProgress>,
    ) -> Result<StagedLayer> {
        let (feed, chunks) = mpsc::channel(FEED_CHUNKS);
        let (layers, limits) = (self.store.layers_dir().to_owned(), self.limits);
        let label = descriptor.digest.clone();
        let wanted = expected.clone();
        let unpacker = tokio::task::spawn_blocking(move || {
            stage(&layers, &wanted, FeedReader::new(chunks), limits)
        });
        let downloaded = download(source, descriptor, feed, report).await;
        let staged = unpacker.await.map_err(|_| ImageError::Cancelled(label))?;
        match (downloaded, staged) {
            (_, Ok(staged)) => Ok(staged),
            // The unpacker only saw the stream end; the downloader knows why.
            (Err(error), Err(unpack)) if unpack.transient() => Err(error),
            (_, Err(unpack)) => Err(unpack),
        }
    }
}

/// Why a pull failed: by itself, or by a layer whose failure others share.
enum Failure {
    Own(ImageError),
    Layer(Arc<ImageError>),
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        Self::Own(error)
    }
}

fn unusable(reason: &str) -> ImageError {
    ImageError::Unusable {
        what: "image".to_owned(),
        reason: reason.to_owned(),
    }
}

/// Layers with their diff ids, lowest first.
fn pair(layers: &[OciDescriptor], diff_ids: &[String]) -> Result<Vec<(OciDescriptor, String)>> {
    if layers.len() != diff_ids.len() {
        let (layers, diffs) = (layers.len(), diff_ids.len());
        return Err(unusable(&format!(
            "has {layers} layers but {diffs} diff ids"
        )));
    }
    if layers.len() > MAX_LAYERS {
        return Err(unusable(&format!("has more than {MAX_LAYERS} layers")));
    }
    if let Some(bad) = layers.iter().find(|l| !is_sha256(&l.digest)) {
        return Err(unusable(&format!(
            "layer digest {:?} is not sha256",
            bad.digest
        )));
    }
    Ok(layers
        .iter()
        .cloned()
        .zip(diff_ids.iter().cloned())
        .collect())
}

/// Feeds the blob to the unpacker; a broken connection is resumed where it broke.
async fn download(
    source: &Source,
    descriptor: &OciDescriptor,
    feed: mpsc::Sender<Feed>,
    report: &watch::Sender<LayerProgress>,
) -> Result<()> {
    let mut offset = 0;
    let mut failures = 0;
    loop {
        let before = offset;
        let error = match feed_from(source, descriptor, &feed, report, &mut offset).await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        failures = if offset > before { 0 } else { failures + 1 };
        if !error.transient() || failures == RESUMES {
            return Err(error);
        }
        tracing::debug!(
            digest = descriptor.digest,
            offset,
            error = chain(&error),
            "resuming"
        );
        tokio::time::sleep(Duration::from_millis(200) * 2u32.pow(failures)).await;
    }
}

async fn feed_from(
    source: &Source,
    descriptor: &OciDescriptor,
    feed: &mpsc::Sender<Feed>,
    report: &watch::Sender<LayerProgress>,
    offset: &mut u64,
) -> Result<()> {
    let size = u64::try_from(descriptor.size).unwrap_or(0);
    if *offset < size || size == 0 {
        let mut stream = source.stream(descriptor, *offset).await?;
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|e| source.broken(&e))?;
            *offset += chunk.len() as u64;
            // The digest would tell too, but only after all of it.
            if size > 0 && *offset > size {
                return Err(ImageError::Digest {
                    what: format!("layer {}", descriptor.digest),
                    expected: format!("{size} bytes"),
                    actual: "more".to_owned(),
                });
            }
            // A closed channel: the unpacker gave up and says why itself.
            if feed.send(Feed::Data(chunk)).await.is_err() {
                return Ok(());
            }
            report.send_replace(LayerProgress::Downloading(*offset));
        }
    }
    if *offset < size {
        let cut = std::io::Error::other(format!("stream ended after {offset} of {size} bytes"));
        return Err(source.broken(&cut));
    }
    let _ = feed.send(Feed::End).await;
    Ok(())
}

/// Commits on a blocking thread, then sees to it that all reaches the disk.
pub(crate) async fn commit(
    store: &Arc<Store>,
    new: NewImage,
    staged: Vec<Arc<StagedLayer>>,
) -> std::result::Result<Arc<Record>, CommitError> {
    let id = new.id.clone();
    let at = Arc::clone(store);
    let record = tokio::task::spawn_blocking(move || at.commit(new, &staged))
        .await
        .map_err(|_| CommitError::Failed(ImageError::Cancelled(id)))??;
    let (store, id) = (Arc::clone(store), record.id.clone());
    // Nobody waits: until it is done the boot id says what to trust.
    tokio::task::spawn_blocking(move || {
        if let Err(error) = store.make_durable(&id) {
            tracing::warn!(
                image = id,
                error = chain(&error),
                "cannot sync image to disk"
            );
        }
    });
    Ok(record)
}

/// Layers kept from removal while this lives.
struct Pins {
    store: Arc<Store>,
    diff_ids: Vec<String>,
}

impl Pins {
    fn new(store: &Arc<Store>, diff_ids: &[String]) -> Self {
        diff_ids.iter().for_each(|d| store.pin(d));
        Self {
            store: Arc::clone(store),
            diff_ids: diff_ids.to_vec(),
        }
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        self.diff_ids.iter().for_each(|d| self.store.unpin(d));
    }
}
