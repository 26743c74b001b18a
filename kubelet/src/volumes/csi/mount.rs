//! From a volume to something containers can mount: stage, publish, hand over.

use super::client::{Driver, RpcError};
use super::paths::{attachment_name, inline_handle, is_file_name};
use super::record::VolData;
use super::request::{
    Capabilities, Form, GroupFacts, attach_required, capability, check_lifecycle, group_is_ours,
    map, pod_info, pod_info_wanted,
};
use super::world::{Place, Stage, Volume, VolumeId};
use super::{Csi, Inner, blocking, failed, lock, text};
use crate::launch::{pod_namespace, pod_uid};
use crate::volumes::claims::Bound;
use crate::volumes::plan::{InlineCsi, TokenSpec, fs_group};
use crate::volumes::token::{self, Token};
use crate::volumes::{HostVolume, Step, VolumeError, ownership};
use k8s_openapi::api::core::v1::{CSIPersistentVolumeSource, Pod, SecretReference};
use k8s_openapi::api::storage::v1::CSIDriver;
use proto::csi::v1 as csi;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Life of tokens for drivers that ask for none in particular.
const TOKEN_LIFE_S: i64 = 3600;
const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";
const IN_USE: &str =
    "volume uses the ReadWriteOncePod access mode and is already in use by another pod";

/// A volume of a pod.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted<'a> {
    pub(crate) pod: &'a Pod,
    /// Its name in the pod.
    pub(crate) outer: &'a str,
    /// The pod has it already: it is only brought up to date.
    pub(crate) again: bool,
    /// The pod ends: nobody waits for others any more.
    pub(crate) ended: &'a CancellationToken,
}

/// What a volume is published with.
struct Publish<'a> {
    id: VolumeId,
    name: &'a str,
    inline: bool,
    readonly: bool,
    fs_type: &'a str,
    access_modes: Option<&'a [String]>,
    flags: Vec<String>,
    attributes: Option<&'a BTreeMap<String, String>>,
    secret: Option<SecretReference>,
    context: HashMap<String, String>,
    staging: String,
}

/// A failed call in a step, as events tell it.
fn refused(step: Step, name: &str) -> impl Fn(RpcError) -> VolumeError {
    move |error| failed(step, name, error)
}

impl Csi {
    /// Publishes an inline volume.
    ///
    /// # Errors
    /// What failed, in stock's words.
    pub(crate) async fn mount_inline(
        &self,
        wanted: Wanted<'_>,
        source: &InlineCsi,
    ) -> Result<HostVolume, VolumeError> {
        let name = wanted.outer;
        let fail = |message: String| failed(Step::SetUp, name, message);
        let uid = pod_uid(wanted.pod);
        let id = VolumeId {
            driver: source.driver.clone(),
            handle: inline_handle(uid, name),
        };
        let driver = self.inner.drivers.node(&id.driver).await.map_err(|e| {
            fail(format!(
                "kubernetes.io/csi: mounter.SetUpAt failed to get CSI client: {e}"
            ))
        })?;
        let object = self.inner.object(&id.driver).await.map_err(&fail)?;
        let entered = self
            .inner
            .world
            .enter(id.clone(), Place::Mount, (uid, name), false);
        let volume = entered.ok_or_else(|| fail(IN_USE.to_owned()))?;
        // No controller attaches what only one pod ever sees.
        volume.set_attachable(false);
        self.inner.tell_in_use();
        let mut stage = volume.stage.lock().await;
        let capabilities = driver
            .capabilities()
            .await
            .map_err(|e| fail(e.to_string()))?;
        let namespace = pod_namespace(wanted.pod);
        let publish = Publish {
            id,
            name,
            inline: true,
            readonly: source.readonly,
            fs_type: source.fs_type.as_deref().unwrap_or_default(),
            access_modes: None,
            flags: Vec::new(),
            attributes: Some(&source.attributes),
            secret: source.secret.as_ref().map(|name| SecretReference {
                name: Some(name.clone()),
                namespace: Some(namespace.to_owned()),
            }),
            context: HashMap::new(),
            staging: String::new(),
        };
        let object = object.as_deref();
        self.inner
            .publish(wanted, &driver, capabilities, object, publish)
            .await?;
        // There is nothing to unstage.
        *stage = Stage::Gone;
        Ok(HostVolume {
            path: self.inner.paths.target(uid, name),
            readonly: source.readonly,
            block: false,
        })
    }

    /// Stages and publishes a PersistentVolume, as a filesystem or as a device.
    ///
    /// # Errors
    /// What failed, in stock's words.
    pub(crate) async fn mount(
        &self,
        wanted: Wanted<'_>,
        bound: &Bound,
        source: &CSIPersistentVolumeSource,
    ) -> Result<HostVolume, VolumeError> {
        let name = bound.name();
        let block = bound.is_block();
        let (first, wait) = if block {
            (Step::MapSetUpDevice, Step::MapWaitForAttach)
        } else {
            (Step::MountDevice, Step::WaitForAttach)
        };
        if ![name, source.driver.as_str()].into_iter().all(is_file_name) {
            return Err(failed(first, name, "its name or driver is no file name"));
        }
        let uid = pod_uid(wanted.pod);
        let object = self.inner.object(&source.driver).await;
        let object = object.map_err(|e| failed(first, name, e))?;
        let id = VolumeId {
            driver: source.driver.clone(),
            handle: source.volume_handle.clone(),
        };
        let place = if block {
            Place::Block {
                name: name.to_owned(),
            }
        } else {
            Place::Mount
        };
        let attach = attach_required(object.as_deref());
        // From here on the volume is the pod's, whatever becomes of the rest.
        let one = bound.is_for_one_pod();
        let entered = self.inner.world.enter(id, place, (uid, name), one);
        let volume = entered.ok_or_else(|| failed(Step::SetUp, name, IN_USE))?;
        volume.set_attachable(attach);
        self.inner.tell_in_use();
        let context = if attach {
            self.inner.attached(&volume, wanted, name, wait).await?
        } else {
            HashMap::new()
        };
        let mut stage = volume.stage.lock().await;
        let driver = self.inner.drivers.node(&source.driver).await;
        let driver = driver.map_err(|e| {
            let step = if block {
                "blockMapper.SetUpDevice failed to get CSI client"
            } else {
                "attacher.MountDevice failed to create newCsiDriverClient"
            };
            failed(first, name, format!("kubernetes.io/csi: {step}: {e}"))
        })?;
        let capabilities = driver.capabilities().await.map_err(refused(first, name))?;
        let job = Job {
            wanted,
            bound,
            source,
            volume: &volume,
            driver: &driver,
            capabilities,
            object: object.as_deref(),
            context,
        };
        let path = if block {
            self.inner.map_device(job, &mut stage).await?
        } else {
            self.inner.mount_filesystem(job, &mut stage).await?
        };
        Ok(HostVolume {
            path,
            readonly: bound.readonly,
            block,
        })
    }
}

/// A PersistentVolume on its way into a pod.
pub(super) struct Job<'a> {
    pub(super) wanted: Wanted<'a>,
    pub(super) bound: &'a Bound,
    pub(super) source: &'a CSIPersistentVolumeSource,
    pub(super) volume: &'a Arc<Volume>,
    pub(super) driver: &'a Driver,
    pub(super) capabilities: Capabilities,
    pub(super) object: Option<&'a CSIDriver>,
    pub(super) context: HashMap<String, String>,
}

impl Job<'_> {
    fn first_mode(&self) -> Option<&str> {
        self.bound.access_modes()?.first().map(String::as_str)
    }

    pub(super) fn capability(&self, form: Form) -> csi::VolumeCapability {
        capability(form, self.first_mode(), self.capabilities.multi_writer)
    }
}

impl Inner {
    async fn object(&self, driver: &str) -> Result<Option<Arc<CSIDriver>>, String> {
        self.drivers.object(driver).await
    }

    pub(super) async fn referred(
        &self,
        what: &str,
        reference: Option<&SecretReference>,
    ) -> Result<HashMap<String, String>, String> {
        let Some(reference) = reference else {
            return Ok(HashMap::new());
        };
        let namespace = reference.namespace.as_deref().unwrap_or_default();
        let name = reference.name.as_deref().unwrap_or_default();
        self.secret(namespace, name)
            .await
            .map_err(|e| format!("fetching {what} {namespace}/{name} failed: {e}"))
    }

    async fn mount_filesystem(
        &self,
        job: Job<'_>,
        stage: &mut Stage,
    ) -> Result<std::path::PathBuf, VolumeError> {
        let name = job.bound.name();
        let staging = self
            .paths
            .staging(&job.source.driver, &job.source.volume_handle);
        if job.capabilities.stage {
            if *stage != Stage::Staged {
                *stage = Stage::Unknown;
                self.stage_filesystem(&job, &staging).await?;
                *stage = Stage::Staged;
            }
        } else {
            *stage = Stage::Gone;
        }
        let publish = Publish {
            id: job.volume.id.clone(),
            name,
            inline: false,
            readonly: job.bound.readonly,
            fs_type: job.source.fs_type.as_deref().unwrap_or_default(),
            access_modes: job.bound.access_modes(),
            flags: job.bound.mount_options(),
            attributes: job.source.volume_attributes.as_ref(),
            secret: job.source.node_publish_secret_ref.clone(),
            context: job.context.clone(),
            staging: if job.capabilities.stage {
                text(&staging)
            } else {
                String::new()
            },
        };
        self.publish(
            job.wanted,
            job.driver,
            job.capabilities,
            job.object,
            publish,
        )
        .await?;
        Ok(self.paths.target(pod_uid(job.wanted.pod), name))
    }

    async fn stage_filesystem(&self, job: &Job<'_>, staging: &Path) -> Result<(), VolumeError> {
        let name = job.bound.name();
        let fail = |message: String| failed(Step::MountDevice, name, message);
        let secret = job.source.node_stage_secret_ref.as_ref();
        let secrets = self.referred("NodeStageSecretRef", secret).await;
        let secrets = secrets.map_err(fail)?;
        let data = VolData {
            driver: job.source.driver.clone(),
            handle: job.source.volume_handle.clone(),
            name: String::new(),
            rest: BTreeMap::new(),
        };
        let dir = staging.to_owned();
        let made = blocking(move || {
            // The record first: whatever is made after it can be undone.
            data.save(dir.parent().unwrap_or(&dir))?;
            make_mount_point(&dir)
        });
        made.await.map_err(|e| {
            fail(format!(
                "kubernetes.io/csi: attacher.MountDevice failed to create dir {staging:?}:  {e}"
            ))
        })?;
        let group = fs_group(job.wanted.pod).map(i64::from);
        let form = Form::Mount {
            fs_type: job.source.fs_type.clone().unwrap_or_default(),
            flags: job.bound.mount_options(),
            group: group.filter(|_| job.capabilities.mount_group),
        };
        let request = csi::NodeStageVolumeRequest {
            volume_id: job.source.volume_handle.clone(),
            publish_context: job.context.clone(),
            staging_target_path: text(staging),
            volume_capability: Some(job.capability(form)),
            secrets,
            volume_context: map(job.source.volume_attributes.as_ref()),
        };
        if let Err(error) = job.driver.stage(request).await {
            if error.is_final() && !job.volume.is_used_beside(pod_uid(job.wanted.pod)) {
                self.clear(staging).await;
            }
            return Err(fail(error.to_string()));
        }
        Ok(())
    }

    /// Removes a mount point and its record after a driver has said that nothing is there. What
    /// cannot be removed stays for teardown.
    async fn clear(&self, mount: &Path) {
        let dir = mount.to_owned();
        if let Err(error) = blocking(move || super::unmount::clear_mount(&dir, false)).await {
            tracing::warn!(error, path = %mount.display(), "Mount point is kept");
        }
    }

    /// Publishes a filesystem to a pod and hands it to the pod's group.
    async fn publish(
        &self,
        wanted: Wanted<'_>,
        driver: &Driver,
        capabilities: Capabilities,
        object: Option<&CSIDriver>,
        publish: Publish<'_>,
    ) -> Result<(), VolumeError> {
        let (pod, name) = (wanted.pod, publish.name);
        let fail = |message: String| failed(Step::SetUp, name, message);
        let refuse =
            |what: &str, e: String| fail(format!("kubernetes.io/csi: mounter.{what}: {e}"));
        check_lifecycle(object, &publish.id.driver, publish.inline)
            .map_err(|e| refuse("SetupAt failed to check volume lifecycle mode", e))?;
        let ours = group_is_ours(GroupFacts {
            object,
            readonly: publish.readonly,
            fs_type: publish.fs_type,
            access_modes: publish.access_modes,
            inline: publish.inline,
        })
        .map_err(|e| refuse("SetupAt failed to check fsGroup policy", e))?;
        let secret = publish.secret.as_ref();
        let secrets = self.referred("NodePublishSecretRef", secret).await;
        let mut secrets = secrets.map_err(fail)?;
        let mut attributes = map(publish.attributes);
        if pod_info_wanted(object) {
            attributes.extend(pod_info(pod, publish.inline));
        }
        if let Some(tokens) = self
            .tokens(pod, &publish.id.driver, object)
            .await
            .map_err(|e| refuse("SetUpAt failed to get service accoount token attributes", e))?
        {
            let hidden = object.and_then(|o| o.spec.service_account_token_in_secrets);
            let to = if hidden == Some(true) {
                &mut secrets
            } else {
                &mut attributes
            };
            to.insert(TOKENS.to_owned(), tokens);
        }
        let group = fs_group(pod);
        let first = publish.access_modes.and_then(|m| m.first());
        let form = Form::Mount {
            fs_type: publish.fs_type.to_owned(),
            flags: publish.flags,
            group: group.map(i64::from).filter(|_| capabilities.mount_group),
        };
        let capability = capability(form, first.map(String::as_str), capabilities.multi_writer);
        let uid = pod_uid(pod);
        let target = self.paths.target(uid, name);
        let data = pod_record(&publish.id, name, &self.node_name, publish.inline);
        let dir = self.paths.pod_volumes(uid).join(name);
        blocking(move || data.save(&dir))
            .await
            .map_err(|e| refuse("SetUpAt failed to save volume info data", e))?;
        let request = csi::NodePublishVolumeRequest {
            volume_id: publish.id.handle.clone(),
            publish_context: publish.context,
            staging_target_path: publish.staging,
            target_path: text(&target),
            volume_capability: Some(capability),
            readonly: publish.readonly,
            secrets,
            volume_context: attributes,
        };
        if let Err(error) = driver.publish(request).await {
            // Containers may be looking at what is mounted.
            if error.is_final() && !wanted.again {
                self.clear(&target).await;
            }
            return Err(fail(error.to_string()));
        }
        match group.filter(|_| ours && !capabilities.mount_group) {
            Some(group) => ownership::apply(&self.events, pod, &target, group)
                .await
                .map_err(|e| {
                    fail(format!(
                        "applyFSGroup failed for vol {}: {e}",
                        publish.id.handle
                    ))
                }),
            None => Ok(()),
        }
    }

    /// The tokens a driver asked for, as one text; none when it asks for none.
    async fn tokens(
        &self,
        pod: &Pod,
        driver: &str,
        object: Option<&CSIDriver>,
    ) -> Result<Option<String>, String> {
        let asked = object.and_then(|o| o.spec.token_requests.as_deref());
        let asked = asked.unwrap_or_default();
        if asked.is_empty() {
            return Ok(None);
        }
        let mut all = serde_json::Map::new();
        for request in asked {
            let key = (
                pod_uid(pod).to_owned(),
                driver.to_owned(),
                request.audience.clone(),
            );
            let token = self.token(pod, key, request.expiration_seconds).await?;
            let expires = token.expires_at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
            all.insert(
                request.audience.clone(),
                serde_json::json!({"token": token.text, "expirationTimestamp": expires}),
            );
        }
        Ok(Some(serde_json::Value::Object(all).to_string()))
    }

    async fn token(
        &self,
        pod: &Pod,
        key: (String, String, String),
        life_s: Option<i64>,
    ) -> Result<Token, String> {
        let held = lock(&self.tokens).get(&key).cloned();
        if let Some(token) = held.filter(|t| jiff::Timestamp::now() < t.refresh_at) {
            return Ok(token);
        }
        let spec = TokenSpec {
            path: String::new(),
            audience: Some(key.2.clone()).filter(|a| !a.is_empty()),
            expiration_seconds: life_s.unwrap_or(TOKEN_LIFE_S),
        };
        let token = token::request(&self.client, pod, &spec).await?;
        lock(&self.tokens).insert(key, token.clone());
        Ok(token)
    }
}

/// The record of a pod's volume.
pub(super) fn pod_record(id: &VolumeId, name: &str, node: &str, inline: bool) -> VolData {
    let lifecycle = if inline { "Ephemeral" } else { "Persistent" };
    let rest = [
        ("nodeName", node.to_owned()),
        ("volumeLifecycleMode", lifecycle.to_owned()),
        (
            "attachmentID",
            attachment_name(&id.handle, &id.driver, node),
        ),
    ];
    VolData {
        driver: id.driver.clone(),
        handle: id.handle.clone(),
        name: name.to_owned(),
        rest: rest.map(|(k, v)| (k.to_owned(), v)).into(),
    }
}

pub(super) fn make_dirs(dir: &Path) -> Result<(), String> {
    linux::fs::create_dirs(dir, 0o750).map_err(|e| crate::errors::chain(&e))
}

/// Makes a directory unless something is mounted there: what is mounted may hang and is not
/// looked at.
fn make_mount_point(dir: &Path) -> Result<(), String> {
    match super::unmount::is_mounted(dir)? {
        true => Ok(()),
        false => make_dirs(dir),
    }
}
