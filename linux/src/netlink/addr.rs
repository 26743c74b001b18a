//! Addresses of links.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::Emitable;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};

use super::socket::{Answer, NLM_F_CREATE, NLM_F_EXCL, Request, each_attribute};

const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
/// `struct ifaddrmsg`
const IFADDRMSG_BYTES: usize = 8;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;

/// An address of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressSpec {
    /// The link.
    pub index: u32,
    /// The address itself, not that of its subnet.
    pub address: IpAddr,
    /// Length of the subnet's prefix in bits.
    pub prefix_len: u8,
    /// Look for duplicates before use (IPv6 only): takes a second or two, during which the
    /// address cannot be used. Allocated addresses do not need it.
    pub detect_duplicates: bool,
}

impl AddressSpec {
    pub(super) fn add(&self) -> Request {
        let mut message = self.message();
        match self.address {
            IpAddr::V4(v4) => message
                .attributes
                .extend(broadcast(v4, self.prefix_len).map(AddressAttribute::Broadcast)),
            IpAddr::V6(_) if self.detect_duplicates => {}
            IpAddr::V6(_) => {
                message.header.flags = AddressHeaderFlags::Nodad;
                message
                    .attributes
                    .push(AddressAttribute::Flags(AddressFlags::Nodad));
            }
        }
        self.request(
            RTM_NEWADDR,
            NLM_F_CREATE | NLM_F_EXCL,
            &message,
            "add address",
        )
    }

    pub(super) fn remove(&self) -> Request {
        self.request(RTM_DELADDR, 0, &self.message(), "remove address")
    }

    fn message(&self) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.family = family(&self.address);
        message.header.prefix_len = self.prefix_len;
        message.header.index = self.index;
        message.header.scope = AddressScope::Universe;
        message.attributes = vec![
            AddressAttribute::Local(self.address),
            AddressAttribute::Address(self.address),
        ];
        message
    }

    fn request(
        &self,
        kind: u16,
        flags: u16,
        message: &AddressMessage,
        operation: &'static str,
    ) -> Request {
        let mut body = vec![0; message.buffer_len()];
        message.emit(&mut body);
        let object = format!(
            "{}/{} on link {}",
            self.address, self.prefix_len, self.index
        );
        Request {
            kind,
            flags,
            body,
            operation,
            object,
        }
    }

    /// Reads an `RTM_NEWADDR`; none when it is another message or too short.
    pub(super) fn decode(answer: &Answer) -> Option<Self> {
        if answer.kind != RTM_NEWADDR {
            return None;
        }
        let [_, prefix_len, _, _, i0, i1, i2, i3] =
            *answer.body.first_chunk::<IFADDRMSG_BYTES>()?;
        let mut address = None;
        for (kind, value) in each_attribute(&answer.body[IFADDRMSG_BYTES..]) {
            // On point-to-point links IFA_ADDRESS is the peer: IFA_LOCAL wins.
            if kind == IFA_LOCAL || (kind == IFA_ADDRESS && address.is_none()) {
                address = ip(value).or(address);
            }
        }
        let index = u32::from_ne_bytes([i0, i1, i2, i3]);
        Some(Self {
            index,
            address: address?,
            prefix_len,
            detect_duplicates: false,
        })
    }
}

pub(super) fn dump(index: u32) -> Request {
    let mut message = AddressMessage::default();
    message.header.index = index;
    let mut body = vec![0; message.buffer_len()];
    message.emit(&mut body);
    let object = index.to_string();
    Request {
        kind: RTM_GETADDR,
        flags: 0,
        body,
        operation: "list addresses of link",
        object,
    }
}

pub(super) fn family(address: &IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

pub(super) fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = bytes
        .try_into()
        .ok()
        .map(|octets: [u8; 4]| IpAddr::V4(Ipv4Addr::from(octets)));
    v4.or_else(|| {
        bytes
            .try_into()
            .ok()
            .map(|octets: [u8; 16]| Ipv6Addr::from(octets).into())
    })
}

/// The subnet's last address; a /31 or /32 has none to spare (RFC 3021).
fn broadcast(address: Ipv4Addr, prefix_len: u8) -> Option<Ipv4Addr> {
    let host_bits = 32_u32
        .checked_sub(u32::from(prefix_len))
        .filter(|bits| *bits >= 2)?;
    let mask = u32::MAX.checked_shl(host_bits).unwrap_or(0);
    Some(Ipv4Addr::from_bits(address.to_bits() | !mask))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_broadcast_address_is_the_last_of_the_subnet() {
        let of = |text: &str, len| broadcast(text.parse().unwrap(), len).map(|b| b.to_string());
        assert_eq!(of("10.1.2.3", 24).as_deref(), Some("10.1.2.255"));
        assert_eq!(of("10.1.2.3", 0).as_deref(), Some("255.255.255.255"));
        assert_eq!(of("10.1.2.3", 30).as_deref(), Some("10.1.2.3"));
        assert_eq!(of("10.1.2.3", 31), None);
        assert_eq!(of("10.1.2.3", 32), None);
        assert_eq!(of("10.1.2.3", 200), None);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_address_reader_panic(body: Vec<u8>) {
            let _ = AddressSpec::decode(&Answer { kind: RTM_NEWADDR, body });
        }
    }
}
