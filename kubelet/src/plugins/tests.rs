//! Plugins with real sockets, and the plan.

use super::*;
use proto::registration::v1::registration_server::{Registration, RegistrationServer};
use proto::registration::v1::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
};
use std::sync::Mutex;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

struct FakePlugin {
    kind: &'static str,
    told: mpsc::UnboundedSender<(bool, String)>,
}

#[tonic::async_trait]
impl Registration for FakePlugin {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: self.kind.to_owned(),
            name: "d".to_owned(),
            endpoint: "/d.sock".to_owned(),
            supported_versions: vec!["1.0.0".to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        let _ = self.told.send((status.plugin_registered, status.error));
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

/// Serves a plugin at a path until it is dropped.
fn serve(
    path: &Path,
    kind: &'static str,
) -> (
    tokio::task::JoinHandle<()>,
    mpsc::UnboundedReceiver<(bool, String)>,
) {
    let (told, heard) = mpsc::unbounded_channel();
    let listener = UnixListener::bind(path).unwrap();
    let service = RegistrationServer::new(FakePlugin { kind, told });
    let served = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming(UnixListenerStream::new(listener));
    (
        tokio::spawn(async move {
            let _ = served.await;
        }),
        heard,
    )
}

/// Notes what is asked of it.
struct Notes {
    seen: Arc<Mutex<Vec<String>>>,
    more: mpsc::UnboundedSender<()>,
}

impl Handler for Notes {
    fn kind(&self) -> &'static str {
        "CSIPlugin"
    }

    fn validate(&self, _: &Info) -> Result<(), String> {
        Ok(())
    }

    fn register<'a>(&'a self, info: &'a Info) -> BoxFuture<'a, Result<(), String>> {
        self.seen.lock().unwrap().push(format!("+{}", info.name));
        let _ = self.more.send(());
        Box::pin(async { Ok(()) })
    }

    fn deregister<'a>(&'a self, name: &'a str) -> BoxFuture<'a, ()> {
        self.seen.lock().unwrap().push(format!("-{name}"));
        let _ = self.more.send(());
        Box::pin(async {})
    }
}

#[tokio::test]
async fn plugins_come_go_and_come_again() {
    let dir = tempfile::tempdir().unwrap();
    let registry = dir.path().join("plugins_registry");
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (more, mut news) = mpsc::unbounded_channel();
    let notes = Notes {
        seen: seen.clone(),
        more,
    };
    std::fs::create_dir_all(registry.join("below")).unwrap();
    let stop = CancellationToken::new();
    let plugins = Plugins::new(registry.clone(), vec![Box::new(notes)]);
    let running = tokio::spawn(plugins.run(stop.clone()));

    let socket = registry.join("below/d-reg.sock");
    let (server, mut heard) = serve(&socket, "CSIPlugin");
    assert_eq!(heard.recv().await, Some((true, String::new())));
    news.recv().await;
    // The same path with another socket is another plugin.
    server.abort();
    std::fs::remove_file(&socket).unwrap();
    news.recv().await;
    let (_server, mut heard) = serve(&socket, "CSIPlugin");
    assert_eq!(heard.recv().await, Some((true, String::new())));
    assert_eq!(*seen.lock().unwrap(), ["+d", "-d", "+d"]);

    let (_other, mut heard) = serve(&registry.join("other.sock"), "DevicePlugin");
    let (registered, error) = heard.recv().await.unwrap();
    assert!(!registered);
    assert!(
        error.starts_with(
            "RegisterPlugin error -- no handler registered for plugin type: DevicePlugin at socket "
        ),
        "{error}"
    );
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn a_step_at_a_time_and_failures_wait() {
    let now = Instant::now();
    let path = PathBuf::from("/r/d.sock");
    let identity = |inode| Identity {
        device: 1,
        inode,
        changed: (0, 0),
    };
    let found: BTreeMap<_, _> = [(path.clone(), identity(1))].into();
    let mut known = HashMap::new();
    assert_eq!(
        plan(&found, &known, now).0,
        [Step::Register(path.clone(), identity(1))]
    );
    known.insert(path.clone(), State::Busy { failures: 2 });
    assert_eq!(plan(&found, &known, now), (vec![], None));
    Ended::Failed { path: path.clone() }.note(&mut known, now);
    let (steps, wake) = plan(&found, &known, now);
    assert_eq!((steps, wake), (vec![], Some(now + RETRY_FIRST * 4)));
    assert_eq!(plan(&found, &known, now + RETRY_FIRST * 4).0.len(), 1);
    let registered = Ended::Registered {
        path: path.clone(),
        identity: identity(1),
        kind: "k".to_owned(),
        name: "d".to_owned(),
    };
    registered.note(&mut known, now);
    assert_eq!(plan(&found, &known, now), (vec![], None));
    let anew: BTreeMap<_, _> = [(path.clone(), identity(2))].into();
    for found in [anew, BTreeMap::new()] {
        let (steps, _) = plan(&found, &known, now);
        assert!(matches!(&steps[..], [Step::Deregister { .. }]), "{steps:?}");
    }
    Ended::Deregistered { path }.note(&mut known, now);
    assert!(known.is_empty());
}
