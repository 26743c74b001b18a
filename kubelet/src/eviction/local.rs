//! Pods that take more of the node's disk than they may: `sizeLimit` of an emptyDir, limits of
//! `ephemeral-storage` of the pod and of its containers. Pure.

use super::rank::{Candidate, Disks, Eviction, IMMEDIATE_GRACE_S};
use crate::launch::resources::pod_totals;
use crate::pod::admission::preempt::is_critical;
use crate::pod::spec;
use crate::quantity::{Format, Quantity};
use crate::stats::summary::{FsStats, PodStats};
use k8s_openapi::api::core::v1::Pod;

/// Whether a pod has such a limit at all: only then its disk use has to be measured.
pub(super) fn is_limited(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let volumes = spec.volumes.iter().flatten();
    let sized = volumes
        .filter_map(|v| v.empty_dir.as_ref())
        .any(|e| e.size_limit.is_some());
    sized || !limit(pod).is_zero()
}

/// The limit of `ephemeral-storage` of a whole pod; zero for none.
fn limit(pod: &Pod) -> Quantity {
    let limits = pod_totals(pod).unwrap_or_default().limits;
    let found = limits.get("ephemeral-storage").copied();
    found.unwrap_or(Quantity::ZERO)
}

fn bytes(amount: u64) -> Quantity {
    Quantity::from_units(i64::try_from(amount).unwrap_or(i64::MAX), Format::BinarySi)
}

fn used(fs: Option<&FsStats>) -> u64 {
    fs.and_then(|fs| fs.used_bytes).unwrap_or(0)
}

/// Why a pod has to go for what it takes of the disk, and what the metric calls it.
fn excess(pod: &Pod, stats: &PodStats, disks: Disks) -> Option<(String, &'static str)> {
    let spec = pod.spec.as_ref()?;
    for volume in spec.volumes.iter().flatten() {
        let size = volume
            .empty_dir
            .as_ref()
            .and_then(|e| e.size_limit.as_ref());
        let size = size.and_then(|q| Quantity::parse(&q.0).ok());
        let found = stats.volume_stats.iter().find(|v| v.name == volume.name);
        let (Some(size), Some(found)) = (size, found) else {
            continue;
        };
        if size > Quantity::ZERO && bytes(used(Some(&found.fs))) > size {
            let name = &volume.name;
            let text = format!("Usage of EmptyDir volume {name:?} exceeds the limit \"{size}\". ");
            return Some((text, "emptydirfs.limit"));
        }
    }
    let limit = limit(pod);
    if !limit.is_zero() && bytes(used(stats.ephemeral_storage.as_ref())) > limit {
        let text = format!(
            "Pod ephemeral local storage usage exceeds the total limit of containers {limit}. "
        );
        return Some((text, "ephemeralpodfs.limit"));
    }
    stats.containers.iter().find_map(|container| {
        let own = spec.containers.iter().find(|c| c.name == container.name)?;
        let limits = own.resources.as_ref()?.limits.as_ref()?;
        let limit = Quantity::parse(&limits.get("ephemeral-storage")?.0).ok()?;
        let mut taken = used(container.logs.as_ref());
        if !disks.dedicated_images {
            taken += used(container.rootfs.as_ref());
        }
        let name = &own.name;
        (!limit.is_zero() && bytes(taken) > limit).then(|| {
            let text = format!(
                "Container {name} exceeded its local ephemeral storage limit \"{limit}\". "
            );
            (text, "ephemeralcontainerfs.limit")
        })
    })
}

/// The pods to evict for what they take of the disk.
pub(super) fn evictions(candidates: &[Candidate], disks: Disks) -> Vec<Eviction> {
    let able = candidates.iter().filter(|c| !is_critical(&c.pod));
    able.filter_map(|candidate| {
        let (message, signal) = excess(&candidate.pod, candidate.stats.as_ref()?, disks)?;
        Some(Eviction {
            uid: spec::uid(&candidate.pod).to_owned(),
            message,
            grace_s: IMMEDIATE_GRACE_S,
            signal,
        })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::fixture::pod;
    use crate::stats::summary::{ContainerStats, VolumeStats};
    use serde_json::{Value, json};
    use std::sync::Arc;

    fn fs(used_bytes: u64) -> FsStats {
        FsStats {
            used_bytes: Some(used_bytes),
            ..FsStats::default()
        }
    }

    fn stats(volume: u64, rootfs: u64, logs: u64) -> PodStats {
        PodStats {
            containers: vec![ContainerStats {
                name: "a".to_owned(),
                rootfs: Some(fs(rootfs)),
                logs: Some(fs(logs)),
                ..ContainerStats::default()
            }],
            volume_stats: vec![VolumeStats {
                name: "v".to_owned(),
                fs: fs(volume),
                ..VolumeStats::default()
            }],
            ephemeral_storage: Some(fs(volume + rootfs + logs)),
            ..PodStats::default()
        }
    }

    fn check(spec: Value, stats: PodStats, expected: Option<&str>) {
        let candidate = Candidate {
            pod: Arc::new(pod(spec)),
            stats: Some(stats),
        };
        let disks = Disks {
            dedicated_images: false,
        };
        let found = evictions(&[candidate], disks);
        let text = found.first().map(|e| e.message.as_str());
        assert_eq!(text, expected);
    }

    fn sized(limit: Option<&str>) -> Value {
        let size = json!({"sizeLimit": "1Mi"});
        let mut container = json!({"name": "a"});
        if let Some(limit) = limit {
            container["resources"] = json!({"limits": {"ephemeral-storage": limit}});
        }
        json!({"containers": [container], "volumes": [{"name": "v", "emptyDir": size}]})
    }

    #[test]
    fn an_empty_dir_may_not_grow_beyond_its_limit() {
        let over = "Usage of EmptyDir volume \"v\" exceeds the limit \"1Mi\". ";
        check(sized(None), stats((1 << 20) + 1, 0, 0), Some(over));
        check(sized(None), stats(1 << 20, 1 << 30, 0), None);
    }

    #[test]
    fn a_pod_may_not_take_more_than_its_containers_limits() {
        let over = "Pod ephemeral local storage usage exceeds the total limit of containers 2Mi. ";
        check(sized(Some("2Mi")), stats(1 << 20, 1 << 20, 1), Some(over));
        check(sized(Some("2Mi")), stats(1 << 20, 1 << 19, 1 << 18), None);
    }

    #[test]
    fn a_container_may_not_take_more_than_its_own() {
        let limited = json!({"limits": {"ephemeral-storage": "1Mi"}});
        let spec = json!({"containers": [{"name": "a", "resources": limited},
            {"name": "b", "resources": limited}]});
        let over = "Container a exceeded its local ephemeral storage limit \"1Mi\". ";
        check(spec.clone(), stats(0, 1 << 20, 1), Some(over));
        check(spec, stats(0, 1 << 20, 0), None);
    }

    #[test]
    fn critical_pods_and_those_without_limits_are_left_alone() {
        let mut critical = sized(None);
        critical["priority"] = json!(2_000_000_000);
        check(critical, stats(1 << 30, 0, 0), None);
        assert!(is_limited(&pod(sized(None))));
        let free =
            json!({"containers": [{"name": "a"}], "volumes": [{"name": "v", "emptyDir": {}}]});
        assert!(!is_limited(&pod(free)));
    }
}
