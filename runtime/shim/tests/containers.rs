//! Containers from launch to exit, in real namespaces and cgroups. Needs root.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on stops"
)]

mod common;

use common::*;
use pod_shim::protocol::*;
use std::os::unix::fs::symlink;

fn error(result: Result<Reply, ShimError>) -> ShimError {
    result.expect_err("must fail")
}

#[test]
fn a_container_runs_and_its_exit_code_is_on_disk_before_it_is_told() {
    let mut lab = Lab::new();
    let (exit, log) = lab.run("a", &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(
        (exit.exit_code, exit.signal, exit.oom_killed),
        (7, None, false)
    );
    assert!(log == "out\nerr\n" || log == "err\nout\n", "{log:?}");
    let record = std::fs::read(lab.state_dir("a").join("exit.json")).unwrap();
    assert_eq!(serde_json::from_slice::<ExitRecord>(&record).unwrap(), exit);
    assert!(exit.started_at_ns <= exit.finished_at_ns);
    let raw = std::fs::read_to_string(lab.log_path("a")).unwrap();
    assert!(
        raw.contains("Z stdout F out\n") && raw.contains("Z stderr F err\n"),
        "{raw}"
    );
}

#[test]
fn a_killed_container_reports_its_signal() {
    let mut lab = Lab::new();
    let spec = lab.spec("a", &["sleep", "1000"]);
    lab.launch(spec).unwrap();
    let signal = |signal| Request::Signal {
        container_id: "a".into(),
        signal,
        all: false,
    };
    lab.request(signal(9), vec![]).unwrap();
    let exit = lab.wait_exit("a");
    assert_eq!((exit.exit_code, exit.signal), (137, Some(9)));
    assert_eq!(
        error(lab.request(signal(9), vec![])).kind,
        ShimErrorKind::NotFound
    );
}

#[test]
fn the_program_is_process_one_in_the_pods_namespaces() {
    let mut lab = Lab::new();
    let script = "echo $$; hostname; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; ip -o link | grep -c ' lo: .*,UP'; \
                  cat /proc/self/cgroup | grep -c ':/$'; umask";
    let (_, log) = lab.run("a", &["sh", "-c", script]);
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(&lines[..3], ["1", "box", "1234"], "{log}");
    assert_eq!(lines.last(), Some(&"0022"), "{log}");
}

#[test]
fn what_cannot_be_started_is_named_in_the_words_people_know() {
    let mut lab = Lab::new();
    let mut check =
        |id: &str, change: &dyn Fn(&mut LaunchSpec), kind: ShimErrorKind, text: &str| {
            let mut spec = lab.spec(id, &["true"]);
            change(&mut spec);
            let error = error(lab.launch(spec));
            assert_eq!((error.kind, error.message.as_str()), (kind, text));
            assert!(!lab.state_dir(id).join("exit.json").exists());
        };
    use ShimErrorKind::*;
    check(
        "a",
        &|s| s.process.argv = vec!["foo".into()],
        CommandNotFound,
        r#"exec: "foo": executable file not found in $PATH"#,
    );
    check(
        "b",
        &|s| s.process.argv = vec!["/nope/foo".into()],
        CommandNotFound,
        r#"exec: "/nope/foo": no such file or directory"#,
    );
    check(
        "c",
        &|s| s.process.argv = vec!["/etc/file".into()],
        CommandNotExecutable,
        r#"exec: "/etc/file": permission denied"#,
    );
    check(
        "d",
        &|s| s.process.cwd = "/etc/file".into(),
        BadRequest,
        r#"working directory "/etc/file" is not a directory"#,
    );
    check(
        "e",
        &|s| s.mounts.push(bind("/nonexistent/x".as_ref(), "/x")),
        BadRequest,
        r#"mount source "/nonexistent/x": no such file or directory"#,
    );
    check(
        "f",
        &|s| s.mounts.push(filesystem("/x", "nosuchfs", &[])),
        BadRequest,
        r#"mount nosuchfs at "/x": no such device"#,
    );
    // Nothing is left behind and the next one starts.
    assert_eq!(lab.run("g", &["true"]).0.exit_code, 0);
}

#[test]
fn a_missing_working_directory_is_made() {
    let mut lab = Lab::new();
    let mut spec = lab.spec("a", &["sh", "-c", "pwd"]);
    spec.process.cwd = "/srv/app".into();
    assert_eq!(lab.run_spec(spec).1, "/srv/app\n");
}

#[test]
fn a_sub_path_stays_in_its_volume() {
    let mut lab = Lab::new();
    let volume = lab.dir.join("volume");
    std::fs::create_dir_all(volume.join("inner")).unwrap();
    std::fs::write(volume.join("inner/f"), "inside\n").unwrap();
    symlink("/etc", volume.join("absolute")).unwrap();
    symlink("../../../etc", volume.join("up")).unwrap();
    symlink("inner", volume.join("fine")).unwrap();
    let with = |lab: &Lab, id: &str, sub: &str| {
        let mut spec = lab.spec(id, &["cat", "/vol/f"]);
        let mut mount = bind(&volume, "/vol");
        mount.source = MountSource::Bind {
            path: volume.clone(),
            sub_path: Some(sub.into()),
        };
        spec.mounts.push(mount);
        spec
    };
    let spec = with(&lab, "a", "fine");
    assert_eq!(lab.run_spec(spec).1, "inside\n");
    for (id, bad) in [
        ("b", "absolute"),
        ("c", "up"),
        ("d", "../x"),
        ("e", "up/new"),
    ] {
        let spec = with(&lab, id, bad);
        let error = error(lab.launch(spec));
        assert_eq!(
            error.message,
            format!("sub path {bad:?} leads outside its volume")
        );
    }
    let mut spec = with(&lab, "f", "made/now");
    spec.process.argv = vec!["touch".into(), "/vol/there".into()];
    assert_eq!(lab.run_spec(spec).0.exit_code, 0);
    assert!(volume.join("made/now/there").exists());
}

#[test]
fn mount_points_in_the_image_cannot_lead_out_of_the_root() {
    let mut lab = Lab::new();
    let canary = lab.dir.join("canary");
    std::fs::create_dir(&canary).unwrap();
    let depth = "../".repeat(20);
    let lower = lab.dir.join("lower");
    symlink(format!("{depth}{}", canary.display()), lower.join("escape")).unwrap();
    let data = lab.dir.join("data");
    std::fs::write(&data, "x").unwrap();
    let mut spec = lab.spec("a", &["cat", "/escape/sub/file"]);
    spec.mounts.push(bind(&data, "/escape/sub/file"));
    assert_eq!(lab.run_spec(spec).1, "x");
    assert_eq!(std::fs::read_dir(&canary).unwrap().count(), 0);
}

#[test]
fn masked_and_read_only_paths_hold() {
    let mut lab = Lab::new();
    let script = "wc -c < /proc/timer_list; ls /proc/scsi 2>/dev/null | wc -l; ls /sys/firmware | wc -l; \
                  echo 1 > /proc/sys/kernel/domainname || echo refused; \
                  touch /sys/x || echo refused; mkdir /sys/fs/cgroup/x || echo refused";
    let (_, log) = lab.run("a", &["sh", "-c", &format!("({script}) 2>/dev/null")]);
    assert_eq!(log, "0\n0\n0\nrefused\nrefused\nrefused\n");
}

#[test]
fn a_read_only_root_and_read_only_volumes_hold() {
    let mut lab = Lab::new();
    let volume = lab.dir.join("volume");
    std::fs::create_dir(&volume).unwrap();
    let mut spec = lab.spec(
        "a",
        &[
            "sh",
            "-c",
            "touch /x; touch /vol/x; touch /dev/shm/x && echo shm",
        ],
    );
    spec.rootfs.readonly = true;
    let mut mount = bind(&volume, "/vol");
    mount.readonly = true;
    spec.mounts.push(mount);
    let (_, log) = lab.run_spec(spec);
    assert_eq!(log.matches("Read-only file system").count(), 2, "{log}");
    assert!(log.contains("shm\n"));
}

#[test]
fn privileges_are_what_was_asked() {
    let mut lab = Lab::new();
    let status = &[
        "grep",
        "-E",
        "^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:)",
        "/proc/self/status",
    ];
    let (_, log) = lab.run("a", status);
    let caps: u64 = DEFAULT_CAPS.iter().fold(0, |bits, n| bits | 1 << n);
    for name in ["CapPrm", "CapEff", "CapBnd"] {
        assert!(log.contains(&format!("{name}:\t{caps:016x}")), "{log}");
    }
    assert!(
        log.contains("CapInh:\t0000000000000000") && log.contains("NoNewPrivs:\t0"),
        "{log}"
    );
    let mut spec = lab.spec("b", status);
    spec.process.uid = 1000;
    spec.process.gid = 1001;
    spec.process.groups = vec![5, 2000];
    spec.process.no_new_privileges = true;
    spec.process.ambient_capabilities = vec![10];
    let (_, log) = lab.run_spec(spec);
    assert!(log.contains("Uid:\t1000\t1000\t1000\t1000"), "{log}");
    assert!(
        log.contains("Gid:\t1001") && log.contains("Groups:\t5 2000"),
        "{log}"
    );
    assert!(
        log.contains("CapEff:\t0000000000000400") && log.contains("NoNewPrivs:\t1"),
        "{log}"
    );
    assert!(log.contains(&format!("CapBnd:\t{caps:016x}")), "{log}");
}

/// `seccomp` as an array of filters that allows everything but mkdir and mkdirat (EPERM).
fn no_mkdir() -> String {
    let filter = |code: u16, jt: u8, jf: u8, k: u32| {
        let mut bytes = code.to_le_bytes().to_vec();
        bytes.extend([jt, jf]);
        bytes.extend(k.to_le_bytes());
        bytes
    };
    let program = [
        filter(0x20, 0, 0, 0),
        filter(0x15, 2, 0, 83),
        filter(0x15, 1, 0, 258),
        filter(0x06, 0, 0, 0x7fff_0000),
        filter(0x06, 0, 0, 0x0005_0001),
    ]
    .concat();
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in program.chunks(3) {
        let bits = group
            .iter()
            .enumerate()
            .fold(0u32, |b, (i, v)| b | u32::from(*v) << (16 - 8 * i));
        for n in 0..4 {
            if n <= group.len() {
                text.push(alphabet[(bits >> (18 - 6 * n) & 63) as usize] as char);
            } else {
                text.push('=');
            }
        }
    }
    text
}

#[test]
fn a_system_call_filter_works_with_and_without_no_new_privileges() {
    let mut lab = Lab::new();
    for (id, nnp, uid) in [
        ("a", false, 0),
        ("b", true, 0),
        ("c", false, 1000),
        ("d", true, 1000),
    ] {
        let script = "mkdir /tmp/x 2>/dev/null || echo refused; grep Seccomp: /proc/self/status";
        let mut spec = lab.spec(id, &["sh", "-c", script]);
        spec.process.seccomp = Some(no_mkdir());
        spec.process.no_new_privileges = nnp;
        spec.process.uid = uid;
        let (_, log) = lab.run_spec(spec);
        assert_eq!(log, "refused\nSeccomp:\t2\n", "{id}");
    }
}

#[test]
fn limits_are_set_or_cut_with_a_warning() {
    let mut lab = Lab::new();
    let mut spec = lab.spec(
        "a",
        &[
            "sh",
            "-c",
            "ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj",
        ],
    );
    spec.process.rlimits = vec![(7, 100, 200), (7, 50, 1 << 40)];
    spec.process.oom_score_adj = Some(500);
    let (_, log) = lab.run_spec(spec);
    assert!(log.starts_with("50\n") && log.ends_with("\n500\n"), "{log}");
    let mut spec = lab.spec("b", &["true"]);
    spec.process.oom_score_adj = Some(-999);
    assert_eq!(lab.run_spec(spec).0.exit_code, 0);
}

#[test]
fn a_container_sees_its_own_cgroup_as_the_root() {
    let mut lab = Lab::new();
    let limit = if lab.cgroups.len() > 1 {
        "memory.limit_in_bytes"
    } else {
        "memory.max"
    };
    std::fs::write(lab.container_cgroups("a")[0].join(limit), "67108864").unwrap();
    let script = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max";
    assert_eq!(lab.run("a", &["sh", "-c", script]).1, "67108864\n");
}

#[test]
fn a_terminal_is_a_terminal() {
    let mut lab = Lab::new();
    let mut spec = lab.spec(
        "a",
        &[
            "sh",
            "-c",
            "tty; test -t 0 && echo yes; test -c /dev/console && echo console; sleep 1000",
        ],
    );
    spec.tty = true;
    spec.stdin = true;
    lab.launch(spec).unwrap();
    let resize = Request::Resize {
        target: "a".into(),
        width: 91,
        height: 33,
    };
    lab.request(resize, vec![]).unwrap();
    let (code, text) = lab.exec("e", "a", &["sh", "-c", "stty size < /dev/console"]);
    assert_eq!((code, text.as_str()), (0, "33 91\n"));
    while !log_text(&lab.log_path("a")).ends_with("console\n") {
        std::thread::yield_now();
    }
    let kill = Request::Signal {
        container_id: "a".into(),
        signal: 9,
        all: false,
    };
    lab.request(kill, vec![]).unwrap();
    lab.wait_exit("a");
    assert_eq!(log_text(&lab.log_path("a")), "/dev/pts/0\nyes\nconsole\n");
}

#[test]
fn a_memory_kill_is_seen_and_named() {
    let mut lab = Lab::new();
    let limit = if lab.cgroups.len() > 1 {
        "memory.limit_in_bytes"
    } else {
        "memory.max"
    };
    std::fs::write(lab.cgroups[0].join(limit), (8 << 20).to_string()).unwrap();
    // The first process goes on when its child is killed.
    let script = "tail -c 209715200 /dev/zero >/dev/null; echo survived; sleep 1000";
    let spec = lab.spec("a", &["sh", "-c", script]);
    lab.launch(spec).unwrap();
    match lab.next_event() {
        Event::Oom { container_id } => assert_eq!(container_id, "a"),
        other => panic!("{other:?}"),
    }
    lab.request(
        Request::Signal {
            container_id: "a".into(),
            signal: 9,
            all: true,
        },
        vec![],
    )
    .unwrap();
    assert!(lab.wait_exit("a").oom_killed);
}

#[test]
fn a_container_starts_within_one_mebibyte() {
    let mut lab = Lab::new();
    let limit = if lab.cgroups.len() > 1 {
        "memory.limit_in_bytes"
    } else {
        "memory.max"
    };
    std::fs::write(lab.cgroups[0].join(limit), (1 << 20).to_string()).unwrap();
    let (exit, _) = lab.run("a", &["true"]);
    assert_eq!((exit.exit_code, exit.oom_killed), (0, false));
}

#[test]
fn containers_of_a_pod_can_share_processes() {
    let mut lab = Lab::with(|spec| spec.share_pid = true);
    let mut first = lab.spec("a", &["sleep", "1000"]);
    first.pid_namespace = PidNamespace::Pod;
    lab.launch(first).unwrap();
    let script = "ps -o comm | grep -c sleep; ps -o pid,comm | grep ' pod-init' | head -n1; \
                  (setsid sleep 0.01 & ) ; ls /proc/1/root 2>&1 | wc -l; kill -9 1; kill -0 1 && echo alive";
    let mut second = lab.spec("b", &["sh", "-c", script]);
    second.pid_namespace = PidNamespace::Pod;
    second.process.capabilities.push(19);
    let (_, log) = lab.run_spec(second);
    let lines: Vec<&str> = log.lines().map(str::trim).collect();
    // With CAP_SYS_PTRACE the first process's root can be listed, and is empty.
    assert_eq!(lines[1..], ["1 pod-init", "0", "alive"], "{log}");
    assert_ne!(lines[0], "0");
    let mut third = lab.spec("c", &["sh", "-c", "ps -o comm | grep -c sleep"]);
    third.pid_namespace = PidNamespace::Target("a".into());
    assert_ne!(lab.run_spec(third).1, "0\n");
}

#[test]
fn what_a_container_leaves_behind_is_killed_with_it() {
    let mut lab = Lab::new();
    let mut spec = lab.spec(
        "a",
        &[
            "sh",
            "-c",
            "setsid sleep 1000 & setsid sh -c 'sleep 1001 &' ; exit 3",
        ],
    );
    spec.pid_namespace = PidNamespace::Host;
    let (exit, _) = lab.run_spec(spec);
    assert_eq!(exit.exit_code, 3);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
    let procs = lab.cgroups[0].join("a/cgroup.procs");
    // A v1 cgroup tells nobody that it is empty.
    while !std::fs::read_to_string(&procs).unwrap().is_empty() {
        assert!(std::time::Instant::now() < until, "processes are left");
        std::thread::yield_now();
    }
}

#[test]
fn a_launch_repeated_tells_the_state_and_a_forgotten_container_is_gone() {
    let mut lab = Lab::new();
    let (exit, _) = lab.run("a", &["true"]);
    let spec = lab.spec("a", &["true"]);
    match lab.launch(spec).unwrap() {
        Reply::Started(state) => assert_eq!(state.exit, Some(exit)),
        other => panic!("{other:?}"),
    }
    let forget = || Request::Forget {
        container_id: "a".into(),
    };
    lab.request(forget(), vec![]).unwrap();
    lab.request(forget(), vec![]).unwrap();
    let mut conn = connect(&lab.socket);
    match conn.receive().unwrap() {
        FromShim::Snapshot(snapshot) => assert!(snapshot.containers.is_empty()),
        other => panic!("{other:?}"),
    }
}
