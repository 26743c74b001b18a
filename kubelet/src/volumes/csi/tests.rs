//! Volumes of whole pods with a driver and a small apiserver in this process. Mounts need root.

use super::testing::FakeDriver;
use crate::launch::testing::pod;
use crate::volumes::tests::{Node, mounts_below};
use k8s_openapi::api::core::v1::Pod;
use proto::csi::v1::node_service_capability::rpc::Type;
use proto::csi::v1::volume_capability::AccessType;
use serde_json::{Value, json};
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::Duration;
use tonic::Code;

const ALL: [Type; 3] = [
    Type::StageUnstageVolume,
    Type::ExpandVolume,
    Type::GetVolumeStats,
];
const PV: &str = "kubernetes.io~csi/pv";

/// A pod `uid` whose only container uses its only volume.
fn using(uid: &str, volume: Value, device: bool) -> Arc<Pod> {
    let mut volume = volume;
    volume["name"] = json!("v");
    let mut container = json!({"name": "c", "image": "i"});
    if device {
        container["volumeDevices"] = json!([{"name": "v", "devicePath": "/dev/x"}]);
    } else {
        container["volumeMounts"] = json!([{"name": "v", "mountPath": "/v"}]);
    }
    let mut made = pod(json!({
        "volumes": [volume], "containers": [container], "securityContext": {"fsGroup": 4711},
    }));
    made.metadata.uid = Some(uid.to_owned());
    Arc::new(made)
}

fn claiming(uid: &str) -> Arc<Pod> {
    using(
        uid,
        json!({"persistentVolumeClaim": {"claimName": "claim"}}),
        false,
    )
}

/// A claim that is bound to a volume of driver `d`, which needs no controller.
fn with_volume(node: &Node, spec: Value) {
    let driver = json!({"spec": {
        "attachRequired": false, "fsGroupPolicy": "File", "podInfoOnMount": true,
        "volumeLifecycleModes": ["Persistent", "Ephemeral"],
    }});
    node.api.put("csidrivers", "", "d", driver);
    let claim = json!({
        "kind": "PersistentVolumeClaim", "apiVersion": "v1",
        "spec": {"volumeName": "pv"}, "status": {"phase": "Bound"},
    });
    node.api.put("persistentvolumeclaims", "ns", "claim", claim);
    let mut volume = json!({
        "accessModes": ["ReadWriteOnce"], "claimRef": {}, "capacity": {"storage": "1Gi"},
        "csi": {"driver": "d", "volumeHandle": "h", "fsType": "ext4"},
    });
    for (key, value) in spec.as_object().unwrap() {
        volume[key] = value.clone();
    }
    let volume = json!({"kind": "PersistentVolume", "apiVersion": "v1", "spec": volume});
    node.api.put("persistentvolumes", "", "pv", volume);
}

/// Waits for something that happens beside.
async fn until(what: impl Fn() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(20), async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    waited.await.expect("it never came");
}

#[tokio::test]
async fn a_volume_is_staged_once_published_to_each_pod_and_unstaged_after_the_last() {
    let node = Node::unread(|node| with_volume(node, json!({})));
    let driver = FakeDriver::start(&node.drivers, "d", &ALL);
    let volumes = node.volumes.prepare(&claiming("u1")).await.unwrap();
    let path = &volumes.by_name["v"].path;
    assert!(path.ends_with("pods/u1/volumes/kubernetes.io~csi/pv/mount"));
    std::fs::write(path.join("f"), "kept").unwrap();
    let root = std::fs::metadata(path).unwrap();
    assert_eq!((root.gid(), root.mode() & 0o7777), (4711, 0o2775));
    let data = std::fs::read_to_string(path.with_file_name("vol_data.json")).unwrap();
    let data: Value = serde_json::from_str(&data).unwrap();
    assert_eq!(data["specVolID"], "pv");
    assert_eq!(data["volumeLifecycleMode"], "Persistent");
    let publish = driver.last_publish();
    assert_eq!(publish.volume_context["csi.storage.k8s.io/pod.uid"], "u1");
    assert!(publish.staging_target_path.ends_with("/globalmount"));
    node.volumes.prepare(&claiming("u2")).await.unwrap();
    assert_eq!(driver.calls(), ["stage h", "publish h", "publish h"]);
    node.volumes.teardown("u1").await.unwrap();
    node.volumes.teardown("u1").await.unwrap();
    node.volumes.teardown("u2").await.unwrap();
    until(|| driver.calls().contains(&"unstage h".to_owned())).await;
    let plugin = node.dir.path().join("plugins/kubernetes.io/csi/d");
    until(|| linux::fs::list_dir(&plugin).unwrap().is_empty()).await;
    assert_eq!(
        driver.calls()[3..],
        ["unpublish h", "unpublish h", "unstage h"]
    );
    assert!(node.volumes.list_on_disk().is_empty());
    let kept = std::fs::read_to_string(driver.content("h").join("f"));
    assert_eq!(kept.unwrap(), "kept");
}

#[tokio::test]
async fn an_agent_that_was_killed_cleans_up_after_pods_nobody_knows() {
    let mut node = Node::unread(|node| with_volume(node, json!({})));
    let driver = FakeDriver::start(&node.drivers, "d", &ALL);
    node.volumes.prepare(&claiming("u1")).await.unwrap();
    node.restart();
    driver.register(&node.drivers, "d");
    assert_eq!(node.volumes.list_on_disk(), ["u1"]);
    // It is adopted when the pod is still wanted, staged and published anew for safety.
    node.volumes.prepare(&claiming("u1")).await.unwrap();
    node.restart();
    driver.register(&node.drivers, "d");
    node.volumes.teardown("u1").await.unwrap();
    until(|| driver.calls().last().is_some_and(|c| c == "unstage h")).await;
    assert!(node.volumes.list_on_disk().is_empty());
    // Killed between unpublish and unstage: nobody uses what is staged.
    node.volumes.prepare(&claiming("u2")).await.unwrap();
    node.restart();
    std::fs::remove_file(
        node.dir
            .path()
            .join("pods/u2/volumes")
            .join(PV)
            .join("vol_data.json"),
    )
    .unwrap();
    let target = node
        .dir
        .path()
        .join("pods/u2/volumes")
        .join(PV)
        .join("mount");
    rustix::mount::unmount(&target, rustix::mount::UnmountFlags::NOFOLLOW).unwrap();
    node.restart();
    driver.register(&node.drivers, "d");
    let staged = node.dir.path().join("plugins/kubernetes.io/csi/d");
    until(|| linux::fs::list_dir(&staged).unwrap().is_empty()).await;
    node.volumes.teardown("u2").await.unwrap();
    assert!(node.volumes.list_on_disk().is_empty());
}

#[tokio::test]
async fn failures_are_told_in_stocks_words_and_leave_nothing() {
    let node = Node::unread(|node| with_volume(node, json!({})));
    let driver = FakeDriver::start(&node.drivers, "d", &ALL);
    driver.fail("stage", Code::Internal);
    let error = node.volumes.prepare(&claiming("u1")).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "MountVolume.MountDevice failed for volume \"pv\" : rpc error: code = Internal desc = told to fail"
    );
    assert_eq!(error.reason(), "FailedMount");
    driver.mend();
    driver.fail("publish", Code::InvalidArgument);
    let error = node.volumes.prepare(&claiming("u1")).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "MountVolume.SetUp failed for volume \"pv\" : rpc error: code = InvalidArgument desc = told to fail"
    );
    driver.mend();
    node.volumes.prepare(&claiming("u1")).await.unwrap();
    assert_eq!(
        driver.calls(),
        ["stage h", "stage h", "publish h", "publish h"]
    );
    driver.fail("unpublish", Code::Internal);
    let error = node.volumes.teardown("u1").await.unwrap_err();
    assert!(
        error.to_string().contains("UnmountVolume.TearDown failed for volume \"pv\" : kubernetes.io/csi: Unmounter.TearDownAt failed: rpc error: code = Internal"),
        "{error}"
    );
    driver.mend();
    node.volumes.teardown("u1").await.unwrap();
}

#[tokio::test]
async fn a_claim_that_is_not_bound_is_waited_for() {
    let node = Node::unread(|node| with_volume(node, json!({})));
    let _driver = FakeDriver::start(&node.drivers, "d", &ALL);
    let claim = json!({"kind": "PersistentVolumeClaim", "apiVersion": "v1", "spec": {}, "status": {"phase": "Pending"}});
    node.api.put("persistentvolumeclaims", "ns", "claim", claim);
    let error = node.volumes.prepare(&claiming("u1")).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "Unable to attach or mount volumes: unmounted volumes=[v], unattached volumes=[], failed to process volumes=[v]: error processing PVC ns/claim: PVC is not bound"
    );
    with_volume(&node, json!({}));
    node.volumes.prepare(&claiming("u1")).await.unwrap();
    node.volumes.teardown("u1").await.unwrap();
}

#[tokio::test]
async fn a_volume_for_one_pod_is_not_given_to_two() {
    let spec = json!({"accessModes": ["ReadWriteOncePod"]});
    let node = Node::unread(|node| with_volume(node, spec));
    let _driver = FakeDriver::start(&node.drivers, "d", &ALL);
    node.volumes.prepare(&claiming("u1")).await.unwrap();
    let error = node.volumes.prepare(&claiming("u2")).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "MountVolume.SetUp failed for volume \"pv\" : volume uses the ReadWriteOncePod access mode and is already in use by another pod"
    );
    node.volumes.teardown("u1").await.unwrap();
    node.volumes.prepare(&claiming("u2")).await.unwrap();
    node.volumes.teardown("u2").await.unwrap();
}

#[tokio::test]
async fn a_device_is_linked_for_its_pod() {
    let node = Node::unread(|node| with_volume(node, json!({"volumeMode": "Block"})));
    let driver = FakeDriver::start(&node.drivers, "d", &ALL);
    let claim = json!({"persistentVolumeClaim": {"claimName": "claim", "readOnly": true}});
    let pod = using("u1", claim, true);
    let volumes = node.volumes.prepare(&pod).await.unwrap();
    let volume = &volumes.by_name["v"];
    assert!(volume.block && volume.readonly);
    let root = node.dir.path().canonicalize().unwrap();
    assert_eq!(
        volume.path,
        root.join("pods/u1/volumeDevices/kubernetes.io~csi/pv")
    );
    let devices = root.join("plugins/kubernetes.io/csi/volumeDevices");
    assert_eq!(
        std::fs::read_link(&volume.path).unwrap(),
        devices.join("publish/pv/u1")
    );
    assert_eq!(
        std::fs::metadata(&volume.path).unwrap().rdev(),
        std::fs::metadata("/dev/null").unwrap().rdev()
    );
    let publish = driver.last_publish();
    let kind = publish.volume_capability.unwrap().access_type;
    assert!(matches!(kind, Some(AccessType::Block(_))));
    assert!(publish.readonly);
    let events = node.events.recorded();
    let mapped = events
        .iter()
        .filter(|e| e.reason == "SuccessfulMountVolume");
    assert_eq!(mapped.count(), 2);
    node.volumes.teardown("u1").await.unwrap();
    until(|| !devices.join("pv").exists()).await;
    assert!(!devices.join("publish/pv").exists());
    assert!(!devices.join("staging/pv").exists());
}

#[tokio::test]
async fn an_inline_volume_lives_and_ends_with_its_pod() {
    let node = Node::unread(|node| with_volume(node, json!({})));
    let driver = FakeDriver::start(&node.drivers, "d", &ALL);
    let inline =
        json!({"csi": {"driver": "d", "fsType": "ext4", "volumeAttributes": {"size": "1"}}});
    let pod = using("u1", inline, false);
    node.volumes.prepare(&pod).await.unwrap();
    let publish = driver.last_publish();
    assert_eq!(publish.volume_context["size"], "1");
    assert_eq!(
        publish.volume_context["csi.storage.k8s.io/ephemeral"],
        "true"
    );
    assert!(publish.volume_id.starts_with("csi-"));
    assert!(publish.staging_target_path.is_empty());
    assert!(node.handle.volumes_in_use().is_empty());
    node.volumes.teardown("u1").await.unwrap();
    let calls = driver.calls();
    assert!(calls.iter().all(|c| !c.contains("stage")), "{calls:?}");
    assert_eq!(mounts_below(node.dir.path()).len(), 1);
}

#[tokio::test]
async fn a_claim_that_asks_for_it_grows_its_volume() {
    let node = Node::unread(|node| with_volume(node, json!({"capacity": {"storage": "2Gi"}})));
    let driver = FakeDriver::start(&node.drivers, "d", &ALL);
    let claim = json!({
        "kind": "PersistentVolumeClaim", "apiVersion": "v1", "spec": {"volumeName": "pv"},
        "status": {
            "phase": "Bound", "capacity": {"storage": "1Gi"},
            "allocatedResourceStatuses": {"storage": "NodeResizePending"},
        },
    });
    node.api.put("persistentvolumeclaims", "ns", "claim", claim);
    node.volumes.prepare(&claiming("u1")).await.unwrap();
    let expand = driver.last_expand();
    assert_eq!(expand.capacity_range.unwrap().required_bytes, 2 << 30);
    assert!(expand.volume_path.ends_with("/mount"));
    assert_eq!(node.api.count("\"NodeResizeInProgress\""), 1);
    assert_eq!(node.api.count("\"capacity\":{\"storage\":\"2Gi\"}"), 1);
    let events = node.events.recorded();
    let grown = events
        .iter()
        .filter(|e| e.reason == "FileSystemResizeSuccessful");
    assert_eq!(grown.count(), 2);
    node.volumes.teardown("u1").await.unwrap();
}

#[tokio::test]
async fn a_volume_that_hangs_delays_nobody_else() {
    let node = Node::unread(|node| with_volume(node, json!({})));
    let driver = FakeDriver::start(&node.drivers, "d", &ALL);
    driver.hang("stage");
    let (volumes, stuck) = (node.volumes.clone(), claiming("u1"));
    let hanging = tokio::spawn(async move { volumes.prepare(&stuck).await });
    until(|| driver.calls() == ["stage h"]).await;
    let inline = using("u2", json!({"csi": {"driver": "d"}}), false);
    let quick = tokio::time::timeout(Duration::from_secs(10), async {
        node.volumes.prepare(&inline).await.unwrap();
        node.volumes.teardown("u2").await.unwrap();
    });
    quick.await.unwrap();
    hanging.abort();
    driver.mend();
    let _ = hanging.await;
    node.volumes.teardown("u1").await.unwrap();
}
