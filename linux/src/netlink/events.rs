//! What the kernel tells by itself: links, addresses, routes, neighbours, settings and rules that
//! changed. An event only wakes: whoever hears it looks at the whole state again, so losing some
//! (`ENOBUFS`) is told as one more event and does no harm.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::{Socket as RawSocket, SocketAddr};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::socket::{attribute, messages};
use super::{NETLINK_ROUTE, NetlinkError};

const NETLINK_NETFILTER: isize = 12;
/// RTNLGRP_LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE, IPV4_NETCONF,
/// IPV6_NETCONF (`include/uapi/linux/rtnetlink.h`).
const ROUTE_GROUPS: [u32; 8] = [1, 3, 5, 7, 9, 11, 24, 25];
/// NFNLGRP_NFTABLES
const RULE_GROUPS: [u32; 1] = [7];
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFTA_TABLE_NAME: u16 = 1;
const NFGENMSG_BYTES: usize = 4;

/// Room for one receive; the kernel's messages of these groups are far smaller.
const BUFFER_BYTES: usize = 64 << 10;
/// Messages taken by one [`EventSocket::drain`], so that a storm cannot hold the caller.
const MAX_DRAIN_READS: usize = 4096;

/// Something changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetEvent {
    /// A link was made, changed or deleted.
    Link {
        /// Its index.
        index: u32,
    },
    /// An address of a link.
    Address {
        /// The link.
        index: u32,
    },
    /// A route.
    Route {
        /// Whose it is or was.
        protocol: u8,
    },
    /// A neighbour or forwarding entry.
    Neighbour {
        /// The link.
        index: u32,
    },
    /// A forwarding or reverse path setting.
    Setting,
    /// Rules of a table of nftables.
    Rules {
        /// Its name.
        table: String,
    },
    /// More happened than the socket could hold.
    Overrun,
}

/// A socket that hears of changes in one network namespace.
#[derive(Debug)]
pub struct EventSocket {
    raw: RawSocket,
    rules: bool,
    buffer: Vec<u8>,
}

impl EventSocket {
    /// Hears of links, addresses, routes, neighbours and settings, in the caller's namespace.
    /// The kernel keeps up to about `buffer_bytes` of messages that were not yet read.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn routes(buffer_bytes: usize) -> Result<Self, NetlinkError> {
        Self::open(NETLINK_ROUTE, &ROUTE_GROUPS, buffer_bytes)
    }

    /// Hears of changes of nftables, in the caller's namespace.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn rules(buffer_bytes: usize) -> Result<Self, NetlinkError> {
        Self::open(NETLINK_NETFILTER, &RULE_GROUPS, buffer_bytes)
    }

    fn open(family: isize, groups: &[u32], buffer_bytes: usize) -> Result<Self, NetlinkError> {
        let open = || -> io::Result<RawSocket> {
            let mut raw = RawSocket::new(family)?;
            // The limit for everyone is too small for a busy node; without the right to pass it
            // the socket merely overruns more often.
            let forced = nix::sys::socket::sockopt::RcvBufForce;
            if nix::sys::socket::setsockopt(&raw, forced, &buffer_bytes).is_err() {
                raw.set_rx_buf_sz(buffer_bytes as libc::c_int)?;
            }
            raw.bind(&SocketAddr::new(0, 0))?;
            for group in groups {
                raw.add_membership(*group)?;
            }
            raw.set_non_blocking(true)?;
            Ok(raw)
        };
        Ok(Self {
            raw: open().map_err(|source| NetlinkError::opening(family, source))?,
            rules: family == NETLINK_NETFILTER,
            buffer: vec![0; BUFFER_BYTES],
        })
    }

    /// Takes what is there, without waiting, and shows each event to `see`.
    ///
    /// # Errors
    /// When the socket is broken; too many messages are an [`NetEvent::Overrun`] instead.
    pub fn drain(&mut self, mut see: impl FnMut(NetEvent)) -> io::Result<()> {
        for _ in 0..MAX_DRAIN_READS {
            let received = rustix::net::recv(&self.raw, &mut self.buffer[..], RecvFlags::DONTWAIT);
            match received {
                Ok((length, _)) => {
                    // A message cut off is one that cannot be told apart: as good as lost.
                    match messages(&self.buffer[..length.min(BUFFER_BYTES)]) {
                        Ok(found) => {
                            let rules = self.rules;
                            let events = found.iter().filter_map(|m| event(rules, m.kind, m.body));
                            events.for_each(&mut see);
                        }
                        Err(_) => see(NetEvent::Overrun),
                    }
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::NOBUFS) => see(NetEvent::Overrun),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

impl AsFd for EventSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.raw.as_fd()
    }
}

fn event(rules: bool, kind: u16, body: &[u8]) -> Option<NetEvent> {
    if rules {
        if kind >> 8 != NFNL_SUBSYS_NFTABLES {
            return None;
        }
        let name = attribute(body.get(NFGENMSG_BYTES..)?, NFTA_TABLE_NAME)?;
        let table = String::from_utf8_lossy(name)
            .trim_end_matches('\0')
            .to_owned();
        return Some(NetEvent::Rules { table });
    }
    // ifinfomsg, ifaddrmsg and ndmsg all have the link's index in bytes 4 to 7.
    let index = || {
        let bytes = body.get(4..)?.first_chunk::<4>()?;
        Some(u32::from_ne_bytes(*bytes))
    };
    match kind {
        16 | 17 => Some(NetEvent::Link { index: index()? }),
        20 | 21 => Some(NetEvent::Address { index: index()? }),
        24 | 25 => Some(NetEvent::Route {
            protocol: *body.get(5)?,
        }),
        28 | 29 => Some(NetEvent::Neighbour { index: index()? }),
        80 | 81 => Some(NetEvent::Setting),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_event_reader_panic(rules: bool, kind: u16, body: Vec<u8>) {
            let _ = event(rules, kind, &body);
        }
    }
}
