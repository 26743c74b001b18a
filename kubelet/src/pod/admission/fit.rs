//! Whether a pod's requests and ports fit beside those of others. Pure.

use crate::launch::resources::{Amounts, pod_totals, totals_in_use};
use crate::pod::spec::{self, ContainerKind};
use crate::quantity::Quantity;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A resource of which there is not enough. CPU in thousandths, others in whole units.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// Its name.
    pub resource: String,
    /// What the pod asks for.
    pub requested: i64,
    /// What others take.
    pub used: i64,
    /// What there is.
    pub capacity: i64,
}

impl Shortage {
    /// How much would have to be freed.
    pub fn missing(&self) -> i64 {
        self.requested - (self.capacity - self.used)
    }
}

/// An amount as predicates count it.
pub fn number(resource: &str, amount: &Quantity) -> i64 {
    if resource == "cpu" {
        amount.milli_value()
    } else {
        amount.value()
    }
}

/// Resources with a domain of their own, of which device plugins or others know.
fn is_extended(name: &str) -> bool {
    name.contains('/') && !name.contains("kubernetes.io/") && !name.starts_with("requests.")
}

/// All resources of which there is not enough, the kubelet's own first.
///
/// # Errors
/// An amount that is no quantity.
pub fn shortages(
    pod: &Pod,
    others: &[Arc<Pod>],
    allocatable: &BTreeMap<String, ApiQuantity>,
) -> Result<Vec<Shortage>, String> {
    let capacity = |name: &str| {
        let amount = allocatable.get(name);
        amount.and_then(|q| Quantity::parse(&q.0).ok())
    };
    let mut found = Vec::new();
    if let Some(most) = capacity("pods") {
        let used = i64::try_from(others.len()).unwrap_or(i64::MAX);
        if used >= most.value() {
            found.push(Shortage {
                resource: "pods".to_owned(),
                requested: 1,
                used,
                capacity: most.value(),
            });
        }
    }
    let wanted = pod_totals(pod).map_err(|e| e.to_string())?.requests;
    if wanted.values().all(Quantity::is_zero) {
        return Ok(found);
    }
    let in_use = |p: &Arc<Pod>| totals_in_use(p).map(|t| t.requests).ok();
    let taken: Vec<Amounts> = others.iter().filter_map(in_use).collect();
    let rank = |name: &str| match name {
        "cpu" => 0,
        "memory" => 1,
        "ephemeral-storage" => 2,
        _ => 3,
    };
    let mut names: Vec<&String> = wanted.keys().collect();
    names.sort_by_key(|name| rank(name));
    for name in names {
        let requested = number(name, &wanted[name]);
        let most = match capacity(name) {
            Some(most) => number(name, &most),
            // A resource of the cluster the node does not know: not its business.
            None if is_extended(name) => continue,
            None => 0,
        };
        let of = |t: &Amounts| t.get(name).map_or(0, |q| number(name, q));
        let used = taken.iter().map(of).fold(0, i64::saturating_add);
        if requested > 0 && used.saturating_add(requested) > most {
            found.push(Shortage {
                resource: name.clone(),
                requested,
                used,
                capacity: most,
            });
        }
    }
    Ok(found)
}

/// Host ports of a pod: address, protocol, port.
fn host_ports(pod: &Pod) -> impl Iterator<Item = (&str, &str, i32)> {
    let containers = pod.spec.iter().flat_map(spec::containers);
    let lasting = containers.filter(|c| c.kind != ContainerKind::Init);
    lasting
        .flat_map(|c| c.spec.ports.iter().flatten())
        .filter_map(|port| {
            let number = port.host_port.filter(|p| *p > 0)?;
            let address = port.host_ip.as_deref().filter(|ip| !ip.is_empty());
            let protocol = port.protocol.as_deref().filter(|p| !p.is_empty());
            Some((
                address.unwrap_or("0.0.0.0"),
                protocol.unwrap_or("TCP"),
                number,
            ))
        })
}

/// Whether no other pod has one of the pod's host ports. The address `0.0.0.0` is all addresses.
pub fn ports_are_free(pod: &Pod, others: &[Arc<Pod>]) -> bool {
    let used: Vec<_> = others.iter().flat_map(|p| host_ports(p)).collect();
    host_ports(pod).all(|(address, protocol, port)| {
        !used.iter().any(|(other, other_protocol, other_port)| {
            let overlap = address == *other || address == "0.0.0.0" || *other == "0.0.0.0";
            overlap && protocol == *other_protocol && port == *other_port
        })
    })
}
