//! Where addresses come from: our allocator in this process, or another plugin.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use linux::netlink::Rtnl;
use serde_json::{Map, Value};

use super::names;
use crate::ipam::{self, AllocateError, DirStore, HostLocal, Owner, Pool};
use crate::skel::{AttachmentKey, Input, Verb, delegate};
use crate::types::{AttachResult, CniError, ErrorCode, IpConfig};

/// Where addresses come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ipam {
    /// Nowhere: a link and no more.
    None,
    /// Ranges of the configuration, allocated in this process.
    HostLocal,
    /// Another plugin.
    Delegated(String),
}

impl Ipam {
    /// What the configuration's `ipam` says.
    ///
    /// # Errors
    /// Code 7 naming the key.
    pub fn parse(conf: &Map<String, Value>) -> Result<Self, CniError> {
        let invalid = |msg: String| CniError::new(ErrorCode::InvalidConfig, msg);
        let ipam = match conf.get("ipam") {
            None | Some(Value::Null) => return Ok(Self::None),
            Some(Value::Object(ipam)) => ipam,
            Some(other) => return Err(invalid(format!("ipam is {other}, not an object"))),
        };
        match ipam.get("type") {
            None if ipam.is_empty() => Ok(Self::None),
            None => Err(invalid("ipam.type is missing".into())),
            Some(Value::String(kind)) if kind.is_empty() => Ok(Self::None),
            Some(Value::String(kind)) if kind == "host-local" => Ok(Self::HostLocal),
            Some(Value::String(kind)) => Ok(Self::Delegated(kind.clone())),
            Some(other) => Err(invalid(format!("ipam.type is {other}, not a string"))),
        }
    }
}

/// Addresses and routes for the container, without interfaces.
///
/// # Errors
/// Code 102 when none is free, 7 for a bad key, 5 when leases cannot be kept; a delegate's own.
pub fn allocate(input: &Input<'_>, ipam: &Ipam, rtnl: &mut Rtnl) -> Result<AttachResult, CniError> {
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
        let name = names::host_name(&input.conf.name, &lease.owner);
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
///
/// # Errors
/// When leases cannot be kept, or the delegate's own; repeat then.
pub fn free(input: &Input<'_>, ipam: &Ipam) -> Result<(), CniError> {
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
///
/// # Errors
/// Code 101 for a difference, or the delegate's own.
pub fn check(input: &Input<'_>, ipam: &Ipam, previous: &AttachResult) -> Result<(), CniError> {
    match ipam {
        Ipam::None => Ok(()),
        Ipam::HostLocal => {
            use crate::ipam::Store;
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
///
/// # Errors
/// When leases cannot be kept, or the delegate's own; repeat then.
pub fn collect(input: &Input<'_>, ipam: &Ipam, valid: &[AttachmentKey]) -> Result<(), CniError> {
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
///
/// # Errors
/// Code 50, or the delegate's own.
pub fn status(input: &Input<'_>, ipam: &Ipam) -> Result<(), CniError> {
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
#[must_use]
pub fn subnets(input: &Input<'_>, ipam: &Ipam, result: &AttachResult) -> Vec<IpNet> {
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

/// The directory that the network's state is kept below.
///
/// # Errors
/// Code 7 when the configuration names a bad one.
pub fn state_dir(input: &Input<'_>, ipam: &Ipam) -> Result<PathBuf, CniError> {
    match ipam {
        Ipam::HostLocal => Ok(host_local(input)?.dir),
        Ipam::None | Ipam::Delegated(_) => Ok(ipam::DEFAULT_DIR.into()),
    }
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
