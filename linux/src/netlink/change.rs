//! Changes as values: what each asks of the kernel, and which refusals mean "nothing to do".

use super::socket::Request;
use super::{
    AddressSpec, BridgeSpec, FdbSpec, Mac, NeighbourSpec, NodeRoute, PortSpec, PortVlan, RouteSpec,
    TokenBucket, VethSpec, VxlanSpec, link, shape, vlan,
};

/// One idempotent change of the kernel's network state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Make a bridge. Already there: left as it is.
    AddBridge(BridgeSpec),
    /// Make a pair. A link of either name: left as it is, and reported.
    AddVeth(VethSpec),
    /// Delete a link by name.
    RemoveLink {
        /// Its name.
        name: String,
    },
    /// Set up or down.
    SetUp {
        /// The link.
        index: u32,
        /// Up, else down.
        up: bool,
    },
    /// Make up no IPv6 link-local address when it comes up. A kernel or link without IPv6 is fine.
    NoLinkLocal {
        /// The link.
        index: u32,
    },
    /// Set the transmission unit.
    SetMtu {
        /// The link.
        index: u32,
        /// In bytes.
        mtu_bytes: u32,
    },
    /// Set promiscuous mode.
    SetPromiscuous {
        /// The link.
        index: u32,
        /// On, else off.
        on: bool,
    },
    /// Receive all multicast frames.
    SetAllMulticast {
        /// The link.
        index: u32,
        /// On, else off.
        on: bool,
    },
    /// Set the length of the transmit queue.
    SetTransmitQueue {
        /// The link.
        index: u32,
        /// In packets.
        packets: u32,
    },
    /// Set the hardware address.
    SetMac {
        /// The link.
        index: u32,
        /// The address.
        mac: Mac,
    },
    /// Make an `ifb` device. Already there: left as it is.
    AddIfb {
        /// Its name.
        name: String,
        /// In bytes.
        mtu_bytes: u32,
    },
    /// Limit what a link sends, in place of whatever limit there is.
    SetTokenBucket(TokenBucket),
    /// Make the hook for what a link receives.
    AddIngress {
        /// The link.
        index: u32,
    },
    /// Send all that a link receives through another one.
    Redirect {
        /// The link, which has [`Change::AddIngress`].
        index: u32,
        /// The other one.
        to: u32,
    },
    /// Let a bridge look at VLAN tags.
    FilterVlans {
        /// The bridge.
        index: u32,
    },
    /// Let a port take part in a VLAN.
    AddVlan(PortVlan),
    /// Take it out of one.
    RemoveVlan(PortVlan),
    /// Set the alias, our owner's mark. At most 255 bytes.
    SetAlias {
        /// The link.
        index: u32,
        /// The mark.
        alias: String,
    },
    /// Set what a bridge does on one of its ports.
    SetPort(PortSpec),
    /// Give a link an address.
    AddAddress(AddressSpec),
    /// Take one away.
    RemoveAddress(AddressSpec),
    /// Add a route.
    AddRoute(RouteSpec),
    /// Take one away.
    RemoveRoute(RouteSpec),
    /// Make a VXLAN device. A link of that name, or one with the same identifier: left as it is.
    AddVxlan(VxlanSpec),
    /// Put a permanent neighbour in place of whatever is known of that address.
    SetNeighbour(NeighbourSpec),
    /// Take one away.
    RemoveNeighbour(NeighbourSpec),
    /// Put a forwarding entry in place of whatever is known of that hardware address.
    SetFdb(FdbSpec),
    /// Take one away.
    RemoveFdb(FdbSpec),
    /// Put a route in place of the one to the same destination with the same metric.
    SetNodeRoute(NodeRoute),
    /// Take one away.
    RemoveNodeRoute(NodeRoute),
}

/// What became of a [`Change`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Done now.
    Done,
    /// There was nothing to do: it was already there, or already gone.
    Unchanged,
}

impl Change {
    pub(super) fn request(&self) -> Request {
        match self {
            Self::AddBridge(spec) => spec.request(),
            Self::AddVeth(spec) => spec.request(),
            Self::RemoveLink { name } => link::remove(name),
            Self::SetUp { index, up } => link::set_up(*index, *up),
            Self::NoLinkLocal { index } => link::no_link_local(*index),
            Self::SetMtu { index, mtu_bytes } => link::set_mtu(*index, *mtu_bytes),
            Self::SetPromiscuous { index, on } => link::set_promiscuous(*index, *on),
            Self::SetAllMulticast { index, on } => link::set_all_multicast(*index, *on),
            Self::SetTransmitQueue { index, packets } => link::set_queue(*index, *packets),
            Self::AddIfb { name, mtu_bytes } => shape::add_ifb(name, *mtu_bytes),
            Self::SetTokenBucket(bucket) => bucket.request(),
            Self::AddIngress { index } => shape::add_ingress(*index),
            Self::Redirect { index, to } => shape::redirect(*index, *to),
            Self::FilterVlans { index } => vlan::filter(*index),
            Self::AddVlan(vlan) => vlan.add(),
            Self::RemoveVlan(vlan) => vlan.remove(),
            Self::SetAlias { index, alias } => link::set_alias(*index, alias),
            Self::SetPort(spec) => spec.request(),
            Self::AddAddress(spec) => spec.add(),
            Self::RemoveAddress(spec) => spec.remove(),
            Self::AddRoute(spec) => spec.add(),
            Self::RemoveRoute(spec) => spec.remove(),
            Self::AddVxlan(spec) => spec.request(),
            Self::SetMac { index, mac } => link::set_mac(*index, *mac),
            Self::SetNeighbour(spec) => spec.set(),
            Self::RemoveNeighbour(spec) => spec.remove(),
            Self::SetFdb(spec) => spec.set(),
            Self::RemoveFdb(spec) => spec.remove(),
            Self::SetNodeRoute(route) => route.set(),
            Self::RemoveNodeRoute(route) => route.remove(),
        }
    }

    /// Errnos that mean "nothing to do".
    pub(super) fn satisfied_by(&self) -> &'static [i32] {
        match self {
            Self::AddBridge(_)
            | Self::AddVeth(_)
            | Self::AddAddress(_)
            | Self::AddRoute(_)
            | Self::AddIfb { .. }
            | Self::AddIngress { .. }
            | Self::AddVxlan(_)
            | Self::Redirect { .. } => &[libc::EEXIST],
            Self::RemoveNeighbour(_) | Self::RemoveFdb(_) => &[libc::ENOENT, libc::ENODEV],
            Self::RemoveNodeRoute(_) => &[libc::ESRCH, libc::ENODEV],
            Self::RemoveLink { .. } => &[libc::ENODEV],
            Self::RemoveVlan(_) => &[libc::ENOENT],
            Self::NoLinkLocal { .. } => &[libc::EAFNOSUPPORT, libc::EOPNOTSUPP],
            Self::RemoveAddress(_) => &[libc::EADDRNOTAVAIL, libc::ENODEV],
            Self::RemoveRoute(_) => &[libc::ESRCH, libc::ENODEV],
            Self::SetUp { .. }
            | Self::SetMtu { .. }
            | Self::SetPromiscuous { .. }
            | Self::SetAllMulticast { .. }
            | Self::SetTransmitQueue { .. }
            | Self::SetMac { .. }
            | Self::SetTokenBucket(_)
            | Self::FilterVlans { .. }
            | Self::AddVlan(_)
            | Self::SetAlias { .. }
            | Self::SetPort(_)
            | Self::SetNeighbour(_)
            | Self::SetFdb(_)
            | Self::SetNodeRoute(_) => &[],
        }
    }
}
