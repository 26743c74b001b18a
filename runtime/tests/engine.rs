//! The engine with real shims, cgroups and an image: what containers get and how they end.
//! Needs root; every test has a node of its own and leaves nothing.

mod support;

use runtime::service::{
    ContainerState, ExecRequest, Mount, NamespaceMode, Resources, RuntimeErrorKind, RuntimeService,
    SandboxState, SeccompProfile,
};
use std::io::Read;
use std::time::{Duration, Instant};
use support::{Node, alive, exit, log, pod, run, script, start};

#[tokio::test]
async fn a_container_runs_its_command_and_its_output_is_logged() {
    let node = Node::new();
    let engine = node.open().await;
    let (sandbox, id) = start(&engine, &node, "u1", script("main", "echo hello; exit 3")).await;
    assert_eq!(exit(&engine, &id).await, (3, "Error".to_owned()));
    assert_eq!(log(&engine, &id), "hello");
    engine.remove_sandbox(&sandbox).await.unwrap();
    engine.remove_sandbox(&sandbox).await.unwrap();
    assert_eq!(node.container_files() + node.sandbox_files(), 0);
    assert_eq!(node.run_files(), 0);
    assert!(engine.audit().is_empty(), "{:?}", engine.audit());
}

#[tokio::test]
async fn a_pod_has_the_networks_address_and_gives_it_back_once() {
    let node = Node::new();
    let engine = node.open().await;
    let (sandbox, _) = start(&engine, &node, "u1", script("main", "exec sleep 1000")).await;
    let status = engine.list_sandboxes().remove(0);
    assert_eq!(
        status.ips,
        ["10.9.8.7".parse::<std::net::IpAddr>().unwrap()]
    );
    assert!(linux::netns::is_pinned(status.netns.as_deref().unwrap()));
    engine.stop_sandbox(&sandbox).await.unwrap();
    engine.stop_sandbox(&sandbox).await.unwrap();
    assert_eq!(node.network_calls(&sandbox), ["ADD", "DEL"]);
    assert_eq!(engine.list_sandboxes()[0].state, SandboxState::NotReady);
    assert!(node.processes().is_empty());
}

#[tokio::test]
async fn a_refused_network_leaves_nothing_and_says_why() {
    let node = Node::new();
    let engine = node.open().await;
    node.network_refuses("ADD", true);
    let refused = engine.run_sandbox(pod(&node, "u1")).await.unwrap_err();
    assert_eq!(refused.kind, RuntimeErrorKind::Network);
    assert!(refused.message.contains("told to fail"), "{refused}");
    assert!(engine.list_sandboxes().is_empty());
    assert_eq!(node.sandbox_files() + node.run_files(), 0);
    node.network_refuses("ADD", false);
    engine.run_sandbox(pod(&node, "u1")).await.unwrap();
}

#[tokio::test]
async fn repeated_calls_join_what_is_there() {
    let node = Node::new();
    let engine = node.open().await;
    let (sandbox, id) = start(&engine, &node, "u1", script("main", "exec sleep 1000")).await;
    let again = engine.run_sandbox(pod(&node, "u1")).await.unwrap();
    assert_eq!(again.id, sandbox);
    let same = engine
        .create_container(&sandbox, script("main", "other"))
        .await
        .unwrap();
    assert_eq!(same, id);
    engine.start_container(&id).await.unwrap();
}

#[tokio::test]
async fn exec_sees_the_containers_world() {
    let node = Node::new();
    let engine = node.open().await;
    let mut config = script("main", "exec sleep 1000");
    config.env = vec![("MINE".into(), "1".into())];
    config.security.run_as_username = Some("web".into());
    let (_, id) = start(&engine, &node, "u1", config).await;
    let output = run(&engine, &id, "id; hostname; env; cat /data/seed; exit 4").await;
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.exit_code, 4, "{text}");
    for part in [
        "uid=1000(web) gid=1000(web) groups=50(logs),1000(web)",
        "test-host",
        "FROM=image",
        "MINE=1",
        "HOME=/home/web",
        "from the image",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[tokio::test]
async fn a_timed_out_exec_leaves_no_process() {
    let node = Node::new();
    let engine = node.open().await;
    let (_, id) = start(&engine, &node, "u1", script("main", "exec sleep 1000")).await;
    let before = node.processes().len();
    let command = ["/bin/sh", "-c", "sleep 2000 & sleep 2000"].map(String::from);
    let limit = Duration::from_millis(200);
    let outcome = engine.exec_sync(&id, command.to_vec(), limit, 100).await;
    assert_eq!(outcome.unwrap_err().kind, RuntimeErrorKind::Timeout);
    let gone = async {
        while node.processes().len() > before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(support::SOON, gone).await.unwrap();
}

#[tokio::test]
async fn exec_output_is_cut_at_the_limit() {
    let node = Node::new();
    let engine = node.open().await;
    let (_, id) = start(&engine, &node, "u1", script("main", "exec sleep 1000")).await;
    let command = [
        "/bin/sh",
        "-c",
        "i=0; while [ $i -lt 20000 ]; do echo 0123456789; i=$((i+1)); done",
    ];
    let output = engine
        .exec_sync(&id, command.map(String::from).to_vec(), support::SOON, 1000)
        .await
        .unwrap();
    assert_eq!((output.exit_code, output.stdout.len()), (0, 1000));
}

#[tokio::test]
async fn a_terminal_session_has_a_terminal() {
    let node = Node::new();
    let engine = node.open().await;
    let (_, id) = start(&engine, &node, "u1", script("main", "exec sleep 1000")).await;
    let request = ExecRequest {
        command: ["/bin/sh", "-c", "[ -t 0 ] && [ -t 1 ] && echo terminal"]
            .map(String::from)
            .to_vec(),
        tty: true,
        stdin: true,
        stdout: true,
        stderr: false,
    };
    let session = engine.exec(&id, request).await.unwrap();
    engine.resize_tty(&session.id, 100, 40).await.unwrap_or(());
    let master = std::fs::File::from(session.stdout.unwrap());
    let text = tokio::task::spawn_blocking(move || {
        let (mut text, mut master) = (Vec::new(), master);
        // EIO is how a terminal says that the other side is gone.
        let _ = master.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    assert_eq!(session.exit.await.unwrap(), 0);
    assert!(text.await.unwrap().contains("terminal"));
}

#[tokio::test]
async fn a_stop_is_polite_first_and_then_it_is_not() {
    let node = Node::new();
    let engine = node.open().await;
    let polite = "trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.05; done";
    let (sandbox, id) = start(&engine, &node, "u1", script("polite", polite)).await;
    let deaf = "trap '' TERM; echo ready; while :; do sleep 0.05; done";
    let deaf = engine
        .create_container(&sandbox, script("deaf", deaf))
        .await
        .unwrap();
    engine.start_container(&deaf).await.unwrap();
    for id in [&id, &deaf] {
        while !log(&engine, id).contains("ready") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    engine.stop_container(&id, support::SOON).await.unwrap();
    assert_eq!(exit(&engine, &id).await, (0, "Completed".to_owned()));
    assert!(log(&engine, &id).contains("bye"));
    // A shorter grace shortens the wait of who came first.
    let long = engine.stop_container(&deaf, Duration::from_secs(3600));
    let short = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        engine
            .stop_container(&deaf, Duration::from_millis(100))
            .await
    };
    let started = Instant::now();
    let (first, second) = tokio::join!(long, short);
    first.unwrap();
    second.unwrap();
    assert!(started.elapsed() < support::SOON);
    assert_eq!(exit(&engine, &deaf).await, (137, "Error".to_owned()));
}

#[tokio::test]
async fn an_entrypoint_that_does_not_exist_is_a_start_error_with_its_code() {
    let node = Node::new();
    let engine = node.open().await;
    let config = pod(&node, "u1");
    let sandbox = engine.run_sandbox(config).await.unwrap();
    let mut config = script("main", "");
    config.command = vec!["/no/such".into()];
    let id = engine.create_container(&sandbox.id, config).await.unwrap();
    let failed = engine.start_container(&id).await.unwrap_err();
    assert_eq!(failed.kind, RuntimeErrorKind::StartFailed);
    assert!(failed.message.contains("/no/such"), "{failed}");
    let (code, reason) = exit(&engine, &id).await;
    assert_eq!(reason, "StartError");
    assert_eq!(code, 128);
}

#[tokio::test]
async fn impossible_requests_name_the_field_and_leave_nothing() {
    let node = Node::new();
    let engine = node.open().await;
    let mut foreign = pod(&node, "u0");
    foreign.runtime_handler = "gvisor".into();
    let refused = engine.run_sandbox(foreign).await.unwrap_err();
    assert!(refused.message.contains("gvisor"), "{refused}");
    let sandbox = engine.run_sandbox(pod(&node, "u1")).await.unwrap();
    let mut user = script("a", "");
    user.security.run_as_username = Some("nobody-here".into());
    let mut memory = script("b", "");
    memory.resources.pids_limit = Some(i64::MAX);
    let mut profile = script("c", "");
    profile.security.seccomp = SeccompProfile::Localhost("/nowhere.json".into());
    for (config, word) in [
        (user, "nobody-here"),
        (memory, "pids.max"),
        (profile, "/nowhere.json"),
    ] {
        let refused = engine
            .create_container(&sandbox.id, config)
            .await
            .unwrap_err();
        assert_eq!(refused.kind, RuntimeErrorKind::Invalid, "{refused}");
        assert!(refused.message.contains(word), "{refused}");
    }
    assert_eq!(node.container_files(), 0);
}

#[tokio::test]
async fn limits_are_set_and_a_memory_kill_is_named() {
    let node = Node::new();
    let engine = node.open().await;
    let mut config = script("main", "echo start; a=x; while :; do a=$a$a; done");
    config.resources = Resources {
        memory_limit_bytes: Some(16 << 20),
        cpu_shares: Some(100),
        pids_limit: Some(50),
        ..Resources::default()
    };
    let (_, id) = start(&engine, &node, "u1", config).await;
    let (code, reason) = exit(&engine, &id).await;
    assert_eq!((code, reason.as_str()), (137, "OOMKilled"));
}

#[tokio::test]
async fn limits_of_a_running_container_change() {
    let node = Node::new();
    let engine = node.open().await;
    let (_, id) = start(&engine, &node, "u1", script("main", "exec sleep 1000")).await;
    let resources = Resources {
        memory_limit_bytes: Some(64 << 20),
        ..Resources::default()
    };
    engine.update_resources(&id, resources).await.unwrap();
    let stats = engine.container_stats(&id).unwrap();
    assert_eq!(stats.memory_limit_bytes, Some(64 << 20));
    assert!(stats.pids >= 1);
    assert!(stats.memory_usage_bytes >= stats.memory_working_set_bytes);
}

#[tokio::test]
async fn a_read_only_root_keeps_the_images_volume_writable() {
    let node = Node::new();
    let engine = node.open().await;
    let mut config = script("main", "exec sleep 1000");
    config.security.readonly_rootfs = true;
    config.security.seccomp = SeccompProfile::RuntimeDefault;
    config.security.no_new_privs = true;
    let (_, id) = start(&engine, &node, "u1", config).await;
    let output = run(&engine, &id, "touch /x; touch /data/x && cat /data/seed").await;
    assert_eq!(output.stdout, b"from the image");
    assert_eq!(output.exit_code, 0);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("Read-only file system"), "{error}");
}

#[tokio::test]
async fn containers_of_a_pod_share_memory_and_see_the_pods_files() {
    let node = Node::new();
    let engine = node.open().await;
    let mut config = pod(&node, "u1");
    config.dns = Some(runtime::service::DnsConfig {
        servers: vec!["10.0.0.10".into()],
        ..Default::default()
    });
    let sandbox = engine.run_sandbox(config).await.unwrap();
    let mut ids = Vec::new();
    for name in ["a", "b"] {
        let config = script(name, "exec sleep 1000");
        let id = engine.create_container(&sandbox.id, config).await.unwrap();
        engine.start_container(&id).await.unwrap();
        ids.push(id);
    }
    run(&engine, &ids[0], "echo shared >/dev/shm/f").await;
    let output = run(
        &engine,
        &ids[1],
        "cat /dev/shm/f /etc/resolv.conf /etc/hostname",
    )
    .await;
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text, "shared\nnameserver 10.0.0.10\ntest-host\n");
}

#[tokio::test]
async fn a_host_path_is_mounted_as_asked() {
    let node = Node::new();
    let engine = node.open().await;
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), "host").unwrap();
    let mut config = script("main", "exec sleep 1000");
    config.mounts.push(Mount {
        container_path: "/mnt/host".into(),
        host_path: dir.path().to_owned(),
        sub_path: None,
        readonly: true,
        recursive_readonly: false,
        propagation: pod_shim::protocol::Propagation::Private,
        image: None,
    });
    let (sandbox, id) = start(&engine, &node, "u1", config).await;
    let output = run(&engine, &id, "cat /mnt/host/f; touch /mnt/host/g").await;
    assert_eq!(output.stdout, b"host");
    assert_ne!(output.exit_code, 0);
    engine.remove_sandbox(&sandbox).await.unwrap();
    assert!(dir.path().join("f").exists());
}

#[tokio::test]
async fn pods_on_the_nodes_network_have_no_address_of_their_own() {
    let node = Node::new();
    let engine = node.open().await;
    let mut config = pod(&node, "u1");
    config.network = NamespaceMode::Node;
    let sandbox = engine.run_sandbox(config).await.unwrap();
    assert!(sandbox.ips.is_empty() && sandbox.netns.is_none());
    assert!(node.network_calls(&sandbox.id).is_empty());
}

#[tokio::test]
async fn a_killed_shim_takes_its_containers_and_is_told() {
    let node = Node::new();
    let engine = node.open().await;
    let (sandbox, id) = start(&engine, &node, "u1", script("main", "exec sleep 1000")).await;
    let status = engine.list_sandboxes().remove(0);
    let ContainerState::Running { pid, .. } = engine.container_status(&id).unwrap().state else {
        panic!("it runs");
    };
    let shim = linux::process::pidfd::PidFd::open(status.shim_pid).unwrap();
    shim.send_signal(9).unwrap();
    let (code, reason) = exit(&engine, &id).await;
    assert_eq!((code, reason.as_str()), (137, "ContainerStatusUnknown"));
    assert!(!alive(pid));
    assert_eq!(engine.list_sandboxes()[0].state, SandboxState::NotReady);
    engine.remove_sandbox(&sandbox).await.unwrap();
    assert_eq!(node.network_calls(&sandbox), ["ADD", "DEL"]);
    assert_eq!(node.run_files(), 0);
}

#[tokio::test]
async fn without_a_network_configuration_nothing_is_made_and_the_directory_is_named() {
    let node = Node::new();
    let engine = node.open().await;
    let list = node.config.cni_conf_dir.join("10-noted.conflist");
    let text = std::fs::read(&list).unwrap();
    std::fs::remove_file(&list).unwrap();
    let refused = engine.run_sandbox(pod(&node, "u1")).await.unwrap_err();
    assert_eq!(refused.kind, RuntimeErrorKind::Network);
    let dir = node.config.cni_conf_dir.display().to_string();
    assert!(refused.message.contains(&dir), "{refused}");
    assert!(engine.network_ready().unwrap_err().contains(&dir));
    assert_eq!(node.sandbox_files() + node.run_files(), 0);
    std::fs::write(&list, text).unwrap();
    let sandbox = engine.run_sandbox(pod(&node, "u1")).await.unwrap();
    assert!(engine.network_ready().is_ok());
    // Gone again: what was attached goes all the same.
    std::fs::remove_file(&list).unwrap();
    engine.remove_sandbox(&sandbox.id).await.unwrap();
    assert_eq!(node.network_calls(&sandbox.id), ["ADD", "DEL"]);
}

#[tokio::test]
async fn a_second_engine_on_the_same_directories_is_refused() {
    let node = Node::new();
    let engine = node.open().await;
    let second = runtime::Engine::open(node.config.clone()).await;
    assert_eq!(second.unwrap_err().kind, RuntimeErrorKind::Conflict);
    drop(engine);
    node.open().await;
}
