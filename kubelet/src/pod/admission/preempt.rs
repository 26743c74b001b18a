//! Which pods go so that a critical pod fits. Pure; the choice of the stock kubelet: as few
//! guaranteed pods as possible, then as few burstable ones, then as few of the rest, and among
//! equals those with the smallest requests.

use super::fit::{Shortage, number};
use crate::launch::qos::{QosClass, class};
use crate::launch::resources::pod_totals;
use k8s_openapi::api::core::v1::Pod;
use std::sync::Arc;

/// Priority from which a pod is critical to the system.
const SYSTEM_CRITICAL: i32 = 2_000_000_000;

/// Whether a pod comes from a file or URL of the node, not from the apiserver.
pub fn is_static(pod: &Pod) -> bool {
    let annotations = pod.metadata.annotations.as_ref();
    annotations
        .and_then(|a| a.get("kubernetes.io/config.source"))
        .is_some_and(|source| source != "api")
}

/// Whether a pod is critical: it is admitted at the cost of others.
pub fn is_critical(pod: &Pod) -> bool {
    let annotations = pod.metadata.annotations.as_ref();
    let mirror = annotations.is_some_and(|a| a.contains_key("kubernetes.io/config.mirror"));
    is_static(pod) || mirror || priority(pod).is_some_and(|p| p >= SYSTEM_CRITICAL)
}

fn priority(pod: &Pod) -> Option<i32> {
    pod.spec.as_ref()?.priority
}

fn may_preempt(preemptor: &Pod, pod: &Pod) -> bool {
    (is_critical(preemptor) && !is_critical(pod))
        || matches!((priority(preemptor), priority(pod)), (Some(a), Some(b)) if a > b)
}

/// What of a resource is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Need {
    resource: String,
    amount: i64,
}

fn request(pod: &Pod, resource: &str) -> i64 {
    if resource == "pods" {
        return 1;
    }
    let totals = pod_totals(pod).unwrap_or_default();
    let amount = totals.requests.get(resource);
    amount.map_or(0, |amount| number(resource, amount))
}

/// What is still missing without these pods.
fn without<'a>(needs: &[Need], pods: impl IntoIterator<Item = &'a Arc<Pod>> + Clone) -> Vec<Need> {
    let left = needs.iter().map(|need| {
        let pods = pods.clone().into_iter();
        let freed = pods.map(|p| request(p, &need.resource));
        Need {
            resource: need.resource.clone(),
            amount: freed.fold(need.amount, i64::saturating_sub),
        }
    });
    left.filter(|need| need.amount > 0).collect()
}

/// How far a pod is from giving all that is missing; every resource weighs the same.
fn distance(needs: &[Need], pod: &Pod) -> f64 {
    let parts = needs.iter().map(|need| {
        let left = need.amount - request(pod, &need.resource);
        #[expect(
            clippy::cast_precision_loss,
            reason = "a ratio for comparisons; amounts are far below 2^52"
        )]
        let part = left.max(0) as f64 / need.amount as f64;
        part * part
    });
    parts.sum()
}

/// Whether `a` requests less than `b`, memory before cpu; equal counts as less.
fn smaller(a: &Pod, b: &Pod) -> bool {
    let key = |pod: &Pod| (request(pod, "memory"), request(pod, "cpu"));
    key(a) <= key(b)
}

/// Pods from the list that give all that is missing, nearest first.
fn choose(mut pods: Vec<Arc<Pod>>, mut needs: Vec<Need>) -> Option<Vec<Arc<Pod>>> {
    let mut chosen = Vec::new();
    while !needs.is_empty() {
        let mut best: Option<(f64, usize)> = None;
        for (index, pod) in pods.iter().enumerate() {
            let far = distance(&needs, pod);
            let better = best
                .is_none_or(|(least, at)| far < least || (far <= least && smaller(pod, &pods[at])));
            if better {
                best = Some((far, index));
            }
        }
        let (_, index) = best?;
        let pod = pods.swap_remove(index);
        needs = without(&needs, [&pod]);
        chosen.push(pod);
    }
    Some(chosen)
}

/// The pods to end so that `pod` fits; an error in the words of the stock kubelet when no set of
/// pods would do.
///
/// # Errors
/// What cannot be freed.
pub fn victims(
    pod: &Pod,
    others: &[Arc<Pod>],
    shortages: &[Shortage],
) -> Result<Vec<Arc<Pod>>, String> {
    let needs: Vec<Need> = shortages
        .iter()
        .map(|s| Need {
            resource: s.resource.clone(),
            amount: s.missing(),
        })
        .collect();
    let of = |wanted: QosClass| -> Vec<Arc<Pod>> {
        let able = others.iter().filter(|other| may_preempt(pod, other));
        able.filter(|other| class(other) == wanted)
            .cloned()
            .collect()
    };
    let guaranteed = of(QosClass::Guaranteed);
    let burstable = of(QosClass::Burstable);
    let best_effort = of(QosClass::BestEffort);
    let fail = |needs: &[Need]| {
        let list: String = needs
            .iter()
            .map(|n| format!("(res: {}, q: {}), ", n.resource, n.amount))
            .collect();
        format!(
            "Unexpected error while attempting to recover from admission failure: preemption: \
             error finding a set of pods to preempt: no set of running pods found to reclaim \
             resources: [{list}]"
        )
    };
    let all = guaranteed.iter().chain(&burstable).chain(&best_effort);
    let never = without(&needs, all.clone());
    if !never.is_empty() {
        return Err(fail(&never));
    }
    let left = without(&needs, burstable.iter().chain(&best_effort));
    let mut gone = choose(guaranteed, left).ok_or_else(|| fail(&needs))?;
    let left = without(&needs, best_effort.iter().chain(&gone));
    gone.extend(choose(burstable, left).ok_or_else(|| fail(&needs))?);
    let left = without(&needs, &gone);
    let rest = choose(best_effort, left).ok_or_else(|| fail(&needs))?;
    Ok(rest.into_iter().chain(gone).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::fixture::pod;
    use serde_json::json;

    fn named(name: &str, cpu: &str, guaranteed: bool, priority: i32) -> Arc<Pod> {
        let requests = json!({"cpu": cpu, "memory": "1Mi"});
        let limits = if guaranteed {
            requests.clone()
        } else {
            json!({})
        };
        let mut pod = pod(json!({"priority": priority, "containers": [
            {"name": "a", "resources": {"requests": requests, "limits": limits}}]}));
        pod.metadata.name = Some(name.to_owned());
        Arc::new(pod)
    }

    fn check(others: &[Arc<Pod>], missing: i64, expected: Option<&[&str]>) {
        let critical = named("critical", "1", false, SYSTEM_CRITICAL);
        let shortage = Shortage {
            resource: "cpu".to_owned(),
            requested: missing,
            used: 0,
            capacity: 0,
        };
        let got = victims(&critical, others, &[shortage]).ok();
        let names: Option<Vec<_>> = got.as_ref().map(|pods| {
            pods.iter()
                .filter_map(|p| p.metadata.name.as_deref())
                .collect()
        });
        assert_eq!(names.as_deref(), expected);
    }

    #[test]
    fn as_few_pods_of_as_low_a_class_as_possible_go() {
        let others = [
            named("g", "500m", true, 0),
            named("b1", "300m", false, 0),
            named("b2", "400m", false, 0),
            named("b3", "100m", false, 0),
        ];
        check(&others, 100, Some(&["b3"]));
        check(&others, 350, Some(&["b2"]));
        check(&others, 600, Some(&["b2", "b1"]));
        check(&others, 1000, Some(&["g", "b2", "b3"]));
        check(&others, 2000, None);
    }

    #[test]
    fn critical_pods_stay() {
        check(&[named("other", "1", false, SYSTEM_CRITICAL)], 100, None);
    }
}
