//! [`RuntimeService`] as the engine serves it: every call goes to its module,
//! and those that change something are told to the observer.

use crate::engine::{Engine, blocking, limits};
use crate::service::{
    CgroupDetails, CgroupStats, ContainerConfig, ContainerId, ContainerPlace, ContainerStatus,
    ExecOutput, ExecRequest, Resources, Result, RuntimeEvent, RuntimeService, SandboxConfig,
    SandboxId, SandboxStatus, StreamSession,
};
use crate::{container, exec, forward, sandbox};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast;

impl RuntimeService for Engine {
    async fn run_sandbox(&self, config: SandboxConfig) -> Result<SandboxStatus> {
        self.observed(
            "run_podsandbox",
            self.run(|inner| sandbox::create::run(inner, config)),
        )
        .await
    }

    async fn stop_sandbox(&self, id: &SandboxId) -> Result<()> {
        let id = id.clone();
        self.observed(
            "stop_podsandbox",
            self.run(|inner| sandbox::teardown::stop(inner, id)),
        )
        .await
    }

    async fn remove_sandbox(&self, id: &SandboxId) -> Result<()> {
        let id = id.clone();
        self.observed(
            "remove_podsandbox",
            self.run(|inner| sandbox::teardown::remove(inner, id)),
        )
        .await
    }

    fn list_sandboxes(&self) -> Vec<SandboxStatus> {
        let all = self.inner.sandboxes();
        let status = |s: &Arc<crate::engine::Sandbox>| s.with(|r| r.status(s.shim_alive()));
        all.values().map(status).collect()
    }

    /// Copies only that pod's sandboxes: workers ask at every look.
    fn list_pod_sandboxes(&self, pod_uid: &str) -> Vec<SandboxStatus> {
        let all = self.inner.sandboxes();
        let own = |s: &&Arc<crate::engine::Sandbox>| s.with(|r| r.config.uid == pod_uid);
        let status = |s: &Arc<crate::engine::Sandbox>| s.with(|r| r.status(s.shim_alive()));
        all.values().filter(own).map(status).collect()
    }

    async fn create_container(
        &self,
        sandbox: &SandboxId,
        config: ContainerConfig,
    ) -> Result<ContainerId> {
        let sandbox = sandbox.clone();
        self.observed(
            "create_container",
            self.run(|inner| container::create::create(inner, sandbox, config)),
        )
        .await
    }

    async fn start_container(&self, id: &ContainerId) -> Result<()> {
        let id = id.clone();
        self.observed(
            "start_container",
            self.run(|inner| container::create::start(inner, id)),
        )
        .await
    }

    async fn stop_container(&self, id: &ContainerId, grace: Duration) -> Result<()> {
        let id = id.clone();
        self.observed(
            "stop_container",
            self.run(move |inner| container::teardown::stop(inner, id, grace)),
        )
        .await
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<()> {
        let id = id.clone();
        self.observed(
            "remove_container",
            self.run(|inner| container::teardown::remove(inner, id)),
        )
        .await
    }

    fn list_containers(&self, sandbox: Option<&SandboxId>) -> Vec<ContainerStatus> {
        let all = self.inner.containers();
        all.values()
            .filter(|c| sandbox.is_none_or(|s| c.sandbox.id == *s))
            .map(|c| c.with(crate::container::state::ContainerRecord::status))
            .collect()
    }

    fn container_status(&self, id: &ContainerId) -> Option<ContainerStatus> {
        let container = self.inner.container(id).ok()?;
        Some(container.with(crate::container::state::ContainerRecord::status))
    }

    async fn update_resources(&self, id: &ContainerId, resources: Resources) -> Result<()> {
        let id = id.clone();
        self.observed(
            "update_container_resources",
            self.run(|inner| container::create::update(inner, id, resources)),
        )
        .await
    }

    async fn exec(&self, id: &ContainerId, request: ExecRequest) -> Result<StreamSession> {
        let container = self.inner.container(id)?;
        self.observed("exec", exec::exec(&self.inner, &container, request))
            .await
    }

    async fn exec_sync(
        &self,
        id: &ContainerId,
        command: Vec<String>,
        timeout: Duration,
        limit: usize,
    ) -> Result<ExecOutput> {
        let container = self.inner.container(id)?;
        self.observed(
            "exec_sync",
            exec::exec_sync(&self.inner, &container, command, timeout, limit),
        )
        .await
    }

    async fn kill_exec(&self, session: &str) -> Result<()> {
        exec::kill(&self.inner, session).await
    }

    async fn attach(&self, id: &ContainerId, stdin: bool) -> Result<StreamSession> {
        let container = self.inner.container(id)?;
        self.observed("attach", exec::attach(&container, stdin))
            .await
    }

    async fn resize_tty(&self, session: &str, width: u16, height: u16) -> Result<()> {
        exec::resize(&self.inner, session, width, height).await
    }

    async fn connect(&self, sandbox: &SandboxId, port: u16) -> Result<tokio::net::TcpStream> {
        let sandbox = self.inner.sandbox(sandbox)?;
        forward::connect(&sandbox, port).await
    }

    fn ensure_cgroup(&self, path: &str, resources: &Resources) -> Result<()> {
        self.inner.cgroups.ensure(path)?;
        Ok(self.inner.cgroups.apply(path, &limits(resources))?)
    }

    fn cgroup_limits(&self, path: &str) -> Option<Resources> {
        let limits = self.inner.cgroups.limits(path)?;
        Some(Resources {
            cpu_shares: limits.cpu_shares,
            cpu_quota_us: limits.cpu_quota_us,
            cpu_period_us: limits.cpu_period_us,
            memory_limit_bytes: limits.memory_bytes,
            ..Resources::default()
        })
    }

    async fn remove_cgroup(&self, path: &str) -> Result<()> {
        let (inner, path) = (Arc::clone(&self.inner), path.to_owned());
        blocking(move || {
            inner.cgroups.kill(&path)?;
            Ok(inner.cgroups.remove(&path)?)
        })
        .await
    }

    fn list_cgroups(&self, path: &str) -> Vec<String> {
        self.inner.cgroups.children(path)
    }

    fn cgroup_stats(&self, path: &str) -> Option<CgroupStats> {
        self.inner
            .cgroups
            .stats(path)
            .as_ref()
            .map(CgroupStats::from)
    }

    fn container_stats(&self, id: &ContainerId) -> Option<CgroupStats> {
        let container = self.inner.container(id).ok()?;
        let cgroup = container.with(|r| r.cgroup.clone());
        self.cgroup_stats(&cgroup)
    }

    fn cgroup_details(&self, path: &str) -> Option<CgroupDetails> {
        self.inner.cgroups.details(path)
    }

    fn container_place(&self, id: &ContainerId) -> Option<ContainerPlace> {
        let container = self.inner.container(id).ok()?;
        let config = &self.inner.config;
        Some(ContainerPlace {
            cgroup: container.with(|r| r.cgroup.clone()),
            writable: vec![
                container::store::dir(config, id).join("upper"),
                container::store::volumes(config, id),
            ],
        })
    }

    fn events(&self) -> broadcast::Receiver<RuntimeEvent> {
        self.inner.events.subscribe()
    }

    fn network_ready(&self) -> std::result::Result<(), String> {
        self.inner.network.ready()
    }

    fn set_pod_cidrs(&self, cidrs: &[String]) {
        self.inner.network.set_pod_cidrs(cidrs);
    }
}
