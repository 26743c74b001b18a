//! Masquerade as data: one static chain per network, never a rule per container, so that ADD and
//! DEL touch no rules once the chain is there and its cost does not grow with the pods.

use ipnet::IpNet;
use linux::netlink::NetlinkError;
use linux::nft::{Chain, Expr, Family, Hook, Nft, Prefix, Rule, Sense};

use super::{prefix, short_hash};

/// All chains of a network begin so: one made for a former configuration is told from the present
/// one by the rest of its name.
#[must_use]
pub fn masquerade_prefix(network: &str) -> String {
    format!("masq-{:08x}-", short_hash(network.as_bytes()))
}

/// What leaves the network's subnets for elsewhere gets the node's address. Destinations inside
/// the subnets, multicast, and `except` keep the source.
#[must_use]
pub fn masquerade(network: &str, subnets: &[IpNet], except: &[IpNet]) -> Chain {
    let rules: Vec<Rule> = subnets
        .iter()
        .map(|subnet| rule(network, *subnet, subnets, except))
        .collect();
    let except = format!("{except:?}");
    Chain {
        name: format!(
            "{}{:08x}",
            subnets_prefix(network, subnets),
            short_hash(except.as_bytes())
        ),
        hook: Some(Hook::SourceNat),
        rules,
    }
}

fn subnets_prefix(network: &str, subnets: &[IpNet]) -> String {
    let subnets = format!("{subnets:?}");
    let subnets = short_hash(subnets.as_bytes());
    format!("{}{subnets:08x}-", masquerade_prefix(network))
}

/// Puts the chain in place of one that excepts other destinations for the same subnets. Chains of
/// the network's other subnets stay: containers may have been given other ranges each. `true` when
/// anything was made.
///
/// # Errors
/// When the kernel refuses.
pub fn ensure_masquerade(
    nft: &mut Nft,
    network: &str,
    subnets: &[IpNet],
    except: &[IpNet],
) -> Result<bool, NetlinkError> {
    let chain = masquerade(network, subnets, except);
    if !nft.ensure_chain(&chain)? {
        return Ok(false);
    }
    let prefix = subnets_prefix(network, subnets);
    for name in nft.chains()? {
        if name.starts_with(&prefix) && name != chain.name {
            nft.remove_chain(&name)?;
        }
    }
    Ok(true)
}

fn rule(network: &str, subnet: IpNet, subnets: &[IpNet], except: &[IpNet]) -> Rule {
    let v4 = subnet.addr().is_ipv4();
    let multicast = if v4 {
        [224, 0, 0, 0].into()
    } else {
        [0xff00, 0, 0, 0, 0, 0, 0, 0].into()
    };
    let same_family = |net: &&IpNet| net.addr().is_ipv4() == v4;
    let kept = subnets
        .iter()
        .chain(except)
        .filter(same_family)
        .map(|net| prefix(*net));
    let multicast = Prefix {
        address: multicast,
        len: if v4 { 4 } else { 8 },
    };
    let mut exprs = vec![
        Expr::Family(Family::of(subnet.addr())),
        Expr::Source(Sense::Is, prefix(subnet)),
    ];
    let kept = kept.chain([multicast]);
    exprs.extend(kept.map(|net| Expr::Destination(Sense::Not, net)));
    exprs.push(Expr::Masquerade);
    Rule {
        exprs,
        comment: format!("network {network}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(all: &[&str]) -> Vec<IpNet> {
        all.iter().map(|net| net.parse().unwrap()).collect()
    }

    #[test]
    fn each_subnet_keeps_to_its_family() {
        let subnets = nets(&["10.1.0.0/24", "fd00::/64"]);
        let chain = masquerade("net", &subnets, &nets(&["10.0.0.0/8"]));
        let except = |i: usize| -> Vec<String> {
            let all = chain.rules[i].exprs.iter();
            all.filter_map(|expr| match expr {
                Expr::Destination(Sense::Not, p) => Some(format!("{}/{}", p.address, p.len)),
                _ => None,
            })
            .collect()
        };
        assert_eq!(except(0), ["10.1.0.0/24", "10.0.0.0/8", "224.0.0.0/4"]);
        assert_eq!(except(1), ["fd00::/64", "ff00::/8"]);
    }

    #[test]
    fn another_configuration_has_another_name_under_the_same_prefix() {
        let one = masquerade("net", &nets(&["10.1.0.0/24"]), &[]);
        let two = masquerade("net", &nets(&["10.2.0.0/24"]), &[]);
        assert_ne!(one.name, two.name);
        let prefix = masquerade_prefix("net");
        assert!(one.name.starts_with(&prefix) && two.name.starts_with(&prefix));
        assert!(!one.name.starts_with(&masquerade_prefix("other")));
    }

    #[test]
    fn other_exceptions_take_the_place_of_the_former_and_other_subnets_stay() {
        let netns = linux::netlink::new_netns().expect("root is needed");
        let mut nft = Nft::open_in(std::os::fd::AsFd::as_fd(&netns)).unwrap();
        let (one, other) = (nets(&["10.1.0.0/24"]), nets(&["10.2.0.0/24"]));
        let mut ensure = |subnets: &[IpNet], except: &[&str]| {
            let except = nets(except);
            let made = ensure_masquerade(&mut nft, "net", subnets, &except).unwrap();
            (made, nft.chains().unwrap())
        };
        assert!(ensure(&one, &["10.0.0.0/8"]).0);
        assert!(!ensure(&one, &["10.0.0.0/8"]).0);
        assert_eq!(ensure(&other, &[]).1.len(), 2);
        let (made, chains) = ensure(&one, &["10.0.0.0/9"]);
        let wanted = [
            masquerade("net", &other, &[]).name,
            masquerade("net", &one, &nets(&["10.0.0.0/9"])).name,
        ];
        assert!(made && chains.len() == 2, "{chains:?}");
        assert!(
            wanted.iter().all(|name| chains.contains(name)),
            "{chains:?}"
        );
    }
}
