//! The attachment's addresses: our allocator over the node's podCIDRs, in this process.

use std::net::IpAddr;
use std::path::Path;

use cni::attach::names;
use cni::ipam::{self, AllocateError, DirStore, Lease, Owner, Pool, Store};
use cni::skel::Input;
use cni::types::{AttachResult, CniError, ErrorCode, IpConfig};
use linux::netlink::Rtnl;

use crate::conf::{RoutedConf, host_local};
use crate::plan;
use crate::state::NodeState;

/// Addresses with their gateways, and the routes and resolver settings asked for.
pub(crate) fn allocate(
    input: &Input<'_>,
    conf: &RoutedConf,
    state: &NodeState,
    rtnl: &mut Rtnl,
) -> Result<AttachResult, CniError> {
    let local = host_local(input, conf, state)?;
    let netns = input.netns.as_deref().unwrap_or(Path::new(""));
    let mut store = open(conf, input)?;
    let rtnl = std::cell::RefCell::new(rtnl);
    // The pair dies with its namespace: a lease whose veth is gone and whose namespace path is
    // gone too belongs to the dead.
    let is_gone = |lease: &Lease| {
        let name = names::host_name(&input.conf.name, &lease.owner);
        !lease.netns.exists() && matches!(rtnl.borrow_mut().link_by_name(&name), Ok(None))
    };
    let owner = input.owner();
    let lease = ipam::allocate(
        &mut store,
        &local.pool,
        &owner,
        netns,
        &local.wanted,
        is_gone,
    )
    .map_err(|e| refused(&e))?;
    let ip_config = |address: &IpAddr| {
        let range = local
            .pool
            .sets
            .iter()
            .find_map(|set| set.range_of(*address));
        IpConfig {
            address: plan::single(*address),
            gateway: range.map(|range| range.gateway),
            interface: None,
        }
    };
    Ok(AttachResult {
        ips: lease.addresses.iter().map(ip_config).collect(),
        routes: local.routes,
        dns: local.dns,
        ..AttachResult::default()
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

/// The pool, as far as it is known: without the agent's state addresses are still freed, and a
/// later ADD finds those that were not queued.
fn known_pool(input: &Input<'_>, conf: &RoutedConf) -> Pool {
    let state = conf.state().ok();
    let local = state.and_then(|state| host_local(input, conf, &state).ok());
    local.map_or(Pool { sets: Vec::new() }, |local| local.pool)
}

/// Gives back what the attachment holds; holding nothing is success.
pub(crate) fn free(input: &Input<'_>, conf: &RoutedConf) -> Result<(), CniError> {
    let pool = known_pool(input, conf);
    let mut store = open(conf, input)?;
    ipam::free(&mut store, &pool, &input.owner())
        .map(|_| ())
        .map_err(|e| CniError::caused(ErrorCode::Io, "free the address", &e))
}

/// Sees whether the addresses of `previous` are held by this attachment.
pub(crate) fn check(
    input: &Input<'_>,
    conf: &RoutedConf,
    previous: &AttachResult,
) -> Result<(), CniError> {
    let store = open(conf, input)?;
    for ip in &previous.ips {
        let holder = store
            .holder(ip.address.addr())
            .map_err(|e| CniError::caused(ErrorCode::Io, "read the lease", &e))?;
        if holder != Some(input.owner()) {
            let msg = format!("address {} is not leased to {}", ip.address, input.owner());
            return Err(CniError::new(ErrorCode::StateDiffers, msg));
        }
    }
    Ok(())
}

/// Frees the addresses of all but the valid attachments.
pub(crate) fn collect(
    input: &Input<'_>,
    conf: &RoutedConf,
    is_valid: impl Fn(&Owner) -> bool,
) -> Result<(), CniError> {
    let pool = known_pool(input, conf);
    let mut store = open(conf, input)?;
    ipam::collect(&mut store, &pool, is_valid)
        .map(|_| ())
        .map_err(|e| CniError::caused(ErrorCode::Io, "free leases of the dead", &e))
}

/// Whether an address can be given.
pub(crate) fn status(
    input: &Input<'_>,
    conf: &RoutedConf,
    state: &NodeState,
) -> Result<(), CniError> {
    let not_ready = |e: &dyn std::fmt::Display| {
        let msg = format!("leases cannot be kept: {e}");
        CniError::new(ErrorCode::NotAvailable, msg)
    };
    let local = host_local(input, conf, state)?;
    let store = open(conf, input).map_err(|e| not_ready(&e))?;
    match ipam::available(&store, &local.pool).map_err(|e| not_ready(&e))? {
        Ok(()) => Ok(()),
        Err(set) => {
            let msg = format!("no address is free in {set}");
            Err(CniError::new(ErrorCode::NotAvailable, msg))
        }
    }
}

fn open(conf: &RoutedConf, input: &Input<'_>) -> Result<DirStore, CniError> {
    DirStore::open(&conf.data_dir, &input.conf.name).map_err(|e| {
        let msg = format!("open the leases in {}", conf.data_dir.display());
        CniError::caused(ErrorCode::Io, msg, &e)
    })
}
