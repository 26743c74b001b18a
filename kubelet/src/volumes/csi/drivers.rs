//! The CSI drivers of this node: those that registered, and what the cluster says of them.

use super::client::Driver;
use futures::StreamExt as _;
use k8s_openapi::api::storage::v1::CSIDriver;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// How long somebody waits for a driver that has yet to register: an agent that starts knows
/// none for some milliseconds.
const REGISTRATION: Duration = Duration::from_secs(5);
/// How long somebody waits for the first list of CSIDrivers.
const FIRST_LIST: Duration = Duration::from_secs(10);

/// A version of the interface, as drivers spell it: `1.8.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version {
    major: u64,
    minor: u64,
    patch: u64,
}

impl Version {
    fn parse(text: &str) -> Option<Self> {
        let text = text.strip_prefix('v').unwrap_or(text);
        let mut parts = text.split(['.', '-', '+']);
        let major = parts.next()?.parse().ok()?;
        let minor = parts.next()?.parse().ok()?;
        let patch = parts.next().and_then(|p| p.parse().ok()).unwrap_or(0);
        Some(Self {
            major,
            minor,
            patch,
        })
    }

    /// The highest version of a driver's list that we speak.
    ///
    /// # Errors
    /// Says that there is none.
    pub(crate) fn highest(all: &[String]) -> Result<Self, String> {
        let known = all.iter().filter_map(|v| Self::parse(v));
        match known.filter(|v| v.major <= 1).max() {
            Some(version) if version.major == 1 => Ok(version),
            Some(version) => Err(format!(
                "highest supported version reported by plugin is {version}, must be v1.x"
            )),
            None => Err(format!(
                "could not find a highest supported version from versions ([{}]) reported by this plugin: <nil>",
                all.join(" ")
            )),
        }
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// A driver that registered.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Registered {
    endpoint: String,
    version: Version,
}

/// The drivers of the node. Cheap to clone; clones are the same.
#[derive(Clone)]
pub struct Drivers {
    registered: Arc<watch::Sender<BTreeMap<String, Registered>>>,
    objects: Store<CSIDriver>,
    _watch: Arc<Watch>,
}

impl std::fmt::Debug for Drivers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Drivers")
            .field("registered", &*self.registered.borrow())
            .finish_non_exhaustive()
    }
}

/// The task that follows CSIDrivers; ends with it.
struct Watch(AbortHandle);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Drivers {
    /// No driver yet; begins to follow CSIDrivers. Needs a tokio runtime.
    pub fn new(client: Client) -> Self {
        let (objects, writer) = reflector::store();
        let config = watcher::Config::default().any_semantic();
        let events = watcher(Api::<CSIDriver>::all(client), config)
            .default_backoff()
            .modify(|object| object.metadata.managed_fields = None);
        let events = reflector::reflector(writer, events);
        let task = tokio::spawn(async move {
            futures::pin_mut!(events);
            while let Some(event) = events.next().await {
                if let Err(error) = event {
                    tracing::debug!(%error, "watch of CSIDrivers");
                }
            }
        });
        Self {
            registered: Arc::new(watch::Sender::new(BTreeMap::new())),
            objects,
            _watch: Arc::new(Watch(task.abort_handle())),
        }
    }

    /// Whether a driver may register now, and with which version.
    ///
    /// # Errors
    /// Stock's words.
    pub(crate) fn check(
        &self,
        step: &str,
        name: &str,
        versions: &[String],
    ) -> Result<Version, String> {
        let failed = |why: String| {
            format!("kubernetes.io/csi: {step} for CSI driver {name:?} failed. {why}")
        };
        if versions.is_empty() {
            return Err(failed(
                "Plugin returned an empty list for supported versions".to_owned(),
            ));
        }
        let version = Version::highest(versions).map_err(|e| {
            let quoted: Vec<String> = versions.iter().map(|v| format!("{v:?}")).collect();
            failed(format!(
                "None of the versions specified [{}] are supported. err={e}",
                quoted.join(" ")
            ))
        })?;
        match self.registered.borrow().get(name) {
            Some(known) if known.version >= version => Err(failed(format!(
                "Another driver with the same name is already registered with a higher supported version: \"{}\"",
                known.version
            ))),
            Some(_) | None => Ok(version),
        }
    }

    /// Notes where a driver is.
    pub(crate) fn insert(&self, name: &str, endpoint: &str, version: Version) {
        let driver = Registered {
            endpoint: endpoint.to_owned(),
            version,
        };
        self.registered
            .send_modify(|all| drop(all.insert(name.to_owned(), driver)));
    }

    /// Forgets a driver.
    pub(crate) fn remove(&self, name: &str) {
        self.registered
            .send_if_modified(|all| all.remove(name).is_some());
    }

    /// Resolves at the next change of the drivers that are registered, or soon.
    pub(crate) async fn changed(&self) {
        let mut registered = self.registered.subscribe();
        // The sender lives as long as we do.
        let _ = registered.changed().await;
    }

    /// A driver's node service. One that has not registered is waited for a little.
    ///
    /// # Errors
    /// Stock's words when it does not come.
    pub(crate) async fn node(&self, name: &str) -> Result<Driver, String> {
        if name.is_empty() {
            return Err("driver name is empty".to_owned());
        }
        let mut registered = self.registered.subscribe();
        let there = registered.wait_for(|all| all.contains_key(name));
        let found = tokio::time::timeout(REGISTRATION, there).await;
        let endpoint = match found {
            Ok(Ok(all)) => all.get(name).map(|d| d.endpoint.clone()),
            Ok(Err(_)) | Err(_) => None,
        };
        let endpoint = endpoint.ok_or_else(|| {
            format!("driver name {name} not found in the list of registered CSI drivers")
        })?;
        Ok(Driver::new(&endpoint))
    }

    /// What the cluster says of a driver; none when it says nothing.
    ///
    /// # Errors
    /// The list of CSIDrivers was never read.
    pub(crate) async fn object(&self, name: &str) -> Result<Option<Arc<CSIDriver>>, String> {
        let ready = tokio::time::timeout(FIRST_LIST, self.objects.wait_until_ready()).await;
        match ready {
            Ok(Ok(())) => Ok(self.known(name)),
            Ok(Err(_)) | Err(_) => Err("timed out waiting for the condition".to_owned()),
        }
    }

    /// What is known of a driver now.
    pub(crate) fn known(&self, name: &str) -> Option<Arc<CSIDriver>> {
        self.objects.get(&ObjectRef::new(name))
    }

    /// Resolves once the CSIDrivers were read.
    pub(crate) async fn read(&self) {
        // An error means that the watch ended, and the agent with it.
        let _ = self.objects.wait_until_ready().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn highest(all: &[&str]) -> Result<String, String> {
        let all: Vec<String> = all.iter().map(|v| (*v).to_owned()).collect();
        Version::highest(&all).map(|v| v.to_string())
    }

    #[test]
    fn the_highest_version_one_counts() {
        assert_eq!(highest(&["1.0.0"]).unwrap(), "1.0.0");
        assert_eq!(
            highest(&["v1.2.0", "1.13.0", "0.3.0", "2.0.0"]).unwrap(),
            "1.13.0"
        );
        assert_eq!(
            highest(&["0.3.0"]).unwrap_err(),
            "highest supported version reported by plugin is 0.3.0, must be v1.x"
        );
        assert!(highest(&["2.0.0", "x"]).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_driver_that_comes_late_is_waited_for_and_one_that_never_comes_is_named() {
        let api = crate::objects::testing::FakeApi::new();
        let drivers = Drivers::new(api.client());
        assert_eq!(
            drivers.node("d").await.unwrap_err(),
            "driver name d not found in the list of registered CSI drivers"
        );
        let late = drivers.clone();
        let waiting = tokio::spawn(async move { late.node("d").await.is_ok() });
        tokio::task::yield_now().await;
        let versions = ["1.0.0".to_owned()];
        let version = drivers.check("RegisterPlugin", "d", &versions).unwrap();
        drivers.insert("d", "/d.sock", version);
        assert!(waiting.await.unwrap());
        let again = drivers.check("ValidatePlugin", "d", &versions);
        assert_eq!(
            again.unwrap_err(),
            "kubernetes.io/csi: ValidatePlugin for CSI driver \"d\" failed. Another driver with the same name is already registered with a higher supported version: \"1.0.0\""
        );
        drivers.remove("d");
        assert!(drivers.check("ValidatePlugin", "d", &versions).is_ok());
    }
}
