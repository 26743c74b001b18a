//! The bridge plugin: a veth pair per container, one end a port of a bridge on the node.
//!
//! * `config`: the keys of containernetworking's plugins, checked; a bad one names itself.
//! * `bridge`: the bridge, its VLANs, the gateways' addresses.
//! * `network`: rules that all attachments of a network share.
//! * `add`, `del`, `check`, `gc`, `status`: one file per verb, thin executors over `linux`.
//!
//! Everything made is found again by container id and interface name alone: the veth's name is
//! their hash, its alias spells them out, the lease is filed under them. No verb needs the
//! container's namespace except ADD and CHECK. Forbidden here: forking (but for a foreign IPAM
//! plugin, and iptables where a key asks for it), sleeping, dumping tables on ADD or DEL, talking to an API server.

mod add;
mod bridge;
mod check;
mod config;
mod del;
mod gc;
mod network;
mod status;

use cni::skel::{AttachmentKey, Input, Plugin};
use cni::types::{AttachResult, CniError, ErrorCode};

/// The plugin.
#[derive(Debug, Clone, Copy)]
pub struct Bridge;

impl Plugin for Bridge {
    fn add(&self, input: &Input<'_>) -> Result<AttachResult, CniError> {
        add::add(input)
    }

    fn del(&self, input: &Input<'_>) -> Result<(), CniError> {
        del::del(input)
    }

    fn check(&self, input: &Input<'_>, previous: &AttachResult) -> Result<(), CniError> {
        check::check(input, previous)
    }

    fn gc(&self, input: &Input<'_>, valid: &[AttachmentKey]) -> Result<(), CniError> {
        gc::gc(input, valid)
    }

    fn status(&self, input: &Input<'_>) -> Result<(), CniError> {
        status::status(input)
    }
}

/// A kernel's refusal as the specification wants it told.
fn kernel(error: &linux::netlink::NetlinkError) -> CniError {
    CniError::caused(ErrorCode::Kernel, "change the node's network", error)
}
