//! Calls to a driver's node service, and what its answers mean.

use super::request::Capabilities;
use hyper_util::rt::TokioIo;
use proto::csi::v1 as csi;
use proto::csi::v1::node_client::NodeClient;
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Response, Status};
use tower::service_fn;

/// What a driver has for one call (the stock kubelet's limit).
pub(crate) const CALL_LIMIT: Duration = Duration::from_secs(120);

/// A call that failed, in the words Go's gRPC has for it: events are grepped for them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("rpc error: code = {} desc = {message}", code_name(*code))]
pub(crate) struct RpcError {
    pub(crate) code: Code,
    pub(crate) message: String,
}

impl RpcError {
    /// Whether the driver is done with the call: else it may still be at it.
    pub(crate) fn is_final(&self) -> bool {
        !matches!(
            self.code,
            Code::Cancelled
                | Code::DeadlineExceeded
                | Code::Unavailable
                | Code::ResourceExhausted
                | Code::Aborted
        )
    }

    /// Whether trying again makes no sense.
    pub(crate) fn is_infeasible(&self) -> bool {
        matches!(
            self.code,
            Code::InvalidArgument | Code::OutOfRange | Code::NotFound
        )
    }
}

impl From<Status> for RpcError {
    fn from(status: Status) -> Self {
        Self {
            code: status.code(),
            message: status.message().to_owned(),
        }
    }
}

fn code_name(code: Code) -> String {
    match code {
        Code::Ok => "OK".to_owned(),
        Code::Cancelled => "Canceled".to_owned(),
        other => format!("{other:?}"),
    }
}

/// The socket an endpoint names: a path, or a URL of one.
pub(crate) fn socket_path(endpoint: &str) -> PathBuf {
    let path = endpoint.strip_prefix("unix://");
    let path = path.or_else(|| endpoint.strip_prefix("unix:"));
    path.unwrap_or(endpoint).into()
}

/// A connection that is made with the first call. `localhost` is the authority every server
/// takes; a path in its place is refused by some.
pub(crate) fn channel(socket: PathBuf) -> Channel {
    let connect = service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://localhost").connect_with_connector_lazy(connect)
}

/// A driver's node service.
#[derive(Debug, Clone)]
pub(crate) struct Driver {
    node: NodeClient<Channel>,
    limit: Duration,
}

impl Driver {
    /// The driver behind an endpoint; nothing is sent yet.
    pub(crate) fn new(endpoint: &str) -> Self {
        Self {
            node: NodeClient::new(channel(socket_path(endpoint))),
            limit: CALL_LIMIT,
        }
    }

    /// With less patience.
    pub(crate) fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// One call, with its end.
    async fn call<Q, A, R>(
        &self,
        request: Q,
        send: impl FnOnce(NodeClient<Channel>, Request<Q>) -> R,
    ) -> Result<A, RpcError>
    where
        R: Future<Output = Result<Response<A>, Status>>,
    {
        let mut request = Request::new(request);
        request.set_timeout(self.limit);
        match tokio::time::timeout(self.limit, send(self.node.clone(), request)).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(status.into()),
            Err(_) => Err(RpcError {
                code: Code::DeadlineExceeded,
                message: "context deadline exceeded".to_owned(),
            }),
        }
    }

    pub(crate) async fn info(&self) -> Result<csi::NodeGetInfoResponse, RpcError> {
        let request = csi::NodeGetInfoRequest {};
        self.call(request, |mut n, r| async move { n.node_get_info(r).await })
            .await
    }

    pub(crate) async fn capabilities(&self) -> Result<Capabilities, RpcError> {
        let request = csi::NodeGetCapabilitiesRequest {};
        let answer = self.call(request, |mut n, r| async move {
            n.node_get_capabilities(r).await
        });
        Ok(Capabilities::from(answer.await?.capabilities.as_slice()))
    }

    pub(crate) async fn stage(&self, request: csi::NodeStageVolumeRequest) -> Result<(), RpcError> {
        self.call(
            request,
            |mut n, r| async move { n.node_stage_volume(r).await },
        )
        .await
        .map(drop)
    }

    pub(crate) async fn unstage(&self, volume: &str, staging: String) -> Result<(), RpcError> {
        let request = csi::NodeUnstageVolumeRequest {
            volume_id: volume.to_owned(),
            staging_target_path: staging,
        };
        self.call(
            request,
            |mut n, r| async move { n.node_unstage_volume(r).await },
        )
        .await
        .map(drop)
    }

    pub(crate) async fn publish(
        &self,
        request: csi::NodePublishVolumeRequest,
    ) -> Result<(), RpcError> {
        self.call(
            request,
            |mut n, r| async move { n.node_publish_volume(r).await },
        )
        .await
        .map(drop)
    }

    pub(crate) async fn unpublish(&self, volume: &str, target: String) -> Result<(), RpcError> {
        let request = csi::NodeUnpublishVolumeRequest {
            volume_id: volume.to_owned(),
            target_path: target,
        };
        self.call(request, |mut n, r| async move {
            n.node_unpublish_volume(r).await
        })
        .await
        .map(drop)
    }

    pub(crate) async fn expand(
        &self,
        request: csi::NodeExpandVolumeRequest,
    ) -> Result<(), RpcError> {
        self.call(
            request,
            |mut n, r| async move { n.node_expand_volume(r).await },
        )
        .await
        .map(drop)
    }

    pub(crate) async fn stats(
        &self,
        volume: &str,
        path: String,
    ) -> Result<csi::NodeGetVolumeStatsResponse, RpcError> {
        let request = csi::NodeGetVolumeStatsRequest {
            volume_id: volume.to_owned(),
            volume_path: path,
            ..csi::NodeGetVolumeStatsRequest::default()
        };
        self.call(request, |mut n, r| async move {
            n.node_get_volume_stats(r).await
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_read_as_those_of_go() {
        let error = RpcError::from(Status::cancelled("given up"));
        assert_eq!(
            error.to_string(),
            "rpc error: code = Canceled desc = given up"
        );
        assert!(!error.is_final());
        let error = RpcError::from(Status::invalid_argument("no"));
        assert_eq!(
            error.to_string(),
            "rpc error: code = InvalidArgument desc = no"
        );
        assert!(error.is_final() && error.is_infeasible());
        assert!(!RpcError::from(Status::aborted("")).is_final());
        assert!(!RpcError::from(Status::internal("")).is_infeasible());
    }

    #[test]
    fn an_endpoint_is_a_path_or_a_url() {
        for endpoint in ["/run/d.sock", "unix:///run/d.sock", "unix:/run/d.sock"] {
            assert_eq!(socket_path(endpoint), PathBuf::from("/run/d.sock"));
        }
    }

    #[tokio::test]
    async fn a_driver_that_is_not_there_is_unavailable() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("none.sock");
        let driver = Driver::new(socket.to_str().unwrap());
        let error = driver.info().await.unwrap_err();
        assert_eq!(error.code, Code::Unavailable);
    }
}
