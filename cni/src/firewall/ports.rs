//! Host ports: connections to a port of the node go to a port of a pod.
//!
//! ```text
//! prerouting, output:  <conditions> to an address of this node? ──▶ one chain per family:
//!     mark what comes from the network itself or from loopback (its answer must come back by us)
//!     (address, protocol, port) or (protocol, port) in a map ──▶ pod's address and port
//!     not in a map: take the mark off
//! postrouting:  marked? take the mark off, masquerade
//! ```
//!
//! The rules are the network's and never change with the pods; a pod is an element of a map,
//! looked up by hash. Its comment says whose it is: an element is removed by its owner only, so a
//! late DEL takes nothing from the pod that was given the port meanwhile. Only packets *to the
//! node* are looked at (`fib daddr type local`): a hostIP that the node does not have catches
//! nobody else's traffic.

use std::net::IpAddr;

use ipnet::IpNet;
use linux::nft::{
    Chain, Element, Expr, Family, Hook, Kind, NetlinkError, Nft, Part, Prefix, Rule, Sense, Set,
    TABLE, Transaction,
};
use linux::sysctl::{Sysctl, SysctlError};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{conditions, prefix, short_hash};
use crate::ipam::Owner;
use crate::keys::{self, Object};
use crate::records::Backend;
use crate::types::{AttachResult, CniError};

/// The mark that asks for masquerade, unless `markMasqBit` says another bit.
const DEFAULT_MARK_BIT: u64 = 13;

/// A host port as asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortMapping {
    /// The node's address; none is every address.
    pub host_ip: Option<IpAddr>,
    /// The node's port.
    pub host_port: u16,
    /// The container's port.
    pub container_port: u16,
    /// IP protocol number.
    pub protocol: u8,
}

/// A host port that leads to an address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Forward {
    /// The node's address; none is every address of the family.
    pub host_ip: Option<IpAddr>,
    /// IP protocol number.
    pub protocol: u8,
    /// The node's port.
    pub host_port: u16,
    /// The container's address.
    pub to: IpAddr,
    /// The container's port.
    pub to_port: u16,
}

/// The keys of containernetworking's `portmap`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPorts {
    /// What was asked for.
    pub mappings: Vec<PortMapping>,
    /// Who carries it out.
    pub backend: Backend,
    /// Answers that would not come back by us are made to.
    pub snat: bool,
    /// Everything is masqueraded, not only that.
    pub masquerade_all: bool,
    /// The bit of the packet mark that asks for it.
    pub mark: u32,
    /// A chain of others that sets it (iptables only).
    pub external_mark_chain: Option<String>,
    /// Restrictions for IPv4, as written.
    pub conditions_v4: Vec<String>,
    /// Restrictions for IPv6, as written.
    pub conditions_v6: Vec<String>,
}

impl HostPorts {
    /// Reads a configuration.
    ///
    /// # Errors
    /// Code 7 naming the key, or 2 for what the backend cannot do.
    pub fn parse(conf: &Object) -> Result<Self, CniError> {
        let conditions_v4 = keys::texts(conf, "conditionsV4")?;
        let conditions_v6 = keys::texts(conf, "conditionsV6")?;
        let external_mark_chain = keys::text(conf, "externalSetMarkChain")?.map(str::to_owned);
        let bit = keys::number(conf, "markMasqBit", 0..=31)?;
        if bit.is_some() && external_mark_chain.is_some() {
            let problem = "cannot be combined with externalSetMarkChain";
            return Err(keys::invalid("markMasqBit", problem));
        }
        // Nobody writes an nft match with a dash in front, and every iptables match begins so.
        let of_iptables = |words: &[String]| {
            let first = words.first().map(|word| word.trim_start());
            first.is_some_and(|word| word.starts_with(['-', '!']))
        };
        let asks_iptables = [
            ("externalSetMarkChain", external_mark_chain.is_some()),
            ("conditionsV4", of_iptables(&conditions_v4)),
            ("conditionsV6", of_iptables(&conditions_v6)),
        ];
        let asking = asks_iptables.iter().find(|(_, asks)| *asks);
        let backend = match (keys::text(conf, "backend")?, asking) {
            (Some("nftables"), Some((key, _))) => {
                let problem = "is for iptables, but backend is \"nftables\"";
                return Err(keys::invalid(key, problem));
            }
            (Some("iptables"), _) | (None, Some(_)) => Backend::Iptables,
            (None | Some("nftables"), None) => Backend::Nftables,
            (Some("firewalld"), _) => {
                return Err(keys::unsupported(
                    "backend",
                    "\"firewalld\" is not supported",
                ));
            }
            (Some(other), _) => {
                let problem = format!("{other:?} is neither \"nftables\" nor \"iptables\"");
                return Err(keys::invalid("backend", problem));
            }
        };
        let ports = Self {
            mappings: mappings(conf)?,
            backend,
            snat: keys::flag(conf, "snat")?.unwrap_or(true),
            masquerade_all: keys::flag(conf, "masqAll")?.unwrap_or(false),
            mark: 1 << bit.unwrap_or(DEFAULT_MARK_BIT),
            external_mark_chain,
            conditions_v4,
            conditions_v6,
        };
        if backend == Backend::Nftables {
            conditions("conditionsV4", &ports.conditions_v4, Family::V4)?;
            conditions("conditionsV6", &ports.conditions_v6, Family::V6)?;
        }
        Ok(ports)
    }

    /// Where each port leads: to the first address of each family that the interface was given. A
    /// mapping with an address of the other family does not concern it; the unspecified address
    /// means every one of its family.
    #[must_use]
    pub fn forwards(&self, addresses: &[IpNet]) -> Vec<Forward> {
        let first = |v4: bool| {
            let mut all = addresses.iter().map(IpNet::addr);
            all.find(|address| address.is_ipv4() == v4)
        };
        let mut forwards = Vec::new();
        for to in [first(true), first(false)].into_iter().flatten() {
            for mapping in &self.mappings {
                let other_family = |ip: IpAddr| ip.is_ipv4() != to.is_ipv4();
                if mapping.host_ip.is_some_and(other_family) {
                    continue;
                }
                forwards.push(Forward {
                    host_ip: mapping.host_ip.filter(|ip| !ip.is_unspecified()),
                    protocol: mapping.protocol,
                    host_port: mapping.host_port,
                    to,
                    to_port: mapping.container_port,
                });
            }
        }
        forwards
    }
}

fn mappings(conf: &Object) -> Result<Vec<PortMapping>, CniError> {
    let Some(runtime) = keys::object(conf, "runtimeConfig")? else {
        return Ok(Vec::new());
    };
    let items = keys::list(runtime, "portMappings")?;
    let read = |(index, item): (usize, &Value)| {
        let at = format!("runtimeConfig.portMappings[{index}]");
        let wrong = keys::within(&at);
        let Value::Object(item) = item else {
            return Err(keys::invalid(&at, "is not an object"));
        };
        let port = |key: &str| match keys::number(item, key, 1..=65_535).map_err(&wrong)? {
            Some(port) => Ok(port as u16),
            None => Err(keys::invalid(&format!("{at}.{key}"), "is missing")),
        };
        let protocol = keys::text(item, "protocol").map_err(&wrong)?;
        let protocol = protocol.unwrap_or("tcp").to_ascii_lowercase();
        Ok(PortMapping {
            host_ip: keys::address(item, "hostIP").map_err(&wrong)?,
            host_port: port("hostPort")?,
            container_port: port("containerPort")?,
            protocol: match protocol.as_str() {
                "tcp" => 6,
                "udp" => 17,
                "sctp" => 132,
                other => {
                    let problem = format!("{other:?} is none of tcp, udp, sctp");
                    return Err(keys::invalid(&format!("{at}.protocol"), problem));
                }
            },
        })
    };
    items.iter().enumerate().map(read).collect()
}

/// All chains and maps of a network's host ports begin so.
#[must_use]
pub fn ports_prefix(network: &str) -> String {
    format!("port-{:08x}-", short_hash(network.as_bytes()))
}

/// The static part of a network's host ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortRules {
    maps: Vec<Set>,
    /// Those that are jumped to first.
    chains: Vec<Chain>,
    /// Its presence shows that the others are there, in this form.
    witness: (String, usize),
}

impl PortRules {
    /// Those of a network whose pods are in `subnets`. Another configuration has other names for
    /// its chains and the same maps.
    ///
    /// # Errors
    /// As [`HostPorts::parse`].
    pub fn of(network: &str, ports: &HostPorts, subnets: &[IpNet]) -> Result<Self, CniError> {
        let maps = ports_prefix(network);
        let contents = format!(
            "{}{}{}{:?}{:?}{subnets:?}",
            ports.snat, ports.masquerade_all, ports.mark, ports.conditions_v4, ports.conditions_v6,
        );
        let chain = format!("{maps}{:08x}-", short_hash(contents.as_bytes()));
        let mut chains = Vec::new();
        let mut entry = Vec::new();
        for (family, key, words, suffix) in [
            (Family::V4, "conditionsV4", &ports.conditions_v4, "4"),
            (Family::V6, "conditionsV6", &ports.conditions_v6, "6"),
        ] {
            let name = format!("{chain}{suffix}");
            let mut exprs = vec![Expr::Family(family)];
            exprs.extend(conditions(key, words, family)?);
            exprs.extend([Expr::DestinationIsLocal, Expr::Jump(name.clone())]);
            entry.push(rule(exprs, network));
            let mut rules = if ports.snat {
                marking(ports, family, subnets)
            } else {
                Vec::new()
            };
            for by_address in [true, false] {
                let map = map_name(&maps, family, by_address);
                // The family is known by now; said again, `nft list` can tell what is compared.
                let translate = Expr::DestinationNat {
                    map,
                    family,
                    by_address,
                };
                rules.push(vec![Expr::Family(family), translate]);
            }
            if ports.snat {
                rules.push(vec![unmark(ports.mark)]);
            }
            chains.push(Chain {
                name,
                hook: None,
                rules: rules
                    .into_iter()
                    .map(|exprs| rule(exprs, network))
                    .collect(),
            });
        }
        let based = |suffix: &str, hook, rules| Chain {
            name: format!("{chain}{suffix}"),
            hook: Some(hook),
            rules,
        };
        if ports.snat {
            let marked = Expr::Mark(Sense::Is, ports.mark, ports.mark);
            let exprs = vec![marked, unmark(ports.mark), Expr::Masquerade];
            let rules = vec![rule(exprs, network)];
            chains.push(based("post", Hook::SourceNat, rules));
        }
        chains.push(based("out", Hook::DestinationNatOutput, entry.clone()));
        let witness = (format!("{chain}in"), entry.len());
        chains.push(based("in", Hook::DestinationNat, entry));
        Ok(Self {
            maps: port_maps(&maps),
            chains,
            witness,
        })
    }

    fn make(&self) -> Transaction {
        let with_maps = self
            .maps
            .iter()
            .fold(Transaction::on(TABLE), Transaction::put_set);
        self.chains.iter().fold(with_maps, Transaction::put_chain)
    }
}

fn rule(exprs: Vec<Expr>, network: &str) -> Rule {
    Rule {
        exprs,
        comment: format!("host ports of network {network}"),
    }
}

fn unmark(mark: u32) -> Expr {
    Expr::SetMark {
        keep: !mark,
        flip: 0,
    }
}

/// What sets the mark: for connections whose answers would otherwise go past us, from the
/// network itself (they would be bridged) and from loopback.
fn marking(ports: &HostPorts, family: Family, subnets: &[IpNet]) -> Vec<Vec<Expr>> {
    let mark = Expr::SetMark {
        keep: !ports.mark,
        flip: ports.mark,
    };
    if ports.masquerade_all {
        return vec![vec![mark]];
    }
    let mut sources: Vec<Prefix> = subnets
        .iter()
        .filter(|net| Family::of(net.addr()) == family)
        .map(|net| prefix(*net))
        .collect();
    if family == Family::V4 {
        sources.push(Prefix {
            address: [127, 0, 0, 0].into(),
            len: 8,
        });
    }
    let marked = |source| {
        vec![
            Expr::Family(family),
            Expr::Source(Sense::Is, source),
            mark.clone(),
        ]
    };
    sources.into_iter().map(marked).collect()
}

fn map_name(prefix: &str, family: Family, by_address: bool) -> String {
    let family = if family == Family::V4 { "4" } else { "6" };
    let keyed = if by_address { "-address" } else { "" };
    format!("{prefix}{family}{keyed}")
}

fn port_maps(prefix: &str) -> Vec<Set> {
    let mut maps = Vec::new();
    for (family, address) in [(Family::V4, Kind::V4), (Family::V6, Kind::V6)] {
        for by_address in [true, false] {
            let mut key = vec![Kind::Transport, Kind::Port];
            if by_address {
                key.insert(0, address);
            }
            maps.push(Set {
                name: map_name(prefix, family, by_address),
                key,
                value: vec![address, Kind::Port],
            });
        }
    }
    maps
}

fn element(network: &str, forward: &Forward, owner: &Owner) -> Element {
    let family = Family::of(forward.to);
    let mut key = vec![
        Part::Transport(forward.protocol),
        Part::Port(forward.host_port),
    ];
    if let Some(host_ip) = forward.host_ip {
        key.insert(0, Part::Address(host_ip));
    }
    Element {
        set: map_name(&ports_prefix(network), family, forward.host_ip.is_some()),
        key,
        value: vec![Part::Address(forward.to), Part::Port(forward.to_port)],
        owner: mark_of(owner),
    }
}

/// As an element's comment has it: the kernel keeps 120 bytes and container ids have 64.
fn mark_of(owner: &Owner) -> String {
    let mut mark = owner.to_string();
    // Names are ASCII, so any place is a boundary.
    mark.truncate(120);
    mark
}

/// Leads an owner's host ports to its addresses: one question and one transaction. A port that
/// somebody else has goes over to the newcomer, who was given it by the runtime. When the rules
/// are gone, they are put back with everything in `all`, which is read only then.
///
/// # Errors
/// [`NetlinkError`]; [`remove_forwards`] undoes what was done.
pub fn add_forwards<E: From<NetlinkError>>(
    nft: &mut Nft,
    network: &str,
    rules: &PortRules,
    (owner, forwards): (&Owner, &[Forward]),
    all: impl FnOnce() -> Result<Vec<(Owner, Vec<Forward>)>, E>,
) -> Result<(), E> {
    if nft.rules_in(&rules.witness.0)? != Some(rules.witness.1) {
        nft.commit(&rules.make())?;
        restore(nft, network, &all()?)?;
    }
    let elements: Vec<Element> = forwards
        .iter()
        .map(|forward| element(network, forward, owner))
        .collect();
    if elements.is_empty() {
        return Ok(());
    }
    match nft.commit(&Transaction::on(TABLE).add_elements(&elements)) {
        Err(error) if is_taken(&error) => Ok(replace(nft, &elements)?),
        other => Ok(other?),
    }
}

fn is_taken(error: &NetlinkError) -> bool {
    // EEXIST: the same value; EBUSY: another.
    let taken = [17, 16];
    error.errno().is_some_and(|errno| taken.contains(&errno))
}

/// Puts elements in place of whatever is under their keys.
fn replace(nft: &mut Nft, elements: &[Element]) -> Result<(), NetlinkError> {
    let mut transaction = Transaction::on(TABLE);
    for element in elements {
        if nft.look_up(TABLE, element)?.is_some() {
            transaction = transaction.remove_element(element);
        }
    }
    nft.commit(&transaction.add_elements(elements))
}

/// Elements of all owners into maps that may have been flushed; of two owners of one port the
/// later one has it.
fn restore(
    nft: &mut Nft,
    network: &str,
    all: &[(Owner, Vec<Forward>)],
) -> Result<(), NetlinkError> {
    /// The socket holds the acknowledgements of so many messages easily.
    const PER_TRANSACTION: usize = 2000;
    let mut elements: Vec<Element> = Vec::new();
    for (owner, forwards) in all {
        elements.extend(forwards.iter().map(|f| element(network, f, owner)));
    }
    let mut seen = std::collections::HashSet::new();
    elements.reverse();
    elements.retain(|e| seen.insert(format!("{}{:?}", e.set, e.key)));
    for part in elements.chunks(PER_TRANSACTION) {
        match nft.commit(&Transaction::on(TABLE).put_elements(part)) {
            Err(error) if is_taken(&error) => replace(nft, part)?,
            other => other?,
        }
    }
    Ok(())
}

/// Takes away an owner's host ports; those that others have by now, or that are gone, stay so.
///
/// # Errors
/// [`NetlinkError`]; repeat then.
pub fn remove_forwards(
    nft: &mut Nft,
    network: &str,
    owner: &Owner,
    forwards: &[Forward],
) -> Result<(), NetlinkError> {
    let mut transaction = Transaction::on(TABLE);
    let mut any = false;
    for forward in forwards {
        let element = element(network, forward, owner);
        let found = nft.look_up(TABLE, &element)?;
        if found.is_some_and(|found| found.owner == element.owner) {
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

/// The first of an owner's host ports that does not lead where it should, if any, in words.
///
/// # Errors
/// [`NetlinkError`] when the kernel cannot be asked.
pub fn forwards_are_there(
    nft: &mut Nft,
    network: &str,
    rules: &PortRules,
    (owner, forwards): (&Owner, &[Forward]),
) -> Result<Result<(), String>, NetlinkError> {
    if nft.rules_in(&rules.witness.0)? != Some(rules.witness.1) {
        return Ok(Err(format!(
            "chain {} is missing or incomplete",
            rules.witness.0
        )));
    }
    for forward in forwards {
        let found = nft.look_up(TABLE, &element(network, forward, owner))?;
        if !found.is_some_and(|found| found.same_value) {
            let (port, to) = (forward.host_port, forward.to);
            return Ok(Err(format!("host port {port} does not lead to {to}")));
        }
    }
    Ok(Ok(()))
}

/// Takes away all chains and maps of a network's host ports. A dump: for garbage collection.
///
/// # Errors
/// [`NetlinkError`]; repeat then.
pub fn remove_port_rules(nft: &mut Nft, network: &str) -> Result<(), NetlinkError> {
    let prefix = ports_prefix(network);
    let ours: Vec<String> = nft
        .chains()?
        .into_iter()
        .filter(|name| name.starts_with(&prefix))
        .collect();
    if ours.is_empty() {
        return Ok(());
    }
    // Those with a hook jump to the others and go first.
    let inner = |name: &&String| name.ends_with("-4") || name.ends_with("-6");
    let (inner, based): (Vec<&String>, Vec<&String>) = ours.iter().partition(inner);
    let chains = based.into_iter().chain(inner);
    let transaction = chains.fold(Transaction::on(TABLE), |t, name| t.remove_chain(name));
    let maps = port_maps(&prefix);
    let transaction = maps
        .iter()
        .fold(transaction, |t, map| t.remove_set(&map.name));
    nft.commit(&transaction)
}

/// Lets packets from 127.0.0.0/8 leave by an interface, and their answers come back: without
/// this the kernel drops them as martians, and a host port cannot be reached by `localhost`.
///
/// # Errors
/// When the kernel refuses.
pub fn let_loopback_through(interface: &str) -> Result<(), SysctlError> {
    Sysctl::of(&["net", "ipv4", "conf", interface, "route_localnet"])?.ensure("1")
}

impl HostPorts {
    /// Addresses of an attachment that host ports may lead to: those of its own interface.
    #[must_use]
    pub fn addresses(result: &AttachResult, ifname: &str) -> Vec<IpNet> {
        let of_interface = |ip: &&crate::types::IpConfig| match ip.interface {
            None => true,
            Some(index) => result
                .interfaces
                .get(index)
                .is_some_and(|i| i.name == ifname && !i.sandbox.is_empty()),
        };
        let own = result.ips.iter().filter(of_interface);
        own.map(|ip| ip.address).collect()
    }
}

#[cfg(test)]
mod tests;
