//! Images and layers on disk, shared by the agent and the command line.
//!
//! ```text
//! <root>/images/lock            taken for every change, by any process
//! <root>/images/<id>.json       one record per image; the only thing that makes layers count
//! <root>/images/<id>.lease      locked (shared) by processes that use the image
//! <root>/layers/<diff id>/      fs/ and layer.json, complete and verified
//! <root>/layers/*.partial-*     under construction (locked) or rubbish (not locked)
//! ```
//!
//! A restart may assume: every layer named by a record is complete, unless the record is not
//! durable and the machine was rebooted, in which case the image is dropped. Layers no record
//! names and unlocked partial directories are removed at open.
//!
//! Blocking, and quick but for removals; the async face is in the module's root.

use super::error::{ImageError, Result};
use super::layer::{PARTIAL, StagedLayer, partial_name, remove_dir, try_lock_dir};
use super::record::{Record, VERSION};
use super::reference;
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// The store. One per process and root.
#[derive(Debug)]
pub(crate) struct Store {
    images_dir: PathBuf,
    layers_dir: PathBuf,
    boot_id: String,
    state: Mutex<State>,
}

/// In memory; the records on disk win. A mutex because readers are many and synchronous.
#[derive(Debug, Default)]
struct State {
    /// Change time of the images directory at the last look.
    seen: Option<(i64, i64)>,
    images: BTreeMap<String, Arc<Record>>,
    /// By image id: how many leases this process holds, and the lock that tells others.
    leases: HashMap<String, (usize, OwnedFd)>,
    /// Layers a pull of this process counts on, by diff id.
    pins: HashMap<String, usize>,
    /// When an image was last used or stored, by this process.
    used: HashMap<String, Instant>,
}

/// What [`Store::commit`] needs.
#[derive(Debug)]
pub(crate) struct NewImage {
    pub(crate) id: String,
    pub(crate) tags: Vec<String>,
    pub(crate) digests: Vec<String>,
    pub(crate) config: String,
    /// Lowest first.
    pub(crate) diff_ids: Vec<String>,
}

/// Why a commit did not happen.
#[derive(Debug)]
pub(crate) enum CommitError {
    /// A layer counted on was removed by another process meanwhile: pull again.
    LayerGone(String),
    /// Anything else.
    Failed(ImageError),
}

impl From<ImageError> for CommitError {
    fn from(error: ImageError) -> Self {
        Self::Failed(error)
    }
}

impl Store {
    /// Opens the store, making it if need be, and removes what an earlier process left half done.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        let store = Self {
            images_dir: root.join("images"),
            layers_dir: root.join("layers"),
            boot_id: boot_id(),
            state: Mutex::default(),
        };
        for dir in [&store.images_dir, &store.layers_dir] {
            std::fs::create_dir_all(dir).map_err(ImageError::io("make", dir))?;
        }
        let rubbish = {
            let _lock = store.lock()?;
            store.drop_untrusted()?;
            store.reload()?;
            store.sweep()?
        };
        rubbish.iter().for_each(|(dir, _lock)| remove_dir(dir));
        Ok(store)
    }

    pub(crate) fn layers_dir(&self) -> &Path {
        &self.layers_dir
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The state is consistent between statements; a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lock among processes; released on drop.
    fn lock(&self) -> Result<OwnedFd> {
        let path = self.images_dir.join("lock");
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&path, flags, Mode::from_raw_mode(0o600))
            .map_err(|e| ImageError::io("open", &path)(e.into()))?;
        flock(&fd, FlockOperation::LockExclusive)
            .map_err(|e| ImageError::io("lock", &path)(e.into()))?;
        Ok(fd)
    }

    /// Removes records that do not parse, are of a newer format, or did not reach the disk
    /// before a reboot.
    fn drop_untrusted(&self) -> Result<()> {
        for path in self.files_ending(".json")? {
            let reason = match read_record(&path) {
                Ok(record) if record.durable || record.boot_id == self.boot_id => continue,
                Ok(_) => "it had not reached the disk when the machine stopped".to_owned(),
                Err(error) => crate::error::chain(&error),
            };
            tracing::warn!(record = %path.display(), reason, "dropping stored image");
            std::fs::remove_file(&path).map_err(ImageError::io("remove", &path))?;
        }
        for path in self.files_ending(".tmp")? {
            std::fs::remove_file(&path).map_err(ImageError::io("remove", &path))?;
        }
        Ok(())
    }

    fn files_ending(&self, ending: &str) -> Result<Vec<PathBuf>> {
        let failed = || ImageError::io("read", &self.images_dir);
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.images_dir).map_err(failed())? {
            let path = entry.map_err(failed())?.path();
            if path.to_string_lossy().ends_with(ending) {
                found.push(path);
            }
        }
        Ok(found)
    }

    /// Renames away layers that no image names and no container is made of: the record of its
    /// image may be lost, the container runs on. Returns them with dead partial directories, the
    /// latter locked until they are removed: their name may just be being taken by a new maker.
    fn sweep(&self) -> Result<Vec<(PathBuf, Option<OwnedFd>)>> {
        let mut used = self.state().layers_in_use();
        used.extend(self.layers_of_containers()?);
        let mut rubbish = Vec::new();
        let failed = || ImageError::io("read", &self.layers_dir);
        for entry in std::fs::read_dir(&self.layers_dir).map_err(failed())? {
            let entry = entry.map_err(failed())?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            if name.contains(PARTIAL) {
                if let Ok(lock) = try_lock_dir(&entry.path()) {
                    rubbish.push((entry.path(), Some(lock)));
                }
            } else if !used.contains(&name) {
                rubbish.push((self.discard(&name)?, None));
            }
        }
        Ok(rubbish)
    }

    fn layers_of_containers(&self) -> Result<BTreeSet<String>> {
        let root = self.layers_dir.parent().unwrap_or(&self.layers_dir);
        crate::container::store::layers_in_use(root).map_err(ImageError::io("read", root))
    }

    /// Takes a layer's name away; what remains is rubbish by its new name.
    fn discard(&self, layer: &str) -> Result<PathBuf> {
        let from = self.layers_dir.join(layer);
        let to = self.layers_dir.join(partial_name(layer));
        std::fs::rename(&from, &to).map_err(ImageError::io("remove", &from))?;
        Ok(to)
    }

    /// Reads all records. Unreadable ones are skipped: only `open` may drop them.
    fn reload(&self) -> Result<()> {
        let seen = self.stamp();
        let mut images = BTreeMap::new();
        for path in self.files_ending(".json")? {
            match read_record(&path) {
                Ok(record) => drop(images.insert(record.hex().to_owned(), Arc::new(record))),
                Err(error) => {
                    tracing::warn!(error = crate::error::chain(&error), "skipping image record");
                }
            }
        }
        let mut state = self.state();
        state.seen = seen;
        state.images = images;
        Ok(())
    }

    fn stamp(&self) -> Option<(i64, i64)> {
        let stat = rustix::fs::stat(&self.images_dir).ok()?;
        Some((
            stat.st_mtime,
            i64::try_from(stat.st_mtime_nsec).unwrap_or(0),
        ))
    }

    /// All images; another process's changes are seen by the directory's change time.
    pub(crate) fn images(&self) -> Vec<Arc<Record>> {
        let stale = { self.state().seen != self.stamp() };
        if stale && let Err(error) = self.reload() {
            tracing::warn!(
                error = crate::error::chain(&error),
                "cannot read image records"
            );
        }
        self.state().images.values().cloned().collect()
    }

    /// The image behind a name, digest, id or unique id prefix.
    ///
    /// # Errors
    /// [`ImageError::NotStored`], [`ImageError::Ambiguous`] for a prefix that fits several.
    pub(crate) fn find(&self, image: &str) -> Result<Arc<Record>> {
        let images = self.images();
        let not_stored = || ImageError::NotStored(image.to_owned());
        if let Some(hex) = reference::as_id(image) {
            return images
                .into_iter()
                .find(|r| r.hex() == hex)
                .ok_or_else(not_stored);
        }
        if let Ok(name) = reference::parse(image) {
            let found = match (reference::tag_name(&name), name.digest()) {
                (Some(tag), _) => images.iter().find(|r| r.tags.contains(&tag)),
                (None, Some(digest)) => {
                    let name = reference::digest_name(&name, digest);
                    images.iter().find(|r| r.digests.contains(&name))
                }
                (None, None) => None,
            };
            if let Some(found) = found {
                return Ok(Arc::clone(found));
            }
        }
        let prefix = reference::as_id_prefix(image).ok_or_else(not_stored)?;
        let mut fitting = images.into_iter().filter(|r| r.hex().starts_with(prefix));
        let first = fitting.next().ok_or_else(not_stored)?;
        match fitting.next() {
            Some(_) => Err(ImageError::Ambiguous(image.to_owned())),
            None => Ok(first),
        }
    }

    /// Keeps a layer from removal until [`Self::unpin`].
    pub(crate) fn pin(&self, diff_id: &str) {
        *self.state().pins.entry(diff_id.to_owned()).or_default() += 1;
    }

    /// Whether a complete layer is there.
    pub(crate) fn has_layer(&self, diff_id: &str) -> bool {
        let name = diff_id.trim_start_matches("sha256:");
        self.state().layers_in_use().contains(name) && self.layers_dir.join(name).is_dir()
    }

    /// Undoes one [`Self::pin`].
    pub(crate) fn unpin(&self, diff_id: &str) {
        let mut state = self.state();
        if let Some(count) = state.pins.get_mut(diff_id) {
            *count -= 1;
            if *count == 0 {
                state.pins.remove(diff_id);
            }
        }
    }

    /// Makes an image visible: its staged layers get their names, then its record is written.
    /// Names it takes over are taken from other images.
    pub(crate) fn commit(
        &self,
        new: NewImage,
        staged: &[Arc<StagedLayer>],
    ) -> std::result::Result<Arc<Record>, CommitError> {
        let _lock = self.lock()?;
        self.reload()?;
        for diff_id in &new.diff_ids {
            self.adopt_layer(diff_id, staged)?;
        }
        let mut record = self.merge(new)?;
        let extra = super::parents::ensure(&self.layers_dir, &record.diff_ids)?;
        record.overlay.extend(extra);
        self.take_names(&record)?;
        self.write(&record)?;
        self.reload()?;
        let record = Arc::new(record);
        self.state().used.insert(record.id.clone(), Instant::now());
        Ok(record)
    }

    fn adopt_layer(
        &self,
        diff_id: &str,
        staged: &[Arc<StagedLayer>],
    ) -> std::result::Result<(), CommitError> {
        let to = self.layers_dir.join(diff_id.trim_start_matches("sha256:"));
        if to.is_dir() {
            return Ok(());
        }
        let Some(layer) = staged.iter().find(|s| s.info.diff_id == diff_id) else {
            return Err(CommitError::LayerGone(diff_id.to_owned()));
        };
        std::fs::rename(&layer.dir, &to).map_err(ImageError::io("store layer", &to))?;
        layer.committed.store(true, Ordering::Release);
        Ok(())
    }

    fn merge(&self, new: NewImage) -> Result<Record> {
        let mut size_bytes = 0;
        for diff_id in new.diff_ids.iter().collect::<BTreeSet<_>>() {
            size_bytes += super::parents::read_info(&self.layers_dir, diff_id)?.size_bytes;
        }
        let hex = new.id.trim_start_matches("sha256:");
        let (mut tags, mut digests, pinned) = match self.state().images.get(hex) {
            Some(old) => (old.tags.clone(), old.digests.clone(), old.pinned),
            None => (Vec::new(), Vec::new(), false),
        };
        tags.extend(new.tags);
        digests.extend(new.digests);
        for names in [&mut tags, &mut digests] {
            let mut seen = BTreeSet::new();
            names.retain(|n| seen.insert(n.clone()));
        }
        let overlay = new
            .diff_ids
            .iter()
            .map(|d| d.trim_start_matches("sha256:").to_owned())
            .collect();
        Ok(Record {
            version: VERSION,
            id: new.id,
            tags,
            digests,
            config: new.config,
            diff_ids: new.diff_ids,
            overlay,
            size_bytes,
            stored_at_ns: now_ns(),
            pinned,
            boot_id: self.boot_id.clone(),
            durable: false,
        })
    }

    /// A tag names one image; the digest names stay, they cannot lie.
    fn take_names(&self, owner: &Record) -> Result<()> {
        let others: Vec<_> = self.state().images.values().cloned().collect();
        for other in others {
            if other.id != owner.id && other.tags.iter().any(|t| owner.tags.contains(t)) {
                let mut other = Record::clone(&other);
                other.tags.retain(|t| !owner.tags.contains(t));
                self.write(&other)?;
            }
        }
        Ok(())
    }

    fn write(&self, record: &Record) -> Result<()> {
        let path = self.images_dir.join(record.file_name());
        let temporary = path.with_extension("tmp");
        let json = serde_json::to_vec_pretty(record)
            .map_err(|e| ImageError::io("write", &path)(e.into()))?;
        let written = (|| {
            let mut file = std::fs::File::create(&temporary)?;
            file.write_all(&json)?;
            if record.durable {
                file.sync_all()?;
            }
            std::fs::rename(&temporary, &path)
        })();
        written.map_err(ImageError::io("write", &path))
    }

    /// One barrier for all layers of the image, then the record says so. Blocking, slow.
    pub(crate) fn make_durable(&self, id: &str) -> Result<()> {
        let layers = &self.layers_dir;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(layers, flags, Mode::empty())
            .and_then(rustix::fs::syncfs)
            .map_err(|e| ImageError::io("sync", layers)(e.into()))?;
        let _lock = self.lock()?;
        self.reload()?;
        let found = self
            .state()
            .images
            .get(id.trim_start_matches("sha256:"))
            .cloned();
        if let Some(record) = found
            && !record.durable
        {
            self.write(&Record {
                durable: true,
                ..Record::clone(&record)
            })?;
            self.reload()?;
        }
        Ok(())
    }

    /// Removes a name; with the last name, or by id, the image.
    ///
    /// # Errors
    /// [`ImageError::InUse`] when the image itself had to go and someone uses it.
    pub(crate) fn remove(&self, image: &str) -> Result<()> {
        let rubbish = {
            let _lock = self.lock()?;
            self.reload()?;
            let record = match self.find(image) {
                Ok(record) => record,
                Err(ImageError::NotStored(_)) => return Ok(()),
                Err(error) => return Err(error),
            };
            let name = reference::parse(image).ok();
            let tag = name.as_ref().and_then(reference::tag_name);
            let mut rest = Record::clone(&record);
            rest.tags.retain(|t| Some(t) != tag.as_ref());
            if rest.tags.len() < record.tags.len() && !rest.tags.is_empty() {
                self.write(&rest)?;
                Vec::new()
            } else {
                self.remove_record(&record)?
            }
        };
        self.reload()?;
        rubbish.iter().for_each(|dir| remove_dir(dir));
        Ok(())
    }

    /// Under the lock. Returns directories to delete after it.
    fn remove_record(&self, record: &Record) -> Result<Vec<PathBuf>> {
        if self.in_use(&record.id) {
            return Err(ImageError::InUse(record.id.clone()));
        }
        let of_containers = self.layers_of_containers()?;
        let path = self.images_dir.join(record.file_name());
        std::fs::remove_file(&path).map_err(ImageError::io("remove", &path))?;
        let _ = std::fs::remove_file(path.with_extension("lease"));
        let keep = {
            let mut state = self.state();
            state.images.remove(record.hex());
            let mut keep = state.layers_in_use();
            drop(state);
            keep.extend(of_containers);
            keep
        };
        let mut rubbish = Vec::new();
        for layer in record.overlay.iter().collect::<BTreeSet<_>>() {
            let pinned = self.state().pins.contains_key(&format!("sha256:{layer}"));
            if !keep.contains(layer) && !pinned && self.layers_dir.join(layer).is_dir() {
                rubbish.push(self.discard(layer)?);
            }
        }
        Ok(rubbish)
    }

    fn lease_path(&self, id: &str) -> PathBuf {
        self.images_dir
            .join(format!("{}.lease", id.trim_start_matches("sha256:")))
    }

    /// Whether this or another process holds a lease.
    pub(crate) fn in_use(&self, id: &str) -> bool {
        if self.state().leases.contains_key(id) {
            return true;
        }
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::open(self.lease_path(id), flags, Mode::empty()) {
            Ok(fd) => flock(&fd, FlockOperation::NonBlockingLockExclusive).is_err(),
            Err(_) => false,
        }
    }

    /// Takes a lease; the image stays until [`Self::release`].
    pub(crate) fn acquire(&self, image: &str) -> Result<Arc<Record>> {
        let _lock = self.lock()?;
        let record = self.find(image)?;
        let mut state = self.state();
        state.used.insert(record.id.clone(), Instant::now());
        if let Some((count, _)) = state.leases.get_mut(&record.id) {
            *count += 1;
            return Ok(record);
        }
        let path = self.lease_path(&record.id);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&path, flags, Mode::from_raw_mode(0o600))
            .and_then(|fd| flock(&fd, FlockOperation::LockShared).map(|()| fd))
            .map_err(|e| ImageError::io("lock", &path)(e.into()))?;
        state.leases.insert(record.id.clone(), (1, fd));
        Ok(record)
    }

    pub(crate) fn release(&self, id: &str) {
        let mut state = self.state();
        state.used.insert(id.to_owned(), Instant::now());
        if let Some((count, _)) = state.leases.get_mut(id) {
            *count -= 1;
            if *count == 0 {
                state.leases.remove(id);
            }
        }
    }

    /// Bytes of file content in all stored layers, each counted once.
    pub(crate) fn used_bytes(&self) -> u64 {
        let images = self.images();
        let diff_ids: BTreeSet<&String> = images.iter().flat_map(|r| &r.diff_ids).collect();
        let size = |d| super::parents::read_info(&self.layers_dir, d).map_or(0, |i| i.size_bytes);
        diff_ids.into_iter().map(|d| size(d.as_str())).sum()
    }

    /// Directories of an image for overlayfs, topmost first.
    pub(crate) fn lower_dirs(&self, record: &Record) -> Vec<PathBuf> {
        record
            .overlay
            .iter()
            .rev()
            .map(|l| self.layers_dir.join(l).join("fs"))
            .collect()
    }
}

impl State {
    /// Directory names of layers that records name.
    fn layers_in_use(&self) -> BTreeSet<String> {
        self.images
            .values()
            .flat_map(|r| r.overlay.iter().cloned())
            .collect()
    }
}

fn read_record(path: &Path) -> Result<Record> {
    let text = std::fs::read(path).map_err(ImageError::io("read", path))?;
    let record: Record =
        serde_json::from_slice(&text).map_err(|e| ImageError::io("parse", path)(e.into()))?;
    let named = path.file_stem().is_some_and(|s| *s == *record.hex());
    // Names of directories come from here: nothing but what we write is taken.
    let plain = |l: &String| !l.is_empty() && l.bytes().all(|b| b.is_ascii_alphanumeric());
    if record.version != VERSION || !named || !record.overlay.iter().all(plain) {
        let what = std::io::Error::other("not a record this version can read");
        return Err(ImageError::io("use", path)(what));
    }
    Ok(record)
}

fn boot_id() -> String {
    // Without /proc nothing is trusted across processes, which is right.
    let unknown = || format!("unknown-{}", now_ns());
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_or_else(|_| unknown(), |id| id.trim().to_owned())
}

fn now_ns() -> i64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
