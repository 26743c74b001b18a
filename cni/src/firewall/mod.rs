//! Rules as data, and who carries them out: nftables by netlink, or iptables where a key asks for
//! it.
//!
//! * `masquerade`: one static chain per network.
//! * `ports`: host ports, elements of a network's maps.
//! * `conditions`: what restricts host ports, in `nft`'s words.
//! * `guard`: which hardware address a bridge's port may send from.
//! * `isolation`: which bridges may talk to each other.
//! * `untracked`: outer packets of tunnels, kept out of connection tracking.
//! * [`xtables`]: masquerade, host ports and admission by the `iptables` programs.
//!
//! With nftables nothing here grows with the number of pods but maps and sets, so ADD and DEL cost
//! the same beside 10 pods and 5 000.

mod conditions;
mod guard;
mod isolation;
mod masquerade;
mod ports;
mod untracked;
pub mod xtables;

pub use conditions::conditions;
pub use guard::{ensure_guard, guard_elements, guard_is_there, remove_guard};
pub use isolation::{Isolation, isolate, isolation_is_there, stop_isolating};
pub use masquerade::{ensure_masquerade, masquerade, masquerade_prefix};
pub use ports::{
    Forward, HostPorts, PortMapping, PortRules, add_forwards, forwards_are_there,
    let_loopback_through, ports_prefix, remove_forwards, remove_port_rules,
};
pub use untracked::{UNTRACKED_PREFIX, untracked};

use linux::nft::Prefix;

fn prefix(net: ipnet::IpNet) -> Prefix {
    Prefix {
        address: net.network(),
        len: net.prefix_len(),
    }
}

/// FNV-1a, folded to 32 bits. For names only.
fn short_hash(bytes: &[u8]) -> u32 {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (hash ^ (hash >> 32)) as u32
}
