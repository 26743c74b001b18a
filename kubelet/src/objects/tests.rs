//! The cache against a small apiserver in memory.

use super::testing::FakeApi;
use super::*;
use serde_json::{Value, json};

fn map(value: &str) -> Value {
    json!({"kind": "ConfigMap", "apiVersion": "v1", "data": {"k": value}})
}

async fn value(objects: &Objects, uid: &str) -> Option<String> {
    let found = objects.config_map(uid, "ns", "cm").await.unwrap()?;
    found.data.as_ref()?.get("k").cloned()
}

fn change() -> ObjectChange {
    ObjectChange {
        kind: ObjectKind::ConfigMap,
        namespace: "ns".into(),
        name: "cm".into(),
    }
}

#[tokio::test]
async fn an_object_is_read_once_and_followed_until_its_last_pod_goes() {
    let api = FakeApi::new();
    api.put("configmaps", "ns", "cm", map("1"));
    let objects = Objects::new(api.client());
    let mut changes = objects.changes();
    assert_eq!(value(&objects, "a").await.as_deref(), Some("1"));
    assert_eq!(value(&objects, "b").await.as_deref(), Some("1"));
    assert_eq!(api.count("configmaps/cm"), 1);
    api.watches(1).await;
    api.put("configmaps", "ns", "cm", map("2"));
    assert_eq!(changes.recv().await.unwrap(), change());
    assert_eq!(value(&objects, "a").await.as_deref(), Some("2"));
    api.delete("configmaps", "ns", "cm");
    assert_eq!(changes.recv().await.unwrap(), change());
    assert_eq!(value(&objects, "a").await, None);
    objects.release_pod("a");
    assert_eq!(objects.followed(), 1);
    objects.release_pod("b");
    assert_eq!(objects.followed(), 0);
}

#[tokio::test]
async fn what_does_not_exist_is_asked_for_again_and_its_birth_is_told() {
    let api = FakeApi::new();
    let objects = Objects::new(api.client());
    let mut changes = objects.changes();
    assert_eq!(value(&objects, "a").await, None);
    assert_eq!(value(&objects, "a").await, None);
    assert_eq!(api.count("configmaps/cm"), 2);
    api.watches(1).await;
    api.put("configmaps", "ns", "cm", map("1"));
    assert_eq!(changes.recv().await.unwrap(), change());
    assert_eq!(value(&objects, "a").await.as_deref(), Some("1"));
}

#[tokio::test]
async fn a_refusal_right_after_the_bind_is_tried_again() {
    let api = FakeApi::new();
    api.put("configmaps", "ns", "cm", map("1"));
    api.forbid(3);
    let objects = Objects::new(api.client());
    assert_eq!(value(&objects, "a").await.as_deref(), Some("1"));
    api.forbid(100);
    let refused = objects.secret("a", "ns", "s").await.unwrap_err();
    assert_eq!(refused.to_string(), "cannot read secret ns/s: forbidden");
}

#[tokio::test]
async fn an_outage_serves_what_was_known_and_catches_up_after() {
    let api = FakeApi::new();
    api.put("configmaps", "ns", "cm", map("1"));
    let objects = Objects::new(api.client());
    let mut changes = objects.changes();
    assert_eq!(value(&objects, "a").await.as_deref(), Some("1"));
    api.watches(1).await;
    api.outage(true);
    assert_eq!(value(&objects, "b").await.as_deref(), Some("1"));
    assert!(objects.config_map("b", "ns", "other").await.is_err());
    api.outage(false);
    api.put("configmaps", "ns", "cm", map("2"));
    api.watches(2).await;
    // The watch resumed where it was: this server forgets, so a later change shows it lives.
    api.put("configmaps", "ns", "cm", map("3"));
    assert_eq!(changes.recv().await.unwrap(), change());
    assert_eq!(value(&objects, "a").await.as_deref(), Some("3"));
}

#[tokio::test]
async fn the_environment_of_a_container_is_read_at_once() {
    let api = FakeApi::new();
    api.put("configmaps", "ns", "cm", map("1"));
    api.put(
        "services",
        "ns",
        "db",
        json!({"spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 1}]}}),
    );
    let objects = Objects::new(api.client());
    let pod = crate::launch::testing::pod_of(json!({"name": "c", "envFrom": [
        {"configMapRef": {"name": "cm"}}, {"secretRef": {"name": "none", "optional": true}},
    ]}));
    let container = &pod.spec.as_ref().unwrap().containers[0];
    let got = objects.env_objects(&pod, container).await.unwrap();
    assert!(got.config_maps["cm"].is_some());
    assert!(got.secrets["none"].is_none());
    assert_eq!(got.services.len(), 1);
}
