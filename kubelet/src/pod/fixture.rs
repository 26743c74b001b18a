//! Values for tests.

use crate::launch::ANNOTATION_HASH;
use crate::launch::hash::container_hash;
use crate::observe::PodObservation;
use k8s_openapi::api::core::v1::{Container, Pod};
use runtime::service::{
    ContainerConfig, ContainerId, ContainerState, ContainerStatus, ImageId, Resources,
    SandboxConfig, SandboxId, SandboxState, SandboxStatus,
};
use serde_json::{Value, json};

/// A pod `ns/web` with UID `u1` and this spec.
pub(crate) fn pod(spec: Value) -> Pod {
    let metadata = json!({"name": "web", "namespace": "ns", "uid": "u1", "generation": 1});
    serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap()
}

/// A pod with one container `a` and this restart policy.
pub(crate) fn simple(policy: &str) -> Pod {
    pod(json!({"restartPolicy": policy, "containers": [{"name": "a", "image": "a:1"}]}))
}

/// The same pod being deleted with this grace.
pub(crate) fn deleting(mut pod: Pod, grace_s: i64) -> Pod {
    let now = jiff::Timestamp::UNIX_EPOCH;
    pod.metadata.deletion_timestamp =
        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now));
    pod.metadata.deletion_grace_period_seconds = Some(grace_s);
    pod
}

/// A sandbox of `u1`, id `s<attempt>`.
pub(crate) fn sandbox(attempt: u32, state: SandboxState) -> SandboxStatus {
    SandboxStatus {
        id: SandboxId(format!("s{attempt}")),
        config: SandboxConfig {
            uid: "u1".to_owned(),
            attempt,
            ..SandboxConfig::default()
        },
        state,
        created_at_ns: i64::from(attempt),
        ips: vec!["10.0.0.5".parse().unwrap()],
        shim_pid: 1,
        netns: None,
    }
}

/// An instance `<name>-<attempt>` in sandbox `s<sandbox>`, made from image `<name>:1`.
pub(crate) fn container(
    name: &str,
    sandbox: u32,
    attempt: u32,
    state: ContainerState,
) -> ContainerStatus {
    let spec = Container {
        name: name.to_owned(),
        image: Some(format!("{name}:1")),
        ..Container::default()
    };
    let hash = container_hash(&spec);
    ContainerStatus {
        id: ContainerId(format!("{name}-{attempt}")),
        sandbox_id: SandboxId(format!("s{sandbox}")),
        config: ContainerConfig {
            name: name.to_owned(),
            attempt,
            user_image: format!("{name}:1"),
            annotations: [(ANNOTATION_HASH.to_owned(), hash)].into(),
            ..ContainerConfig::default()
        },
        state,
        created_at_ns: i64::from(attempt),
        image_id: ImageId::from("sha256:1"),
        image_ref: "a@sha256:1".to_owned(),
        log_path: "/nonexistent/0.log".into(),
        user: None,
        resources: Resources::default(),
    }
}

/// Running since 1 s.
pub(crate) fn running() -> ContainerState {
    ContainerState::Running {
        started_at_ns: 1_000_000_000,
        pid: 7,
    }
}

/// Ended at the given second.
pub(crate) fn exited(exit_code: i32, finished_s: i64) -> ContainerState {
    ContainerState::Exited {
        started_at_ns: 1_000_000_000,
        finished_at_ns: finished_s * 1_000_000_000,
        exit_code,
        signal: None,
        reason: if exit_code == 0 { "Completed" } else { "Error" }.to_owned(),
        message: String::new(),
    }
}

/// An observation with one ready sandbox and these containers.
pub(crate) fn observed(containers: Vec<ContainerStatus>) -> PodObservation {
    PodObservation::new(vec![sandbox(0, SandboxState::Ready)], containers)
}
