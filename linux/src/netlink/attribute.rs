//! Building attributes by hand, for messages of which little is needed.

use std::net::IpAddr;

/// Nested attributes say so.
const NLA_F_NESTED: u16 = 0x8000;

pub(super) fn put(into: &mut Vec<u8>, kind: u16, value: &[u8]) {
    // Everything built here has a few hundred bytes at most.
    into.extend(((value.len() + 4) as u16).to_ne_bytes());
    into.extend(kind.to_ne_bytes());
    into.extend(value);
    into.resize(into.len().next_multiple_of(4), 0);
}

pub(super) fn put_u32(into: &mut Vec<u8>, kind: u16, value: u32) {
    put(into, kind, &value.to_ne_bytes());
}

pub(super) fn put_text(into: &mut Vec<u8>, kind: u16, text: &str) {
    let mut value = text.as_bytes().to_vec();
    value.push(0);
    put(into, kind, &value);
}

/// An address, four or sixteen bytes.
pub(super) fn put_address(into: &mut Vec<u8>, kind: u16, address: IpAddr) {
    match address {
        IpAddr::V4(v4) => put(into, kind, &v4.octets()),
        IpAddr::V6(v6) => put(into, kind, &v6.octets()),
    }
}

pub(super) fn put_nested(into: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let mut inner = Vec::new();
    fill(&mut inner);
    put(into, kind | NLA_F_NESTED, &inner);
}

/// `struct ifinfomsg` of a family, for one link.
pub(super) fn link_header(family: u8, index: u32) -> Vec<u8> {
    let mut body = vec![family, 0, 0, 0];
    body.extend(index.to_ne_bytes());
    body.extend([0; 8]);
    body
}
