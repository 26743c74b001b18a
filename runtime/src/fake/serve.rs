//! The services of the engine in memory.

use super::*;
use crate::service::Pulled;

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

    async fn pull(&self, image: &str, auth: &[RegistryAuth]) -> Result<Pulled> {
        let mut state = self.begin(Operation::Pull, image)?;
        let Some(found) = state.registry.get(image).cloned() else {
            let message = format!("pull {image}: not found");
            return Err(error(RuntimeErrorKind::ImagePull, &message));
        };
        state.images.insert(found.id.clone(), found.clone());
        Ok(Pulled {
            status: found,
            credential: (!auth.is_empty()).then_some(0),
        })
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
