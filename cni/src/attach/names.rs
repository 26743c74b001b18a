//! Names and hardware addresses of what an attachment has: the same for the same attachment, so
//! that every verb finds them without asking anyone.

use std::net::IpAddr;

use linux::netlink::Mac;

use crate::ipam::Owner;

/// First of every alias of ours.
const MARK: &str = "ferrule";

/// The kernel keeps 255 bytes of an alias.
const MAX_ALIAS_BYTES: usize = 255;

/// Name of the node's end: the same for the same attachment, so that DEL and a repeated ADD find
/// it without asking anyone. 52 bits of hash: among 10 000 pods a clash has a chance of 1 in 90
/// million, and the alias tells it.
#[must_use]
pub fn host_name(network: &str, owner: &Owner) -> String {
    let key = format!("{network}\0{}\0{}", owner.container_id, owner.ifname);
    format!("fv{:013x}", hash(key.as_bytes()) >> 12)
}

/// Name of the device that what the container sends takes a detour by, to be limited.
#[must_use]
pub fn detour_name(network: &str, owner: &Owner) -> String {
    host_name(network, owner).replacen("fv", "fb", 1)
}

/// The owner's mark on the node's end.
#[must_use]
pub fn alias(network: &str, owner: &Owner) -> String {
    let mut alias = format!("{MARK}:{network}:{}:{}", owner.ifname, owner.container_id);
    // Names are ASCII, so any place is a boundary.
    alias.truncate(MAX_ALIAS_BYTES);
    alias
}

/// Begins the alias of every port of a network.
#[must_use]
pub fn alias_prefix(network: &str) -> String {
    format!("{MARK}:{network}:")
}

/// Hardware address of the container's end: made from its first address, so that whoever still
/// has the former holder of a reused address in his neighbour table is right nonetheless, and
/// nothing needs to be announced. Without an address, from the attachment.
#[must_use]
pub fn container_mac(first: Option<IpAddr>, host_name: &str) -> Mac {
    match first {
        Some(IpAddr::V4(v4)) => {
            let [a, b, c, d] = v4.octets();
            Mac([0x0a, 0x58, a, b, c, d])
        }
        Some(IpAddr::V6(v6)) => hashed_mac(0x0e, &v6.octets()),
        None => hashed_mac(0x06, host_name.as_bytes()),
    }
}

/// Hardware address of the node's end: fixed at creation, so that nothing (udev) changes it.
#[must_use]
pub fn host_mac(host_name: &str) -> Mac {
    hashed_mac(0x02, host_name.as_bytes())
}

/// Hardware address of the bridge: of its own, or it would change with its ports.
#[must_use]
pub fn bridge_mac(bridge: &str, gateway: Option<IpAddr>) -> Mac {
    match gateway {
        Some(IpAddr::V4(v4)) => container_mac(Some(v4.into()), bridge),
        Some(IpAddr::V6(_)) | None => hashed_mac(0x02, bridge.as_bytes()),
    }
}

/// Locally administered (bit 1), not a group (bit 0): `first` has the former only.
fn hashed_mac(first: u8, bytes: &[u8]) -> Mac {
    let [_, _, _, a, b, c, d, e] = hash(bytes).to_be_bytes();
    Mac([first, a, b, c, d, e])
}

fn hash(bytes: &[u8]) -> u64 {
    let sum = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    // FNV's last step spreads the last bytes badly; one more mixing round mends that.
    let mixed = (sum ^ (sum >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^ (mixed >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(id: &str) -> Owner {
        Owner {
            container_id: id.into(),
            ifname: "eth0".into(),
        }
    }

    #[test]
    fn names_fit_and_differ() {
        let name = host_name("net", &owner("a"));
        assert_eq!(name.len(), 15);
        assert_ne!(name, host_name("net", &owner("b")));
        assert_ne!(name, host_name("net2", &owner("a")));
        let long = alias("net", &owner(&"x".repeat(400)));
        assert_eq!(long.len(), 255);
        assert!(long.starts_with(&alias_prefix("net")));
    }

    #[test]
    fn a_reused_address_has_the_same_hardware_address() {
        let ip = Some("10.244.0.2".parse().unwrap());
        assert_eq!(container_mac(ip, "a").to_string(), "0a:58:0a:f4:00:02");
        assert_eq!(container_mac(ip, "a"), container_mac(ip, "b"));
        for mac in [
            container_mac(None, "x"),
            host_mac("x"),
            bridge_mac("cni0", None),
        ] {
            assert_eq!(mac.0[0] & 0b11, 0b10, "{mac} is local and no group");
        }
    }
}
