//! `ingressPolicy` of containernetworking's `firewall`: bridges that may not talk to each other.
//!
//! Two sets and one rule for all bridges: what goes from one of these bridges to one of these
//! bridges is dropped, unless the pair is allowed. `same-bridge` allows the pair of a bridge with
//! itself, `isolated` does not. What comes from elsewhere is none of this rule's business.

use linux::nft::{
    Chain, Element, Expr, Hook, Kind, NetlinkError, Nft, Part, Rule, Sense, Set, TABLE, Transaction,
};

use crate::keys::{self, Object};
use crate::types::CniError;

const CHAIN: &str = "isolation";
const BRIDGES: &str = "isolated";
const ALLOWED: &str = "allowed-pairs";

/// Who may connect to a pod.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Isolation {
    /// `open`: everyone.
    #[default]
    Open,
    /// `same-bridge`: not pods on other such bridges.
    SameBridge,
    /// `isolated`: nor pods on the same one.
    Isolated,
}

impl Isolation {
    /// Reads `ingressPolicy`.
    ///
    /// # Errors
    /// Code 7 for another value.
    pub fn parse(conf: &Object) -> Result<Self, CniError> {
        match keys::text(conf, "ingressPolicy")? {
            None | Some("open") => Ok(Self::Open),
            Some("same-bridge") => Ok(Self::SameBridge),
            Some("isolated") => Ok(Self::Isolated),
            Some(other) => {
                let problem = format!("{other:?} is none of open, same-bridge, isolated");
                Err(keys::invalid("ingressPolicy", problem))
            }
        }
    }
}

fn chain() -> Chain {
    Chain {
        name: CHAIN.into(),
        hook: Some(Hook::Forward),
        rules: vec![Rule {
            exprs: vec![
                Expr::InInterfaceIn(BRIDGES.into()),
                Expr::OutInterfaceIn(BRIDGES.into()),
                Expr::InterfacesIn(Sense::Not, ALLOWED.into()),
                Expr::Drop,
            ],
            comment: "bridges that keep apart".into(),
        }],
    }
}

fn sets() -> [Set; 2] {
    let set = |name: &str, key| Set {
        name: name.into(),
        key,
        value: vec![],
    };
    [
        set(BRIDGES, vec![Kind::Interface]),
        set(ALLOWED, vec![Kind::Interface, Kind::Interface]),
    ]
}

fn elements(bridge: &str) -> [Element; 2] {
    let part = Part::Interface(bridge.to_owned());
    let element = |set: &str, key| Element {
        set: set.into(),
        key,
        value: vec![],
        owner: String::new(),
    };
    [
        element(BRIDGES, vec![part.clone()]),
        element(ALLOWED, vec![part.clone(), part]),
    ]
}

/// Carries a policy out for a bridge: one question when it is so already.
///
/// # Errors
/// [`NetlinkError`]; nothing was changed then.
pub fn isolate(nft: &mut Nft, bridge: &str, isolation: Isolation) -> Result<(), NetlinkError> {
    if isolation == Isolation::Open || isolation_is_there(nft, bridge, isolation)? {
        return Ok(());
    }
    let [member, pair] = elements(bridge);
    let had_pair = nft.look_up(TABLE, &pair)?.is_some();
    let make = sets()
        .iter()
        .fold(Transaction::on(TABLE), Transaction::put_set)
        .put_chain(&chain())
        .put_elements(&[member]);
    let make = match isolation {
        Isolation::SameBridge => make.put_elements(&[pair]),
        Isolation::Isolated if had_pair => make.remove_element(&pair),
        Isolation::Isolated | Isolation::Open => make,
    };
    nft.commit(&make)
}

/// Whether a policy is in force.
///
/// # Errors
/// [`NetlinkError`] when the kernel cannot be asked.
pub fn isolation_is_there(
    nft: &mut Nft,
    bridge: &str,
    isolation: Isolation,
) -> Result<bool, NetlinkError> {
    if isolation == Isolation::Open {
        return Ok(true);
    }
    if nft.rules_in(CHAIN)? != Some(chain().rules.len()) {
        return Ok(false);
    }
    let [member, pair] = elements(bridge);
    let allowed = nft.look_up(TABLE, &pair)?.is_some();
    let member = nft.look_up(TABLE, &member)?.is_some();
    Ok(member && allowed == (isolation == Isolation::SameBridge))
}

/// Forgets a bridge; one that was not known is success.
///
/// # Errors
/// [`NetlinkError`]; repeat then.
pub fn stop_isolating(nft: &mut Nft, bridge: &str) -> Result<(), NetlinkError> {
    let mut transaction = Transaction::on(TABLE);
    let mut any = false;
    for element in elements(bridge) {
        if nft.look_up(TABLE, &element)?.is_some() {
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_bridge_can_change_its_policy_and_be_forgotten() {
        let netns = linux::netlink::new_netns().expect("root is needed");
        let mut nft = Nft::open_in(netns.as_fd()).unwrap();
        for isolation in [
            Isolation::SameBridge,
            Isolation::Isolated,
            Isolation::SameBridge,
        ] {
            for _ in 0..2 {
                isolate(&mut nft, "br0", isolation).unwrap();
                assert!(isolation_is_there(&mut nft, "br0", isolation).unwrap());
            }
        }
        isolate(&mut nft, "br1", Isolation::Isolated).unwrap();
        assert!(isolation_is_there(&mut nft, "br0", Isolation::SameBridge).unwrap());
        stop_isolating(&mut nft, "br0").unwrap();
        stop_isolating(&mut nft, "br0").unwrap();
        assert!(!isolation_is_there(&mut nft, "br0", Isolation::SameBridge).unwrap());
        nft.remove_table().unwrap();
        stop_isolating(&mut nft, "br1").unwrap();
    }
}
