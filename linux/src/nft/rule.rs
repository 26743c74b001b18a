//! Rules as values: what they match, what they do, and how the kernel wants it spelled.

use std::net::IpAddr;

use super::wire::{
    NFT_MSG_NEWRULE, NFTA_DATA_VALUE, NFTA_LIST_ELEM, header, put, put_comment, put_nested,
    put_number, put_text, request,
};
use super::{Family, Table};
use crate::netlink::socket::{NLM_F_APPEND, NLM_F_CREATE, Request};

pub(super) const NFTA_RULE_TABLE: u16 = 1;
pub(super) const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_RULE_USERDATA: u16 = 7;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;

const NFT_REG_VERDICT: u32 = 0;
const NFT_REG_1: u32 = 1;
/// First of the 4-byte registers; a concatenated key fills them from here.
const NFT_REG32_00: u32 = 8;
/// Where the value of a map goes, behind every key.
const NFT_REG32_08: u32 = 16;

const NFT_META_MARK: u32 = 3;
const NFT_META_IIFNAME: u32 = 6;
const NFT_META_OIFNAME: u32 = 7;
const NFT_META_NFPROTO: u32 = 15;
const NFT_META_L4PROTO: u32 = 16;

const LINK_HEADER: u32 = 0;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;

const NFT_CMP_EQ: u32 = 0;
const NFT_CMP_NEQ: u32 = 1;

const NF_DROP: i32 = 0;
const NF_ACCEPT: i32 = 1;
const NFT_JUMP: i32 = -3;
const NFT_RETURN: i32 = -5;

/// `RTN_LOCAL`, as the fib expression gives it.
const RTN_LOCAL: u32 = 2;
/// Bits of `ct state` for established and related.
const CT_ESTABLISHED_RELATED: u32 = 2 | 4;

/// A network by address and prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// Its first address.
    pub address: IpAddr,
    /// Its length in bits.
    pub len: u8,
}

/// Whether a match is meant as it stands or turned round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sense {
    /// As it stands.
    Is,
    /// Turned round.
    Not,
}

impl Sense {
    fn operator(self) -> u32 {
        match self {
            Self::Is => NFT_CMP_EQ,
            Self::Not => NFT_CMP_NEQ,
        }
    }
}

/// One part of a rule: a match, or what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expr {
    /// Of this family. Addresses must be compared behind one of these.
    Family(Family),
    /// Comes from the network.
    Source(Sense, Prefix),
    /// Goes to the network.
    Destination(Sense, Prefix),
    /// Came in by the interface.
    InInterface(Sense, String),
    /// Goes out by the interface.
    OutInterface(Sense, String),
    /// `mark & mask` equals the value.
    Mark(Sense, u32, u32),
    /// `mark = (mark & keep) ^ flip`
    SetMark {
        /// Bits that stay.
        keep: u32,
        /// Bits that are flipped afterwards.
        flip: u32,
    },
    /// The transport protocol, by number.
    Transport(Sense, u8),
    /// The transport destination port.
    DestinationPort(Sense, u16),
    /// Goes to an address of this node.
    DestinationIsLocal,
    /// Of a connection that exists, or belongs to one.
    Established,
    /// Sent to what the map says for (destination address,) transport protocol and destination
    /// port. Without an entry the rule ends here.
    DestinationNat {
        /// The map.
        map: String,
        /// Family of its values.
        family: Family,
        /// Whether the destination address is part of the key.
        by_address: bool,
    },
    /// Came in by an interface that is in the set.
    InInterfaceIn(String),
    /// Goes out by an interface that is in the set.
    OutInterfaceIn(String),
    /// The interfaces it came in and goes out by are together in the set, or are not.
    InterfacesIn(Sense, String),
    /// Interface and hardware source address are in the set, or are not.
    HardwareSourceIn(Sense, String),
    /// Takes the address of the interface it leaves by.
    Masquerade,
    /// Is not tracked as part of a connection, and so never translated.
    Untracked,
    /// Goes on in another chain, and comes back.
    Jump(String),
    /// Ends this chain.
    Return,
    /// Lets pass, as far as this chain is concerned.
    Accept,
    /// Throws away.
    Drop,
}

/// A rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// In order.
    pub exprs: Vec<Expr>,
    /// Shown by `nft list`; at most 120 bytes count.
    pub comment: String,
}

impl Rule {
    pub(super) fn request(&self, table: Table, chain: &str) -> Request {
        let mut body = header(table.family.number(), 0);
        put_text(&mut body, NFTA_RULE_TABLE, table.name);
        put_text(&mut body, NFTA_RULE_CHAIN, chain);
        put_nested(&mut body, NFTA_RULE_EXPRESSIONS, |list| {
            for expr in &self.exprs {
                expr.put(list);
            }
        });
        put_comment(&mut body, NFTA_RULE_USERDATA, &self.comment);
        let flags = NLM_F_CREATE | NLM_F_APPEND;
        request(NFT_MSG_NEWRULE, flags, body, "add rule to nft chain", chain)
    }
}

impl Expr {
    fn put(&self, list: &mut Vec<u8>) {
        match self {
            Self::Family(family) => {
                load_meta(list, NFT_META_NFPROTO, NFT_REG_1);
                compare(list, NFT_CMP_EQ, &[family.number()]);
            }
            Self::Source(sense, prefix) => prefix_test(list, (12, 8), prefix, *sense),
            Self::Destination(sense, prefix) => prefix_test(list, (16, 24), prefix, *sense),
            Self::InInterface(sense, name) => {
                load_meta(list, NFT_META_IIFNAME, NFT_REG_1);
                compare(list, sense.operator(), &interface_name(name));
            }
            Self::OutInterface(sense, name) => {
                load_meta(list, NFT_META_OIFNAME, NFT_REG_1);
                compare(list, sense.operator(), &interface_name(name));
            }
            Self::Mark(sense, mask, value) => {
                masked_mark(list, *mask, 0);
                compare(list, sense.operator(), &value.to_ne_bytes());
            }
            Self::SetMark { keep, flip } => {
                masked_mark(list, *keep, *flip);
                store_mark(list);
            }
            Self::Transport(sense, protocol) => {
                load_meta(list, NFT_META_L4PROTO, NFT_REG_1);
                compare(list, sense.operator(), &[*protocol]);
            }
            Self::DestinationPort(sense, port) => {
                load_payload(list, TRANSPORT_HEADER, 2, 2, NFT_REG_1);
                compare(list, sense.operator(), &port.to_be_bytes());
            }
            Self::DestinationIsLocal => {
                fib_destination_type(list);
                compare(list, NFT_CMP_EQ, &RTN_LOCAL.to_ne_bytes());
            }
            Self::Established => {
                load_ct_state(list);
                bitwise(list, &CT_ESTABLISHED_RELATED.to_ne_bytes(), &[0; 4]);
                compare(list, NFT_CMP_NEQ, &[0; 4]);
            }
            Self::DestinationNat {
                map,
                family,
                by_address,
            } => destination_nat(list, map, *family, *by_address),
            Self::InInterfaceIn(set) => {
                load_meta(list, NFT_META_IIFNAME, NFT_REG32_00);
                lookup(list, set, None, Sense::Is);
            }
            Self::OutInterfaceIn(set) => {
                load_meta(list, NFT_META_OIFNAME, NFT_REG32_00);
                lookup(list, set, None, Sense::Is);
            }
            Self::InterfacesIn(sense, set) => {
                load_meta(list, NFT_META_IIFNAME, NFT_REG32_00);
                // An interface name takes four registers.
                load_meta(list, NFT_META_OIFNAME, NFT_REG32_00 + 4);
                lookup(list, set, None, *sense);
            }
            Self::HardwareSourceIn(sense, set) => {
                load_meta(list, NFT_META_IIFNAME, NFT_REG32_00);
                load_payload(list, LINK_HEADER, 6, 6, NFT_REG32_00 + 4);
                lookup(list, set, None, *sense);
            }
            Self::Untracked => put_expression(list, "notrack", |_| {}),
            Self::Masquerade => put_expression(list, "masq", |_| {}),
            Self::Jump(chain) => verdict(list, NFT_JUMP, Some(chain)),
            Self::Return => verdict(list, NFT_RETURN, None),
            Self::Accept => verdict(list, NF_ACCEPT, None),
            Self::Drop => verdict(list, NF_DROP, None),
        }
    }
}

/// The kernel compares all of a name's 16 bytes.
pub(super) fn interface_name(name: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    let len = name.len().min(15);
    bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
    bytes
}

fn load_meta(list: &mut Vec<u8>, key: u32, register: u32) {
    const NFTA_META_DREG: u16 = 1;
    const NFTA_META_KEY: u16 = 2;
    put_expression(list, "meta", |data| {
        put_number(data, NFTA_META_DREG, register);
        put_number(data, NFTA_META_KEY, key);
    });
}

fn masked_mark(list: &mut Vec<u8>, mask: u32, flip: u32) {
    load_meta(list, NFT_META_MARK, NFT_REG_1);
    bitwise(list, &mask.to_ne_bytes(), &flip.to_ne_bytes());
}

fn store_mark(list: &mut Vec<u8>) {
    const NFTA_META_KEY: u16 = 2;
    const NFTA_META_SREG: u16 = 3;
    put_expression(list, "meta", |data| {
        put_number(data, NFTA_META_KEY, NFT_META_MARK);
        put_number(data, NFTA_META_SREG, NFT_REG_1);
    });
}

fn load_ct_state(list: &mut Vec<u8>) {
    const NFTA_CT_DREG: u16 = 1;
    const NFTA_CT_KEY: u16 = 2;
    const NFT_CT_STATE: u32 = 0;
    put_expression(list, "ct", |data| {
        put_number(data, NFTA_CT_DREG, NFT_REG_1);
        put_number(data, NFTA_CT_KEY, NFT_CT_STATE);
    });
}

fn fib_destination_type(list: &mut Vec<u8>) {
    const NFTA_FIB_DREG: u16 = 1;
    const NFTA_FIB_RESULT: u16 = 2;
    const NFTA_FIB_FLAGS: u16 = 3;
    const NFT_FIB_RESULT_ADDRTYPE: u32 = 3;
    const NFTA_FIB_F_DADDR: u32 = 2;
    put_expression(list, "fib", |data| {
        put_number(data, NFTA_FIB_DREG, NFT_REG_1);
        put_number(data, NFTA_FIB_RESULT, NFT_FIB_RESULT_ADDRTYPE);
        put_number(data, NFTA_FIB_FLAGS, NFTA_FIB_F_DADDR);
    });
}

fn load_payload(list: &mut Vec<u8>, base: u32, offset: u32, len: u32, register: u32) {
    const NFTA_PAYLOAD_DREG: u16 = 1;
    const NFTA_PAYLOAD_BASE: u16 = 2;
    const NFTA_PAYLOAD_OFFSET: u16 = 3;
    const NFTA_PAYLOAD_LEN: u16 = 4;
    put_expression(list, "payload", |data| {
        put_number(data, NFTA_PAYLOAD_DREG, register);
        put_number(data, NFTA_PAYLOAD_BASE, base);
        put_number(data, NFTA_PAYLOAD_OFFSET, offset);
        put_number(data, NFTA_PAYLOAD_LEN, len);
    });
}

fn bitwise(list: &mut Vec<u8>, mask: &[u8], xor: &[u8]) {
    const NFTA_BITWISE_SREG: u16 = 1;
    const NFTA_BITWISE_DREG: u16 = 2;
    const NFTA_BITWISE_LEN: u16 = 3;
    const NFTA_BITWISE_MASK: u16 = 4;
    const NFTA_BITWISE_XOR: u16 = 5;
    put_expression(list, "bitwise", |data| {
        put_number(data, NFTA_BITWISE_SREG, NFT_REG_1);
        put_number(data, NFTA_BITWISE_DREG, NFT_REG_1);
        put_number(data, NFTA_BITWISE_LEN, mask.len() as u32);
        put_nested(data, NFTA_BITWISE_MASK, |v| put(v, NFTA_DATA_VALUE, mask));
        put_nested(data, NFTA_BITWISE_XOR, |v| put(v, NFTA_DATA_VALUE, xor));
    });
}

/// Load the address at the offset (in IPv4, in IPv6), mask it, compare it with the prefix.
fn prefix_test(list: &mut Vec<u8>, offsets: (u32, u32), prefix: &Prefix, sense: Sense) {
    let (offset, octets) = match prefix.address {
        IpAddr::V4(v4) => (offsets.0, v4.octets().to_vec()),
        IpAddr::V6(v6) => (offsets.1, v6.octets().to_vec()),
    };
    let mask: Vec<u8> = (0..octets.len())
        .map(|byte| mask_byte(prefix.len, byte))
        .collect();
    let wanted: Vec<u8> = octets
        .iter()
        .zip(&mask)
        .map(|(octet, mask)| octet & mask)
        .collect();
    load_payload(list, NETWORK_HEADER, offset, octets.len() as u32, NFT_REG_1);
    bitwise(list, &mask, &vec![0; octets.len()]);
    compare(list, sense.operator(), &wanted);
}

fn compare(list: &mut Vec<u8>, operator: u32, wanted: &[u8]) {
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

fn lookup(list: &mut Vec<u8>, set: &str, value: Option<u32>, sense: Sense) {
    const NFTA_LOOKUP_SET: u16 = 1;
    const NFTA_LOOKUP_SREG: u16 = 2;
    const NFTA_LOOKUP_DREG: u16 = 3;
    const NFTA_LOOKUP_FLAGS: u16 = 5;
    const NFT_LOOKUP_F_INV: u32 = 1;
    put_expression(list, "lookup", |data| {
        put_text(data, NFTA_LOOKUP_SET, set);
        put_number(data, NFTA_LOOKUP_SREG, NFT_REG32_00);
        if let Some(register) = value {
            put_number(data, NFTA_LOOKUP_DREG, register);
        }
        if sense == Sense::Not {
            put_number(data, NFTA_LOOKUP_FLAGS, NFT_LOOKUP_F_INV);
        }
    });
}

fn destination_nat(list: &mut Vec<u8>, map: &str, family: Family, by_address: bool) {
    const NFTA_NAT_TYPE: u16 = 1;
    const NFTA_NAT_FAMILY: u16 = 2;
    const NFTA_NAT_REG_ADDR_MIN: u16 = 3;
    const NFTA_NAT_REG_PROTO_MIN: u16 = 5;
    const NFT_NAT_DNAT: u32 = 1;
    let (offset, len) = match family {
        Family::V6 => (24, 16),
        Family::V4 | Family::Inet | Family::Bridge => (16, 4),
    };
    let mut register = NFT_REG32_00;
    if by_address {
        load_payload(list, NETWORK_HEADER, offset, len, register);
        register += len / 4;
    }
    load_meta(list, NFT_META_L4PROTO, register);
    load_payload(list, TRANSPORT_HEADER, 2, 2, register + 1);
    lookup(list, map, Some(NFT_REG32_08), Sense::Is);
    put_expression(list, "nat", |data| {
        put_number(data, NFTA_NAT_TYPE, NFT_NAT_DNAT);
        put_number(data, NFTA_NAT_FAMILY, u32::from(family.number()));
        put_number(data, NFTA_NAT_REG_ADDR_MIN, NFT_REG32_08);
        put_number(data, NFTA_NAT_REG_PROTO_MIN, NFT_REG32_08 + len / 4);
    });
}

fn verdict(list: &mut Vec<u8>, code: i32, chain: Option<&str>) {
    const NFTA_IMMEDIATE_DREG: u16 = 1;
    const NFTA_IMMEDIATE_DATA: u16 = 2;
    const NFTA_DATA_VERDICT: u16 = 2;
    const NFTA_VERDICT_CODE: u16 = 1;
    const NFTA_VERDICT_CHAIN: u16 = 2;
    put_expression(list, "immediate", |data| {
        put_number(data, NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT);
        put_nested(data, NFTA_IMMEDIATE_DATA, |value| {
            put_nested(value, NFTA_DATA_VERDICT, |verdict| {
                put(verdict, NFTA_VERDICT_CODE, &code.to_be_bytes());
                if let Some(chain) = chain {
                    put_text(verdict, NFTA_VERDICT_CHAIN, chain);
                }
            });
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_has_its_bits_at_the_front() {
        let mask = |len| (0..4).map(|i| mask_byte(len, i)).collect::<Vec<_>>();
        assert_eq!(mask(0), [0, 0, 0, 0]);
        assert_eq!(mask(20), [255, 255, 0xf0, 0]);
        assert_eq!(mask(32), [255, 255, 255, 255]);
    }

    #[test]
    fn a_name_longer_than_the_kernels_is_cut() {
        assert_eq!(&interface_name("eth0")[..5], b"eth0\0");
        assert_eq!(interface_name("a-name-much-too-long")[15], 0);
    }
}
