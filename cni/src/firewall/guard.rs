//! `macspoofchk`: a pod may send from its own hardware address only. Two sets and one rule, on
//! frames as they come into the bridge, however many pods are guarded.

use linux::nft::{
    BRIDGE_TABLE, Chain, Element, Expr, Hook, Kind, NetlinkError, Nft, Part, Rule, Sense, Set,
    Transaction,
};

use crate::ipam::Owner;
use crate::records::Guard;

const CHAIN: &str = "sources";
const PORTS: &str = "guarded";
const ALLOWED: &str = "allowed";

fn chain() -> Chain {
    Chain {
        name: CHAIN.into(),
        hook: Some(Hook::BridgeIn),
        rules: vec![Rule {
            exprs: vec![
                Expr::InInterfaceIn(PORTS.into()),
                Expr::HardwareSourceIn(Sense::Not, ALLOWED.into()),
                Expr::Drop,
            ],
            comment: "hardware addresses that are not the pod's".into(),
        }],
    }
}

fn make() -> Transaction {
    let ports = Set {
        name: PORTS.into(),
        key: vec![Kind::Interface],
        value: vec![],
    };
    let allowed = Set {
        name: ALLOWED.into(),
        key: vec![Kind::Interface, Kind::Hardware],
        value: vec![],
    };
    Transaction::on(BRIDGE_TABLE)
        .put_set(&ports)
        .put_set(&allowed)
        .put_chain(&chain())
}

/// The elements of a guarded port.
#[must_use]
pub fn guard_elements(guard: &Guard, owner: &Owner) -> [Element; 2] {
    let owner: String = owner.to_string().chars().take(120).collect();
    let port = Part::Interface(guard.port.clone());
    let element = |set: &str, key| Element {
        set: set.into(),
        key,
        value: vec![],
        owner: owner.clone(),
    };
    [
        element(ALLOWED, vec![port.clone(), Part::Hardware(guard.mac())]),
        element(PORTS, vec![port]),
    ]
}

/// Guards a port. When the rules are gone they are put back with everyone in `all`, which is read
/// only then.
///
/// # Errors
/// [`NetlinkError`] through `E`.
pub fn ensure_guard<E: From<NetlinkError>>(
    nft: &mut Nft,
    guard: &Guard,
    owner: &Owner,
    all: impl FnOnce() -> Result<Vec<(Owner, Guard)>, E>,
) -> Result<(), E> {
    if nft.uses_of(BRIDGE_TABLE, CHAIN)? != Some(chain().rules.len()) {
        let everyone = all()?;
        let elements = everyone.iter().flat_map(|(o, g)| guard_elements(g, o));
        let elements: Vec<Element> = elements.collect();
        nft.commit(&make().put_elements(&elements))?;
    }
    let elements = guard_elements(guard, owner);
    nft.commit(&Transaction::on(BRIDGE_TABLE).put_elements(&elements))?;
    Ok(())
}

/// Takes a guard away; none there is success.
///
/// # Errors
/// [`NetlinkError`]; repeat then.
pub fn remove_guard(nft: &mut Nft, guard: &Guard, owner: &Owner) -> Result<(), NetlinkError> {
    let mut transaction = Transaction::on(BRIDGE_TABLE);
    let mut any = false;
    for element in guard_elements(guard, owner) {
        if nft.look_up(BRIDGE_TABLE, &element)?.is_some() {
            transaction = transaction.remove_element(&element);
            any = true;
        }
    }
    if any {
        nft.commit(&transaction)
    } else {
        Ok(())
    }
}

/// Whether a port is guarded.
///
/// # Errors
/// [`NetlinkError`] when the kernel cannot be asked.
pub fn guard_is_there(nft: &mut Nft, guard: &Guard, owner: &Owner) -> Result<bool, NetlinkError> {
    if nft.uses_of(BRIDGE_TABLE, CHAIN)? != Some(chain().rules.len()) {
        return Ok(false);
    }
    for element in guard_elements(guard, owner) {
        if nft.look_up(BRIDGE_TABLE, &element)?.is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}
