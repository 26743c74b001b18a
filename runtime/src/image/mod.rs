//! Images: pulled from registries, unpacked while they download, kept as overlayfs layers.
//!
//! ```text
//! reference ─▶ registry ─▶ pull ─▶ layer ─▶ unpack ─▶ tree      (a layer's bytes go this way)
//!                            └──▶ store ◀── archive (load, export)
//!                                   └ record, parents, gc
//! ```
//!
//! Tasks: one per pull in flight, one per layer in flight with one blocking thread; all end with
//! the last caller that waits for them. Channels: downloader → unpacker, bounded.
//!
//! Nothing becomes visible before its digest and diff id are verified. Several processes (agent,
//! command line) may use one store; see `store` for what is on disk and what a restart may
//! assume. Forbidden here: running programs, mounting, knowing containers.

mod archive;
mod error;
mod layer;
mod pack;
mod parents;
mod pull;
mod record;
pub mod reference;
mod registry;
mod store;
mod tree;
mod unpack;
mod usage;

pub use error::{ImageError, UnpackError};
pub use pull::{LayerHandle, LayerProgress, Observer};
pub use registry::RegistryConfig;
pub use unpack::Limits;

use crate::service::{
    FsUsage, ImageConfig, ImageService, ImageStatus, Pulled, RegistryAuth, RuntimeError,
};
use record::Record;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use store::Store;

/// The node's images. Cheap to clone.
#[derive(Clone)]
pub struct ImageStore {
    root: PathBuf,
    store: Arc<Store>,
    puller: Arc<pull::Puller>,
}

impl std::fmt::Debug for ImageStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageStore")
            .field("root", &self.root)
            .finish_non_exhaustive()
    }
}

impl ImageStore {
    /// Opens the store below `root` (`<root>/images`, `<root>/layers`), making it if need be.
    /// Removes what earlier processes left half done. Blocking.
    ///
    /// # Errors
    /// [`ImageError::Io`] when the directories cannot be made or read.
    pub fn open(root: &Path, config: RegistryConfig) -> Result<Self, ImageError> {
        let store = Arc::new(Store::open(root)?);
        let registries = Arc::new(registry::Registries::new(config));
        let puller = Arc::new(pull::Puller::new(
            Arc::clone(&store),
            registries,
            Limits::default(),
        ));
        Ok(Self {
            root: root.to_owned(),
            store,
            puller,
        })
    }

    /// The image behind a name, digest, id or unique id prefix.
    pub fn status(&self, image: &str) -> Option<ImageStatus> {
        self.store.find(image).ok().map(|r| r.status())
    }

    /// All images, by id.
    pub fn list(&self) -> Vec<ImageStatus> {
        self.store.images().iter().map(|r| r.status()).collect()
    }

    /// Pulls an image; identical pulls in flight share one download, and so do identical layers
    /// of different images. Credentials are tried in order; none means anonymous.
    ///
    /// # Errors
    /// See [`ImageError`]; shared by all who waited.
    pub async fn pull(
        &self,
        image: &str,
        auth: &[RegistryAuth],
    ) -> Result<ImageStatus, Arc<ImageError>> {
        self.pull_observed(image, auth, None).await
    }

    /// Like [`Self::pull`]; `observer` is told the layers once they are known and can watch each.
    /// When the same pull is already running its first caller's observer is the one told.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub async fn pull_observed(
        &self,
        image: &str,
        auth: &[RegistryAuth],
        observer: Option<Observer>,
    ) -> Result<ImageStatus, Arc<ImageError>> {
        let (record, _) = self.puller.pull(image, auth, observer).await?;
        Ok(record.status())
    }

    /// Removes a name, or by id the image with all its names; layers nobody else uses go too.
    /// Removing what is not there succeeds.
    ///
    /// # Errors
    /// [`ImageError::InUse`] while a lease is held, [`ImageError::Ambiguous`] for a short id.
    pub async fn remove(&self, image: &str) -> Result<(), ImageError> {
        let image = image.to_owned();
        self.blocking(move |store| store.remove(&image)).await
    }

    /// Loads all images of an archive (`docker save` or OCI layout; plain, gzip or zstd).
    ///
    /// # Errors
    /// [`ImageError::Unusable`] when the file is no such archive, and as for a pull.
    pub async fn load(&self, archive: &Path) -> Result<Vec<ImageStatus>, ImageError> {
        let (store, path) = (Arc::clone(&self.store), archive.to_owned());
        let loaded = tokio::task::spawn_blocking(move || archive::load(&store, &path))
            .await
            .map_err(|_| ImageError::Cancelled(archive.display().to_string()))??;
        for record in &loaded {
            let id = record.id.clone();
            self.blocking(move |store| store.make_durable(&id)).await?;
        }
        Ok(loaded.iter().map(|r| r.status()).collect())
    }

    /// Writes an image as an OCI layout archive that [`Self::load`] and others read. Layers are
    /// packed anew from the unpacked files, so digests and id differ from the original's.
    ///
    /// # Errors
    /// [`ImageError::NotStored`], [`ImageError::Io`].
    pub async fn export(&self, image: &str, to: &Path) -> Result<(), ImageError> {
        let (lease, to) = (self.lease(image)?, to.to_owned());
        let label = image.to_owned();
        tokio::task::spawn_blocking(move || archive::export(&lease, &to))
            .await
            .map_err(|_| ImageError::Cancelled(label))?
    }

    /// Uses an image: it and its layers stay until the lease is dropped. Whoever runs containers
    /// takes one per container, again after a restart, before anything may collect images.
    ///
    /// # Errors
    /// [`ImageError::NotStored`], [`ImageError::Io`].
    pub fn lease(&self, image: &str) -> Result<ImageLease, ImageError> {
        let record = self.store.acquire(image)?;
        Ok(ImageLease {
            store: Arc::clone(&self.store),
            record,
        })
    }

    /// Use of the filesystem the images are on.
    pub fn fs_usage(&self) -> FsUsage {
        usage::fs_usage(&self.root, &self.store)
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, ImageError> + Send + 'static,
    ) -> Result<T, ImageError> {
        let store = Arc::clone(&self.store);
        tokio::task::spawn_blocking(move || work(&store))
            .await
            .map_err(|_| ImageError::Cancelled("store".to_owned()))?
    }
}

impl ImageService for ImageStore {
    fn status(&self, image: &str) -> Option<ImageStatus> {
        Self::status(self, image)
    }

    fn list(&self) -> Vec<ImageStatus> {
        Self::list(self)
    }

    async fn pull(&self, image: &str, auth: &[RegistryAuth]) -> crate::service::Result<Pulled> {
        let pulled = self.puller.pull(image, auth, None).await;
        let (record, credential) = pulled.map_err(|e| RuntimeError::from(e.as_ref()))?;
        Ok(Pulled {
            status: record.status(),
            credential,
        })
    }

    async fn remove(&self, image: &str) -> crate::service::Result<()> {
        Ok(Self::remove(self, image).await?)
    }

    fn fs_usage(&self) -> FsUsage {
        Self::fs_usage(self)
    }
}

/// An image in use. See [`ImageStore::lease`].
#[derive(Debug)]
pub struct ImageLease {
    store: Arc<Store>,
    record: Arc<Record>,
}

impl ImageLease {
    /// Directories for overlayfs' `lowerdir`, topmost first.
    pub fn layers(&self) -> Vec<PathBuf> {
        self.store.lower_dirs(&self.record)
    }

    /// What to run.
    pub fn config(&self) -> ImageConfig {
        self.status().config
    }

    /// The image.
    pub fn status(&self) -> ImageStatus {
        self.record.status()
    }

    pub(crate) fn record(&self) -> &Record {
        &self.record
    }
}

impl Drop for ImageLease {
    fn drop(&mut self) {
        self.store.release(&self.record.id);
    }
}

#[cfg(test)]
mod tests;
