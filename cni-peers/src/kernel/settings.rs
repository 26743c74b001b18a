//! Kernel parameters that packets between nodes depend on.

use linux::sysctl::{Sysctl, SysctlError};
use tracing::info;

use crate::node::Family;
use crate::peers::{DevicePlan, Place, pod_cidr};

/// Sets a parameter unless it is so; returns how many changes that took.
fn keep(parts: &[&str], value: &str) -> Result<u64, SysctlError> {
    let sysctl = Sysctl::of(parts)?;
    let found = sysctl.read()?;
    if found == value {
        return Ok(0);
    }
    info!("Setting {} from {found} to {value}", parts.join("."));
    sysctl.write(value)?;
    Ok(1)
}

/// Lets the node forward, in the families of its pods.
pub(super) fn keep_forwarding(place: &Place<'_>) -> Result<u64, SysctlError> {
    let mut changes = 0;
    if pod_cidr(place.own, Family::V4).is_some() {
        changes += keep(&["net", "ipv4", "ip_forward"], "1")?;
    }
    if pod_cidr(place.own, Family::V6).is_some() {
        if let Some(underlay) = &place.underlays.v6 {
            // A node that forwards stops listening to routers, and would lose its default route:
            // 2 says "nonetheless".
            let accept = ["net", "ipv6", "conf", underlay.name.as_str(), "accept_ra"];
            if Sysctl::of(&accept)?.read()? == "1" {
                changes += keep(&accept, "2")?;
            }
        }
        changes += keep(&["net", "ipv6", "conf", "all", "forwarding"], "1")?;
    }
    Ok(changes)
}

/// A peer may send by another way than we answer (direct routing on one side only): strict
/// reverse path filtering would drop that. 2 is loose, and wins over a strict setting for all.
pub(super) fn keep_device_settings(plan: &DevicePlan) -> Result<u64, SysctlError> {
    let name = plan.spec.name.as_str();
    match plan.family {
        Family::V4 => keep(&["net", "ipv4", "conf", name, "rp_filter"], "2"),
        Family::V6 => {
            let conf = ["net", "ipv6", "conf", name];
            let of = |key: &'static str| [conf[0], conf[1], conf[2], conf[3], key];
            Ok(keep(&of("disable_ipv6"), "0")? + keep(&of("accept_ra"), "0")?)
        }
    }
}
