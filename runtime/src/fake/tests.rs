use super::*;

fn container(name: &str) -> ContainerConfig {
    ContainerConfig {
        name: name.to_owned(),
        image: "busybox:1".to_owned(),
        ..ContainerConfig::default()
    }
}

async fn running(fake: &FakeRuntime, name: &str) -> (SandboxId, ContainerId) {
    fake.preload("busybox:1", ImageConfig::default());
    let config = SandboxConfig {
        uid: "u1".to_owned(),
        ..SandboxConfig::default()
    };
    let sandbox = fake.run_sandbox(config).await.unwrap();
    let id = fake
        .create_container(&sandbox.id, container(name))
        .await
        .unwrap();
    fake.start_container(&id).await.unwrap();
    (sandbox.id, id)
}

#[tokio::test]
async fn a_started_container_runs_until_told_to_exit() {
    let fake = FakeRuntime::new();
    let mut events = fake.events();
    let (_, id) = running(&fake, "main").await;
    let state = fake.container_status(&id).unwrap().state;
    assert!(matches!(state, ContainerState::Running { .. }));
    fake.exit(&id, 3);
    let state = fake.container_status(&id).unwrap().state;
    assert!(matches!(state, ContainerState::Exited { exit_code: 3, .. }));
    let mut kinds = Vec::new();
    while let Ok(RuntimeEvent::Changed { kind, .. }) = events.try_recv() {
        kinds.push(kind);
    }
    let expected = [
        RuntimeEventKind::SandboxReady,
        RuntimeEventKind::Started,
        RuntimeEventKind::Exited,
    ];
    assert_eq!(kinds, expected);
}

#[tokio::test]
async fn a_scripted_failure_happens_once() {
    let fake = FakeRuntime::new();
    let refusal = error(RuntimeErrorKind::Network, "no address");
    fake.fail_next(Operation::RunSandbox, refusal);
    let first = fake.run_sandbox(SandboxConfig::default()).await;
    assert_eq!(first.unwrap_err().kind, RuntimeErrorKind::Network);
    assert!(fake.run_sandbox(SandboxConfig::default()).await.is_ok());
}

#[tokio::test]
async fn a_hanging_stop_ends_with_the_container() {
    let fake = FakeRuntime::new();
    let (_, id) = running(&fake, "main").await;
    fake.on_stop("main", OnStop::Hangs);
    let stop = fake.stop_container(&id, Duration::ZERO);
    let exit = async { fake.exit(&id, 0) };
    let (stopped, ()) = tokio::join!(stop, exit);
    assert!(stopped.is_ok());
}
