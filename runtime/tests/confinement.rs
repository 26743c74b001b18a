//! What holds a pod in: users of its own, bounded shared memory, limits that are not the agent's.
//! Needs root.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on stops"
)]

mod support;

use runtime::service::{
    ContainerId, ImageService, Mount, NamespaceMode, RuntimeErrorKind, RuntimeService,
    SandboxConfig, SandboxId, UserNamespace,
};
use std::os::unix::fs::MetadataExt;
use support::{IMAGE, Node, exit, log, pod, run, script, start};

/// First id of the tests' pods.
const FIRST: u32 = 0x7100_0000;

/// A container in a pod with users of its own.
async fn start_with_users(
    engine: &runtime::Engine,
    node: &Node,
    container: runtime::service::ContainerConfig,
) -> (SandboxId, ContainerId) {
    let mut config = pod(node, "u1");
    config.user_namespace = Some(UserNamespace {
        first: FIRST,
        length: 65536,
    });
    let sandbox = engine.run_sandbox(config).await.unwrap();
    let id = engine
        .create_container(&sandbox.id, container)
        .await
        .unwrap();
    engine.start_container(&id).await.unwrap();
    (sandbox.id, id)
}

fn kernel_is_at_least(major: u32, minor: u32) -> bool {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut numbers = release.split(['.', '-']).map(|n| n.parse().unwrap_or(0));
    let running = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    running >= (major, minor)
}

fn image_mount(engine: &runtime::Engine, target: &str, sub_path: Option<&str>) -> Mount {
    Mount {
        container_path: target.into(),
        host_path: "".into(),
        sub_path: sub_path.map(str::to_owned),
        readonly: true,
        recursive_readonly: false,
        propagation: pod_shim::protocol::Propagation::Private,
        image: Some(ImageService::status(engine, IMAGE).unwrap().id),
    }
}

#[tokio::test]
async fn a_pod_with_users_of_its_own_owns_what_it_sees_and_nothing_on_the_node() {
    if !kernel_is_at_least(6, 3) {
        println!("skipped: a pod's files on tmpfs cannot be idmapped before Linux 6.3");
        return;
    }
    let node = Node::new();
    let engine = node.open().await;
    let volume = tempfile::tempdir().unwrap();
    let mut config = script("main", "exec sleep 1000");
    config.mounts.push(Mount {
        container_path: "/mnt/host".into(),
        host_path: volume.path().to_owned(),
        image: None,
        readonly: false,
        ..image_mount(&engine, "", None)
    });
    config.mounts.push(image_mount(&engine, "/mnt/image", None));
    let (sandbox, id) = start_with_users(&engine, &node, config).await;
    let seen = "id -u; ls -nd / /data /data/seed /etc/hostname /dev/shm /mnt/host \
                /mnt/image/bin/busybox | sed 's/ \\+/ /g' | cut -d' ' -f3,4; \
                touch /mnt/host/made /data/made /made; cat /data/seed; \
                touch /mnt/image/x 2>/dev/null || echo ' ro'";
    let output = run(&engine, &id, seen).await;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let owners = "0 0\n".repeat(7);
    assert_eq!(
        text,
        format!("0\n{owners}from the image ro\n"),
        "{output:?}"
    );
    assert_eq!(
        std::fs::metadata(volume.path().join("made")).unwrap().uid(),
        0
    );
    let status = engine.container_status(&id).unwrap();
    let runtime::service::ContainerState::Running { pid, .. } = status.state else {
        panic!("it runs");
    };
    assert_eq!(
        std::fs::metadata(format!("/proc/{pid}")).unwrap().uid(),
        FIRST
    );
    // The pod's directories on disk hold ids of the range, and are removed all the same.
    let upper = node
        .config
        .root
        .join("containers")
        .join(id.as_str())
        .join("upper");
    assert_eq!(std::fs::metadata(upper.join("made")).unwrap().uid(), FIRST);
    engine.remove_sandbox(&sandbox).await.unwrap();
    assert_eq!(node.run_files() + node.container_files(), 0);
}

#[tokio::test]
async fn users_of_its_own_and_namespaces_of_the_node_exclude_each_other() {
    let node = Node::new();
    let engine = node.open().await;
    let changes: [fn(&mut SandboxConfig); 3] = [
        |c| c.network = NamespaceMode::Node,
        |c| c.pid = NamespaceMode::Node,
        |c| c.ipc = NamespaceMode::Node,
    ];
    for change in changes {
        let mut config = pod(&node, "u1");
        config.user_namespace = Some(UserNamespace {
            first: FIRST,
            length: 65536,
        });
        change(&mut config);
        let refused = engine.run_sandbox(config).await.unwrap_err();
        assert_eq!(refused.kind, RuntimeErrorKind::Invalid, "{refused}");
    }
    assert_eq!(node.sandbox_files() + node.run_files(), 0);
}

#[tokio::test]
async fn a_part_of_an_image_is_mounted_and_a_missing_part_is_named() {
    let node = Node::new();
    let engine = node.open().await;
    let mut config = script("main", "cat /i/group | head -n 1");
    config.mounts.push(image_mount(&engine, "/i", Some("etc")));
    let (sandbox, id) = start(&engine, &node, "u1", config).await;
    assert_eq!(exit(&engine, &id).await.0, 0);
    assert_eq!(log(&engine, &id), "root:x:0:");
    let mut config = script("other", "true");
    config
        .mounts
        .push(image_mount(&engine, "/i", Some("not/there")));
    let refused = engine.create_container(&sandbox, config).await.unwrap_err();
    assert_eq!(refused.kind, RuntimeErrorKind::Invalid);
    assert!(refused.message.contains("not/there"), "{refused}");
}

#[tokio::test]
async fn shared_memory_and_open_files_have_limits_of_their_own() {
    let node = Node::new();
    let engine = node.open().await;
    let config = script("main", "exec sleep 1000");
    let (sandbox, id) = start(&engine, &node, "u1", config).await;
    let command = "df -k /dev/shm | tail -n 1 | sed 's/ \\+/ /g' | cut -d' ' -f2; ulimit -Sn";
    let output = run(&engine, &id, command).await;
    assert_eq!(String::from_utf8_lossy(&output.stdout), "65536\n1024\n");
    engine.stop_sandbox(&sandbox).await.unwrap();
    let table = linux::mountinfo::read().unwrap();
    let left = table
        .iter()
        .filter(|m| m.mount_point.starts_with(&node.config.run_dir));
    assert_eq!(left.count(), 0);
}
