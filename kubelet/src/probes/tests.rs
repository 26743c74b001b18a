//! Probes against a scripted runtime and real sockets of this process.

use super::*;
use k8s_openapi::api::core::v1::{
    ExecAction, GRPCAction, HTTPGetAction, HTTPHeader, PodSpec, TCPSocketAction,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use runtime::fake::FakeRuntime;
use runtime::service::{
    ContainerConfig, ExecOutput, ImageConfig, RuntimeError, RuntimeErrorKind, SandboxConfig,
};
use std::net::Ipv4Addr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

struct Bench {
    runtime: Arc<FakeRuntime>,
    probes: Probes<FakeRuntime>,
    updates: mpsc::Receiver<ProbeUpdate>,
    events: EventSink,
    id: ContainerId,
}

/// A running container named `c`.
async fn bench() -> Bench {
    let runtime = Arc::new(FakeRuntime::new());
    runtime.preload("image", ImageConfig::default());
    let config = SandboxConfig {
        uid: "uid-1".to_owned(),
        ..SandboxConfig::default()
    };
    let sandbox = runtime.run_sandbox(config).await.unwrap();
    let config = ContainerConfig {
        name: "c".to_owned(),
        image: "image".to_owned(),
        ..ContainerConfig::default()
    };
    let id = runtime.create_container(&sandbox.id, config).await.unwrap();
    runtime.start_container(&id).await.unwrap();
    let events = EventSink::memory();
    let (tx, updates) = mpsc::channel(16);
    let probes = Probes::new(
        Arc::clone(&runtime),
        events.clone(),
        tx,
        TaskTracker::new(),
        CancellationToken::new(),
    );
    Bench {
        runtime,
        probes,
        updates,
        events,
        id,
    }
}

fn target(bench: &Bench, container: Container, adopted: Option<Adopted>) -> ProbeTarget {
    let pod = Pod {
        metadata: ObjectMeta {
            uid: Some("uid-1".to_owned()),
            name: Some("p".to_owned()),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec {
            containers: vec![container],
            ..PodSpec::default()
        }),
        status: None,
    };
    ProbeTarget {
        pod: Arc::new(pod),
        container_name: "c".to_owned(),
        container_id: bench.id.clone(),
        pod_ip: Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        running_for: Duration::ZERO,
        pod_for: Duration::ZERO,
        adopted,
    }
}

fn container() -> Container {
    Container {
        name: "c".to_owned(),
        ..Container::default()
    }
}

fn exec_probe(failure_threshold: i32) -> Probe {
    Probe {
        exec: Some(ExecAction {
            command: Some(vec!["check".to_owned()]),
        }),
        failure_threshold: Some(failure_threshold),
        period_seconds: Some(1),
        ..Probe::default()
    }
}

fn code(exit_code: i32, text: &str) -> runtime::service::Result<ExecOutput> {
    Ok(ExecOutput {
        exit_code,
        stdout: text.as_bytes().to_vec(),
        stderr: Vec::new(),
    })
}

#[tokio::test(start_paused = true)]
async fn a_readiness_probe_makes_ready_and_unready_and_tells_why() {
    let mut b = bench().await;
    for answer in [
        code(1, "warming up"),
        code(0, "ok"),
        code(2, "gone"),
        code(2, "gone"),
    ] {
        b.runtime.exec_result("c", answer);
    }
    let spec = Container {
        readiness_probe: Some(exec_probe(2)),
        ..container()
    };
    b.probes.ensure(target(&b, spec, None));
    assert_eq!(b.probes.ready(&b.id), Some(false));
    let up = b.updates.recv().await.unwrap();
    assert!(up.success && up.kind == ProbeKind::Readiness);
    assert_eq!(b.probes.ready(&b.id), Some(true));
    let down = b.updates.recv().await.unwrap();
    assert!(!down.success && down.message == "gone");
    assert_eq!(b.probes.ready(&b.id), Some(false));
    let messages: Vec<_> = b.events.recorded().into_iter().map(|e| e.message).collect();
    assert_eq!(messages[0], "Readiness probe failed: warming up");
}

#[tokio::test(start_paused = true)]
async fn liveness_waits_for_startup_and_is_silent_after_it_failed() {
    let mut b = bench().await;
    for answer in [code(1, ""), code(0, "")] {
        b.runtime.exec_result("c", answer);
    }
    b.runtime.exec_result("c", code(1, "dead"));
    let spec = Container {
        startup_probe: Some(exec_probe(5)),
        liveness_probe: Some(exec_probe(1)),
        ..container()
    };
    b.probes.ensure(target(&b, spec, None));
    assert_eq!(b.probes.started(&b.id), Some(false));
    let started = b.updates.recv().await.unwrap();
    assert!(started.success && started.kind == ProbeKind::Startup);
    let dead = b.updates.recv().await.unwrap();
    assert!(!dead.success && dead.kind == ProbeKind::Liveness);
    b.probes.remove_container(&b.id);
    assert_eq!(b.probes.ready(&b.id), None);
}

#[tokio::test(start_paused = true)]
async fn an_adopted_container_keeps_its_verdict() {
    let b = bench().await;
    let spec = Container {
        readiness_probe: Some(exec_probe(3)),
        ..container()
    };
    b.probes.ensure(target(
        &b,
        spec,
        Some(Adopted {
            started: true,
            ready: true,
        }),
    ));
    assert_eq!(b.probes.ready(&b.id), Some(true));
}

#[tokio::test(start_paused = true)]
async fn without_probes_a_container_is_started_and_ready() {
    let b = bench().await;
    b.probes.ensure(target(&b, container(), None));
    assert_eq!(
        (b.probes.started(&b.id), b.probes.ready(&b.id)),
        (Some(true), Some(true))
    );
    b.probes.remove_pod("uid-1");
    assert_eq!(b.probes.ready(&b.id), None);
}

/// Asks once.
async fn ask(b: &Bench, probe: Probe) -> Outcome {
    let container = container();
    let target = Target {
        container_id: &b.id,
        container: &container,
        pod_ip: Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        timeout: Duration::from_secs(1),
    };
    Checker::new(Arc::clone(&b.runtime))
        .check(&probe, &target)
        .await
}

/// A server that answers every connection with `answer` and hands back the requests.
async fn serve(answer: &'static str) -> (u16, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (tx, rx) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = vec![0; 4096];
            let n = stream.read(&mut request).await.unwrap();
            let _ = tx.send(String::from_utf8_lossy(&request[..n]).into_owned());
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    (port, rx)
}

fn http_probe(port: u16) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some("/healthz?x=1".to_owned()),
            port: IntOrString::Int(i32::from(port)),
            http_headers: Some(vec![HTTPHeader {
                name: "X-Token".to_owned(),
                value: "abc".to_owned(),
            }]),
            ..HTTPGetAction::default()
        }),
        ..Probe::default()
    }
}

#[tokio::test]
async fn an_http_probe_sends_its_headers_and_judges_by_status() {
    let b = bench().await;
    let (port, mut requests) = serve("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
    let outcome = ask(&b, http_probe(port)).await;
    assert_eq!(outcome, Outcome::good("ok"));
    let request = requests.recv().await.unwrap().to_lowercase();
    assert!(
        request.starts_with("get /healthz?x=1 http/1.1\r\n"),
        "{request}"
    );
    for header in [
        "x-token: abc",
        "user-agent: kube-probe/1.36",
        "connection: close",
    ] {
        assert!(request.contains(header), "{request}");
    }
    let (port, _requests) = serve("HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(
        ask(&b, http_probe(port)).await,
        Outcome::bad("HTTP probe failed with statuscode: 500")
    );
}

#[tokio::test]
async fn a_redirect_to_another_host_counts_as_alive() {
    let b = bench().await;
    let answer =
        "HTTP/1.1 302 Found\r\nLocation: http://elsewhere.example/\r\nContent-Length: 0\r\n\r\n";
    let (port, _requests) = serve(answer).await;
    assert!(ask(&b, http_probe(port)).await.success);
}

#[tokio::test]
async fn tcp_and_grpc_probes_say_when_nobody_listens() {
    let b = bench().await;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = i32::from(listener.local_addr().unwrap().port());
    let tcp = Probe {
        tcp_socket: Some(TCPSocketAction {
            host: None,
            port: IntOrString::Int(port),
        }),
        ..Probe::default()
    };
    assert!(ask(&b, tcp.clone()).await.success);
    drop(listener);
    let outcome = ask(&b, tcp).await;
    assert_eq!(
        outcome.message,
        format!("dial tcp 127.0.0.1:{port}: connect: connection refused")
    );
    let grpc = Probe {
        grpc: Some(GRPCAction {
            port,
            service: None,
        }),
        ..Probe::default()
    };
    assert!(!ask(&b, grpc).await.success);
}

#[tokio::test]
async fn a_probe_that_cannot_be_made_errs_and_one_that_times_out_fails() {
    let b = bench().await;
    let nothing = ask(&b, Probe::default()).await;
    assert!(nothing.errored);
    let late = RuntimeError {
        kind: RuntimeErrorKind::Timeout,
        message: "late".to_owned(),
    };
    b.runtime.exec_result("c", Err(late));
    let outcome = ask(&b, exec_probe(1)).await;
    assert!(!outcome.success && !outcome.errored);
    assert!(
        outcome.message.starts_with("command timed out"),
        "{}",
        outcome.message
    );
}
