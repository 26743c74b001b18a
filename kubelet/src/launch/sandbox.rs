//! A pod as a sandbox.

use super::dns::pod_dns;
use super::hostname::{hostname_and_domain, kernel_name};
use super::qos::pod_cgroup;
use super::{
    LABEL_POD_NAME, LABEL_POD_NAMESPACE, LABEL_POD_UID, LaunchContext, LaunchError, host_network,
    pod_log_directory, pod_name, pod_namespace, pod_uid,
};
use k8s_openapi::api::core::v1::{Container, Pod};
use runtime::service::{NamespaceMode, PortMapping, SandboxConfig};
use std::collections::BTreeSet;

/// What the engine shall make for this pod. `attempt` counts the sandboxes before it. The
/// handler of a RuntimeClass and the ids of a user namespace are for the caller to fill in.
///
/// # Errors
/// Host names that cannot be.
pub fn config(
    pod: &Pod,
    context: &LaunchContext,
    attempt: u32,
) -> Result<SandboxConfig, LaunchError> {
    let spec = pod.spec.as_ref();
    let flag = |value: Option<bool>| value == Some(true);
    let node_network = host_network(pod);
    // With the node's network the node's UTS namespace and name are used too.
    let hostname = if node_network {
        String::new()
    } else {
        let (name, domain) = hostname_and_domain(pod, context)?;
        kernel_name(pod, &name, &domain)?
    };
    let mut labels = pod.metadata.labels.clone().unwrap_or_default();
    for (key, value) in [
        (LABEL_POD_NAME, pod_name(pod)),
        (LABEL_POD_NAMESPACE, pod_namespace(pod)),
        (LABEL_POD_UID, pod_uid(pod)),
    ] {
        labels.insert(key.to_owned(), value.to_owned());
    }
    let containers = spec.map(|s| s.containers.as_slice()).unwrap_or_default();
    let security = spec.and_then(|s| s.security_context.as_ref());
    Ok(SandboxConfig {
        name: pod_name(pod).to_owned(),
        namespace: pod_namespace(pod).to_owned(),
        uid: pod_uid(pod).to_owned(),
        attempt,
        hostname,
        dns: Some(pod_dns(pod, context).config),
        log_directory: pod_log_directory(pod, context),
        port_mappings: containers.iter().flat_map(ports).collect(),
        labels,
        annotations: pod.metadata.annotations.clone().unwrap_or_default(),
        cgroup_parent: pod_cgroup(pod, context),
        sysctls: security
            .into_iter()
            .flat_map(|s| s.sysctls.iter().flatten())
            .map(|s| (s.name.clone(), s.value.clone()))
            .collect(),
        network: node_or_pod(node_network),
        pid: if flag(spec.and_then(|s| s.host_pid)) {
            NamespaceMode::Node
        } else if flag(spec.and_then(|s| s.share_process_namespace)) {
            NamespaceMode::Pod
        } else {
            NamespaceMode::Container
        },
        ipc: node_or_pod(flag(spec.and_then(|s| s.host_ipc))),
        runtime_handler: String::new(),
        user_namespace: None,
    })
}

fn node_or_pod(node: bool) -> NamespaceMode {
    if node {
        NamespaceMode::Node
    } else {
        NamespaceMode::Pod
    }
}

/// Host ports of a container; the same port twice counts once.
fn ports(container: &Container) -> Vec<PortMapping> {
    let mut seen = BTreeSet::new();
    let port = |number: i32| u16::try_from(number).unwrap_or(0);
    container
        .ports
        .iter()
        .flatten()
        .filter_map(|p| {
            let mapping = PortMapping {
                protocol: p.protocol.as_deref().unwrap_or("TCP").to_lowercase(),
                container_port: port(p.container_port),
                host_port: port(p.host_port.unwrap_or(0)),
                host_ip: p.host_ip.clone().unwrap_or_default(),
            };
            let key = format!("{mapping:?}");
            (mapping.host_port != 0 && seen.insert(key)).then_some(mapping)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::pod;
    use super::*;
    use serde_json::json;

    #[test]
    fn namespaces_and_names_follow_the_spec() {
        let context = LaunchContext::default();
        let plain = config(&pod(json!({})), &context, 2).unwrap();
        assert_eq!((plain.hostname.as_str(), plain.attempt), ("p", 2));
        assert_eq!(
            (&plain.network, &plain.pid, &plain.ipc),
            (
                &NamespaceMode::Pod,
                &NamespaceMode::Container,
                &NamespaceMode::Pod
            )
        );
        assert_eq!(plain.log_directory.to_str(), Some("/var/log/pods/ns_p_u1"));
        assert_eq!(plain.labels[LABEL_POD_UID], "u1");
        assert_eq!(plain.labels["app"], "web");
        let node = config(
            &pod(json!({"hostNetwork": true, "hostPID": true, "hostIPC": true})),
            &context,
            0,
        )
        .unwrap();
        assert_eq!(node.hostname, "");
        assert_eq!(
            (&node.network, &node.pid, &node.ipc),
            (
                &NamespaceMode::Node,
                &NamespaceMode::Node,
                &NamespaceMode::Node
            )
        );
        let shared = config(&pod(json!({"shareProcessNamespace": true})), &context, 0).unwrap();
        assert_eq!(shared.pid, NamespaceMode::Pod);
    }

    #[test]
    fn host_ports_and_sysctls_are_passed_on() {
        let spec = json!({
            "containers": [{"name": "c", "ports": [
                {"containerPort": 80, "hostPort": 8080}, {"containerPort": 80, "hostPort": 8080},
                {"containerPort": 53, "hostPort": 53, "protocol": "UDP", "hostIP": "127.0.0.1"},
                {"containerPort": 9},
            ]}],
            "securityContext": {"sysctls": [{"name": "kernel.shm_rmid_forced", "value": "1"}]},
        });
        let config = config(&pod(spec), &LaunchContext::default(), 0).unwrap();
        let ports: Vec<_> = config
            .port_mappings
            .iter()
            .map(|p| (p.protocol.as_str(), p.host_port))
            .collect();
        assert_eq!(ports, [("tcp", 8080), ("udp", 53)]);
        assert_eq!(config.sysctls["kernel.shm_rmid_forced"], "1");
    }
}
