//! Waiting for a controller to attach a volume to this node.
//!
//! The Node's status says first that we are going to use the volume (so that it is not detached
//! under us), then that it is attached; both arrive by the watch of the Node. The VolumeAttachment
//! has the last word, and what the driver needs to know.

use super::mount::Wanted;
use super::paths::attachment_name;
use super::world::Volume;
use super::{Inner, failed};
use crate::objects::{api_message, with_forbidden_retries};
use crate::volumes::{Step, VolumeError};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::VolumeAttachment;
use kube::Api;
use std::collections::HashMap;
use std::time::Duration;

/// How long a pod waits for its volumes before users are told (as the stock kubelet).
const PATIENCE: Duration = Duration::from_secs(123);

/// Whether the Node's status says that the volume is in use here, and attached.
fn is_ready(node: &Node, name: &str) -> bool {
    let Some(status) = &node.status else {
        return false;
    };
    let in_use = status.volumes_in_use.iter().flatten().any(|v| v == name);
    let attached = status.volumes_attached.iter().flatten();
    in_use && attached.into_iter().any(|v| v.name == name)
}

/// What a VolumeAttachment says: the driver's words for publishing, once it is attached.
fn publish_context(
    attachment: &VolumeAttachment,
    handle: &str,
) -> Result<HashMap<String, String>, String> {
    if attachment.metadata.deletion_timestamp.is_some() {
        return Err("volume attachment is being deleted".to_owned());
    }
    let status = attachment.status.as_ref();
    if let Some(status) = status.filter(|s| s.attached) {
        return Ok(super::request::map(status.attachment_metadata.as_ref()));
    }
    if let Some(error) = status.and_then(|s| s.attach_error.as_ref()) {
        return Err(error.message.clone().unwrap_or_default());
    }
    let name = attachment.metadata.name.as_deref().unwrap_or_default();
    Err(format!(
        "volume {handle} is not attached for volume attachment {name}"
    ))
}

impl Inner {
    /// Waits until the volume is attached, or the pod ends.
    pub(super) async fn attached(
        &self,
        volume: &Volume,
        wanted: Wanted<'_>,
        pv: &str,
        step: Step,
    ) -> Result<HashMap<String, String>, VolumeError> {
        let name = volume.id.unique_name();
        let mut nodes = self.node.subscribe();
        let ready = nodes.wait_for(|node| node.as_deref().is_some_and(|n| is_ready(n, &name)));
        let waited = tokio::select! {
            waited = tokio::time::timeout(PATIENCE, ready) => waited.map(|r| r.is_ok()),
            () = wanted.ended.cancelled() => Ok(false),
        };
        match waited {
            Ok(true) => {}
            Ok(false) => return Err(VolumeError::unattached(wanted.outer, "context canceled")),
            Err(_) => {
                let why = "context deadline exceeded";
                return Err(VolumeError::unattached(wanted.outer, why));
            }
        }
        let (driver, handle) = (&volume.id.driver, &volume.id.handle);
        let id = attachment_name(handle, driver, &self.node_name);
        let api: Api<VolumeAttachment> = Api::all(self.client.clone());
        let found = with_forbidden_retries(|| api.get(&id)).await;
        let found = found.map_err(|e| {
            format!(
                "volume {handle} has GET error for volume attachment {id}: {}",
                api_message(&e)
            )
        });
        let context = found.and_then(|a| publish_context(&a, handle));
        context.map_err(|e| failed(step, pv, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn the_node_has_to_say_both() {
        let node = |status: Value| -> Node {
            serde_json::from_value(json!({"metadata": {}, "status": status})).unwrap()
        };
        let attached = json!([{"name": "v", "devicePath": ""}]);
        assert!(is_ready(
            &node(json!({"volumesInUse": ["v"], "volumesAttached": attached})),
            "v"
        ));
        assert!(!is_ready(&node(json!({"volumesAttached": attached})), "v"));
        assert!(!is_ready(&node(json!({"volumesInUse": ["v"]})), "v"));
        assert!(!is_ready(&Node::default(), "v"));
    }

    #[test]
    fn an_attachment_has_the_last_word() {
        let of = |metadata: Value, status: Value| {
            let spec = json!({"attacher": "d", "nodeName": "n", "source": {}});
            let object = json!({"metadata": metadata, "spec": spec, "status": status});
            let attachment: VolumeAttachment = serde_json::from_value(object).unwrap();
            publish_context(&attachment, "h")
        };
        let there = json!({"attached": true, "attachmentMetadata": {"lun": "4"}});
        let name = json!({"name": "csi-1"});
        assert_eq!(of(name.clone(), there.clone()).unwrap()["lun"], "4");
        assert_eq!(
            of(name.clone(), json!({"attached": false})).unwrap_err(),
            "volume h is not attached for volume attachment csi-1"
        );
        let error = json!({"attached": false, "attachError": {"message": "no room"}});
        assert_eq!(of(name, error).unwrap_err(), "no room");
        let going = json!({"deletionTimestamp": "2026-01-01T00:00:00Z"});
        assert_eq!(
            of(going, there).unwrap_err(),
            "volume attachment is being deleted"
        );
    }
}
