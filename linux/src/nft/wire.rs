//! Attributes and messages of nfnetlink: `include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h`.

use crate::netlink::socket::Request;

pub(super) const NFNL_SUBSYS_NFTABLES: u16 = 10;
pub(super) const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
pub(super) const NFNL_MSG_BATCH_END: u16 = 0x11;

pub(super) const NFT_MSG_NEWTABLE: u16 = 0;
pub(super) const NFT_MSG_DELTABLE: u16 = 2;
pub(super) const NFT_MSG_NEWCHAIN: u16 = 3;
pub(super) const NFT_MSG_GETCHAIN: u16 = 4;
pub(super) const NFT_MSG_DELCHAIN: u16 = 5;
pub(super) const NFT_MSG_NEWRULE: u16 = 6;
pub(super) const NFT_MSG_DELRULE: u16 = 8;
pub(super) const NFT_MSG_NEWSET: u16 = 9;
pub(super) const NFT_MSG_DELSET: u16 = 11;
pub(super) const NFT_MSG_NEWSETELEM: u16 = 12;
pub(super) const NFT_MSG_GETSETELEM: u16 = 13;
pub(super) const NFT_MSG_DELSETELEM: u16 = 14;

pub(super) const NFTA_DATA_VALUE: u16 = 1;
pub(super) const NFTA_LIST_ELEM: u16 = 1;

const NLA_F_NESTED: u16 = 0x8000;

/// User data of rules and elements: type 0 is a comment, which `nft list` shows.
const COMMENT: u8 = 0;

/// `nft` shows no more of a comment.
const MAX_COMMENT_BYTES: usize = 120;

pub(super) fn envelope(kind: u16) -> Request {
    let body = header(0, NFNL_SUBSYS_NFTABLES);
    Request {
        kind,
        flags: 0,
        body,
        operation: "frame",
        object: "nft transaction".into(),
    }
}

pub(super) fn request(
    kind: u16,
    flags: u16,
    body: Vec<u8>,
    operation: &'static str,
    object: &str,
) -> Request {
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
pub(super) fn header(family: u8, resource: u16) -> Vec<u8> {
    let [high, low] = resource.to_be_bytes();
    vec![family, 0, high, low]
}

pub(super) fn put(into: &mut Vec<u8>, kind: u16, value: &[u8]) {
    // Attributes here are a few hundred bytes at most.
    into.extend(((value.len() + 4) as u16).to_ne_bytes());
    into.extend(kind.to_ne_bytes());
    into.extend(value);
    into.resize(into.len().next_multiple_of(4), 0);
}

pub(super) fn put_text(into: &mut Vec<u8>, kind: u16, text: &str) {
    let mut value = text.as_bytes().to_vec();
    value.push(0);
    put(into, kind, &value);
}

/// nftables takes its numbers in network order.
pub(super) fn put_number(into: &mut Vec<u8>, kind: u16, value: u32) {
    put(into, kind, &value.to_be_bytes());
}

pub(super) fn put_nested(into: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let mut inner = Vec::new();
    fill(&mut inner);
    put(into, kind | NLA_F_NESTED, &inner);
}

/// A comment as user data: type, length, text, closing zero. Nothing for an empty one.
pub(super) fn put_comment(into: &mut Vec<u8>, kind: u16, comment: &str) {
    if comment.is_empty() {
        return;
    }
    let text = &comment.as_bytes()[..comment.len().min(MAX_COMMENT_BYTES)];
    let mut user = vec![COMMENT, text.len() as u8 + 1];
    user.extend(text);
    user.push(0);
    put(into, kind, &user);
}

/// Reads what [`put_comment`] wrote; empty when it is something else.
pub(super) fn comment(user: &[u8]) -> String {
    match user {
        [COMMENT, len, rest @ ..] => {
            let text = rest.get(..usize::from(*len)).unwrap_or_default();
            String::from_utf8_lossy(text)
                .trim_end_matches('\0')
                .to_owned()
        }
        _ => String::new(),
    }
}

pub(super) fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value)
        .trim_end_matches('\0')
        .to_owned()
}

pub(super) fn big_endian(value: &[u8]) -> Option<u32> {
    value
        .first_chunk::<4>()
        .map(|bytes| u32::from_be_bytes(*bytes))
}
