//! A container of a pod, of any kind (init, sidecar, main, ephemeral as a container).

use super::env::environment;
use super::expand::expand_env;
use super::files::HostFile;
use super::hash::container_hash;
use super::mounts::{MountPlan, devices, plan, termination_path};
use super::resources::container_resources;
use super::security::security;
use super::{
    ANNOTATION_HASH, ANNOTATION_RESTART_COUNT, ANNOTATION_TERMINATION_PATH,
    ANNOTATION_TERMINATION_POLICY, EnvObjects, LABEL_CONTAINER_NAME, LABEL_POD_NAME,
    LABEL_POD_NAMESPACE, LABEL_POD_UID, LaunchContext, LaunchError, oom, pod_name, pod_namespace,
    pod_uid,
};
use crate::volumes::PodVolumes;
use k8s_openapi::api::core::v1::{Container, Pod};
use runtime::service::{ContainerConfig, ImageStatus};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Everything a container instance is made from.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// Its container, as in the spec.
    pub container: &'a Container,
    /// The node.
    pub context: &'a LaunchContext,
    /// The pod's volumes on the node.
    pub volumes: &'a PodVolumes,
    /// The images as they are stored.
    pub images: &'a ContainerImages,
    /// The pod's addresses, primary first; with the node's network the node's.
    pub pod_ips: &'a [IpAddr],
    /// The restart count.
    pub attempt: u32,
    /// Objects of the environment.
    pub objects: &'a EnvObjects,
}

/// The images a container is made of.
#[derive(Debug, Clone)]
pub struct ContainerImages {
    /// The one it runs.
    pub own: ImageStatus,
    /// Those it mounts, by volume name.
    pub volumes: BTreeMap<String, ImageStatus>,
}

/// A container as the engine takes it, and the files it needs first.
#[derive(Debug, Clone)]
pub struct ContainerLaunch {
    /// For [`runtime::service::RuntimeService::create_container`].
    pub config: ContainerConfig,
    /// To be made before ([`super::files::write`]).
    pub files: Vec<HostFile>,
}

/// Plans one container instance.
///
/// # Errors
/// [`LaunchError::Config`] for what is missing or cannot be; the container waits with
/// `CreateContainerConfigError`.
pub fn config(inputs: &Inputs<'_>) -> Result<ContainerLaunch, LaunchError> {
    let Inputs {
        pod,
        container,
        context,
        ..
    } = *inputs;
    let env = environment(pod, container, context, inputs.objects, inputs.pod_ips)?;
    let image = &inputs.images.own;
    let user = if image.user.is_empty() {
        &image.config.user
    } else {
        &image.user
    };
    let security = security(pod, container, context, user)?;
    let MountPlan { mounts, files } = plan(inputs, &env)?;
    let expand = |words: Option<&Vec<String>>| -> Vec<String> {
        words
            .into_iter()
            .flatten()
            .map(|word| expand_env(word, &env))
            .collect()
    };
    let lifecycle = container.lifecycle.as_ref();
    let config = ContainerConfig {
        name: container.name.clone(),
        attempt: inputs.attempt,
        image: image.id.0.clone(),
        user_image: container.image.clone().unwrap_or_default(),
        command: expand(container.command.as_ref()),
        args: expand(container.args.as_ref()),
        working_dir: container.working_dir.clone().unwrap_or_default(),
        mounts,
        devices: devices(container, inputs.volumes)?,
        labels: labels(pod, container),
        annotations: annotations(container, inputs.attempt),
        log_path: format!("{}/{}.log", container.name, inputs.attempt),
        log_max_bytes: context.log_max_bytes,
        log_max_files: context.log_max_files,
        stdin: container.stdin == Some(true),
        stdin_once: container.stdin_once == Some(true),
        tty: container.tty == Some(true),
        pid: None,
        resources: container_resources(pod, container, context)?,
        oom_score_adj: oom::score(pod, container, context.memory_capacity)?,
        security,
        stop_signal: lifecycle.and_then(|l| l.stop_signal.clone()),
        env,
    };
    Ok(ContainerLaunch { config, files })
}

fn labels(pod: &Pod, container: &Container) -> BTreeMap<String, String> {
    [
        (LABEL_POD_NAME, pod_name(pod)),
        (LABEL_POD_NAMESPACE, pod_namespace(pod)),
        (LABEL_POD_UID, pod_uid(pod)),
        (LABEL_CONTAINER_NAME, &container.name),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

fn annotations(container: &Container, attempt: u32) -> BTreeMap<String, String> {
    let policy = container.termination_message_policy.as_deref();
    [
        (ANNOTATION_HASH, container_hash(container)),
        (ANNOTATION_RESTART_COUNT, attempt.to_string()),
        (
            ANNOTATION_TERMINATION_PATH,
            termination_path(container).to_owned(),
        ),
        (
            ANNOTATION_TERMINATION_POLICY,
            policy.unwrap_or("File").to_owned(),
        ),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

#[cfg(test)]
mod tests {
    use super::super::testing::pod_of;
    use super::*;
    use runtime::service::{ImageConfig, ImageId};
    use serde_json::json;

    #[test]
    fn a_container_is_planned_from_all_its_parts() {
        let pod = pod_of(json!({
            "name": "c", "image": "busybox:1", "command": ["sh", "-c", "echo $(GREETING) $$(X) $(NO)"],
            "args": ["$(GREETING)"], "env": [{"name": "GREETING", "value": "hi"}],
            "tty": true, "resources": {"limits": {"memory": "64Mi"}},
        }));
        let image = ImageStatus {
            id: ImageId("sha256:1".into()),
            repo_tags: vec![],
            repo_digests: vec![],
            size_bytes: 0,
            pinned: false,
            user: "1000".into(),
            config: ImageConfig::default(),
        };
        let launch = config(&Inputs {
            pod: &pod,
            container: &pod.spec.as_ref().unwrap().containers[0],
            context: &LaunchContext {
                memory_capacity: 1 << 30,
                ..LaunchContext::default()
            },
            volumes: &PodVolumes::default(),
            images: &ContainerImages {
                own: image,
                volumes: BTreeMap::new(),
            },
            pod_ips: &["10.0.0.2".parse().unwrap()],
            attempt: 4,
            objects: &EnvObjects::default(),
        })
        .unwrap();
        let config = launch.config;
        assert_eq!(config.command, ["sh", "-c", "echo hi $(X) $(NO)"]);
        assert_eq!(config.args, ["hi"]);
        assert_eq!(config.image, "sha256:1");
        assert_eq!(config.log_path, "c/4.log");
        assert_eq!(config.annotations[ANNOTATION_RESTART_COUNT], "4");
        assert_eq!(
            config.annotations[ANNOTATION_TERMINATION_PATH],
            "/dev/termination-log"
        );
        assert_eq!(config.resources.memory_limit_bytes, Some(64 << 20));
        assert_eq!(config.mounts.len(), 2);
        assert_eq!(launch.files.len(), 2);
        assert!(config.tty);
    }
}
