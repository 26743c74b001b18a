//! Permanent neighbours and forwarding entries of VXLAN devices: rtnetlink(7), `struct ndmsg`.

use std::net::IpAddr;

use super::addr::ip;
use super::attribute::{put, put_address, put_u32};
use super::link::Mac;
use super::socket::{Answer, NLM_F_CREATE, NLM_F_REPLACE, Request, each_attribute};

const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const RTM_GETNEIGH: u16 = 30;
/// `struct ndmsg`
const NDMSG_BYTES: usize = 12;
const NUD_PERMANENT: u16 = 0x80;
const NTF_SELF: u8 = 0x02;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NDA_IFINDEX: u16 = 8;
const AF_INET: u8 = libc::AF_INET as u8;
const AF_INET6: u8 = libc::AF_INET6 as u8;
const AF_BRIDGE: u8 = libc::AF_BRIDGE as u8;

/// "`address` has the hardware address `mac`": an entry that never ages.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NeighbourSpec {
    /// The link.
    pub index: u32,
    /// Whose.
    pub address: IpAddr,
    /// Its hardware address.
    pub mac: Mac,
}

/// "Frames for `mac` are sent to `destination`": a forwarding entry of a VXLAN device.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FdbSpec {
    /// The VXLAN device.
    pub index: u32,
    /// Inner destination.
    pub mac: Mac,
    /// Outer destination.
    pub destination: IpAddr,
}

/// A neighbour as the kernel told it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// The link.
    pub index: u32,
    /// Whose.
    pub address: IpAddr,
    /// Its hardware address, when it is known.
    pub mac: Option<Mac>,
    /// It never ages.
    pub permanent: bool,
}

/// A forwarding entry as the kernel told it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FdbEntry {
    /// The device.
    pub index: u32,
    /// Inner destination; all zero for "everything else".
    pub mac: Mac,
    /// Outer destination, when it has one.
    pub destination: Option<IpAddr>,
    /// It never ages.
    pub permanent: bool,
}

fn header(family: u8, index: u32, state: u16, flags: u8) -> Vec<u8> {
    let mut body = vec![family, 0, 0, 0];
    body.extend(index.to_ne_bytes());
    body.extend(state.to_ne_bytes());
    body.extend([flags, 0]);
    body
}

fn family_of(address: IpAddr) -> u8 {
    if address.is_ipv4() { AF_INET } else { AF_INET6 }
}

impl NeighbourSpec {
    fn request(&self, kind: u16, flags: u16, operation: &'static str) -> Request {
        let mut body = header(family_of(self.address), self.index, NUD_PERMANENT, 0);
        put_address(&mut body, NDA_DST, self.address);
        put(&mut body, NDA_LLADDR, &self.mac.0);
        Request {
            kind,
            flags,
            body,
            operation,
            object: format!("{} at {} on link {}", self.address, self.mac, self.index),
        }
    }

    pub(super) fn set(&self) -> Request {
        self.request(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, "set neighbour")
    }

    pub(super) fn remove(&self) -> Request {
        self.request(RTM_DELNEIGH, 0, "remove neighbour")
    }
}

impl FdbSpec {
    fn request(&self, kind: u16, flags: u16, operation: &'static str) -> Request {
        let mut body = header(AF_BRIDGE, self.index, NUD_PERMANENT, NTF_SELF);
        put(&mut body, NDA_LLADDR, &self.mac.0);
        put_address(&mut body, NDA_DST, self.destination);
        Request {
            kind,
            flags,
            body,
            operation,
            object: format!(
                "{} to {} on link {}",
                self.mac, self.destination, self.index
            ),
        }
    }

    pub(super) fn set(&self) -> Request {
        self.request(
            RTM_NEWNEIGH,
            NLM_F_CREATE | NLM_F_REPLACE,
            "set forwarding entry",
        )
    }

    pub(super) fn remove(&self) -> Request {
        self.request(RTM_DELNEIGH, 0, "remove forwarding entry")
    }
}

impl Neighbour {
    /// Reads an `RTM_NEWNEIGH` of an IP family.
    pub(super) fn decode(answer: &Answer) -> Option<Self> {
        let (family, index, state) = decode_header(answer)?;
        if family != AF_INET && family != AF_INET6 {
            return None;
        }
        let mut address = None;
        let mut mac = None;
        for (kind, value) in each_attribute(&answer.body[NDMSG_BYTES..]) {
            match kind {
                NDA_DST => address = ip(value),
                NDA_LLADDR => mac = value.try_into().ok().map(Mac),
                _ => {}
            }
        }
        Some(Self {
            index,
            address: address?,
            mac,
            permanent: state & NUD_PERMANENT != 0,
        })
    }
}

impl FdbEntry {
    /// Reads an `RTM_NEWNEIGH` of the bridge family.
    pub(super) fn decode(answer: &Answer) -> Option<Self> {
        let (family, index, state) = decode_header(answer)?;
        if family != AF_BRIDGE {
            return None;
        }
        let mut destination = None;
        let mut mac = None;
        for (kind, value) in each_attribute(&answer.body[NDMSG_BYTES..]) {
            match kind {
                NDA_DST => destination = ip(value),
                NDA_LLADDR => mac = value.try_into().ok().map(Mac),
                _ => {}
            }
        }
        Some(Self {
            index,
            mac: mac?,
            destination,
            permanent: state & NUD_PERMANENT != 0,
        })
    }
}

/// Family, link and state.
fn decode_header(answer: &Answer) -> Option<(u8, u32, u16)> {
    if answer.kind != RTM_NEWNEIGH {
        return None;
    }
    let [family, _, _, _, i0, i1, i2, i3, s0, s1, ..] =
        *answer.body.first_chunk::<NDMSG_BYTES>()?;
    let index = u32::from_ne_bytes([i0, i1, i2, i3]);
    Some((family, index, u16::from_ne_bytes([s0, s1])))
}

/// One dump per family: the kernel filters by link.
pub(super) fn dump_neighbours(index: u32) -> [Request; 2] {
    [AF_INET, AF_INET6].map(|family| {
        let mut body = header(family, 0, 0, 0);
        put_u32(&mut body, NDA_IFINDEX, index);
        Request {
            kind: RTM_GETNEIGH,
            flags: 0,
            body,
            operation: "list neighbours of link",
            object: index.to_string(),
        }
    })
}

pub(super) fn dump_fdb(index: u32) -> Request {
    Request {
        kind: RTM_GETNEIGH,
        flags: 0,
        body: header(AF_BRIDGE, index, 0, 0),
        operation: "list forwarding entries of link",
        object: index.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_neighbour_readers_panic(body: Vec<u8>) {
            let answer = Answer { kind: RTM_NEWNEIGH, body };
            let _ = Neighbour::decode(&answer);
            let _ = FdbEntry::decode(&answer);
        }
    }
}
