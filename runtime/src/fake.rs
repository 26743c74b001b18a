//! An engine in memory, for tests of what calls one.
//!
//! It keeps the contract of [`crate::service`] (ids, states, events, idempotency) but runs
//! nothing: containers exit when the test says so, operations fail when the test scripted it.
//! No task, no clock beyond stamps that only grow, no file.

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

impl RuntimeService for FakeRuntime {
    async fn run_sandbox(&self, config: SandboxConfig) -> Result<SandboxStatus> {
        self.pass_time().await;
        let status = {
            let mut state = self.begin(Operation::RunSandbox, &config.name)?;
            let created_at_ns = state.tick();
            let number = state.next;
            let address = Ipv4Addr::from(0x0af4_0000 + u32::try_from(number % 65536).unwrap_or(1));
            let ips = match config.network {
                NamespaceMode::Pod => vec![IpAddr::V4(address)],
                NamespaceMode::Node | NamespaceMode::Container | NamespaceMode::Target(_) => {
                    Vec::new()
                }
            };
            let status = SandboxStatus {
                id: SandboxId(format!("{number:064x}")),
                config,
                state: SandboxState::Ready,
                created_at_ns,
                ips,
                shim_pid: 1000 + i32::try_from(number % 30000).unwrap_or(0),
                netns: None,
            };
            state.sandboxes.insert(status.id.clone(), status.clone());
            status
        };
        self.tell(&status.id, None, RuntimeEventKind::SandboxReady);
        Ok(status)
    }

    async fn stop_sandbox(&self, id: &SandboxId) -> Result<()> {
        self.pass_time().await;
        let running: Vec<ContainerId> = {
            let mut state = self.begin(Operation::StopSandbox, id.as_str())?;
            let Some(sandbox) = state.sandboxes.get_mut(id) else {
                return Ok(());
            };
            sandbox.state = SandboxState::NotReady;
            let of_it = state.containers.values().filter(|c| c.sandbox_id == *id);
            of_it.map(|c| c.id.clone()).collect()
        };
        for container in running {
            self.end(&container, 137, Some(9), "Error");
        }
        self.tell(id, None, RuntimeEventKind::SandboxGone);
        Ok(())
    }

    async fn remove_sandbox(&self, id: &SandboxId) -> Result<()> {
        self.pass_time().await;
        let mut state = self.begin(Operation::RemoveSandbox, id.as_str())?;
        state.containers.retain(|_, c| c.sandbox_id != *id);
        state.sandboxes.remove(id);
        Ok(())
    }

    fn list_sandboxes(&self) -> Vec<SandboxStatus> {
        self.lock().sandboxes.values().cloned().collect()
    }

    async fn create_container(
        &self,
        sandbox: &SandboxId,
        config: ContainerConfig,
    ) -> Result<ContainerId> {
        self.pass_time().await;
        let mut state = self.begin(Operation::CreateContainer, &config.name)?;
        if !state.sandboxes.contains_key(sandbox) {
            let message = format!("no sandbox {sandbox}");
            return Err(error(RuntimeErrorKind::NotFound, &message));
        }
        let image = state.image(&config.image).cloned();
        let Some(image) = image else {
            let message = format!("no image {}", config.image);
            return Err(error(RuntimeErrorKind::NotFound, &message));
        };
        let created_at_ns = state.tick();
        let id = ContainerId(format!("{:064x}", state.next));
        let log_directory = state.sandboxes[sandbox].config.log_directory.clone();
        let status = ContainerStatus {
            id: id.clone(),
            sandbox_id: sandbox.clone(),
            log_path: log_directory.join(&config.log_path),
            resources: config.resources.clone(),
            config,
            state: ContainerState::Created,
            created_at_ns,
            image_id: image.id,
            image_ref: image.repo_digests.first().cloned().unwrap_or_default(),
            user: Some((0, 0, Vec::new())),
        };
        state.containers.insert(id.clone(), status);
        Ok(id)
    }

    async fn start_container(&self, id: &ContainerId) -> Result<()> {
        self.pass_time().await;
        let (sandbox, exit) = {
            let name = self.lock().container_name(id);
            let mut state = self.begin(Operation::StartContainer, &name)?;
            let started_at_ns = state.tick();
            let pid = 2000 + i32::try_from(state.next % 30000).unwrap_or(0);
            let exit = state
                .exit_on_start
                .get_mut(&name)
                .and_then(VecDeque::pop_front);
            let container = state
                .containers
                .get_mut(id)
                .ok_or_else(|| no_container(id))?;
            match container.state {
                ContainerState::Created => {}
                ContainerState::Running { .. } => return Ok(()),
                ContainerState::Exited { .. } => {
                    let message = format!("container {id} has exited already");
                    return Err(error(RuntimeErrorKind::Conflict, &message));
                }
            }
            container.state = ContainerState::Running { started_at_ns, pid };
            (container.sandbox_id.clone(), exit)
        };
        self.tell(&sandbox, Some(id), RuntimeEventKind::Started);
        if let Some(code) = exit {
            self.exit(id, code);
        }
        Ok(())
    }

    async fn stop_container(&self, id: &ContainerId, _grace: Duration) -> Result<()> {
        self.pass_time().await;
        let behaviour = {
            let name = self.lock().container_name(id);
            let state = self.begin(Operation::StopContainer, &name)?;
            state.on_stop.get(&name).copied().unwrap_or_default()
        };
        match behaviour {
            OnStop::ExitsWith0 => self.exit(id, 0),
            OnStop::Ignores => self.end(id, 137, Some(9), "Error"),
            OnStop::Hangs => loop {
                let mut notified = std::pin::pin!(self.changed.notified());
                notified.as_mut().enable();
                let state = self.container_status(id).map(|c| c.state);
                if !matches!(state, Some(ContainerState::Running { .. })) {
                    break;
                }
                notified.await;
            },
        }
        Ok(())
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<()> {
        self.pass_time().await;
        self.end(id, 137, Some(9), "Error");
        let name = self.lock().container_name(id);
        self.begin(Operation::RemoveContainer, &name)?
            .containers
            .remove(id);
        Ok(())
    }

    fn list_containers(&self, sandbox: Option<&SandboxId>) -> Vec<ContainerStatus> {
        let state = self.lock();
        let wanted = |c: &&ContainerStatus| sandbox.is_none_or(|s| c.sandbox_id == *s);
        state.containers.values().filter(wanted).cloned().collect()
    }

    fn container_status(&self, id: &ContainerId) -> Option<ContainerStatus> {
        self.lock().containers.get(id).cloned()
    }

    async fn update_resources(&self, id: &ContainerId, resources: Resources) -> Result<()> {
        let name = self.lock().container_name(id);
        let mut state = self.begin(Operation::UpdateResources, &name)?;
        let container = state.containers.get_mut(id);
        let container = container.ok_or_else(|| no_container(id))?;
        container.resources = container.resources.updated_by(resources);
        Ok(())
    }

    async fn exec(&self, id: &ContainerId, _request: ExecRequest) -> Result<StreamSession> {
        let output = self.exec_sync(id, Vec::new(), Duration::MAX, 0).await?;
        let (tell, exit) = tokio::sync::oneshot::channel();
        let _ = tell.send(output.exit_code);
        Ok(StreamSession {
            id: format!("{id}-exec"),
            stdin: None,
            stdout: None,
            stderr: None,
            exit,
        })
    }

    async fn exec_sync(
        &self,
        id: &ContainerId,
        _command: Vec<String>,
        _timeout: Duration,
        _limit: usize,
    ) -> Result<ExecOutput> {
        let name = self.lock().container_name(id);
        let mut state = self.begin(Operation::ExecSync, &name)?;
        let running = state.containers.get(id).map(|c| &c.state);
        if !matches!(running, Some(ContainerState::Running { .. })) {
            let message = format!("container {id} is not running");
            return Err(error(RuntimeErrorKind::Conflict, &message));
        }
        let Some(queue) = state.exec_results.get_mut(&name) else {
            return Ok(ExecOutput::default());
        };
        let copy = |result: &Result<ExecOutput>| match result {
            Ok(output) => Ok(output.clone()),
            Err(e) => Err(error(e.kind, &e.message)),
        };
        match (queue.len(), queue.front()) {
            (1, Some(last)) => copy(last),
            _ => queue
                .pop_front()
                .unwrap_or_else(|| Ok(ExecOutput::default())),
        }
    }

    async fn kill_exec(&self, _session: &str) -> Result<()> {
        Ok(())
    }

    async fn attach(&self, id: &ContainerId, _stdin: bool) -> Result<StreamSession> {
        self.exec(id, ExecRequest::default()).await
    }

    async fn resize_tty(&self, _session: &str, _width: u16, _height: u16) -> Result<()> {
        Ok(())
    }

    /// Connects on this machine's own loopback.
    async fn connect(&self, sandbox: &SandboxId, port: u16) -> Result<tokio::net::TcpStream> {
        crate::forward::connect_in(None, sandbox.as_str(), port).await
    }

    fn ensure_cgroup(&self, path: &str, resources: &Resources) -> Result<()> {
        let mut state = self.begin(Operation::EnsureCgroup, path)?;
        let limits = state.cgroups.entry(path.to_owned()).or_default();
        *limits = limits.updated_by(resources.clone());
        Ok(())
    }

    fn cgroup_limits(&self, path: &str) -> Option<Resources> {
        self.cgroup(path)
    }

    async fn remove_cgroup(&self, path: &str) -> Result<()> {
        let mut state = self.begin(Operation::RemoveCgroup, path)?;
        let below = format!("{path}/");
        state
            .cgroups
            .retain(|p, _| p != path && !p.starts_with(&below));
        Ok(())
    }

    fn list_cgroups(&self, path: &str) -> Vec<String> {
        let below = format!("{}/", path.trim_end_matches('/'));
        let state = self.lock();
        let children = state.cgroups.keys().filter_map(|p| p.strip_prefix(&below));
        children
            .filter(|name| !name.contains('/'))
            .map(str::to_owned)
            .collect()
    }

    fn cgroup_stats(&self, path: &str) -> Option<CgroupStats> {
        self.lock().stats.get(path).cloned()
    }

    fn container_stats(&self, id: &ContainerId) -> Option<CgroupStats> {
        self.lock().stats.get(id.as_str()).cloned()
    }

    fn events(&self) -> broadcast::Receiver<RuntimeEvent> {
        self.events.subscribe()
    }

    fn network_ready(&self) -> std::result::Result<(), String> {
        self.lock().network.clone().map_or(Ok(()), Err)
    }

    fn set_pod_cidrs(&self, _cidrs: &[String]) {}
}

impl ImageService for FakeRuntime {
    fn status(&self, image: &str) -> Option<ImageStatus> {
        self.lock().image(image).cloned()
    }

    fn list(&self) -> Vec<ImageStatus> {
        self.lock().images.values().cloned().collect()
    }

    async fn pull(&self, image: &str, _auth: &[RegistryAuth]) -> Result<ImageStatus> {
        let mut state = self.begin(Operation::Pull, image)?;
        let Some(found) = state.registry.get(image).cloned() else {
            let message = format!("pull {image}: not found");
            return Err(error(RuntimeErrorKind::ImagePull, &message));
        };
        state.images.insert(found.id.clone(), found.clone());
        Ok(found)
    }

    async fn remove(&self, image: &str) -> Result<()> {
        let mut state = self.begin(Operation::RemoveImage, image)?;
        let id = state.image(image).map(|i| i.id.clone());
        if let Some(id) = id {
            state.images.remove(&id);
        }
        Ok(())
    }

    fn fs_usage(&self) -> FsUsage {
        let state = self.lock();
        let (capacity_bytes, foreign) = state.disk;
        let used_bytes = state.images.values().map(|image| image.size_bytes).sum();
        FsUsage {
            path: PathBuf::from("/"),
            used_bytes,
            capacity_bytes,
            available_bytes: capacity_bytes
                .saturating_sub(foreign)
                .saturating_sub(used_bytes),
            ..FsUsage::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(name: &str) -> ContainerConfig {
        ContainerConfig {
            name: name.to_owned(),
            image: "busybox:1".to_owned(),
            ..ContainerConfig::default()
        }
    }

    async fn running(fake: &FakeRuntime, name: &str) -> (SandboxId, ContainerId) {
        fake.preload("busybox:1", ImageConfig::default());
        let config = SandboxConfig {
            uid: "u1".to_owned(),
            ..SandboxConfig::default()
        };
        let sandbox = fake.run_sandbox(config).await.unwrap();
        let id = fake
            .create_container(&sandbox.id, container(name))
            .await
            .unwrap();
        fake.start_container(&id).await.unwrap();
        (sandbox.id, id)
    }

    #[tokio::test]
    async fn a_started_container_runs_until_told_to_exit() {
        let fake = FakeRuntime::new();
        let mut events = fake.events();
        let (_, id) = running(&fake, "main").await;
        let state = fake.container_status(&id).unwrap().state;
        assert!(matches!(state, ContainerState::Running { .. }));
        fake.exit(&id, 3);
        let state = fake.container_status(&id).unwrap().state;
        assert!(matches!(state, ContainerState::Exited { exit_code: 3, .. }));
        let mut kinds = Vec::new();
        while let Ok(RuntimeEvent::Changed { kind, .. }) = events.try_recv() {
            kinds.push(kind);
        }
        let expected = [
            RuntimeEventKind::SandboxReady,
            RuntimeEventKind::Started,
            RuntimeEventKind::Exited,
        ];
        assert_eq!(kinds, expected);
    }

    #[tokio::test]
    async fn a_scripted_failure_happens_once() {
        let fake = FakeRuntime::new();
        let refusal = error(RuntimeErrorKind::Network, "no address");
        fake.fail_next(Operation::RunSandbox, refusal);
        let first = fake.run_sandbox(SandboxConfig::default()).await;
        assert_eq!(first.unwrap_err().kind, RuntimeErrorKind::Network);
        assert!(fake.run_sandbox(SandboxConfig::default()).await.is_ok());
    }

    #[tokio::test]
    async fn a_hanging_stop_ends_with_the_container() {
        let fake = FakeRuntime::new();
        let (_, id) = running(&fake, "main").await;
        fake.on_stop("main", OnStop::Hangs);
        let stop = fake.stop_container(&id, Duration::ZERO);
        let exit = async { fake.exit(&id, 0) };
        let (stopped, ()) = tokio::join!(stop, exit);
        assert!(stopped.is_ok());
    }
}
