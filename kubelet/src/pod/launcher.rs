//! The node around pods: joins volumes, images, the objects of the API and the pure functions of
//! [`crate::launch`] into what a worker asks for. No task, no queue of its own.

use super::admission::{self, Admission, AdmissionContext};
use super::environment::{PodEnvironment, Rejection, ResizeRefusal, StartContext, StepError};
use super::resize::actuate::{Running, WantedResources};
use super::resize::allocation::{self, Allocation};
use super::resize::execute;
use super::spec;
use super::state::EndingNote;
use crate::errors::chain;
use crate::events::{EventSink, EventType, field_path};
use crate::images::{ImagePuller, PullError, PullRequest};
use crate::launch::container::ContainerImages;
use crate::launch::resources::{container_resources, cpu_shares, pod_totals};
use crate::launch::{self, LaunchContext, LaunchError, qos};
use crate::node::NodeHandle;
use crate::node::object::DECLARED_FEATURES;
use crate::objects::Objects;
use crate::quantity::Quantity;
use crate::userns::UserNamespaces;
use crate::volumes::{PodVolumes, Volumes};
use arc_swap::ArcSwap;
use k8s_openapi::api::core::v1::{Container, Pod, Secret};
use k8s_openapi::api::node::v1::RuntimeClass;
use kube::Api;
use runtime::service::{
    ContainerConfig, ImageService, ImageStatus, Resources, RuntimeService, SandboxConfig,
};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tracing::{debug, warn};

/// File in a pod's directory with the note of its ending.
const NOTE: &str = "ending.json";

/// The node as pods need it.
#[derive(Debug)]
pub struct NodeEnvironment<R> {
    /// The engine.
    pub runtime: Arc<R>,
    /// The node in launch's words; replaced when the node changes.
    pub context: Arc<ArcSwap<LaunchContext>>,
    /// The Node object.
    pub node: NodeHandle,
    /// Unsafe sysctls pods may set.
    pub allowed_unsafe_sysctls: Vec<String>,
    /// ConfigMaps and Secrets.
    pub objects: Arc<Objects>,
    /// Volumes.
    pub volumes: Volumes,
    /// Images.
    pub images: Arc<ImagePuller<R>>,
    /// Events for users.
    pub events: EventSink,
    /// For RuntimeClasses.
    pub client: NodeClient,
    /// CPU requests of burstable pods here.
    pub burstable: Burstable,
    /// Ids of pods that have users of their own.
    pub user_namespaces: UserNamespaces,
}

/// CPU requests of burstable pods by UID, in thousandths: their sum is the weight of their class.
#[derive(Debug, Default)]
pub struct Burstable {
    milli: Mutex<BTreeMap<String, i64>>,
}

impl Burstable {
    /// Notes a pod that came (with its requests) or went; the new sum when it changed.
    fn note(&self, uid: &str, milli: Option<i64>) -> Option<i64> {
        let mut all = self.milli.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match milli {
            Some(milli) => all.insert(uid.to_owned(), milli),
            None => all.remove(uid),
        };
        (before != milli).then(|| all.values().fold(0, |sum, m| i64::saturating_add(sum, *m)))
    }
}

/// A client that can be shown in debug output.
#[derive(Clone)]
pub struct NodeClient(pub kube::Client);

impl std::fmt::Debug for NodeClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NodeClient")
    }
}

impl<R: RuntimeService + ImageService> PodEnvironment for NodeEnvironment<R> {
    type Volumes = PodVolumes;
    type Image = ContainerImages;

    fn admit(&self, pod: &Pod, others: &[Arc<Pod>]) -> Result<Admission, Rejection> {
        let launch = self.context.load();
        let context = AdmissionContext {
            allocatable: launch.allocatable.clone(),
            allowed_unsafe_sysctls: self.allowed_unsafe_sysctls.clone(),
            node_name: launch.node_name.clone(),
            node: self.node.node(),
            pressures: self.node.pressures(),
            declared_features: DECLARED_FEATURES,
            // Containers are not put under AppArmor here, whatever the kernel can do.
            apparmor: false,
        };
        admission::admit(pod, others, &context)
    }

    fn admit_resize(
        &self,
        pod: &Pod,
        _granted: &Pod,
        others: &[Arc<Pod>],
    ) -> Result<Admission, ResizeRefusal> {
        self.admit(pod, others).map_err(|refusal| ResizeRefusal {
            reason: refusal.reason,
            infeasible: false,
            message: refusal.message,
        })
    }

    fn load_allocation(&self, uid: &str) -> Option<Allocation> {
        let loaded = allocation::load(&self.context.load().root_dir, uid);
        loaded.unwrap_or_else(|error| {
            // The spec counts as granted then; limits in force are compared with it anyway.
            warn!(
                error = &error as &dyn std::error::Error,
                "Allocation not read"
            );
            None
        })
    }

    fn save_allocation(&self, uid: &str, allocation: &Allocation) -> Result<(), StepError> {
        let saved = allocation::save(&self.context.load().root_dir, uid, allocation);
        saved.map_err(|e| StepError::new("UnexpectedAdmissionError", chain(&e)))
    }

    fn wanted_resources(&self, pod: &Pod) -> Option<WantedResources> {
        let context = self.context.load();
        let spec = pod.spec.as_ref()?;
        let own = |c: &Container| {
            let resources = container_resources(pod, c, &context).ok()?;
            Some((c.name.clone(), resources))
        };
        let inits = spec.init_containers.iter().flatten();
        let containers = inits.chain(&spec.containers).map(own);
        Some(WantedResources {
            pod: qos::pod_resources(pod, &context).ok()?,
            containers: containers.collect::<Option<_>>()?,
        })
    }

    async fn resize(
        &self,
        pod: &Arc<Pod>,
        wanted: WantedResources,
        running: Vec<Running>,
    ) -> Result<(), StepError> {
        let began = tokio::time::Instant::now();
        let cgroup = qos::pod_cgroup(pod, &self.context.load());
        self.weigh(pod);
        let done = execute::carry_out(&*self.runtime, &cgroup, &wanted, &running).await;
        let elapsed_us = began.elapsed().as_micros();
        debug!(cgroup, elapsed_us, "Cgroups brought to what was granted");
        done.map_err(|message| StepError::new("ResizePodInPlaceError", message))
    }

    fn host_ips(&self) -> Vec<String> {
        self.context
            .load()
            .host_ips
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    async fn prepare_volumes(&self, pod: &Arc<Pod>) -> Result<PodVolumes, StepError> {
        self.weigh(pod);
        let prepared = self.volumes.prepare(pod).await;
        prepared.map_err(|e| StepError::new(e.reason(), e.to_string()))
    }

    fn stop_waiting(&self, pod: &Pod) {
        self.volumes.stop_waiting(spec::uid(pod));
    }

    async fn update_volumes(&self, pod: &Arc<Pod>) {
        if let Err(error) = self.volumes.update(pod).await {
            let text = error.to_string();
            let warning = EventType::Warning;
            self.events
                .pod_event(pod, None, warning, error.reason(), text);
        }
    }

    async fn prepare_sandbox(
        &self,
        pod: &Arc<Pod>,
        attempt: u32,
    ) -> Result<SandboxConfig, StepError> {
        const REASON: &str = "FailedCreatePodSandBox";
        let context = self.context.load_full();
        let refused =
            |e: LaunchError| StepError::new(REASON, format!("Failed to create pod sandbox: {e}"));
        let mut config = launch::sandbox::config(pod, &context, attempt).map_err(refused)?;
        config.runtime_handler = self.runtime_handler(pod).await?;
        if launch::security::own_users(pod) {
            let range = self.user_namespaces.ensure(spec::uid(pod));
            let range = range.map_err(|e| refused(LaunchError::Sandbox(e.to_string())))?;
            config.user_namespace = Some(range);
        }
        let resources = qos::pod_resources(pod, &context).map_err(refused)?;
        let made = self
            .runtime
            .ensure_cgroup(&config.cgroup_parent, &resources);
        made.map_err(|e| StepError::new("FailedCreatePodContainer", e.message))?;
        Ok(config)
    }

    async fn ensure_image(
        &self,
        pod: &Arc<Pod>,
        container: &Container,
    ) -> Result<ContainerImages, StepError> {
        let secrets = self.objects.pull_secrets(pod).await;
        let secrets = secrets.map_err(|e| StepError::new("ErrImagePull", e.to_string()))?;
        let request = PullRequest {
            pod,
            image: container.image.as_deref().unwrap_or_default(),
            policy: container.image_pull_policy.as_deref(),
            container: Some(&container.name),
            secrets: &secrets,
        };
        let own = async { self.images.ensure(request).await.map_err(pull_error) };
        let volumes = self.image_volumes(pod, container, &secrets);
        let (own, volumes) = futures::future::try_join(own, volumes).await?;
        Ok(ContainerImages { own, volumes })
    }

    async fn container_config(
        &self,
        pod: &Arc<Pod>,
        container: &Container,
        start: StartContext<PodVolumes, ContainerImages>,
    ) -> Result<ContainerConfig, StepError> {
        let objects = self.objects.env_objects(pod, container).await;
        let mut objects =
            objects.map_err(|e| StepError::new("CreateContainerConfigError", e.to_string()))?;
        objects.files = launch::files::env_files(container, &start.volumes);
        let context = self.context.load_full();
        let launch = launch::container::config(&launch::container::Inputs {
            pod,
            container,
            context: &context,
            volumes: &start.volumes,
            images: &start.image,
            pod_ips: &start.pod_ips,
            attempt: start.attempt,
            objects: &objects,
        })
        .map_err(|e| StepError::new(e.reason(), e.to_string()))?;
        // A handful of small files: cheaper than a thread's hand-over.
        launch::files::write(&launch.files)
            .map_err(|e| StepError::new(e.reason(), e.to_string()))?;
        Ok(launch.config)
    }

    fn keep_note(&self, pod: &Pod, note: &EndingNote) {
        let directory = launch::pod_directory(pod, &self.context.load());
        if let Err(error) = write_note(&directory, note) {
            // Without it a new agent would grant the whole grace again: no harm.
            warn!(pod = spec::describe(pod), %error, "Ending of a pod not noted");
        }
    }

    fn note(&self, pod: &Pod) -> Option<EndingNote> {
        let path = launch::pod_directory(pod, &self.context.load()).join(NOTE);
        let bytes = std::fs::read(path).ok()?;
        let note = serde_json::from_slice(&bytes);
        note.inspect_err(|error| {
            warn!(pod = spec::describe(pod), %error, "Note of a pod's ending is not readable");
        })
        .ok()
    }

    async fn teardown(&self, pod: &Arc<Pod>) -> Result<(), StepError> {
        let uid = spec::uid(pod);
        let torn = self.volumes.teardown(uid).await;
        torn.map_err(|e| StepError::new(e.reason(), e.to_string()))?;
        self.weigh_burstable(uid, None);
        for cgroup in self.pod_cgroups(pod) {
            let removed = self.runtime.remove_cgroup(&cgroup).await;
            removed.map_err(|e| StepError::new("FailedKillPod", e.message))?;
        }
        // Last: until here something could still carry its ids.
        let released = self.user_namespaces.release(uid);
        released.map_err(|e| StepError::new("FailedKillPod", e.to_string()))
    }

    async fn purge(&self, pod: &Arc<Pod>) -> Result<(), StepError> {
        let context = self.context.load_full();
        let mut doomed = log_directories(&context.pod_logs_dir, spec::uid(pod));
        doomed.push(launch::pod_directory(pod, &context));
        let removed = tokio::task::spawn_blocking(move || {
            doomed
                .iter()
                .try_for_each(|path| linux::fs::remove_tree(path))
        });
        match removed.await {
            Ok(done) => done.map_err(|e| StepError::new("FailedKillPod", e.to_string())),
            Err(error) => Err(StepError::new("FailedKillPod", error.to_string())),
        }
    }

    fn leftovers(&self) -> Vec<String> {
        let context = self.context.load();
        let mut uids: BTreeSet<String> = self.volumes.list_on_disk().into_iter().collect();
        let pods = linux::fs::list_dir(&context.root_dir.join("pods")).unwrap_or_default();
        uids.extend(pods.into_iter().filter_map(|name| name.into_string().ok()));
        let logs = linux::fs::list_dir(&context.pod_logs_dir).unwrap_or_default();
        uids.extend(logs.iter().filter_map(|name| owner_of_logs(name.to_str()?)));
        for parent in qos_parents(&context.kubepods) {
            let names = self.runtime.list_cgroups(&parent);
            uids.extend(names.iter().filter_map(|n| qos::uid_of_cgroup(n)));
        }
        uids.into_iter().collect()
    }
}

/// Puts a note in the pod's directory: at once or not at all.
fn write_note(directory: &Path, note: &EndingNote) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    let new = directory.join(format!("{NOTE}.new"));
    std::fs::write(&new, serde_json::to_vec(note)?)?;
    std::fs::rename(new, directory.join(NOTE))
}

/// A pull's failure as a step's.
fn pull_error(error: PullError) -> StepError {
    StepError {
        reason: error.reason().to_owned(),
        message: error.to_string(),
        retry_after: error.retry_after(),
    }
}

/// The cgroups that hold pods, by class.
fn qos_parents(kubepods: &str) -> [String; 3] {
    [
        qos::QosClass::Guaranteed,
        qos::QosClass::Burstable,
        qos::QosClass::BestEffort,
    ]
    .map(|class| class.cgroup(kubepods))
}

/// The UID in the name of a log directory, `<namespace>_<name>_<uid>`. What has not that form is
/// somebody else's.
fn owner_of_logs(directory: &str) -> Option<String> {
    let mut parts = directory.split('_');
    let (namespace, name, uid) = (parts.next()?, parts.next()?, parts.next()?);
    // Of apiservers a UUID, of manifests a hash in hexadecimal.
    let plain = |b: u8| b.is_ascii_hexdigit() || b == b'-';
    let ours = !namespace.is_empty()
        && !name.is_empty()
        && parts.next().is_none()
        && (32..=36).contains(&uid.len())
        && uid.bytes().all(plain);
    ours.then(|| uid.to_owned())
}

/// Log directories of a pod, found by its UID: an orphan's names may be unknown.
fn log_directories(root: &Path, uid: &str) -> Vec<PathBuf> {
    if uid.is_empty() {
        return Vec::new();
    }
    let names = linux::fs::list_dir(root).unwrap_or_default();
    let own = names.into_iter().filter(|n| {
        n.to_str()
            .and_then(|n| n.rsplit_once('_'))
            .is_some_and(|(_, last)| last == uid)
    });
    own.map(|name| root.join(name)).collect()
}

impl<R: RuntimeService + ImageService> NodeEnvironment<R> {
    /// The images of the volumes a container mounts, by volume name. Volumes nobody mounts are
    /// not pulled for anybody.
    async fn image_volumes(
        &self,
        pod: &Arc<Pod>,
        container: &Container,
        secrets: &[Arc<Secret>],
    ) -> Result<BTreeMap<String, ImageStatus>, StepError> {
        let mounts = container.volume_mounts.as_deref().unwrap_or_default();
        let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
        let mounted = volumes.filter(|v| mounts.iter().any(|m| m.name == v.name));
        let mut images = BTreeMap::new();
        for (name, source) in mounted.filter_map(|v| Some((&v.name, v.image.as_ref()?))) {
            let request = PullRequest {
                pod,
                image: source.reference.as_deref().unwrap_or_default(),
                policy: source.pull_policy.as_deref(),
                container: None,
                secrets,
            };
            let image = self.images.ensure(request).await.map_err(|error| {
                let path = field_path(pod, &container.name);
                let message = format!("Error: {}", error.reason());
                let warning = EventType::Warning;
                self.events
                    .pod_event(pod, Some(&path), warning, "Failed", message);
                pull_error(error)
            })?;
            images.insert(name.clone(), image);
        }
        Ok(images)
    }

    /// Where the cgroup of a pod is, or can be when its spec is not known any more.
    fn pod_cgroups(&self, pod: &Pod) -> Vec<String> {
        let context = self.context.load();
        if pod.spec.is_some() {
            return vec![qos::pod_cgroup(pod, &context)];
        }
        let uid = spec::uid(pod);
        qos_parents(&context.kubepods)
            .iter()
            .map(|parent| qos::pod_cgroup_in(parent, uid))
            .collect()
    }

    /// Counts a pod in the weight of its class.
    fn weigh(&self, pod: &Pod) {
        if qos::class(pod) == qos::QosClass::Burstable {
            let totals = pod_totals(pod).unwrap_or_default();
            let milli = totals.requests.get("cpu").map_or(0, Quantity::milli_value);
            self.weigh_burstable(spec::uid(pod), Some(milli));
        }
    }

    /// Keeps the weight of the burstable class in line with its pods.
    fn weigh_burstable(&self, uid: &str, milli: Option<i64>) {
        let Some(sum) = self.burstable.note(uid, milli) else {
            return;
        };
        let path = qos::QosClass::Burstable.cgroup(&self.context.load().kubepods);
        let resources = Resources {
            cpu_shares: Some(cpu_shares(sum)),
            ..Resources::default()
        };
        if let Err(error) = self.runtime.ensure_cgroup(&path, &resources) {
            // Weights are fairness, not safety: the pod runs all the same.
            warn!(path, %error, "Weight of the burstable class not set");
        }
    }

    /// The handler the pod's RuntimeClass names; empty without one.
    async fn runtime_handler(&self, pod: &Pod) -> Result<String, StepError> {
        let Some(class) = pod
            .spec
            .as_ref()
            .and_then(|s| s.runtime_class_name.as_ref())
        else {
            return Ok(String::new());
        };
        let api: Api<RuntimeClass> = Api::all(self.client.0.clone());
        let found = api.get_opt(class).await;
        let message = match found {
            Ok(Some(class)) => return Ok(class.handler),
            Ok(None) => format!("runtimeclass.node.k8s.io {class:?} not found"),
            Err(error) => format!("failed to lookup RuntimeClass {class}: {error}"),
        };
        let message = format!("Failed to create pod sandbox: {message}");
        Err(StepError::new("FailedCreatePodSandBox", message))
    }
}

#[cfg(test)]
mod tests {
    use super::owner_of_logs;

    #[test]
    fn only_directories_named_like_a_pods_logs_belong_to_a_pod() {
        let uid = "5bb1dcc1-2c5f-4be1-a4bd-8b1a7d0e7a3e";
        let owner = |name: &str| owner_of_logs(name);
        assert_eq!(owner(&format!("ns_pod_{uid}")).as_deref(), Some(uid));
        let hash = "0123456789abcdef0123456789abcdef";
        assert_eq!(
            owner(&format!("kube-system_etcd-n1_{hash}")).as_deref(),
            Some(hash)
        );
        for foreign in [
            "lost+found",
            "a_b_c",
            "ns_pod",
            &format!("x_ns_pod_{uid}"),
            &format!("__{uid}"),
        ] {
            assert_eq!(owner(foreign), None, "{foreign}");
        }
    }
}
