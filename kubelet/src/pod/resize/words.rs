//! What users read in events about requests for other resources.

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use serde::Serialize;

#[derive(Serialize)]
struct OfContainer<'a> {
    name: &'a str,
    resources: ResourceRequirements,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Summary<'a> {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    init_containers: Vec<OfContainer<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    containers: Vec<OfContainer<'a>>,
    generation: i64,
    #[serde(skip_serializing_if = "str::is_empty")]
    error: &'a str,
}

/// `<what>: {"containers":[…],"generation":2}` with the resources of the pod's spec.
fn message(what: &str, pod: &Pod, generation: i64, error: &str) -> String {
    fn one(c: &Container) -> OfContainer<'_> {
        OfContainer {
            name: &c.name,
            resources: c.resources.clone().unwrap_or_default(),
        }
    }
    fn list(containers: &[Container]) -> Vec<OfContainer<'_>> {
        containers.iter().map(one).collect()
    }
    let spec = pod.spec.as_ref();
    let summary = Summary {
        init_containers: list(
            spec.and_then(|s| s.init_containers.as_deref())
                .unwrap_or_default(),
        ),
        containers: list(spec.map(|s| s.containers.as_slice()).unwrap_or_default()),
        generation,
        error,
    };
    match serde_json::to_string(&summary) {
        Ok(summary) => format!("{what}: {summary}"),
        // A summary of strings is always JSON.
        Err(_) => what.to_owned(),
    }
}

/// Of `ResizeStarted`.
pub fn started(pod: &Pod, generation: i64) -> String {
    message("Pod resize started", pod, generation, "")
}

/// Of `ResizeCompleted`.
pub fn completed(pod: &Pod, generation: i64) -> String {
    message("Pod resize completed", pod, generation, "")
}

/// Of `ResizeError`.
pub fn error(pod: &Pod, generation: i64, error: &str) -> String {
    message("Pod resize error", pod, generation, error)
}

/// Of `ResizeDeferred` and `ResizeInfeasible`; `reason` is the word of the refusal.
pub fn pending(pod: &Pod, reason: &str, generation: i64, why: &str) -> String {
    message(&format!("Pod resize {reason}"), pod, generation, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::fixture::pod;
    use serde_json::json;

    #[test]
    fn the_words_hold_the_resources_of_all_containers() {
        let resources = json!({"limits": {"cpu": "200m"}, "requests": {"cpu": "100m"}});
        let pod = pod(json!({
            "initContainers": [{"name": "c0", "resources": resources}],
            "containers": [{"name": "c1"}],
        }));
        assert_eq!(
            completed(&pod, 2),
            r#"Pod resize completed: {"initContainers":[{"name":"c0","resources":{"limits":{"cpu":"200m"},"requests":{"cpu":"100m"}}}],"containers":[{"name":"c1","resources":{}}],"generation":2}"#
        );
        assert!(error(&pod, 2, "no").ends_with(r#""generation":2,"error":"no"}"#));
        assert!(pending(&pod, "OutOfcpu", 3, "full").starts_with("Pod resize OutOfcpu: {"));
    }
}
