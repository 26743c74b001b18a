//! One VXLAN device as planned: adopted, mended, or made anew where it cannot be mended.

use linux::netlink::{AddressSpec, Change, Link, Outcome, Rtnl};
use tracing::info;

use super::KernelError;
use super::settings::keep_device_settings;
use crate::peers::{ALIAS, DevicePlan};

/// A device that is as planned.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kept {
    pub(super) index: u32,
    /// How many changes that took.
    pub(super) changes: u64,
}

/// Makes the device as planned. `flannel`: this node was flannel's, so that a device of flannel's
/// in our place is a leftover.
pub(super) fn ensure(
    rtnl: &mut Rtnl,
    plan: &DevicePlan,
    flannel: bool,
) -> Result<Kept, KernelError> {
    let mut changes = 0;
    let name = &plan.spec.name;
    let found = match rtnl.link_by_name(name)? {
        Some(link) if !ours(&link, plan) => {
            return Err(KernelError::Other(format!(
                "link {name} exists and is not ours (kind {:?}, alias {:?}): remove or rename it",
                link.kind, link.alias
            )));
        }
        Some(link) if link.vxlan.as_ref() != Some(&plan.spec.config) => {
            info!(
                "Making {name} anew: it is {:?}, wanted is {:?}",
                link.vxlan, plan.spec.config
            );
            remove(rtnl, name)?;
            changes += 1;
            None
        }
        found => found,
    };
    let link = match found {
        Some(link) => link,
        None => {
            changes += 1;
            create(rtnl, plan, flannel)?
        }
    };
    changes += mend(rtnl, plan, &link)?;
    changes += keep_device_settings(plan)?;
    Ok(Kept {
        index: link.index,
        changes,
    })
}

/// By its mark; without one it was made and not yet marked, which the name and the identifier tell.
fn ours(link: &Link, plan: &DevicePlan) -> bool {
    let same_vni = |link: &Link| {
        let config = link.vxlan.as_ref();
        config.is_some_and(|config| config.vni == plan.spec.config.vni)
    };
    link.alias == plan.spec.alias || (link.alias.is_empty() && same_vni(link))
}

fn remove(rtnl: &mut Rtnl, name: &str) -> Result<(), KernelError> {
    let name = name.to_owned();
    rtnl.apply(&[Change::RemoveLink { name }])?;
    Ok(())
}

fn create(rtnl: &mut Rtnl, plan: &DevicePlan, flannel: bool) -> Result<Link, KernelError> {
    let add = Change::AddVxlan(plan.spec.clone());
    if rtnl.apply(std::slice::from_ref(&add))? == [Outcome::Unchanged] {
        make_room(rtnl, plan, flannel)?;
        rtnl.apply(&[add])?;
    }
    let made = rtnl.link_by_name(&plan.spec.name)?;
    made.ok_or_else(|| {
        let config = &plan.spec.config;
        KernelError::Other(format!(
            "vxlan device {} was not made: VNI {} on UDP port {} is in use",
            plan.spec.name, config.vni, config.port
        ))
    })
}

/// The kernel has one device per identifier, port and family.
fn make_room(rtnl: &mut Rtnl, plan: &DevicePlan, flannel: bool) -> Result<(), KernelError> {
    let config = &plan.spec.config;
    let v4 = config.local.is_none_or(|local| local.is_ipv4());
    let devices = rtnl.links_of_kind("vxlan")?;
    let in_the_way = devices.into_iter().find(|link| {
        let theirs = link.vxlan.as_ref();
        let same = |theirs: &&linux::netlink::VxlanConfig| {
            theirs.vni == config.vni
                && theirs.port == config.port
                && theirs.local.is_none_or(|local| local.is_ipv4()) == v4
        };
        link.name != plan.spec.name && theirs.filter(same).is_some()
    });
    let Some(other) = in_the_way else {
        return Ok(());
    };
    let flannels = [
        format!("flannel.{}", config.vni),
        format!("flannel-v6.{}", config.vni),
    ];
    if other.alias.starts_with(ALIAS) || (flannel && flannels.contains(&other.name)) {
        info!(
            "Removing {}, which {} takes the place of",
            other.name, plan.spec.name
        );
        return remove(rtnl, &other.name);
    }
    Err(KernelError::Other(format!(
        "link {} has VNI {} on UDP port {} already and is not ours: remove it, or choose another \
         Backend.VNI or Backend.Port",
        other.name, config.vni, config.port
    )))
}

/// What can be changed on a device that is there.
fn mend(rtnl: &mut Rtnl, plan: &DevicePlan, link: &Link) -> Result<u64, KernelError> {
    let index = link.index;
    let mut changes = Vec::new();
    if link.alias != plan.spec.alias {
        let alias = plan.spec.alias.clone();
        changes.push(Change::SetAlias { index, alias });
    }
    if link.mac != Some(plan.spec.mac) {
        let mac = plan.spec.mac;
        changes.push(Change::SetMac { index, mac });
    }
    if link.mtu_bytes != plan.spec.mtu_bytes {
        let mtu_bytes = plan.spec.mtu_bytes;
        changes.push(Change::SetMtu { index, mtu_bytes });
    }
    if !link.up {
        changes.push(Change::NoLinkLocal { index });
        changes.push(Change::SetUp { index, up: true });
    }
    let wanted = AddressSpec {
        index,
        address: plan.address,
        prefix_len: if plan.address.is_ipv4() { 32 } else { 128 },
        detect_duplicates: false,
    };
    let found = rtnl.addresses_of(index)?;
    for other in &found {
        let own = match other.address {
            std::net::IpAddr::V6(v6) => v6.is_unicast_link_local(),
            std::net::IpAddr::V4(_) => false,
        };
        if *other != wanted && !own {
            changes.push(Change::RemoveAddress(other.clone()));
        }
    }
    if !found.contains(&wanted) {
        changes.push(Change::AddAddress(wanted));
    }
    let outcomes = rtnl.apply(&changes)?;
    let done = outcomes.iter().filter(|outcome| **outcome == Outcome::Done);
    Ok(done.count() as u64)
}

/// Removes devices of ours with other names: of a former configuration.
pub(super) fn remove_former(rtnl: &mut Rtnl, names: &[&str]) -> Result<u64, KernelError> {
    let mut removed = 0;
    for link in rtnl.links_of_kind("vxlan")? {
        if link.alias.starts_with(ALIAS) && !names.contains(&link.name.as_str()) {
            info!("Removing {}, which a former configuration made", link.name);
            remove(rtnl, &link.name)?;
            removed += 1;
        }
    }
    Ok(removed)
}
