//! A CSI driver in this process, for tests: volumes are directories that are bind mounted. Every
//! call is noted; calls can be made to fail or to hang.

use super::drivers::{Drivers, Version};
use super::unmount::is_mounted;
use proto::csi::v1 as csi;
use proto::csi::v1::node_server::{Node, NodeServer};
use proto::csi::v1::node_service_capability::rpc::Type;
use proto::csi::v1::node_service_capability::{self, Rpc};
use proto::csi::v1::volume_capability::AccessType;
use std::collections::HashMap;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Code, Request, Response, Status};

#[derive(Default)]
struct State {
    calls: Vec<String>,
    failing: HashMap<&'static str, Code>,
    hanging: Vec<&'static str>,
    publishes: Vec<csi::NodePublishVolumeRequest>,
    expands: Vec<csi::NodeExpandVolumeRequest>,
}

#[derive(Clone)]
struct Service {
    state: Arc<Mutex<State>>,
    store: PathBuf,
    capabilities: Arc<Vec<Type>>,
}

/// The driver; ends with it.
pub(crate) struct FakeDriver {
    dir: TempDir,
    state: Arc<Mutex<State>>,
    server: JoinHandle<()>,
}

impl Drop for FakeDriver {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl FakeDriver {
    /// Serves and registers a driver of this name.
    pub(crate) fn start(drivers: &Drivers, name: &str, capabilities: &[Type]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state: Arc<Mutex<State>> = Arc::default();
        let service = Service {
            state: state.clone(),
            store: dir.path().join("store"),
            capabilities: Arc::new(capabilities.to_vec()),
        };
        let socket = dir.path().join("csi.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let serving = tonic::transport::Server::builder()
            .add_service(NodeServer::new(service))
            .serve_with_incoming(UnixListenerStream::new(listener));
        let server = tokio::spawn(async move {
            let _ = serving.await;
        });
        let driver = Self { dir, state, server };
        driver.register(drivers, name);
        driver
    }

    /// Registers with (other) drivers.
    pub(crate) fn register(&self, drivers: &Drivers, name: &str) {
        let socket = self.dir.path().join("csi.sock");
        let version = Version::highest(&["1.0.0".to_owned()]).unwrap();
        drivers.insert(name, socket.to_str().unwrap(), version);
    }

    /// Calls so far, each once in a row: `stage h`, `publish h`, …
    pub(crate) fn calls(&self) -> Vec<String> {
        self.state.lock().unwrap().calls.clone()
    }

    /// Makes calls of a kind fail from now on.
    pub(crate) fn fail(&self, call: &'static str, code: Code) {
        self.state.lock().unwrap().failing.insert(call, code);
    }

    /// Lets all calls succeed again.
    pub(crate) fn mend(&self) {
        let mut state = self.state.lock().unwrap();
        state.failing.clear();
        state.hanging.clear();
    }

    /// Lets calls of a kind hang from now on.
    pub(crate) fn hang(&self, call: &'static str) {
        self.state.lock().unwrap().hanging.push(call);
    }

    pub(crate) fn last_publish(&self) -> csi::NodePublishVolumeRequest {
        self.state.lock().unwrap().publishes.last().unwrap().clone()
    }

    pub(crate) fn last_expand(&self) -> csi::NodeExpandVolumeRequest {
        self.state.lock().unwrap().expands.last().unwrap().clone()
    }

    /// Where the content of a volume is.
    pub(crate) fn content(&self, handle: &str) -> PathBuf {
        self.dir.path().join("store").join(handle)
    }
}

fn bind(from: &Path, to: &Path) {
    let to = to.to_path_buf();
    if is_mounted(&to).unwrap() {
        return;
    }
    let mount = linux::mount::clone_path(from, false).unwrap();
    let target = linux::mount::open_path(&to).unwrap();
    linux::mount::attach(mount.as_fd(), target.as_fd()).unwrap();
}

fn unbind(path: &Path) {
    while is_mounted(path).unwrap() {
        rustix::mount::unmount(path, rustix::mount::UnmountFlags::NOFOLLOW).unwrap();
    }
}

impl Service {
    async fn note(&self, call: &'static str, volume: &str) -> Result<(), Status> {
        let (code, hangs) = {
            let mut state = self.state.lock().unwrap();
            state.calls.push(format!("{call} {volume}"));
            (
                state.failing.get(call).copied(),
                state.hanging.contains(&call),
            )
        };
        if hangs {
            std::future::pending::<()>().await;
        }
        match code {
            Some(code) => Err(Status::new(code, "told to fail")),
            None => Ok(()),
        }
    }

    fn is_block(capability: Option<&csi::VolumeCapability>) -> bool {
        matches!(
            capability.and_then(|c| c.access_type.as_ref()),
            Some(AccessType::Block(_))
        )
    }
}

#[tonic::async_trait]
impl Node for Service {
    async fn node_stage_volume(
        &self,
        request: Request<csi::NodeStageVolumeRequest>,
    ) -> Result<Response<csi::NodeStageVolumeResponse>, Status> {
        let request = request.into_inner();
        self.note("stage", &request.volume_id).await?;
        let content = self.store.join(&request.volume_id);
        std::fs::create_dir_all(&content).unwrap();
        if !Self::is_block(request.volume_capability.as_ref()) {
            bind(&content, Path::new(&request.staging_target_path));
        }
        Ok(Response::new(csi::NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(
        &self,
        request: Request<csi::NodeUnstageVolumeRequest>,
    ) -> Result<Response<csi::NodeUnstageVolumeResponse>, Status> {
        let request = request.into_inner();
        self.note("unstage", &request.volume_id).await?;
        unbind(Path::new(&request.staging_target_path));
        Ok(Response::new(csi::NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Result<Response<csi::NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        self.state.lock().unwrap().publishes.push(request.clone());
        self.note("publish", &request.volume_id).await?;
        let (content, target) = (
            self.store.join(&request.volume_id),
            Path::new(&request.target_path),
        );
        std::fs::create_dir_all(&content).unwrap();
        if Self::is_block(request.volume_capability.as_ref()) {
            std::fs::write(target, "").unwrap();
            bind(Path::new("/dev/null"), target);
        } else {
            std::fs::create_dir_all(target).unwrap();
            bind(&content, target);
        }
        Ok(Response::new(csi::NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<csi::NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        self.note("unpublish", &request.volume_id).await?;
        unbind(Path::new(&request.target_path));
        // The target is left to the node, as some drivers do.
        Ok(Response::new(csi::NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<csi::NodeGetVolumeStatsRequest>,
    ) -> Result<Response<csi::NodeGetVolumeStatsResponse>, Status> {
        self.note("stats", &request.into_inner().volume_id).await?;
        Ok(Response::new(csi::NodeGetVolumeStatsResponse::default()))
    }

    async fn node_expand_volume(
        &self,
        request: Request<csi::NodeExpandVolumeRequest>,
    ) -> Result<Response<csi::NodeExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        self.state.lock().unwrap().expands.push(request.clone());
        self.note("expand", &request.volume_id).await?;
        Ok(Response::new(csi::NodeExpandVolumeResponse::default()))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<csi::NodeGetCapabilitiesResponse>, Status> {
        let one = |kind: &Type| csi::NodeServiceCapability {
            r#type: Some(node_service_capability::Type::Rpc(Rpc {
                r#type: *kind as i32,
            })),
        };
        Ok(Response::new(csi::NodeGetCapabilitiesResponse {
            capabilities: self.capabilities.iter().map(one).collect(),
        }))
    }

    async fn node_get_info(
        &self,
        _: Request<csi::NodeGetInfoRequest>,
    ) -> Result<Response<csi::NodeGetInfoResponse>, Status> {
        Ok(Response::new(csi::NodeGetInfoResponse {
            node_id: "n1".to_owned(),
            ..csi::NodeGetInfoResponse::default()
        }))
    }

    async fn node_get_volume_health(
        &self,
        _: Request<csi::NodeGetVolumeHealthRequest>,
    ) -> Result<Response<csi::NodeGetVolumeHealthResponse>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn node_get_storage_health(
        &self,
        _: Request<csi::NodeGetStorageHealthRequest>,
    ) -> Result<Response<csi::NodeGetStorageHealthResponse>, Status> {
        Err(Status::unimplemented("not here"))
    }
}
