//! Which pod goes first, and what it is told. Pure.

use super::thresholds::{Observations, Rule, Signal, amount};
use crate::launch::resources::totals_in_use;
use crate::pod::admission::preempt::is_critical;
use crate::pod::spec;
use crate::quantity::{Format, Quantity};
use crate::stats::summary::{ContainerStats, FsStats, PodStats};
use k8s_openapi::api::core::v1::{Container, Pod, Volume};
use std::cmp::Reverse;
use std::fmt::Write as _;
use std::sync::Arc;

/// `status.reason` and event reason of an evicted pod.
pub const EVICTED: &str = "Evicted";
/// How the message of an eviction for the node's sake begins; others are the pod's own fault.
pub const NODE_LOW: &str = "The node was low on resource: ";

/// A pod that runs here, with what it takes.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// The pod.
    pub pod: Arc<Pod>,
    /// What it takes; none when nobody could tell.
    pub stats: Option<PodStats>,
}

/// A pod to evict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Eviction {
    /// Its UID.
    pub uid: String,
    /// For its status and the event.
    pub message: String,
    /// Seconds it has to end.
    pub grace_s: u64,
    /// What the metric calls it.
    pub signal: &'static str,
}

/// Filesystems on which pods have what is theirs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disks {
    /// Images and writable layers are on a filesystem of their own.
    pub dedicated_images: bool,
}

/// What a pod takes of a resource, and what of it it asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Use {
    taken: u64,
    requested: u64,
}

impl Use {
    /// How much more than requested; less sorts lower.
    fn excess(self) -> i128 {
        i128::from(self.taken) - i128::from(self.requested)
    }
}

fn request(pod: &Pod, resource: &str) -> u64 {
    let requests = totals_in_use(pod).unwrap_or_default().requests;
    let asked = requests.get(resource).map_or(0, Quantity::value);
    u64::try_from(asked).unwrap_or(0)
}

fn working_set(stats: &PodStats) -> u64 {
    let memory = stats.memory.as_ref();
    memory.and_then(|m| m.working_set_bytes).unwrap_or(0)
}

/// Volumes whose content is on the node's disk, and the pod's own doing.
fn is_local(volume: &Volume) -> bool {
    let on_disk = volume
        .empty_dir
        .as_ref()
        .is_some_and(|e| e.medium.as_deref().unwrap_or_default() != "Memory");
    on_disk
        || volume.host_path.is_some()
        || volume.config_map.is_some()
        || volume.git_repo.is_some()
        || volume.downward_api.is_some()
}

/// Bytes or inodes of a pod on the filesystem a signal is about.
fn disk_use(pod: &Pod, stats: &PodStats, signal: Signal, disks: Disks) -> u64 {
    let of = |fs: &FsStats| match signal.resource() {
        "inodes" => fs.inodes_used.unwrap_or(0),
        _ => fs.used_bytes.unwrap_or(0),
    };
    let sum = |list: Vec<Option<&FsStats>>| list.into_iter().flatten().map(of).sum::<u64>();
    let images = matches!(signal, Signal::ImageFs | Signal::ImageFsInodes);
    let (layers, rest) = match disks.dedicated_images {
        true => (images, !images),
        false => (true, true),
    };
    let mut taken = 0u64;
    if layers {
        taken += sum(stats.containers.iter().map(|c| c.rootfs.as_ref()).collect());
    }
    if rest {
        taken += sum(stats.containers.iter().map(|c| c.logs.as_ref()).collect());
        let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
        for volume in volumes.filter(|v| is_local(v)) {
            let found = stats.volume_stats.iter().find(|s| s.name == volume.name);
            taken += found.map_or(0, |v| of(&v.fs));
        }
    }
    taken
}

fn use_of(candidate: &Candidate, signal: Signal, disks: Disks) -> Option<Use> {
    let (pod, stats) = (&*candidate.pod, candidate.stats.as_ref()?);
    Some(match signal {
        Signal::Memory | Signal::AllocatableMemory => Use {
            taken: working_set(stats),
            requested: request(pod, "memory"),
        },
        Signal::Pid => Use {
            taken: stats.process_stats.as_ref().map_or(0, |p| p.process_count),
            // Nobody can ask for process ids.
            requested: u64::MAX,
        },
        Signal::NodeFs | Signal::ImageFs => Use {
            taken: disk_use(pod, stats, signal, disks),
            requested: request(pod, "ephemeral-storage"),
        },
        Signal::NodeFsInodes | Signal::ImageFsInodes => Use {
            taken: disk_use(pod, stats, signal, disks),
            requested: 0,
        },
    })
}

/// Puts candidates in the order in which they are to go: those nobody knows anything of, those
/// that take more than they asked for, the less important, those that take most beyond what they
/// asked for.
pub fn rank(candidates: &mut [Candidate], signal: Signal, disks: Disks) {
    candidates.sort_by_cached_key(|candidate| {
        let usage = use_of(candidate, signal, disks);
        let exceeds = usage.is_some_and(|u| u.taken > u.requested);
        let priority = candidate.pod.spec.as_ref().and_then(|s| s.priority);
        (
            usage.is_some(),
            !exceeds,
            priority.unwrap_or(0),
            Reverse(usage.map_or(0, Use::excess)),
        )
    });
}

/// The first of the ranked that may go.
pub fn choose(
    ranked: &[Candidate],
    due: &Rule,
    rules: &[&Rule],
    observations: &Observations,
    max_grace_s: u64,
) -> Option<Eviction> {
    let victim = ranked.iter().find(|c| !is_critical(&c.pod))?;
    let own = spec::grace_seconds(&victim.pod);
    Some(Eviction {
        uid: spec::uid(&victim.pod).to_owned(),
        message: message(victim, due.signal, rules, observations),
        grace_s: match due.grace {
            None => IMMEDIATE_GRACE_S,
            Some(_) => max_grace_s.min(own),
        },
        signal: due.signal.name(),
    })
}

/// Seconds a pod gets when the node cannot wait.
pub const IMMEDIATE_GRACE_S: u64 = 1;

fn bytes(amount: u64) -> Quantity {
    Quantity::from_units(i64::try_from(amount).unwrap_or(i64::MAX), Format::BinarySi)
}

/// Why a pod is evicted, in the stock kubelet's words.
fn message(
    victim: &Candidate,
    signal: Signal,
    rules: &[&Rule],
    observations: &Observations,
) -> String {
    let resource = signal.resource();
    let mut text = format!("{NODE_LOW}{resource}. ");
    let told = rules.iter().find_map(|rule| {
        let seen = observations.get(&rule.signal)?;
        (rule.signal.resource() == resource)
            .then(|| (amount(&rule.least, seen.capacity), seen.available))
    });
    if let Some((least, available)) = told {
        let show = |n: u64| match signal.resource() {
            "inodes" | "pids" => {
                Quantity::from_units(i64::try_from(n).unwrap_or(i64::MAX), Format::DecimalSi)
            }
            _ => bytes(n),
        };
        let (least, available) = (show(least), show(available));
        let _ = write!(
            text,
            "Threshold quantity: {least}, available: {available}. "
        );
    }
    let Some((stats, spec)) = victim.stats.as_ref().zip(victim.pod.spec.as_ref()) else {
        return text;
    };
    let own = spec.resources.as_ref().and_then(|r| r.requests.as_ref());
    if let Some(asked) = own
        .and_then(|r| r.get("memory"))
        .filter(|_| resource == "memory")
    {
        let (name, used) = (spec::name(&victim.pod), bytes(working_set(stats)));
        let asked = &asked.0;
        let _ = write!(
            text,
            "Pod {name} was using {used}, request is {asked}, has larger consumption of memory. "
        );
    }
    for container in &stats.containers {
        let found = spec::containers(spec).find(|c| c.spec.name == container.name);
        let Some(found) = found else { continue };
        if let Some(words) = greedy(found.spec, container, resource) {
            text.push_str(&words);
        }
    }
    text
}

/// What is said of a container that takes more than it asked for.
fn greedy(spec: &Container, stats: &ContainerStats, resource: &str) -> Option<String> {
    let used = match resource {
        "memory" => stats.memory.as_ref()?.working_set_bytes?,
        "ephemeral-storage" => {
            let of = |fs: &Option<FsStats>| fs.as_ref()?.used_bytes;
            of(&stats.rootfs)? + of(&stats.logs)?
        }
        _ => return None,
    };
    let requests = spec.resources.as_ref().and_then(|r| r.requests.as_ref());
    let asked = requests.and_then(|r| r.get(resource));
    let asked = asked.and_then(|q| Quantity::parse(&q.0).ok());
    let asked = asked.unwrap_or(Quantity::ZERO);
    let used = bytes(used);
    (used > asked).then(|| {
        format!(
            "Container {} was using {used}, request is {asked}, has larger consumption of \
             {resource}. ",
            spec.name
        )
    })
}

#[cfg(test)]
#[path = "rank_tests.rs"]
mod tests;
