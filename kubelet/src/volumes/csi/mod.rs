//! Volumes of CSI drivers.
//!
//! ```text
//!   plugins (registration) --> Drivers: where each driver listens, what its CSIDriver says
//!   prepare --> mount:   attached? -> NodeStage -> NodePublish -> fsGroup -> NodeExpand
//!   teardown -> unmount: NodeUnpublish -> the last user is gone: NodeUnstage (beside it)
//!   World: which volumes are held and by whom; from records on disk when the agent starts
//! ```
//!
//! Every volume has a lock of its own and every call a limit: a driver that hangs delays the pods
//! of that volume and nobody else. Records (`vol_data.json`) are written before the call they
//! describe and removed after the call that undoes it, so that an agent killed anywhere knows
//! what may be there. Proto types appear here and nowhere else in the volumes.

mod attach;
mod client;
mod device;
mod drivers;
mod expand;
mod mount;
mod paths;
mod record;
mod request;
#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;
mod unmount;
mod usage;
mod world;

pub(crate) use client::{Driver, channel};
pub use drivers::Drivers;
pub(crate) use mount::Wanted;
pub(crate) use paths::is_file_name;
pub use usage::Usage;

use super::VolumeError;
use super::token::Token;
use crate::events::EventSink;
use crate::node::NodeHandle;
use crate::objects::{api_message, with_forbidden_retries};
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};
use paths::Paths;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use world::World;

/// Tokens for drivers by pod UID, driver and audience.
type Tokens = HashMap<(String, String, String), Token>;

/// CSI volumes of the node. Cheap to clone; clones are the same.
#[derive(Clone)]
pub(crate) struct Csi {
    inner: Arc<Inner>,
}

struct Inner {
    paths: Paths,
    client: Client,
    node_name: String,
    node: NodeHandle,
    events: EventSink,
    drivers: Drivers,
    world: World,
    tokens: Mutex<Tokens>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the CSI volumes of a node need.
pub(crate) struct Settings<'a> {
    /// The kubelet's root, a real path.
    pub(crate) root: &'a Path,
    pub(crate) node_name: String,
    pub(crate) node: NodeHandle,
    pub(crate) drivers: Drivers,
    pub(crate) events: EventSink,
    pub(crate) client: Client,
}

impl Csi {
    /// Reads what is on disk and begins to clean up what nobody uses. Blocks shortly; needs a
    /// tokio runtime.
    pub(crate) fn open(settings: Settings<'_>) -> Self {
        let paths = Paths::new(settings.root);
        let inner = Inner {
            world: World::read(&paths),
            paths,
            client: settings.client,
            node_name: settings.node_name,
            node: settings.node,
            events: settings.events,
            drivers: settings.drivers,
            tokens: Mutex::default(),
        };
        let csi = Self {
            inner: Arc::new(inner),
        };
        csi.inner.tell_in_use();
        let weak = Arc::downgrade(&csi.inner);
        tokio::spawn(async move {
            let Some(drivers) = weak.upgrade().map(|inner| inner.drivers.clone()) else {
                return;
            };
            drivers.read().await;
            if let Some(inner) = weak.upgrade() {
                let required =
                    |name: &str| request::attach_required(drivers.known(name).as_deref());
                inner.world.sort_attachable(required);
                inner.tell_in_use();
            }
        });
        for volume in csi.inner.world.unused() {
            csi.release(volume);
        }
        csi
    }

    /// Whether the driver's volumes are published again and again.
    pub(crate) fn republishes(&self, driver: &str) -> bool {
        request::republish_wanted(self.inner.drivers.known(driver).as_deref())
    }

    /// The driver's name of an inline volume.
    pub(crate) fn inline_handle(&self, uid: &str, volume: &str) -> String {
        paths::inline_handle(uid, volume)
    }
}

impl Inner {
    /// Brings the Node's status in line with the volumes held.
    fn tell_in_use(&self) {
        self.node.set_volumes_in_use(self.world.in_use());
    }

    /// The content of a Secret.
    async fn secret(&self, namespace: &str, name: &str) -> Result<HashMap<String, String>, String> {
        let api: Api<Secret> = Api::namespaced(self.client.clone(), namespace);
        let found = with_forbidden_retries(|| api.get(name)).await.map_err(|e| {
            format!(
                "kubernetes.io/csi: failed to find the secret {name} in the namespace {namespace} with error: {}",
                api_message(&e)
            )
        })?;
        let data = found.data.unwrap_or_default().into_iter();
        Ok(data
            .map(|(key, value)| (key, String::from_utf8_lossy(&value.0).into_owned()))
            .collect())
    }
}

/// Runs file work where it may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(format!("file work did not end: {error}")),
    }
}

/// A path as drivers get it: paths of ours are text.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A step of a volume that failed, as events tell it.
fn failed(what: super::Step, name: &str, message: impl ToString) -> VolumeError {
    VolumeError::Failed {
        what,
        volume: name.to_owned(),
        message: message.to_string(),
    }
}
