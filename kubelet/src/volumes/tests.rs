//! Volumes of whole pods, with a small apiserver in memory. Mounts need root: each test has a
//! root directory of its own and takes its mounts down.

use super::*;
use crate::events::EventSink;
use crate::launch::testing::pod;
use crate::objects::testing::FakeApi;
use serde_json::{Value, json};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use tempfile::TempDir;

pub(crate) struct Node {
    pub(crate) dir: TempDir,
    pub(crate) api: FakeApi,
    objects: Arc<Objects>,
    pub(crate) volumes: Volumes,
    pub(crate) drivers: Drivers,
    pub(crate) handle: NodeHandle,
    pub(crate) events: EventSink,
}

impl Node {
    pub(crate) fn new() -> Self {
        Self::unread(|_| {})
    }

    /// A node whose apiserver has these objects before anybody asks.
    pub(crate) fn unread(fill: impl FnOnce(&Self)) -> Self {
        let api = FakeApi::new();
        let dir = tempfile::tempdir().unwrap();
        let handle = crate::node::testing::handle();
        let events = EventSink::memory();
        let drivers = Drivers::new(api.client());
        let (objects, volumes) = Self::start(&api, dir.path(), &drivers, &handle, &events);
        let node = Self {
            dir,
            api,
            objects,
            volumes,
            drivers,
            handle,
            events,
        };
        fill(&node);
        node
    }

    fn start(
        api: &FakeApi,
        root: &Path,
        drivers: &Drivers,
        handle: &NodeHandle,
        events: &EventSink,
    ) -> (Arc<Objects>, Volumes) {
        let objects = Arc::new(Objects::new(api.client()));
        let context = LaunchContext {
            allocatable: serde_json::from_value(json!({"cpu": "2", "memory": "1Gi"})).unwrap(),
            ..LaunchContext::default()
        };
        let config = VolumesConfig {
            root_dir: root.to_owned(),
            context: Arc::new(ArcSwap::from_pointee(context)),
            events: events.clone(),
            node_name: "n1".to_owned(),
            node: handle.clone(),
            drivers: drivers.clone(),
        };
        let volumes = Volumes::new(config, objects.clone(), api.client()).unwrap();
        (objects, volumes)
    }

    /// A new agent on the same node.
    pub(crate) fn restart(&mut self) {
        self.drivers = Drivers::new(self.api.client());
        let (drivers, handle) = (&self.drivers, &self.handle);
        (self.objects, self.volumes) =
            Self::start(&self.api, self.dir.path(), drivers, handle, &self.events);
    }

    fn text(&self, kind: &str, volume: &str, path: &str) -> String {
        let dir = self
            .dir
            .path()
            .join("pods/u1/volumes")
            .join(kind)
            .join(volume);
        std::fs::read_to_string(dir.join(path)).unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Whatever a failed test left mounted, and nothing else.
        let root = self.dir.path().canonicalize().unwrap();
        let mut mounts = linux::mountinfo::read().unwrap();
        mounts.reverse();
        for mount in mounts.iter().filter(|m| m.mount_point.starts_with(&root)) {
            let _ =
                rustix::mount::unmount(&mount.mount_point, rustix::mount::UnmountFlags::NOFOLLOW);
        }
    }
}

pub(crate) fn mounts_below(path: &Path) -> Vec<linux::mountinfo::MountEntry> {
    let path = path.canonicalize().unwrap();
    let table = linux::mountinfo::read().unwrap();
    table
        .into_iter()
        .filter(|m| m.mount_point.starts_with(&path))
        .collect()
}

fn with(volumes: Value) -> Arc<Pod> {
    Arc::new(pod(json!({"volumes": volumes})))
}

fn data(pairs: Value) -> Value {
    json!({"kind": "ConfigMap", "apiVersion": "v1", "data": pairs})
}

const ACCESS: &str = "kube-api-access-x";

fn access_pod() -> Arc<Pod> {
    with(
        json!([{"name": ACCESS, "projected": {"defaultMode": 420, "sources": [
            {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
        ]}}]),
    )
}

#[tokio::test]
async fn the_api_access_of_a_pod_costs_one_token_and_no_mount() {
    let node = Node::new();
    node.api.put(
        "configmaps",
        "ns",
        "kube-root-ca.crt",
        data(json!({"ca.crt": "CA"})),
    );
    let before = mounts_below(node.dir.path()).len();
    let volumes = node.volumes.prepare(&access_pod()).await.unwrap();
    assert_eq!(mounts_below(node.dir.path()).len(), before);
    let volume = &volumes.by_name[ACCESS];
    assert!(volume.readonly);
    assert!(
        volume
            .path
            .starts_with(node.dir.path().canonicalize().unwrap().join("volatile"))
    );
    assert_eq!(
        std::fs::read_to_string(volume.path.join("ca.crt")).unwrap(),
        "CA"
    );
    assert_eq!(
        node.text("kubernetes.io~projected", ACCESS, "namespace"),
        "ns"
    );
    let token = volume.path.join("token");
    assert_eq!(std::fs::metadata(&token).unwrap().mode() & 0o7777, 0o644);
    assert_eq!(
        std::fs::read_link(&token).unwrap(),
        Path::new("..data/token")
    );
    assert_eq!(node.api.count("/token"), 1);
    node.volumes.prepare(&access_pod()).await.unwrap();
    assert_eq!(node.api.count("/token"), 1);
    node.volumes.teardown("u1").await.unwrap();
    node.volumes.teardown("u1").await.unwrap();
    assert!(node.volumes.list_on_disk().is_empty());
    assert_eq!(node.objects.followed(), 0);
}

#[tokio::test]
async fn a_restarted_agent_keeps_good_tokens_and_mounts() {
    let mut node = Node::new();
    node.api.put(
        "configmaps",
        "ns",
        "kube-root-ca.crt",
        data(json!({"ca.crt": "CA"})),
    );
    node.volumes.prepare(&access_pod()).await.unwrap();
    let before = node.text("kubernetes.io~projected", ACCESS, "token");
    let mounts = mounts_below(node.dir.path());
    node.restart();
    assert_eq!(node.volumes.list_on_disk(), ["u1"]);
    node.volumes.prepare(&access_pod()).await.unwrap();
    assert_eq!(
        node.text("kubernetes.io~projected", ACCESS, "token"),
        before
    );
    assert_eq!(node.api.count("/token"), 1);
    assert_eq!(mounts_below(node.dir.path()), mounts);
    // A pod nobody knows any more is torn down by its record.
    node.restart();
    node.volumes.teardown("u1").await.unwrap();
    assert!(node.volumes.list_on_disk().is_empty());
}

#[tokio::test]
async fn tokens_are_refreshed_in_time_and_kept_when_refused() {
    let node = Node::new();
    node.api.tokens(2, false);
    let volume = json!([{"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}]);
    node.volumes.prepare(&with(volume)).await.unwrap();
    let first = node.text("kubernetes.io~projected", "t", "token");
    let mut renames = linux_watch(
        &node
            .dir
            .path()
            .join("pods/u1/volumes/kubernetes.io~projected/t"),
    );
    let state = lock(&node.volumes.inner.pods)["u1"].clone();
    renames.moved("..data").await;
    assert_ne!(node.text("kubernetes.io~projected", "t", "token"), first);
    state.stop_refresh();
    node.api.tokens(2, true);
    let kept = node.text("kubernetes.io~projected", "t", "token");
    for token in lock(&state.tokens).values_mut() {
        token.refresh_at = jiff::Timestamp::UNIX_EPOCH;
        token.expires_at = jiff::Timestamp::MAX;
    }
    node.volumes.inner.rewrite(&state).await.unwrap();
    assert_eq!(node.text("kubernetes.io~projected", "t", "token"), kept);
    node.volumes.teardown("u1").await.unwrap();
}

#[tokio::test]
async fn a_changed_object_is_in_the_files_at_once() {
    let node = Node::new();
    node.api
        .put("configmaps", "ns", "cm", data(json!({"a": "1", "b": "1"})));
    node.volumes
        .prepare(&with(json!([{"name": "v", "configMap": {"name": "cm"}}])))
        .await
        .unwrap();
    node.api.watches(1).await;
    let path = node
        .dir
        .path()
        .join("pods/u1/volumes/kubernetes.io~configmap/v");
    let mut inotify = linux_watch(&path);
    let started = std::time::Instant::now();
    node.api.put(
        "configmaps",
        "ns",
        "cm",
        data(json!({"a": "2", "c/../x": "no"})),
    );
    // A key that is no file name leaves everything as it was.
    node.api
        .put("configmaps", "ns", "cm", data(json!({"a": "2", "c": "3"})));
    inotify.moved("..data").await;
    let took = started.elapsed();
    assert!(took < std::time::Duration::from_secs(1), "{took:?}");
    let read = |name: &str| std::fs::read_to_string(path.join(name));
    let settled = async {
        while read("c").is_err() || read("b").is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(5), settled)
        .await
        .unwrap();
    assert_eq!(read("a").unwrap(), "2");
    let stamped = std::fs::read_dir(&path).unwrap().flatten();
    assert!(
        stamped
            .filter(|e| e.file_name().to_string_lossy().starts_with("..20"))
            .count()
            <= 2
    );
    node.volumes.teardown("u1").await.unwrap();
}

/// Waits for renames in a directory.
struct Renames(Option<inotify::Inotify>);

fn linux_watch(path: &Path) -> Renames {
    let inotify = inotify::Inotify::init().unwrap();
    inotify
        .watches()
        .add(path, inotify::WatchMask::MOVED_TO)
        .unwrap();
    Renames(Some(inotify))
}

impl Renames {
    async fn moved(&mut self, name: &'static str) {
        let mut inotify = self.0.take().unwrap();
        let wait = tokio::task::spawn_blocking(move || {
            let mut buffer = [0; 4096];
            loop {
                let mut events = inotify.read_events_blocking(&mut buffer).unwrap();
                if events.any(|e| e.name.is_some_and(|n| n == name)) {
                    return;
                }
            }
        });
        wait.await.unwrap();
    }
}

#[tokio::test]
async fn labels_and_annotations_follow_the_pod() {
    let node = Node::new();
    let mut pod = with(json!([{"name": "d", "downwardAPI": {"items": [
        {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}, "mode": 0o400},
        {"path": "sub/cpu", "resourceFieldRef": {"containerName": "c", "resource": "limits.cpu"}},
    ]}}]));
    node.volumes.prepare(&pod).await.unwrap();
    assert_eq!(
        node.text("kubernetes.io~downward-api", "d", "labels"),
        "a/b=\"c\"\napp=\"web\""
    );
    assert_eq!(node.text("kubernetes.io~downward-api", "d", "sub/cpu"), "2");
    Arc::make_mut(&mut pod).metadata.labels = Some([("app".into(), "db".into())].into());
    node.volumes.update(&pod).await.unwrap();
    assert_eq!(
        node.text("kubernetes.io~downward-api", "d", "labels"),
        "app=\"db\""
    );
    let path = node
        .dir
        .path()
        .join("pods/u1/volumes/kubernetes.io~downward-api/d/labels");
    assert_eq!(std::fs::metadata(path).unwrap().mode() & 0o7777, 0o400);
    node.volumes.teardown("u1").await.unwrap();
}

#[tokio::test]
async fn modes_items_and_fs_group_are_those_of_the_spec() {
    let node = Node::new();
    let secret = json!({"kind": "Secret", "apiVersion": "v1", "data": {"k": "djE=", "l": "djI="}});
    node.api.put("secrets", "ns", "s", secret);
    let pod = Arc::new(pod(json!({
        "securityContext": {"fsGroup": 1001},
        "volumes": [
            {"name": "v", "secret": {"secretName": "s", "defaultMode": 0o400, "items": [
                {"key": "k", "path": "deep/er/one"}, {"key": "k", "path": "two", "mode": 0o100}]}},
            {"name": "e", "emptyDir": {}},
        ],
    })));
    let volumes = node.volumes.prepare(&pod).await.unwrap();
    let stat = |path: PathBuf| {
        let meta = std::fs::metadata(path).unwrap();
        (meta.mode() & 0o7777, meta.gid())
    };
    let secret = &volumes.by_name["v"].path;
    assert_eq!(stat(secret.join("deep/er/one")), (0o440, 1001));
    assert_eq!(stat(secret.join("two")), (0o540, 1001));
    assert_eq!(stat(secret.join("deep")), (0o2755, 1001));
    assert!(!secret.join("l").exists());
    assert_eq!(stat(volumes.by_name["e"].path.clone()), (0o2777, 1001));
    node.volumes.teardown("u1").await.unwrap();
}

#[tokio::test]
async fn missing_objects_are_named_as_stock_names_them() {
    let node = Node::new();
    node.api
        .put("configmaps", "ns", "cm", data(json!({"k": "v"})));
    node.api.put(
        "secrets",
        "ns",
        "s",
        json!({"kind": "Secret", "apiVersion": "v1"}),
    );
    let items = json!([{"key": "none", "path": "p"}]);
    for (volume, want) in [
        (
            json!({"configMap": {"name": "y"}}),
            "configmap \"y\" not found",
        ),
        (
            json!({"secret": {"secretName": "y"}}),
            "secret \"y\" not found",
        ),
        (
            json!({"configMap": {"name": "cm", "items": items}}),
            "configmap references non-existent config key: none",
        ),
        (
            json!({"secret": {"secretName": "s", "items": items}}),
            "references non-existent secret key: none",
        ),
        (
            json!({"projected": {"sources": [{"configMap": {"name": "a"}}, {"secret": {"name": "b"}}]}}),
            "[configmap \"a\" not found, secret \"b\" not found]",
        ),
        (
            json!({"nfs": {"server": "h", "path": "/"}}),
            "volumes of kind nfs are not supported by this node",
        ),
        (
            json!({"projected": {"sources": [{"clusterTrustBundle": {"path": "p"}}]}}),
            "projected sources of kind clusterTrustBundle are not supported by this node",
        ),
        (
            json!({"hostPath": {"path": "/proc/version", "type": "Directory"}}),
            "hostPath type check failed: /proc/version is not a directory",
        ),
        (
            json!({"projected": {"sources": [{"configMap": {"name": "cm", "items": [{"key": "k", "path": "../../x"}]}}]}}),
            "invalid path \"../../x\" in the volume",
        ),
    ] {
        let mut volume = volume;
        volume["name"] = json!("x");
        let error = node
            .volumes
            .prepare(&with(json!([volume])))
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("MountVolume.SetUp failed for volume \"x\" : {want}")
        );
        assert_eq!(error.reason(), "FailedMount");
        node.volumes.teardown("u1").await.unwrap();
    }
}

#[tokio::test]
async fn a_pod_starts_once_its_missing_object_is_there() {
    let node = Node::new();
    let pod = with(json!([
        {"name": "v", "configMap": {"name": "cm"}},
        {"name": "o", "secret": {"secretName": "none", "optional": true}},
    ]));
    assert!(node.volumes.prepare(&pod).await.is_err());
    node.api
        .put("configmaps", "ns", "cm", data(json!({"k": "v"})));
    node.volumes.prepare(&pod).await.unwrap();
    assert_eq!(node.text("kubernetes.io~configmap", "v", "k"), "v");
    // The optional one appears when it does.
    node.api.watches(2).await;
    let mut renames = linux_watch(
        &node
            .dir
            .path()
            .join("pods/u1/volumes/kubernetes.io~secret/o"),
    );
    node.api.put(
        "secrets",
        "ns",
        "none",
        json!({"kind": "Secret", "apiVersion": "v1", "data": {"k": "djE="}}),
    );
    renames.moved("..data").await;
    node.volumes.teardown("u1").await.unwrap();
}

#[tokio::test]
async fn empty_dirs_in_memory_have_their_own_size_and_go_with_the_pod() {
    let mut node = Node::new();
    let pod = with(json!([
        {"name": "m", "emptyDir": {"medium": "Memory", "sizeLimit": "8Mi"}},
        {"name": "n", "emptyDir": {"medium": "Memory"}},
        {"name": "d", "emptyDir": {}},
    ]));
    let volumes = node.volumes.prepare(&pod).await.unwrap();
    let size = |name: &str| {
        let stat = rustix::fs::statvfs(&volumes.by_name[name].path).unwrap();
        stat.f_blocks * stat.f_frsize
    };
    assert_eq!((size("m"), size("n")), (8 << 20, 1 << 30));
    for (name, mode) in [("m", 0o1777), ("d", 0o777)] {
        let meta = std::fs::metadata(&volumes.by_name[name].path).unwrap();
        assert_eq!(meta.mode() & 0o7777, mode, "{name}");
    }
    std::fs::write(volumes.by_name["m"].path.join("f"), "kept").unwrap();
    std::fs::write(volumes.by_name["d"].path.join("f"), "kept").unwrap();
    node.restart();
    node.volumes.prepare(&pod).await.unwrap();
    assert_eq!(node.text("kubernetes.io~empty-dir", "m", "f"), "kept");
    assert_eq!(node.text("kubernetes.io~empty-dir", "d", "f"), "kept");
    node.restart();
    node.volumes.teardown("u1").await.unwrap();
    assert_eq!(mounts_below(node.dir.path()).len(), 1);
    assert!(node.volumes.list_on_disk().is_empty());
}

#[tokio::test]
async fn what_others_mounted_below_a_volume_is_never_deleted_through() {
    let node = Node::new();
    let volumes = node
        .volumes
        .prepare(&with(json!([{"name": "e", "emptyDir": {}}])))
        .await
        .unwrap();
    let foreign = volumes.by_name["e"].path.join("mnt");
    std::fs::create_dir(&foreign).unwrap();
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("precious"), "x").unwrap();
    rustix::mount::mount_bind(outside.path(), &foreign).unwrap();
    std::os::unix::fs::symlink(outside.path(), volumes.by_name["e"].path.join("link")).unwrap();
    let error = node.volumes.teardown("u1").await.unwrap_err().to_string();
    assert!(error.contains("mounted"), "{error}");
    assert!(outside.path().join("precious").exists());
    rustix::mount::unmount(&foreign, rustix::mount::UnmountFlags::NOFOLLOW).unwrap();
    node.volumes.teardown("u1").await.unwrap();
    assert!(outside.path().join("precious").exists());
}

#[tokio::test]
async fn a_damaged_record_stops_nothing() {
    let mut node = Node::new();
    let pod = with(json!([{"name": "m", "emptyDir": {"medium": "Memory"}}]));
    node.volumes.prepare(&pod).await.unwrap();
    std::fs::write(node.dir.path().join("pods/u1/volumes.json"), "").unwrap();
    node.restart();
    node.volumes.prepare(&pod).await.unwrap();
    std::fs::write(node.dir.path().join("pods/u1/volumes.json"), "{").unwrap();
    node.volumes.teardown("u1").await.unwrap();
    assert_eq!(mounts_below(node.dir.path()).len(), 1);
}

#[tokio::test]
async fn a_lost_record_or_a_directory_in_its_place_keeps_no_volume() {
    let damages: [fn(&std::path::Path); 2] = [
        |record| std::fs::remove_file(record).unwrap(),
        |record| {
            std::fs::remove_file(record).unwrap();
            std::fs::create_dir(record).unwrap();
        },
    ];
    for damage in damages {
        let mut node = Node::new();
        let pod = with(json!([{"name": "m", "emptyDir": {"medium": "Memory"}}]));
        node.volumes.prepare(&pod).await.unwrap();
        damage(&node.dir.path().join("pods/u1/volumes.json"));
        node.restart();
        node.volumes.teardown("u1").await.unwrap();
        assert_eq!(mounts_below(node.dir.path()).len(), 1);
        assert!(!node.dir.path().join("pods/u1").exists());
    }
}

#[tokio::test]
async fn uids_that_lead_elsewhere_are_refused() {
    let node = Node::new();
    for uid in ["", ".", "..", "../x", "a/b"] {
        assert!(node.volumes.teardown(uid).await.is_err(), "{uid:?}");
    }
}

#[test]
fn volumes_mounted_inside_others_get_their_mount_points() {
    let pod = pod(json!({"containers": [{"name": "c", "volumeMounts": [
        {"name": "a", "mountPath": "/etc/a"}, {"name": "b", "mountPath": "/etc/a/b/c"},
        {"name": "c", "mountPath": "/etc/other"}, {"name": "d", "mountPath": "/etc/ab"},
    ]}]}));
    assert_eq!(plan::nested_mount_points(&pod, "a"), [PathBuf::from("b/c")]);
    assert!(plan::nested_mount_points(&pod, "b").is_empty());
}

#[test]
fn a_user_common_to_all_containers_owns_the_token() {
    let user = |spec| common_user(&pod(spec));
    let c = |uid: i64| json!({"name": "c", "securityContext": {"runAsUser": uid}});
    assert_eq!(user(json!({"containers": [c(5), c(5)]})), Some(5));
    assert_eq!(user(json!({"containers": [c(5), c(6)]})), None);
    assert_eq!(user(json!({"containers": [c(5), {"name": "d"}]})), None);
    assert_eq!(user(json!({"securityContext": {"runAsUser": 7}})), Some(7));
}
