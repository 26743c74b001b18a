//! The composition root: builds the parts, joins their channels, owns their tasks and their end.
//! The only place that starts top-level tasks and the only one with concrete types.
//!
//! ```text
//! task        reads                                   writes
//! source      apiserver watch, manifests              changes -> manager
//! mirrors     static pods and their mirrors           apiserver
//! manager     changes, engine news, verdicts          workers (one task per pod)
//! publisher   statuses left by workers                apiserver
//! events      events left by everybody                apiserver
//! objects     ConfigMap and Secret changes            namespaces to retry -> manager
//! collector   pod index, engine                       engine (unused images)
//! compressor  engine, log directories                 rotated logs
//! node        machine, engine, apiserver              Node, Lease
//! plugins     sockets of drivers                      Node, CSINode, drivers -> volumes
//! server      pod index, engine                       HTTPS clients
//! ```
//!
//! Order matters: the engine has recovered before an [`Agent`] can be made (it takes a running
//! engine), so that workers never see half a truth. The end (SIGTERM) cancels every task and
//! touches no container.

use crate::api::{self, Clients, Opened};
use crate::compress;
use crate::config::Config;
use crate::events::{EventPace, EventSink};
use crate::eviction::Evictor;
use crate::eviction::rank::Eviction;
use crate::images::ImagePuller;
use crate::images::access::Access;
use crate::images::gc::{ImageGc, Policy};
use crate::images::provider::{ProviderConfigError, Providers};
use crate::launch::{LaunchContext, dns, qos};
use crate::metrics;
use crate::node::csi_node::CsiNodeWriter;
use crate::node::{Node, NodeHandle, capacity, machine};
use crate::objects::Objects;
use crate::plugins::{CsiPlugins, Plugins};
use crate::pod::clock::Clock;
use crate::pod::index::PodIndex;
use crate::pod::launcher::{Burstable, NodeClient, NodeEnvironment};
use crate::pod::manager::{Heartbeat, Inputs, Manager};
use crate::pod::mirror::{Keeper, Mirrors};
use crate::pod::state::BackoffLimits;
use crate::pod::worker::WorkerDeps;
use crate::probes::Probes;
use crate::server::{self, Server, auth::Auth};
use crate::source::file::FileSettings;
use crate::source::http::HttpSettings;
use crate::source::{self, PodChange, Source};
use crate::stats::Stats;
use crate::status::publish::{KubeStatusApi, StatusPublisher};
use crate::userns::{self, UserNamespaces};
use crate::volumes::{Drivers, Volumes, VolumesConfig};
use runtime::Engine;
use runtime::config::{CgroupDriver, EngineConfig};
use runtime::image::RegistryConfig;
use runtime::service::{ImageService, Resources, RuntimeService};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

/// Verdicts of probes waiting for the manager; probes wait when it is full.
const VERDICTS: usize = 256;
/// Evictions on their way to the pod manager, which takes them at once.
const EVICTIONS: usize = 16;
/// How long the apiserver's pods wait for the first look at the manifests, which takes
/// milliseconds.
const FIRST_LOOK: Duration = Duration::from_secs(2);
/// How long tasks may take to end after SIGTERM. All are cancelled at their next await.
const SHUTDOWN: Duration = Duration::from_secs(5);

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The engine.
    #[error("open the runtime in {root}: {message}")]
    Runtime {
        /// Its state directory.
        root: String,
        /// Its words.
        message: String,
    },
    /// A cgroup of the QoS tree.
    #[error("make cgroup {path}: {message}")]
    Cgroup {
        /// Below the cgroup root.
        path: String,
        /// The engine's words.
        message: String,
    },
    /// The volumes of pods.
    #[error("open volumes: {0}")]
    Volumes(String),
    /// Ids for pods' user namespaces.
    #[error("{0}")]
    UserNamespaces(String),
    /// The programs that give credentials for images.
    #[error(transparent)]
    Credentials(#[from] ProviderConfigError),
    /// A listener.
    #[error("serve {what}: {message}")]
    Serve {
        /// `the HTTPS API`, `healthz`.
        what: &'static str,
        /// The cause.
        message: String,
    },
}

/// Runs a node with our own engine until `stop`.
///
/// # Errors
/// See [`AgentError`]. An apiserver that cannot be reached or a certificate that is not there yet
/// is waited for; static pods run meanwhile.
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), AgentError> {
    let config = Arc::new(config);
    let engine = Engine::open(engine_config(&config))
        .await
        .map_err(|e| AgentError::Runtime {
            root: config.runtime_root.display().to_string(),
            message: e.message,
        })?;
    engine.observe(metrics::runtime_operation);
    let Opened { clients, waiting } = api::open(&config);
    let agent = Agent::new(config.clone(), clients, Arc::new(engine), stop.clone());
    if let Some(waiting) = waiting {
        agent.tracker.spawn(waiting.run(config, stop));
    }
    agent.run().await
}

/// The engine's part of the configuration.
fn engine_config(config: &Config) -> EngineConfig {
    EngineConfig {
        root: config.runtime_root.clone(),
        run_dir: config.runtime_run_dir.clone(),
        cni_conf_dir: config.cni_conf_dir.clone(),
        cni_bin_dirs: config.cni_bin_dirs.clone(),
        shim_path: present(shim_path(config)),
        cgroup_root: config.cgroup_root.clone(),
        cgroup_driver: CgroupDriver::default(),
        registries: RegistryConfig {
            mirrors: config.images.mirrors.clone(),
            insecure: config.images.insecure.clone(),
            only_mirrors: config.images.only_mirrors,
        },
    }
}

/// Says at once that no container can be started; what runs is looked after all the same.
fn present(shim_path: PathBuf) -> PathBuf {
    if !shim_path.is_file() {
        tracing::error!(
            path = %shim_path.display(),
            "There is no pod-shim, so no container can be started; install it there or name it by --shim-path"
        );
    }
    shim_path
}

/// The shim: as configured, else beside our own program.
fn shim_path(config: &Config) -> PathBuf {
    if !config.shim_path.as_os_str().is_empty() {
        return config.shim_path.clone();
    }
    let own = std::env::current_exe().unwrap_or_default();
    own.with_file_name("pod-shim")
}

/// What the pod pipeline shares with others.
struct PodParts<'a> {
    events: &'a EventSink,
    index: &'a PodIndex,
    node: &'a NodeHandle,
    access: Arc<Access>,
    evictions: mpsc::Receiver<Eviction>,
}

/// A node's agent around a running engine.
pub struct Agent<R> {
    config: Arc<Config>,
    heartbeat: Arc<Heartbeat>,
    clients: Clients,
    runtime: Arc<R>,
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl<R> std::fmt::Debug for Agent<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent")
            .field("node", &self.config.node_name)
            .finish_non_exhaustive()
    }
}

impl<R: RuntimeService + ImageService> Agent<R> {
    /// An agent that ends with `stop`. The engine has recovered what survived.
    pub fn new(
        config: Arc<Config>,
        clients: Clients,
        runtime: Arc<R>,
        stop: CancellationToken,
    ) -> Self {
        Self {
            config,
            heartbeat: Arc::default(),
            clients,
            runtime,
            tracker: TaskTracker::new(),
            stop,
        }
    }

    /// Runs until stopped.
    ///
    /// # Errors
    /// When a part cannot start: a port that is taken, a cgroup that cannot be made.
    pub async fn run(self) -> Result<(), AgentError> {
        let (node, handle) = Node::new(
            self.runtime.clone(),
            self.config.clone(),
            self.clients.clone(),
        );
        let context = launch_context(&self.config, &handle);
        self.ensure_qos_tree(&context, &handle)?;
        let pace = EventPace {
            qps: self.config.event_qps,
            burst: self.config.event_burst,
        };
        let (events, poster) = EventSink::new(&self.config.node_name, pace);
        let index = PodIndex::new();
        let access = Arc::new(Access::open(
            &self.config.root_dir,
            self.config.images.verification.clone(),
            &self.runtime.list(),
        ));
        let (orders, evictions) = mpsc::channel(EVICTIONS);
        let parts = PodParts {
            events: &events,
            index: &index,
            node: &handle,
            access: access.clone(),
            evictions,
        };
        let volumes = self.start_pods(context, parts)?;
        let stats = self.stats(&index, volumes);
        if self.config.is_standalone() {
            info!("Standalone: only static pods are run, no Node is registered");
            self.tracker.spawn(poster.log(self.stop.clone()));
        } else {
            let client = self.clients.main.clone();
            self.tracker.spawn(poster.run(client, self.stop.clone()));
            self.tracker.spawn(node.run(self.stop.clone()));
        }
        let collector = ImageGc::new(
            self.runtime.clone(),
            index.clone(),
            events.clone(),
            &self.config.node_name,
            Policy::from(&self.config.images),
        )
        .with_access(access.clone());
        let evictor = Evictor {
            runtime: self.runtime.clone(),
            config: self.config.clone(),
            index: index.clone(),
            stats: stats.clone(),
            node: handle,
            events: events.clone(),
            orders,
            images: collector.reclaim(),
        };
        self.tracker.spawn(collector.run(self.stop.clone()));
        self.tracker.spawn(evictor.run(self.stop.clone()));
        let compressor = compress::run(
            self.runtime.clone(),
            self.config.container_log_monitor_interval,
            self.stop.clone(),
        );
        self.tracker.spawn(compressor);
        let ended = self.serve(index, stats).await;

        self.stop.cancel();
        self.tracker.close();
        if tokio::time::timeout(SHUTDOWN, self.tracker.wait())
            .await
            .is_err()
        {
            warn!(tasks = self.tracker.len(), "Some tasks did not end in time");
        }
        info!("The agent has ended; pods go on");
        ended
    }

    /// The pipeline from the apiserver's watch to containers and back; returns the volumes, for
    /// those who measure them.
    fn start_pods(
        &self,
        context: LaunchContext,
        parts: PodParts<'_>,
    ) -> Result<Volumes, AgentError> {
        let PodParts {
            events,
            index,
            node,
            access,
            evictions,
        } = parts;
        let client = self.clients.main.clone();
        let objects = Arc::new(Objects::new(client.clone()));
        let context = Arc::new(arc_swap::ArcSwap::from_pointee(context));
        let drivers = Drivers::new(client.clone());
        let settings = VolumesConfig {
            root_dir: self.config.root_dir.clone(),
            context: context.clone(),
            events: events.clone(),
            node_name: self.config.node_name.clone(),
            node: node.clone(),
            drivers: drivers.clone(),
        };
        self.start_plugins(drivers, node);
        let volumes = Volumes::new(settings, objects.clone(), client.clone())
            .map_err(|e| AgentError::Volumes(e.to_string()))?;
        let (ids, max_pods) = (self.config.ids_per_pod, self.config.max_pods);
        let user_namespaces = userns::pool(Path::new("/etc"), ids)
            .and_then(|pool| UserNamespaces::open(&self.config.root_dir, pool, ids, max_pods))
            .map_err(|e| AgentError::UserNamespaces(e.to_string()))?;
        let kept = volumes.clone();
        let images = ImagePuller::new(self.runtime.clone(), events.clone(), &self.config.images)
            .with_providers(self.credential_providers()?)
            .with_access(access);
        let environment = Arc::new(NodeEnvironment {
            runtime: self.runtime.clone(),
            context,
            node: node.clone(),
            allowed_unsafe_sysctls: self.config.allowed_unsafe_sysctls.clone(),
            objects: objects.clone(),
            volumes,
            events: events.clone(),
            images: Arc::new(images),
            client: NodeClient(client.clone()),
            burstable: Burstable::default(),
            user_namespaces,
        });
        let (verdicts, probe_updates) = mpsc::channel(VERDICTS);
        let probes = Probes::new(
            self.runtime.clone(),
            events.clone(),
            verdicts,
            self.tracker.clone(),
            self.stop.clone(),
        );
        let publisher = StatusPublisher::default();
        let publish = publisher.task(KubeStatusApi::new(client.clone()));
        self.tracker.spawn(publish.run(self.stop.clone()));
        let mirrors = Mirrors::new(publisher.clone(), index.clone());
        let deps = Arc::new(WorkerDeps {
            runtime: self.runtime.clone(),
            environment,
            probes,
            events: events.clone(),
            publisher,
            index: index.clone(),
            backoff: BackoffLimits::up_to(self.config.crash_loop_max),
            clock: Clock::Wall,
            room: Arc::default(),
        });
        let (changes_tx, changes) = mpsc::channel(source::QUEUE);
        let (retry, retries) = mpsc::channel(source::QUEUE);
        let inputs = Inputs {
            changes,
            probes: probe_updates,
            objects: retries,
            evictions,
            heartbeat: Arc::clone(&self.heartbeat),
        };
        let manager = Manager::with_sources(deps, self.sources(), mirrors.clone());
        self.tracker.spawn(manager.run(inputs, self.stop.clone()));
        self.tracker
            .spawn(follow_objects(objects, retry, self.stop.clone()));
        self.start_sources(&changes_tx, events);
        if !self.config.is_standalone() {
            let keeper = Keeper::new(mirrors, client, node.clone());
            self.tracker.spawn(keeper.run(self.stop.clone()));
        }
        Ok(kept)
    }

    /// Drivers that register, and what the cluster hears of them.
    fn start_plugins(&self, drivers: Drivers, node: &NodeHandle) {
        if self.config.is_standalone() {
            return;
        }
        let (client, name) = (self.clients.main.clone(), &self.config.node_name);
        let writer = CsiNodeWriter::new(client, node.clone(), name);
        self.tracker.spawn(writer.clone().init(self.stop.clone()));
        let registry = self.config.root_dir.join("plugins_registry");
        let csi = CsiPlugins::new(drivers, writer);
        let plugins = Plugins::new(registry, vec![Box::new(csi)]);
        self.tracker.spawn(plugins.run(self.stop.clone()));
    }

    /// Where pods come from, as configured.
    fn sources(&self) -> Vec<Source> {
        let config = &self.config;
        [
            (Source::Api, !config.is_standalone()),
            (Source::File, !config.static_pod_path.as_os_str().is_empty()),
            (Source::Http, !config.static_pod_url.is_empty()),
        ]
        .into_iter()
        .filter_map(|(source, used)| used.then_some(source))
        .collect()
    }

    /// Starts the sources. The directory is looked at before the apiserver is asked: when a node
    /// comes up, its own pods are admitted first.
    fn start_sources(&self, changes: &mpsc::Sender<PodChange>, events: &EventSink) {
        let (config, stop) = (&self.config, &self.stop);
        let looked = CancellationToken::new();
        for source in self.sources() {
            let (changes, stop, node) = (changes.clone(), stop.clone(), config.node_name.clone());
            match source {
                Source::Api => {
                    let (client, looked) = (self.clients.main.clone(), looked.clone());
                    self.tracker.spawn(async move {
                        let _ = tokio::time::timeout(FIRST_LOOK, looked.cancelled()).await;
                        source::apiserver::run(client, node, changes, stop).await;
                    });
                }
                Source::File => {
                    let settings = FileSettings {
                        path: config.static_pod_path.clone(),
                        node,
                        check: config.file_check_frequency,
                        looked: looked.clone(),
                    };
                    let events = events.clone();
                    self.tracker
                        .spawn(source::file::run(settings, events, changes, stop));
                }
                Source::Http => {
                    let settings = HttpSettings {
                        url: config.static_pod_url.clone(),
                        headers: config.static_pod_url_headers.clone(),
                        node,
                        check: config.http_check_frequency,
                    };
                    let events = events.clone();
                    self.tracker
                        .spawn(source::http::run(settings, events, changes, stop));
                }
            }
        }
        if config.static_pod_path.as_os_str().is_empty() {
            looked.cancel();
        }
    }

    /// The programs that give credentials for images.
    fn credential_providers(&self) -> Result<Providers, AgentError> {
        let Some((config, programs)) = &self.config.images.credential_providers else {
            return Ok(Providers::default());
        };
        Ok(Providers::load(config, programs)?)
    }

    /// Serves until stopped, or until a listener fails.
    async fn serve(&self, index: PodIndex, stats: Arc<Stats<R>>) -> Result<(), AgentError> {
        let settings = &self.config.server;
        let health = async {
            if settings.healthz.port() == 0 {
                self.stop.cancelled().await;
                return Ok(());
            }
            let (tracker, stop) = (self.tracker.clone(), self.stop.clone());
            server::serve_health(settings.healthz, self.problem(), tracker, stop)
                .await
                .map_err(|e| AgentError::Serve {
                    what: "healthz",
                    message: e.to_string(),
                })
        };
        let api = async {
            if !settings.enabled {
                self.stop.cancelled().await;
                return Ok(());
            }
            let server = self.server(index, stats);
            server::serve(server, self.stop.clone())
                .await
                .map_err(|e| AgentError::Serve {
                    what: "the HTTPS API",
                    message: e.to_string(),
                })
        };
        tokio::try_join!(health, api).map(drop)
    }

    /// What measures the node and its pods.
    fn stats(&self, index: &PodIndex, volumes: Volumes) -> Arc<Stats<R>> {
        let paths = move |uid: &str| volumes.places(uid);
        Arc::new(Stats::new(
            self.runtime.clone(),
            self.config.clone(),
            index.clone(),
            Arc::new(paths),
        ))
    }

    /// What is wrong with the pod loop.
    fn problem(&self) -> server::Problem {
        let heartbeat = Arc::clone(&self.heartbeat);
        Arc::new(move || heartbeat.problem())
    }

    /// The HTTPS API's parts.
    fn server(&self, index: PodIndex, stats: Arc<Stats<R>>) -> Server<R> {
        let config = &self.config;
        let client = self.clients.main.clone();
        let credentials = self.clients.credentials.clone();
        Server {
            config: config.clone(),
            runtime: self.runtime.clone(),
            auth: Auth::new(client, &config.node_name, config.server.clone()),
            tracker: self.tracker.clone(),
            stop: self.stop.clone(),
            stats,
            index,
            machine: Arc::new(machine::machine()),
            problem: self.problem(),
            certificate_ttl_s: Arc::new(move || credentials.ttl_s()),
            cgroup_v2: Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
            started: jiff::Timestamp::now(),
        }
    }

    /// Makes the cgroups that hold pods, limited to what pods may use.
    fn ensure_qos_tree(
        &self,
        context: &LaunchContext,
        handle: &NodeHandle,
    ) -> Result<(), AgentError> {
        let allocatable = capacity::enforced(handle.capacity(), &self.config);
        let limits = if self.config.enforce_pods_allocatable {
            let cpu = allocatable.get("cpu").map_or(0, |q| q.milli_value());
            let memory = allocatable.get("memory").map_or(0, |q| q.value());
            qos::node_resources(cpu, memory, None)
        } else {
            Resources::default()
        };
        for (path, resources) in qos::tree(context, limits, []) {
            self.runtime
                .ensure_cgroup(&path, &resources)
                .map_err(|e| AgentError::Cgroup {
                    path,
                    message: e.message,
                })?;
        }
        Ok(())
    }
}

/// Tells the manager in which namespaces an object changed.
async fn follow_objects(
    objects: Arc<Objects>,
    retry: mpsc::Sender<String>,
    stop: CancellationToken,
) {
    let mut changes = objects.changes();
    loop {
        let change = tokio::select! {
            () = stop.cancelled() => return,
            change = changes.recv() => change,
        };
        match change {
            Ok(change) => {
                if retry.send(change.namespace).await.is_err() {
                    return;
                }
            }
            // Their own back-off tries again.
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                warn!(missed, "Object changes missed");
            }
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

/// The node in launch's words.
fn launch_context(config: &Config, handle: &NodeHandle) -> LaunchContext {
    let resolv_conf = (!config.resolv_conf.as_os_str().is_empty()).then(|| {
        let text = read_text(&config.resolv_conf);
        dns::parse_resolv_conf(&text)
    });
    let allocatable = handle.allocatable().iter();
    LaunchContext {
        node_name: config.node_name.clone(),
        host_ips: handle.host_ips().to_vec(),
        allocatable: allocatable
            .map(|(name, amount)| {
                let amount = amount.to_string();
                (
                    name.clone(),
                    k8s_openapi::apimachinery::pkg::api::resource::Quantity(amount),
                )
            })
            .collect::<BTreeMap<_, _>>(),
        memory_capacity: handle.capacity().get("memory").map_or(0, |q| q.value()),
        cluster_dns: config.cluster_dns.clone(),
        cluster_domain: config.cluster_domain.clone(),
        host_dns: resolv_conf,
        host_hosts: read_text(Path::new("/etc/hosts")),
        kubepods: match config.cgroup_driver {
            crate::config::CgroupDriver::Cgroupfs => "/kubepods",
            crate::config::CgroupDriver::Systemd => "/kubepods.slice",
        }
        .to_owned(),
        cpu_cfs_quota: config.cpu_cfs_quota,
        cpu_cfs_period_us: u64::try_from(config.cpu_cfs_quota_period.as_micros())
            .unwrap_or(100_000),
        cgroup_v2: Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
        single_process_oom_kill: config.single_process_oom_kill,
        pod_pids_limit: Some(config.pod_pids_limit).filter(|limit| *limit > 0),
        hugepage_sizes: hugepage_sizes(),
        seccomp_default: config.seccomp_default,
        seccomp_root: config.root_dir.join("seccomp"),
        masked_paths: throttle_counts(),
        root_dir: config.root_dir.clone(),
        pod_logs_dir: config.pod_logs_dir.clone(),
        log_max_bytes: config.container_log_max_size,
        log_max_files: config.container_log_max_files,
    }
}

/// A small text file of the machine; empty, and said so, when it cannot be read.
fn read_text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| {
        warn!(path = %path.display(), %error, "File cannot be read, going on without");
        String::new()
    })
}

/// Counts of each CPU's throttling for heat: they tell neighbours apart by their load.
fn throttle_counts() -> Vec<String> {
    let cpus = Path::new("/sys/devices/system/cpu");
    let names = linux::fs::list_dir(cpus).unwrap_or_default();
    let of_cpus = names.iter().filter_map(|name| {
        let number = name.to_str()?.strip_prefix("cpu")?;
        let path = cpus.join(name).join("thermal_throttle");
        (number.parse::<u32>().is_ok() && path.exists()).then(|| path.display().to_string())
    });
    of_cpus.collect()
}

/// Huge page sizes as cgroups call them: `2MB`, `1GB`.
fn hugepage_sizes() -> Vec<String> {
    let names = linux::fs::list_dir(Path::new("/sys/kernel/mm/hugepages")).unwrap_or_default();
    let sizes = names.iter().filter_map(|name| {
        let kilobytes = name
            .to_str()?
            .strip_prefix("hugepages-")?
            .strip_suffix("kB")?;
        let kilobytes: u64 = kilobytes.parse().ok()?;
        Some(match kilobytes {
            k if k >= 1 << 20 => format!("{}GB", k >> 20),
            k if k >= 1 << 10 => format!("{}MB", k >> 10),
            k => format!("{k}KB"),
        })
    });
    sizes.collect()
}
