//! Pods with users of their own: what is theirs, what they see of the node, and what is left of
//! them on disk. Needs root and a kernel with idmapped mounts of overlays' layers.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on stops"
)]

mod common;

use common::*;
use pod_shim::protocol::*;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

/// First id of the tests' pods.
const FIRST: u32 = 0x7000_0000;
const IDS: UserNamespace = UserNamespace {
    first: FIRST,
    length: 65536,
};

fn lab(change: impl FnOnce(&mut SandboxSpec)) -> Lab {
    Lab::with(|spec| {
        spec.user_namespace = Some(IDS);
        change(spec);
    })
}

/// A container as the engine describes one of such a pod.
fn spec(lab: &Lab, id: &str, argv: &[&str]) -> LaunchSpec {
    let spec = lab.spec(id, argv);
    chown(&spec.rootfs.upper, Some(FIRST), Some(FIRST)).unwrap();
    spec
}

fn mapped(path: &Path, target: &str) -> MountSpec {
    MountSpec {
        map_ids: true,
        ..bind(path, target)
    }
}

fn owner(path: &Path) -> (u32, u32) {
    let found = std::fs::symlink_metadata(path).unwrap();
    (found.uid(), found.gid())
}

#[test]
fn root_in_the_pod_is_nobody_on_the_node_and_owns_the_image() {
    let mut lab = lab(|_| {});
    let script = "id -u; echo $$; cut -d' ' -f1-99 /proc/self/uid_map | tr -s ' '; \
                  stat -c %u:%g / /etc/file /bin /dev/shm /proc/self/; touch /made && mkdir /etc/d; \
                  stat -c %u:%g /made; chown 1000:1001 /made; hostname; \
                  cat /proc/sys/net/ipv4/ip_unprivileged_port_start; (echo 9 > /proc/sys/net/ipv4/ip_unprivileged_port_start) 2>/dev/null && echo written; \
                  echo x > /dev/null && echo null";
    let started = spec(&lab, "a", &["sh", "-c", script]);
    let (exit, log) = lab.run_spec(started);
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(exit.exit_code, 0, "{log}");
    let map = format!(" 0 {FIRST} 65536");
    let want = [
        "0", "1", &map, "0:0", "0:0", "0:0", "0:0", "0:0", "0:0", "box", "1234", "null",
    ];
    assert_eq!(lines, want);
    let upper = lab.state_dir("a").join("upper");
    assert_eq!(owner(&upper.join("made")), (FIRST + 1000, FIRST + 1001));
    assert_eq!(owner(&upper.join("etc/d")), (FIRST, FIRST));
    assert_eq!(owner(&lab.dir.join("lower/etc/file")), (0, 0));
}

#[test]
fn all_its_namespaces_belong_to_the_pods_users() {
    let mut lab = lab(|_| {});
    let started = spec(&lab, "a", &["sleep", "1000"]);
    let Reply::Started(state) = lab.launch(started).unwrap() else {
        panic!("not started");
    };
    let of = |pid: i32, name: &str| std::fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
    for name in ["user", "pid", "mnt", "net", "ipc", "uts"] {
        assert_ne!(
            of(state.pid, name),
            of(std::process::id() as i32, name),
            "{name}"
        );
        let file = std::fs::File::open(format!("/proc/{}/ns/{name}", state.pid)).unwrap();
        if name != "user" {
            let owner = linux::process::namespace::owner(&file).unwrap();
            let user = std::fs::metadata(format!("/proc/{}/ns/user", state.pid)).unwrap();
            let owner = std::fs::File::from(owner).metadata().unwrap();
            assert_eq!(owner.ino(), user.ino(), "{name}");
        }
    }
    let found = std::fs::metadata(format!("/proc/{}", state.pid)).unwrap();
    assert_eq!((found.uid(), found.gid()), (FIRST, FIRST));
}

#[test]
fn volumes_hold_ids_as_the_pod_sees_them() {
    let mut lab = lab(|_| {});
    let volume = lab.dir.join("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(volume.join("theirs"), "x").unwrap();
    chown(volume.join("theirs"), Some(1000), Some(2000)).unwrap();
    let script = "stat -c %u:%g /v /v/theirs; touch /v/mine; chown 5:6 /v/mine; id -G; id -u; \
                  touch /v/user 2>&1";
    let mut started = spec(&lab, "a", &["sh", "-c", script]);
    started.mounts.push(mapped(&volume, "/v"));
    let (_, log) = lab.run_spec(started);
    assert_eq!(
        log.lines().take(2).collect::<Vec<_>>(),
        ["0:0", "1000:2000"],
        "{log}"
    );
    assert_eq!(owner(&volume.join("mine")), (5, 6));
    assert_eq!(owner(&volume.join("user")), (0, 0));
    let mut started = spec(&lab, "b", &["sh", "-c", "id -u; id -g; touch /v/b"]);
    std::fs::set_permissions(&volume, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    started.mounts.push(mapped(&volume, "/v"));
    (started.process.uid, started.process.gid) = (1234, 4321);
    let (exit, log) = lab.run_spec(started);
    assert_eq!((exit.exit_code, log.as_str()), (0, "1234\n4321\n"));
    assert_eq!(owner(&volume.join("b")), (1234, 4321));
}

#[test]
fn a_path_of_the_node_that_is_not_mapped_is_out_of_its_reach() {
    let mut lab = lab(|_| {});
    let volume = lab.dir.join("volume");
    std::fs::create_dir(&volume).unwrap();
    let script = "stat -c %u /v; touch /v/x 2>/dev/null || echo refused; \
                  mknod /n c 1 3 2>/dev/null || echo no nodes; \
                  umount /proc/kcore 2>/dev/null; \
                  (echo 1 > /proc/sys/kernel/panic) 2>/dev/null || echo kept";
    let mut started = spec(&lab, "a", &["sh", "-c", script]);
    started.mounts.push(bind(&volume, "/v"));
    started.process.capabilities = (0..=40).collect();
    let (_, log) = lab.run_spec(started);
    assert_eq!(log, "65534\nrefused\nno nodes\nkept\n");
}

#[test]
fn sessions_join_the_pods_users() {
    let mut lab = lab(|_| {});
    let started = spec(&lab, "a", &["sleep", "1000"]);
    lab.launch(started).unwrap();
    let script = "id -u; touch /from-exec; cut -c1-20 /proc/self/uid_map | tr -d ' \n'";
    let (code, text) = lab.exec("e", "a", &["sh", "-c", script]);
    assert_eq!(code, 0, "{text}");
    assert!(text.starts_with("0\n0"), "{text}");
    let upper = lab.state_dir("a").join("upper");
    assert_eq!(owner(&upper.join("from-exec")), (FIRST, FIRST));
}

#[test]
fn a_shared_pid_namespace_belongs_to_the_pods_users_too() {
    let mut lab = lab(|spec| spec.share_pid = true);
    let mut shared = |id: &str, script: &str| {
        let mut started = spec(&lab, id, &["sh", "-c", script]);
        started.pid_namespace = PidNamespace::Pod;
        lab.run_spec(started)
    };
    let (exit, log) = shared("a", "test $$ -gt 1 && cat /proc/1/comm; id -u; touch /made");
    assert_eq!((exit.exit_code, log.as_str()), (0, "pod-init\n0\n"));
}

#[test]
fn a_failure_behind_the_change_of_users_is_told_and_a_kill_finds_the_process() {
    let mut lab = lab(|_| {});
    let started = spec(&lab, "a", &["/nope/foo"]);
    let error = lab.launch(started).unwrap_err();
    assert_eq!(error.kind, ShimErrorKind::CommandNotFound, "{error:?}");
    let mut started = spec(&lab, "b", &["true"]);
    started.mounts.push(mapped("/nonexistent".as_ref(), "/v"));
    let error = lab.launch(started).unwrap_err();
    assert_eq!(error.kind, ShimErrorKind::BadRequest, "{error:?}");
    let started = spec(&lab, "c", &["sleep", "1000"]);
    lab.launch(started).unwrap();
    let kill = Request::Signal {
        container_id: "c".into(),
        signal: 9,
        all: false,
    };
    lab.request(kill, vec![]).unwrap();
    assert_eq!(lab.wait_exit("c").signal, Some(9));
}

#[test]
fn images_are_mounted_by_their_layers_with_and_without_users_of_ones_own() {
    for ids in [None, Some(IDS)] {
        let mut lab = Lab::with(|spec| spec.user_namespace = ids);
        let layer = |name: &str, file: &str| {
            let dir = lab.dir.join(name);
            std::fs::create_dir_all(dir.join("data")).unwrap();
            std::fs::write(dir.join("data").join(file), name).unwrap();
            dir
        };
        let (top, bottom) = (layer("top", "t"), layer("bottom", "b"));
        std::os::unix::fs::symlink("/data/b", top.join("link")).unwrap();
        let image = |target: &str, lower: Vec<_>, sub_path: Option<&str>| MountSpec {
            source: MountSource::Layers {
                lower,
                changes: None,
                sub_path: sub_path.map(str::to_owned),
            },
            readonly: true,
            noexec: true,
            ..bind(Path::new(""), target)
        };
        let both = || vec![top.clone(), bottom.clone()];
        let script = "cat /one/data/t /two/data/t /two/data/b /sub/b /file; \
                      stat -c ' %u' /one/data/t /two/data/b; touch /two/x 2>/dev/null || echo ro";
        let mut started = lab.spec("a", &["sh", "-c", script]);
        if let Some(ids) = ids {
            chown(&started.rootfs.upper, Some(ids.first), Some(ids.first)).unwrap();
        }
        started.mounts.extend([
            image("/one", vec![top.clone()], None),
            image("/two", both(), None),
            image("/sub", both(), Some("data")),
            image("/file", both(), Some("link")),
        ]);
        let (exit, log) = lab.run_spec(started);
        assert_eq!(log, "toptopbottombottombottom 0\n 0\nro\n", "{exit:?}");
        let mut started = lab.spec("b", &["true"]);
        started.mounts.push(image("/i", both(), Some("missing")));
        let error = lab.launch(started).unwrap_err();
        assert!(error.message.contains("sub path \"missing\""), "{error:?}");
    }
}
