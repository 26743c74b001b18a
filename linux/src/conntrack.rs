//! Forgetting connections of the kernel's tracking table (ctnetlink), by a filter that the kernel
//! applies: nothing is listed.
//!
//! A UDP "connection" outlives a change of rules: packets that arrive regularly keep going where
//! the first of them went. Layout: `include/uapi/linux/netfilter/nfnetlink_conntrack.h`.

use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use crate::netlink::NetlinkError;
use crate::netlink::socket::{Request, Socket};
use crate::nft::Nft;

const NETLINK_NETFILTER: isize = 12;
const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_DELETE: u16 = 2;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_FILTER: u16 = 25;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_DST_PORT: u16 = 3;

const BY_SOURCE: u32 = 1;
const BY_PROTOCOL: u32 = 1 << 3;
const BY_DESTINATION_PORT: u32 = 1 << 5;

const IPPROTO_UDP: u8 = 17;
const NLA_F_NESTED: u16 = 0x8000;

/// Which UDP connections to forget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Udp {
    /// Those that began by sending to this port, of the family of this address.
    SentTo(u16, IpAddr),
    /// Those that this address answers, whatever address they were sent to at first.
    AnsweredBy(IpAddr),
}

/// A connection to the tracking table of one network namespace.
#[derive(Debug)]
pub struct Conntrack {
    socket: Socket,
}

impl Conntrack {
    /// Opens one in the caller's network namespace.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self {
            socket: Socket::open(NETLINK_NETFILTER)?,
        })
    }

    /// Opens one in another network namespace.
    ///
    /// # Errors
    /// When the namespace cannot be entered or the kernel gives no socket.
    pub fn open_in(netns: BorrowedFd<'_>) -> Result<Self, NetlinkError> {
        Ok(Self {
            socket: Socket::open_in(netns, NETLINK_NETFILTER)?,
        })
    }

    /// Forgets all that match; none matching is success.
    ///
    /// # Errors
    /// [`NetlinkError`]; kernels before 6.8 know no such filter for deletion.
    pub fn forget(&mut self, which: &[Udp]) -> Result<(), NetlinkError> {
        forget(&mut self.socket, which)
    }
}

impl Nft {
    /// As [`Conntrack::forget`], by the connection that is open already: closing one waits for
    /// rules that were removed to be freed.
    ///
    /// # Errors
    /// As there.
    pub fn forget(&mut self, which: &[Udp]) -> Result<(), NetlinkError> {
        forget(&mut self.socket, which)
    }
}

fn forget(socket: &mut Socket, which: &[Udp]) -> Result<(), NetlinkError> {
    let requests: Vec<Request> = which.iter().map(|which| which.request()).collect();
    let Some(first) = requests.first() else {
        return Ok(());
    };
    let sent = socket.send_batch(&requests);
    let verdicts = sent.map_err(|source| NetlinkError::talking(first, source))?;
    for (verdict, request) in verdicts.into_iter().zip(&requests) {
        match verdict {
            Err(refusal) if !refusal.is(libc::ENOENT) => return Err(refusal.about(request)),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

impl Udp {
    fn request(self) -> Request {
        match self {
            Self::SentTo(port, family) => {
                let flags = BY_PROTOCOL | BY_DESTINATION_PORT;
                let fill = |tuple: &mut Vec<u8>| {
                    nested(tuple, CTA_TUPLE_PROTO, |protocol| {
                        put(protocol, CTA_PROTO_NUM, &[IPPROTO_UDP]);
                        put(protocol, CTA_PROTO_DST_PORT, &port.to_be_bytes());
                    });
                };
                let object = format!("to UDP port {port}");
                delete(family, CTA_TUPLE_ORIG, flags, fill, object)
            }
            Self::AnsweredBy(address) => {
                let fill = |tuple: &mut Vec<u8>| {
                    nested(tuple, CTA_TUPLE_IP, |ip| match address {
                        IpAddr::V4(v4) => put(ip, CTA_IP_V4_SRC, &v4.octets()),
                        IpAddr::V6(v6) => put(ip, CTA_IP_V6_SRC, &v6.octets()),
                    });
                    nested(tuple, CTA_TUPLE_PROTO, |protocol| {
                        put(protocol, CTA_PROTO_NUM, &[IPPROTO_UDP]);
                    });
                };
                let flags = BY_SOURCE | BY_PROTOCOL;
                let object = format!("answered by {address}");
                delete(address, CTA_TUPLE_REPLY, flags, fill, object)
            }
        }
    }
}

fn delete(
    of_family: IpAddr,
    tuple: u16,
    flags: u32,
    fill: impl FnOnce(&mut Vec<u8>),
    object: String,
) -> Request {
    let family = if of_family.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let mut body = vec![family as u8, 0, 0, 0];
    nested(&mut body, tuple, fill);
    nested(&mut body, CTA_FILTER, |filter| {
        let (orig, reply) = if tuple == CTA_TUPLE_ORIG {
            (flags, 0)
        } else {
            (0, flags)
        };
        put(filter, CTA_FILTER_ORIG_FLAGS, &orig.to_ne_bytes());
        put(filter, CTA_FILTER_REPLY_FLAGS, &reply.to_ne_bytes());
    });
    Request {
        kind: NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE,
        flags: 0,
        body,
        operation: "forget connections",
        object,
    }
}

fn put(into: &mut Vec<u8>, kind: u16, value: &[u8]) {
    into.extend(((value.len() + 4) as u16).to_ne_bytes());
    into.extend(kind.to_ne_bytes());
    into.extend(value);
    into.resize(into.len().next_multiple_of(4), 0);
}

fn nested(into: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let mut inner = Vec::new();
    fill(&mut inner);
    put(into, kind | NLA_F_NESTED, &inner);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn forgetting_what_is_not_there_is_success() {
        let netns = crate::netlink::new_netns().expect("root is needed");
        let mut conntrack = Conntrack::open_in(netns.as_fd()).unwrap();
        let (four, six) = ("10.1.0.2".parse().unwrap(), "fd00::2".parse().unwrap());
        let which = [
            Udp::SentTo(53, four),
            Udp::SentTo(53, six),
            Udp::AnsweredBy(four),
            Udp::AnsweredBy(six),
        ];
        match conntrack.forget(&which) {
            Err(e) if e.errno() == Some(libc::EINVAL) => {
                println!("skipped: this kernel deletes no connections by filter");
            }
            other => other.unwrap(),
        }
        conntrack.forget(&[]).unwrap();
    }
}
