//! What a container mounts: its volumes, `/etc/hosts`, the termination message file.

use super::container::Inputs;
use super::expand::expand_sub_path;
use super::files::HostFile;
use super::hosts::hosts_file;
use super::{LaunchContext, LaunchError, host_network, pod_directory};
use k8s_openapi::api::core::v1::{Container, Pod, VolumeDevice, VolumeMount};
use runtime::service::Mount;
use runtime::service::Propagation;
use std::path::{Component, Path, PathBuf};

const HOSTS: &str = "/etc/hosts";
/// Where a container leaves its last words unless told otherwise.
const TERMINATION_PATH: &str = "/dev/termination-log";

/// Mounts, and the files they need on the node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountPlan {
    /// In the order of the spec, ours last.
    pub mounts: Vec<Mount>,
    /// To be made before the container.
    pub files: Vec<HostFile>,
}

/// The termination message's path in the container.
pub fn termination_path(container: &Container) -> &str {
    match container.termination_message_path.as_deref() {
        Some(path) if !path.is_empty() => path,
        _ => TERMINATION_PATH,
    }
}

/// The termination message's file on the node.
pub fn termination_file(
    pod: &Pod,
    container: &Container,
    context: &LaunchContext,
    attempt: u32,
) -> PathBuf {
    let dir = pod_directory(pod, context).join("containers");
    dir.join(&container.name).join(format!("{attempt}.message"))
}

/// Plans the mounts of one container instance.
///
/// # Errors
/// A volume that is not there, a subPath that leads out of it, an unknown propagation.
pub fn plan(inputs: &Inputs<'_>, env: &[(String, String)]) -> Result<MountPlan, LaunchError> {
    let Inputs {
        pod,
        container,
        context,
        pod_ips,
        attempt,
        ..
    } = *inputs;
    let mut plan = MountPlan::default();
    let mut hosts = host_network(pod) || !pod_ips.is_empty();
    for mount in container.volume_mounts.iter().flatten() {
        hosts &= mount.mount_path != HOSTS;
        volume_mount(&mut plan, inputs, mount, env)?;
    }
    if hosts {
        let path = pod_directory(pod, context).join("etc-hosts");
        plan.files.push(HostFile::Text {
            path: path.clone(),
            mode: 0o644,
            content: hosts_file(pod, context, pod_ips)?,
        });
        plan.mounts.push(bind(HOSTS.to_owned(), path));
    }
    let path = termination_file(pod, container, context, attempt);
    plan.files.push(HostFile::Empty {
        path: path.clone(),
        mode: 0o666,
    });
    plan.mounts
        .push(bind(absolute(termination_path(container)), path));
    Ok(plan)
}

/// A device passed in: path on the node, path in the container, permissions.
pub type Device = (PathBuf, String, String);

/// The devices a container asks for.
///
/// # Errors
/// A volume that is not there or is no device, a path that is not absolute.
pub fn devices(
    container: &Container,
    volumes: &crate::volumes::PodVolumes,
) -> Result<Vec<Device>, LaunchError> {
    let wanted = container.volume_devices.iter().flatten();
    let one = |device: &VolumeDevice| {
        let (name, path) = (&device.name, &device.device_path);
        if !path.starts_with('/') {
            return Err(LaunchError::Config(format!(
                "error DevicePath `{path}` must be an absolute path"
            )));
        }
        let volume = volumes.by_name.get(name).filter(|v| v.block);
        let volume = volume.ok_or_else(|| {
            LaunchError::Config(format!(
                "cannot find volume {name:?} to pass into container {:?}",
                container.name
            ))
        })?;
        let access = if volume.readonly { "r" } else { "mrw" };
        Ok((volume.path.clone(), path.clone(), access.to_owned()))
    };
    wanted.map(one).collect()
}

fn bind(container_path: String, host_path: PathBuf) -> Mount {
    Mount {
        container_path,
        host_path,
        sub_path: None,
        readonly: false,
        recursive_readonly: false,
        propagation: Propagation::Private,
        image: None,
    }
}

fn absolute(path: &str) -> String {
    if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("/{path}")
    }
}

fn volume_mount(
    plan: &mut MountPlan,
    inputs: &Inputs<'_>,
    mount: &VolumeMount,
    env: &[(String, String)],
) -> Result<(), LaunchError> {
    let volume = inputs.volumes.by_name.get(&mount.name).ok_or_else(|| {
        LaunchError::Config(format!(
            "cannot find volume {:?} to mount into container {:?}",
            mount.name, inputs.container.name
        ))
    })?;
    let sub_path = sub_path(mount, env)?;
    let image = inputs.images.volumes.get(&mount.name);
    if let Some(sub_path) = &sub_path
        && image.is_none()
    {
        plan.files.push(HostFile::SubPath {
            volume: volume.path.clone(),
            sub_path: sub_path.clone(),
            make: !volume.readonly,
            mount: mount.name.clone(),
            container: inputs.container.name.clone(),
        });
    }
    plan.mounts.push(Mount {
        container_path: absolute(&mount.mount_path),
        host_path: volume.path.clone(),
        sub_path,
        readonly: mount.read_only == Some(true) || volume.readonly,
        recursive_readonly: recursive_read_only(mount)?,
        propagation: propagation(mount)?,
        image: image.map(|i| i.id.clone()),
    });
    Ok(())
}

fn sub_path(mount: &VolumeMount, env: &[(String, String)]) -> Result<Option<String>, LaunchError> {
    let given = |text: Option<&String>| text.cloned().filter(|t| !t.is_empty());
    let path = match given(mount.sub_path_expr.as_ref()) {
        Some(expression) => expand_sub_path(&expression, env).map_err(LaunchError::Config)?,
        None => given(mount.sub_path.as_ref()).unwrap_or_default(),
    };
    if path.starts_with('/') {
        return Err(LaunchError::Config(format!(
            "error SubPath `{path}` must not be an absolute path"
        )));
    }
    if Path::new(&path)
        .components()
        .any(|c| c == Component::ParentDir)
    {
        return Err(LaunchError::Config(format!(
            "unable to provision SubPath `{path}`: must not contain '..'"
        )));
    }
    Ok((!path.is_empty()).then_some(path))
}

fn propagation(mount: &VolumeMount) -> Result<Propagation, LaunchError> {
    match mount.mount_propagation.as_deref() {
        None | Some("None" | "") => Ok(Propagation::Private),
        Some("HostToContainer") => Ok(Propagation::HostToContainer),
        Some("Bidirectional") => Ok(Propagation::Bidirectional),
        Some(other) => Err(LaunchError::Config(format!(
            "invalid MountPropagation mode: {other:?}"
        ))),
    }
}

/// Our runtime always can mount recursively read-only, so IfPossible is Enabled.
fn recursive_read_only(mount: &VolumeMount) -> Result<bool, LaunchError> {
    let refuse = |why: String| {
        Err(LaunchError::Config(format!(
            "failed to resolve recursive read-only mode: {why}"
        )))
    };
    let name = &mount.name;
    match mount.recursive_read_only.as_deref() {
        None | Some("Disabled") => Ok(false),
        Some("IfPossible" | "Enabled") if mount.read_only != Some(true) => refuse(format!(
            "volume {name:?} requested recursive read-only mode, but it is not read-only"
        )),
        Some("IfPossible" | "Enabled") => match mount.mount_propagation.as_deref() {
            None | Some("None") => Ok(true),
            Some(mode) => refuse(format!(
                "volume {name:?} requested recursive read-only mode, but it is not compatible with propagation {mode:?}"
            )),
        },
        Some(other) => refuse(format!("unknown recursive read-only mode {other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::EnvObjects;
    use super::super::container::ContainerImages;
    use super::super::testing::pod_of;
    use super::*;
    use crate::volumes::{HostVolume, PodVolumes};
    use runtime::service::{ImageConfig, ImageId, ImageStatus};
    use serde_json::{Value, json};

    fn of(mounts: Value) -> Result<MountPlan, LaunchError> {
        let pod = pod_of(json!({"name": "c", "volumeMounts": mounts}));
        let mut volumes = PodVolumes::default();
        for (name, readonly) in [("data", false), ("cfg", true)] {
            let path = PathBuf::from(format!("/v/{name}"));
            volumes.by_name.insert(
                name.into(),
                HostVolume {
                    path,
                    readonly,
                    block: false,
                },
            );
        }
        let path = PathBuf::new();
        let image = HostVolume {
            path,
            readonly: true,
            block: false,
        };
        volumes.by_name.insert("image".into(), image);
        let env = [("NAME".to_owned(), "x".to_owned())];
        let images = ContainerImages {
            own: stored("sha256:own"),
            volumes: [("image".to_owned(), stored("sha256:other"))].into(),
        };
        let inputs = Inputs {
            pod: &pod,
            container: &pod.spec.as_ref().unwrap().containers[0],
            context: &LaunchContext::default(),
            volumes: &volumes,
            images: &images,
            pod_ips: &["10.0.0.2".parse().unwrap()],
            attempt: 3,
            objects: &EnvObjects::default(),
        };
        plan(&inputs, &env)
    }

    fn stored(id: &str) -> ImageStatus {
        ImageStatus {
            id: ImageId(id.to_owned()),
            repo_tags: vec![],
            repo_digests: vec![],
            size_bytes: 0,
            pinned: false,
            user: String::new(),
            config: ImageConfig::default(),
        }
    }

    #[test]
    fn a_volume_that_is_an_image_is_mounted_by_its_id_and_read_only() {
        let mount = json!({"name": "image", "mountPath": "/i", "subPath": "etc"});
        let plan = of(json!([mount])).unwrap();
        let mount = &plan.mounts[0];
        assert_eq!(mount.image, Some(ImageId("sha256:other".into())));
        assert!(mount.readonly);
        assert_eq!(mount.sub_path.as_deref(), Some("etc"));
        let made = plan.files.iter();
        let made = made.filter(|f| matches!(f, HostFile::SubPath { .. }));
        assert_eq!(made.count(), 0);
    }

    #[test]
    fn volumes_hosts_and_termination_file_are_mounted() {
        let plan = of(json!([
            {"name": "data", "mountPath": "/d", "subPathExpr": "a/$(NAME)", "mountPropagation": "HostToContainer"},
            {"name": "cfg", "mountPath": "cfg", "subPath": "key"},
        ]))
        .unwrap();
        let paths: Vec<_> = plan
            .mounts
            .iter()
            .map(|m| m.container_path.as_str())
            .collect();
        assert_eq!(paths, ["/d", "/cfg", "/etc/hosts", "/dev/termination-log"]);
        assert_eq!(plan.mounts[0].sub_path.as_deref(), Some("a/x"));
        assert!(!plan.mounts[0].readonly && plan.mounts[1].readonly);
        assert_eq!(plan.mounts[0].propagation, Propagation::HostToContainer);
        assert_eq!(
            plan.mounts[2].host_path,
            Path::new("/var/lib/kubelet/pods/u1/etc-hosts")
        );
        // A missing subPath is made in a writable volume only.
        let made = plan
            .files
            .iter()
            .filter(|f| matches!(f, HostFile::SubPath { make: true, .. }))
            .count();
        assert_eq!(made, 1);
    }

    #[test]
    fn devices_are_passed_in_with_what_their_claim_allows() {
        let asked =
            json!({"name": "c", "volumeDevices": [{"name": "raw", "devicePath": "/dev/x"}]});
        let pod = pod_of(asked);
        let container = &pod.spec.as_ref().unwrap().containers[0];
        let mut volumes = PodVolumes::default();
        assert_eq!(
            devices(container, &volumes).unwrap_err().to_string(),
            "cannot find volume \"raw\" to pass into container \"c\""
        );
        for (readonly, access) in [(false, "mrw"), (true, "r")] {
            let volume = HostVolume {
                path: "/p".into(),
                readonly,
                block: true,
            };
            volumes.by_name.insert("raw".into(), volume);
            assert_eq!(
                devices(container, &volumes).unwrap(),
                [("/p".into(), "/dev/x".to_owned(), access.to_owned())]
            );
        }
    }

    #[test]
    fn an_own_hosts_file_is_left_alone() {
        let plan =
            of(json!([{"name": "data", "mountPath": "/etc/hosts", "subPath": "hosts"}])).unwrap();
        let hosts = plan
            .mounts
            .iter()
            .filter(|m| m.container_path == HOSTS)
            .count();
        assert_eq!(hosts, 1);
    }

    #[test]
    fn impossible_mounts_are_refused_by_name() {
        for (mount, want) in [
            (
                json!({"name": "none", "mountPath": "/x"}),
                "cannot find volume \"none\" to mount into container \"c\"",
            ),
            (
                json!({"name": "data", "mountPath": "/x", "subPath": "/a"}),
                "error SubPath `/a` must not be an absolute path",
            ),
            (
                json!({"name": "data", "mountPath": "/x", "subPath": "a/../b"}),
                "unable to provision SubPath `a/../b`: must not contain '..'",
            ),
            (
                json!({"name": "data", "mountPath": "/x", "subPathExpr": "$(NO)"}),
                "missing value for NO",
            ),
            (
                json!({"name": "data", "mountPath": "/x", "recursiveReadOnly": "Enabled"}),
                "failed to resolve recursive read-only mode: volume \"data\" requested recursive read-only mode, but it is not read-only",
            ),
        ] {
            assert_eq!(of(json!([mount])).unwrap_err().to_string(), want);
        }
    }
}
