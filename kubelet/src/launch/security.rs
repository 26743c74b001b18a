//! Security contexts of pod and container as one.

use super::{LaunchContext, LaunchError, describe};
use k8s_openapi::api::core::v1::{Container, Pod, SeccompProfile as ApiSeccomp};
use runtime::service::{ContainerSecurity, SeccompProfile};

/// Paths hidden from containers.
const MASKED: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];

/// Paths containers may only read.
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// The user an image's configuration names.
enum ImageUser<'a> {
    Id(i64),
    Name(&'a str),
}

fn image_user(user: &str) -> ImageUser<'_> {
    let name = user.split(':').next().unwrap_or_default();
    if name.is_empty() {
        return ImageUser::Id(0);
    }
    match name.parse() {
        Ok(id) => ImageUser::Id(id),
        Err(_) => ImageUser::Name(name),
    }
}

/// Whether the pod has users of its own instead of the node's.
pub fn own_users(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|s| s.host_users) == Some(false)
}

/// The container's privileges. `user` is the image's USER.
///
/// # Errors
/// runAsNonRoot that cannot hold, and values that do not exist.
pub fn security(
    pod: &Pod,
    container: &Container,
    context: &LaunchContext,
    user: &str,
) -> Result<ContainerSecurity, LaunchError> {
    let pod_context = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    let own = container.security_context.as_ref();
    let run_as_user = own
        .and_then(|c| c.run_as_user)
        .or_else(|| pod_context.and_then(|c| c.run_as_user));
    let non_root = own
        .and_then(|c| c.run_as_non_root)
        .or_else(|| pod_context.and_then(|c| c.run_as_non_root));
    if non_root == Some(true) {
        verify_non_root(pod, container, run_as_user, user)?;
    }
    let privileged = own.and_then(|c| c.privileged) == Some(true);
    let unmasked = own.and_then(|c| c.proc_mount.as_deref()) == Some("Unmasked");
    let paths = |list: &[&str], more: &[String]| -> Vec<String> {
        if privileged || unmasked {
            return Vec::new();
        }
        let list = list.iter().map(|p| (*p).to_owned());
        list.chain(more.iter().cloned()).collect()
    };
    let capabilities = own.and_then(|c| c.capabilities.as_ref());
    let bare = |list: Option<&Vec<String>>| -> Vec<String> {
        list.into_iter()
            .flatten()
            .map(|c| {
                let name = c.to_uppercase();
                name.strip_prefix("CAP_").unwrap_or(&name).to_owned()
            })
            .collect()
    };
    let policy = pod_context.and_then(|c| c.supplemental_groups_policy.as_deref());
    let groups = pod_context.map_or_else(Vec::new, |c| {
        c.fs_group
            .into_iter()
            .chain(c.supplemental_groups.iter().flatten().copied())
            .collect()
    });
    Ok(ContainerSecurity {
        privileged,
        add_capabilities: bare(capabilities.and_then(|c| c.add.as_ref())),
        drop_capabilities: bare(capabilities.and_then(|c| c.drop.as_ref())),
        run_as_user,
        run_as_group: own
            .and_then(|c| c.run_as_group)
            .or_else(|| pod_context.and_then(|c| c.run_as_group)),
        run_as_username: None,
        supplemental_groups: groups,
        supplemental_groups_strict: match policy {
            None | Some("Merge") => false,
            Some("Strict") => true,
            Some(other) => {
                return Err(LaunchError::Config(format!(
                    "unsupported supplementalGroupsPolicy: {other}"
                )));
            }
        },
        readonly_rootfs: own.and_then(|c| c.read_only_root_filesystem) == Some(true),
        no_new_privs: own.and_then(|c| c.allow_privilege_escalation) == Some(false),
        masked_paths: paths(&MASKED, &context.masked_paths),
        readonly_paths: paths(&READ_ONLY, &[]),
        seccomp: seccomp(
            own.and_then(|c| c.seccomp_profile.as_ref())
                .or_else(|| pod_context.and_then(|c| c.seccomp_profile.as_ref())),
            context,
        )?,
    })
}

fn seccomp(
    profile: Option<&ApiSeccomp>,
    context: &LaunchContext,
) -> Result<SeccompProfile, LaunchError> {
    let Some(profile) = profile else {
        return Ok(if context.seccomp_default {
            SeccompProfile::RuntimeDefault
        } else {
            SeccompProfile::Unconfined
        });
    };
    match profile.type_.as_str() {
        "RuntimeDefault" => Ok(SeccompProfile::RuntimeDefault),
        "Localhost" => match profile.localhost_profile.as_deref() {
            Some(file) if !file.is_empty() => Ok(SeccompProfile::Localhost(
                context.seccomp_root.join(file.trim_start_matches('/')),
            )),
            _ => Err(LaunchError::Config(
                "localhostProfile must be set if seccompProfile type is Localhost.".into(),
            )),
        },
        _ => Ok(SeccompProfile::Unconfined),
    }
}

/// Refuses root, and users that cannot be told from root.
fn verify_non_root(
    pod: &Pod,
    container: &Container,
    run_as_user: Option<i64>,
    user: &str,
) -> Result<(), LaunchError> {
    let whom = format!("(pod: {:?}, container: {})", describe(pod), container.name);
    let message = match (run_as_user, image_user(user)) {
        (Some(0), _) => format!("container's runAsUser breaks non-root policy {whom}"),
        (Some(_), _) => return Ok(()),
        (None, ImageUser::Name(name)) => format!(
            "container has runAsNonRoot and image has non-numeric user ({name}), cannot verify user is non-root {whom}"
        ),
        (None, ImageUser::Id(0)) => {
            format!("container has runAsNonRoot and image will run as root {whom}")
        }
        (None, ImageUser::Id(id)) if id < 0 || id > i64::from(i32::MAX) => format!(
            "container has runAsNonRoot and image has an invalid user id ({id}). (Must be 1-({})): must be between 0 and {}, inclusive {whom}",
            i32::MAX,
            i32::MAX
        ),
        (None, ImageUser::Id(_)) => return Ok(()),
    };
    Err(LaunchError::Config(message))
}

#[cfg(test)]
mod tests {
    use super::super::testing::pod;
    use super::*;
    use serde_json::{Value, json};

    fn of(pod_context: Value, own: Value, user: &str) -> Result<ContainerSecurity, LaunchError> {
        let pod = pod(json!({
            "securityContext": pod_context,
            "containers": [{"name": "c", "securityContext": own}],
        }));
        let container = &pod.spec.as_ref().unwrap().containers[0];
        security(&pod, container, &LaunchContext::default(), user)
    }

    #[test]
    fn the_container_wins_over_the_pod() {
        let got = of(
            json!({"runAsUser": 1, "runAsGroup": 2, "fsGroup": 3, "supplementalGroups": [4, 5]}),
            json!({"runAsUser": 10, "capabilities": {"add": ["CAP_NET_ADMIN", "sys_time"], "drop": ["ALL"]},
                   "readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false}),
            "",
        )
        .unwrap();
        assert_eq!((got.run_as_user, got.run_as_group), (Some(10), Some(2)));
        assert_eq!(got.supplemental_groups, [3, 4, 5]);
        assert_eq!(got.add_capabilities, ["NET_ADMIN", "SYS_TIME"]);
        assert_eq!(got.drop_capabilities, ["ALL"]);
        assert!(got.readonly_rootfs && got.no_new_privs && !got.privileged);
        assert_eq!(got.masked_paths.len(), 12);
        assert_eq!(got.seccomp, SeccompProfile::Unconfined);
    }

    #[test]
    fn privileged_and_unmasked_hide_nothing() {
        for own in [
            json!({"privileged": true}),
            json!({"procMount": "Unmasked"}),
        ] {
            let got = of(json!({}), own, "").unwrap();
            assert!(got.masked_paths.is_empty() && got.readonly_paths.is_empty());
        }
    }

    #[test]
    fn seccomp_comes_from_container_pod_or_default() {
        let profile = |kind: &str| json!({"seccompProfile": {"type": kind}});
        let got = of(profile("RuntimeDefault"), json!({}), "").unwrap();
        assert_eq!(got.seccomp, SeccompProfile::RuntimeDefault);
        let got = of(profile("RuntimeDefault"), profile("Unconfined"), "").unwrap();
        assert_eq!(got.seccomp, SeccompProfile::Unconfined);
        let own = json!({"seccompProfile": {"type": "Localhost", "localhostProfile": "a/b.json"}});
        let want = SeccompProfile::Localhost("/var/lib/kubelet/seccomp/a/b.json".into());
        assert_eq!(of(json!({}), own, "").unwrap().seccomp, want);
        assert!(of(json!({}), profile("Localhost"), "").is_err());
        let context = LaunchContext {
            seccomp_default: true,
            ..LaunchContext::default()
        };
        assert_eq!(
            seccomp(None, &context).unwrap(),
            SeccompProfile::RuntimeDefault
        );
    }

    #[test]
    fn non_root_is_verified_with_stocks_words() {
        let non_root = json!({"runAsNonRoot": true});
        for (pod_context, user, want) in [
            (
                json!({}),
                "",
                "container has runAsNonRoot and image will run as root (pod: \"p_ns(u1)\", container: c)",
            ),
            (
                json!({}),
                "0:5",
                "container has runAsNonRoot and image will run as root (pod: \"p_ns(u1)\", container: c)",
            ),
            (
                json!({}),
                "www",
                "container has runAsNonRoot and image has non-numeric user (www), cannot verify user is non-root (pod: \"p_ns(u1)\", container: c)",
            ),
            (
                json!({"runAsUser": 0}),
                "5",
                "container's runAsUser breaks non-root policy (pod: \"p_ns(u1)\", container: c)",
            ),
        ] {
            let error = of(pod_context, non_root.clone(), user).unwrap_err();
            assert_eq!(error.to_string(), want);
            assert_eq!(error.reason(), "CreateContainerConfigError");
        }
        assert!(of(json!({}), non_root.clone(), "1000:0").is_ok());
        assert!(of(json!({"runAsUser": 7}), non_root, "root").is_ok());
    }
}
