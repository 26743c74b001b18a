//! All services of the cluster, for environment variables.

use super::ObjectError;
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Service;
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::AbortHandle;

/// How long a launch waits for the first list.
const FIRST_LIST: Duration = Duration::from_secs(2);

/// A reflector of services. Its task ends with it.
pub struct Services {
    store: Store<Service>,
    task: AbortHandle,
}

impl std::fmt::Debug for Services {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Services").finish_non_exhaustive()
    }
}

impl Services {
    /// Begins to follow. Needs a tokio runtime.
    pub fn new(client: Client) -> Self {
        let (store, writer) = reflector::store();
        let config = watcher::Config::default().any_semantic();
        let events = watcher(Api::<Service>::all(client), config)
            .default_backoff()
            .modify(|service| {
                service.metadata.managed_fields = None;
                service.status = None;
            });
        let events = reflector::reflector(writer, events);
        let task = tokio::spawn(async move {
            futures::pin_mut!(events);
            while let Some(event) = events.next().await {
                if let Err(error) = event {
                    tracing::debug!(%error, "watch of services");
                }
            }
        });
        Self {
            store,
            task: task.abort_handle(),
        }
    }

    /// The services known so far; none before the first list. For pods that must not wait for an
    /// apiserver.
    pub fn known(&self) -> Vec<Arc<Service>> {
        self.store.state()
    }

    /// All services, once they were read.
    ///
    /// # Errors
    /// [`ObjectError::ServicesUnread`] when the first list does not come.
    pub async fn all(&self) -> Result<Vec<Arc<Service>>, ObjectError> {
        let ready = tokio::time::timeout(FIRST_LIST, self.store.wait_until_ready()).await;
        match ready {
            Ok(Ok(())) => Ok(self.store.state()),
            Ok(Err(_)) | Err(_) => Err(ObjectError::ServicesUnread),
        }
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        self.task.abort();
    }
}
