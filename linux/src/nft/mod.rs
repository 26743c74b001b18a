//! nftables by nfnetlink: chains, rules and sets as values, put in place by transactions; no
//! program is exec'd and no rule set is ever listed or parsed.
//!
//! * `rule`, `set`: what there can be, as values, and its bytes.
//! * [`Transaction`]: changes of one table that happen together or not at all.
//! * [`Nft`]: carries them out, and asks about single objects.
//!
//! Everything lives in tables of our own, so that nobody else's rules are touched and a flush by
//! others is noticed by one small question.
//! Message and expression layout: `include/uapi/linux/netfilter/nf_tables.h`.

mod rule;
mod set;
mod wire;

use std::io;
use std::os::fd::BorrowedFd;

use crate::netlink::socket::{NLM_F_CREATE, Request, Socket, attribute, each_attribute};
pub use crate::netlink::{Mac, NetlinkError};

pub use rule::{Expr, Prefix, Rule, Sense};
pub use set::{Element, Found, Kind, Part, Set};
use wire::{
    NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END, NFT_MSG_DELCHAIN, NFT_MSG_DELRULE, NFT_MSG_DELTABLE,
    NFT_MSG_GETCHAIN, NFT_MSG_NEWCHAIN, NFT_MSG_NEWTABLE, big_endian, envelope, header, put_nested,
    put_number, put_text, request, text,
};

const NETLINK_NETFILTER: isize = 12;

const NFTA_TABLE_NAME: u16 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_USE: u16 = 6;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;

const NF_ACCEPT: u32 = 1;

/// A protocol family, of a table or of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
    /// Both (tables only).
    Inet,
    /// Frames on bridges (tables only).
    Bridge,
}

impl Family {
    /// `NFPROTO_…`
    fn number(self) -> u8 {
        match self {
            Self::Inet => 1,
            Self::V4 => 2,
            Self::Bridge => 7,
            Self::V6 => 10,
        }
    }

    /// Of an address.
    #[must_use]
    pub fn of(address: std::net::IpAddr) -> Self {
        if address.is_ipv4() {
            Self::V4
        } else {
            Self::V6
        }
    }
}

/// A table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Table {
    /// What it sees.
    pub family: Family,
    /// Its name.
    pub name: &'static str,
}

/// The table that holds everything of ours about addresses and ports.
pub const TABLE: Table = Table {
    family: Family::Inet,
    name: "ferrule",
};

/// The table for frames on bridges.
pub const BRIDGE_TABLE: Table = Table {
    family: Family::Bridge,
    name: "ferrule",
};

/// Where and when a base chain is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// New connections to this node or through it, before routing: destinations are changed here.
    DestinationNat,
    /// The same for connections that begin on this node.
    DestinationNatOutput,
    /// New connections as they leave: sources are changed here.
    SourceNat,
    /// Packets through this node.
    Forward,
    /// Frames as they come into a bridge, before anything else.
    BridgeIn,
    /// Packets that arrive, before connections are tracked.
    RawIn,
    /// Packets of this node itself, before connections are tracked.
    RawOut,
}

impl Hook {
    /// Hook number, priority, type: `enum nf_inet_hooks`, `enum nf_ip_hook_priorities`.
    fn wire(self) -> (u32, i32, &'static str) {
        match self {
            Self::DestinationNat => (0, -100, "nat"),
            Self::DestinationNatOutput => (3, -100, "nat"),
            Self::SourceNat => (4, 100, "nat"),
            Self::Forward => (2, 0, "filter"),
            Self::BridgeIn | Self::RawIn => (0, -300, "filter"),
            Self::RawOut => (3, -300, "filter"),
        }
    }
}

/// A chain with its rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Name within the table.
    pub name: String,
    /// Where it is asked; none for one that is only jumped to.
    pub hook: Option<Hook>,
    /// In order.
    pub rules: Vec<Rule>,
}

/// Changes of one table that happen together or not at all. The table is made if need be.
#[derive(Debug)]
pub struct Transaction {
    table: Table,
    requests: Vec<Request>,
    sets: u32,
}

impl Transaction {
    /// Without changes yet.
    #[must_use]
    pub fn on(table: Table) -> Self {
        let mut body = header(table.family.number(), 0);
        put_text(&mut body, NFTA_TABLE_NAME, table.name);
        let create = request(
            NFT_MSG_NEWTABLE,
            NLM_F_CREATE,
            body,
            "create nft table",
            table.name,
        );
        Self {
            table,
            requests: vec![create],
            sets: 0,
        }
    }

    /// A chain with these rules and no others. One it jumps to must have come before.
    #[must_use]
    pub fn put_chain(mut self, chain: &Chain) -> Self {
        let mut body = header(self.table.family.number(), 0);
        put_text(&mut body, NFTA_CHAIN_TABLE, self.table.name);
        put_text(&mut body, NFTA_CHAIN_NAME, &chain.name);
        if let Some(hook) = chain.hook {
            let (number, priority, kind) = hook.wire();
            put_nested(&mut body, NFTA_CHAIN_HOOK, |hook| {
                put_number(hook, NFTA_HOOK_HOOKNUM, number);
                put_number(hook, NFTA_HOOK_PRIORITY, priority as u32);
            });
            put_number(&mut body, NFTA_CHAIN_POLICY, NF_ACCEPT);
            put_text(&mut body, NFTA_CHAIN_TYPE, kind);
        }
        self.requests.push(request(
            NFT_MSG_NEWCHAIN,
            NLM_F_CREATE,
            body,
            "create nft chain",
            &chain.name,
        ));
        self.requests.push(on_chain(
            self.table,
            NFT_MSG_DELRULE,
            "empty nft chain",
            &chain.name,
        ));
        for rule in &chain.rules {
            self.requests.push(rule.request(self.table, &chain.name));
        }
        self
    }

    /// A set or map; one of this name that holds the same kinds stays as it is.
    #[must_use]
    pub fn put_set(mut self, set: &Set) -> Self {
        self.sets += 1;
        self.requests.push(set.request(self.table, self.sets));
        self
    }

    /// Elements, of any sets. One that is there already with this value is left as it is;
    /// another value under its key is refused with `EBUSY`.
    #[must_use]
    pub fn put_elements(mut self, elements: &[Element]) -> Self {
        self.requests.extend(set::add(self.table, elements, false));
        self
    }

    /// Elements that must be new: refused with `EEXIST` or `EBUSY` when a key is taken.
    #[must_use]
    pub fn add_elements(mut self, elements: &[Element]) -> Self {
        self.requests.extend(set::add(self.table, elements, true));
        self
    }

    /// Takes away what is under an element's key, which must be there.
    #[must_use]
    pub fn remove_element(mut self, element: &Element) -> Self {
        self.requests.push(element.remove(self.table));
        self
    }

    /// Takes away a chain with its rules. It must be there, and nothing may jump to it.
    #[must_use]
    pub fn remove_chain(mut self, name: &str) -> Self {
        let table = self.table;
        self.requests
            .push(on_chain(table, NFT_MSG_DELRULE, "empty nft chain", name));
        self.requests
            .push(on_chain(table, NFT_MSG_DELCHAIN, "delete nft chain", name));
        self
    }

    /// Takes away a set with its elements. It must be there, and no rule may use it.
    #[must_use]
    pub fn remove_set(mut self, name: &str) -> Self {
        self.requests.push(set::delete(self.table, name));
        self
    }
}

fn on_chain(table: Table, kind: u16, operation: &'static str, chain: &str) -> Request {
    // NFTA_RULE_TABLE and NFTA_RULE_CHAIN differ from NFTA_CHAIN_TABLE and NFTA_CHAIN_NAME.
    let name = if kind == NFT_MSG_DELRULE {
        rule::NFTA_RULE_CHAIN
    } else {
        NFTA_CHAIN_NAME
    };
    let mut body = header(table.family.number(), 0);
    put_text(&mut body, NFTA_CHAIN_TABLE, table.name);
    put_text(&mut body, name, chain);
    request(kind, 0, body, operation, chain)
}

/// A connection to nftables in one network namespace.
#[derive(Debug)]
pub struct Nft {
    pub(crate) socket: Socket,
}

impl Nft {
    /// Opens one in the caller's network namespace.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self {
            socket: Socket::open(NETLINK_NETFILTER)?,
        })
    }

    /// Opens one in another network namespace.
    ///
    /// # Errors
    /// When the namespace cannot be entered or the kernel gives no socket.
    pub fn open_in(netns: BorrowedFd<'_>) -> Result<Self, NetlinkError> {
        Ok(Self {
            socket: Socket::open_in(netns, NETLINK_NETFILTER)?,
        })
    }

    /// Puts a chain of [`TABLE`] in place unless it is there with as many rules: one question when
    /// there is nothing to do, one transaction otherwise. Returns whether it had to.
    ///
    /// # Errors
    /// [`NetlinkError`]; nothing was changed then.
    pub fn ensure_chain(&mut self, chain: &Chain) -> Result<bool, NetlinkError> {
        if self.uses_of(TABLE, &chain.name)? == Some(chain.rules.len()) {
            return Ok(false);
        }
        self.commit(&Transaction::on(TABLE).put_chain(chain))?;
        Ok(true)
    }

    /// How many rules a chain of [`TABLE`] has; none when there is no such chain.
    ///
    /// # Errors
    /// [`NetlinkError`] when the kernel cannot be asked.
    pub fn rules_in(&mut self, chain: &str) -> Result<Option<usize>, NetlinkError> {
        self.uses_of(TABLE, chain)
    }

    /// How many rules a chain has, and how often it is jumped to, together; none when there is no
    /// such chain.
    ///
    /// # Errors
    /// [`NetlinkError`] when the kernel cannot be asked.
    pub fn uses_of(&mut self, table: Table, chain: &str) -> Result<Option<usize>, NetlinkError> {
        let request = on_chain(table, NFT_MSG_GETCHAIN, "look up nft chain", chain);
        let answer = self.socket.get(&request);
        match answer.map_err(|source| NetlinkError::talking(&request, source))? {
            Ok(answer) => {
                let attributes = answer.body.get(4..).unwrap_or_default();
                let uses = attribute(attributes, NFTA_CHAIN_USE).and_then(big_endian);
                Ok(Some(uses.unwrap_or_default() as usize))
            }
            Err(refusal) if refusal.is(libc::ENOENT) => Ok(None),
            Err(refusal) => Err(refusal.about(&request)),
        }
    }

    /// What is under an element's key; none when there is nothing, or no such set.
    ///
    /// # Errors
    /// [`NetlinkError`] when the kernel cannot be asked.
    pub fn look_up(
        &mut self,
        table: Table,
        element: &Element,
    ) -> Result<Option<Found>, NetlinkError> {
        let request = element.get(table);
        let answer = self.socket.get(&request);
        match answer.map_err(|source| NetlinkError::talking(&request, source))? {
            Ok(answer) => Ok(Some(element.found_in(&answer.body))),
            Err(refusal) if refusal.is(libc::ENOENT) => Ok(None),
            Err(refusal) => Err(refusal.about(&request)),
        }
    }

    /// Names of all chains of [`TABLE`]. A dump: for garbage collection and agents.
    ///
    /// # Errors
    /// [`NetlinkError`] when the kernel cannot be asked.
    pub fn chains(&mut self) -> Result<Vec<String>, NetlinkError> {
        self.chains_of(TABLE)
    }

    /// Names of all chains of a table. A dump: for garbage collection and agents.
    ///
    /// # Errors
    /// [`NetlinkError`] when the kernel cannot be asked.
    pub fn chains_of(&mut self, table: Table) -> Result<Vec<String>, NetlinkError> {
        let body = header(table.family.number(), 0);
        let request = request(NFT_MSG_GETCHAIN, 0, body, "list nft chains of", table.name);
        for _ in 0..10 {
            let dumped = self.socket.dump(&request);
            let dumped = dumped.map_err(|source| NetlinkError::talking(&request, source))?;
            if let Some(answers) = dumped.map_err(|refusal| refusal.about(&request))? {
                let names = answers.iter();
                return Ok(names.filter_map(|a| chain_of(table, &a.body)).collect());
            }
        }
        let changing = io::Error::other("the rule set changed during every attempt");
        Err(NetlinkError::talking(&request, changing))
    }

    /// Removes a chain of [`TABLE`] with its rules; none there is success.
    ///
    /// # Errors
    /// [`NetlinkError`]; nothing was changed then.
    pub fn remove_chain(&mut self, chain: &str) -> Result<(), NetlinkError> {
        gone_is_fine(self.commit(&Transaction::on(TABLE).remove_chain(chain)))
    }

    /// Removes [`TABLE`] with all in it; none there is success.
    ///
    /// # Errors
    /// [`NetlinkError`]; nothing was changed then.
    pub fn remove_table(&mut self) -> Result<(), NetlinkError> {
        self.remove_whole(TABLE)
    }

    /// Removes a table with all in it; none there is success.
    ///
    /// # Errors
    /// [`NetlinkError`]; nothing was changed then.
    pub fn remove_whole(&mut self, table: Table) -> Result<(), NetlinkError> {
        let mut body = header(table.family.number(), 0);
        put_text(&mut body, NFTA_TABLE_NAME, table.name);
        let delete = request(NFT_MSG_DELTABLE, 0, body, "delete nft table", table.name);
        gone_is_fine(self.transact(&[delete]))
    }

    /// Carries out a transaction.
    ///
    /// # Errors
    /// [`NetlinkError`] about the first change refused; nothing was changed then.
    pub fn commit(&mut self, transaction: &Transaction) -> Result<(), NetlinkError> {
        self.transact(&transaction.requests)
    }

    fn transact(&mut self, requests: &[Request]) -> Result<(), NetlinkError> {
        let envelope = (envelope(NFNL_MSG_BATCH_BEGIN), envelope(NFNL_MSG_BATCH_END));
        let sent = self
            .socket
            .send_transaction((&envelope.0, &envelope.1), requests);
        match sent.map_err(|source| NetlinkError::talking(&requests[0], source))? {
            Ok(()) => Ok(()),
            Err((place, refusal)) => Err(refusal.about(&requests[place])),
        }
    }
}

fn gone_is_fine(outcome: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    match outcome {
        Err(error) if error.errno() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

/// The chain's name, when the message is about this table.
fn chain_of(table: Table, body: &[u8]) -> Option<String> {
    let mut name = None;
    let mut ours = false;
    for (kind, value) in each_attribute(body.get(4..)?) {
        match kind {
            NFTA_CHAIN_TABLE => ours = text(value) == table.name,
            NFTA_CHAIN_NAME => name = Some(text(value)),
            _ => {}
        }
    }
    name.filter(|_| ours)
}

#[cfg(test)]
mod tests;
