//! Requests for other resources on the engine in memory.

use super::{Lab, named, until};
use crate::pod::fixture::pod;
use crate::pod::resize::allocation::Allocation;
use crate::source::{PodChange, Source};
use k8s_openapi::api::core::v1::Pod;
use runtime::fake::FakeRuntime;
use serde_json::json;
use std::sync::Arc;

fn asks(uid: &str, cpu: &str, generation: i64) -> Pod {
    let container = json!({"name": "a", "image": "a:1", "resources": {"requests": {"cpu": cpu}}});
    let mut pod = named(uid, pod(json!({"containers": [container]})));
    pod.metadata.generation = Some(generation);
    pod
}

impl Lab {
    /// The reason of a condition of `uid` as readers see it.
    fn reason(&self, uid: &str, kind: &str) -> Option<String> {
        let entry = self.index.by_uid(uid)?;
        let conditions = entry.status.conditions.clone()?;
        let found = conditions.into_iter().find(|c| c.type_ == kind)?;
        Some(found.reason.unwrap_or_default())
    }

    fn granted(&self, uid: &str, pod: &Pod) -> bool {
        self.node.allocations.lock().unwrap().get(uid) == Some(&Allocation::of(pod))
    }

    fn told(&self, reason: &str) -> usize {
        let all = self.events.recorded();
        all.iter().filter(|e| e.reason == reason).count()
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_waits_until_another_pod_has_gone_and_says_so_once() {
    let lab = Lab::start(Arc::new(FakeRuntime::new()));
    *lab.node.room.lock().unwrap() = Some(300);
    lab.changes
        .send(PodChange::Synced(Source::Api))
        .await
        .unwrap();
    lab.set(asks("u1", "100m", 1)).await;
    lab.set(asks("u2", "100m", 1)).await;
    lab.phase("u1", "Running").await;
    lab.phase("u2", "Running").await;
    let more = asks("u1", "250m", 2);
    lab.set(more.clone()).await;
    let deferred = || lab.reason("u1", "PodResizePending").as_deref() == Some("Deferred");
    until("deferred", deferred).await;
    lab.set(more.clone()).await;
    let entry = lab.index.by_uid("u1").unwrap();
    assert_eq!(entry.status.observed_generation, Some(2));
    assert_eq!(
        entry.status.allocated_resources.clone().unwrap()["cpu"].0,
        "100m"
    );
    assert!(!lab.granted("u1", &more));
    lab.gone(asks("u2", "100m", 1)).await;
    until("granted", || lab.granted("u1", &more)).await;
    until("settled", || lab.reason("u1", "PodResizePending").is_none()).await;
    until("completed", || lab.told("ResizeCompleted") == 1).await;
    assert_eq!(
        (lab.told("ResizeDeferred"), lab.told("ResizeStarted")),
        (1, 1)
    );
}

#[tokio::test(start_paused = true)]
async fn what_was_granted_before_a_restart_counts_and_the_rest_is_asked_for_when_all_are_known() {
    let lab = Lab::start(Arc::new(FakeRuntime::new()));
    *lab.node.room.lock().unwrap() = Some(300);
    let before = Allocation::of(&asks("u1", "100m", 1));
    lab.node
        .allocations
        .lock()
        .unwrap()
        .insert("u1".to_owned(), before);
    let more = asks("u1", "250m", 2);
    lab.set(more.clone()).await;
    lab.phase("u1", "Running").await;
    assert!(!lab.granted("u1", &more), "not all pods are known");
    lab.changes
        .send(PodChange::Synced(Source::Api))
        .await
        .unwrap();
    until("granted", || lab.granted("u1", &more)).await;
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_taken_back_leaves_nothing_behind() {
    let lab = Lab::start(Arc::new(FakeRuntime::new()));
    *lab.node.room.lock().unwrap() = Some(300);
    lab.changes
        .send(PodChange::Synced(Source::Api))
        .await
        .unwrap();
    lab.set(asks("u1", "100m", 1)).await;
    lab.phase("u1", "Running").await;
    lab.set(asks("u1", "9", 2)).await;
    until("pending", || lab.reason("u1", "PodResizePending").is_some()).await;
    lab.set(asks("u1", "0.1", 3)).await;
    until("clear", || lab.reason("u1", "PodResizePending").is_none()).await;
    assert_eq!(lab.told("ResizeStarted"), 0);
}
