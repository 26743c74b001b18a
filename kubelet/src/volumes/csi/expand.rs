//! Growing a volume on the node after its controller grew it (KEP-1790).
//!
//! The claim's status says that the node is asked for; the node says that it began, lets the
//! driver grow device and filesystem, and says how it went.

use super::client::RpcError;
use super::request::{Form, capability};
use super::world::{Place, VolumeId};
use super::{Csi, failed, text};
use crate::events::EventType;
use crate::launch::pod_uid;
use crate::objects::api_message;
use crate::volumes::claims::{Bound, storage};
use crate::volumes::{Step, VolumeError};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    CSIPersistentVolumeSource, ObjectReference, PersistentVolumeClaim, Pod,
};
use kube::Api;
use kube::api::{Patch, PatchParams};
use proto::csi::v1 as csi;
use serde_json::{Value, json};
use tonic::Code;

const PENDING: &str = "NodeResizePending";
const IN_PROGRESS: &str = "NodeResizeInProgress";
const INFEASIBLE: &str = "NodeResizeInfeasible";
const SUCCESS: &str = "FileSystemResizeSuccessful";
const FAILURE: &str = "VolumeResizeFailed";
/// Conditions of a resize, which end with it.
const CONDITIONS: [&str; 4] = [
    "FileSystemResizePending",
    "Resizing",
    "ControllerResizeError",
    "NodeResizeError",
];

fn resize_status(claim: &PersistentVolumeClaim) -> Option<&str> {
    let all = claim
        .status
        .as_ref()?
        .allocated_resource_statuses
        .as_ref()?;
    all.get("storage").map(String::as_str)
}

/// The size in bytes the node is asked to grow a volume to; none when it is not asked.
fn wanted_size(bound: &Bound) -> Option<i64> {
    if bound.readonly {
        return None;
    }
    let asked = matches!(resize_status(&bound.claim)?, PENDING | IN_PROGRESS);
    storage(bound.volume.spec.as_ref()?.capacity.as_ref()).filter(|_| asked)
}

/// The claim's status once the node is done.
fn finished(claim: &PersistentVolumeClaim, bound: &Bound) -> Value {
    let capacity = bound.volume.spec.as_ref().and_then(|s| s.capacity.as_ref());
    let size = capacity.and_then(|c| c.get("storage"));
    // Conditions merge by type: those that end are told so.
    let conditions = claim
        .status
        .iter()
        .flat_map(|s| s.conditions.iter().flatten());
    let ended: Vec<Value> = conditions
        .filter(|c| CONDITIONS.contains(&c.type_.as_str()))
        .map(|c| json!({"$patch": "delete", "type": c.type_}))
        .collect();
    let mut status = json!({
        "capacity": {"storage": size},
        "allocatedResourceStatuses": {"storage": null},
    });
    if !ended.is_empty() {
        status["conditions"] = Value::Array(ended);
    }
    status
}

/// The claim's status after a failure.
fn refused(error: &RpcError) -> Value {
    let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let mut status = json!({"conditions": [{
        "type": "NodeResizeError",
        "status": "True",
        "lastTransitionTime": now,
        "message": format!("failed to expand pvc with {error}"),
    }]});
    if error.is_infeasible() {
        status["allocatedResourceStatuses"] = json!({"storage": INFEASIBLE});
    }
    status
}

fn reference(claim: &PersistentVolumeClaim) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("PersistentVolumeClaim".to_owned()),
        name: claim.metadata.name.clone(),
        namespace: claim.metadata.namespace.clone(),
        uid: claim.metadata.uid.clone(),
        resource_version: claim.metadata.resource_version.clone(),
        field_path: None,
    }
}

impl Csi {
    /// Grows a volume when its claim asks for it.
    ///
    /// # Errors
    /// The driver or the apiserver refused.
    pub(crate) async fn expand(
        &self,
        pod: &Pod,
        bound: &Bound,
        source: &CSIPersistentVolumeSource,
    ) -> Result<(), VolumeError> {
        let Some(size) = wanted_size(bound) else {
            return Ok(());
        };
        let name = bound.name();
        let fail = |e: String| failed(Step::Expand, name, e);
        let driver = self
            .inner
            .drivers
            .node(&source.driver)
            .await
            .map_err(fail)?;
        let capabilities = driver.capabilities().await;
        let capabilities = capabilities.map_err(|e| fail(e.to_string()))?;
        if !capabilities.expand {
            return Ok(());
        }
        let place = if bound.is_block() {
            Place::Block {
                name: name.to_owned(),
            }
        } else {
            Place::Mount
        };
        let id = VolumeId {
            driver: source.driver.clone(),
            handle: source.volume_handle.clone(),
        };
        let volume = self.inner.world.volume(id, place);
        let _only = volume.stage.lock().await;
        let begun = json!({"allocatedResourceStatuses": {"storage": IN_PROGRESS}});
        let claim = self.patch(&bound.claim, begun, true).await.map_err(fail)?;
        let secrets = match &source.node_expand_secret_ref {
            Some(reference) => {
                let namespace = reference.namespace.as_deref().unwrap_or_default();
                let name = reference.name.as_deref().unwrap_or_default();
                self.inner.secret(namespace, name).await.map_err(fail)?
            }
            None => std::collections::HashMap::new(),
        };
        let paths = &self.inner.paths;
        let uid = pod_uid(pod);
        let (form, path, staging) = if bound.is_block() {
            let path = paths.block_publish(name).join(uid);
            (Form::Block, path, paths.block_staging(name))
        } else {
            let form = Form::Mount {
                fs_type: source.fs_type.clone().unwrap_or_default(),
                flags: bound.mount_options(),
                group: None,
            };
            let staging = paths.staging(&source.driver, &source.volume_handle);
            (form, paths.target(uid, name), staging)
        };
        let mode = bound.access_modes().and_then(|m| m.first());
        let mode = mode.map(String::as_str);
        let request = csi::NodeExpandVolumeRequest {
            volume_id: source.volume_handle.clone(),
            volume_path: text(&path),
            capacity_range: Some(csi::CapacityRange {
                required_bytes: size,
                limit_bytes: 0,
            }),
            staging_target_path: if capabilities.stage {
                text(&staging)
            } else {
                String::new()
            },
            volume_capability: Some(capability(form, mode, capabilities.multi_writer)),
            secrets,
        };
        match driver.expand(request).await {
            Ok(()) => {
                let status = finished(&claim, bound);
                self.patch(&claim, status, true).await.map_err(fail)?;
                let node = &self.inner.node_name;
                let message =
                    format!("MountVolume.NodeExpandVolume succeeded for volume {name:?} {node}");
                let (events, normal) = (&self.inner.events, EventType::Normal);
                events.pod_event(pod, None, normal, SUCCESS, message.clone());
                events.object_event(reference(&claim), normal, SUCCESS, message);
                Ok(())
            }
            Err(error) => self.expand_failed(pod, &claim, name, &error).await,
        }
    }

    async fn expand_failed(
        &self,
        pod: &Pod,
        claim: &PersistentVolumeClaim,
        name: &str,
        error: &RpcError,
    ) -> Result<(), VolumeError> {
        if error.is_final() {
            let patched = self.patch(claim, refused(error), false).await;
            if let Err(why) = patched {
                tracing::warn!(volume = name, why, "Failed expansion not told");
            }
        }
        if error.code == Code::FailedPrecondition {
            // Not while it is in use: the pod may have it as it is.
            tracing::warn!(volume = name, %error, "Volume is not expanded while in use");
            return Ok(());
        }
        let message = format!(
            "NodeExpandVolume.NodeExpandVolume failed for volume {name:?} : Expander.NodeExpand failed to expand the volume : {error}"
        );
        let warning = EventType::Warning;
        self.inner
            .events
            .pod_event(pod, None, warning, FAILURE, message.clone());
        self.inner
            .events
            .object_event(reference(claim), warning, FAILURE, message);
        let message = format!("Expander.NodeExpand failed to expand the volume : {error}");
        Err(failed(Step::Expand, name, message))
    }

    async fn patch(
        &self,
        claim: &PersistentVolumeClaim,
        status: Value,
        checked: bool,
    ) -> Result<PersistentVolumeClaim, String> {
        let metadata = &claim.metadata;
        let name = metadata.name.as_deref().unwrap_or_default();
        let namespace = metadata.namespace.as_deref().unwrap_or_default();
        let api: Api<PersistentVolumeClaim> = Api::namespaced(self.inner.client.clone(), namespace);
        let mut patch = json!({"status": status});
        if checked {
            patch["metadata"] = json!({"resourceVersion": metadata.resource_version});
        }
        let params = PatchParams::default();
        let patch = Patch::Strategic(&patch);
        let patched = api.patch_status(name, &params, &patch).await;
        patched.map_err(|e| {
            format!(
                "patchPVCStatus failed to patch PVC {name:?}: {}",
                api_message(&e)
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn bound(status: Value, readonly: bool) -> Bound {
        let claim = json!({"metadata": {"name": "c"}, "status": status});
        let volume = json!({"metadata": {"name": "pv"}, "spec": {"capacity": {"storage": "2Gi"}}});
        Bound {
            claim: Arc::new(serde_json::from_value(claim).unwrap()),
            volume: Arc::new(serde_json::from_value(volume).unwrap()),
            readonly,
        }
    }

    #[test]
    fn a_volume_grows_when_its_claim_asks_the_node() {
        let status = |word: &str| json!({"allocatedResourceStatuses": {"storage": word}});
        for (word, readonly, want) in [
            (PENDING, false, Some(2 << 30)),
            (IN_PROGRESS, false, Some(2 << 30)),
            (PENDING, true, None),
            (INFEASIBLE, false, None),
            ("ControllerResizeInProgress", false, None),
        ] {
            assert_eq!(wanted_size(&bound(status(word), readonly)), want, "{word}");
        }
        assert_eq!(wanted_size(&bound(json!({}), false)), None);
    }

    #[test]
    fn the_end_of_a_resize_takes_its_conditions_with_it() {
        let conditions = json!([
            {"type": "FileSystemResizePending", "status": "True"},
            {"type": "Mine", "status": "True"},
        ]);
        let bound = bound(json!({"conditions": conditions}), false);
        let status = finished(&bound.claim, &bound);
        assert_eq!(
            status,
            json!({
                "capacity": {"storage": "2Gi"},
                "allocatedResourceStatuses": {"storage": null},
                "conditions": [{"$patch": "delete", "type": "FileSystemResizePending"}],
            })
        );
        let error = RpcError {
            code: Code::OutOfRange,
            message: "too much".to_owned(),
        };
        let status = refused(&error);
        assert_eq!(status["allocatedResourceStatuses"]["storage"], INFEASIBLE);
        assert_eq!(
            status["conditions"][0]["message"],
            "failed to expand pvc with rpc error: code = OutOfRange desc = too much"
        );
    }
}
