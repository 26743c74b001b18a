//! Whether this node takes a new pod. Pure. Reasons and messages are the stock kubelet's:
//! controllers and tests read them.

pub mod affinity;
pub mod fit;
pub mod preempt;

use super::environment::Rejection;
use crate::eviction::rank::EVICTED;
use crate::eviction::thresholds::Pressure;
use crate::launch::qos;
use fit::Shortage;
use k8s_openapi::api::core::v1::{Node, Pod, Taint};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What admission depends on besides the pods.
#[derive(Debug, Clone, Default)]
pub struct AdmissionContext {
    /// The Node's allocatable resources.
    pub allocatable: BTreeMap<String, ApiQuantity>,
    /// Unsafe sysctls allowed: names, or prefixes ending in `*`.
    pub allowed_unsafe_sysctls: Vec<String>,
    /// The node's name.
    pub node_name: String,
    /// The Node as last seen; labels and taints are not looked at before.
    pub node: Option<Arc<Node>>,
    /// What the node runs short of.
    pub pressures: BTreeSet<Pressure>,
    /// Features this node declares.
    pub declared_features: &'static [&'static str],
    /// Whether AppArmor profiles are enforced.
    pub apparmor: bool,
}

/// A pod may run here.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Admission {
    /// Once these are ended: they give room to a critical pod.
    pub preempt: Vec<Arc<Pod>>,
}

/// `status.reason` and event reason of a pod that gave room.
pub const PREEMPTING: &str = "Preempting";
/// Its message.
pub const PREEMPTED: &str = "Preempted in order to admit critical pod";

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

/// Decides about a new pod beside those that run here, or about a running one (which is not
/// among `others`) that asks for other resources.
///
/// # Errors
/// The reason for `status.reason` and the message for people.
pub fn admit(
    pod: &Pod,
    others: &[Arc<Pod>],
    context: &AdmissionContext,
) -> Result<Admission, Rejection> {
    pressure(pod, &context.pressures)?;
    sysctls(pod, &context.allowed_unsafe_sysctls)?;
    operating_system(pod)?;
    let admission = predicates(pod, others, context)?;
    apparmor(pod, context.apparmor)?;
    declared_features(pod, context.declared_features)?;
    Ok(admission)
}

/// A node that runs short takes critical pods only; when it is short of memory alone, also pods
/// that asked for some, and those that tolerate it.
fn pressure(pod: &Pod, pressures: &BTreeSet<Pressure>) -> Result<(), Rejection> {
    if pressures.is_empty() || preempt::is_critical(pod) {
        return Ok(());
    }
    if pressures.iter().all(|p| *p == Pressure::Memory) {
        let taint = Taint {
            key: "node.kubernetes.io/memory-pressure".to_owned(),
            effect: "NoSchedule".to_owned(),
            ..Taint::default()
        };
        if qos::class(pod) != qos::QosClass::BestEffort || affinity::tolerates_taint(pod, &taint) {
            return Ok(());
        }
    }
    let names: Vec<&str> = pressures.iter().map(|p| p.condition()).collect();
    let message = format!("The node had condition: [{}]. ", names.join(" "));
    Err(rejection(EVICTED, message))
}

fn rejection(reason: impl Into<String>, message: impl Into<String>) -> Rejection {
    Rejection {
        reason: reason.into(),
        message: message.into(),
    }
}

/// The pod names another operating system.
fn operating_system(pod: &Pod) -> Result<(), Rejection> {
    // A label of the pod, not a selector: that is what the stock kubelet looks at.
    let labels = pod.metadata.labels.as_ref();
    if labels
        .and_then(|l| l.get("kubernetes.io/os"))
        .is_some_and(|os| os != "linux")
    {
        return Err(rejection(
            "PodOSSelectorNodeLabelDoesNotMatch",
            "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label",
        ));
    }
    let os = pod
        .spec
        .as_ref()
        .and_then(|s| s.os.as_ref())
        .map(|os| os.name.as_str());
    if os.is_some_and(|os| os != "linux") {
        let message = "Failed to admit pod as the OS field doesn't match node OS";
        return Err(rejection("PodOSNotSupported", message));
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

/// What the scheduler checks, once more: it may not have known all, and static pods have none.
/// Where only resources are missing a critical pod gets them from others.
fn predicates(
    pod: &Pod,
    others: &[Arc<Pod>],
    context: &AdmissionContext,
) -> Result<Admission, Rejection> {
    let unexpected = |message: String| rejection("UnexpectedAdmissionError", message);
    let shortages = fit::shortages(pod, others, &context.allocatable).map_err(unexpected)?;
    let failed = failed_predicate(pod, others, context);
    let critical = preempt::is_critical(pod);
    match (shortages.first(), failed) {
        // Resources are no reason to refuse a critical pod.
        (Some(shortage), failed) if !critical || failed.is_none() => {
            if critical {
                let preempt = preempt::victims(pod, others, &shortages).map_err(unexpected)?;
                return Ok(Admission { preempt });
            }
            Err(out_of(shortage))
        }
        (_, Some((name, why))) => {
            let message = format!("Predicate {name} failed: {why}");
            Err(rejection(name, message))
        }
        (_, None) => Ok(Admission::default()),
    }
}

fn out_of(shortage: &Shortage) -> Rejection {
    let Shortage {
        resource,
        requested,
        used,
        capacity,
    } = shortage;
    rejection(
        format!("OutOf{resource}"),
        format!(
            "Node didn't have enough resource: {resource}, requested: {requested}, used: {used}, \
             capacity: {capacity}"
        ),
    )
}

/// The first predicate that fails, and why, in the scheduler's words.
fn failed_predicate(
    pod: &Pod,
    others: &[Arc<Pod>],
    context: &AdmissionContext,
) -> Option<(&'static str, &'static str)> {
    let labels = context
        .node
        .as_ref()
        .map(|n| n.metadata.labels.clone().unwrap_or_default());
    let name = &context.node_name;
    if labels.is_some_and(|labels| !affinity::matches(pod, name, &labels)) {
        return Some((
            "NodeAffinity",
            "node(s) didn't match Pod's node affinity/selector",
        ));
    }
    let wanted = pod.spec.as_ref().and_then(|s| s.node_name.as_ref());
    if wanted.is_some_and(|wanted| !wanted.is_empty() && wanted != name) {
        return Some(("NodeName", "node(s) didn't match the requested node name"));
    }
    if !fit::ports_are_free(pod, others) {
        return Some((
            "NodePorts",
            "node(s) didn't have free ports for the requested pod ports",
        ));
    }
    let spec = context.node.as_ref().and_then(|n| n.spec.as_ref());
    let taints = spec.and_then(|s| s.taints.as_deref()).unwrap_or_default();
    if !preempt::is_static(pod) && !affinity::tolerates(pod, taints) {
        return Some((
            "TaintToleration",
            "node(s) had taints that the pod didn't tolerate",
        ));
    }
    None
}

/// A profile the kernel cannot enforce.
fn apparmor(pod: &Pod, enabled: bool) -> Result<(), Rejection> {
    let Some(spec) = pod.spec.as_ref().filter(|_| !enabled) else {
        return Ok(());
    };
    let own = spec
        .security_context
        .as_ref()
        .and_then(|s| s.app_armor_profile.as_ref());
    let of_containers = super::spec::containers(spec)
        .filter_map(|c| c.spec.security_context.as_ref()?.app_armor_profile.as_ref());
    let annotations = pod.metadata.annotations.iter().flatten();
    let by_annotation = annotations.filter(|(key, value)| {
        key.starts_with("container.apparmor.security.beta.kubernetes.io/")
            && !value.is_empty()
            && *value != "unconfined"
    });
    let mut profiles = own.into_iter().chain(of_containers);
    if profiles.any(|p| p.type_ != "Unconfined") || by_annotation.count() > 0 {
        let message = "Cannot enforce AppArmor: AppArmor is not enabled on the host";
        return Err(rejection("AppArmor", message));
    }
    Ok(())
}

/// Features of newer nodes that the pod's spec relies on.
fn declared_features(pod: &Pod, declared: &[&str]) -> Result<(), Rejection> {
    let Some(spec) = &pod.spec else { return Ok(()) };
    let mut needed = Vec::new();
    let restarts_all = |c: super::spec::ContainerRef<'_>| {
        let rules = c.spec.restart_policy_rules.iter().flatten();
        rules
            .into_iter()
            .any(|r| r.action == "RestartAllContainers")
    };
    if super::spec::containers(spec).any(restarts_all) {
        needed.push("RestartAllContainersOnContainerExits");
    }
    if spec.host_network == Some(true) && spec.host_users == Some(false) {
        needed.push("UserNamespacesHostNetworkSupport");
    }
    needed.retain(|feature| !declared.contains(feature));
    if needed.is_empty() {
        return Ok(());
    }
    let message = format!(
        "Pod requires node features that are not available: {}",
        needed.join(", ")
    );
    Err(rejection("PodFeatureUnsupported", message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::fixture::pod;
    use serde_json::{Value, json};

    fn context() -> AdmissionContext {
        let allocatable = [("cpu", "2"), ("memory", "1Gi"), ("pods", "3")];
        let node = json!({"metadata": {"labels": {"disk": "ssd"}}, "spec": {"taints": [
            {"key": "out", "effect": "NoExecute"}]}});
        AdmissionContext {
            allocatable: allocatable
                .map(|(k, v)| (k.to_owned(), ApiQuantity(v.to_owned())))
                .into(),
            allowed_unsafe_sysctls: vec!["net.core.*".to_owned()],
            node_name: "n1".to_owned(),
            node: Some(Arc::new(serde_json::from_value(node).unwrap())),
            ..AdmissionContext::default()
        }
    }

    /// A pod that tolerates everything, with this spec.
    fn tolerant(mut spec: Value) -> Pod {
        if spec.get("tolerations").is_none() {
            spec["tolerations"] = json!([{"operator": "Exists"}]);
        }
        if spec.get("containers").is_none() {
            spec["containers"] = json!([{"name": "a"}]);
        }
        pod(spec)
    }

    #[track_caller]
    fn check(spec: Value, others: &[Arc<Pod>], expected: Result<(), (&str, &str)>) {
        let got = admit(&tolerant(spec), others, &context());
        assert_eq!(
            got.map(drop),
            expected.map_err(|(reason, message)| rejection(reason, message))
        );
    }

    #[test]
    fn selectors_names_ports_and_taints_are_checked_as_the_scheduler_does() {
        let predicate =
            |name: &'static str, why: &str| (name, format!("Predicate {name} failed: {why}"));
        let refused = |spec: Value, others: &[Arc<Pod>], (name, message): (&str, String)| {
            check(spec, others, Err((name, &message)));
        };
        refused(
            json!({"nodeSelector": {"disk": "hdd"}}),
            &[],
            predicate(
                "NodeAffinity",
                "node(s) didn't match Pod's node affinity/selector",
            ),
        );
        refused(
            json!({"nodeName": "n2"}),
            &[],
            predicate("NodeName", "node(s) didn't match the requested node name"),
        );
        let port = |ip: &str| {
            json!({"containers": [{"name": "a", "ports": [
                {"containerPort": 1, "hostPort": 8080, "hostIP": ip}]}]})
        };
        let other = Arc::new(pod(port("10.0.0.1")));
        let conflict = || {
            predicate(
                "NodePorts",
                "node(s) didn't have free ports for the requested pod ports",
            )
        };
        refused(port(""), std::slice::from_ref(&other), conflict());
        refused(port("10.0.0.1"), std::slice::from_ref(&other), conflict());
        check(port("10.0.0.2"), std::slice::from_ref(&other), Ok(()));
        refused(
            json!({"tolerations": []}),
            &[],
            predicate(
                "TaintToleration",
                "node(s) had taints that the pod didn't tolerate",
            ),
        );
        let mut from_file = pod(json!({"containers": []}));
        let source = ("kubernetes.io/config.source".to_owned(), "file".to_owned());
        from_file.metadata.annotations = Some([source].into());
        assert_eq!(admit(&from_file, &[], &context()), Ok(Admission::default()));
    }

    #[test]
    fn resources_of_the_cluster_are_not_the_nodes_business_but_huge_pages_are() {
        let with = |name: &str, amount: &str| json!({"containers": [{"name": "a", "resources": {"requests": {name: amount}}}]});
        check(with("example.com/dongle", "1"), &[], Ok(()));
        check(
            with("hugepages-2Mi", "2Mi"),
            &[],
            Err((
                "OutOfhugepages-2Mi",
                "Node didn't have enough resource: hugepages-2Mi, requested: 2097152, used: 0, \
                 capacity: 0",
            )),
        );
    }

    #[test]
    fn what_shrinks_takes_its_old_share_until_it_has_shrunk() {
        let mut other = pod(cpu("500m"));
        other.status = Some(
            serde_json::from_value(json!({"containerStatuses": [{
                "name": "a", "ready": true, "restartCount": 0, "image": "", "imageID": "",
                "resources": {"requests": {"cpu": "1500m"}}}]}))
            .unwrap(),
        );
        check(
            cpu("1"),
            &[Arc::new(other)],
            Err((
                "OutOfcpu",
                "Node didn't have enough resource: cpu, requested: 1000, used: 1500, capacity: 2000",
            )),
        );
    }

    #[test]
    fn a_critical_pod_gets_its_room_from_others() {
        let mut spec = cpu("1");
        spec["priority"] = json!(2_000_000_000);
        let others = [Arc::new(pod(cpu("1500m"))), Arc::new(pod(cpu("100m")))];
        let admitted = admit(&tolerant(spec.clone()), &others, &context()).unwrap();
        assert_eq!(admitted.preempt, others[..1]);
        spec["nodeName"] = json!("n2");
        let refused = admit(&tolerant(spec), &others, &context()).unwrap_err();
        assert_eq!(refused.reason, "NodeName");
    }

    #[test]
    fn a_node_that_runs_short_takes_only_pods_that_may_come_all_the_same() {
        let short = |pressures: &[Pressure], spec: Value| {
            let context = AdmissionContext {
                pressures: pressures.iter().copied().collect(),
                ..context()
            };
            admit(&tolerant(spec), &[], &context).err()
        };
        let other = json!({"tolerations": [{"key": "out", "operator": "Exists"}]});
        let refused = short(&[Pressure::Memory], other).unwrap();
        assert_eq!(refused.reason, "Evicted");
        assert_eq!(
            refused.message,
            "The node had condition: [MemoryPressure]. "
        );
        assert_eq!(short(&[Pressure::Memory], cpu("1m")), None);
        let tolerations = json!([{"operator": "Exists"}]);
        assert_eq!(
            short(&[Pressure::Memory], json!({"tolerations": tolerations})),
            None
        );
        let both = [Pressure::Disk, Pressure::Memory];
        let refused = short(&both, cpu("1m")).unwrap();
        assert_eq!(
            refused.message,
            "The node had condition: [MemoryPressure DiskPressure]. "
        );
        let critical = json!({"priority": 2_000_001_000});
        assert_eq!(short(&both, critical), None);
    }

    #[test]
    fn what_kernel_or_node_cannot_do_is_refused() {
        check(
            json!({"securityContext": {"appArmorProfile": {"type": "RuntimeDefault"}}}),
            &[],
            Err((
                "AppArmor",
                "Cannot enforce AppArmor: AppArmor is not enabled on the host",
            )),
        );
        check(
            json!({"securityContext": {"appArmorProfile": {"type": "Unconfined"}}}),
            &[],
            Ok(()),
        );
        let rule = json!({"action": "RestartAllContainers",
            "exitCodes": {"operator": "In", "values": [42]}});
        let restarter =
            json!({"name": "a", "restartPolicy": "Never", "restartPolicyRules": [rule]});
        check(
            json!({"containers": [restarter]}),
            &[],
            Err((
                "PodFeatureUnsupported",
                "Pod requires node features that are not available: RestartAllContainersOnContainerExits",
            )),
        );
        check(
            json!({"hostNetwork": true, "hostUsers": false}),
            &[],
            Err((
                "PodFeatureUnsupported",
                "Pod requires node features that are not available: UserNamespacesHostNetworkSupport",
            )),
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
