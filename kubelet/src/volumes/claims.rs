//! From a claim in a pod to the PersistentVolume behind it.
//!
//! A node may read claims and volumes its pods use, by name and not by watch: they are read when
//! a pod is prepared, and again by its upkeep. What has to hold for both is decided by pure
//! functions here.

use super::VolumeError;
use super::plan::{Claim, Use};
use crate::launch::{pod_name, pod_namespace, pod_uid};
use crate::objects::{api_message, with_forbidden_retries};
use crate::quantity::Quantity;
use k8s_openapi::api::core::v1::{
    CSIPersistentVolumeSource, PersistentVolume, PersistentVolumeClaim, PersistentVolumeSpec, Pod,
};
use kube::{Api, Client};
use std::path::PathBuf;
use std::sync::Arc;

/// Keeps a claim that pods use from being deleted.
const PROTECTION: &str = "kubernetes.io/pvc-protection";

/// A claim that is bound, as a pod uses it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Bound {
    pub(crate) claim: Arc<PersistentVolumeClaim>,
    pub(crate) volume: Arc<PersistentVolume>,
    /// Only to be read by this pod.
    pub(crate) readonly: bool,
}

/// Where a PersistentVolume is.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Where<'a> {
    Csi(&'a CSIPersistentVolumeSource),
    /// A directory or device of this node.
    Local {
        path: PathBuf,
        fs_type: Option<&'a str>,
    },
    HostPath {
        path: &'a str,
        kind: &'a str,
    },
}

impl Bound {
    /// Name of the PersistentVolume.
    pub(crate) fn name(&self) -> &str {
        self.volume.metadata.name.as_deref().unwrap_or_default()
    }

    fn spec(&self) -> Option<&PersistentVolumeSpec> {
        self.volume.spec.as_ref()
    }

    /// Whether it is used as a device.
    pub(crate) fn is_block(&self) -> bool {
        let mode = self.spec().and_then(|s| s.volume_mode.as_deref());
        mode == Some("Block")
    }

    pub(crate) fn access_modes(&self) -> Option<&[String]> {
        self.spec()?.access_modes.as_deref()
    }

    /// Whether only one pod at a time may use it.
    pub(crate) fn is_for_one_pod(&self) -> bool {
        self.access_modes()
            .is_some_and(|modes| modes == ["ReadWriteOncePod"])
    }

    pub(crate) fn mount_options(&self) -> Vec<String> {
        let options = self.spec().and_then(|s| s.mount_options.clone());
        options.unwrap_or_default()
    }

    /// Where it is.
    ///
    /// # Errors
    /// A kind of volume this node does not have.
    pub(crate) fn place(&self) -> Result<Where<'_>, String> {
        let spec = self.spec().ok_or("PersistentVolume without a spec")?;
        if let Some(csi) = &spec.csi {
            return Ok(Where::Csi(csi));
        }
        if let Some(local) = &spec.local {
            return Ok(Where::Local {
                path: PathBuf::from(&local.path),
                fs_type: local.fs_type.as_deref(),
            });
        }
        if let Some(host) = &spec.host_path {
            return Ok(Where::HostPath {
                path: &host.path,
                kind: host.type_.as_deref().unwrap_or_default(),
            });
        }
        Err("no volume plugin matched".to_owned())
    }
}

/// A volume's capacity in bytes.
pub(crate) fn storage(
    amounts: Option<
        &std::collections::BTreeMap<
            String,
            k8s_openapi::apimachinery::pkg::api::resource::Quantity,
        >,
    >,
) -> Option<i64> {
    let amount = amounts?.get("storage")?;
    Quantity::try_from(amount).ok().map(|q| q.value())
}

/// Reads claim and volume.
///
/// # Errors
/// [`VolumeError::Unready`] in stock's words.
pub(crate) async fn resolve(
    client: &Client,
    pod: &Pod,
    volume: &str,
    claim: &Claim,
    used: Use,
) -> Result<Bound, VolumeError> {
    let unready = |message: String| VolumeError::unprocessed(volume, message);
    let namespace = pod_namespace(pod);
    let of_claim = |e: String| {
        unready(format!(
            "error processing PVC {namespace}/{}: {e}",
            claim.name
        ))
    };
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), namespace);
    let found = with_forbidden_retries(|| claims.get(&claim.name)).await;
    let found = found.map_err(|e| {
        of_claim(format!(
            "failed to fetch PVC from API server: {}",
            api_message(&e)
        ))
    })?;
    let name = check_claim(&found).map_err(of_claim)?.to_owned();
    if claim.own {
        check_owner(pod, &found).map_err(unready)?;
    }
    let volumes: Api<PersistentVolume> = Api::all(client.clone());
    let pv = with_forbidden_retries(|| volumes.get(&name)).await;
    let pv = pv.map_err(|e| {
        of_claim(format!(
            "failed to fetch PV {name} from API server: {}",
            api_message(&e)
        ))
    })?;
    check_volume(&pv, &found).map_err(of_claim)?;
    let bound = Bound {
        claim: Arc::new(found),
        volume: Arc::new(pv),
        readonly: claim.readonly,
    };
    check_mode(volume, &bound, used).map_err(unready)?;
    Ok(bound)
}

/// The name of the volume a claim is bound to.
fn check_claim(claim: &PersistentVolumeClaim) -> Result<&str, String> {
    let finalizers = claim.metadata.finalizers.as_deref().unwrap_or_default();
    let going = claim.metadata.deletion_timestamp.is_some();
    if going && !finalizers.iter().any(|f| f == PROTECTION) {
        return Err("PVC is being deleted".to_owned());
    }
    let phase = claim.status.as_ref().and_then(|s| s.phase.as_deref());
    if phase != Some("Bound") {
        return Err("PVC is not bound".to_owned());
    }
    let name = claim.spec.as_ref().and_then(|s| s.volume_name.as_deref());
    match name.unwrap_or_default() {
        "" => Err("PVC has empty pvc.Spec.VolumeName".to_owned()),
        name => Ok(name),
    }
}

/// A claim made for a pod has to be that pod's: somebody may have made one of the same name.
fn check_owner(pod: &Pod, claim: &PersistentVolumeClaim) -> Result<(), String> {
    let owners = claim.metadata.owner_references.iter().flatten();
    let mut controllers = owners.filter(|o| o.controller == Some(true));
    if controllers.any(|o| o.uid == pod_uid(pod)) {
        return Ok(());
    }
    let (namespace, name) = (pod_namespace(pod), pod_name(pod));
    let claim = claim.metadata.name.as_deref().unwrap_or_default();
    Err(format!(
        "PVC {namespace}/{claim} was not created for pod {namespace}/{name} (pod is not owner)"
    ))
}

/// The volume has to be bound to the claim, too.
fn check_volume(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> Result<(), String> {
    let name = volume.metadata.name.as_deref().unwrap_or_default();
    let bound = volume.spec.as_ref().and_then(|s| s.claim_ref.as_ref());
    let bound = bound.ok_or_else(|| {
        format!(
            "found PV object {name} but it has a nil pv.Spec.ClaimRef indicating it is not yet bound to the claim"
        )
    })?;
    if bound.uid == claim.metadata.uid {
        return Ok(());
    }
    Err(format!(
        "found PV object {name} but its pv.Spec.ClaimRef.UID {} does not point to claim.UID {}",
        bound.uid.as_deref().unwrap_or_default(),
        claim.metadata.uid.as_deref().unwrap_or_default()
    ))
}

/// Filesystems are mounted and devices are passed in.
fn check_mode(volume: &str, bound: &Bound, used: Use) -> Result<(), String> {
    let (mode, block) = if bound.is_block() {
        ("Block", true)
    } else {
        ("Filesystem", false)
    };
    if used.mounted && block {
        return Err(format!(
            "volume {volume} has volumeMode {mode}, but is specified in volumeMounts"
        ));
    }
    if used.device && !block {
        return Err(format!(
            "volume {volume} has volumeMode {mode}, but is specified in volumeDevices"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::testing::pod;
    use serde_json::{Value, json};

    fn claim(metadata: Value, spec: Value, phase: &str) -> PersistentVolumeClaim {
        let status = json!({"phase": phase});
        serde_json::from_value(json!({"metadata": metadata, "spec": spec, "status": status}))
            .unwrap()
    }

    fn volume(spec: Value) -> PersistentVolume {
        serde_json::from_value(json!({"metadata": {"name": "pv"}, "spec": spec})).unwrap()
    }

    #[test]
    fn a_claim_is_used_when_it_is_bound_and_stays() {
        let bound = json!({"volumeName": "pv"});
        let fine = claim(json!({"name": "c"}), bound.clone(), "Bound");
        assert_eq!(check_claim(&fine), Ok("pv"));
        let going = json!({"name": "c", "deletionTimestamp": "2026-01-01T00:00:00Z"});
        let mut kept = going.clone();
        kept["finalizers"] = json!([PROTECTION]);
        let kept = claim(kept, bound.clone(), "Bound");
        assert_eq!(check_claim(&kept), Ok("pv"));
        for (claim, why) in [
            (claim(going, bound.clone(), "Bound"), "PVC is being deleted"),
            (claim(json!({}), bound, "Pending"), "PVC is not bound"),
            (
                claim(json!({}), json!({}), "Bound"),
                "PVC has empty pvc.Spec.VolumeName",
            ),
        ] {
            assert_eq!(check_claim(&claim).unwrap_err(), why);
        }
    }

    #[test]
    fn a_claim_of_a_pod_is_owned_by_that_very_pod() {
        let pod = pod(json!({}));
        let of = |uid: &str, controller: bool| {
            let owner = json!({"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": uid, "controller": controller});
            claim(
                json!({"name": "p-v", "ownerReferences": [owner]}),
                json!({}),
                "Bound",
            )
        };
        let uid = pod_uid(&pod);
        assert_eq!(check_owner(&pod, &of(uid, true)), Ok(()));
        for other in [of("x", true), of(uid, false)] {
            let error = check_owner(&pod, &other).unwrap_err();
            assert!(error.ends_with("(pod is not owner)"), "{error}");
        }
    }

    #[test]
    fn a_volume_points_back_at_its_claim() {
        let claim = claim(json!({"name": "c", "uid": "1"}), json!({}), "Bound");
        let right = volume(json!({"claimRef": {"uid": "1"}}));
        assert_eq!(check_volume(&right, &claim), Ok(()));
        let error = check_volume(&volume(json!({})), &claim).unwrap_err();
        assert!(error.contains("nil pv.Spec.ClaimRef"), "{error}");
        let error = check_volume(&volume(json!({"claimRef": {"uid": "2"}})), &claim);
        assert_eq!(
            error.unwrap_err(),
            "found PV object pv but its pv.Spec.ClaimRef.UID 2 does not point to claim.UID 1"
        );
    }

    #[test]
    fn devices_are_not_mounted_and_filesystems_are_no_devices() {
        let bound = |spec: Value| Bound {
            claim: Arc::new(claim(json!({}), json!({}), "Bound")),
            volume: Arc::new(volume(spec)),
            readonly: false,
        };
        let (mounted, device) = (
            Use {
                mounted: true,
                device: false,
            },
            Use {
                mounted: false,
                device: true,
            },
        );
        let block = bound(json!({"volumeMode": "Block", "accessModes": ["ReadWriteOncePod"]}));
        assert!(block.is_for_one_pod());
        assert_eq!(check_mode("v", &block, device), Ok(()));
        assert_eq!(
            check_mode("v", &block, mounted).unwrap_err(),
            "volume v has volumeMode Block, but is specified in volumeMounts"
        );
        let files = bound(json!({"hostPath": {"path": "/x"}}));
        assert_eq!(check_mode("v", &files, mounted), Ok(()));
        assert_eq!(
            check_mode("v", &files, device).unwrap_err(),
            "volume v has volumeMode Filesystem, but is specified in volumeDevices"
        );
        assert!(matches!(
            files.place(),
            Ok(Where::HostPath { path: "/x", .. })
        ));
        assert!(bound(json!({"rbd": null})).place().is_err());
    }
}
