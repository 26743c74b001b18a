//! nftables by nfnetlink: a chain of source-translation rules as a value, put in place by one
//! transaction; no program is exec'd and no rule set is ever listed or parsed.
//!
//! Only what masquerading needs is encoded. Everything lives in one table of our own, so that
//! nobody else's rules are touched and a flush by others is noticed by one small question.
//! Message and expression layout: `include/uapi/linux/netfilter/nf_tables.h`.

use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use crate::netlink::NetlinkError;
use crate::netlink::socket::{
    NLM_F_APPEND, NLM_F_CREATE, Request, Socket, attribute, each_attribute,
};

const NETLINK_NETFILTER: isize = 12;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;

const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFT_MSG_DELCHAIN: u16 = 5;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_DELRULE: u16 = 8;

const NFTA_TABLE_NAME: u16 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_USE: u16 = 6;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_RULE_USERDATA: u16 = 7;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;

const NLA_F_NESTED: u16 = 0x8000;
const NF_INET_POST_ROUTING: u32 = 4;
const NF_ACCEPT: u32 = 1;
/// `NF_IP_PRI_NAT_SRC`
const PRIORITY_SOURCE_NAT: u32 = 100;
const NFT_REG_1: u32 = 1;
const NFT_META_NFPROTO: u32 = 15;
const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
const NFT_CMP_EQ: u32 = 0;
const NFT_CMP_NEQ: u32 = 1;
/// Rule user data: type 0 is a comment, which `nft list` shows.
const COMMENT: u8 = 0;

/// The table that holds everything of ours.
pub const TABLE: &str = "ferrule";

/// A network by address and prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// Its first address.
    pub address: IpAddr,
    /// Its length in bits.
    pub len: u8,
}

/// "What comes from `source` and goes to none of `except` leaves with the node's address."
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MasqueradeRule {
    /// Source network.
    pub source: Prefix,
    /// Destinations of the same family that keep the source address.
    pub except: Vec<Prefix>,
    /// Shown by `nft list`; at most 120 bytes count.
    pub comment: String,
}

/// A base chain at the source-translation hook with its rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MasqueradeChain {
    /// Name within [`TABLE`].
    pub name: String,
    /// In order.
    pub rules: Vec<MasqueradeRule>,
}

/// A connection to nftables in one network namespace.
#[derive(Debug)]
pub struct Nft {
    socket: Socket,
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

    /// Puts the chain in place unless it is there with as many rules: one question when there is
    /// nothing to do, one transaction otherwise. Returns whether it had to.
    ///
    /// # Errors
    /// [`NetlinkError`]; nothing was changed then.
    pub fn ensure_chain(&mut self, chain: &MasqueradeChain) -> Result<bool, NetlinkError> {
        if self.rules_in(&chain.name)? == Some(chain.rules.len()) {
            return Ok(false);
        }
        self.transact(&put_chain(chain))?;
        Ok(true)
    }

    /// How many rules a chain of ours has; none when there is no such chain.
    ///
    /// # Errors
    /// [`NetlinkError`] when the kernel cannot be asked.
    pub fn rules_in(&mut self, chain: &str) -> Result<Option<usize>, NetlinkError> {
        let mut body = header(NFPROTO_INET, 0);
        put_text(&mut body, NFTA_CHAIN_TABLE, TABLE);
        put_text(&mut body, NFTA_CHAIN_NAME, chain);
        let request = request(NFT_MSG_GETCHAIN, 0, body, "look up nft chain", chain);
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

    /// Names of all chains of ours. A dump: for garbage collection and agents.
    ///
    /// # Errors
    /// [`NetlinkError`] when the kernel cannot be asked.
    pub fn chains(&mut self) -> Result<Vec<String>, NetlinkError> {
        let body = header(NFPROTO_INET, 0);
        let request = request(NFT_MSG_GETCHAIN, 0, body, "list nft chains of", TABLE);
        for _ in 0..10 {
            let dumped = self.socket.dump(&request);
            let dumped = dumped.map_err(|source| NetlinkError::talking(&request, source))?;
            if let Some(answers) = dumped.map_err(|refusal| refusal.about(&request))? {
                return Ok(answers.iter().filter_map(|a| our_chain(&a.body)).collect());
            }
        }
        let changing = io::Error::other("the rule set changed during every attempt");
        Err(NetlinkError::talking(&request, changing))
    }

    /// Removes a chain of ours with its rules; none there is success.
    ///
    /// # Errors
    /// [`NetlinkError`]; nothing was changed then.
    pub fn remove_chain(&mut self, chain: &str) -> Result<(), NetlinkError> {
        let removal = [delete_rules(chain), delete_chain(chain)];
        gone_is_fine(self.transact(&removal))
    }

    /// Removes our table with all in it; none there is success.
    ///
    /// # Errors
    /// [`NetlinkError`]; nothing was changed then.
    pub fn remove_table(&mut self) -> Result<(), NetlinkError> {
        let mut body = header(NFPROTO_INET, 0);
        put_text(&mut body, NFTA_TABLE_NAME, TABLE);
        let delete = request(NFT_MSG_DELTABLE, 0, body, "delete nft table", TABLE);
        gone_is_fine(self.transact(&[delete]))
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

/// The transaction: table and chain if they are not there, no old rules, the new ones.
fn put_chain(chain: &MasqueradeChain) -> Vec<Request> {
    let mut table = header(NFPROTO_INET, 0);
    put_text(&mut table, NFTA_TABLE_NAME, TABLE);
    let mut base = header(NFPROTO_INET, 0);
    put_text(&mut base, NFTA_CHAIN_TABLE, TABLE);
    put_text(&mut base, NFTA_CHAIN_NAME, &chain.name);
    put_nested(&mut base, NFTA_CHAIN_HOOK, |hook| {
        put_number(hook, NFTA_HOOK_HOOKNUM, NF_INET_POST_ROUTING);
        put_number(hook, NFTA_HOOK_PRIORITY, PRIORITY_SOURCE_NAT);
    });
    put_number(&mut base, NFTA_CHAIN_POLICY, NF_ACCEPT);
    put_text(&mut base, NFTA_CHAIN_TYPE, "nat");
    let mut requests = vec![
        request(
            NFT_MSG_NEWTABLE,
            NLM_F_CREATE,
            table,
            "create nft table",
            TABLE,
        ),
        request(
            NFT_MSG_NEWCHAIN,
            NLM_F_CREATE,
            base,
            "create nft chain",
            &chain.name,
        ),
        delete_rules(&chain.name),
    ];
    requests.extend(chain.rules.iter().map(|rule| rule.request(&chain.name)));
    requests
}

fn delete_rules(chain: &str) -> Request {
    let mut body = header(NFPROTO_INET, 0);
    put_text(&mut body, NFTA_RULE_TABLE, TABLE);
    put_text(&mut body, NFTA_RULE_CHAIN, chain);
    request(NFT_MSG_DELRULE, 0, body, "empty nft chain", chain)
}

fn delete_chain(chain: &str) -> Request {
    let mut body = header(NFPROTO_INET, 0);
    put_text(&mut body, NFTA_CHAIN_TABLE, TABLE);
    put_text(&mut body, NFTA_CHAIN_NAME, chain);
    request(NFT_MSG_DELCHAIN, 0, body, "delete nft chain", chain)
}

/// The chain's name, when the message is about our table.
fn our_chain(body: &[u8]) -> Option<String> {
    let mut name = None;
    let mut ours = false;
    for (kind, value) in each_attribute(body.get(4..)?) {
        let text = String::from_utf8_lossy(value)
            .trim_end_matches('\0')
            .to_owned();
        match kind {
            NFTA_CHAIN_TABLE => ours = text == TABLE,
            NFTA_CHAIN_NAME => name = Some(text),
            _ => {}
        }
    }
    name.filter(|_| ours)
}

impl MasqueradeRule {
    fn request(&self, chain: &str) -> Request {
        let mut body = header(NFPROTO_INET, 0);
        put_text(&mut body, NFTA_RULE_TABLE, TABLE);
        put_text(&mut body, NFTA_RULE_CHAIN, chain);
        put_nested(&mut body, NFTA_RULE_EXPRESSIONS, |list| {
            let (family, source_offset, destination_offset) = match self.source.address {
                IpAddr::V4(_) => (NFPROTO_IPV4, 12, 16),
                IpAddr::V6(_) => (NFPROTO_IPV6, 8, 24),
            };
            put_meta_family(list);
            put_compare(list, NFT_CMP_EQ, &[family]);
            put_prefix_test(list, source_offset, &self.source, NFT_CMP_EQ);
            for except in &self.except {
                put_prefix_test(list, destination_offset, except, NFT_CMP_NEQ);
            }
            put_expression(list, "masq", |_| {});
        });
        let comment = &self.comment.as_bytes()[..self.comment.len().min(120)];
        // Type, length, text, closing zero.
        let mut user = vec![COMMENT, comment.len() as u8 + 1];
        user.extend(comment);
        user.push(0);
        put(&mut body, NFTA_RULE_USERDATA, &user);
        let flags = NLM_F_CREATE | NLM_F_APPEND;
        request(
            NFT_MSG_NEWRULE,
            flags,
            body,
            "add masquerade rule to nft chain",
            chain,
        )
    }
}

fn put_meta_family(list: &mut Vec<u8>) {
    const NFTA_META_DREG: u16 = 1;
    const NFTA_META_KEY: u16 = 2;
    put_expression(list, "meta", |data| {
        put_number(data, NFTA_META_DREG, NFT_REG_1);
        put_number(data, NFTA_META_KEY, NFT_META_NFPROTO);
    });
}

/// Load the address at `offset`, mask it, compare it with the prefix.
fn put_prefix_test(list: &mut Vec<u8>, offset: u32, prefix: &Prefix, operator: u32) {
    const NFTA_PAYLOAD_DREG: u16 = 1;
    const NFTA_PAYLOAD_BASE: u16 = 2;
    const NFTA_PAYLOAD_OFFSET: u16 = 3;
    const NFTA_PAYLOAD_LEN: u16 = 4;
    const NFTA_BITWISE_SREG: u16 = 1;
    const NFTA_BITWISE_DREG: u16 = 2;
    const NFTA_BITWISE_LEN: u16 = 3;
    const NFTA_BITWISE_MASK: u16 = 4;
    const NFTA_BITWISE_XOR: u16 = 5;
    let octets = match prefix.address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let mask: Vec<u8> = (0..octets.len())
        .map(|byte| mask_byte(prefix.len, byte))
        .collect();
    let wanted: Vec<u8> = octets
        .iter()
        .zip(&mask)
        .map(|(octet, mask)| octet & mask)
        .collect();
    let length = octets.len() as u32;
    put_expression(list, "payload", |data| {
        put_number(data, NFTA_PAYLOAD_DREG, NFT_REG_1);
        put_number(data, NFTA_PAYLOAD_BASE, NFT_PAYLOAD_NETWORK_HEADER);
        put_number(data, NFTA_PAYLOAD_OFFSET, offset);
        put_number(data, NFTA_PAYLOAD_LEN, length);
    });
    put_expression(list, "bitwise", |data| {
        put_number(data, NFTA_BITWISE_SREG, NFT_REG_1);
        put_number(data, NFTA_BITWISE_DREG, NFT_REG_1);
        put_number(data, NFTA_BITWISE_LEN, length);
        put_nested(data, NFTA_BITWISE_MASK, |value| {
            put(value, NFTA_DATA_VALUE, &mask)
        });
        let zero = vec![0; octets.len()];
        put_nested(data, NFTA_BITWISE_XOR, |value| {
            put(value, NFTA_DATA_VALUE, &zero)
        });
    });
    put_compare(list, operator, &wanted);
}

fn put_compare(list: &mut Vec<u8>, operator: u32, wanted: &[u8]) {
    const NFTA_CMP_SREG: u16 = 1;
    const NFTA_CMP_OP: u16 = 2;
    const NFTA_CMP_DATA: u16 = 3;
    put_expression(list, "cmp", |data| {
        put_number(data, NFTA_CMP_SREG, NFT_REG_1);
        put_number(data, NFTA_CMP_OP, operator);
        put_nested(data, NFTA_CMP_DATA, |value| {
            put(value, NFTA_DATA_VALUE, wanted)
        });
    });
}

/// The `index`th byte of a mask of `prefix_len` bits.
fn mask_byte(prefix_len: u8, index: usize) -> u8 {
    let bits = usize::from(prefix_len).saturating_sub(index * 8).min(8);
    // 0xff00 shifted right by 0 to 8 bits: the low byte has that many leading ones.
    ((0xff00_u32 >> bits) & 0xff) as u8
}

fn put_expression(list: &mut Vec<u8>, name: &str, fill: impl FnOnce(&mut Vec<u8>)) {
    put_nested(list, NFTA_LIST_ELEM, |expression| {
        put_text(expression, NFTA_EXPR_NAME, name);
        put_nested(expression, NFTA_EXPR_DATA, fill);
    });
}

fn envelope(kind: u16) -> Request {
    let body = header(0, NFNL_SUBSYS_NFTABLES);
    Request {
        kind,
        flags: 0,
        body,
        operation: "frame",
        object: "nft transaction".into(),
    }
}

fn request(kind: u16, flags: u16, body: Vec<u8>, operation: &'static str, object: &str) -> Request {
    let kind = NFNL_SUBSYS_NFTABLES << 8 | kind;
    Request {
        kind,
        flags,
        body,
        operation,
        object: object.to_owned(),
    }
}

/// `struct nfgenmsg`: family, version, resource id in network order.
fn header(family: u8, resource: u16) -> Vec<u8> {
    let [high, low] = resource.to_be_bytes();
    vec![family, 0, high, low]
}

fn put(into: &mut Vec<u8>, kind: u16, value: &[u8]) {
    // Attributes here are a few hundred bytes at most.
    into.extend(((value.len() + 4) as u16).to_ne_bytes());
    into.extend(kind.to_ne_bytes());
    into.extend(value);
    into.resize(into.len().next_multiple_of(4), 0);
}

fn put_text(into: &mut Vec<u8>, kind: u16, text: &str) {
    let mut value = text.as_bytes().to_vec();
    value.push(0);
    put(into, kind, &value);
}

/// nftables takes its numbers in network order.
fn put_number(into: &mut Vec<u8>, kind: u16, value: u32) {
    put(into, kind, &value.to_be_bytes());
}

fn put_nested(into: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let mut inner = Vec::new();
    fill(&mut inner);
    put(into, kind | NLA_F_NESTED, &inner);
}

fn big_endian(value: &[u8]) -> Option<u32> {
    value
        .first_chunk::<4>()
        .map(|bytes| u32::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::process::Command;

    use super::*;

    fn prefix(address: &str, len: u8) -> Prefix {
        Prefix {
            address: address.parse().unwrap(),
            len,
        }
    }

    fn chain() -> MasqueradeChain {
        MasqueradeChain {
            name: "masq-test".into(),
            rules: vec![
                MasqueradeRule {
                    source: prefix("10.1.0.0", 20),
                    except: vec![prefix("10.1.0.0", 16), prefix("224.0.0.0", 4)],
                    comment: "network test".into(),
                },
                MasqueradeRule {
                    source: prefix("fd00:1::", 64),
                    except: vec![prefix("ff00::", 8)],
                    comment: "network test".into(),
                },
            ],
        }
    }

    /// What the administrator's tool makes of our bytes; none when it is not installed.
    fn listed(netns: &File) -> Option<String> {
        let output = crate::netlink::in_netns(netns.as_fd(), || {
            Command::new("nft").args(["list", "ruleset"]).output()
        })
        .unwrap();
        let Ok(output) = output else {
            println!("skipped comparing with nft's own view: nft is not installed");
            return None;
        };
        Some(String::from_utf8(output.stdout).unwrap())
    }

    #[test]
    fn the_kernel_takes_our_rules_and_nft_shows_them_as_meant() {
        let netns = crate::netlink::new_netns().expect("root is needed");
        let mut nft = Nft::open_in(netns.as_fd()).unwrap();
        assert!(nft.ensure_chain(&chain()).unwrap());
        assert!(
            !nft.ensure_chain(&chain()).unwrap(),
            "the second time nothing is to be done"
        );
        assert_eq!(nft.chains().unwrap(), ["masq-test"]);
        if let Some(text) = listed(&netns) {
            for wanted in [
                "table inet ferrule",
                "type nat hook postrouting priority srcnat; policy accept;",
                "ip saddr 10.1.0.0/20 ip daddr != 10.1.0.0/16 ip daddr != 224.0.0.0/4 masquerade comment \"network test\"",
                "ip6 saddr fd00:1::/64 ip6 daddr != ff00::/8 masquerade",
            ] {
                assert!(text.contains(wanted), "{wanted}\n--- in ---\n{text}");
            }
        }
    }

    #[test]
    fn a_flushed_or_deleted_chain_comes_back_and_removal_is_idempotent() {
        let netns = crate::netlink::new_netns().expect("root is needed");
        let mut nft = Nft::open_in(netns.as_fd()).unwrap();
        nft.ensure_chain(&chain()).unwrap();
        nft.transact(&[delete_rules("masq-test")]).unwrap();
        assert_eq!(nft.rules_in("masq-test").unwrap(), Some(0));
        assert!(nft.ensure_chain(&chain()).unwrap());
        assert_eq!(nft.rules_in("masq-test").unwrap(), Some(2));
        nft.remove_table().unwrap();
        nft.remove_table().unwrap();
        assert!(nft.ensure_chain(&chain()).unwrap());
        nft.remove_chain("masq-test").unwrap();
        nft.remove_chain("masq-test").unwrap();
        assert_eq!(nft.rules_in("masq-test").unwrap(), None);
        assert!(nft.chains().unwrap().is_empty());
    }

    #[test]
    fn a_mask_has_its_bits_at_the_front() {
        let mask = |len| (0..4).map(|i| mask_byte(len, i)).collect::<Vec<_>>();
        assert_eq!(mask(0), [0, 0, 0, 0]);
        assert_eq!(mask(20), [255, 255, 0xf0, 0]);
        assert_eq!(mask(32), [255, 255, 255, 255]);
    }
}
