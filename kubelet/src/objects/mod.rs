//! Objects pods refer to: ConfigMaps and Secrets by named watches, Services by one reflector.
//!
//! ```text
//!   volumes, launch --config_map(pod, ns, name)--> Objects --GET + watch per object--> apiserver
//!   volumes <--------- changes(): (kind, ns, name) broadcast ---------/
//! ```
//!
//! Objects are held for pods: [`Objects::release_pod`] ends the watches nobody else needs.
//! Tasks: one per followed object and one for services; they end with [`Objects`]. When the
//! apiserver is away, what was read before is served.

mod cache;
mod services;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub(crate) use cache::{api_message, with_forbidden_retries};
pub use services::Services;

use crate::launch::{EnvObjects, env, pod_namespace, pod_uid};
use crate::source::is_static;
use cache::{Cache, Cached};
use futures::future::{try_join, try_join_all};
use k8s_openapi::api::core::v1::{ConfigMap, Container, Pod, Secret, Service};
use kube::Client;
use std::fmt;
use std::sync::Arc;
use tokio::sync::broadcast;

/// Changes a slow listener may lag behind before it has to look at everything.
const CHANGES_QUEUED: usize = 1024;

/// Kinds that are followed by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ObjectKind {
    /// A ConfigMap.
    ConfigMap,
    /// A Secret.
    Secret,
}

impl fmt::Display for ObjectKind {
    /// As messages of the stock kubelet spell it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ConfigMap => "configmap",
            Self::Secret => "secret",
        })
    }
}

impl Cached for ConfigMap {
    const KIND: ObjectKind = ObjectKind::ConfigMap;
}

impl Cached for Secret {
    const KIND: ObjectKind = ObjectKind::Secret;
}

/// An object was added, changed or removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectChange {
    /// Its kind.
    pub kind: ObjectKind,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// An object could not be read. That it does not exist is no error.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ObjectError {
    /// The apiserver refused or is away.
    #[error("cannot read {kind} {namespace}/{name}: {message}")]
    Read {
        /// Kind.
        kind: ObjectKind,
        /// Namespace.
        namespace: String,
        /// Name.
        name: String,
        /// The apiserver's words.
        message: String,
    },
    /// No list of services has been read since the start.
    #[error("services have not yet been read at least once, cannot construct envvars")]
    ServicesUnread,
}

/// ConfigMaps, Secrets and Services as pods need them.
pub struct Objects {
    config_maps: Cache<ConfigMap>,
    secrets: Cache<Secret>,
    services: Services,
    changes: broadcast::Sender<ObjectChange>,
}

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Objects")
            .field("config_maps", &self.config_maps.len())
            .field("secrets", &self.secrets.len())
            .finish_non_exhaustive()
    }
}

impl Objects {
    /// An empty cache; begins to follow services. Needs a tokio runtime.
    pub fn new(client: Client) -> Self {
        let (changes, _) = broadcast::channel(CHANGES_QUEUED);
        Self {
            config_maps: Cache::new(client.clone(), changes.clone()),
            secrets: Cache::new(client.clone(), changes.clone()),
            services: Services::new(client),
            changes,
        }
    }

    /// A ConfigMap, followed from now on for the pod; none when it does not exist.
    ///
    /// # Errors
    /// [`ObjectError::Read`] when it was never read and cannot be now.
    pub async fn config_map(
        &self,
        pod_uid: &str,
        namespace: &str,
        name: &str,
    ) -> Result<Option<Arc<ConfigMap>>, ObjectError> {
        self.config_maps.get(pod_uid, namespace, name).await
    }

    /// A Secret, followed from now on for the pod; none when it does not exist.
    ///
    /// # Errors
    /// [`ObjectError::Read`] when it was never read and cannot be now.
    pub async fn secret(
        &self,
        pod_uid: &str,
        namespace: &str,
        name: &str,
    ) -> Result<Option<Arc<Secret>>, ObjectError> {
        self.secrets.get(pod_uid, namespace, name).await
    }

    /// All a container's environment speaks of, read concurrently.
    ///
    /// # Errors
    /// See [`ObjectError`].
    pub async fn env_objects(
        &self,
        pod: &Pod,
        container: &Container,
    ) -> Result<EnvObjects, ObjectError> {
        let (uid, namespace) = (pod_uid(pod), pod_namespace(pod));
        let needs = env::needs(container);
        let config_maps = try_join_all(needs.config_maps.into_iter().map(async |name| {
            let found = self.config_map(uid, namespace, &name).await?;
            Ok((name, found))
        }));
        let secrets = try_join_all(needs.secrets.into_iter().map(async |name| {
            let found = self.secret(uid, namespace, &name).await?;
            Ok((name, found))
        }));
        let ((config_maps, secrets), services) =
            try_join(try_join(config_maps, secrets), self.services_for(pod)).await?;
        Ok(EnvObjects {
            config_maps: config_maps.into_iter().collect(),
            secrets: secrets.into_iter().collect(),
            services,
            ..EnvObjects::default()
        })
    }

    /// A static pod may be what the apiserver needs to run: it takes the services that are known.
    async fn services_for(&self, pod: &Pod) -> Result<Vec<Arc<Service>>, ObjectError> {
        if is_static(pod) {
            return Ok(self.services.known());
        }
        self.services.all().await
    }

    /// The pod's imagePullSecrets that exist.
    ///
    /// # Errors
    /// See [`ObjectError`].
    pub async fn pull_secrets(&self, pod: &Pod) -> Result<Vec<Arc<Secret>>, ObjectError> {
        let names = pod
            .spec
            .iter()
            .flat_map(|spec| spec.image_pull_secrets.iter().flatten())
            .filter(|reference| !reference.name.is_empty());
        let found = try_join_all(
            names.map(|reference| self.secret(pod_uid(pod), pod_namespace(pod), &reference.name)),
        );
        Ok(found.await?.into_iter().flatten().collect())
    }

    /// The services of the cluster.
    pub fn services(&self) -> &Services {
        &self.services
    }

    /// The pod is gone: objects only it needed are forgotten.
    pub fn release_pod(&self, pod_uid: &str) {
        self.config_maps.release(pod_uid);
        self.secrets.release(pod_uid);
    }

    /// Changes from now on. On `Lagged` everything may have changed.
    pub fn changes(&self) -> broadcast::Receiver<ObjectChange> {
        self.changes.subscribe()
    }

    /// How many objects are followed.
    pub fn followed(&self) -> usize {
        self.config_maps.len() + self.secrets.len()
    }
}
