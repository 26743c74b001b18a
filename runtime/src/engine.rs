//! The engine: all sandboxes and containers of the node, in memory as on disk.
//!
//! Every operation runs on a task of its own, so a caller that gives up leaves no half-done
//! work behind; a repeated call joins or repeats harmlessly. One lock per sandbox orders its
//! making and its end; one per container likewise (sandbox first, then container). What is read
//! by `list` and `status` is behind short locks that are never held over a wait.
//!
//! On disk nothing is synced: a record must survive the death of this process, and after power
//! loss no process of it is left to be remembered. Channels: events (broadcast, bounded), one
//! watch per container. Tasks: one reader per shim connection, one watcher per shim process.

use crate::config::EngineConfig;
use crate::container::state::{ContainerRecord, Exit};
use crate::error::{error, no_container, no_sandbox, system};
use crate::events::Events;
use crate::image::{ImageLease, ImageStore};
use crate::network::Network;
use crate::sandbox::state::SandboxRecord;
use crate::service::{
    CgroupStats, ContainerId, FsUsage, ImageService, ImageStatus, Pulled, RegistryAuth, Resources,
    Result, RuntimeErrorKind, SandboxId,
};
use crate::shim_client::ShimClient;
use linux::cgroup::{Cgroups, Limits, Stats};
use linux::process::spawn::SealedProgram;
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::{oneshot, watch};

const LOCK_RETRY: std::time::Duration = std::time::Duration::from_millis(50);
/// How long an engine that is ending may keep its directories.
const LOCK_LIMIT: std::time::Duration = std::time::Duration::from_secs(10);

/// The engine. Clones share it.
#[derive(Debug, Clone)]
pub struct Engine {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) config: EngineConfig,
    pub(crate) cgroups: Box<dyn Cgroups>,
    pub(crate) images: ImageStore,
    pub(crate) network: Network,
    pub(crate) events: Events,
    pub(crate) boot_id: String,
    /// Capabilities this process has itself, as bits.
    pub(crate) capabilities: u64,
    shim_program: Mutex<Option<Arc<SealedProgram>>>,
    sandboxes: Mutex<BTreeMap<SandboxId, Arc<Sandbox>>>,
    containers: Mutex<BTreeMap<ContainerId, Arc<Container>>>,
    seccomp: Mutex<HashMap<(String, Vec<u8>), String>>,
    observer: Observer,
    /// Keeps other engines off our directories.
    _lock: std::fs::File,
}

/// Who is told about every operation: its CRI name, how long it took, whether it succeeded.
type Observe = dyn Fn(&'static str, std::time::Duration, bool) + Send + Sync;

/// The one observer, when there is one.
#[derive(Default)]
struct Observer(std::sync::OnceLock<Box<Observe>>);

impl std::fmt::Debug for Observer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Observer")
    }
}

/// A sandbox in memory.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub(crate) id: SandboxId,
    record: Mutex<SandboxRecord>,
    /// Held by whoever changes its life.
    pub(crate) turn: tokio::sync::Mutex<()>,
    shim: Mutex<Option<ShimClient>>,
    /// Exec sessions in flight and who waits for them.
    pub(crate) execs: Mutex<HashMap<String, oneshot::Sender<i32>>>,
}

/// A container in memory.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: ContainerId,
    pub(crate) sandbox: Arc<Sandbox>,
    record: Mutex<ContainerRecord>,
    /// Held by whoever changes its life.
    pub(crate) turn: tokio::sync::Mutex<()>,
    /// Counts changes of the record.
    pub(crate) changed: watch::Sender<u64>,
    /// When SIGKILL comes; only ever moves closer.
    pub(crate) deadline: watch::Sender<Option<tokio::time::Instant>>,
    /// Keeps its images while the container is there.
    pub(crate) _leases: Vec<ImageLease>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sandbox {
    pub(crate) fn new(record: SandboxRecord) -> Arc<Self> {
        Arc::new(Self {
            id: record.id.clone(),
            record: Mutex::new(record),
            turn: tokio::sync::Mutex::new(()),
            shim: Mutex::new(None),
            execs: Mutex::default(),
        })
    }

    pub(crate) fn record(&self) -> SandboxRecord {
        lock(&self.record).clone()
    }

    pub(crate) fn with<T>(&self, read: impl FnOnce(&SandboxRecord) -> T) -> T {
        read(&lock(&self.record))
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut SandboxRecord)) -> SandboxRecord {
        let mut record = lock(&self.record);
        change(&mut record);
        record.clone()
    }

    pub(crate) fn set_shim(&self, client: Option<ShimClient>) {
        *lock(&self.shim) = client;
    }

    /// The connection to its shim.
    pub(crate) fn shim(&self) -> Result<ShimClient> {
        let shim = lock(&self.shim).clone();
        shim.filter(ShimClient::is_alive).ok_or_else(|| {
            let message = format!("sandbox {} has no live shim", self.id);
            error(RuntimeErrorKind::Conflict, message)
        })
    }

    pub(crate) fn shim_alive(&self) -> bool {
        lock(&self.shim).as_ref().is_some_and(ShimClient::is_alive)
    }

    pub(crate) fn pod_uid(&self) -> String {
        self.with(|r| r.config.uid.clone())
    }
}

impl Container {
    pub(crate) fn new(
        record: ContainerRecord,
        sandbox: Arc<Sandbox>,
        leases: Vec<ImageLease>,
    ) -> Arc<Self> {
        Arc::new(Self {
            id: record.id.clone(),
            sandbox,
            record: Mutex::new(record),
            turn: tokio::sync::Mutex::new(()),
            changed: watch::Sender::new(0),
            deadline: watch::Sender::new(None),
            _leases: leases,
        })
    }

    pub(crate) fn record(&self) -> ContainerRecord {
        lock(&self.record).clone()
    }

    pub(crate) fn with<T>(&self, read: impl FnOnce(&ContainerRecord) -> T) -> T {
        read(&lock(&self.record))
    }

    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut ContainerRecord) -> T) -> T {
        let outcome = change(&mut lock(&self.record));
        self.changed.send_modify(|count| *count += 1);
        outcome
    }

    /// How it ended, once it has.
    pub(crate) fn exit(&self) -> Option<Exit> {
        use crate::container::state::Phase;
        self.with(|r| match &r.phase {
            Phase::Exited(exit) | Phase::Removing(Some(exit)) => Some(exit.clone()),
            Phase::Creating | Phase::Created | Phase::Running { .. } | Phase::Removing(None) => {
                None
            }
        })
    }
}

impl Engine {
    /// Opens the engine: reads its records, adopts what still runs, finishes what was half
    /// done. Needs to be called inside a tokio runtime.
    ///
    /// # Errors
    /// Class `System` when directories, cgroups or the image store cannot be had.
    pub async fn open(config: EngineConfig) -> Result<Self> {
        let lock = take_lock(&config).await?;
        let for_blocking = config.clone();
        let (cgroups, images, boot_id) = blocking(move || prepare(&for_blocking)).await?;
        let network = Network::new(
            config.cni_conf_dir.clone(),
            config.cni_bin_dirs.clone(),
            config.network_records(),
        );
        let inner = Arc::new(Inner {
            cgroups,
            images,
            network,
            events: Events::default(),
            boot_id,
            capabilities: linux::caps::permitted().map_err(|e| system(&e))?,
            shim_program: Mutex::new(None),
            sandboxes: Mutex::default(),
            containers: Mutex::default(),
            seccomp: Mutex::default(),
            observer: Observer::default(),
            _lock: lock,
            config,
        });
        crate::recover::recover(&inner).await?;
        Ok(Self { inner })
    }

    /// What is there and is not ours or not known: for the leak audit and for people. Blocking.
    #[must_use]
    pub fn audit(&self) -> Vec<String> {
        crate::recover::audit(&self.inner)
    }

    /// The image store, for the command line and image volumes.
    #[must_use]
    pub fn images(&self) -> &ImageStore {
        &self.inner.images
    }

    /// Has every operation from now on told to `observe`. Only the first observer counts.
    pub fn observe(
        &self,
        observe: impl Fn(&'static str, std::time::Duration, bool) + Send + Sync + 'static,
    ) {
        let _ = self.inner.observer.0.set(Box::new(observe));
    }

    /// Tells the observer about one operation.
    pub(crate) async fn observed<T>(
        &self,
        operation: &'static str,
        work: impl Future<Output = Result<T>> + Send,
    ) -> Result<T> {
        let began = std::time::Instant::now();
        let result = work.await;
        if let Some(observe) = self.inner.observer.0.get() {
            observe(operation, began.elapsed(), result.is_ok());
        }
        result
    }

    /// Runs an operation to its end even when the caller goes away.
    pub(crate) async fn run<T, F, W>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        W: Future<Output = Result<T>> + Send + 'static,
        F: FnOnce(Arc<Inner>) -> W,
    {
        let task = tokio::spawn(work(Arc::clone(&self.inner)));
        task.await.map_err(|e| system(&e))?
    }
}

/// Two engines on the same directories would remove each other's things. One that is just
/// ending is waited for.
async fn take_lock(config: &EngineConfig) -> Result<std::fs::File> {
    linux::fs::create_dirs(&config.root, 0o711)?;
    let path = config.root.join("engine.lock");
    let file = std::fs::File::create(&path).map_err(|e| system(&e))?;
    let limit = tokio::time::Instant::now() + LOCK_LIMIT;
    let mut told = false;
    // Asked again and again: a thread that waits for a lock could not be ended.
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(std::fs::TryLockError::Error(e)) => return Err(system(&e)),
            Err(std::fs::TryLockError::WouldBlock) => {}
        }
        if tokio::time::Instant::now() >= limit {
            let message = format!(
                "{} is held by another agent: stop it, or give this one a runtime root of its own",
                path.display()
            );
            return Err(error(RuntimeErrorKind::Conflict, message));
        }
        if !told {
            let (lock, limit_s) = (path.display(), LOCK_LIMIT.as_secs());
            tracing::warn!(%lock, limit_s, "another agent holds the state, waiting for its end");
            told = true;
        }
        tokio::time::sleep(LOCK_RETRY).await;
    }
}

type Prepared = (Box<dyn Cgroups>, ImageStore, String);

fn prepare(config: &EngineConfig) -> Result<Prepared> {
    let private = [
        config.root.clone(),
        config.run_dir.clone(),
        config.sandboxes(),
        config.containers(),
        config.volumes(),
        config.sockets(),
        config.pins(),
        config.network_records(),
    ];
    for dir in private {
        linux::fs::create_dirs(&dir, 0o711)?;
    }
    let shared = config.shared_memory();
    linux::fs::create_dirs(&shared, 0o711)?;
    let cgroups = linux::cgroup::detect(&config.cgroup_root)?;
    let images = ImageStore::open(&config.root, config.registries.clone())?;
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let boot_id = boot_id.map_err(|e| system(&e))?.trim().to_owned();
    Ok((cgroups, images, boot_id))
}

/// Runs blocking work off the async threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let outcome = tokio::task::spawn_blocking(work).await;
    outcome.map_err(|e| system(&e))?
}

/// Nanoseconds since the epoch.
pub(crate) fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    i64::try_from(since.unwrap_or_default().as_nanos()).unwrap_or(i64::MAX)
}

/// A new random id of 64 hex digits.
pub(crate) fn new_id() -> Result<String> {
    let mut bytes = [0u8; 32];
    let source = std::fs::File::open("/dev/urandom");
    let read = source.and_then(|mut file| std::io::Read::read_exact(&mut file, &mut bytes));
    read.map_err(|e| system(&e))?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

impl Inner {
    pub(crate) fn sandboxes(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Arc<Sandbox>>> {
        lock(&self.sandboxes)
    }

    pub(crate) fn containers(&self) -> MutexGuard<'_, BTreeMap<ContainerId, Arc<Container>>> {
        lock(&self.containers)
    }

    pub(crate) fn sandbox(&self, id: &SandboxId) -> Result<Arc<Sandbox>> {
        let found = self.sandboxes().get(id).cloned();
        found.ok_or_else(|| no_sandbox(id))
    }

    pub(crate) fn container(&self, id: &ContainerId) -> Result<Arc<Container>> {
        let found = self.containers().get(id).cloned();
        found.ok_or_else(|| no_container(id))
    }

    pub(crate) fn containers_of(&self, sandbox: &SandboxId) -> Vec<Arc<Container>> {
        let all = self.containers();
        let of_it = all.values().filter(|c| c.sandbox.id == *sandbox);
        of_it.cloned().collect()
    }

    /// The shim's program in sealed memory, taken over from a live shim when one runs it.
    pub(crate) fn shim_program(&self, live: Option<i32>) -> Result<Arc<SealedProgram>> {
        let mut kept = lock(&self.shim_program);
        if let Some(program) = kept.as_ref() {
            return Ok(Arc::clone(program));
        }
        let path = &self.config.shim_path;
        let adopted = live.and_then(|pid| SealedProgram::from_live(pid, path).ok().flatten());
        let program = match adopted {
            Some(program) => program,
            None => SealedProgram::from_file(path).map_err(|e| {
                let message = format!("load shim program {}: {e}", path.display());
                error(RuntimeErrorKind::System, message)
            })?,
        };
        let program = Arc::new(program);
        *kept = Some(Arc::clone(&program));
        Ok(program)
    }

    /// A compiled seccomp program, base64; compiled once per profile and capability set.
    pub(crate) fn seccomp(
        &self,
        profile: &crate::service::SeccompProfile,
        capabilities: &[u8],
    ) -> Result<Option<String>> {
        use crate::service::SeccompProfile;
        use base64::Engine as _;
        let content = match profile {
            SeccompProfile::Unconfined => return Ok(None),
            SeccompProfile::RuntimeDefault => String::new(),
            SeccompProfile::Localhost(path) => {
                let bytes = linux::fs::read_file(path, 4 << 20).map_err(|e| {
                    let message = format!("seccomp profile: {}", crate::error::chain(&e));
                    error(RuntimeErrorKind::Invalid, message)
                })?;
                String::from_utf8_lossy(&bytes).into_owned()
            }
        };
        let key = (content, capabilities.to_vec());
        if let Some(program) = lock(&self.seccomp).get(&key) {
            return Ok(Some(program.clone()));
        }
        let compiled = if key.0.is_empty() {
            linux::seccomp::default_profile_program(capabilities)
        } else {
            linux::seccomp::compile_json(key.0.as_bytes(), capabilities)
        };
        let compiled = compiled.map_err(|e| {
            let message = format!("seccomp profile: {}", crate::error::chain(&e));
            error(RuntimeErrorKind::Invalid, message)
        })?;
        let program = base64::engine::general_purpose::STANDARD.encode(compiled.to_bytes());
        let mut cache = lock(&self.seccomp);
        // Profiles are few; a flood of them is somebody's test.
        if cache.len() >= 256 {
            cache.clear();
        }
        cache.insert(key, program.clone());
        Ok(Some(program))
    }
}

/// Limits as the cgroup code wants them.
pub(crate) fn limits(resources: &Resources) -> Limits {
    Limits {
        cpu_shares: resources.cpu_shares,
        cpu_quota_us: resources.cpu_quota_us,
        cpu_period_us: resources.cpu_period_us,
        memory_bytes: resources.memory_limit_bytes,
        pids: resources.pids_limit,
        cpuset_cpus: resources.cpuset_cpus.clone(),
        cpuset_mems: resources.cpuset_mems.clone(),
        hugepages: resources.hugepage_limits.clone(),
        unified: resources.unified.clone(),
    }
}

/// Usage as callers want it, read now.
impl From<&Stats> for CgroupStats {
    fn from(stats: &Stats) -> Self {
        let inactive = stats.memory_inactive_file;
        Self {
            time_ns: now_ns(),
            cpu_usage_ns: stats.cpu_usage_ns,
            memory_usage_bytes: stats.memory_usage,
            memory_working_set_bytes: stats.memory_usage.saturating_sub(inactive),
            memory_rss_bytes: stats.memory_anon,
            page_faults: stats.page_faults,
            major_page_faults: stats.major_page_faults,
            memory_limit_bytes: stats.memory_limit,
            memory_inactive_file_bytes: inactive,
            pids: stats.pids,
            swap_usage_bytes: stats.swap_usage,
            swap_limit_bytes: stats.swap_limit,
            pressure: stats.pressure,
        }
    }
}

impl ImageService for Engine {
    fn status(&self, image: &str) -> Option<ImageStatus> {
        self.inner.images.status(image)
    }

    fn list(&self) -> Vec<ImageStatus> {
        self.inner.images.list()
    }

    async fn pull(&self, image: &str, auth: &[RegistryAuth]) -> Result<Pulled> {
        self.observed(
            "pull_image",
            ImageService::pull(&self.inner.images, image, auth),
        )
        .await
    }

    async fn remove(&self, image: &str) -> Result<()> {
        self.observed(
            "remove_image",
            ImageService::remove(&self.inner.images, image),
        )
        .await
    }

    fn fs_usage(&self) -> FsUsage {
        self.inner.images.fs_usage()
    }
}
