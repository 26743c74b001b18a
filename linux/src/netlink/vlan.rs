//! VLANs of bridges and their ports: `include/uapi/linux/if_bridge.h`.

use super::attribute::{link_header, put, put_nested, put_text};
use super::socket::Request;

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_SETLINK: u16 = 19;
const AF_BRIDGE: u8 = libc::AF_BRIDGE as u8;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_BRIDGE_FLAGS: u16 = 0;
const IFLA_BRIDGE_VLAN_INFO: u16 = 2;
const BRIDGE_FLAGS_MASTER: u16 = 1;
const BRIDGE_VLAN_INFO_PVID: u16 = 2;
const BRIDGE_VLAN_INFO_UNTAGGED: u16 = 4;

/// A VLAN on a port of a bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortVlan {
    /// The port.
    pub index: u32,
    /// 1 to 4094.
    pub id: u16,
    /// What the port sends without a tag belongs to it, and it gets this VLAN's frames without.
    pub native: bool,
}

impl PortVlan {
    fn request(&self, kind: u16, operation: &'static str) -> Request {
        let mut body = link_header(AF_BRIDGE, self.index);
        put_nested(&mut body, IFLA_AF_SPEC, |spec| {
            put(spec, IFLA_BRIDGE_FLAGS, &BRIDGE_FLAGS_MASTER.to_ne_bytes());
            let flags = if self.native {
                BRIDGE_VLAN_INFO_PVID | BRIDGE_VLAN_INFO_UNTAGGED
            } else {
                0
            };
            let mut info = flags.to_ne_bytes().to_vec();
            info.extend(self.id.to_ne_bytes());
            put(spec, IFLA_BRIDGE_VLAN_INFO, &info);
        });
        Request {
            kind,
            flags: 0,
            body,
            operation,
            object: format!("{} of link {}", self.id, self.index),
        }
    }

    pub(super) fn add(&self) -> Request {
        self.request(RTM_SETLINK, "add vlan")
    }

    pub(super) fn remove(&self) -> Request {
        self.request(RTM_DELLINK, "remove vlan")
    }
}

/// Lets a bridge look at tags.
pub(super) fn filter(bridge_index: u32) -> Request {
    const IFLA_LINKINFO: u16 = 18;
    const IFLA_INFO_KIND: u16 = 1;
    const IFLA_INFO_DATA: u16 = 2;
    const IFLA_BR_VLAN_FILTERING: u16 = 7;
    let mut body = link_header(0, bridge_index);
    put_nested(&mut body, IFLA_LINKINFO, |info| {
        put_text(info, IFLA_INFO_KIND, "bridge");
        put_nested(info, IFLA_INFO_DATA, |data| {
            put(data, IFLA_BR_VLAN_FILTERING, &[1]);
        });
    });
    Request {
        kind: RTM_NEWLINK,
        flags: 0,
        body,
        operation: "filter vlans on bridge",
        object: bridge_index.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_native_vlan_is_spelled_as_the_kernel_reads_it() {
        let vlan = PortVlan {
            index: 7,
            id: 100,
            native: true,
        };
        let request = vlan.add();
        assert_eq!(request.kind, RTM_SETLINK);
        assert_eq!((request.body[0], request.body[4]), (7, 7));
        // flags 6 (native and untagged), id 100, as the last attribute.
        assert_eq!(request.body[request.body.len() - 4..], [6, 0, 100, 0]);
        assert_eq!(vlan.remove().kind, RTM_DELLINK);
    }
}
