//! Whether this node takes a new pod. Pure. Reasons and messages are the stock kubelet's:
//! controllers and tests read them.

use super::environment::Rejection;
use crate::launch::resources::{Amounts, pod_totals};
use crate::quantity::Quantity;
use k8s_openapi::api::core::v1::{AppArmorProfile, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What admission depends on besides the pods.
#[derive(Debug, Clone, Default)]
pub struct AdmissionContext {
    /// The Node's allocatable resources.
    pub allocatable: BTreeMap<String, ApiQuantity>,
    /// Unsafe sysctls allowed: names, or prefixes ending in `*`.
    pub allowed_unsafe_sysctls: Vec<String>,
}

/// Sysctls every pod may set: namespaced, and of no harm to others.
const SAFE_SYSCTLS: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
];

/// Decides about a new pod beside those that run here.
///
/// # Errors
/// The reason for `status.reason` and the message for people.
pub fn admit(pod: &Pod, others: &[Arc<Pod>], context: &AdmissionContext) -> Result<(), Rejection> {
    operating_system(pod)?;
    app_armor(pod)?;
    sysctls(pod, &context.allowed_unsafe_sysctls)?;
    resources(pod, others, &context.allocatable)?;
    node_ports(pod, others)
}

fn rejection(reason: impl Into<String>, message: impl Into<String>) -> Rejection {
    Rejection {
        reason: reason.into(),
        message: message.into(),
    }
}

/// The pod names another operating system.
fn operating_system(pod: &Pod) -> Result<(), Rejection> {
    let os = pod
        .spec
        .as_ref()
        .and_then(|s| s.os.as_ref())
        .map(|os| os.name.as_str());
    if os.is_some_and(|os| os != "linux") {
        let message = "Failed to admit pod as the OS field doesn't match node OS";
        return Err(rejection("PodOSNotSupported", message));
    }
    let selector = pod.spec.as_ref().and_then(|s| s.node_selector.as_ref());
    if selector
        .and_then(|s| s.get("kubernetes.io/os"))
        .is_some_and(|os| os != "linux")
    {
        return Err(rejection(
            "PodOSSelectorNodeLabelDoesNotMatch",
            "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label",
        ));
    }
    Ok(())
}

/// A profile nobody would hold the pod to: containers are not put under AppArmor here.
fn app_armor(pod: &Pod) -> Result<(), Rejection> {
    const ANNOTATION: &str = "container.apparmor.security.beta.kubernetes.io/";
    let wanted =
        |profile: Option<&AppArmorProfile>| profile.is_some_and(|p| p.type_ != "Unconfined");
    let of_pod = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    let containers = pod.spec.iter().flat_map(|s| {
        let init = s.init_containers.iter().flatten();
        init.chain(&s.containers)
    });
    let mut of_containers = containers.filter_map(|c| c.security_context.as_ref());
    let mut annotations = pod.metadata.annotations.iter().flatten();
    if wanted(of_pod.and_then(|c| c.app_armor_profile.as_ref()))
        || of_containers.any(|c| wanted(c.app_armor_profile.as_ref()))
        || annotations.any(|(key, value)| key.starts_with(ANNOTATION) && value != "unconfined")
    {
        let message = "Cannot enforce AppArmor: AppArmor is not enabled on the host";
        return Err(rejection("AppArmor", message));
    }
    Ok(())
}

/// Sysctls that are neither safe nor allowed here, or whose namespace is the node's.
fn sysctls(pod: &Pod, allowed: &[String]) -> Result<(), Rejection> {
    let Some(spec) = &pod.spec else { return Ok(()) };
    let asked = spec
        .security_context
        .as_ref()
        .and_then(|s| s.sysctls.as_ref());
    for sysctl in asked.into_iter().flatten() {
        // Both spellings name the same: `net/ipv4/…` and `net.ipv4.…`.
        let name = sysctl.name.replace('/', ".");
        let by_pattern = allowed
            .iter()
            .any(|pattern| match pattern.strip_suffix('*') {
                Some(prefix) => name.starts_with(prefix),
                None => *pattern == name,
            });
        if !by_pattern && !SAFE_SYSCTLS.contains(&name.as_str()) {
            let message = format!("forbidden sysctl: {name:?} not allowlisted");
            return Err(rejection("SysctlForbidden", message));
        }
        let ipc = ["kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue."];
        let of_ipc = ipc.iter().any(|prefix| name.starts_with(prefix));
        if name.starts_with("net.") && spec.host_network == Some(true) {
            let message = format!("forbidden sysctl: {name:?} not allowed with host net enabled");
            return Err(rejection("SysctlForbidden", message));
        }
        if of_ipc && spec.host_ipc == Some(true) {
            let message = format!("forbidden sysctl: {name:?} not allowed with host ipc enabled");
            return Err(rejection("SysctlForbidden", message));
        }
    }
    Ok(())
}

/// Requests that do not fit beside those of the others.
fn resources(
    pod: &Pod,
    others: &[Arc<Pod>],
    allocatable: &BTreeMap<String, ApiQuantity>,
) -> Result<(), Rejection> {
    let capacity = |name: &str| {
        allocatable
            .get(name)
            .and_then(|q| Quantity::parse(&q.0).ok())
    };
    let refuse = |name: &str, requested: i64, used: i64, capacity: i64| {
        let message = format!(
            "Node didn't have enough resource: {name}, requested: {requested}, used: {used}, \
             capacity: {capacity}"
        );
        Err(rejection(format!("OutOf{name}"), message))
    };
    if let Some(most) = capacity("pods") {
        let used = i64::try_from(others.len()).unwrap_or(i64::MAX);
        if used >= most.value() {
            return refuse("pods", 1, used, most.value());
        }
    }
    let wanted = totals(pod).map_err(|message| rejection("UnexpectedAdmissionError", message))?;
    if wanted.values().all(Quantity::is_zero) {
        return Ok(());
    }
    let taken: Vec<Amounts> = others.iter().filter_map(|p| totals(p).ok()).collect();
    for (name, requested) in &wanted {
        // What the node does not know of is a device plugin's, or nobody's, business.
        let Some(most) = capacity(name).filter(|_| !requested.is_zero()) else {
            continue;
        };
        let number = |q: &Quantity| {
            if name == "cpu" {
                q.milli_value()
            } else {
                q.value()
            }
        };
        let used: i64 = taken.iter().filter_map(|t| t.get(name)).map(number).sum();
        if used.saturating_add(number(requested)) > number(&most) {
            return refuse(name, number(requested), used, number(&most));
        }
    }
    Ok(())
}

/// Ports of the node that another pod already has.
fn node_ports(pod: &Pod, others: &[Arc<Pod>]) -> Result<(), Rejection> {
    let wanted = host_ports(pod);
    let taken = || others.iter().flat_map(|other| host_ports(other));
    if wanted.is_empty() || !taken().any(|port| wanted.iter().any(|w| w.meets(&port))) {
        return Ok(());
    }
    Err(rejection(
        "NodePorts",
        "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports",
    ))
}

/// A port of the node that a container asks for.
#[derive(Debug)]
struct HostPort<'a> {
    address: &'a str,
    protocol: &'a str,
    port: i32,
}

/// Every address of the node.
const ANY_ADDRESS: &str = "0.0.0.0";

impl HostPort<'_> {
    /// Whether both cannot be had.
    fn meets(&self, other: &HostPort<'_>) -> bool {
        let same_address = self.address == other.address
            || self.address == ANY_ADDRESS
            || other.address == ANY_ADDRESS;
        same_address && self.port == other.port && self.protocol == other.protocol
    }
}

/// Of the containers, and of those init containers that go on running beside them.
fn host_ports(pod: &Pod) -> Vec<HostPort<'_>> {
    let Some(spec) = &pod.spec else {
        return Vec::new();
    };
    let beside = spec.init_containers.iter().flatten();
    let beside = beside.filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let ports = spec.containers.iter().chain(beside);
    let ports = ports.filter_map(|c| c.ports.as_ref()).flatten();
    ports
        .filter_map(|port| {
            let address = port.host_ip.as_deref().filter(|ip| !ip.is_empty());
            Some(HostPort {
                address: address.unwrap_or(ANY_ADDRESS),
                protocol: port.protocol.as_deref().unwrap_or("TCP"),
                port: port.host_port.filter(|port| *port > 0)?,
            })
        })
        .collect()
}

fn totals(pod: &Pod) -> Result<Amounts, String> {
    pod_totals(pod)
        .map(|t| t.requests)
        .map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::fixture::pod;
    use serde_json::{Value, json};

    fn check(spec: Value, others: &[Arc<Pod>], expected: Result<(), (&str, &str)>) {
        let allocatable = [("cpu", "2"), ("memory", "1Gi"), ("pods", "3")];
        let context = AdmissionContext {
            allocatable: allocatable
                .map(|(k, v)| (k.to_owned(), ApiQuantity(v.to_owned())))
                .into(),
            allowed_unsafe_sysctls: vec!["net.core.*".to_owned()],
        };
        let got = admit(&pod(spec), others, &context);
        assert_eq!(
            got,
            expected.map_err(|(reason, message)| rejection(reason, message))
        );
    }

    fn cpu(amount: &str) -> Value {
        json!({"containers": [{"name": "a", "resources": {"requests": {"cpu": amount}}}]})
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_numbers() {
        let other = Arc::new(pod(cpu("1500m")));
        check(cpu("500m"), std::slice::from_ref(&other), Ok(()));
        check(
            cpu("501m"),
            std::slice::from_ref(&other),
            Err((
                "OutOfcpu",
                "Node didn't have enough resource: cpu, requested: 501, used: 1500, capacity: 2000",
            )),
        );
        let three = [(); 3].map(|()| Arc::new(pod(cpu("0"))));
        check(
            cpu("0"),
            &three,
            Err((
                "OutOfpods",
                "Node didn't have enough resource: pods, requested: 1, used: 3, capacity: 3",
            )),
        );
    }

    #[test]
    fn a_profile_that_cannot_be_enforced_is_refused() {
        let message = "Cannot enforce AppArmor: AppArmor is not enabled on the host";
        let with = |kind: &str| json!({"appArmorProfile": {"type": kind}});
        for (kind, expected) in [
            ("RuntimeDefault", Err(("AppArmor", message))),
            ("Unconfined", Ok(())),
        ] {
            check(json!({"securityContext": with(kind)}), &[], expected);
            let container = json!({"name": "a", "securityContext": with(kind)});
            check(json!({"containers": [container]}), &[], expected);
        }
    }

    #[test]
    fn unsafe_sysctls_and_those_of_the_nodes_namespaces_are_refused() {
        let with = |name: &str| {
            json!({"securityContext": {"sysctls": [{"name": name, "value": "1"}]},
                "containers": []})
        };
        check(with("kernel.shm_rmid_forced"), &[], Ok(()));
        check(with("net.core.somaxconn"), &[], Ok(()));
        check(
            with("kernel.msgmax"),
            &[],
            Err((
                "SysctlForbidden",
                "forbidden sysctl: \"kernel.msgmax\" not allowlisted",
            )),
        );
        let mut host = with("net.ipv4.tcp_syncookies");
        host["hostNetwork"] = json!(true);
        check(
            host,
            &[],
            Err((
                "SysctlForbidden",
                "forbidden sysctl: \"net.ipv4.tcp_syncookies\" not allowed with host net enabled",
            )),
        );
    }

    #[test]
    fn a_port_of_the_node_is_given_once_for_each_address_and_protocol() {
        let with = |port: Value| json!({"containers": [{"name": "a", "ports": [port]}]});
        let other = Arc::new(pod(with(
            json!({"containerPort": 80, "hostPort": 8080, "hostIP": "10.0.0.1"}),
        )));
        let others = std::slice::from_ref(&other);
        let refused = Err((
            "NodePorts",
            "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports",
        ));
        for (wanted, expected) in [
            (json!({"containerPort": 1, "hostPort": 8080}), refused),
            (
                json!({"containerPort": 1, "hostPort": 8080, "hostIP": "10.0.0.1"}),
                refused,
            ),
            (
                json!({"containerPort": 1, "hostPort": 8080, "hostIP": "10.0.0.2"}),
                Ok(()),
            ),
            (
                json!({"containerPort": 1, "hostPort": 8080, "protocol": "UDP"}),
                Ok(()),
            ),
            (json!({"containerPort": 8080}), Ok(())),
        ] {
            check(with(wanted), others, expected);
        }
    }

    #[test]
    fn a_windows_pod_is_refused() {
        check(
            json!({"os": {"name": "windows"}, "containers": []}),
            &[],
            Err((
                "PodOSNotSupported",
                "Failed to admit pod as the OS field doesn't match node OS",
            )),
        );
    }
}
