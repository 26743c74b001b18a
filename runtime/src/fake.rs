//! An engine in memory, for tests of what calls one.
//!
//! It keeps the contract of [`crate::service`] (ids, states, events, idempotency) but runs
//! nothing: containers exit when the test says so, operations fail when the test scripted it.
//! No task, no clock beyond stamps that only grow, no file.

mod serve;

use crate::service::{
    CgroupStats, ContainerConfig, ContainerId, ContainerState, ContainerStatus, ExecOutput,
    ExecRequest, FsUsage, ImageConfig, ImageId, ImageService, ImageStatus, NamespaceMode,
    RegistryAuth, Resources, Result, RuntimeError, RuntimeErrorKind, RuntimeEvent,
    RuntimeEventKind, RuntimeService, SandboxConfig, SandboxId, SandboxState, SandboxStatus,
    StreamSession,
};
use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, broadcast};

/// Operations that can be made to fail, and that are noted in [`FakeRuntime::calls`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// [`RuntimeService::run_sandbox`].
    RunSandbox,
    /// [`RuntimeService::stop_sandbox`].
    StopSandbox,
    /// [`RuntimeService::remove_sandbox`].
    RemoveSandbox,
    /// [`RuntimeService::create_container`].
    CreateContainer,
    /// [`RuntimeService::start_container`].
    StartContainer,
    /// [`RuntimeService::stop_container`].
    StopContainer,
    /// [`RuntimeService::remove_container`].
    RemoveContainer,
    /// [`RuntimeService::update_resources`].
    UpdateResources,
    /// [`RuntimeService::exec_sync`].
    ExecSync,
    /// [`RuntimeService::ensure_cgroup`].
    EnsureCgroup,
    /// [`RuntimeService::remove_cgroup`].
    RemoveCgroup,
    /// [`ImageService::pull`].
    Pull,
    /// [`ImageService::remove`].
    RemoveImage,
}

/// One noted call: the operation and its object (pod or container name, cgroup, image).
pub type Call = (Operation, String);

/// How a scripted container behaves on a stop signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnStop {
    /// Ends at once with this code.
    #[default]
    ExitsWith0,
    /// Ignores the signal: killed at once (137) whatever the grace, as no time passes here.
    Ignores,
    /// `stop_container` waits until the test calls [`FakeRuntime::exit`].
    Hangs,
}

#[derive(Debug, Default)]
struct State {
    sandboxes: BTreeMap<SandboxId, SandboxStatus>,
    containers: BTreeMap<ContainerId, ContainerStatus>,
    images: BTreeMap<ImageId, ImageStatus>,
    registry: BTreeMap<String, ImageStatus>,
    cgroups: BTreeMap<String, Resources>,
    stats: BTreeMap<String, CgroupStats>,
    failures: BTreeMap<Operation, VecDeque<RuntimeError>>,
    exec_results: BTreeMap<String, VecDeque<Result<ExecOutput>>>,
    exit_on_start: BTreeMap<String, VecDeque<i32>>,
    on_stop: BTreeMap<String, OnStop>,
    calls: Vec<Call>,
    network: Option<String>,
    /// Bytes of the image filesystem: capacity, and what others than images use.
    disk: (u64, u64),
    next: u64,
    /// Time at an instant, nanoseconds since the epoch; none for a clock that only counts.
    clock: Option<(i64, tokio::time::Instant)>,
    last_ns: i64,
    pause: Duration,
}

/// The engine in memory; clones share one state.
#[derive(Debug, Clone)]
pub struct FakeRuntime {
    state: Arc<Mutex<State>>,
    events: broadcast::Sender<RuntimeEvent>,
    changed: Arc<Notify>,
}

impl Default for FakeRuntime {
    fn default() -> Self {
        Self {
            state: Arc::default(),
            events: broadcast::channel(1024).0,
            changed: Arc::default(),
        }
    }
}

/// A [`RuntimeError`] for scripts.
#[must_use]
pub fn error(kind: RuntimeErrorKind, message: &str) -> RuntimeError {
    RuntimeError {
        kind,
        message: message.to_owned(),
    }
}

impl FakeRuntime {
    /// An engine without images.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next call of `operation` fails with `error`; several queue up.
    pub fn fail_next(&self, operation: Operation, error: RuntimeError) {
        let mut state = self.lock();
        state
            .failures
            .entry(operation)
            .or_default()
            .push_back(error);
    }

    /// Puts an image in the registry, so that a pull finds it (it is not stored yet).
    pub fn publish(&self, image: &str, config: ImageConfig) -> ImageStatus {
        let mut state = self.lock();
        let status = image_named(image, state.registry.len(), config);
        state.registry.insert(image.to_owned(), status.clone());
        status
    }

    /// Stores an image as if it had been pulled.
    pub fn preload(&self, image: &str, config: ImageConfig) -> ImageStatus {
        let status = self.publish(image, config);
        let mut state = self.lock();
        state.images.insert(status.id.clone(), status.clone());
        status
    }

    /// Times follow tokio's clock (which tests can stop), from now as `epoch_ns` on.
    pub fn follow_clock(&self, epoch_ns: i64) {
        self.lock().clock = Some((epoch_ns, tokio::time::Instant::now()));
    }

    /// From now on operations on sandboxes and containers take this long, so that a caller can
    /// be interrupted between any two of them.
    pub fn take_time(&self, pause: Duration) {
        self.lock().pause = pause;
    }

    async fn pass_time(&self) {
        let pause = self.lock().pause;
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
    }

    /// The next start of a container of that name ends at once with `code` (after a `Started`
    /// event).
    pub fn exit_on_start(&self, container_name: &str, code: i32) {
        let mut state = self.lock();
        let codes = state.exit_on_start.entry(container_name.to_owned());
        codes.or_default().push_back(code);
    }

    /// How containers of that name take a stop.
    pub fn on_stop(&self, container_name: &str, behaviour: OnStop) {
        let mut state = self.lock();
        state.on_stop.insert(container_name.to_owned(), behaviour);
    }

    /// What the next `exec_sync` in a container of that name gives; the last one given stays.
    pub fn exec_result(&self, container_name: &str, result: Result<ExecOutput>) {
        let mut state = self.lock();
        let queue = state.exec_results.entry(container_name.to_owned());
        queue.or_default().push_back(result);
    }

    /// Statistics for a cgroup path or container id.
    pub fn set_stats(&self, path: &str, stats: CgroupStats) {
        self.lock().stats.insert(path.to_owned(), stats);
    }

    /// Makes `network_ready` fail with a message, or succeed.
    pub fn set_network(&self, failure: Option<&str>) {
        self.lock().network = failure.map(str::to_owned);
    }

    /// Size of the image filesystem, and bytes of it that are not images.
    pub fn set_disk(&self, capacity_bytes: u64, foreign_bytes: u64) {
        self.lock().disk = (capacity_bytes, foreign_bytes);
    }

    /// Everything called so far, in order.
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        self.lock().calls.clone()
    }

    /// Limits of a cgroup as ensured; none when it does not exist.
    #[must_use]
    pub fn cgroup(&self, path: &str) -> Option<Resources> {
        self.lock().cgroups.get(path).cloned()
    }

    /// The newest container of that name in a pod, by pod UID.
    #[must_use]
    pub fn find(&self, pod_uid: &str, name: &str) -> Option<ContainerStatus> {
        let state = self.lock();
        state
            .containers
            .values()
            .filter(|c| c.config.name == name)
            .filter(|c| {
                let sandbox = state.sandboxes.get(&c.sandbox_id);
                sandbox.is_some_and(|s| s.config.uid == pod_uid)
            })
            .max_by_key(|c| c.created_at_ns)
            .cloned()
    }

    /// Ends a running container.
    pub fn exit(&self, id: &ContainerId, code: i32) {
        let reason = if code == 0 { "Completed" } else { "Error" };
        self.end(id, code, None, reason);
    }

    /// Ends a running container by the kernel's memory killer.
    pub fn oom_kill(&self, id: &ContainerId) {
        self.end(id, 137, Some(9), "OOMKilled");
    }

    /// Takes a sandbox's shim away: not ready, its containers lost.
    pub fn kill_shim(&self, id: &SandboxId) {
        let lost: Vec<ContainerId> = {
            let mut state = self.lock();
            if let Some(sandbox) = state.sandboxes.get_mut(id) {
                sandbox.state = SandboxState::NotReady;
                sandbox.shim_pid = 0;
            }
            let of_it = state.containers.values().filter(|c| c.sandbox_id == *id);
            of_it.map(|c| c.id.clone()).collect()
        };
        for container in lost {
            self.end(&container, 137, None, "ContainerStatusUnknown");
        }
        self.tell(id, None, RuntimeEventKind::SandboxGone);
    }

    fn end(&self, id: &ContainerId, exit_code: i32, signal: Option<i32>, reason: &str) {
        let sandbox = {
            let mut state = self.lock();
            let finished_at_ns = state.tick();
            let Some(container) = state.containers.get_mut(id) else {
                return;
            };
            let ContainerState::Running { started_at_ns, .. } = container.state else {
                return;
            };
            container.state = ContainerState::Exited {
                started_at_ns,
                finished_at_ns,
                exit_code,
                signal,
                reason: reason.to_owned(),
                message: String::new(),
            };
            container.sandbox_id.clone()
        };
        self.changed.notify_waiters();
        self.tell(&sandbox, Some(id), RuntimeEventKind::Exited);
    }

    fn tell(&self, sandbox: &SandboxId, id: Option<&ContainerId>, kind: RuntimeEventKind) {
        let known = self.lock().sandboxes.get(sandbox).cloned();
        let pod_uid = known.map(|s| s.config.uid).unwrap_or_default();
        // Nobody listening is fine.
        let _ = self.events.send(RuntimeEvent::Changed {
            pod_uid,
            sandbox: sandbox.clone(),
            container: id.cloned(),
            kind,
        });
    }

    fn begin(&self, operation: Operation, object: &str) -> Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        state.calls.push((operation, object.to_owned()));
        let scripted = state.failures.get_mut(&operation);
        match scripted.and_then(VecDeque::pop_front) {
            Some(error) => Err(error),
            None => Ok(state),
        }
    }
}

impl State {
    fn tick(&mut self) -> i64 {
        self.next += 1;
        if let Some((epoch_ns, since)) = self.clock {
            let passed = i64::try_from(since.elapsed().as_nanos()).unwrap_or(i64::MAX);
            // No two things happen at the same time.
            self.last_ns = (self.last_ns + 1).max(epoch_ns.saturating_add(passed));
            return self.last_ns;
        }
        1_700_000_000_000_000_000 + i64::try_from(self.next).unwrap_or(0) * 1_000_000
    }

    fn container_name(&self, id: &ContainerId) -> String {
        let known = self.containers.get(id);
        known.map_or_else(|| id.0.clone(), |c| c.config.name.clone())
    }

    fn image(&self, name: &str) -> Option<&ImageStatus> {
        self.images.values().find(|image| {
            image.id.0 == name
                || image.repo_tags.iter().any(|t| t == name)
                || image.repo_digests.iter().any(|d| d == name)
        })
    }
}

fn image_named(image: &str, number: usize, config: ImageConfig) -> ImageStatus {
    let repository = image.split('@').next().unwrap_or(image);
    let digest = format!("sha256:{:064x}", number + 1);
    ImageStatus {
        id: ImageId(format!("sha256:{:064x}", (number + 1) << 16)),
        repo_tags: vec![image.to_owned()],
        repo_digests: vec![format!("{repository}@{digest}")],
        size_bytes: 1 << 20,
        pinned: false,
        user: config.user.clone(),
        config,
    }
}

fn no_container(id: &ContainerId) -> RuntimeError {
    error(RuntimeErrorKind::NotFound, &format!("no container {id}"))
}

#[cfg(test)]
mod tests;
