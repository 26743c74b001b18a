//! How granted resources reach the cgroups. Pure.
//!
//! Memory first, then CPU. What the pod's cgroup allows grows before its containers do and
//! shrinks after them, and among containers those that shrink come first: at no moment do
//! containers hold more than their pod may.

use k8s_openapi::api::core::v1::Container;
use runtime::service::{ContainerId, Resources};
use std::collections::BTreeMap;

/// What the cgroups of a pod shall be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WantedResources {
    /// Of the pod.
    pub pod: Resources,
    /// Of its containers by name.
    pub containers: BTreeMap<String, Resources>,
}

/// A running container that may have to change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// Instance.
    pub id: ContainerId,
    /// Name in the spec.
    pub name: String,
    /// In force.
    pub resources: Resources,
}

/// In what two sets of limits differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Difference {
    /// Shares or quota.
    pub cpu: bool,
    /// Limit or request.
    pub memory: bool,
}

impl Difference {
    /// Whether they differ at all.
    pub fn any(self) -> bool {
        self.cpu || self.memory
    }
}

/// Thousandths of a CPU a quota allows; none without a quota.
pub fn quota_milli(resources: &Resources) -> Option<i64> {
    let quota = resources.cpu_quota_us.filter(|quota| *quota > 0)?;
    let period = resources.cpu_period_us.unwrap_or(100_000);
    let period = i64::try_from(period).unwrap_or(100_000).max(1);
    Some(quota.saturating_mul(1000) / period)
}

/// A memory limit; none without one.
pub fn memory_limit(resources: &Resources) -> Option<i64> {
    resources.memory_limit_bytes.filter(|bytes| *bytes > 0)
}

/// In what `actual` is not as `wanted`. A limit that is not wanted is not taken away (the API
/// does not allow to remove one), and what was never recorded is no difference.
pub fn difference(actual: &Resources, wanted: &Resources) -> Difference {
    let changed = |actual: Option<i64>, wanted: Option<i64>| wanted.is_some() && actual != wanted;
    let shares = wanted.cpu_shares.is_some()
        && actual.cpu_shares.is_some()
        && actual.cpu_shares != wanted.cpu_shares;
    let requests = (actual.memory_request_bytes, wanted.memory_request_bytes);
    Difference {
        cpu: shares || changed(quota_milli(actual), quota_milli(wanted)),
        memory: changed(memory_limit(actual), memory_limit(wanted))
            || matches!(requests, (Some(actual), Some(wanted)) if actual != wanted),
    }
}

/// Whether a container has to start anew for a change (`resizePolicy`).
pub fn needs_restart(container: &Container, difference: Difference) -> bool {
    let restarts = |resource: &str| {
        let mut policies = container.resize_policy.iter().flatten();
        policies.any(|p| p.resource_name == resource && p.restart_policy == "RestartContainer")
    };
    difference.cpu && restarts("cpu") || difference.memory && restarts("memory")
}

/// One write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// To the pod's cgroup.
    Pod(Resources),
    /// To a container's.
    Container(ContainerId, Resources),
}

/// Unlimited compares as more than any limit.
fn rank(limit: Option<i64>) -> i64 {
    limit.unwrap_or(i64::MAX)
}

fn cpu_of(resources: &Resources) -> Resources {
    Resources {
        cpu_shares: resources.cpu_shares,
        cpu_quota_us: resources.cpu_quota_us,
        cpu_period_us: resources.cpu_period_us,
        ..Resources::default()
    }
}

fn memory_of(resources: &Resources) -> Resources {
    Resources {
        memory_limit_bytes: resources.memory_limit_bytes,
        memory_request_bytes: resources.memory_request_bytes,
        ..Resources::default()
    }
}

/// What has to be written, in order, to bring a pod whose cgroup is as `pod` to what is wanted.
pub fn changes(pod: &Resources, wanted: &WantedResources, running: &[Running]) -> Vec<Change> {
    let mut changes = Vec::new();
    let memory = Direction {
        before: memory_limit(pod),
        after: memory_limit(&wanted.pod),
        write: wanted.pod.memory_limit_bytes.is_some(),
    };
    let pod_memory = Resources {
        memory_limit_bytes: wanted.pod.memory_limit_bytes,
        ..Resources::default()
    };
    let containers = ordered(wanted, running, |d| d.memory, memory_limit, memory_of);
    memory.surround(&mut changes, pod_memory, containers);
    let cpu = Direction {
        before: quota_milli(pod),
        after: quota_milli(&wanted.pod),
        write: wanted.pod.cpu_shares.is_some() || wanted.pod.cpu_quota_us.is_some(),
    };
    let containers = ordered(wanted, running, |d| d.cpu, quota_milli, cpu_of);
    cpu.surround(&mut changes, cpu_of(&wanted.pod), containers);
    changes
}

/// Where a limit of the pod goes.
struct Direction {
    before: Option<i64>,
    after: Option<i64>,
    write: bool,
}

impl Direction {
    fn surround(&self, changes: &mut Vec<Change>, pod: Resources, containers: Vec<Change>) {
        let grows = rank(self.after) >= rank(self.before);
        if self.write && grows {
            changes.push(Change::Pod(pod.clone()));
        }
        changes.extend(containers);
        if self.write && !grows {
            changes.push(Change::Pod(pod));
        }
    }
}

/// Changes of containers in one resource: those whose limit shrinks first.
fn ordered(
    wanted: &WantedResources,
    running: &[Running],
    concerns: impl Fn(Difference) -> bool,
    limit: impl Fn(&Resources) -> Option<i64>,
    part: impl Fn(&Resources) -> Resources,
) -> Vec<Change> {
    let mut list: Vec<(bool, Change)> = running
        .iter()
        .filter_map(|container| {
            let wanted = wanted.containers.get(&container.name)?;
            if !concerns(difference(&container.resources, wanted)) {
                return None;
            }
            let grows = rank(limit(wanted)) >= rank(limit(&container.resources));
            let change = Change::Container(container.id.clone(), part(wanted));
            Some((grows, change))
        })
        .collect();
    // Stable: the order of the spec among equals.
    list.sort_by_key(|(grows, _)| *grows);
    list.into_iter().map(|(_, change)| change).collect()
}

/// A memory limit that would shrink, and what is in use of it now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shrinking<'a> {
    /// Container; none for the pod.
    pub container: Option<&'a Running>,
    /// The new limit in bytes.
    pub limit: i64,
}

/// Memory limits that would shrink.
pub fn shrinking<'a>(
    pod: &Resources,
    wanted: &WantedResources,
    running: &'a [Running],
) -> Vec<Shrinking<'a>> {
    let shrinks = |before: &Resources, after: &Resources| {
        memory_limit(after).filter(|limit| *limit < rank(memory_limit(before)))
    };
    let own = shrinks(pod, &wanted.pod).map(|limit| Shrinking {
        container: None,
        limit,
    });
    let of_containers = running.iter().filter_map(|container| {
        let wanted = wanted.containers.get(&container.name)?;
        shrinks(&container.resources, wanted).map(|limit| Shrinking {
            container: Some(container),
            limit,
        })
    });
    own.into_iter().chain(of_containers).collect()
}

/// Why memory limits cannot shrink now, if more is in use; `usage` tells the bytes in use by a
/// container or (none) by the pod. A limit below usage would only end in kills.
pub fn refuse_shrinking(
    shrinking: &[Shrinking<'_>],
    usage: impl Fn(Option<&Running>) -> Option<u64>,
) -> Option<String> {
    let mut errors: Vec<String> = shrinking
        .iter()
        .filter_map(|s| {
            let name = s.container.map(|c| c.name.as_str());
            let of = name.map_or_else(|| "pod".to_owned(), |n| format!("container {n:?}"));
            match usage(s.container) {
                None => Some(format!("missing {of} memory usage")),
                Some(used) if used >= u64::try_from(s.limit).unwrap_or(0) => Some(format!(
                    "attempting to set {of} memory limit ({}) below current usage ({used})",
                    s.limit
                )),
                Some(_) => None,
            }
        })
        .collect();
    match errors.len() {
        0 => None,
        1 => Some(format!(
            "cannot decrease memory limits: {}",
            errors.remove(0)
        )),
        _ => Some(format!(
            "cannot decrease memory limits: [{}]",
            errors.join(", ")
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn resources(milli: i64, mebibytes: i64) -> Resources {
        Resources {
            cpu_shares: Some(crate::launch::resources::cpu_shares(milli)),
            cpu_quota_us: Some(milli * 100),
            cpu_period_us: Some(100_000),
            memory_limit_bytes: Some(mebibytes << 20),
            memory_request_bytes: Some(0),
            ..Resources::default()
        }
    }

    fn running(name: &str, resources: Resources) -> Running {
        Running {
            id: ContainerId(name.to_owned()),
            name: name.to_owned(),
            resources,
        }
    }

    fn wanted(pod: Resources, containers: &[(&str, Resources)]) -> WantedResources {
        WantedResources {
            pod,
            containers: containers
                .iter()
                .map(|(name, r)| ((*name).to_owned(), r.clone()))
                .collect(),
        }
    }

    fn words(changes: &[Change]) -> Vec<String> {
        let what = |r: &Resources| {
            if r.memory_limit_bytes.is_some() {
                "memory"
            } else {
                "cpu"
            }
        };
        changes
            .iter()
            .map(|change| match change {
                Change::Pod(r) => format!("pod {}", what(r)),
                Change::Container(id, r) => format!("{id} {}", what(r)),
            })
            .collect()
    }

    #[test]
    fn the_pod_grows_first_and_shrinks_last() {
        let one = [running("a", resources(100, 10))];
        let grow = wanted(resources(200, 20), &[("a", resources(200, 20))]);
        assert_eq!(
            words(&changes(&resources(100, 10), &grow, &one)),
            ["pod memory", "a memory", "pod cpu", "a cpu"]
        );
        let shrink = wanted(resources(50, 5), &[("a", resources(50, 5))]);
        assert_eq!(
            words(&changes(&resources(100, 10), &shrink, &one)),
            ["a memory", "pod memory", "a cpu", "pod cpu"]
        );
        let mixed = wanted(resources(200, 5), &[("a", resources(200, 5))]);
        assert_eq!(
            words(&changes(&resources(100, 10), &mixed, &one)),
            ["a memory", "pod memory", "pod cpu", "a cpu"]
        );
    }

    #[test]
    fn a_pod_that_gets_its_first_limit_shrinks() {
        let open = Resources {
            cpu_quota_us: Some(-1),
            memory_limit_bytes: Some(-1),
            ..resources(100, 10)
        };
        let one = [running(
            "a",
            Resources {
                cpu_quota_us: None,
                memory_limit_bytes: None,
                ..resources(100, 10)
            },
        )];
        let first = wanted(resources(100, 10), &[("a", resources(100, 10))]);
        assert_eq!(
            words(&changes(&open, &first, &one)),
            ["a memory", "pod memory", "a cpu", "pod cpu"]
        );
    }

    #[test]
    fn containers_that_are_as_wanted_are_left_alone() {
        let pod = resources(300, 30);
        let two = [
            running("a", resources(100, 10)),
            running("b", resources(100, 10)),
        ];
        let only_b = wanted(
            pod.clone(),
            &[("a", resources(100, 10)), ("b", resources(100, 20))],
        );
        assert_eq!(
            words(&changes(&pod, &only_b, &two)),
            ["pod memory", "b memory", "pod cpu"]
        );
    }

    #[test]
    fn only_a_changed_resource_with_that_policy_restarts_its_container() {
        let container: Container = serde_json::from_value(json!({"name": "a", "resizePolicy": [
            {"resourceName": "cpu", "restartPolicy": "NotRequired"},
            {"resourceName": "memory", "restartPolicy": "RestartContainer"},
        ]}))
        .unwrap();
        let base = resources(100, 10);
        let check = |wanted: Resources, expected: bool| {
            let difference = difference(&base, &wanted);
            assert_eq!(
                needs_restart(&container, difference),
                expected,
                "{wanted:?}"
            );
        };
        check(resources(200, 10), false);
        check(resources(100, 20), true);
        let request = Resources {
            memory_request_bytes: Some(5),
            ..resources(100, 10)
        };
        check(request, true);
        check(base.clone(), false);
    }

    #[test]
    fn memory_in_use_is_not_cut_off() {
        let containers = [running("a", resources(100, 10))];
        let target = wanted(resources(100, 5), &[("a", resources(100, 5))]);
        let pod = resources(100, 10);
        let shrinking = shrinking(&pod, &target, &containers);
        assert_eq!(shrinking.len(), 2);
        assert_eq!(refuse_shrinking(&shrinking, |_| Some(1 << 20)), None);
        assert_eq!(
            refuse_shrinking(&shrinking[..1], |_| Some(6 << 20)).unwrap(),
            "cannot decrease memory limits: attempting to set pod memory limit (5242880) below \
             current usage (6291456)"
        );
        let both = refuse_shrinking(&shrinking, |_| Some(6 << 20)).unwrap();
        assert!(both.contains("[attempting"), "{both}");
        assert!(
            both.contains("container \"a\" memory limit (5242880)"),
            "{both}"
        );
    }

    /// A model of the kernel's rule: no child may have a greater quota than its parent.
    fn obeys(pod: &Resources, all: &[Running], target: &WantedResources) -> bool {
        let mut pod = pod.clone();
        let mut all: Vec<Running> = all.to_vec();
        for change in changes(&pod, target, &all.clone()) {
            match change {
                Change::Pod(r) => pod = pod.updated_by(r),
                Change::Container(id, r) => {
                    for c in all.iter_mut().filter(|c| c.id == id) {
                        c.resources = c.resources.updated_by(r.clone());
                    }
                }
            }
            let sum: i64 = all.iter().filter_map(|c| quota_milli(&c.resources)).sum();
            let most = all.iter().filter_map(|c| quota_milli(&c.resources)).max();
            if quota_milli(&pod).is_some_and(|limit| most.is_some_and(|m| m > limit)) {
                return false;
            }
            let _ = sum;
        }
        pod.cpu_quota_us == target.pod.cpu_quota_us
            && all
                .iter()
                .all(|c| !difference(&c.resources, &target.containers[&c.name]).any())
    }

    proptest! {
        #[test]
        fn no_step_lets_a_container_exceed_its_pod_and_the_last_one_arrives(
            before in proptest::collection::vec((1i64..500, 1i64..500), 1..5),
            after in proptest::collection::vec((1i64..500, 1i64..500), 5),
        ) {
            let sum = |list: &[(i64, i64)]| {
                resources(list.iter().map(|p| p.0).sum(), list.iter().map(|p| p.1).sum())
            };
            let all: Vec<_> = before
                .iter()
                .enumerate()
                .map(|(i, (c, m))| running(&i.to_string(), resources(*c, *m)))
                .collect();
            let after = &after[..before.len()];
            let target = WantedResources {
                pod: sum(after),
                containers: after
                    .iter()
                    .enumerate()
                    .map(|(i, (c, m))| (i.to_string(), resources(*c, *m)))
                    .collect(),
            };
            prop_assert!(obeys(&sum(&before), &all, &target));
        }
    }
}
