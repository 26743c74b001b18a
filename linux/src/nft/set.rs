//! Sets, maps and their elements.

use std::net::IpAddr;

use super::rule::interface_name;
use super::wire::{
    NFT_MSG_DELSET, NFT_MSG_DELSETELEM, NFT_MSG_GETSETELEM, NFT_MSG_NEWSET, NFT_MSG_NEWSETELEM,
    NFTA_DATA_VALUE, NFTA_LIST_ELEM, comment, header, put, put_comment, put_nested, put_number,
    put_text, request,
};
use super::{Mac, Table};
use crate::netlink::socket::{NLM_F_CREATE, NLM_F_EXCL, Request, attribute, each_attribute};

pub(super) const NFTA_SET_TABLE: u16 = 1;
pub(super) const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_FLAGS: u16 = 3;
const NFTA_SET_KEY_TYPE: u16 = 4;
const NFTA_SET_KEY_LEN: u16 = 5;
const NFTA_SET_DATA_TYPE: u16 = 6;
const NFTA_SET_DATA_LEN: u16 = 7;
const NFTA_SET_ID: u16 = 10;
const NFT_SET_MAP: u32 = 8;

const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_SET_ELEM_USERDATA: u16 = 6;

/// The kind of one part of a key or value. Numbers are those of the `nft` program, so that it
/// shows elements as people write them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An IPv4 address.
    V4,
    /// An IPv6 address.
    V6,
    /// A transport protocol.
    Transport,
    /// A port.
    Port,
    /// An interface by name.
    Interface,
    /// A hardware address.
    Hardware,
}

impl Kind {
    fn number(self) -> u32 {
        match self {
            Self::V4 => 7,
            Self::V6 => 8,
            Self::Hardware => 9,
            Self::Transport => 12,
            Self::Port => 13,
            Self::Interface => 41,
        }
    }

    /// In bytes, alone.
    fn len(self) -> u32 {
        match self {
            Self::V4 => 4,
            Self::V6 | Self::Interface => 16,
            Self::Hardware => 6,
            Self::Transport => 1,
            Self::Port => 2,
        }
    }
}

/// Parts joined: six bits of type each, every part padded to a register.
fn joined(kinds: &[Kind]) -> (u32, u32) {
    match kinds {
        [one] => (one.number(), one.len()),
        many => many.iter().fold((0, 0), |(types, len), kind| {
            (
                types << 6 | kind.number(),
                len + kind.len().next_multiple_of(4),
            )
        }),
    }
}

/// One part of a key or value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// An address.
    Address(IpAddr),
    /// A transport protocol.
    Transport(u8),
    /// A port.
    Port(u16),
    /// An interface by name.
    Interface(String),
    /// A hardware address.
    Hardware(Mac),
}

fn bytes(parts: &[Part]) -> Vec<u8> {
    let mut all = Vec::new();
    for part in parts {
        match part {
            Part::Address(IpAddr::V4(v4)) => all.extend(v4.octets()),
            Part::Address(IpAddr::V6(v6)) => all.extend(v6.octets()),
            Part::Transport(protocol) => all.push(*protocol),
            Part::Port(port) => all.extend(port.to_be_bytes()),
            Part::Interface(name) => all.extend(interface_name(name)),
            Part::Hardware(mac) => all.extend(mac.0),
        }
        if parts.len() > 1 {
            all.resize(all.len().next_multiple_of(4), 0);
        }
    }
    all
}

/// A set, or with values a map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// Name within the table.
    pub name: String,
    /// Parts of a key.
    pub key: Vec<Kind>,
    /// Parts of a value; none for a plain set.
    pub value: Vec<Kind>,
}

/// An element of a set or map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    /// The set or map.
    pub set: String,
    /// Its key.
    pub key: Vec<Part>,
    /// Its value; empty in a plain set.
    pub value: Vec<Part>,
    /// Whose it is; at most 120 bytes count. Not looked at by the kernel.
    pub owner: String,
}

impl Set {
    pub(super) fn request(&self, table: Table, id: u32) -> Request {
        let mut body = header(table.family.number(), 0);
        put_text(&mut body, NFTA_SET_TABLE, table.name);
        put_text(&mut body, NFTA_SET_NAME, &self.name);
        let (key_type, key_len) = joined(&self.key);
        let flags = if self.value.is_empty() {
            0
        } else {
            NFT_SET_MAP
        };
        put_number(&mut body, NFTA_SET_FLAGS, flags);
        put_number(&mut body, NFTA_SET_KEY_TYPE, key_type);
        put_number(&mut body, NFTA_SET_KEY_LEN, key_len);
        if !self.value.is_empty() {
            let (value_type, value_len) = joined(&self.value);
            put_number(&mut body, NFTA_SET_DATA_TYPE, value_type);
            put_number(&mut body, NFTA_SET_DATA_LEN, value_len);
        }
        // Only has to be told apart from others of the same transaction.
        put_number(&mut body, NFTA_SET_ID, id);
        request(
            NFT_MSG_NEWSET,
            NLM_F_CREATE,
            body,
            "create nft set",
            &self.name,
        )
    }
}

pub(super) fn delete(table: Table, name: &str) -> Request {
    let mut body = header(table.family.number(), 0);
    put_text(&mut body, NFTA_SET_TABLE, table.name);
    put_text(&mut body, NFTA_SET_NAME, name);
    request(NFT_MSG_DELSET, 0, body, "delete nft set", name)
}

/// Many elements fit into one message, but its list no more than 64 KiB.
const MAX_ELEMENTS_PER_MESSAGE: usize = 200;

/// Whether values and owners are part of a message about elements.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extent {
    Keys,
    Whole,
}

/// One message about elements of one set.
fn message(
    table: Table,
    (kind, flags, operation): (u16, u16, &'static str),
    elements: &[&Element],
    extent: Extent,
) -> Request {
    let set = elements.first().map_or("", |element| &element.set);
    let mut body = header(table.family.number(), 0);
    put_text(&mut body, NFTA_SET_ELEM_LIST_TABLE, table.name);
    put_text(&mut body, NFTA_SET_ELEM_LIST_SET, set);
    put_nested(&mut body, NFTA_SET_ELEM_LIST_ELEMENTS, |list| {
        for element in elements {
            put_nested(list, NFTA_LIST_ELEM, |into| element.put(into, extent));
        }
    });
    request(kind, flags, body, operation, set)
}

/// Messages that add elements, few for many.
pub(super) fn add(table: Table, elements: &[Element], exclusive: bool) -> Vec<Request> {
    let mut sets: Vec<&str> = elements.iter().map(|e| e.set.as_str()).collect();
    sets.sort_unstable();
    sets.dedup();
    let excl = if exclusive { NLM_F_EXCL } else { 0 };
    let how = (
        NFT_MSG_NEWSETELEM,
        NLM_F_CREATE | excl,
        "add element to nft set",
    );
    let mut requests = Vec::new();
    for set in sets {
        let of_set: Vec<&Element> = elements.iter().filter(|e| e.set == set).collect();
        let chunks = of_set.chunks(MAX_ELEMENTS_PER_MESSAGE);
        requests.extend(chunks.map(|chunk| message(table, how, chunk, Extent::Whole)));
    }
    requests
}

impl Element {
    fn put(&self, into: &mut Vec<u8>, extent: Extent) {
        put_nested(into, NFTA_SET_ELEM_KEY, |key| {
            put(key, NFTA_DATA_VALUE, &bytes(&self.key));
        });
        if extent == Extent::Keys {
            return;
        }
        if !self.value.is_empty() {
            put_nested(into, NFTA_SET_ELEM_DATA, |data| {
                put(data, NFTA_DATA_VALUE, &bytes(&self.value));
            });
        }
        put_comment(into, NFTA_SET_ELEM_USERDATA, &self.owner);
    }

    pub(super) fn remove(&self, table: Table) -> Request {
        let how = (NFT_MSG_DELSETELEM, 0, "remove element from nft set");
        message(table, how, &[self], Extent::Keys)
    }

    pub(super) fn get(&self, table: Table) -> Request {
        let how = (NFT_MSG_GETSETELEM, 0, "look up element of nft set");
        message(table, how, &[self], Extent::Keys)
    }

    /// Whether the answer to [`Element::get`] holds this very value and owner.
    pub(super) fn found_in(&self, body: &[u8]) -> Found {
        let list = attribute(
            body.get(4..).unwrap_or_default(),
            NFTA_SET_ELEM_LIST_ELEMENTS,
        );
        let element = list.and_then(|list| attribute(list, NFTA_LIST_ELEM));
        let mut found = Found::default();
        for (kind, value) in each_attribute(element.unwrap_or_default()) {
            match kind {
                NFTA_SET_ELEM_DATA => {
                    found.same_value =
                        attribute(value, NFTA_DATA_VALUE) == Some(&bytes(&self.value)[..]);
                }
                NFTA_SET_ELEM_USERDATA => found.owner = comment(value),
                _ => {}
            }
        }
        found.same_value |= self.value.is_empty();
        found
    }
}

/// What the kernel holds under an element's key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// The value is the one asked about.
    pub same_value: bool,
    /// Whose it is, or empty.
    pub owner: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_padded_to_registers_when_joined() {
        assert_eq!(joined(&[Kind::Interface]), (41, 16));
        assert_eq!(joined(&[Kind::Transport, Kind::Port]), (12 << 6 | 13, 8));
        let key = bytes(&[Part::Transport(6), Part::Port(0x1f90)]);
        assert_eq!(key, [6, 0, 0, 0, 0x1f, 0x90, 0, 0]);
        assert_eq!(bytes(&[Part::Interface("eth0".into())]).len(), 16);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(body: Vec<u8>) {
            let element = Element {
                set: "s".into(),
                key: vec![Part::Port(1)],
                value: vec![Part::Port(2)],
                owner: String::new(),
            };
            let _ = element.found_in(&body);
        }
    }
}
