//! What all attachments of a network share: masquerade, isolation, and the records of rules.

use cni::attach::address;
use cni::attach::names;
use cni::attach::rules::Rules;
use cni::bandwidth;
use cni::firewall::{self, Isolation, xtables};
use cni::records::{Backend, Records};
use cni::skel::Input;
use cni::types::{AttachResult, CniError, ErrorCode};
use ipnet::IpNet;
use linux::netlink::{Change, Rtnl};
use linux::nft::Nft;

use crate::config::BridgeConf;
use crate::kernel;

/// The packet filter, as far as it concerns attachments of this network.
pub(crate) fn rules<'a>(
    input: &'a Input<'_>,
    conf: &'a BridgeConf,
    result: &AttachResult,
) -> Result<Rules<'a>, CniError> {
    let dir = address::state_dir(input, &conf.ipam)?;
    Ok(Rules {
        network: &input.conf.name,
        records: Records::of(&dir, &input.conf.name),
        ports: &conf.ports,
        admin_chain: conf.admin_chain.as_deref(),
        subnets: address::subnets(input, &conf.ipam, result),
    })
}

/// Puts the network's static rules in place, and after a flush by others everything else too.
pub(crate) fn ensure(
    input: &Input<'_>,
    conf: &BridgeConf,
    result: &AttachResult,
) -> Result<(), CniError> {
    let mut flushed = false;
    if let Some(backend) = conf.masquerade {
        let subnets = address::subnets(input, &conf.ipam, result);
        flushed = masquerade(input, conf, backend, &subnets)?;
    }
    if conf.isolation != Isolation::Open {
        Nft::open()
            .and_then(|mut nft| firewall::isolate(&mut nft, &conf.bridge, conf.isolation))
            .map_err(|e| kernel(&e))?;
    }
    if flushed {
        rules(input, conf, result)?.repair()?;
    }
    Ok(())
}

/// Whether anything had to be made.
fn masquerade(
    input: &Input<'_>,
    conf: &BridgeConf,
    backend: Backend,
    subnets: &[IpNet],
) -> Result<bool, CniError> {
    let network = &input.conf.name;
    match backend {
        Backend::Nftables => Nft::open()
            .and_then(|mut nft| {
                let except = &conf.masquerade_except;
                firewall::ensure_masquerade(&mut nft, network, subnets, except)
            })
            .map_err(|e| kernel(&e)),
        Backend::Iptables => {
            xtables::ensure_masquerade(network, subnets, &conf.masquerade_except)?;
            Ok(false)
        }
    }
}

/// The first thing that is not as [`ensure`] leaves it, as an error.
pub(crate) fn check(
    input: &Input<'_>,
    conf: &BridgeConf,
    previous: &AttachResult,
) -> Result<(), CniError> {
    let differs = |msg: String| Err(CniError::new(ErrorCode::StateDiffers, msg));
    let network = &input.conf.name;
    let subnets = address::subnets(input, &conf.ipam, previous);
    match conf.masquerade {
        Some(Backend::Nftables) => {
            let chain = firewall::masquerade(network, &subnets, &conf.masquerade_except);
            let rules = Nft::open()
                .and_then(|mut nft| nft.rules_in(&chain.name))
                .map_err(|e| kernel(&e))?;
            if rules != Some(chain.rules.len()) {
                let name = chain.name;
                return differs(format!("masquerade chain {name} is missing or incomplete"));
            }
        }
        Some(Backend::Iptables) => {
            let except = &conf.masquerade_except;
            let there = xtables::masquerade_is_there(network, &subnets, except)?;
            if !there {
                return differs("iptables lacks the network's masquerade".into());
            }
        }
        None => {}
    }
    if conf.isolation != Isolation::Open {
        let there = Nft::open().and_then(|mut nft| {
            firewall::isolation_is_there(&mut nft, &conf.bridge, conf.isolation)
        });
        if !there.map_err(|e| kernel(&e))? {
            return differs(format!("bridge {} is not kept apart", conf.bridge));
        }
    }
    Ok(())
}

/// Takes away everything of an attachment; what is not there is fine. The address is given back
/// only after nothing can use it any more. Goes on after a failure and tells the first; then the
/// address is kept.
pub(crate) fn detach(
    input: &Input<'_>,
    conf: &BridgeConf,
    rtnl: &mut Rtnl,
) -> Result<(), CniError> {
    let owner = input.owner();
    let rules = rules(input, conf, &AttachResult::default()).and_then(|r| r.remove(&owner));
    let links = remove_links(input, rtnl);
    rules.and(links)?;
    address::free(input, &conf.ipam)
}

fn remove_links(input: &Input<'_>, rtnl: &mut Rtnl) -> Result<(), CniError> {
    let (network, owner) = (&input.conf.name, input.owner());
    let name = names::host_name(network, &owner);
    let alias = names::alias(network, &owner);
    match rtnl.link_by_name(&name).map_err(|e| kernel(&e))? {
        Some(link) if !link.alias.is_empty() && link.alias != alias => {
            let msg = format!("link {name} belongs to {:?}, not to {alias:?}", link.alias);
            Err(CniError::new(ErrorCode::TryAgain, msg))
        }
        found => {
            // The device for limits may have outlived the pair, or a configuration that asked
            // for it.
            let mut changes = vec![bandwidth::removal(network, &owner)];
            if found.is_some() {
                changes.insert(0, Change::RemoveLink { name });
            }
            rtnl.apply(&changes).map(|_| ()).map_err(|e| kernel(&e))
        }
    }
}
