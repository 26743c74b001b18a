//! Links: requests and what a link is.

use std::fmt;
use std::os::fd::RawFd;
use std::str::FromStr;

use netlink_packet_core::Emitable;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoBridgePort, InfoData, InfoKind, InfoPortData,
    InfoPortKind, InfoVeth, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
};

use super::socket::{Answer, NLM_F_CREATE, NLM_F_EXCL, Request, attribute, each_attribute};
use super::vxlan::VxlanConfig;

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;

/// `struct ifinfomsg`
const IFINFOMSG_BYTES: usize = 16;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_TXQLEN: u16 = 13;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INFO_SLAVE_DATA: u16 = 5;
const IFLA_BR_VLAN_FILTERING: u16 = 7;
const IFLA_BR_VLAN_DEFAULT_PVID: u16 = 39;
const IFLA_BRPORT_MODE: u16 = 4;
const IFLA_BRPORT_ISOLATED: u16 = 33;

/// A hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Not six hexadecimal octets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a hardware address like 0a:58:0a:f4:00:02")]
pub struct BadMac(String);

impl FromStr for Mac {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        let bad = || BadMac(text.to_owned());
        let mut octets = [0; 6];
        let mut parts = text.split([':', '-']);
        for octet in &mut octets {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(bad)?;
            *octet = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            Err(bad())
        } else {
            Ok(Self(octets))
        }
    }
}

/// A link as the kernel told it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Interface index in its namespace.
    pub index: u32,
    /// Name.
    pub name: String,
    /// `IFF_UP`.
    pub up: bool,
    /// `IFF_PROMISC`.
    pub promiscuous: bool,
    /// Hardware address, when it has one of six octets.
    pub mac: Option<Mac>,
    /// In bytes.
    pub mtu_bytes: u32,
    /// Index of the bridge it is a port of.
    pub master: Option<u32>,
    /// `bridge`, `veth`, …; empty for hardware.
    pub kind: String,
    /// Owner's mark, or empty.
    pub alias: String,
    /// As a bridge port: frames may go back where they came from.
    pub hairpin: bool,
    /// As a bridge port: may not talk to other isolated ports.
    pub isolated: bool,
    /// `IFF_ALLMULTI`.
    pub all_multicast: bool,
    /// Length of the transmit queue in packets.
    pub transmit_queue: u32,
    /// As a bridge: it looks at VLAN tags.
    pub vlan_filtering: bool,
    /// As a bridge: the VLAN that new ports begin with. None when the kernel's bridges know no
    /// VLANs; 0 when ports begin with none.
    pub default_vlan: Option<u16>,
    /// As a VXLAN device: what it was made as.
    pub vxlan: Option<VxlanConfig>,
}

impl Link {
    /// Reads an `RTM_NEWLINK`; none when it is another message or too short.
    pub(super) fn decode(answer: &Answer) -> Option<Self> {
        if answer.kind != RTM_NEWLINK {
            return None;
        }
        let header = answer.body.first_chunk::<IFINFOMSG_BYTES>()?;
        let [_, _, _, _, i0, i1, i2, i3, f0, f1, f2, f3, ..] = *header;
        let flags = LinkFlags::from_bits_retain(u32::from_ne_bytes([f0, f1, f2, f3]));
        let mut link = Self {
            index: u32::from_ne_bytes([i0, i1, i2, i3]),
            up: flags.contains(LinkFlags::Up),
            promiscuous: flags.contains(LinkFlags::Promisc),
            all_multicast: flags.contains(LinkFlags::Allmulti),
            ..Self::default()
        };
        for (kind, value) in each_attribute(&answer.body[IFINFOMSG_BYTES..]) {
            match kind {
                IFLA_ADDRESS => link.mac = value.try_into().ok().map(Mac),
                IFLA_IFNAME => link.name = text(value),
                IFLA_MTU => link.mtu_bytes = number(value).unwrap_or_default(),
                IFLA_MASTER => link.master = number(value),
                IFLA_TXQLEN => link.transmit_queue = number(value).unwrap_or_default(),
                IFLA_IFALIAS => link.alias = text(value),
                IFLA_LINKINFO => link.decode_info(value),
                _ => {}
            }
        }
        Some(link)
    }

    fn decode_info(&mut self, info: &[u8]) {
        self.kind = attribute(info, IFLA_INFO_KIND)
            .map(text)
            .unwrap_or_default();
        if self.kind == "bridge"
            && let Some(bridge) = attribute(info, IFLA_INFO_DATA)
        {
            self.vlan_filtering =
                attribute(bridge, IFLA_BR_VLAN_FILTERING).is_some_and(|v| v.first() == Some(&1));
            self.default_vlan = attribute(bridge, IFLA_BR_VLAN_DEFAULT_PVID)
                .and_then(|v| v.first_chunk::<2>())
                .map(|bytes| u16::from_ne_bytes(*bytes));
        }
        if self.kind == "vxlan" {
            self.vxlan = attribute(info, IFLA_INFO_DATA).map(VxlanConfig::decode);
        }
        if let Some(port) = attribute(info, IFLA_INFO_SLAVE_DATA) {
            let flag = |kind| attribute(port, kind).is_some_and(|v| v.first() == Some(&1));
            self.hairpin = flag(IFLA_BRPORT_MODE);
            self.isolated = flag(IFLA_BRPORT_ISOLATED);
        }
    }
}

fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value)
        .trim_end_matches('\0')
        .to_owned()
}

fn number(value: &[u8]) -> Option<u32> {
    value
        .first_chunk::<4>()
        .map(|bytes| u32::from_ne_bytes(*bytes))
}

/// A bridge to make. It comes up with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeSpec {
    /// Name, at most 15 bytes.
    pub name: String,
    /// Set at creation: otherwise it would change with every port, and udev might race us.
    pub mac: Option<Mac>,
    /// In bytes; none lets it follow its ports.
    pub mtu_bytes: Option<u32>,
}

/// A veth pair to make in one request: one end here, the other born inside a namespace. Both are
/// down: what must hold before the first packet is set first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VethSpec {
    /// Name of our end.
    pub name: String,
    /// Hardware address of our end.
    pub mac: Mac,
    /// Bridge that our end joins.
    pub master: Option<u32>,
    /// Of both ends, in bytes; none is the kernel's 1500.
    pub mtu_bytes: Option<u32>,
    /// Name of the other end.
    pub peer_name: String,
    /// Hardware address of the other end.
    pub peer_mac: Mac,
    /// Open network namespace of the other end; must stay open until the request was sent.
    pub peer_netns: RawFd,
}

/// What a bridge does on one port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortSpec {
    /// The port.
    pub index: u32,
    /// Frames may go back where they came from.
    pub hairpin: bool,
    /// May not talk to other isolated ports.
    pub isolated: bool,
}

fn message(index: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes;
    message
}

fn with_up(mut message: LinkMessage, up: bool) -> LinkMessage {
    message.header.change_mask = LinkFlags::Up;
    message.header.flags = if up {
        LinkFlags::Up
    } else {
        LinkFlags::empty()
    };
    message
}

fn request(
    kind: u16,
    flags: u16,
    message: &LinkMessage,
    operation: &'static str,
    object: String,
) -> Request {
    let mut body = vec![0; message.buffer_len()];
    message.emit(&mut body);
    Request {
        kind,
        flags,
        body,
        operation,
        object,
    }
}

impl BridgeSpec {
    pub(super) fn request(&self) -> Request {
        let mut attributes = vec![
            LinkAttribute::IfName(self.name.clone()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
        ];
        attributes.extend(self.mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
        attributes.extend(self.mtu_bytes.map(LinkAttribute::Mtu));
        let message = with_up(message(0, attributes), true);
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        request(
            RTM_NEWLINK,
            flags,
            &message,
            "create bridge",
            self.name.clone(),
        )
    }
}

impl VethSpec {
    pub(super) fn request(&self) -> Request {
        let mut peer = vec![
            LinkAttribute::IfName(self.peer_name.clone()),
            LinkAttribute::Address(self.peer_mac.0.to_vec()),
            LinkAttribute::NetNsFd(self.peer_netns),
        ];
        peer.extend(self.mtu_bytes.map(LinkAttribute::Mtu));
        let peer = message(0, peer);
        let mut ours = vec![
            LinkAttribute::IfName(self.name.clone()),
            LinkAttribute::Address(self.mac.0.to_vec()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ];
        ours.extend(self.master.map(LinkAttribute::Controller));
        ours.extend(self.mtu_bytes.map(LinkAttribute::Mtu));
        let object = format!("{} with peer {}", self.name, self.peer_name);
        let message = message(0, ours);
        request(
            RTM_NEWLINK,
            NLM_F_CREATE | NLM_F_EXCL,
            &message,
            "create veth",
            object,
        )
    }
}

impl PortSpec {
    pub(super) fn request(&self) -> Request {
        let port = vec![
            InfoBridgePort::HairpinMode(self.hairpin),
            InfoBridgePort::Isolated(self.isolated),
        ];
        let info = LinkAttribute::LinkInfo(vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(port)),
        ]);
        let object = format!("link {}", self.index);
        let message = message(self.index, vec![info]);
        request(
            RTM_NEWLINK,
            0,
            &message,
            "set bridge port options of",
            object,
        )
    }
}

pub(super) fn remove(name: &str) -> Request {
    let message = message(0, vec![LinkAttribute::IfName(name.to_owned())]);
    request(RTM_DELLINK, 0, &message, "delete link", name.to_owned())
}

pub(super) fn set_up(index: u32, up: bool) -> Request {
    let operation = if up { "set up link" } else { "set down link" };
    request(
        RTM_SETLINK,
        0,
        &with_up(message(index, vec![]), up),
        operation,
        index.to_string(),
    )
}

/// No address is made up for the link: no duplicate detection, router solicitation or group
/// report goes out when it comes up. `IFLA_INET6_ADDR_GEN_MODE`.
pub(super) fn no_link_local(index: u32) -> Request {
    let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    let spec = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])]);
    let message = message(index, vec![spec]);
    request(
        RTM_SETLINK,
        0,
        &message,
        "leave without link-local address",
        index.to_string(),
    )
}

pub(super) fn set_mtu(index: u32, mtu_bytes: u32) -> Request {
    let message = message(index, vec![LinkAttribute::Mtu(mtu_bytes)]);
    request(
        RTM_SETLINK,
        0,
        &message,
        "set mtu of link",
        format!("{index} to {mtu_bytes}"),
    )
}

pub(super) fn set_mac(index: u32, mac: Mac) -> Request {
    let message = message(index, vec![LinkAttribute::Address(mac.0.to_vec())]);
    request(
        RTM_SETLINK,
        0,
        &message,
        "set hardware address of link",
        format!("{index} to {mac}"),
    )
}

pub(super) fn set_promiscuous(index: u32, on: bool) -> Request {
    let mut message = message(index, vec![]);
    message.header.change_mask = LinkFlags::Promisc;
    message.header.flags = if on {
        LinkFlags::Promisc
    } else {
        LinkFlags::empty()
    };
    request(
        RTM_SETLINK,
        0,
        &message,
        "set promiscuous mode of link",
        index.to_string(),
    )
}

pub(super) fn set_all_multicast(index: u32, on: bool) -> Request {
    let mut message = message(index, vec![]);
    message.header.change_mask = LinkFlags::Allmulti;
    message.header.flags = if on {
        LinkFlags::Allmulti
    } else {
        LinkFlags::empty()
    };
    request(
        RTM_SETLINK,
        0,
        &message,
        "set all-multicast mode of link",
        index.to_string(),
    )
}

pub(super) fn set_queue(index: u32, packets: u32) -> Request {
    let message = message(index, vec![LinkAttribute::TxQueueLen(packets)]);
    let object = format!("{index} to {packets}");
    let operation = "set transmit queue length of link";
    request(RTM_SETLINK, 0, &message, operation, object)
}

pub(super) fn set_alias(index: u32, alias: &str) -> Request {
    let message = message(index, vec![LinkAttribute::IfAlias(alias.to_owned())]);
    request(
        RTM_SETLINK,
        0,
        &message,
        "set alias of link",
        index.to_string(),
    )
}

pub(super) fn get_by_name(name: &str) -> Request {
    let mut attributes = vec![LinkAttribute::IfName(name.to_owned())];
    attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    request(
        RTM_GETLINK,
        0,
        &message(0, attributes),
        "look up link",
        name.to_owned(),
    )
}

pub(super) fn get_by_index(index: u32) -> Request {
    let attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    request(
        RTM_GETLINK,
        0,
        &message(index, attributes),
        "look up link",
        index.to_string(),
    )
}

pub(super) fn dump_ports(bridge_index: u32) -> Request {
    let attributes = vec![
        LinkAttribute::Controller(bridge_index),
        LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]),
    ];
    let mut message = message(0, attributes);
    message.header.interface_family = AddressFamily::Unspec;
    request(
        RTM_GETLINK,
        0,
        &message,
        "list ports of bridge",
        bridge_index.to_string(),
    )
}

/// All links of a kind.
pub(super) fn dump_kind(kind: &str) -> Request {
    let attributes = vec![
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Other(kind.to_owned()))]),
        LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]),
    ];
    let mut message = message(0, attributes);
    message.header.interface_family = AddressFamily::Unspec;
    let operation = "list links of kind";
    request(RTM_GETLINK, 0, &message, operation, kind.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hardware_address_reads_back_as_printed() {
        let mac = Mac([0x0a, 0x58, 10, 244, 0, 2]);
        assert_eq!(mac.to_string(), "0a:58:0a:f4:00:02");
        assert_eq!(mac.to_string().parse(), Ok(mac));
        for bad in [
            "",
            "0a:58",
            "0a:58:0a:f4:00:zz",
            "0a:58:0a:f4:00:02:03",
            "a:58:0a:f4:00:02",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_link_reader_panic(body: Vec<u8>) {
            let _ = Link::decode(&Answer { kind: RTM_NEWLINK, body });
        }
    }
}
