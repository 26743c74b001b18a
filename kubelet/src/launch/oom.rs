//! oom_score_adj of a container's processes.

use super::LaunchError;
use super::qos::{QosClass, class};
use super::resources::amounts;
use crate::quantity::Quantity;
use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use std::collections::BTreeMap;

const GUARANTEED: i64 = -997;
const BEST_EFFORT: i64 = 1000;
/// Priority from which a pod is critical to the system.
const SYSTEM_CRITICAL: i32 = 2_000_000_000;

fn memory(list: Option<&BTreeMap<String, ApiQuantity>>) -> Result<i64, LaunchError> {
    Ok(amounts(list)?.get("memory").map_or(0, Quantity::value))
}

fn request(container: &Container) -> Result<i64, LaunchError> {
    memory(
        container
            .resources
            .as_ref()
            .and_then(|r| r.requests.as_ref()),
    )
}

/// The adjustment for `container` on a machine with `capacity` bytes of memory: −997 for
/// guaranteed and node-critical pods, 1000 for best effort, between 3 and 999 for burstable
/// ones, the less the more memory is requested.
///
/// # Errors
/// A memory request that is no quantity.
pub fn score(pod: &Pod, container: &Container, capacity: i64) -> Result<i32, LaunchError> {
    let adjust = if node_critical(pod) {
        GUARANTEED
    } else {
        match class(pod) {
            QosClass::Guaranteed => GUARANTEED,
            QosClass::BestEffort => BEST_EFFORT,
            QosClass::Burstable => burstable(pod, container, capacity.max(1))?,
        }
    };
    Ok(i32::try_from(adjust).unwrap_or(1000))
}

fn node_critical(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else {
        return false;
    };
    let annotations = pod.metadata.annotations.as_ref();
    let is_static = annotations.is_some_and(|a| {
        a.contains_key("kubernetes.io/config.mirror")
            || a.get("kubernetes.io/config.source")
                .is_some_and(|source| source != "api")
    });
    let critical = is_static || spec.priority.is_some_and(|p| p >= SYSTEM_CRITICAL);
    critical && spec.priority_class_name.as_deref() == Some("system-node-critical")
}

fn burstable(pod: &Pod, container: &Container, capacity: i64) -> Result<i64, LaunchError> {
    let Some(spec) = &pod.spec else {
        return Ok(BEST_EFFORT - 1);
    };
    // Memory the pod requests beyond its containers is shared among them.
    let pod_level = memory(spec.resources.as_ref().and_then(|r| r.requests.as_ref()))?;
    let mut shared = 0;
    if pod_level > 0 {
        let sidecars = spec.init_containers.iter().flatten().filter(|c| sidecar(c));
        let lasting: Vec<&Container> = spec.containers.iter().chain(sidecars).collect();
        let mut sum: i64 = 0;
        for one in &lasting {
            sum = sum.saturating_add(request(one)?);
        }
        let count = i64::try_from(lasting.len()).unwrap_or(1).max(1);
        shared = pod_level.saturating_sub(sum).max(0) / count;
    }
    let for_request = |bytes: i64| {
        let part = 1000 * i128::from(bytes) / i128::from(capacity);
        1000 - i64::try_from(part).unwrap_or(i64::MAX)
    };
    let mut adjust = for_request(request(container)?.saturating_add(shared));
    let is_init = spec
        .init_containers
        .iter()
        .flatten()
        .any(|c| c.name == container.name);
    if is_init && sidecar(container) {
        // A sidecar shall not die before the containers it serves.
        let mut least = i64::MAX;
        for one in &spec.containers {
            least = least.min(request(one)?);
        }
        adjust = adjust.min(for_request(least.saturating_add(shared)));
    }
    Ok(adjust.clamp(1000 + GUARANTEED, BEST_EFFORT - 1))
}

fn sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

#[cfg(test)]
mod tests {
    use super::super::testing::pod;
    use super::*;
    use serde_json::{Value, json};

    fn of(spec: Value) -> i32 {
        let pod = pod(spec);
        score(&pod, &pod.spec.as_ref().unwrap().containers[0], 1000 << 20).unwrap()
    }

    fn c(memory: &str) -> Value {
        json!({"name": "c", "resources": {"requests": {"memory": memory}}})
    }

    #[test]
    fn the_formula_is_stocks() {
        assert_eq!(of(json!({})), 1000);
        assert_eq!(of(json!({"containers": [c("100Mi")]})), 900);
        assert_eq!(of(json!({"containers": [c("1Ki")]})), 999);
        assert_eq!(of(json!({"containers": [c("2000Mi")]})), 3);
        let both = json!({"cpu": "1", "memory": "1Gi"});
        let guaranteed = json!({"name": "c", "resources": {"requests": both, "limits": both}});
        assert_eq!(of(json!({"containers": [guaranteed]})), -997);
        assert_eq!(
            of(json!({"priority": 2_000_001_000, "priorityClassName": "system-node-critical"})),
            -997
        );
        assert_eq!(of(json!({"priority": 2_000_001_000})), 1000);
        // 400 Mi for the pod, 100 of them claimed: 300 are shared by two containers.
        let spec = json!({"containers": [c("100Mi"), {"name": "d"}], "resources": {"requests": {"memory": "400Mi"}}});
        assert_eq!(of(spec), 750);
    }

    #[test]
    fn a_sidecar_is_no_likelier_to_be_killed_than_the_containers_it_serves() {
        let mut side = c("10Mi");
        side["name"] = json!("s");
        side["restartPolicy"] = json!("Always");
        let pod = pod(json!({"containers": [c("300Mi")], "initContainers": [side]}));
        let side = &pod.spec.as_ref().unwrap().init_containers.as_ref().unwrap()[0];
        assert_eq!(score(&pod, side, 1000 << 20).unwrap(), 700);
    }
}
