//! From Kubernetes objects to CSI requests: pure.

use k8s_openapi::api::core::v1::{Pod, PodSpec};
use k8s_openapi::api::storage::v1::CSIDriver;
use proto::csi::v1 as csi;
use proto::csi::v1::node_service_capability::{self, rpc};
use proto::csi::v1::volume_capability::access_mode::Mode;
use proto::csi::v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use std::collections::{BTreeMap, HashMap};

/// What a node service can do, as far as we use it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Capabilities {
    pub(crate) stage: bool,
    pub(crate) expand: bool,
    pub(crate) stats: bool,
    pub(crate) multi_writer: bool,
    pub(crate) mount_group: bool,
}

impl From<&[csi::NodeServiceCapability]> for Capabilities {
    fn from(all: &[csi::NodeServiceCapability]) -> Self {
        let has = |wanted: rpc::Type| {
            all.iter().any(|c| match &c.r#type {
                Some(node_service_capability::Type::Rpc(rpc)) => rpc.r#type == wanted as i32,
                None => false,
            })
        };
        Self {
            stage: has(rpc::Type::StageUnstageVolume),
            expand: has(rpc::Type::ExpandVolume),
            stats: has(rpc::Type::GetVolumeStats),
            multi_writer: has(rpc::Type::SingleNodeMultiWriter),
            mount_group: has(rpc::Type::VolumeMountGroup),
        }
    }
}

/// How a volume is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Form {
    /// A device.
    Block,
    /// A filesystem.
    Mount {
        fs_type: String,
        flags: Vec<String>,
        /// fsGroup, when the driver applies it itself.
        group: Option<i64>,
    },
}

/// The access mode of the API in CSI's words.
fn mode(api: &str, multi_writer: bool) -> Mode {
    match (api, multi_writer) {
        ("ReadWriteOnce", false) => Mode::SingleNodeWriter,
        ("ReadWriteOnce", true) => Mode::SingleNodeMultiWriter,
        // Drivers without these modes can serve it all the same.
        ("ReadWriteOncePod", false) => Mode::SingleNodeWriter,
        ("ReadWriteOncePod", true) => Mode::SingleNodeSingleWriter,
        ("ReadOnlyMany", _) => Mode::MultiNodeReaderOnly,
        ("ReadWriteMany", _) => Mode::MultiNodeMultiWriter,
        (_, _) => Mode::Unknown,
    }
}

/// How the volume is to be mounted. `api_mode` is the first access mode of the PersistentVolume.
pub(crate) fn capability(
    form: Form,
    api_mode: Option<&str>,
    multi_writer: bool,
) -> csi::VolumeCapability {
    let access_type = match form {
        Form::Block => AccessType::Block(BlockVolume {}),
        Form::Mount {
            fs_type,
            flags,
            group,
        } => AccessType::Mount(MountVolume {
            fs_type,
            mount_flags: flags,
            volume_mount_group: group.map(|g| g.to_string()).unwrap_or_default(),
        }),
    };
    let mode = mode(api_mode.unwrap_or("ReadWriteOnce"), multi_writer);
    csi::VolumeCapability {
        access_mode: Some(AccessMode { mode: mode as i32 }),
        access_type: Some(access_type),
    }
}

/// A map of the API as CSI has them.
pub(crate) fn map(api: Option<&BTreeMap<String, String>>) -> HashMap<String, String> {
    let pairs = api.into_iter().flatten();
    pairs.map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// Whether a controller attaches volumes of the driver first. One without an object is taken to
/// want it.
pub(crate) fn attach_required(object: Option<&CSIDriver>) -> bool {
    object.and_then(|o| o.spec.attach_required) != Some(false)
}

/// Whether the driver is told about the pod.
pub(crate) fn pod_info_wanted(object: Option<&CSIDriver>) -> bool {
    object.and_then(|o| o.spec.pod_info_on_mount) == Some(true)
}

/// Whether volumes are published again and again.
pub(crate) fn republish_wanted(object: Option<&CSIDriver>) -> bool {
    object.and_then(|o| o.spec.requires_republish) == Some(true)
}

/// What a driver that wants it is told about a pod.
pub(crate) fn pod_info(pod: &Pod, inline: bool) -> [(String, String); 5] {
    let account = |s: &PodSpec| s.service_account_name.clone();
    let account = pod.spec.as_ref().and_then(account).unwrap_or_default();
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    [
        ("pod.name", text(&pod.metadata.name)),
        ("pod.namespace", text(&pod.metadata.namespace)),
        ("pod.uid", text(&pod.metadata.uid)),
        ("serviceAccount.name", account),
        ("ephemeral", inline.to_string()),
    ]
    .map(|(key, value)| (format!("csi.storage.k8s.io/{key}"), value))
}

/// Whether volumes of this lifecycle are the driver's business.
///
/// # Errors
/// Stock's words when they are not.
pub(crate) fn check_lifecycle(
    object: Option<&CSIDriver>,
    driver: &str,
    inline: bool,
) -> Result<(), String> {
    let wanted = if inline { "Ephemeral" } else { "Persistent" };
    let Some(object) = object else {
        return if inline {
            Err(format!(
                "volume mode {wanted:?} not supported by driver {driver} (no CSIDriver object)"
            ))
        } else {
            Ok(())
        };
    };
    let modes = object.spec.volume_lifecycle_modes.as_deref();
    let modes = modes.unwrap_or_default();
    if modes.iter().any(|m| m == wanted) {
        return Ok(());
    }
    let quoted: Vec<String> = modes.iter().map(|m| format!("{m:?}")).collect();
    Err(format!(
        "volume mode {wanted:?} not supported by driver {driver} (only supports [{}])",
        quoted.join(" ")
    ))
}

/// Facts that decide whether we hand a volume to the pod's fsGroup.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GroupFacts<'a> {
    pub(crate) object: Option<&'a CSIDriver>,
    pub(crate) readonly: bool,
    pub(crate) fs_type: &'a str,
    /// Access modes of the PersistentVolume; an inline volume is for one pod.
    pub(crate) access_modes: Option<&'a [String]>,
    pub(crate) inline: bool,
}

/// Whether we hand the volume to the pod's fsGroup.
///
/// # Errors
/// Stock's words when the driver's object makes no sense.
pub(crate) fn group_is_ours(facts: GroupFacts<'_>) -> Result<bool, String> {
    let policy = match facts.object {
        None => "ReadWriteOnceWithFSType",
        Some(object) => match object.spec.fs_group_policy.as_deref() {
            None | Some("") => {
                return Err(
                    "kubernetes.io/csi: expected valid fsGroupPolicy, received nil value or empty string"
                        .to_owned(),
                );
            }
            Some(policy) => policy,
        },
    };
    if facts.readonly || policy == "None" {
        return Ok(false);
    }
    if policy == "File" {
        return Ok(true);
    }
    let single = facts.access_modes.is_some_and(|modes| {
        modes
            .iter()
            .any(|m| m == "ReadWriteOnce" || m == "ReadWriteOncePod")
    });
    Ok(!facts.fs_type.is_empty() && (facts.inline || single))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::testing::pod;
    use serde_json::{Value, json};

    fn object(spec: Value) -> CSIDriver {
        serde_json::from_value(json!({"metadata": {"name": "d"}, "spec": spec})).unwrap()
    }

    #[test]
    fn access_modes_depend_on_what_the_driver_knows() {
        for (api, plain, rich) in [
            (
                "ReadWriteOnce",
                Mode::SingleNodeWriter,
                Mode::SingleNodeMultiWriter,
            ),
            (
                "ReadWriteOncePod",
                Mode::SingleNodeWriter,
                Mode::SingleNodeSingleWriter,
            ),
            (
                "ReadOnlyMany",
                Mode::MultiNodeReaderOnly,
                Mode::MultiNodeReaderOnly,
            ),
            (
                "ReadWriteMany",
                Mode::MultiNodeMultiWriter,
                Mode::MultiNodeMultiWriter,
            ),
        ] {
            assert_eq!((mode(api, false), mode(api, true)), (plain, rich), "{api}");
        }
    }

    #[test]
    fn without_an_object_volumes_are_attached_and_not_inline() {
        assert!(attach_required(None));
        assert!(!attach_required(Some(&object(
            json!({"attachRequired": false})
        ))));
        assert_eq!(check_lifecycle(None, "d", false), Ok(()));
        assert_eq!(
            check_lifecycle(None, "d", true).unwrap_err(),
            "volume mode \"Ephemeral\" not supported by driver d (no CSIDriver object)"
        );
        let persistent = object(json!({"volumeLifecycleModes": ["Persistent"]}));
        assert_eq!(
            check_lifecycle(Some(&persistent), "d", true).unwrap_err(),
            "volume mode \"Ephemeral\" not supported by driver d (only supports [\"Persistent\"])"
        );
        let both = object(json!({"volumeLifecycleModes": ["Persistent", "Ephemeral"]}));
        assert_eq!(check_lifecycle(Some(&both), "d", true), Ok(()));
    }

    #[test]
    fn the_policy_decides_who_hands_a_volume_to_the_group() {
        let once = ["ReadWriteOnce".to_owned()];
        let many = ["ReadWriteMany".to_owned()];
        let with = |policy: &str| object(json!({"fsGroupPolicy": policy}));
        let facts = |object, fs_type, access_modes| GroupFacts {
            object,
            readonly: false,
            fs_type,
            access_modes,
            inline: false,
        };
        assert_eq!(group_is_ours(facts(None, "ext4", Some(&once))), Ok(true));
        assert_eq!(group_is_ours(facts(None, "", Some(&once))), Ok(false));
        assert_eq!(group_is_ours(facts(None, "ext4", Some(&many))), Ok(false));
        assert_eq!(group_is_ours(facts(None, "ext4", None)), Ok(false));
        let (file, none) = (with("File"), with("None"));
        assert_eq!(group_is_ours(facts(Some(&file), "", Some(&many))), Ok(true));
        assert_eq!(
            group_is_ours(facts(Some(&none), "ext4", Some(&once))),
            Ok(false)
        );
        let readonly = GroupFacts {
            readonly: true,
            ..facts(Some(&file), "", None)
        };
        assert_eq!(group_is_ours(readonly), Ok(false));
        let inline = GroupFacts {
            inline: true,
            ..facts(None, "ext4", None)
        };
        assert_eq!(group_is_ours(inline), Ok(true));
        assert!(group_is_ours(facts(Some(&object(json!({}))), "", None)).is_err());
    }

    #[test]
    fn a_driver_is_told_who_the_pod_is() {
        let info = pod_info(&pod(json!({"serviceAccountName": "sa"})), true);
        let keys: Vec<_> = info.iter().map(|(k, _)| k.as_str()).collect();
        assert_eq!(
            keys,
            [
                "csi.storage.k8s.io/pod.name",
                "csi.storage.k8s.io/pod.namespace",
                "csi.storage.k8s.io/pod.uid",
                "csi.storage.k8s.io/serviceAccount.name",
                "csi.storage.k8s.io/ephemeral",
            ]
        );
        assert_eq!((info[3].1.as_str(), info[4].1.as_str()), ("sa", "true"));
    }
}
