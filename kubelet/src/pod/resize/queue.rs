//! In which order requests that wait are asked again. Pure.

use crate::launch::qos::{QosClass, class};
use crate::launch::resources::pod_totals;
use crate::quantity::Quantity;
use k8s_openapi::api::core::v1::Pod;
use std::cmp::Ordering;

/// A request that waits.
#[derive(Debug, Clone, Copy)]
pub struct Waiter<'a> {
    /// The pod as it wants to be.
    pub wanted: &'a Pod,
    /// The pod as it was granted.
    pub granted: &'a Pod,
}

/// CPU (thousandths) and memory (bytes) a pod requests.
pub fn compute_requests(pod: &Pod) -> (i64, i64) {
    let totals = pod_totals(pod).unwrap_or_default();
    let of = |name: &str| totals.requests.get(name).copied();
    (
        of("cpu").map_or(0, |q: Quantity| q.milli_value()),
        of("memory").map_or(0, |q: Quantity| q.value()),
    )
}

/// Whether a request asks for more cpu or memory.
fn grows(waiter: &Waiter<'_>) -> bool {
    let (cpu, memory) = compute_requests(waiter.wanted);
    let (had_cpu, had_memory) = compute_requests(waiter.granted);
    cpu > had_cpu || memory > had_memory
}

/// Since when the apiserver knows that a pod's request waits.
fn waits_since(pod: &Pod) -> Option<jiff::Timestamp> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let pending = conditions.iter().find(|c| c.type_ == super::PENDING)?;
    pending.last_transition_time.as_ref().map(|t| t.0)
}

/// Those that free something first, then by priority, then guaranteed pods, then who waits
/// longest.
pub fn order(a: &Waiter<'_>, b: &Waiter<'_>) -> Ordering {
    let priority = |w: &Waiter<'_>| w.wanted.spec.as_ref().and_then(|s| s.priority).unwrap_or(0);
    let guaranteed = |w: &Waiter<'_>| class(w.wanted) == QosClass::Guaranteed;
    // A request that is not known to wait yet is the newest.
    let since = |w: &Waiter<'_>| waits_since(w.wanted).unwrap_or(jiff::Timestamp::MAX);
    grows(a)
        .cmp(&grows(b))
        .then_with(|| priority(b).cmp(&priority(a)))
        .then_with(|| guaranteed(b).cmp(&guaranteed(a)))
        .then_with(|| since(a).cmp(&since(b)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::fixture::pod;
    use serde_json::json;

    fn asks(name: &str, cpu: &str, priority: i32, limited: bool, since: Option<&str>) -> Pod {
        let amounts = json!({"cpu": cpu, "memory": "1Gi"});
        let limits = if limited { amounts.clone() } else { json!({}) };
        let mut pod = pod(json!({
            "priority": priority,
            "containers": [{"name": "a", "resources": {"requests": amounts, "limits": limits}}],
        }));
        pod.metadata.name = Some(name.to_owned());
        if let Some(since) = since {
            let condition = json!([{"type": "PodResizePending", "status": "True", "lastTransitionTime": since}]);
            pod.status = Some(serde_json::from_value(json!({"conditions": condition})).unwrap());
        }
        pod
    }

    #[test]
    fn shrinking_then_priority_then_class_then_age_decides() {
        let granted = asks("", "1", 0, false, None);
        let early = Some("2026-01-01T00:00:00Z");
        let late = Some("2026-01-01T00:01:00Z");
        let pods = [
            asks("new", "2", 0, false, None),
            asks("late", "2", 0, false, late),
            asks("early", "2", 0, false, early),
            asks("guaranteed", "2", 0, true, late),
            asks("important", "2", 9, false, late),
            asks("shrinks", "500m", 0, false, late),
        ];
        let mut waiters: Vec<_> = pods
            .iter()
            .map(|wanted| Waiter {
                wanted,
                granted: &granted,
            })
            .collect();
        waiters.sort_by(order);
        let names: Vec<_> = waiters
            .iter()
            .filter_map(|w| w.wanted.metadata.name.as_deref())
            .collect();
        assert_eq!(
            names,
            ["shrinks", "important", "guaranteed", "early", "late", "new"]
        );
    }
}
