//! What the runtime holds of a pod, read anew each time: there is no cache to go stale.

use runtime::service::{
    ContainerId, ContainerState, ContainerStatus, RuntimeService, SandboxState, SandboxStatus,
};

/// Everything the runtime knows of one pod.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PodObservation {
    /// Its sandboxes, newest first.
    pub sandboxes: Vec<SandboxStatus>,
    /// Their containers, newest first.
    pub containers: Vec<ContainerStatus>,
}

impl PodObservation {
    /// Reads it. Cheap: the runtime answers from memory.
    pub fn read<R: RuntimeService>(runtime: &R, uid: &str) -> Self {
        let sandboxes = runtime.list_pod_sandboxes(uid);
        let containers = sandboxes
            .iter()
            .flat_map(|s| runtime.list_containers(Some(&s.id)))
            .collect();
        Self::new(sandboxes, containers)
    }

    /// Puts both lists in order.
    pub fn new(mut sandboxes: Vec<SandboxStatus>, mut containers: Vec<ContainerStatus>) -> Self {
        sandboxes.sort_by_key(|s| std::cmp::Reverse((s.config.attempt, s.created_at_ns)));
        containers.sort_by_key(|c| std::cmp::Reverse((c.config.attempt, c.created_at_ns)));
        Self {
            sandboxes,
            containers,
        }
    }

    /// The newest sandbox, whatever its state.
    pub fn newest_sandbox(&self) -> Option<&SandboxStatus> {
        self.sandboxes.first()
    }

    /// The newest sandbox if it is ready.
    pub fn ready_sandbox(&self) -> Option<&SandboxStatus> {
        self.newest_sandbox()
            .filter(|s| s.state == SandboxState::Ready)
    }

    /// Instances of a container, newest first.
    pub fn instances<'a>(
        &'a self,
        name: &'a str,
    ) -> impl Iterator<Item = &'a ContainerStatus> + 'a {
        self.containers
            .iter()
            .filter(move |c| c.config.name == name)
    }

    /// The newest instance of a container.
    pub fn newest<'a>(&'a self, name: &'a str) -> Option<&'a ContainerStatus> {
        self.instances(name).next()
    }

    /// The newest dead instance of a container.
    pub fn newest_dead<'a>(&'a self, name: &'a str) -> Option<&'a ContainerStatus> {
        self.instances(name).find(|c| exit(c).is_some())
    }

    /// An instance by id.
    pub fn container(&self, id: &ContainerId) -> Option<&ContainerStatus> {
        self.containers.iter().find(|c| c.id == *id)
    }

    /// Instances with a live process.
    pub fn running(&self) -> impl Iterator<Item = &ContainerStatus> {
        self.containers.iter().filter(|c| is_running(c))
    }
}

/// Whether an instance has a live process.
pub fn is_running(container: &ContainerStatus) -> bool {
    matches!(container.state, ContainerState::Running { .. })
}

/// Exit code and end (nanoseconds since the epoch) of a dead instance.
pub fn exit(container: &ContainerStatus) -> Option<(i32, i64)> {
    match &container.state {
        ContainerState::Exited {
            exit_code,
            finished_at_ns,
            ..
        } => Some((*exit_code, *finished_at_ns)),
        ContainerState::Created | ContainerState::Running { .. } => None,
    }
}
