//! Collects: asks engine, kernel and disk, and puts the answers into the stock shape.

use super::disk::{DiskCache, Reader};
use super::machine::{self, MachineUsage};
use super::rates::Rates;
use super::summary::{
    ContainerStats, CpuStats, FsStats, InterfaceStats, IoStats, MemoryStats, NetworkStats,
    NodeStats, PodReference, PodStats, ProcessStats, PsiData, PsiStats, PvcReference, RlimitStats,
    RuntimeStats, Summary, SwapStats, Time, VolumeStats,
};
use crate::config::Config;
use crate::pod::index::{PodEntry, PodIndex};
use crate::volumes::{Fill, VolumePlace};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Volume;
use linux::diskusage::DiskUsage;
use linux::netdev::Interface;
use runtime::service::{
    CgroupStats, ContainerState, ContainerStatus, ImageService, Pressure, RuntimeService,
    SandboxState, SandboxStatus, Stall,
};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// The interface whose numbers stand for a pod's network.
const DEFAULT_INTERFACE: &str = "eth0";
/// Interfaces that are the other ends of pods, or go nowhere.
const INNER_INTERFACES: [&str; 4] = ["lo", "veth", "docker", "nerdctl"];
/// The cgroup of all pods.
pub(super) const KUBEPODS: &str = "/kubepods";

/// Tells where the volumes of a pod (by UID) are: names and directories of those that are there.
pub type VolumePaths = Arc<dyn Fn(&str) -> Vec<VolumePlace> + Send + Sync>;

/// The collector. One per agent; it remembers CPU rates and disk use between calls.
pub struct Stats<R> {
    pub(super) runtime: Arc<R>,
    pub(super) config: Arc<Config>,
    index: PodIndex,
    volumes: VolumePaths,
    /// Cgroups of the whole machine, to find our own.
    machine: Option<Box<dyn linux::cgroup::Cgroups>>,
    own_cgroup: Option<String>,
    pub(super) rates: Rates,
    pub(super) disk: DiskCache,
    started: Time,
    boot: Time,
}

impl<R> std::fmt::Debug for Stats<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stats")
            .field("own_cgroup", &self.own_cgroup)
            .finish_non_exhaustive()
    }
}

/// A pod that has a sandbox, and its running containers by name.
#[derive(Debug)]
pub(super) struct PodView {
    pub(super) sandbox: SandboxStatus,
    pub(super) entry: Option<Arc<PodEntry>>,
    pub(super) containers: BTreeMap<String, ContainerStatus>,
}

/// When a running container was started, nanoseconds since the epoch.
pub(super) fn started_ns(container: &ContainerStatus) -> i64 {
    match container.state {
        ContainerState::Running { started_at_ns, .. } => started_at_ns,
        ContainerState::Created | ContainerState::Exited { .. } => 0,
    }
}

/// Our cgroup as `/proc/self/cgroup` tells: that of the memory controller, or the only one.
fn own_cgroup(text: &str) -> Option<String> {
    let lines = || {
        text.lines()
            .filter_map(|l| l.split_once(':')?.1.split_once(':'))
    };
    let memory = lines().find(|(controllers, _)| controllers.split(',').any(|c| c == "memory"));
    let found = memory.or_else(|| lines().find(|(controllers, _)| controllers.is_empty()));
    // At the root there is nothing that is ours alone.
    found.map(|(_, path)| path.to_owned()).filter(|p| p != "/")
}

impl<R: RuntimeService + ImageService> Stats<R> {
    /// A collector for this node.
    pub fn new(
        runtime: Arc<R>,
        config: Arc<Config>,
        index: PodIndex,
        volumes: VolumePaths,
    ) -> Self {
        let text = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let boot = machine::boot_time_s().and_then(|s| Timestamp::from_second(s).ok());
        Self {
            runtime,
            config,
            index,
            volumes,
            machine: linux::cgroup::detect("/").ok(),
            own_cgroup: own_cgroup(&text),
            rates: Rates::default(),
            disk: DiskCache::default(),
            started: Time(Timestamp::now()),
            boot: Time(boot.unwrap_or_default()),
        }
    }

    /// What `/stats/summary` tells. Blocks: reads a few files per cgroup, and walks directories
    /// that were never measured (for two seconds at most).
    pub fn summary(&self) -> Summary {
        let now = Timestamp::now();
        let reader = self.disk.reader();
        let nodefs = Filesystem::of(&self.config.root_dir);
        let imagefs = Filesystem::of(&self.config.runtime_root);
        let disks = Disks {
            reader: &reader,
            nodefs: nodefs.as_ref(),
            imagefs: imagefs.as_ref(),
            time: Time(now),
        };
        let views = self.views();
        let pods: Vec<PodStats> = views
            .iter()
            .filter_map(|view| {
                let mut pod = self.pod(view)?;
                self.add_disk(&mut pod, view, &disks);
                pod.network = self.network(view);
                Some(pod)
            })
            .collect();
        let mut node = self.whole_node(now, nodefs.as_ref());
        node.network = linux::netdev::interfaces(None)
            .ok()
            .map(|all| network(Time(now), &all));
        node.runtime = imagefs.as_ref().map(|fs| self.runtime_fs(fs, &pods, now));
        self.disk.prune();
        self.rates.prune(now_ns(now));
        Summary { node, pods }
    }

    /// What the node has left, without its pods. Blocks shortly.
    pub fn node_only(&self) -> Summary {
        let now = Timestamp::now();
        let nodefs = Filesystem::of(&self.config.root_dir);
        let imagefs = Filesystem::of(&self.config.runtime_root);
        let mut node = self.whole_node(now, nodefs.as_ref());
        node.runtime = imagefs.as_ref().map(|fs| self.runtime_fs(fs, &[], now));
        Summary {
            node,
            pods: Vec::new(),
        }
    }

    /// The node with its filesystem and processes.
    fn whole_node(&self, now: Timestamp, nodefs: Option<&Filesystem>) -> NodeStats {
        let mut node = self.node(now);
        node.fs = nodefs.map(|fs| fs.stats(Time(now), None));
        if let Some(fs) = &mut node.fs {
            fs.used_bytes = nodefs.map(Filesystem::used);
            fs.inodes_used = nodefs.map(Filesystem::inodes_used);
        }
        node.rlimit = Some(rlimit(now));
        node
    }

    /// The part that `only_cpu_and_memory=true` and `/metrics/resource` want. Blocks shortly.
    pub fn cpu_and_memory(&self) -> Summary {
        let views = self.views();
        let mut node = self.node(Timestamp::now());
        node.io = None;
        node.system_containers.iter_mut().for_each(|c| c.io = None);
        let small = |mut pod: PodStats| {
            pod.io = None;
            pod.process_stats = None;
            pod.containers.iter_mut().for_each(|c| c.io = None);
            pod
        };
        let pods = views.iter().filter_map(|view| self.pod(view)).map(small);
        Summary {
            node,
            pods: pods.collect(),
        }
    }

    /// Pods with a ready sandbox, by UID.
    pub(super) fn views(&self) -> Vec<PodView> {
        let mut views: BTreeMap<String, PodView> = BTreeMap::new();
        let ready = |s: &SandboxStatus| s.state == SandboxState::Ready;
        for sandbox in self.runtime.list_sandboxes().into_iter().filter(ready) {
            let known = views.get(&sandbox.config.uid);
            if known.is_some_and(|k| k.sandbox.created_at_ns >= sandbox.created_at_ns) {
                continue;
            }
            let view = PodView {
                entry: self.index.by_uid(&sandbox.config.uid),
                containers: BTreeMap::new(),
                sandbox,
            };
            views.insert(view.sandbox.config.uid.clone(), view);
        }
        let mut views: Vec<PodView> = views.into_values().collect();
        let mut places: BTreeMap<_, usize> = BTreeMap::new();
        for (place, view) in views.iter().enumerate() {
            places.insert(view.sandbox.id.clone(), place);
        }
        for container in self.runtime.list_containers(None) {
            let place = places.get(&container.sandbox_id).copied();
            if let (Some(place), ContainerState::Running { .. }) = (place, &container.state) {
                let name = container.config.name.clone();
                views[place].containers.insert(name, container);
            }
        }
        views
    }

    fn node(&self, now: Timestamp) -> NodeStats {
        let usage = machine::usage();
        let time = Time(now);
        let rate = self.rates.observe("/", now_ns(now), usage.cpu_usage_ns, 0);
        let (psi_cpu, psi_memory, psi_io) = psi(usage.pressure.as_ref());
        NodeStats {
            node_name: self.config.node_name.clone(),
            start_time: self.boot,
            system_containers: self.system_containers(),
            cpu: Some(CpuStats {
                time,
                usage_nano_cores: rate.or_else(|| self.since_boot(now, &usage)),
                usage_core_nano_seconds: Some(usage.cpu_usage_ns),
                psi: psi_cpu,
            }),
            memory: Some(MemoryStats {
                time,
                available_bytes: Some(usage.memory_total.saturating_sub(usage.memory_working_set)),
                usage_bytes: Some(usage.memory_usage),
                working_set_bytes: Some(usage.memory_working_set),
                rss_bytes: Some(usage.memory_rss),
                page_faults: Some(usage.page_faults),
                major_page_faults: Some(usage.major_page_faults),
                psi: psi_memory,
            }),
            io: Some(IoStats { time, psi: psi_io }),
            swap: Some(SwapStats {
                time,
                swap_available_bytes: Some(usage.swap_total.saturating_sub(usage.swap_usage)),
                swap_usage_bytes: Some(usage.swap_usage),
            }),
            ..NodeStats::default()
        }
    }

    fn since_boot(&self, now: Timestamp, usage: &MachineUsage) -> Option<u64> {
        let up = now.as_second() - self.boot.0.as_second();
        usage.cpu_usage_ns.checked_div(u64::try_from(up).ok()?)
    }

    /// The agent, the runtime (which is the agent too) and all pods.
    fn system_containers(&self) -> Vec<ContainerStats> {
        let mut all = Vec::new();
        let own = self.own_cgroup.as_deref().zip(self.machine.as_ref());
        if let Some(stats) = own.and_then(|(path, cgroups)| cgroups.stats(path)) {
            let stats = CgroupStats::from(&stats);
            // The cgroup may be older than this agent: its use in all says nothing of our life.
            let kubelet = ContainerStats {
                start_time: self.started,
                ..self.cgroup("kubelet", "kubelet", &stats, Time::default())
            };
            let runtime = ContainerStats {
                name: "runtime".to_owned(),
                ..kubelet.clone()
            };
            all.extend([kubelet, runtime]);
        }
        if let Some(stats) = self.runtime.cgroup_stats(KUBEPODS) {
            all.push(self.cgroup("pods", KUBEPODS, &stats, self.boot));
        }
        all
    }

    /// A pod's CPU, memory and containers; none before its start time is known.
    fn pod(&self, view: &PodView) -> Option<PodStats> {
        let start = view.entry.as_ref()?.status.start_time.as_ref()?.0;
        let config = &view.sandbox.config;
        let containers = view.containers.values().filter_map(|container| {
            let stats = self.runtime.container_stats(&container.id)?;
            let start = Time::from_ns(started_ns(container));
            Some(self.cgroup(&container.config.name, container.id.as_str(), &stats, start))
        });
        let mut pod = PodStats {
            pod_ref: PodReference {
                name: config.name.clone(),
                namespace: config.namespace.clone(),
                uid: config.uid.clone(),
            },
            start_time: Time(start),
            containers: containers.collect(),
            ..PodStats::default()
        };
        if let Some(stats) = self.runtime.cgroup_stats(&config.cgroup_parent) {
            let start = Time::from_ns(view.sandbox.created_at_ns);
            let whole = self.cgroup("", &config.cgroup_parent, &stats, start);
            pod.cpu = whole.cpu;
            pod.memory = whole.memory;
            pod.io = whole.io;
            pod.swap = whole.swap;
            pod.process_stats = Some(ProcessStats {
                process_count: stats.pids,
            });
        }
        Some(pod)
    }

    /// One cgroup in the stock shape; `key` finds its CPU rate again.
    fn cgroup(&self, name: &str, key: &str, stats: &CgroupStats, start: Time) -> ContainerStats {
        let time = Time::from_ns(stats.time_ns);
        let start_ns = now_ns(start.0);
        let rate = self
            .rates
            .observe(key, stats.time_ns, stats.cpu_usage_ns, start_ns);
        let working_set = stats.memory_working_set_bytes;
        let (psi_cpu, psi_memory, psi_io) = psi(stats.pressure.as_ref());
        let left = |limit: Option<u64>, used| limit.map(|l| l.saturating_sub(used));
        ContainerStats {
            name: name.to_owned(),
            start_time: start,
            cpu: Some(CpuStats {
                time,
                usage_nano_cores: rate,
                usage_core_nano_seconds: Some(stats.cpu_usage_ns),
                psi: psi_cpu,
            }),
            memory: Some(MemoryStats {
                time,
                available_bytes: left(stats.memory_limit_bytes, working_set),
                usage_bytes: Some(stats.memory_usage_bytes),
                working_set_bytes: Some(working_set),
                rss_bytes: Some(stats.memory_rss_bytes),
                page_faults: Some(stats.page_faults),
                major_page_faults: Some(stats.major_page_faults),
                psi: psi_memory,
            }),
            io: Some(IoStats { time, psi: psi_io }),
            swap: Some(SwapStats {
                time,
                swap_available_bytes: left(stats.swap_limit_bytes, stats.swap_usage_bytes),
                swap_usage_bytes: Some(stats.swap_usage_bytes),
            }),
            ..ContainerStats::default()
        }
    }

    /// Interfaces of a pod, as its shim sees them.
    fn network(&self, view: &PodView) -> Option<NetworkStats> {
        let all = pod_interfaces(view)?;
        Some(network(Time(Timestamp::now()), &all))
    }

    /// Disk use of containers, logs and volumes.
    fn add_disk(&self, pod: &mut PodStats, view: &PodView, disks: &Disks<'_>) {
        for stats in &mut pod.containers {
            let Some(container) = view.containers.get(&stats.name) else {
                continue;
            };
            stats.rootfs = disks.rootfs(self.written(container, disks.reader));
            let logs = container.log_path.parent();
            stats.logs = disks.logs(logs.and_then(|dir| disks.reader.usage(dir)));
        }
        pod.volume_stats = self.volume_stats(view, disks);
        let hosts = self.config.root_dir.join("pods");
        let hosts = hosts.join(&view.sandbox.config.uid).join("etc-hosts");
        pod.ephemeral_storage = disks.ephemeral(pod, disks.reader.usage(&hosts));
    }

    /// What a container wrote to its own root filesystem.
    pub(super) fn written(
        &self,
        container: &ContainerStatus,
        reader: &Reader<'_>,
    ) -> Option<DiskUsage> {
        let place = self.runtime.container_place(&container.id)?;
        let mut sum = None;
        for usage in place.writable.iter().filter_map(|dir| reader.usage(dir)) {
            let sum: &mut DiskUsage = sum.get_or_insert_default();
            sum.bytes += usage.bytes;
            sum.inodes += usage.inodes;
        }
        sum
    }

    fn volume_stats(&self, view: &PodView, disks: &Disks<'_>) -> Vec<VolumeStats> {
        let Some(entry) = &view.entry else {
            return Vec::new();
        };
        let spec = entry.pod.spec.as_ref();
        let declared: BTreeMap<&str, &Volume> = spec
            .iter()
            .flat_map(|s| s.volumes.iter().flatten())
            .map(|v| (v.name.as_str(), v))
            .collect();
        let config = &view.sandbox.config;
        let one = |place: VolumePlace| {
            let volume = declared.get(place.name.as_str())?;
            disks.volume(volume, &place, &config.namespace, &config.name)
        };
        let places = self.volume_places(&config.uid);
        places.into_iter().filter_map(one).collect()
    }

    /// Where a pod's volumes are.
    pub(super) fn volume_places(&self, uid: &str) -> Vec<VolumePlace> {
        (self.volumes)(uid)
    }

    fn runtime_fs(&self, fs: &Filesystem, pods: &[PodStats], now: Timestamp) -> RuntimeStats {
        let mut image_fs = fs.stats(Time(now), None);
        image_fs.used_bytes = Some(ImageService::fs_usage(&*self.runtime).used_bytes);
        image_fs.inodes_used = Some(fs.inodes_used());
        let mut container_fs = image_fs.clone();
        let layers = pods.iter().flat_map(|p| &p.containers);
        let written = layers.filter_map(|c| c.rootfs.as_ref()?.used_bytes);
        container_fs.used_bytes = Some(written.sum());
        RuntimeStats {
            image_fs,
            container_fs,
        }
    }
}

/// Interfaces of a pod; none when its shim is gone.
pub(super) fn pod_interfaces(view: &PodView) -> Option<Vec<Interface>> {
    let pid = view.sandbox.shim_pid;
    let pid = (pid > 0).then_some(pid)?;
    linux::netdev::interfaces(Some(pid)).ok()
}

/// Interfaces worth telling about.
pub(super) fn outer(all: &[Interface]) -> impl Iterator<Item = &Interface> {
    all.iter()
        .filter(|i| !INNER_INTERFACES.iter().any(|p| i.name.starts_with(p)))
}

fn network(time: Time, all: &[Interface]) -> NetworkStats {
    let one = |i: &Interface| InterfaceStats {
        name: i.name.clone(),
        rx_bytes: Some(i.rx_bytes),
        rx_errors: Some(i.rx_errors),
        tx_bytes: Some(i.tx_bytes),
        tx_errors: Some(i.tx_errors),
    };
    let interfaces: Vec<_> = outer(all).map(one).collect();
    let default = interfaces.iter().find(|i| i.name == DEFAULT_INTERFACE);
    NetworkStats {
        time,
        default: default.cloned().unwrap_or_default(),
        interfaces,
    }
}

fn now_ns(at: Timestamp) -> i64 {
    i64::try_from(at.as_nanosecond()).unwrap_or(i64::MAX)
}

fn rlimit(now: Timestamp) -> RlimitStats {
    let usage = crate::node::machine::usage(Path::new("/"), Path::new("/"));
    let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    RlimitStats {
        time: Time(now),
        maxpid: number(usage.pid_max),
        curproc: number(usage.pids),
    }
}

/// CPU, memory, IO. Where the kernel does not tell, zeros, as the stock kubelet has them.
fn psi(pressure: Option<&[Pressure; 3]>) -> (Option<PsiStats>, Option<PsiStats>, Option<PsiStats>) {
    let data = |s: &Stall| PsiData {
        total: s.total_us,
        avg10: s.avg10,
        avg60: s.avg60,
        avg300: s.avg300,
    };
    let one = |p: &Pressure| {
        Some(PsiStats {
            full: data(&p.full),
            some: data(&p.some),
        })
    };
    let [cpu, memory, io] = pressure.copied().unwrap_or_default();
    (one(&cpu), one(&memory), one(&io))
}

/// A filesystem, as statvfs(3) tells of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Filesystem {
    pub(super) capacity: u64,
    free: u64,
    pub(super) available: u64,
    pub(super) inodes: u64,
    pub(super) inodes_free: u64,
}

impl Filesystem {
    pub(super) fn of(path: &Path) -> Option<Self> {
        let stat = rustix::fs::statvfs(path).ok()?;
        Some(Self {
            capacity: stat.f_blocks.saturating_mul(stat.f_frsize),
            free: stat.f_bfree.saturating_mul(stat.f_frsize),
            available: stat.f_bavail.saturating_mul(stat.f_frsize),
            inodes: stat.f_files,
            inodes_free: stat.f_ffree,
        })
    }

    /// That of a volume, from whoever may be asked.
    pub(super) fn in_place(place: &VolumePlace) -> Option<Self> {
        match place.fill {
            Fill::Ask => Self::of(&place.path),
            Fill::Told(told) => told.map(|u| Self {
                capacity: u.capacity,
                free: u.capacity.saturating_sub(u.used),
                available: u.available,
                inodes: u.inodes,
                inodes_free: u.inodes_free,
            }),
        }
    }

    pub(super) fn used(&self) -> u64 {
        self.capacity.saturating_sub(self.free)
    }

    pub(super) fn inodes_used(&self) -> u64 {
        self.inodes.saturating_sub(self.inodes_free)
    }

    fn stats(&self, time: Time, usage: Option<DiskUsage>) -> FsStats {
        FsStats {
            time,
            available_bytes: Some(self.available),
            capacity_bytes: Some(self.capacity),
            used_bytes: usage.map(|u| u.bytes),
            inodes_free: Some(self.inodes_free),
            inodes: Some(self.inodes),
            inodes_used: usage.map(|u| u.inodes),
        }
    }
}

/// The node's disks for one summary.
struct Disks<'a> {
    reader: &'a Reader<'a>,
    nodefs: Option<&'a Filesystem>,
    imagefs: Option<&'a Filesystem>,
    time: Time,
}

impl Disks<'_> {
    fn rootfs(&self, usage: Option<DiskUsage>) -> Option<FsStats> {
        self.imagefs.map(|fs| fs.stats(self.time, usage))
    }

    fn logs(&self, usage: Option<DiskUsage>) -> Option<FsStats> {
        self.nodefs.map(|fs| fs.stats(self.time, usage))
    }

    /// A volume that has a size of its own: hostPath has none, nor has what is of no known kind.
    fn volume(
        &self,
        volume: &Volume,
        place: &VolumePlace,
        namespace: &str,
        pod: &str,
    ) -> Option<VolumeStats> {
        let claim = match (&volume.persistent_volume_claim, &volume.ephemeral) {
            (Some(claim), _) => Some(claim.claim_name.clone()),
            (None, Some(_)) => Some(format!("{pod}-{}", volume.name)),
            (None, None) => None,
        };
        let files = volume.config_map.is_some()
            || volume.secret.is_some()
            || volume.projected.is_some()
            || volume.downward_api.is_some();
        let medium = volume
            .empty_dir
            .as_ref()
            .map(|e| e.medium.clone().unwrap_or_default());
        let path = &place.path;
        let fs = Filesystem::in_place(place)?;
        let stats = if claim.is_some() || volume.csi.is_some() {
            FsStats {
                used_bytes: Some(fs.used()),
                inodes_used: Some(fs.inodes_used()),
                ..fs.stats(self.time, None)
            }
        } else if files || medium.is_some() {
            fs.stats(self.time, self.reader.usage(path))
        } else {
            return None;
        };
        Some(VolumeStats {
            fs: stats,
            name: volume.name.clone(),
            pvc_ref: claim.map(|name| PvcReference {
                name,
                namespace: namespace.to_owned(),
            }),
            ephemeral: medium.is_some_and(|m| m.is_empty()) || volume.config_map.is_some(),
        })
    }

    /// What goes away with the pod: writable layers, logs, volumes on the node's disk, its hosts
    /// file.
    fn ephemeral(&self, pod: &PodStats, hosts: Option<DiskUsage>) -> Option<FsStats> {
        let mut sum = self.nodefs?.stats(self.time, hosts);
        let mut add = |bytes: Option<u64>, inodes: Option<u64>| {
            for (to, from) in [(&mut sum.used_bytes, bytes), (&mut sum.inodes_used, inodes)] {
                if let Some(from) = from {
                    *to = Some(to.unwrap_or(0) + from);
                }
            }
        };
        for container in &pod.containers {
            if let Some(fs) = &container.rootfs {
                add(fs.used_bytes, fs.inodes_used);
            }
            // Inodes of logs are not counted, as in the stock kubelet.
            add(container.logs.as_ref().and_then(|fs| fs.used_bytes), None);
        }
        for volume in pod.volume_stats.iter().filter(|v| v.ephemeral) {
            add(volume.fs.used_bytes, volume.fs.inodes_used);
        }
        Some(sum)
    }
}

#[cfg(test)]
mod own {
    use super::own_cgroup;

    #[test]
    fn our_cgroup_is_that_of_the_memory_controller_or_the_only_one() {
        let v1 = "4:memory:/a\n3:cpu,cpuacct:/b\n0::/c\n";
        assert_eq!(own_cgroup(v1).as_deref(), Some("/a"));
        let v2 = "0::/system.slice/kubelet.service\n";
        assert_eq!(
            own_cgroup(v2).as_deref(),
            Some("/system.slice/kubelet.service")
        );
        assert_eq!(own_cgroup("0::/\n"), None);
        assert_eq!(own_cgroup("garbage"), None);
    }
}
