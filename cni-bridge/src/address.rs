//! Where addresses come from: our allocator in this process, or another plugin.

use std::net::IpAddr;
use std::path::Path;

use cni::ipam::{self, AllocateError, DirStore, HostLocal, Owner, Pool};
use cni::skel::{AttachmentKey, Input, Verb, delegate};
use cni::types::{AttachResult, CniError, ErrorCode, IpConfig};
use ipnet::IpNet;
use linux::netlink::Rtnl;

use crate::config::Ipam;
use crate::plan;

/// Addresses and routes for the container, without interfaces.
pub(crate) fn allocate(
    input: &Input<'_>,
    ipam: &Ipam,
    rtnl: &mut Rtnl,
) -> Result<AttachResult, CniError> {
    match ipam {
        Ipam::None => Ok(AttachResult::default()),
        Ipam::HostLocal => allocate_here(input, rtnl),
        Ipam::Delegated(kind) => {
            let answer = delegate(input, kind, Verb::Add).and_then(|stdout| {
                AttachResult::from_json(&stdout).map_err(|e| {
                    CniError::caused(ErrorCode::Delegate, format!("answer of {kind}"), &e)
                })
            });
            // The specification: a delegate whose ADD failed gets a DEL.
            if answer.is_err() {
                let _ = delegate(input, kind, Verb::Del);
            }
            let mut result = answer?;
            for ip in &mut result.ips {
                ip.interface = None;
            }
            if result.ips.is_empty() {
                let _ = delegate(input, kind, Verb::Del);
                let msg = format!("ipam plugin {kind:?} gave no address");
                return Err(CniError::new(ErrorCode::Delegate, msg));
            }
            Ok(result)
        }
    }
}

fn allocate_here(input: &Input<'_>, rtnl: &mut Rtnl) -> Result<AttachResult, CniError> {
    let conf = host_local(input)?;
    if conf.pool.sets.is_empty() {
        let msg = "ipam.ranges is missing, and so are ipam.subnet and runtimeConfig.ipRanges";
        return Err(CniError::new(ErrorCode::InvalidConfig, msg));
    }
    let owner = input.owner();
    let netns = input.netns.as_deref().unwrap_or(Path::new(""));
    let mut store = open(&conf, input)?;
    let rtnl = std::cell::RefCell::new(rtnl);
    // The veth dies with its namespace: a lease whose veth is gone and whose namespace path is
    // gone too belongs to the dead.
    let is_gone = |lease: &ipam::Lease| {
        let name = plan::host_name(&input.conf.name, &lease.owner);
        !lease.netns.exists() && matches!(rtnl.borrow_mut().link_by_name(&name), Ok(None))
    };
    let lease = ipam::allocate(&mut store, &conf.pool, &owner, netns, &conf.wanted, is_gone)
        .map_err(|e| refused(&e))?;
    drop(store);
    Ok(AttachResult {
        ips: lease
            .addresses
            .iter()
            .filter_map(|a| ip_config(&conf.pool, *a))
            .collect(),
        routes: conf.routes,
        dns: conf.dns,
        ..AttachResult::default()
    })
}

fn ip_config(pool: &Pool, address: IpAddr) -> Option<IpConfig> {
    let range = pool.sets.iter().find_map(|set| set.range_of(address))?;
    Some(IpConfig {
        address: IpNet::new(address, range.subnet.prefix_len()).ok()?,
        gateway: Some(range.gateway),
        interface: None,
    })
}

fn refused(error: &AllocateError) -> CniError {
    let code = match error {
        AllocateError::Exhausted(_) | AllocateError::Taken { .. } => ErrorCode::NoAddress,
        AllocateError::Foreign(_) | AllocateError::TwoOfOneSet(_) => ErrorCode::InvalidConfig,
        AllocateError::Store(_) => ErrorCode::Io,
    };
    CniError::caused(code, "allocate an address", error)
}

/// Gives back what the attachment holds; holding nothing is success.
pub(crate) fn free(input: &Input<'_>, ipam: &Ipam) -> Result<(), CniError> {
    match ipam {
        Ipam::None => Ok(()),
        Ipam::HostLocal => {
            let conf = host_local(input)?;
            let mut store = open(&conf, input)?;
            ipam::free(&mut store, &conf.pool, &input.owner())
                .map(|_| ())
                .map_err(|e| CniError::caused(ErrorCode::Io, "free the address", &e))
        }
        Ipam::Delegated(kind) => delegate(input, kind, Verb::Del).map(|_| ()),
    }
}

/// Sees whether the addresses of `previous` are held by this attachment.
pub(crate) fn check(
    input: &Input<'_>,
    ipam: &Ipam,
    previous: &AttachResult,
) -> Result<(), CniError> {
    match ipam {
        Ipam::None => Ok(()),
        Ipam::HostLocal => {
            use cni::ipam::Store;
            let conf = host_local(input)?;
            let store = open(&conf, input)?;
            for ip in &previous.ips {
                let holder = store
                    .holder(ip.address.addr())
                    .map_err(|e| CniError::caused(ErrorCode::Io, "read the lease", &e))?;
                if conf.pool.set_of(ip.address.addr()).is_some() && holder != Some(input.owner()) {
                    let msg = format!("address {} is not leased to {}", ip.address, input.owner());
                    return Err(CniError::new(ErrorCode::StateDiffers, msg));
                }
            }
            Ok(())
        }
        Ipam::Delegated(kind) => delegate(input, kind, Verb::Check).map(|_| ()),
    }
}

/// Frees the addresses of all but the valid attachments.
pub(crate) fn collect(
    input: &Input<'_>,
    ipam: &Ipam,
    valid: &[AttachmentKey],
) -> Result<(), CniError> {
    match ipam {
        Ipam::None => Ok(()),
        Ipam::HostLocal => {
            let conf = host_local(input)?;
            let mut store = open(&conf, input)?;
            let is_valid = |owner: &Owner| {
                let same = |key: &AttachmentKey| {
                    key.container_id == owner.container_id && key.ifname == owner.ifname
                };
                valid.iter().any(same)
            };
            ipam::collect(&mut store, &conf.pool, is_valid)
                .map(|_| ())
                .map_err(|e| CniError::caused(ErrorCode::Io, "free leases of the dead", &e))
        }
        Ipam::Delegated(kind) => delegate(input, kind, Verb::Gc).map(|_| ()),
    }
}

/// Whether an address can be given.
pub(crate) fn status(input: &Input<'_>, ipam: &Ipam) -> Result<(), CniError> {
    match ipam {
        Ipam::None => Ok(()),
        Ipam::HostLocal => {
            let not_ready = |e: &dyn std::fmt::Display| {
                CniError::new(
                    ErrorCode::NotAvailable,
                    format!("leases cannot be kept: {e}"),
                )
            };
            let conf = host_local(input)?;
            let store = open(&conf, input).map_err(|e| not_ready(&e))?;
            match ipam::available(&store, &conf.pool).map_err(|e| not_ready(&e))? {
                Ok(()) => Ok(()),
                Err(set) => {
                    let msg = format!("no address is free in {set}");
                    Err(CniError::new(ErrorCode::NotAvailable, msg))
                }
            }
        }
        Ipam::Delegated(kind) => delegate(input, kind, Verb::Status).map(|_| ()),
    }
}

/// Subnets that the network gives addresses from: those of the ranges, else of the result.
pub(crate) fn subnets(input: &Input<'_>, ipam: &Ipam, result: &AttachResult) -> Vec<IpNet> {
    let of_ranges = match ipam {
        Ipam::HostLocal => host_local(input).ok(),
        Ipam::None | Ipam::Delegated(_) => None,
    };
    let mut all: Vec<IpNet> = match of_ranges {
        Some(conf) => conf
            .pool
            .sets
            .iter()
            .flat_map(|set| set.ranges())
            .map(|range| range.subnet)
            .collect(),
        None => result.ips.iter().map(|ip| ip.address.trunc()).collect(),
    };
    all.sort();
    all.dedup();
    all
}

fn host_local(input: &Input<'_>) -> Result<HostLocal, CniError> {
    let asked = input.args.get("IP").map(String::as_str);
    HostLocal::parse(&input.conf.object, asked)
        .map_err(|e| CniError::new(ErrorCode::InvalidConfig, e.to_string()))
}

fn open(conf: &HostLocal, input: &Input<'_>) -> Result<DirStore, CniError> {
    DirStore::open(&conf.dir, &input.conf.name).map_err(|e| {
        let msg = format!("open the leases in {}", conf.dir.display());
        CniError::caused(ErrorCode::Io, msg, &e)
    })
}
