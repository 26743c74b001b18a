//! Pods that are evicted, and pods in which one container starts all anew, on the engine in
//! memory.

use super::{Lab, until};
use crate::eviction::rank::Eviction;
use crate::pod::fixture::{pod, simple};
use runtime::fake::FakeRuntime;
use runtime::service::{ImageConfig, RuntimeService};
use serde_json::json;
use std::sync::Arc;

#[tokio::test(start_paused = true)]
async fn an_evicted_pod_fails_with_the_reason_and_the_condition() {
    let lab = Lab::start(Arc::new(FakeRuntime::new()));
    lab.set(simple("Always")).await;
    lab.phase("u1", "Running").await;
    let message = "The node was low on resource: memory. ";
    let eviction = Eviction {
        uid: "u1".to_owned(),
        message: message.to_owned(),
        grace_s: 1,
        signal: "memory.available",
    };
    lab.evictions.send(eviction).await.unwrap();
    lab.phase("u1", "Failed").await;
    let status = lab.index.by_uid("u1").unwrap().status.clone();
    assert_eq!(status.reason.as_deref(), Some("Evicted"));
    assert_eq!(status.message.as_deref(), Some(message));
    let conditions = status.conditions.clone().unwrap();
    let told = conditions.iter().find(|c| c.type_ == "DisruptionTarget");
    let told = told.unwrap();
    assert_eq!(told.reason.as_deref(), Some("TerminationByKubelet"));
    assert_eq!(told.message.as_deref(), Some(message));
    assert!(lab.reasons().contains(&"Evicted".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn one_containers_end_starts_all_anew_and_every_count_goes_up() {
    let runtime = Arc::new(FakeRuntime::new());
    for image in ["i:1", "b:1"] {
        runtime.preload(image, ImageConfig::default());
    }
    let lab = Lab::start(runtime);
    let rule = json!({"action": "RestartAllContainers",
        "exitCodes": {"operator": "In", "values": [42]}});
    let spec = json!({"restartPolicy": "Never",
        "initContainers": [{"name": "i", "image": "i:1"}],
        "containers": [
            {"name": "a", "image": "a:1", "restartPolicy": "Never", "restartPolicyRules": [rule]},
            {"name": "b", "image": "b:1"}]});
    lab.set(pod(spec)).await;
    let newest = |name: &str, attempt: u32| {
        let found = lab.runtime.find("u1", name);
        found.filter(|c| c.config.attempt == attempt)
    };
    until("init runs", || newest("i", 0).is_some()).await;
    lab.runtime.exit(&newest("i", 0).unwrap().id, 0);
    lab.phase("u1", "Running").await;
    lab.runtime.exit(&newest("a", 0).unwrap().id, 42);
    until("init runs again", || newest("i", 1).is_some()).await;
    lab.runtime.exit(&newest("i", 1).unwrap().id, 0);
    until("both run again", || {
        newest("a", 1).is_some() && newest("b", 1).is_some()
    })
    .await;
    let counts = || {
        let status = lab.index.by_uid("u1").unwrap().status.clone();
        let all = status.init_container_statuses.clone().unwrap_or_default();
        let all = all
            .into_iter()
            .chain(status.container_statuses.clone().unwrap_or_default());
        all.map(|c| c.restart_count).collect::<Vec<_>>()
    };
    until("told", || counts() == [1, 1, 1]).await;
    assert_eq!(lab.runtime.list_sandboxes().len(), 1, "in place");
}
