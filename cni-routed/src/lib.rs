//! The routed plugin: a veth pair per container, no bridge, a host route to each address. What
//! `cni-vxlan` and `cni-hostgw` are on the one-shot path; they differ in their peer agents only.
//!
//! ```text
//!  container: 10.244.1.7/32 ── eth0 ═══ fv… ── node: route 10.244.1.7/32, permanent neighbour
//!             default via 10.244.1.1 (permanent neighbour: the node's end)
//! ```
//!
//! * `state`: what the node's peer agent tells the plugin, a file on tmpfs.
//! * `conf`: the configuration and the state, checked; a bad value names itself.
//! * `plan`: names, hardware addresses, routes and changes from plain values.
//! * `add`, `del`, `check`, `gc`, `status`: one file per verb, thin executors over `linux`.
//!
//! Without a bridge there is no bridge netfilter to depend on: packets between two pods of a node
//! are routed and translated like all others. No ARP and no neighbour discovery happens on a pair:
//! both ends know the other's hardware address for good.
//!
//! Everything made is found again by container id and interface name alone. Forbidden here:
//! forking, sleeping, dumping tables on ADD or DEL, an async runtime, talking to an API server.

mod add;
mod check;
mod conf;
mod del;
mod gc;
mod lease;
mod plan;
pub mod state;
mod status;

use cni::skel::{AttachmentKey, Input, Plugin};
use cni::types::{AttachResult, CniError, ErrorCode};

/// Protocol number of the routes that a peer agent keeps. Not in iproute2's `rt_protos`.
pub const PEER_ROUTE_PROTOCOL: u8 = 140;
/// Protocol number of the routes to containers, which go with their links.
pub const POD_ROUTE_PROTOCOL: u8 = 141;

/// The plugin.
#[derive(Debug, Clone, Copy)]
pub struct Routed {
    /// Name of the plugin: `cni-vxlan` or `cni-hostgw`.
    pub kind: &'static str,
    /// Where its peer agent keeps its state unless the configuration says otherwise.
    pub state_dir: &'static str,
}

/// `cni-vxlan`.
pub const VXLAN: Routed = Routed {
    kind: "cni-vxlan",
    state_dir: "/run/cni/ferrule-vxlan",
};

/// `cni-hostgw`.
pub const HOST_GW: Routed = Routed {
    kind: "cni-hostgw",
    state_dir: "/run/cni/ferrule-hostgw",
};

impl Plugin for Routed {
    fn add(&self, input: &Input<'_>) -> Result<AttachResult, CniError> {
        add::add(self, input)
    }

    fn del(&self, input: &Input<'_>) -> Result<(), CniError> {
        del::del(self, input)
    }

    fn check(&self, input: &Input<'_>, previous: &AttachResult) -> Result<(), CniError> {
        check::check(self, input, previous)
    }

    fn gc(&self, input: &Input<'_>, valid: &[AttachmentKey]) -> Result<(), CniError> {
        gc::gc(self, input, valid)
    }

    fn status(&self, input: &Input<'_>) -> Result<(), CniError> {
        status::status(self, input)
    }
}

/// A kernel's refusal as the specification wants it told.
fn kernel(error: &linux::netlink::NetlinkError) -> CniError {
    CniError::caused(ErrorCode::Kernel, "change the node's network", error)
}
