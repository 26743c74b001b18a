//! VXLAN devices: `Documentation/networking/vxlan.rst`, `include/uapi/linux/if_link.h`.

use std::net::IpAddr;

use super::addr::ip;
use super::attribute::{put, put_address, put_nested, put_text, put_u32};
use super::link::Mac;
use super::socket::{NLM_F_CREATE, NLM_F_EXCL, Request, each_attribute};

const RTM_NEWLINK: u16 = 16;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_VXLAN_ID: u16 = 1;
const IFLA_VXLAN_LINK: u16 = 3;
const IFLA_VXLAN_LOCAL: u16 = 4;
const IFLA_VXLAN_LEARNING: u16 = 7;
const IFLA_VXLAN_PORT: u16 = 15;
const IFLA_VXLAN_LOCAL6: u16 = 17;
const IFLA_VXLAN_GBP: u16 = 23;

/// What a VXLAN device is made as, and cannot be changed in afterwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanConfig {
    /// Network identifier, 24 bits.
    pub vni: u32,
    /// UDP port of the outer packets.
    pub port: u16,
    /// Source address of the outer packets.
    pub local: Option<IpAddr>,
    /// Index of the link the outer packets leave by.
    pub underlay: Option<u32>,
    /// Learn forwarding entries from what arrives.
    pub learning: bool,
    /// Carry group policy marks.
    pub gbp: bool,
}

/// A VXLAN device to make, down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanSpec {
    /// Name, at most 15 bytes.
    pub name: String,
    /// Hardware address: given at creation, so that no one (udev) thinks it may choose one.
    pub mac: Mac,
    /// In bytes.
    pub mtu_bytes: u32,
    /// The owner's mark.
    pub alias: String,
    /// What it is.
    pub config: VxlanConfig,
}

impl VxlanSpec {
    pub(super) fn request(&self) -> Request {
        // struct ifinfomsg, all zero: any index, down.
        let mut body = vec![0; 16];
        put_text(&mut body, IFLA_IFNAME, &self.name);
        put(&mut body, IFLA_ADDRESS, &self.mac.0);
        put_u32(&mut body, IFLA_MTU, self.mtu_bytes);
        put(&mut body, IFLA_IFALIAS, self.alias.as_bytes());
        put_nested(&mut body, IFLA_LINKINFO, |info| {
            put_text(info, IFLA_INFO_KIND, "vxlan");
            put_nested(info, IFLA_INFO_DATA, |data| self.config.put(data));
        });
        Request {
            kind: RTM_NEWLINK,
            flags: NLM_F_CREATE | NLM_F_EXCL,
            body,
            operation: "create vxlan device",
            object: format!(
                "{} with VNI {} on UDP port {}",
                self.name, self.config.vni, self.config.port
            ),
        }
    }
}

impl VxlanConfig {
    fn put(&self, data: &mut Vec<u8>) {
        put_u32(data, IFLA_VXLAN_ID, self.vni);
        if let Some(local) = self.local {
            let kind = if local.is_ipv4() {
                IFLA_VXLAN_LOCAL
            } else {
                IFLA_VXLAN_LOCAL6
            };
            put_address(data, kind, local);
        }
        if let Some(underlay) = self.underlay {
            put_u32(data, IFLA_VXLAN_LINK, underlay);
        }
        put(data, IFLA_VXLAN_LEARNING, &[u8::from(self.learning)]);
        put(data, IFLA_VXLAN_PORT, &self.port.to_be_bytes());
        if self.gbp {
            put(data, IFLA_VXLAN_GBP, &[]);
        }
    }

    /// Reads `IFLA_INFO_DATA` of a link of kind `vxlan`.
    pub(super) fn decode(data: &[u8]) -> Self {
        let mut config = Self {
            vni: 0,
            port: 0,
            local: None,
            underlay: None,
            learning: false,
            gbp: false,
        };
        let number = |value: &[u8]| value.first_chunk::<4>().map(|b| u32::from_ne_bytes(*b));
        for (kind, value) in each_attribute(data) {
            match kind {
                IFLA_VXLAN_ID => config.vni = number(value).unwrap_or_default(),
                IFLA_VXLAN_LINK => config.underlay = number(value).filter(|index| *index != 0),
                IFLA_VXLAN_LOCAL | IFLA_VXLAN_LOCAL6 => {
                    config.local = ip(value).filter(|address| !address.is_unspecified());
                }
                IFLA_VXLAN_LEARNING => config.learning = value.first() == Some(&1),
                IFLA_VXLAN_PORT => {
                    config.port = value
                        .first_chunk::<2>()
                        .map(|b| u16::from_be_bytes(*b))
                        .unwrap_or_default();
                }
                IFLA_VXLAN_GBP => config.gbp = true,
                _ => {}
            }
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_vxlan_reader_panic(data: Vec<u8>) {
            let _ = VxlanConfig::decode(&data);
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for local in ["192.0.2.1", "2001:db8::1"] {
            let config = VxlanConfig {
                vni: 1,
                port: 8472,
                local: local.parse().ok(),
                underlay: Some(7),
                learning: false,
                gbp: true,
            };
            let mut data = Vec::new();
            config.put(&mut data);
            assert_eq!(VxlanConfig::decode(&data), config);
        }
    }
}
