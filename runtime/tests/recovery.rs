//! The engine goes and another one comes: nothing that runs is disturbed, nothing is forgotten.
//! Dropping an engine ends its connections as its death would; records are what it left.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod support;

use runtime::service::{ContainerState, RuntimeService, SandboxState};
use support::{Node, alive, exit, log, pod, run, script, start};

#[tokio::test]
async fn running_containers_are_adopted_undisturbed() {
    let node = Node::new();
    let engine = node.open().await;
    let (sandbox, id) = start(&engine, &node, "u1", script("main", "exec sleep 1000")).await;
    let before = engine.container_status(&id).unwrap();
    drop(engine);
    let engine = node.open().await;
    assert_eq!(engine.container_status(&id).unwrap(), before);
    assert_eq!(engine.list_sandboxes()[0].state, SandboxState::Ready);
    assert_eq!(
        run(&engine, &id, "echo still here").await.stdout,
        b"still here\n"
    );
    let next = engine
        .create_container(&sandbox, script("next", "exit 5"))
        .await
        .unwrap();
    engine.start_container(&next).await.unwrap();
    assert_eq!(exit(&engine, &next).await.0, 5);
    engine.remove_sandbox(&sandbox).await.unwrap();
    assert_eq!(
        node.run_files() + node.sandbox_files() + node.container_files(),
        0
    );
}

#[tokio::test]
async fn an_exit_while_nobody_looked_keeps_its_code_and_its_log() {
    let node = Node::new();
    let engine = node.open().await;
    let wait = "while [ ! -e /dev/shm/go ]; do sleep 0.02; done; echo last words; exit 7";
    let (sandbox, id) = start(&engine, &node, "u1", script("main", wait)).await;
    let ContainerState::Running { pid, .. } = engine.container_status(&id).unwrap().state else {
        panic!("it runs");
    };
    drop(engine);
    let shared = node.config.run_dir.join("shm").join(sandbox.as_str());
    std::fs::write(shared.join("go"), "").unwrap();
    let gone = async {
        while alive(pid) {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(support::SOON, gone).await.unwrap();
    let engine = node.open().await;
    assert_eq!(exit(&engine, &id).await, (7, "Error".to_owned()));
    assert_eq!(log(&engine, &id), "last words");
}

#[tokio::test]
async fn a_shim_killed_while_nobody_looked_is_noticed() {
    let node = Node::new();
    let engine = node.open().await;
    let (sandbox, id) = start(&engine, &node, "u1", script("main", "exec sleep 1000")).await;
    let shim = engine.list_sandboxes()[0].shim_pid;
    drop(engine);
    let shim = linux::process::pidfd::PidFd::open(shim).unwrap();
    shim.send_signal(9).unwrap();
    assert!(shim.wait_exited(support::SOON).unwrap());
    let engine = node.open().await;
    let (code, reason) = exit(&engine, &id).await;
    assert_eq!((code, reason.as_str()), (137, "ContainerStatusUnknown"));
    assert!(node.processes().is_empty());
    engine.remove_sandbox(&sandbox).await.unwrap();
    assert_eq!(
        node.run_files() + node.sandbox_files() + node.container_files(),
        0
    );
}

#[tokio::test]
async fn a_shim_that_cannot_be_asked_is_ended_before_its_pod_begins_anew() {
    let node = Node::new();
    let engine = node.open().await;
    let (sandbox, id) = start(&engine, &node, "u1", script("main", "exec sleep 1000")).await;
    let shim = engine.list_sandboxes()[0].shim_pid;
    let shim = linux::process::pidfd::PidFd::open(shim).unwrap();
    drop(engine);
    let socket = node
        .config
        .run_dir
        .join("shim")
        .join(format!("{sandbox}.sock"));
    std::fs::remove_file(socket).unwrap();
    let engine = node.open().await;
    assert!(shim.has_exited().unwrap());
    assert_eq!(exit(&engine, &id).await.1, "ContainerStatusUnknown");
    assert!(node.processes().is_empty());
    engine.remove_sandbox(&sandbox).await.unwrap();
    assert_eq!(node.run_files() + node.container_files(), 0);
}

#[tokio::test]
async fn a_container_whose_record_is_damaged_is_ended_and_removed() {
    let node = Node::new();
    let engine = node.open().await;
    let damages: [fn(&std::path::Path); 3] = [
        |record| std::fs::write(record, "").unwrap(),
        |record| std::fs::write(record, "{\"version\":1,").unwrap(),
        // Who opens it waits for a writer.
        |record| {
            std::fs::remove_file(record).unwrap();
            let mode = rustix::fs::Mode::from_raw_mode(0o600);
            let kind = rustix::fs::FileType::Fifo;
            rustix::fs::mknodat(rustix::fs::CWD, record, kind, mode, 0).unwrap();
        },
    ];
    let mut records = Vec::new();
    for uid in ["empty", "torn", "fifo"] {
        let (sandbox, id) = start(&engine, &node, uid, script("main", "exec sleep 1000")).await;
        let dir = node.config.root.join("containers").join(id.as_str());
        records.push((id, sandbox, dir.join("container.json")));
    }
    drop(engine);
    for (damage, (_, _, record)) in damages.iter().zip(&records) {
        damage(record);
    }
    let engine = node.open().await;
    for (id, ..) in &records {
        assert!(engine.container_status(id).is_none());
    }
    assert_eq!(node.container_files(), 0);
    assert_eq!(engine.audit(), Vec::<String>::new());
    for (_, sandbox, _) in &records {
        engine.remove_sandbox(sandbox).await.unwrap();
    }
    assert!(node.processes().is_empty());
}

#[tokio::test]
async fn a_lost_image_record_takes_nothing_from_running_containers() {
    let node = Node::new();
    let engine = node.open().await;
    let (sandbox, id) = start(&engine, &node, "u1", script("main", "exec sleep 1000")).await;
    drop(engine);
    let images = node.config.root.join("images");
    for entry in std::fs::read_dir(&images).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "json") {
            std::fs::write(path, "garbage").unwrap();
        }
    }
    // Twice: what was kept the first time is kept for the same reason the second.
    for _ in 0..2 {
        let engine = node.open().await;
        let listed = support::run(&engine, &id, "ls /bin/busybox").await;
        assert_eq!(listed.stdout, b"/bin/busybox\n");
    }
    let engine = node.open().await;
    engine.remove_sandbox(&sandbox).await.unwrap();
}

/// Rewrites one word of a record, as if the engine had died at that point.
fn set_phase(path: &std::path::Path, phase: serde_json::Value) {
    let text = std::fs::read(path).unwrap();
    let mut record: serde_json::Value = serde_json::from_slice(&text).unwrap();
    record["phase"] = phase;
    std::fs::write(path, record.to_string()).unwrap();
}

#[tokio::test]
async fn half_made_and_half_removed_things_are_finished() {
    let node = Node::new();
    let engine = node.open().await;
    let mut sandboxes = Vec::new();
    for uid in ["creating", "removing", "stopping", "whole"] {
        let (sandbox, id) = start(&engine, &node, uid, script("main", "exec sleep 1000")).await;
        sandboxes.push((sandbox, id));
    }
    drop(engine);
    let dir = node.config.root.join("sandboxes");
    for (index, phase) in ["creating", "removing", "stopping"].iter().enumerate() {
        let record = dir.join(sandboxes[index].0.as_str()).join("sandbox.json");
        set_phase(&record, (*phase).into());
    }
    let whole = node
        .config
        .root
        .join("containers")
        .join(sandboxes[3].1.as_str());
    set_phase(
        &whole.join("container.json"),
        serde_json::json!({"removing": null}),
    );
    let engine = node.open().await;
    let left = engine.list_sandboxes();
    assert_eq!(left.len(), 2, "{left:?}");
    let state = |n: usize| left.iter().find(|s| s.id == sandboxes[n].0).unwrap().state;
    assert_eq!(state(2), SandboxState::NotReady);
    assert_eq!(state(3), SandboxState::Ready);
    assert!(engine.container_status(&sandboxes[3].1).is_none());
    assert!(node.processes().is_empty());
    for (gone, _) in &sandboxes[..3] {
        assert_eq!(node.network_calls(gone), ["ADD", "DEL"]);
    }
}

#[tokio::test]
async fn torn_and_foreign_files_are_left_alone_and_told() {
    let node = Node::new();
    let engine = node.open().await;
    let sandbox = engine.run_sandbox(pod(&node, "u1")).await.unwrap();
    drop(engine);
    let dir = node.config.root.join("sandboxes");
    std::fs::create_dir(dir.join("somebody-elses")).unwrap();
    let torn = dir.join("a".repeat(64));
    std::fs::create_dir(&torn).unwrap();
    std::fs::write(torn.join("sandbox.json"), "{\"version\":1,").unwrap();
    let empty = dir.join("b".repeat(64));
    std::fs::create_dir(&empty).unwrap();
    let engine = node.open().await;
    assert_eq!(engine.list_sandboxes()[0].id, sandbox.id);
    assert!(torn.exists() && dir.join("somebody-elses").exists());
    assert!(!empty.exists());
    let audit = engine.audit();
    assert_eq!(audit.len(), 2, "{audit:?}");
}

#[tokio::test]
async fn a_refused_release_of_the_network_stays_owed_until_it_succeeds() {
    let node = Node::new();
    let engine = node.open().await;
    let (sandbox, _) = start(&engine, &node, "u1", script("main", "exec sleep 1000")).await;
    node.network_refuses("DEL", true);
    assert!(engine.remove_sandbox(&sandbox).await.is_err());
    assert!(node.processes().is_empty());
    drop(engine);
    node.network_refuses("DEL", false);
    let engine = node.open().await;
    engine.remove_sandbox(&sandbox).await.unwrap();
    assert_eq!(node.network_calls(&sandbox).last().unwrap(), "DEL");
    assert_eq!(node.run_files() + node.sandbox_files(), 0);
}

#[tokio::test]
async fn records_of_another_boot_are_not_taken_for_living_things() {
    let node = Node::new();
    let engine = node.open().await;
    let (sandbox, id) = start(&engine, &node, "u1", script("main", "exec sleep 1000")).await;
    let ours = engine.list_sandboxes()[0].shim_pid;
    engine
        .stop_container(&id, std::time::Duration::ZERO)
        .await
        .unwrap();
    drop(engine);
    let path = node
        .config
        .root
        .join("sandboxes")
        .join(sandbox.as_str())
        .join("sandbox.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut record: serde_json::Value = serde_json::from_str(&text).unwrap();
    record["boot_id"] = "another".into();
    // A process that has nothing to do with us has the shim's number now.
    let mut stranger = std::process::Command::new("sleep")
        .arg("1000")
        .spawn()
        .unwrap();
    record["shim"]["pid"] = stranger.id().into();
    std::fs::write(&path, record.to_string()).unwrap();
    let engine = node.open().await;
    assert_eq!(engine.list_sandboxes()[0].state, SandboxState::NotReady);
    engine.remove_sandbox(&sandbox).await.unwrap();
    assert!(alive(i32::try_from(stranger.id()).unwrap()));
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    let _ = linux::process::pidfd::PidFd::open(ours).map(|fd| fd.send_signal(9));
}

/// Environment variable that names the node for [`child_that_gets_killed`].
const CHILD_NODE: &str = "FERRULE_TEST_NODE";

/// Makes and removes pods without end, four at a time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by the next test, which kills it"]
async fn child_that_gets_killed() {
    let Ok(name) = std::env::var(CHILD_NODE) else {
        return;
    };
    // Never dropped: the parent owns the directories.
    let node: &Node = Box::leak(Box::new(Node::named(&name)));
    let engine = node.open().await;
    println!("ready");
    let pods = (0..4).map(|lane| {
        let engine = engine.clone();
        async move {
            for round in 0u32.. {
                let uid = format!("l{lane}r{round}p{}", std::process::id());
                let main = script("main", "exec sleep 1000");
                let (sandbox, _) = start(&engine, node, &uid, main).await;
                if round % 2 == 0 {
                    engine.remove_sandbox(&sandbox).await.unwrap();
                    let cgroup = format!("/kubepods/pod{uid}");
                    engine.remove_cgroup(&cgroup).await.unwrap();
                }
            }
        }
    });
    futures::future::join_all(pods).await;
}

/// Runs the child until it has been at work for a while, then kills it.
fn run_and_kill(node: &Node, after: std::time::Duration) {
    use std::io::{BufRead, BufReader};
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "child_that_gets_killed",
            "--ignored",
            "--nocapture",
        ])
        .env(CHILD_NODE, node.name())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let ready = lines
        .map_while(Result::ok)
        .any(|line| line.ends_with("ready"));
    assert!(ready, "the child came up");
    std::thread::sleep(after);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_moment_nothing_is_lost_and_nothing_is_left() {
    let node = Node::new();
    for round in 0..6u64 {
        // The only thing waited for is the moment to kill, which shall be any.
        run_and_kill(&node, std::time::Duration::from_millis(40 + round * 37));
        let engine = node.open().await;
        // Whole pods go on, pods whose removal had begun have come to their end; none is lost.
        for container in engine.list_containers(None) {
            let fine = match &container.state {
                ContainerState::Created => true,
                ContainerState::Running { pid, .. } => alive(*pid),
                ContainerState::Exited { reason, .. } => reason == "Error",
            };
            assert!(fine, "round {round}: {:?}", container.state);
        }
        assert!(
            engine.audit().is_empty(),
            "round {round}: {:?}",
            engine.audit()
        );
    }
    let engine = node.open().await;
    for sandbox in engine.list_sandboxes() {
        engine.remove_sandbox(&sandbox.id).await.unwrap();
    }
    assert!(node.processes().is_empty());
    assert_eq!(
        node.run_files() + node.sandbox_files() + node.container_files(),
        0
    );
}
