use super::*;
use crate::pod::index::PodEntry;
use k8s_openapi::api::core::v1::{Container, PodSpec};
use runtime::fake::{FakeRuntime, Operation, error};
use runtime::service::{ContainerConfig, ImageConfig, RuntimeErrorKind, SandboxConfig};

const POLICY: Policy = Policy {
    high_percent: 85,
    low_percent: 80,
    min_age: Duration::from_secs(120),
    max_age: Duration::ZERO,
};

fn bench(
    policy: Policy,
    images: &[&str],
) -> (FakeRuntime, PodIndex, EventSink, ImageGc<FakeRuntime>) {
    let runtime = FakeRuntime::new();
    for image in images {
        runtime.preload(image, ImageConfig::default());
    }
    let (index, events) = (PodIndex::new(), EventSink::memory());
    let engine = Arc::new(runtime.clone());
    let gc = ImageGc::new(engine, index.clone(), events.clone(), "node", policy);
    (runtime, index, events, gc)
}

fn names(runtime: &FakeRuntime) -> Vec<String> {
    let mut names: Vec<_> = runtime
        .list()
        .into_iter()
        .flat_map(|i| i.repo_tags)
        .collect();
    names.sort();
    names
}

/// A disk on which the stored images and `foreign` bytes leave `free`.
fn disk(runtime: &FakeRuntime, capacity: u64, free: u64) {
    let used = runtime.fs_usage().used_bytes;
    runtime.set_disk(capacity, capacity - used - free);
}

fn pod_of(image: &str) -> PodEntry {
    let mut pod = Pod::default();
    pod.metadata.uid = Some("uid".to_owned());
    pod.spec = Some(PodSpec {
        containers: vec![Container {
            image: Some(image.to_owned()),
            ..Container::default()
        }],
        ..PodSpec::default()
    });
    PodEntry {
        pod: Arc::new(pod),
        status: Arc::default(),
        containers: BTreeMap::new(),
    }
}

#[test]
fn nothing_is_freed_below_the_high_threshold_and_above_it_down_to_the_low_one() {
    let usage = |available_bytes| FsUsage {
        capacity_bytes: 1000,
        available_bytes,
        ..FsUsage::default()
    };
    assert_eq!(excess(&usage(160), &POLICY), None);
    assert_eq!(excess(&usage(150), &POLICY), Some(50));
    assert_eq!(excess(&usage(0), &POLICY), Some(200));
    assert_eq!(used_percent(&usage(2000)), Some(0));
    assert_eq!(used_percent(&FsUsage::default()), None);
}

#[tokio::test(start_paused = true)]
async fn a_roomy_disk_keeps_every_image() {
    let (runtime, _, _, mut gc) = bench(POLICY, &["a:1", "b:1"]);
    disk(&runtime, 1 << 40, 1 << 39);
    gc.collect().await.unwrap();
    tokio::time::advance(Duration::from_secs(1000)).await;
    gc.collect().await.unwrap();
    assert_eq!(names(&runtime), ["a:1", "b:1"]);
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_loses_unused_images_but_none_that_is_used_named_or_new() {
    let all = ["named:1", "new:1", "unused:1", "used:1"];
    let (runtime, index, events, mut gc) = bench(POLICY, &all[..1]);
    runtime.preload("used:1", ImageConfig::default());
    runtime.preload("unused:1", ImageConfig::default());
    let sandbox = runtime.run_sandbox(SandboxConfig::default()).await.unwrap();
    let config = ContainerConfig {
        image: "used:1".to_owned(),
        ..ContainerConfig::default()
    };
    runtime.create_container(&sandbox.id, config).await.unwrap();
    index.insert(pod_of("named:1"));
    disk(&runtime, 1 << 40, 1 << 39);
    gc.collect().await.unwrap();
    tokio::time::advance(POLICY.min_age).await;
    runtime.preload("new:1", ImageConfig::default());
    disk(&runtime, 1 << 40, 0);
    let failure = gc.collect().await.unwrap_err();
    assert_eq!(names(&runtime), ["named:1", "new:1", "used:1"]);
    assert!(
        failure.to_string().contains("(100% of 1.0 TiB used)"),
        "{failure}"
    );
    assert_eq!(events.recorded()[0].reason, "FreeDiskSpaceFailed");
}

#[tokio::test(start_paused = true)]
async fn the_longest_unused_go_first_and_only_as_many_as_needed() {
    let (runtime, index, _, mut gc) = bench(POLICY, &["once:1", "never:1", "still:1"]);
    index.insert(pod_of("once:1"));
    disk(&runtime, 1 << 40, 1 << 39);
    gc.collect().await.unwrap();
    index.insert(pod_of("still:1"));
    tokio::time::advance(POLICY.min_age).await;
    // A disk so small that one image makes the difference.
    let one = runtime.status("never:1").unwrap().size_bytes;
    runtime.set_disk(one * 20, one * 14);
    gc.collect().await.unwrap();
    assert_eq!(names(&runtime), ["once:1", "still:1"]);
}

#[tokio::test(start_paused = true)]
async fn images_unused_for_too_long_go_once_the_agent_has_watched_that_long() {
    let policy = Policy {
        max_age: Duration::from_secs(3600),
        ..POLICY
    };
    let (runtime, index, _, mut gc) = bench(policy, &["old:1", "used:1"]);
    index.insert(pod_of("used:1"));
    disk(&runtime, 1 << 40, 1 << 39);
    tokio::time::advance(Duration::from_secs(3600)).await;
    gc.collect().await.unwrap();
    assert_eq!(names(&runtime), ["old:1", "used:1"]);
    tokio::time::advance(Duration::from_secs(1)).await;
    gc.collect().await.unwrap();
    assert_eq!(names(&runtime), ["used:1"]);
}

#[tokio::test(start_paused = true)]
async fn users_are_told_of_the_second_failure_in_a_row() {
    let (_, _, events, mut gc) = bench(POLICY, &["a:1"]);
    let told = |reason: &str| {
        let all = events.recorded();
        all.iter().filter(|event| event.reason == reason).count()
    };
    gc.tell(Err(GcError::NoCapacity));
    gc.tell(Ok(()));
    gc.tell(Err(GcError::NoCapacity));
    assert_eq!(told("ImageGCFailed"), 0);
    gc.tell(Err(GcError::NoCapacity));
    assert_eq!(told("ImageGCFailed"), 1);
}

#[tokio::test(start_paused = true)]
async fn an_image_that_cannot_be_removed_is_an_error_unless_somebody_took_it() {
    let (runtime, _, _, mut gc) = bench(POLICY, &["a:1"]);
    disk(&runtime, 1 << 40, 1 << 39);
    gc.collect().await.unwrap();
    tokio::time::advance(POLICY.min_age).await;
    disk(&runtime, 1 << 40, 0);
    let refusal = error(RuntimeErrorKind::System, "read-only");
    runtime.fail_next(Operation::RemoveImage, refusal);
    let failure = gc.collect().await.unwrap_err().to_string();
    assert!(
        failure.contains("freed 0 bytes") && failure.contains("read-only"),
        "{failure}"
    );
    let taken = error(RuntimeErrorKind::Conflict, "in use");
    runtime.fail_next(Operation::RemoveImage, taken);
    let failure = gc.collect().await.unwrap_err().to_string();
    assert!(
        failure.starts_with("Insufficient free disk space"),
        "{failure}"
    );
}

#[test]
fn sizes_read_as_the_stock_kubelets() {
    for (bytes, text) in [
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (3 << 30, "3.0 GiB"),
        (1 << 50, "1024.0 TiB"),
    ] {
        assert_eq!(size(bytes), text);
    }
}
