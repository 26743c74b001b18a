//! Logs under rotation, exec, attach, and lives that do not depend on one another. Needs root.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on stops"
)]

mod common;

use common::*;
use pod_shim::protocol::*;
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

/// All lines of a log and its rotated files, oldest first.
fn all_lines(log: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(log.parent().unwrap())
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    names.sort_by_key(|p| (p == log, p.clone()));
    names
        .iter()
        .flat_map(|p| log_text(p).lines().map(str::to_owned).collect::<Vec<_>>())
        .collect()
}

#[test]
fn rotation_under_a_fast_writer_loses_no_line() {
    let mut lab = Lab::new();
    let mut spec = lab.spec("a", &["seq", "1", "300000"]);
    let log = spec.log.as_mut().unwrap();
    (log.max_bytes, log.max_files) = (256 * 1024, 1000);
    let (exit, _) = lab.run_spec(spec);
    assert_eq!(exit.exit_code, 0);
    let lines = all_lines(&lab.log_path("a"));
    assert_eq!(lines.len(), 300_000);
    assert!(
        lines
            .iter()
            .enumerate()
            .all(|(n, line)| *line == (n + 1).to_string())
    );
    for entry in std::fs::read_dir(lab.log_path("a").parent().unwrap()).unwrap() {
        assert!(entry.unwrap().metadata().unwrap().len() <= 256 * 1024);
    }
}

#[test]
fn a_log_moved_away_is_continued_in_a_new_file() {
    let mut lab = Lab::new();
    let script = "echo one; while [ ! -e /go ]; do sleep 0.01; done; echo two";
    let spec = lab.spec("a", &["sh", "-c", script]);
    lab.launch(spec).unwrap();
    let (log, moved) = (lab.log_path("a"), lab.dir.join("moved.log"));
    while log_text(&log) != "one\n" {
        std::thread::yield_now();
    }
    std::fs::rename(&log, &moved).unwrap();
    lab.request(
        Request::ReopenLog {
            container_id: "a".into(),
        },
        vec![],
    )
    .unwrap();
    lab.exec("e", "a", &["touch", "/go"]);
    lab.wait_exit("a");
    assert_eq!(
        (log_text(&moved).as_str(), log_text(&log).as_str()),
        ("one\n", "two\n")
    );
}

#[test]
fn a_session_has_its_own_exit_code_streams_and_environment() {
    let mut lab = Lab::new();
    let spec = lab.spec("a", &["sleep", "1000"]);
    lab.launch(spec).unwrap();
    let (code, text) = lab.exec(
        "e1",
        "a",
        &["sh", "-c", "echo hello; echo $HOME >&2; hostname; exit 9"],
    );
    assert_eq!((code, text.as_str()), (9, "hello\n/\nbox\n"));
    let (code, text) = lab.exec(
        "e2",
        "a",
        &["grep", "-E", "CapEff|CapBnd", "/proc/self/status"],
    );
    assert_eq!(code, 0);
    assert!(!text.contains("ffffff"), "{text}");
    let (_, text) = lab.exec(
        "e3",
        "a",
        &[
            "sh",
            "-c",
            "ls -l /proc/self/fd 2>/dev/null | wc -l; ps -o comm | head -n 2",
        ],
    );
    // total, 0, 1, 2, and ls's own directory.
    assert_eq!(text.lines().next(), Some("5"), "{text}");
    let mut missing = lab.exec_spec("e4", "a", &["nope"]);
    let error = lab
        .request(Request::Exec(Box::new(missing.clone())), vec![])
        .unwrap_err();
    assert_eq!(error.kind, ShimErrorKind::CommandNotFound);
    assert_eq!(
        error.message,
        r#"exec: "nope": executable file not found in $PATH"#
    );
    missing.container_id = "b".into();
    let error = lab
        .request(Request::Exec(Box::new(missing)), vec![])
        .unwrap_err();
    assert_eq!(error.kind, ShimErrorKind::NotFound);
}

#[test]
fn a_sessions_stdin_is_the_clients() {
    let mut lab = Lab::new();
    let spec = lab.spec("a", &["sleep", "1000"]);
    lab.launch(spec).unwrap();
    let (in_read, in_write) = linux::event::pipe().unwrap();
    let (out_read, out_write) = linux::event::pipe().unwrap();
    let mut spec = lab.exec_spec("e", "a", &["cat"]);
    spec.stdio = Stdio {
        stdin: true,
        stdout: true,
        stderr: false,
    };
    lab.request(Request::Exec(Box::new(spec)), vec![in_read, out_write])
        .unwrap();
    linux::event::write(in_write.as_fd(), b"through").unwrap();
    drop(in_write);
    assert_eq!(read_all(out_read), "through");
    assert_eq!(lab.wait_exec("e"), 0);
}

#[test]
fn a_session_with_a_terminal_hands_out_its_master_side() {
    let mut lab = Lab::new();
    let spec = lab.spec("a", &["sleep", "1000"]);
    lab.launch(spec).unwrap();
    let mut spec = lab.exec_spec(
        "e",
        "a",
        &["sh", "-c", "tty; read x; echo got $x; stty size"],
    );
    spec.tty = true;
    lab.request(Request::Exec(Box::new(spec)), vec![]).unwrap();
    let master = lab.conn.take_fds(1).unwrap().remove(0);
    lab.request(
        Request::Resize {
            target: "e".into(),
            width: 77,
            height: 22,
        },
        vec![],
    )
    .unwrap();
    linux::event::write(master.as_fd(), b"word\n").unwrap();
    let text = read_all(master);
    assert!(
        text.contains("/dev/pts/0") && text.contains("got word") && text.contains("22 77"),
        "{text}"
    );
    assert_eq!(lab.wait_exec("e"), 0);
}

#[test]
fn a_killed_session_leaves_nothing_and_the_container_goes_on() {
    let mut lab = Lab::new();
    let spec = lab.spec("a", &["sleep", "1000"]);
    lab.launch(spec).unwrap();
    let (read, write) = linux::event::pipe().unwrap();
    let script = "setsid sh -c 'sleep 2000 & sleep 2001' & sleep 2002 & echo up; sleep 2003";
    let mut spec = lab.exec_spec("e", "a", &["sh", "-c", script]);
    spec.stdio.stdout = true;
    lab.request(Request::Exec(Box::new(spec)), vec![write])
        .unwrap();
    let mut buffer = [0; 16];
    assert_eq!(linux::event::read(read.as_fd(), &mut buffer).unwrap(), 3);
    lab.request(
        Request::ExecKill {
            exec_id: "e".into(),
        },
        vec![],
    )
    .unwrap();
    assert_eq!(lab.wait_exec("e"), 137);
    // The pipe ends when the last of them is gone.
    assert_eq!(read_all(read), "");
    let (_, text) = lab.exec("e2", "a", &["sh", "-c", "ps | grep -c '[s]leep 200'"]);
    assert_eq!(text, "0\n");
    for dir in lab.container_cgroups("a") {
        assert!(
            !std::fs::read_dir(dir)
                .unwrap()
                .any(|e| e.unwrap().path().is_dir())
        );
    }
}

#[test]
fn what_a_session_leaves_running_belongs_to_the_container() {
    let mut lab = Lab::new();
    let spec = lab.spec("a", &["sleep", "1000"]);
    lab.launch(spec).unwrap();
    let (code, _) = lab.exec(
        "e",
        "a",
        &["sh", "-c", "setsid sleep 2000 >/dev/null 2>&1 & exit 0"],
    );
    assert_eq!(code, 0);
    let (_, text) = lab.exec("e2", "a", &["sh", "-c", "ps | grep -c '[s]leep 2000'"]);
    assert_eq!(text, "1\n");
    lab.request(
        Request::Signal {
            container_id: "a".into(),
            signal: 9,
            all: true,
        },
        vec![],
    )
    .unwrap();
    lab.wait_exit("a");
}

#[test]
fn an_attached_client_sees_and_feeds_the_container() {
    let mut lab = Lab::new();
    let mut spec = lab.spec(
        "a",
        &["sh", "-c", "while read x; do echo got $x; done; echo end"],
    );
    (spec.stdin, spec.stdin_once) = (true, true);
    lab.launch(spec).unwrap();
    let (in_read, in_write) = linux::event::pipe().unwrap();
    let (out_read, out_write) = linux::event::pipe().unwrap();
    let stdio = Stdio {
        stdin: true,
        stdout: true,
        stderr: false,
    };
    let attach = Request::Attach {
        container_id: "a".into(),
        stdio,
    };
    lab.request(attach, vec![in_read, out_write]).unwrap();
    linux::event::write(in_write.as_fd(), b"one\ntwo\n").unwrap();
    drop(in_write);
    assert_eq!(read_all(out_read), "got one\ngot two\nend\n");
    assert_eq!(lab.wait_exit("a").exit_code, 0);
    assert_eq!(log_text(&lab.log_path("a")), "got one\ngot two\nend\n");
}

/// Whether the shim comes to rest: asleep in many looks one after the other.
fn comes_to_rest(pid: i32) -> bool {
    let mut asleep = 0;
    for _ in 0..1_000_000 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let resting = stat.rsplit_once(") ").unwrap().1.starts_with('S');
        asleep = if resting { asleep + 1 } else { 0 };
        if asleep == 2000 {
            return true;
        }
    }
    false
}

#[test]
fn a_shim_rests_whoever_hangs_up_on_stdin() {
    let mut lab = Lab::new();
    let mut closed = lab.spec("closed", &["sh", "-c", "exec sleep 1000 0<&-"]);
    closed.stdin = true;
    let mut idle = lab.spec("idle", &["sleep", "1000"]);
    idle.stdin = true;
    for (id, spec) in [("closed", closed), ("idle", idle)] {
        lab.launch(spec).unwrap();
        let (in_read, in_write) = linux::event::pipe().unwrap();
        let stdio = Stdio {
            stdin: true,
            stdout: false,
            stderr: false,
        };
        let attach = Request::Attach {
            container_id: id.into(),
            stdio,
        };
        // Refused when the container was quicker to close its end.
        let _ = lab.request(attach, vec![in_read]);
        // More than the container's pipe and the shim's queue take.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                linux::event::set_nonblocking(in_write.as_fd()).unwrap();
                for _ in 0..1000 {
                    let _ = linux::event::write(in_write.as_fd(), &[0; 4096]);
                }
            });
        });
        drop(in_write);
        assert!(comes_to_rest(lab.shim.pid), "{id}");
    }
}

#[test]
fn a_client_that_does_not_read_does_not_stop_the_container() {
    let mut lab = Lab::new();
    let mut spec = lab.spec(
        "a",
        &[
            "sh",
            "-c",
            "while [ ! -e /go ]; do sleep 0.01; done; seq 1 400000",
        ],
    );
    spec.log = None;
    lab.launch(spec).unwrap();
    let (_out_read, out_write) = linux::event::pipe().unwrap();
    let stdio = Stdio {
        stdin: false,
        stdout: true,
        stderr: false,
    };
    lab.request(
        Request::Attach {
            container_id: "a".into(),
            stdio,
        },
        vec![out_write],
    )
    .unwrap();
    lab.exec("e", "a", &["touch", "/go"]);
    assert_eq!(lab.wait_exit("a").exit_code, 0);
}

/// More than the pipe takes: the rest is the shim's, whatever comes of the container.
#[test]
fn a_client_that_reads_late_gets_all_that_an_ended_container_wrote() {
    let mut lab = Lab::new();
    for (id, lines) in [("short", 30_000), ("long", 300_000)] {
        let script = format!("while [ ! -e /go ]; do sleep 0.01; done; seq 1 {lines}");
        let spec = lab.spec(id, &["sh", "-c", &script]);
        lab.launch(spec).unwrap();
        let (out_read, out_write) = linux::event::pipe().unwrap();
        let stdio = Stdio {
            stdin: false,
            stdout: true,
            stderr: false,
        };
        let attach = Request::Attach {
            container_id: id.into(),
            stdio,
        };
        lab.request(attach, vec![out_write]).unwrap();
        lab.exec("e", id, &["touch", "/go"]);
        if id == "short" {
            // Less than what holds a container: it ends with nobody reading.
            lab.wait_exit(id);
        }
        let wanted: String = (1..=lines).map(|i| format!("{i}\n")).collect();
        assert!(read_all(out_read) == wanted, "{id}: the output differs");
        if id == "long" {
            assert_eq!(lab.wait_exit(id).exit_code, 0);
        }
        assert!(
            log_text(&lab.log_path(id)) == wanted,
            "{id}: the log differs"
        );
    }
}

#[test]
fn a_session_ends_with_the_client_that_asked_for_it() {
    let mut lab = Lab::new();
    let spec = lab.spec("a", &["sleep", "1000"]);
    lab.launch(spec).unwrap();
    let (read, write) = linux::event::pipe().unwrap();
    let mut spec = lab.exec_spec(
        "e",
        "a",
        &["sh", "-c", "setsid sleep 2000 & echo up; sleep 2001"],
    );
    spec.stdio.stdout = true;
    lab.request(Request::Exec(Box::new(spec)), vec![write])
        .unwrap();
    let mut buffer = [0; 16];
    assert_eq!(linux::event::read(read.as_fd(), &mut buffer).unwrap(), 3);
    let socket = lab.socket.clone();
    lab.conn = connect(&socket);
    // The pipe ends when the last of them is gone.
    assert_eq!(read_all(read), "");
    match lab.conn.receive().unwrap() {
        FromShim::Snapshot(snapshot) => assert_eq!(snapshot.containers[0].exit, None),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_exit_while_nobody_is_connected_is_in_the_next_snapshot() {
    let mut lab = Lab::new();
    let volume = lab.dir.join("volume");
    std::fs::create_dir(&volume).unwrap();
    let script = "while [ ! -e /vol/go ]; do sleep 0.01; done; echo late; exit 5";
    let mut spec = lab.spec("a", &["sh", "-c", script]);
    spec.mounts.push(bind(&volume, "/vol"));
    lab.launch(spec).unwrap();
    // Gone without a word, as a killed agent is.
    let socket = lab.socket.clone();
    lab.conn = connect(&socket);
    std::fs::write(volume.join("go"), "").unwrap();
    let record = lab.state_dir("a").join("exit.json");
    while !record.exists() {
        std::thread::yield_now();
    }
    lab.conn = connect(&socket);
    match lab.conn.receive().unwrap() {
        FromShim::Snapshot(snapshot) => {
            assert_eq!(snapshot.version, PROTOCOL_VERSION);
            assert_eq!(snapshot.containers[0].exit.as_ref().unwrap().exit_code, 5);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(log_text(&lab.log_path("a")), "late\n");
}

#[test]
fn a_shim_ignores_polite_signals_and_takes_its_containers_with_it_when_killed() {
    for namespace in [
        PidNamespace::Container,
        PidNamespace::Pod,
        PidNamespace::Host,
    ] {
        let mut lab = Lab::with(|spec| spec.share_pid = true);
        for (id, uid) in [("a", 0), ("b", 1000)] {
            let mut spec = lab.spec(id, &["sleep", "1000"]);
            spec.pid_namespace = namespace.clone();
            spec.process.uid = uid;
            lab.launch(spec).unwrap();
        }
        for signal in [1, 2, 13, 15] {
            lab.shim.pidfd.send_signal(signal).unwrap();
        }
        let mut pids = BTreeMap::new();
        let mut conn = connect(&lab.socket);
        match conn.receive().unwrap() {
            FromShim::Snapshot(snapshot) => {
                for container in snapshot.containers {
                    let fd = linux::process::pidfd::PidFd::open(container.pid).unwrap();
                    pids.insert(container.container_id, fd);
                }
            }
            other => panic!("{other:?}"),
        }
        lab.shim.pidfd.send_signal(9).unwrap();
        for (id, fd) in pids {
            assert!(
                fd.wait_exited(Duration::from_secs(10)).unwrap(),
                "{id} lives in {namespace:?}"
            );
        }
        let _ = linux::process::namespace::unpin_net(&lab.dir.join("netns"));
    }
}

#[test]
fn shutdown_kills_unpins_and_removes_everything() {
    let mut lab = Lab::new();
    let spec = lab.spec("a", &["sleep", "1000"]);
    lab.launch(spec).unwrap();
    let netns = lab.dir.join("netns");
    assert!(netns.exists());
    assert!(matches!(
        lab.request(Request::Shutdown, vec![]),
        Ok(Reply::Done)
    ));
    assert!(lab.shim.pidfd.wait_exited(Duration::from_secs(10)).unwrap());
    assert!(!netns.exists() && !lab.socket.exists());
    assert!(lab.state_dir("a").join("exit.json").exists());
}

#[test]
fn a_malformed_request_costs_only_its_sender() {
    let mut lab = Lab::new();
    let mut stream = std::os::unix::net::UnixStream::connect(&lab.socket).unwrap();
    std::io::Write::write_all(&mut stream, b"\xff\xff\xff\xffgarbage").unwrap();
    let mut rest = Vec::new();
    std::io::Read::read_to_end(&mut stream, &mut rest).unwrap();
    assert_eq!(lab.run("a", &["true"]).0.exit_code, 0);
}
