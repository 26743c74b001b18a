//! What a pod worker needs of the node besides the runtime: volumes, images, configurations,
//! admission. The node's own is [`super::launcher`]; tests bring a scripted one.

use super::admission::Admission;
use super::resize::actuate::{Running, WantedResources};
use super::resize::allocation::Allocation;
use super::state::EndingNote;
use k8s_openapi::api::core::v1::{Container, Pod};
use runtime::service::{ContainerConfig, SandboxConfig};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// Why a step failed, in the words users see.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct StepError {
    /// Waiting or event reason, `CreateContainerConfigError`.
    pub reason: String,
    /// One sentence.
    pub message: String,
    /// When to try again; none leaves it to the worker's own back-off.
    pub retry_after: Option<Duration>,
}

impl StepError {
    /// With the worker's own back-off.
    pub fn new(reason: &str, message: impl Into<String>) -> Self {
        Self {
            reason: reason.to_owned(),
            message: message.into(),
            retry_after: None,
        }
    }
}

/// The node refuses to run a pod.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Rejection {
    /// `status.reason` and event reason, `OutOfcpu`.
    pub reason: String,
    /// For people.
    pub message: String,
}

/// The node does not give a running pod the resources it asks for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ResizeRefusal {
    /// One word for the event, `OutOfcpu`.
    pub reason: String,
    /// It will never be possible on this node.
    pub infeasible: bool,
    /// For people.
    pub message: String,
}

/// All a container's configuration depends on besides pod and container.
#[derive(Debug, Clone)]
pub struct StartContext<V, I> {
    /// Instances before this one.
    pub attempt: u32,
    /// Addresses of the pod, first is primary.
    pub pod_ips: Vec<IpAddr>,
    /// The pod's volumes.
    pub volumes: V,
    /// The container's image.
    pub image: I,
}

/// The node around a pod.
pub trait PodEnvironment: Send + Sync + 'static {
    /// Volumes that are set up.
    type Volumes: Clone + Send + Sync + 'static;
    /// An image that is stored.
    type Image: Clone + Send + Sync + 'static;

    /// Whether the node takes a new pod beside those it has, all with the resources they were
    /// granted.
    fn admit(&self, pod: &Pod, others: &[Arc<Pod>]) -> Result<Admission, Rejection>;
    /// Whether a pod that runs as `granted` may have the resources it asks for now; if not,
    /// whether it never may on this node, and why.
    fn admit_resize(
        &self,
        pod: &Pod,
        granted: &Pod,
        others: &[Arc<Pod>],
    ) -> Result<Admission, ResizeRefusal>;
    /// The recorded allocation of a pod.
    fn load_allocation(&self, uid: &str) -> Option<Allocation>;
    /// Records the allocation of a pod.
    fn save_allocation(&self, uid: &str, allocation: &Allocation) -> Result<(), StepError>;
    /// What the pod's cgroups shall be; none when the spec makes no sense.
    fn wanted_resources(&self, pod: &Pod) -> Option<WantedResources>;
    /// Brings the cgroups of a pod and its running containers to what is wanted.
    fn resize(
        &self,
        pod: &Arc<Pod>,
        wanted: WantedResources,
        running: Vec<Running>,
    ) -> impl Future<Output = Result<(), StepError>> + Send;
    /// Addresses of the node, first is primary.
    fn host_ips(&self) -> Vec<String>;
    /// Sets all volumes up. Idempotent.
    fn prepare_volumes(
        &self,
        pod: &Arc<Pod>,
    ) -> impl Future<Output = Result<Self::Volumes, StepError>> + Send;
    /// The pod ends: whatever it waits for from others, such as a volume that is to be attached,
    /// is not waited for any longer.
    fn stop_waiting(&self, _pod: &Pod) {}
    /// The pod's metadata changed: volumes that show it are to be written anew.
    fn update_volumes(&self, pod: &Arc<Pod>) -> impl Future<Output = ()> + Send;
    /// Makes the pod's cgroup and says what its sandbox shall be.
    fn prepare_sandbox(
        &self,
        pod: &Arc<Pod>,
        attempt: u32,
    ) -> impl Future<Output = Result<SandboxConfig, StepError>> + Send;
    /// Has the image of a container, pulled if need be.
    fn ensure_image(
        &self,
        pod: &Arc<Pod>,
        container: &Container,
    ) -> impl Future<Output = Result<Self::Image, StepError>> + Send;
    /// What a container shall be.
    fn container_config(
        &self,
        pod: &Arc<Pod>,
        container: &Container,
        context: StartContext<Self::Volumes, Self::Image>,
    ) -> impl Future<Output = Result<ContainerConfig, StepError>> + Send;
    /// Keeps a note of a pod's ending until it is purged.
    fn keep_note(&self, pod: &Pod, note: &EndingNote);
    /// The note kept of a pod's ending.
    fn note(&self, pod: &Pod) -> Option<EndingNote>;
    /// Gives back volumes and cgroup of a pod without processes. Idempotent; by records, so that
    /// it works for a pod known by UID only.
    fn teardown(&self, pod: &Arc<Pod>) -> impl Future<Output = Result<(), StepError>> + Send;
    /// Removes the pod's directories and logs. Idempotent.
    fn purge(&self, pod: &Arc<Pod>) -> impl Future<Output = Result<(), StepError>> + Send;
    /// UIDs of pods that have something on this node outside the runtime: directories, cgroups.
    fn leftovers(&self) -> Vec<String>;
}
