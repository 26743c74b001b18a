//! QoS class, the kubepods cgroup tree, and the limits of its nodes.

use super::resources::{ResourceTotals, cpu_quota, cpu_shares, hugepage_limits, pod_totals};
use super::{LaunchContext, LaunchError, pod_uid};
use crate::quantity::Quantity;
use k8s_openapi::api::core::v1::{Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use runtime::service::Resources;
use std::collections::BTreeMap;

/// cpu.shares of best effort.
const MIN_SHARES: u64 = 2;

/// Quality of service of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QosClass {
    /// Limits equal requests for cpu and memory of every container.
    Guaranteed,
    /// Something is requested or limited.
    Burstable,
    /// Nothing is.
    BestEffort,
}

impl QosClass {
    /// As `status.qosClass` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }

    /// The cgroup of the class below the kubepods cgroup; guaranteed pods sit in kubepods itself.
    /// Below a slice it is one too, with its parents' names in its own (systemd.slice(5)).
    pub fn cgroup(self, kubepods: &str) -> String {
        match self {
            Self::Guaranteed => kubepods.to_owned(),
            Self::Burstable => below(kubepods, "burstable"),
            Self::BestEffort => below(kubepods, "besteffort"),
        }
    }
}

const SLICE: &str = ".slice";

/// A cgroup in another, named as that one's kind is.
fn below(parent: &str, name: &str) -> String {
    match parent.strip_suffix(SLICE) {
        Some(path) => {
            let stem = path.rsplit('/').next().unwrap_or_default();
            // A dash is a step down in names of slices.
            format!("{parent}/{stem}-{}{SLICE}", name.replace('-', "_"))
        }
        None => format!("{parent}/{name}"),
    }
}

/// The cgroup of a pod in that of its class.
pub fn pod_cgroup_in(class_cgroup: &str, uid: &str) -> String {
    below(class_cgroup, &format!("pod{uid}"))
}

/// The UID in a pod's cgroup's name; none for other cgroups of that class.
pub fn uid_of_cgroup(name: &str) -> Option<String> {
    match name.strip_suffix(SLICE) {
        Some(stem) => {
            let last = stem.rsplit('-').next()?;
            Some(last.strip_prefix("pod")?.replace('_', "-"))
        }
        None => name.strip_prefix("pod").map(str::to_owned),
    }
}

type List = BTreeMap<String, ApiQuantity>;

/// Adds the positive amounts of cpu and memory to `sum`; tells whether both were there.
fn add_compute(sum: &mut BTreeMap<&'static str, Quantity>, list: Option<&List>) -> bool {
    let mut found = 0;
    for name in ["cpu", "memory"] {
        let amount = list
            .and_then(|l| l.get(name))
            .and_then(|q| Quantity::try_from(q).ok());
        let Some(amount) = amount.filter(|a| *a > Quantity::ZERO) else {
            continue;
        };
        found += 1;
        let total = sum.entry(name).or_insert(Quantity::ZERO);
        *total = total.plus(&amount);
    }
    found == 2
}

/// The pod's class, by cpu and memory of its main and init containers, or of the pod itself when
/// it has resources of its own.
pub fn class(pod: &Pod) -> QosClass {
    let Some(spec) = &pod.spec else {
        return QosClass::BestEffort;
    };
    let mut requests = BTreeMap::new();
    let mut limits = BTreeMap::new();
    let mut all_limited = true;
    let mut add = |resources: Option<&ResourceRequirements>| {
        add_compute(&mut requests, resources.and_then(|r| r.requests.as_ref()));
        add_compute(&mut limits, resources.and_then(|r| r.limits.as_ref()))
    };
    if let Some(resources) = &spec.resources {
        let both = add(Some(resources));
        if resources.limits.as_ref().is_some_and(|l| !l.is_empty()) {
            all_limited = both;
        }
    } else {
        for container in spec
            .containers
            .iter()
            .chain(spec.init_containers.iter().flatten())
        {
            all_limited &= add(container.resources.as_ref());
        }
    }
    if requests.is_empty() && limits.is_empty() {
        return QosClass::BestEffort;
    }
    if all_limited && requests == limits {
        QosClass::Guaranteed
    } else {
        QosClass::Burstable
    }
}

/// The pod's cgroup below the engine's cgroup root, `/kubepods/burstable/pod<uid>`.
pub fn pod_cgroup(pod: &Pod, context: &LaunchContext) -> String {
    pod_cgroup_in(&class(pod).cgroup(&context.kubepods), pod_uid(pod))
}

/// Limits of the pod's cgroup: the sum of its containers, its overhead, the node's process limit.
///
/// # Errors
/// An amount that is no quantity.
pub fn pod_resources(pod: &Pod, context: &LaunchContext) -> Result<Resources, LaunchError> {
    let totals = pod_totals(pod)?;
    let mut resources = Resources {
        pids_limit: context.pod_pids_limit.filter(|limit| *limit > 0),
        hugepage_limits: hugepage_limits(&totals.requests, &[]),
        ..Resources::default()
    };
    match class(pod) {
        QosClass::BestEffort => resources.cpu_shares = Some(MIN_SHARES),
        QosClass::Guaranteed => limit(&mut resources, &totals, context, true, true),
        QosClass::Burstable => limit(
            &mut resources,
            &totals,
            context,
            totals.cpu_limited,
            totals.memory_limited,
        ),
    }
    Ok(resources)
}

fn limit(
    resources: &mut Resources,
    totals: &ResourceTotals,
    context: &LaunchContext,
    cpu: bool,
    memory: bool,
) {
    let of =
        |list: &BTreeMap<String, Quantity>, name| list.get(name).copied().unwrap_or(Quantity::ZERO);
    resources.cpu_shares = Some(cpu_shares(of(&totals.requests, "cpu").milli_value()));
    if cpu {
        let milli = of(&totals.limits, "cpu").milli_value();
        (resources.cpu_quota_us, resources.cpu_period_us) = cpu_quota(milli, context);
    }
    if memory {
        let bytes = of(&totals.limits, "memory").value();
        resources.memory_limit_bytes = (bytes > 0).then_some(bytes);
    }
}

/// What the QoS cgroups shall be, parents first, given all pods that are not finished:
/// (path, limits). The kubepods cgroup itself gets `allocatable` (see [`node_resources`]).
pub fn tree<'p>(
    context: &LaunchContext,
    allocatable: Resources,
    pods: impl IntoIterator<Item = &'p Pod>,
) -> Vec<(String, Resources)> {
    let milli: i64 = pods
        .into_iter()
        .filter(|pod| class(pod) == QosClass::Burstable)
        .filter_map(|pod| pod_totals(pod).ok())
        .filter_map(|totals| totals.requests.get("cpu").map(Quantity::milli_value))
        .fold(0, i64::saturating_add);
    let shares = |shares| Resources {
        cpu_shares: Some(shares),
        ..Resources::default()
    };
    let kubepods = &context.kubepods;
    vec![
        (kubepods.clone(), allocatable),
        (
            QosClass::Burstable.cgroup(kubepods),
            shares(cpu_shares(milli)),
        ),
        (QosClass::BestEffort.cgroup(kubepods), shares(MIN_SHARES)),
    ]
}

/// Limits of the kubepods cgroup: what the node has less what is reserved. Zero sets nothing.
pub fn node_resources(cpu_milli: i64, memory_bytes: i64, pids: Option<i64>) -> Resources {
    Resources {
        cpu_shares: (cpu_milli > 0).then(|| cpu_shares(cpu_milli)),
        memory_limit_bytes: (memory_bytes > 0).then_some(memory_bytes),
        pids_limit: pids.filter(|p| *p > 0),
        ..Resources::default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::pod;
    use super::*;
    use serde_json::{Value, json};

    fn resources(requests: Value, limits: Value) -> Value {
        json!({"name": "c", "resources": {"requests": requests, "limits": limits}})
    }

    #[test]
    fn classes_follow_the_requests_and_limits_of_all_containers() {
        let both = json!({"cpu": "1", "memory": "1Gi"});
        let same = json!({"cpu": "1000m", "memory": "1024Mi"});
        let full = resources(both.clone(), same);
        let half = resources(json!({"cpu": "1"}), json!({}));
        let cases = [
            (vec![json!({"name": "c"})], vec![], QosClass::BestEffort),
            (vec![full.clone()], vec![], QosClass::Guaranteed),
            (
                vec![full.clone(), full.clone()],
                vec![full.clone()],
                QosClass::Guaranteed,
            ),
            (
                vec![full.clone(), json!({"name": "d"})],
                vec![],
                QosClass::Burstable,
            ),
            (vec![full.clone()], vec![half.clone()], QosClass::Burstable),
            (vec![half], vec![], QosClass::Burstable),
            (
                vec![resources(json!({}), both)],
                vec![],
                QosClass::Burstable,
            ),
            (
                vec![resources(json!({"cpu": "0"}), json!({}))],
                vec![],
                QosClass::BestEffort,
            ),
            (
                vec![resources(json!({"nvidia.com/gpu": "1"}), json!({}))],
                vec![],
                QosClass::BestEffort,
            ),
        ];
        for (containers, init, want) in cases {
            let pod = pod(json!({"containers": containers, "initContainers": init}));
            assert_eq!(class(&pod), want, "{:?}", pod.spec);
        }
    }

    #[test]
    fn pod_level_resources_decide_alone() {
        let both = json!({"cpu": "1", "memory": "1Gi"});
        let pod = pod(json!({"resources": {"requests": both, "limits": both}}));
        assert_eq!(class(&pod), QosClass::Guaranteed);
    }

    #[test]
    fn slices_carry_the_names_of_those_above_them() {
        let uid = "0a1b-2c";
        for class in [
            QosClass::Guaranteed,
            QosClass::Burstable,
            QosClass::BestEffort,
        ] {
            for kubepods in ["/kubepods", "/kubepods.slice", "/a/b.slice"] {
                let path = pod_cgroup_in(&class.cgroup(kubepods), uid);
                let name = path.rsplit('/').next().unwrap();
                assert_eq!(uid_of_cgroup(name).as_deref(), Some(uid), "{path}");
            }
        }
        let burstable = QosClass::Burstable.cgroup("/kubepods.slice");
        assert_eq!(
            pod_cgroup_in(&burstable, uid),
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0a1b_2c.slice"
        );
        for other in ["burstable", "kubepods-burstable.slice", "kubepods.slice"] {
            assert_eq!(uid_of_cgroup(other), None);
        }
    }

    #[test]
    fn pod_cgroups_carry_the_uid_below_their_class() {
        let context = LaunchContext {
            kubepods: "/lab/kubepods".into(),
            ..LaunchContext::default()
        };
        let path = |spec| pod_cgroup(&pod(spec), &context);
        assert_eq!(path(json!({})), "/lab/kubepods/besteffort/podu1");
        let burstable = json!({"containers": [resources(json!({"cpu": "1"}), json!({}))]});
        assert_eq!(path(burstable), "/lab/kubepods/burstable/podu1");
        let both = json!({"cpu": "1", "memory": "1Gi"});
        let guaranteed = json!({"containers": [resources(both.clone(), both)]});
        assert_eq!(path(guaranteed), "/lab/kubepods/podu1");
    }

    #[test]
    fn a_pod_is_limited_only_when_every_container_is() {
        let context = LaunchContext {
            pod_pids_limit: Some(100),
            ..LaunchContext::default()
        };
        let limited = resources(
            json!({"cpu": "250m"}),
            json!({"cpu": "500m", "memory": "64Mi"}),
        );
        let open = resources(json!({"cpu": "250m"}), json!({"memory": "64Mi"}));
        let of =
            |containers| pod_resources(&pod(json!({"containers": containers})), &context).unwrap();
        let all = of(json!([limited, limited]));
        assert_eq!(all.cpu_shares, Some(512));
        assert_eq!(
            (all.cpu_quota_us, all.cpu_period_us),
            (Some(100_000), Some(100_000))
        );
        assert_eq!(all.memory_limit_bytes, Some(128 << 20));
        assert_eq!(all.pids_limit, Some(100));
        let some = of(json!([limited, open]));
        assert_eq!(
            (some.cpu_quota_us, some.memory_limit_bytes),
            (None, Some(128 << 20))
        );
        let none = of(json!([{"name": "c"}]));
        assert_eq!((none.cpu_shares, none.memory_limit_bytes), (Some(2), None));
    }

    #[test]
    fn the_burstable_class_weighs_what_its_pods_request() {
        let context = LaunchContext::default();
        let burstable = pod(json!({"containers": [resources(json!({"cpu": "500m"}), json!({}))]}));
        let idle = pod(json!({}));
        let tree = tree(
            &context,
            node_resources(2000, 1 << 30, None),
            [&burstable, &burstable, &idle],
        );
        let shares: Vec<_> = tree
            .iter()
            .map(|(p, r)| (p.as_str(), r.cpu_shares))
            .collect();
        assert_eq!(
            shares,
            [
                ("/kubepods", Some(2048)),
                ("/kubepods/burstable", Some(1024)),
                ("/kubepods/besteffort", Some(2)),
            ]
        );
    }
}
