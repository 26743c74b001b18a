//! A client that is there before the apiserver is known: it fails until it is filled.

use arc_swap::ArcSwapOption;
use kube::Client;
use kube::client::Body;
use std::sync::Arc;
use tower::BoxError;

/// Where the real client goes.
#[derive(Clone)]
pub(super) struct Slot {
    inner: Arc<ArcSwapOption<Client>>,
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let filled = self.inner.load().is_some();
        f.debug_struct("Slot").field("filled", &filled).finish()
    }
}

impl Slot {
    /// From now on requests go to the apiserver.
    pub(super) fn fill(&self, client: Client) {
        self.inner.store(Some(Arc::new(client)));
    }
}

/// A client that says `why` to every request until its slot is filled.
pub(super) fn client(why: &'static str) -> (Client, Slot) {
    let slot = Slot {
        inner: Arc::default(),
    };
    let inner = Arc::clone(&slot.inner);
    let service = tower::service_fn(move |request: http::Request<Body>| {
        let client = inner.load_full();
        async move {
            match client {
                Some(client) => client.send(request).await.map_err(BoxError::from),
                None => Err(BoxError::from(why)),
            }
        }
    });
    (Client::new(service, "default"), slot)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::Node;
    use kube::Api;

    #[tokio::test]
    async fn it_fails_until_it_is_filled() {
        let (late, slot) = client("not yet");
        let api: Api<Node> = Api::all(late);
        let error = api.get("n").await.unwrap_err();
        assert!(crate::errors::chain(&error).contains("not yet"), "{error}");
        let real = tower::service_fn(|request: http::Request<Body>| async move {
            let node = format!(
                "{{\"apiVersion\":\"v1\",\"kind\":\"Node\",\"metadata\":{{\"name\":{:?}}}}}",
                request.uri().path()
            );
            Ok::<_, BoxError>(http::Response::new(Body::from(node.into_bytes())))
        });
        slot.fill(Client::new(real, "default"));
        let node = api.get("n").await.unwrap();
        assert_eq!(node.metadata.name.as_deref(), Some("/api/v1/nodes/n"));
    }
}
