//! Readings of a Pod object that several modules need. Pure.

use k8s_openapi::api::core::v1::{
    Container, ContainerRestartRule, EphemeralContainer, Pod, PodSpec,
};
use std::borrow::Cow;

/// What kind of container it is: decides order, restart and what it counts for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ContainerKind {
    /// Runs to its end before the next one starts.
    Init,
    /// An init container with `restartPolicy: Always`: starts in order, then stays.
    Sidecar,
    /// A main container.
    Main,
    /// Added to the running pod for debugging: starts at once, runs once, counts for nothing.
    Ephemeral,
}

/// A container of the spec with its kind.
#[derive(Debug, Clone, Copy)]
pub struct ContainerRef<'a> {
    /// Kind.
    pub kind: ContainerKind,
    /// Its spec.
    pub spec: &'a Container,
}

/// A container found by name, ephemeral ones among them.
#[derive(Debug, Clone)]
pub struct Found<'a> {
    /// Kind.
    pub kind: ContainerKind,
    /// Its spec; of an ephemeral container in the shape of the others.
    pub spec: Cow<'a, Container>,
    /// The container whose processes an ephemeral one shall see.
    pub target: Option<&'a str>,
}

/// The pod's restart policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestartPolicy {
    /// Always, the default.
    Always,
    /// After a failure.
    OnFailure,
    /// Never.
    Never,
}

impl RestartPolicy {
    /// Reads the API's word; the apiserver's default for all others.
    fn parse(word: Option<&str>) -> Self {
        match word {
            Some("OnFailure") => Self::OnFailure,
            Some("Never") => Self::Never,
            _ => Self::Always,
        }
    }
}

/// Seconds of grace when the pod says nothing (the apiserver fills it in; this is for orphans).
pub const DEFAULT_GRACE_S: u64 = 30;

/// The pod's UID.
pub fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

/// The pod's namespace.
pub fn namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or_default()
}

/// The pod's name.
pub fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

/// `name_namespace(uid)`, as users know it from events.
pub fn describe(pod: &Pod) -> String {
    format!("{}_{}({})", name(pod), namespace(pod), uid(pod))
}

/// Init containers in order, then main containers in order; ephemeral ones not.
pub fn containers(spec: &PodSpec) -> impl Iterator<Item = ContainerRef<'_>> {
    let init = spec.init_containers.iter().flatten().map(|c| ContainerRef {
        kind: if c.restart_policy.as_deref() == Some("Always") {
            ContainerKind::Sidecar
        } else {
            ContainerKind::Init
        },
        spec: c,
    });
    init.chain(spec.containers.iter().map(|c| ContainerRef {
        kind: ContainerKind::Main,
        spec: c,
    }))
}

/// Ephemeral containers, in the order they were added.
pub fn ephemeral_containers(spec: &PodSpec) -> impl Iterator<Item = &EphemeralContainer> {
    spec.ephemeral_containers.iter().flatten()
}

/// A container of any kind by name.
pub fn container<'a>(spec: &'a PodSpec, name: &str) -> Option<Found<'a>> {
    let usual = containers(spec).find(|c| c.spec.name == name);
    if let Some(usual) = usual {
        return Some(Found {
            kind: usual.kind,
            spec: Cow::Borrowed(usual.spec),
            target: None,
        });
    }
    let ephemeral = ephemeral_containers(spec).find(|c| c.name == name)?;
    let target = ephemeral.target_container_name.as_deref();
    Some(Found {
        kind: ContainerKind::Ephemeral,
        spec: Cow::Owned(as_container(ephemeral)),
        target: target.filter(|t| !t.is_empty()),
    })
}

/// An ephemeral container in the shape of the others. What the API forbids it (probes, ports,
/// hooks, restart rules) is left out, so that nothing acts on it.
pub fn as_container(ephemeral: &EphemeralContainer) -> Container {
    let e = ephemeral.clone();
    Container {
        name: e.name,
        image: e.image,
        image_pull_policy: e.image_pull_policy,
        command: e.command,
        args: e.args,
        working_dir: e.working_dir,
        env: e.env,
        env_from: e.env_from,
        resources: e.resources,
        volume_mounts: e.volume_mounts,
        volume_devices: e.volume_devices,
        security_context: e.security_context,
        stdin: e.stdin,
        stdin_once: e.stdin_once,
        tty: e.tty,
        termination_message_path: e.termination_message_path,
        termination_message_policy: e.termination_message_policy,
        ..Container::default()
    }
}

/// The pod's restart policy.
pub fn restart_policy(spec: &PodSpec) -> RestartPolicy {
    RestartPolicy::parse(spec.restart_policy.as_deref())
}

/// Whether a container that ended with `exit_code` runs again: the first matching rule of the
/// container, else its own policy, else the pod's (KEP-5307). For an init container `Always` of
/// the pod means "until it succeeds".
pub fn should_restart(spec: &PodSpec, container: ContainerRef<'_>, exit_code: i32) -> bool {
    if container.kind == ContainerKind::Ephemeral {
        return false;
    }
    if rule_action(container.spec, exit_code).is_some() {
        return true;
    }
    let policy = match &container.spec.restart_policy {
        Some(own) => RestartPolicy::parse(Some(own)),
        None => restart_policy(spec),
    };
    match (container.kind, policy) {
        (ContainerKind::Sidecar, _) | (ContainerKind::Main, RestartPolicy::Always) => true,
        (ContainerKind::Init, RestartPolicy::Always) | (_, RestartPolicy::OnFailure) => {
            exit_code != 0
        }
        (_, RestartPolicy::Never) | (ContainerKind::Ephemeral, RestartPolicy::Always) => false,
    }
}

/// What a restart rule says of an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestartAction {
    /// This container runs again.
    Restart,
    /// All containers of the pod run again, from the start (KEP-5532).
    RestartAll,
}

impl RestartAction {
    /// The API's word for [`Self::RestartAll`].
    pub const ALL: &str = "RestartAllContainers";
}

/// What the restart rules of a container say of this exit code, if they say anything.
pub fn rule_action(container: &Container, exit_code: i32) -> Option<RestartAction> {
    match matching_rule(container, exit_code)?.action.as_str() {
        "Restart" => Some(RestartAction::Restart),
        RestartAction::ALL => Some(RestartAction::RestartAll),
        _ => None,
    }
}

/// The first restart rule of a container that matches; those behind it do not count. Without a
/// policy of its own a container has no rules.
fn matching_rule(container: &Container, exit_code: i32) -> Option<&ContainerRestartRule> {
    container.restart_policy.as_ref()?;
    let mut rules = container.restart_policy_rules.iter().flatten();
    rules.find(|rule| {
        rule.exit_codes.as_ref().is_some_and(|codes| {
            let listed = codes.values.iter().flatten().any(|v| *v == exit_code);
            match codes.operator.as_str() {
                "In" => listed,
                "NotIn" => !listed,
                _ => false,
            }
        })
    })
}

/// Grace in seconds when the pod ends for a reason of its own or of the node's.
pub fn grace_seconds(pod: &Pod) -> u64 {
    let spec = pod
        .spec
        .as_ref()
        .and_then(|s| s.termination_grace_period_seconds);
    spec.map_or(DEFAULT_GRACE_S, |s| u64::try_from(s).unwrap_or(0))
}

/// Grace in seconds of a deletion the apiserver recorded; none when nobody deleted the pod.
pub fn deletion_grace_seconds(pod: &Pod) -> Option<u64> {
    pod.metadata.deletion_timestamp.as_ref()?;
    let recorded = pod.metadata.deletion_grace_period_seconds;
    Some(recorded.map_or_else(|| grace_seconds(pod), |s| u64::try_from(s).unwrap_or(0)))
}

/// Whether the apiserver already holds a terminal phase for the pod.
pub fn is_terminal(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ContainerRestartRuleOnExitCodes;

    fn check(kind: ContainerKind, pod_policy: &str, exit: i32, expected: bool) {
        let spec = PodSpec {
            restart_policy: Some(pod_policy.to_owned()),
            ..PodSpec::default()
        };
        let c = Container {
            name: "c".to_owned(),
            ..Container::default()
        };
        let got = should_restart(&spec, ContainerRef { kind, spec: &c }, exit);
        assert_eq!(got, expected, "{kind:?} {pod_policy} exit {exit}");
    }

    #[test]
    fn restart_policies_decide_by_kind_and_exit_code() {
        use ContainerKind::{Init, Main, Sidecar};
        for (kind, policy, on_success, on_failure) in [
            (Main, "Always", true, true),
            (Main, "OnFailure", false, true),
            (Main, "Never", false, false),
            (Init, "Always", false, true),
            (Init, "OnFailure", false, true),
            (Init, "Never", false, false),
            (Sidecar, "Never", true, true),
        ] {
            check(kind, policy, 0, on_success);
            check(kind, policy, 1, on_failure);
        }
    }

    #[test]
    fn a_restart_rule_wins_over_the_pods_policy() {
        let spec = PodSpec {
            restart_policy: Some("Never".to_owned()),
            ..PodSpec::default()
        };
        let c = Container {
            restart_policy: Some("Never".to_owned()),
            restart_policy_rules: Some(vec![ContainerRestartRule {
                action: "Restart".to_owned(),
                exit_codes: Some(ContainerRestartRuleOnExitCodes {
                    operator: "In".to_owned(),
                    values: Some(vec![42]),
                }),
            }]),
            ..Container::default()
        };
        let c = ContainerRef {
            kind: ContainerKind::Main,
            spec: &c,
        };
        assert!(should_restart(&spec, c, 42));
        assert!(!should_restart(&spec, c, 1));
    }
}
