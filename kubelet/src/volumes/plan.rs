//! What a pod's volumes are, as plain values: pure.

use super::VolumeError;
use crate::launch::pod_name;
use crate::quantity::Quantity;
use k8s_openapi::api::core::v1::{
    CSIVolumeSource, ConfigMapProjection, Container, DownwardAPIVolumeFile, EmptyDirVolumeSource,
    KeyToPath, Pod, ProjectedVolumeSource, SecretProjection, Volume, VolumeDevice, VolumeMount,
    VolumeProjection,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A volume of a pod.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Planned {
    /// Its name in the pod.
    pub(crate) name: String,
    /// What it is.
    pub(crate) kind: Kind,
}

/// Kinds of volumes this node has.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Kind {
    /// A directory for the pod's life.
    EmptyDir {
        /// In memory, with this limit in bytes when one is given.
        memory: Option<Option<i64>>,
    },
    /// A path of the node.
    HostPath { path: PathBuf, kind: HostPathKind },
    /// Files from objects, rewritten when they change.
    Files(FilesVolume),
    /// The content of an image; pulled and mounted with the containers, nothing to do here.
    Image,
    /// A PersistentVolume behind a claim.
    Claim(Claim),
    /// A volume a CSI driver makes for this pod.
    Csi(InlineCsi),
    /// It would have to be attached or mounted, but no container uses it.
    Unused,
}

/// A claim as the pod refers to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) name: String,
    pub(crate) readonly: bool,
    /// Made for this very pod (a generic ephemeral volume).
    pub(crate) own: bool,
    pub(crate) used: Use,
}

/// How containers use a volume.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Use {
    /// As a filesystem.
    pub(crate) mounted: bool,
    /// As a device.
    pub(crate) device: bool,
}

/// An inline volume of a CSI driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InlineCsi {
    pub(crate) driver: String,
    pub(crate) fs_type: Option<String>,
    pub(crate) readonly: bool,
    pub(crate) attributes: BTreeMap<String, String>,
    /// Name of the Secret for publishing.
    pub(crate) secret: Option<String>,
}

/// Types of hostPath.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HostPathKind {
    Any,
    DirectoryOrCreate,
    Directory,
    FileOrCreate,
    File,
    Socket,
    CharDevice,
    BlockDevice,
}

/// A volume of files.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct FilesVolume {
    /// Directory name of the plugin, `kubernetes.io~secret`.
    pub(crate) plugin: &'static str,
    /// On the node's tmpfs instead of its disk.
    pub(crate) volatile: bool,
    /// Whether errors of several sources are told as one list.
    pub(crate) projected: bool,
    /// Mode of files that have none of their own.
    pub(crate) mode: u32,
    /// Where files come from; later ones win.
    pub(crate) sources: Vec<Source>,
}

/// Where files come from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Source {
    ConfigMap(KeysOf),
    Secret(KeysOf),
    Downward(Vec<DownwardAPIVolumeFile>),
    Token(TokenSpec),
}

/// Keys of an object.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct KeysOf {
    pub(crate) name: String,
    /// These keys at these paths; none for all of them under their own names.
    pub(crate) items: Vec<KeyToPath>,
    pub(crate) optional: bool,
}

/// A service account token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TokenSpec {
    pub(crate) path: String,
    pub(crate) audience: Option<String>,
    pub(crate) expiration_seconds: i64,
}

const PLUGIN_CONFIG_MAP: &str = "kubernetes.io~configmap";
const PLUGIN_SECRET: &str = "kubernetes.io~secret";
const PLUGIN_DOWNWARD: &str = "kubernetes.io~downward-api";
const PLUGIN_PROJECTED: &str = "kubernetes.io~projected";
/// Directory name of emptyDir.
pub(crate) const PLUGIN_EMPTY_DIR: &str = "kubernetes.io~empty-dir";

/// All volumes of the pod.
pub(crate) fn volumes_of(pod: &Pod) -> Result<Vec<Planned>, VolumeError> {
    let spec = pod.spec.as_ref();
    spec.into_iter()
        .flat_map(|s| s.volumes.iter().flatten())
        .map(|volume| planned(pod, volume))
        .collect()
}

/// How the pod's containers of all kinds use a volume.
fn used(pod: &Pod, volume: &str) -> Use {
    let Some(spec) = &pod.spec else {
        return Use::default();
    };
    let own = spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers);
    let mut used = Use::default();
    let mut add = |mounts: &[VolumeMount], devices: &[VolumeDevice]| {
        used.mounted |= mounts.iter().any(|m| m.name == volume);
        used.device |= devices.iter().any(|d| d.name == volume);
    };
    for Container {
        volume_mounts,
        volume_devices,
        ..
    } in own
    {
        let (mounts, devices) = (volume_mounts.as_deref(), volume_devices.as_deref());
        add(mounts.unwrap_or_default(), devices.unwrap_or_default());
    }
    for debug in spec.ephemeral_containers.iter().flatten() {
        let mounts = debug.volume_mounts.as_deref();
        let devices = debug.volume_devices.as_deref();
        add(mounts.unwrap_or_default(), devices.unwrap_or_default());
    }
    used
}

/// Volumes of drivers and claims; none for other kinds.
fn remote(pod: &Pod, volume: &Volume) -> Option<Kind> {
    let used = used(pod, &volume.name);
    let (name, readonly, own) = match (&volume.persistent_volume_claim, &volume.ephemeral) {
        (Some(claim), _) => (
            claim.claim_name.clone(),
            claim.read_only == Some(true),
            false,
        ),
        (None, Some(_)) => {
            let name = format!("{}-{}", pod_name(pod), volume.name);
            (name, false, true)
        }
        (None, None) => {
            let inline = volume.csi.as_ref()?;
            return Some(if used == Use::default() {
                Kind::Unused
            } else {
                Kind::Csi(inline_csi(inline))
            });
        }
    };
    if used == Use::default() {
        return Some(Kind::Unused);
    }
    Some(Kind::Claim(Claim {
        name,
        readonly,
        own,
        used,
    }))
}

fn inline_csi(source: &CSIVolumeSource) -> InlineCsi {
    let secret = source.node_publish_secret_ref.as_ref();
    InlineCsi {
        driver: source.driver.clone(),
        fs_type: source.fs_type.clone(),
        readonly: source.read_only == Some(true),
        attributes: source.volume_attributes.clone().unwrap_or_default(),
        secret: secret.map(|s| s.name.clone()),
    }
}

fn planned(pod: &Pod, volume: &Volume) -> Result<Planned, VolumeError> {
    let name = volume.name.clone();
    // The name becomes a directory: it must not lead anywhere else.
    if name.is_empty() || name.contains('/') || name == "." || name == ".." {
        return Err(VolumeError::set_up(&name, "its name is no file name"));
    }
    let kind = match remote(pod, volume) {
        Some(kind) => kind,
        None => kind_of(volume).map_err(|message| VolumeError::set_up(&name, message))?,
    };
    Ok(Planned { name, kind })
}

fn kind_of(volume: &Volume) -> Result<Kind, String> {
    if let Some(source) = &volume.empty_dir {
        return empty_dir(source);
    }
    if let Some(source) = &volume.host_path {
        return host_path(&source.path, source.type_.as_deref().unwrap_or_default());
    }
    if volume.image.is_some() {
        return Ok(Kind::Image);
    }
    if let Some(source) = &volume.config_map {
        let keys = KeysOf {
            name: source.name.clone(),
            items: source.items.clone().unwrap_or_default(),
            optional: source.optional == Some(true),
        };
        let mode = mode(source.default_mode);
        return Ok(files(
            PLUGIN_CONFIG_MAP,
            mode,
            vec![Source::ConfigMap(keys)],
        ));
    }
    if let Some(source) = &volume.secret {
        let keys = KeysOf {
            name: source.secret_name.clone().unwrap_or_default(),
            items: source.items.clone().unwrap_or_default(),
            optional: source.optional == Some(true),
        };
        let mode = mode(source.default_mode);
        return Ok(files(PLUGIN_SECRET, mode, vec![Source::Secret(keys)]));
    }
    if let Some(source) = &volume.downward_api {
        let items = source.items.clone().unwrap_or_default();
        let mode = mode(source.default_mode);
        return Ok(files(PLUGIN_DOWNWARD, mode, vec![Source::Downward(items)]));
    }
    if let Some(source) = &volume.projected {
        return projected(source);
    }
    Err(format!(
        "volumes of kind {} are not supported by this node",
        foreign_kind(volume)
    ))
}

fn mode(mode: Option<i32>) -> u32 {
    u32::try_from(mode.unwrap_or(0o644)).unwrap_or(0o644) & 0o7777
}

fn files(plugin: &'static str, mode: u32, sources: Vec<Source>) -> Kind {
    Kind::Files(FilesVolume {
        plugin,
        volatile: plugin == PLUGIN_SECRET || plugin == PLUGIN_PROJECTED,
        projected: plugin == PLUGIN_PROJECTED,
        mode,
        sources,
    })
}

/// The field of the volume's source, as the manifest spells it.
fn foreign_kind(volume: &Volume) -> String {
    let value = serde_json::to_value(volume).unwrap_or_default();
    let fields = value.as_object().into_iter().flat_map(|o| o.keys());
    let kinds: Vec<&str> = fields
        .map(String::as_str)
        .filter(|f| *f != "name")
        .collect();
    if kinds.is_empty() {
        "unknown".to_owned()
    } else {
        kinds.join(", ")
    }
}

fn empty_dir(source: &EmptyDirVolumeSource) -> Result<Kind, String> {
    let limit = match &source.size_limit {
        Some(limit) => {
            let limit = Quantity::try_from(limit).map_err(|e| e.to_string())?;
            Some(limit.value()).filter(|bytes| *bytes > 0)
        }
        None => None,
    };
    match source.medium.as_deref().unwrap_or_default() {
        "" => Ok(Kind::EmptyDir { memory: None }),
        "Memory" => Ok(Kind::EmptyDir {
            memory: Some(limit),
        }),
        medium => Err(format!(
            "storage medium {medium:?} is not supported by this node"
        )),
    }
}

pub(crate) fn host_path(path: &str, kind: &str) -> Result<Kind, String> {
    let kind = match kind {
        "" => HostPathKind::Any,
        "DirectoryOrCreate" => HostPathKind::DirectoryOrCreate,
        "Directory" => HostPathKind::Directory,
        "FileOrCreate" => HostPathKind::FileOrCreate,
        "File" => HostPathKind::File,
        "Socket" => HostPathKind::Socket,
        "CharDevice" => HostPathKind::CharDevice,
        "BlockDevice" => HostPathKind::BlockDevice,
        other => return Err(format!("{other} is an invalid volume type")),
    };
    if !path.starts_with('/') {
        return Err(format!("hostPath {path:?} is not absolute"));
    }
    if Path::new(path)
        .components()
        .any(|c| c == std::path::Component::ParentDir)
    {
        return Err(format!("hostPath {path:?} must not contain '..'"));
    }
    Ok(Kind::HostPath {
        path: path.into(),
        kind,
    })
}

fn projected(source: &ProjectedVolumeSource) -> Result<Kind, String> {
    let sources = source.sources.iter().flatten().map(projection);
    let sources: Result<Vec<Source>, String> = sources.collect();
    Ok(files(PLUGIN_PROJECTED, mode(source.default_mode), sources?))
}

fn projection(source: &VolumeProjection) -> Result<Source, String> {
    if let Some(ConfigMapProjection {
        items,
        name,
        optional,
    }) = &source.config_map
    {
        return Ok(Source::ConfigMap(KeysOf {
            name: name.clone(),
            items: items.clone().unwrap_or_default(),
            optional: *optional == Some(true),
        }));
    }
    if let Some(SecretProjection {
        items,
        name,
        optional,
    }) = &source.secret
    {
        return Ok(Source::Secret(KeysOf {
            name: name.clone(),
            items: items.clone().unwrap_or_default(),
            optional: *optional == Some(true),
        }));
    }
    if let Some(downward) = &source.downward_api {
        return Ok(Source::Downward(downward.items.clone().unwrap_or_default()));
    }
    if let Some(token) = &source.service_account_token {
        return Ok(Source::Token(TokenSpec {
            path: token.path.clone(),
            audience: token.audience.clone().filter(|a| !a.is_empty()),
            expiration_seconds: token.expiration_seconds.unwrap_or(3600),
        }));
    }
    let kind = if source.cluster_trust_bundle.is_some() {
        "clusterTrustBundle"
    } else if source.pod_certificate.is_some() {
        "podCertificate"
    } else {
        "unknown"
    };
    Err(format!(
        "projected sources of kind {kind} are not supported by this node"
    ))
}

/// Directories other volumes are mounted on inside this one: they have to exist, for the volume
/// is read-only to its containers.
pub(crate) fn nested_mount_points(pod: &Pod, volume: &str) -> Vec<PathBuf> {
    let mut nested = Vec::new();
    let Some(spec) = &pod.spec else {
        return nested;
    };
    for container in spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers)
    {
        let mounts = container.volume_mounts.as_deref().unwrap_or_default();
        for own in mounts
            .iter()
            .filter(|m| m.name == volume && m.sub_path.is_none() && m.sub_path_expr.is_none())
        {
            for other in mounts.iter().filter(|m| m.name != volume) {
                let inside = Path::new(&other.mount_path).strip_prefix(&own.mount_path);
                if let Ok(inside) = inside
                    && !inside.as_os_str().is_empty()
                    && inside
                        .components()
                        .all(|c| matches!(c, std::path::Component::Normal(_)))
                {
                    nested.push(inside.to_owned());
                }
            }
        }
    }
    nested.sort();
    nested.dedup();
    nested
}

/// The user all containers run as, when the spec names one and the same for all.
pub(crate) fn common_user(pod: &Pod) -> Option<u32> {
    let spec = pod.spec.as_ref()?;
    let of_pod = spec.security_context.as_ref().and_then(|c| c.run_as_user);
    let mut users = spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers)
        .map(|c| {
            c.security_context
                .as_ref()
                .and_then(|s| s.run_as_user)
                .or(of_pod)
        });
    let first = users.next()??;
    users
        .all(|user| user == Some(first))
        .then(|| u32::try_from(first).ok())?
}

/// The pod's fsGroup.
pub(crate) fn fs_group(pod: &Pod) -> Option<u32> {
    let context = pod.spec.as_ref()?.security_context.as_ref()?;
    u32::try_from(context.fs_group?).ok()
}
