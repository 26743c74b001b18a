use super::*;
use pod_shim::protocol::{
    ExecSpec, PROTOCOL_VERSION, ProcessSpec, SandboxSpec, Stdio, UserNamespace,
};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream as Blocking;

/// A socket whatever the length of its path.
fn listen(path: &Path) -> std::os::unix::net::UnixListener {
    let dir = std::fs::File::open(path.parent().unwrap()).unwrap();
    let name = path.file_name().unwrap();
    std::os::unix::net::UnixListener::bind(through(&dir, name)).unwrap()
}

/// A shim in a thread: sends a snapshot, then lets `serve` answer on the connection.
fn shim(
    serve: impl FnOnce(&mut Blocking) + Send + 'static,
) -> (tempfile::TempDir, PathBuf, std::thread::JoinHandle<()>) {
    shim_of(PROTOCOL_VERSION, serve)
}

/// A shim that speaks this version.
fn shim_of(
    version: u32,
    serve: impl FnOnce(&mut Blocking) + Send + 'static,
) -> (tempfile::TempDir, PathBuf, std::thread::JoinHandle<()>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(format!("{}.sock", "a".repeat(64)));
    let listener = listen(&path);
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let snapshot = Snapshot {
            version,
            sandbox_id: None,
            shim_pid: 1,
            netns: None,
            containers: Vec::new(),
        };
        write(&mut stream, &FromShim::Snapshot(snapshot), &[]);
        serve(&mut stream);
    });
    (dir, path, thread)
}

fn write(stream: &mut Blocking, message: &FromShim, fds: &[BorrowedFd<'_>]) {
    let body = serde_json::to_vec(message).unwrap();
    let mut frame = u32::try_from(body.len()).unwrap().to_le_bytes().to_vec();
    frame.extend(body);
    assert_eq!(
        fdpass::send(stream.as_fd(), &frame, fds).unwrap(),
        frame.len()
    );
}

fn read(stream: &mut Blocking, fds: &mut Vec<OwnedFd>) -> ToShim {
    let mut length = [0u8; 4];
    let mut got = 0;
    while got < 4 {
        got += fdpass::recv(stream.as_fd(), &mut length[got..], fds).unwrap();
    }
    let mut body = vec![0u8; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut body).unwrap();
    serde_json::from_slice(&body).unwrap()
}

fn ignore() -> Handler {
    Arc::new(|_| ())
}

#[tokio::test]
async fn an_answer_reaches_the_one_who_asked_whatever_the_order() {
    let (_dir, path, thread) = shim(|stream| {
        let first = read(stream, &mut Vec::new());
        let second = read(stream, &mut Vec::new());
        for (id, pid) in [(second.id, 2), (first.id, 1)] {
            let result = Ok(Reply::ExecStarted { pid });
            write(stream, &FromShim::Reply { id, result }, &[]);
        }
    });
    let (client, _) = ShimClient::connect(&path, ignore()).await.unwrap();
    let first = client.request(Request::Shutdown, &[]);
    let second = client.request(Request::Shutdown, &[]);
    let (first, second) = tokio::join!(first, second);
    assert!(matches!(first.unwrap().0, Reply::ExecStarted { pid: 1 }));
    assert!(matches!(second.unwrap().0, Reply::ExecStarted { pid: 2 }));
    thread.join().unwrap();
}

#[tokio::test]
async fn descriptors_travel_both_ways() {
    let (_dir, path, thread) = shim(|stream| {
        let mut fds = Vec::new();
        let request = read(stream, &mut fds);
        assert_eq!(fds.len(), 1);
        let result = Ok(Reply::ExecStarted { pid: 7 });
        let reply = FromShim::Reply {
            id: request.id,
            result,
        };
        write(stream, &reply, &[fds[0].as_fd()]);
    });
    let (client, _) = ShimClient::connect(&path, ignore()).await.unwrap();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let exec = ExecSpec {
        exec_id: "e".into(),
        container_id: "c".into(),
        process: ProcessSpec::default(),
        tty: true,
        stdio: Stdio::default(),
        cgroups: Vec::new(),
    };
    let request = Request::Exec(Box::new(exec));
    let (_, fds) = client.request(request, &[writer.as_fd()]).await.unwrap();
    drop(writer);
    thread.join().unwrap();
    let mut back = std::fs::File::from(fds.into_iter().next().unwrap());
    back.write_all(b"round trip").unwrap();
    drop(back);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "round trip");
}

#[tokio::test]
async fn an_old_shim_is_asked_only_for_what_it_understands() {
    let (_dir, path, thread) = shim_of(1, |stream| {
        let request = read(stream, &mut Vec::new());
        assert!(matches!(request.request, Request::Shutdown));
        let (id, result) = (request.id, Ok(Reply::Done));
        write(stream, &FromShim::Reply { id, result }, &[]);
    });
    let (client, _) = ShimClient::connect(&path, ignore()).await.unwrap();
    let users = UserNamespace {
        first: 65_536,
        length: 65_536,
    };
    let setup = Request::Setup(SandboxSpec {
        user_namespace: Some(users),
        ..SandboxSpec::default()
    });
    let refused = client.request(setup, &[]).await.unwrap_err();
    assert!(matches!(
        refused,
        ShimClientError::TooOld {
            version: 1,
            needed: 2,
            ..
        }
    ));
    client.request(Request::Shutdown, &[]).await.unwrap();
    thread.join().unwrap();
}

#[tokio::test]
async fn whoever_waits_is_told_when_the_shim_dies() {
    let (_dir, path, thread) = shim(|stream| {
        read(stream, &mut Vec::new());
    });
    let (gone, told) = std::sync::mpsc::channel();
    let handler: Handler = Arc::new(move |incoming| {
        if matches!(incoming, Incoming::Gone) {
            gone.send(()).unwrap();
        }
    });
    let (client, _) = ShimClient::connect(&path, handler).await.unwrap();
    let outcome = client.request(Request::Shutdown, &[]).await;
    assert!(matches!(outcome, Err(ShimClientError::Gone("shutdown"))));
    thread.join().unwrap();
    told.recv().unwrap();
    assert!(!client.is_alive());
}

#[tokio::test]
async fn a_dead_socket_is_an_error_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.sock");
    drop(listen(&path));
    let outcome = ShimClient::connect(&path, ignore()).await;
    assert!(matches!(outcome, Err(ShimClientError::Connect { .. })));
}
