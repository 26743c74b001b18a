//! Forgetting connections of the kernel's tracking table (ctnetlink), by a filter that the kernel
//! applies: nothing is listed. Kernels before 6.8 filter only what they list, so there the
//! connections that match are listed and then deleted one by one.
//!
//! A UDP "connection" outlives a change of rules: packets that arrive regularly keep going where
//! the first of them went. Layout: `include/uapi/linux/netfilter/nfnetlink_conntrack.h`.

use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use crate::netlink::NetlinkError;
use crate::netlink::socket::{Request, Socket, attribute};
use crate::nft::Nft;

const NETLINK_NETFILTER: isize = 12;
const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_GET: u16 = 1;
const IPCTNL_MSG_CT_DELETE: u16 = 2;

/// `struct nfgenmsg`, before the attributes.
const NFGENMSG_BYTES: usize = 4;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
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
    /// [`NetlinkError`]
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
    for ((verdict, request), which) in verdicts.into_iter().zip(&requests).zip(which) {
        match verdict {
            // Before 6.8: a tuple that is not complete is no tuple.
            Err(refusal) if refusal.is(libc::EINVAL) => forget_listed(socket, *which)?,
            Err(refusal) if !refusal.is(libc::ENOENT) => return Err(refusal.about(request)),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// Lists what matches and deletes one by one.
fn forget_listed(socket: &mut Socket, which: Udp) -> Result<(), NetlinkError> {
    let listed = list(socket, which)?;
    let requests: Vec<Request> = listed.iter().filter_map(|c| which.deletion(c)).collect();
    let Some(first) = requests.first() else {
        return Ok(());
    };
    let verdicts = socket.send_batch(&requests);
    let verdicts = verdicts.map_err(|source| NetlinkError::talking(first, source))?;
    for (verdict, request) in verdicts.into_iter().zip(&requests) {
        match verdict {
            Err(refusal) if !refusal.is(libc::ENOENT) => return Err(refusal.about(request)),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// The connections that match, each a message without its header. Kernels before 5.8 send all
/// they know.
fn list(socket: &mut Socket, which: Udp) -> Result<Vec<Vec<u8>>, NetlinkError> {
    let request = Request {
        kind: NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET,
        operation: "list connections",
        ..which.request()
    };
    let listed = socket.dump(&request);
    let listed = listed.map_err(|source| NetlinkError::talking(&request, source))?;
    let listed = listed.map_err(|refusal| refusal.about(&request))?;
    // None is a table that changed meanwhile: what is new in it began under the new rules.
    let bodies = listed.into_iter().flatten().map(|answer| answer.body);
    Ok(bodies.filter(|body| which.matches(body)).collect())
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

impl Udp {
    /// Whether a listed connection (its message without header) is one of these.
    fn matches(self, body: &[u8]) -> bool {
        let attributes = body.get(NFGENMSG_BYTES..).unwrap_or_default();
        let tuple = |kind| attribute(attributes, kind).unwrap_or_default();
        let ip = |tuple, kind| {
            attribute(tuple, CTA_TUPLE_IP).and_then(|ip| attribute(ip, kind).map(<[u8]>::to_vec))
        };
        let protocol = |tuple, kind| {
            attribute(tuple, CTA_TUPLE_PROTO)
                .and_then(|proto| attribute(proto, kind).map(<[u8]>::to_vec))
        };
        let is_udp = |tuple| protocol(tuple, CTA_PROTO_NUM).as_deref() == Some(&[IPPROTO_UDP]);
        match self {
            Self::SentTo(port, family) => {
                let tuple = tuple(CTA_TUPLE_ORIG);
                let source = source_kind(family);
                is_udp(tuple)
                    && ip(tuple, source).is_some()
                    && protocol(tuple, CTA_PROTO_DST_PORT).as_deref() == Some(&port.to_be_bytes())
            }
            Self::AnsweredBy(address) => {
                let tuple = tuple(CTA_TUPLE_REPLY);
                let octets = match address {
                    IpAddr::V4(v4) => v4.octets().to_vec(),
                    IpAddr::V6(v6) => v6.octets().to_vec(),
                };
                is_udp(tuple) && ip(tuple, source_kind(address)) == Some(octets)
            }
        }
    }

    /// The request to delete one listed connection, by its first tuple, zone and id: another one
    /// with the same tuple that came in its place stays.
    fn deletion(self, body: &[u8]) -> Option<Request> {
        let attributes = body.get(NFGENMSG_BYTES..)?;
        let mut wanted = self.request();
        wanted.body.truncate(NFGENMSG_BYTES);
        put(
            &mut wanted.body,
            CTA_TUPLE_ORIG | NLA_F_NESTED,
            attribute(attributes, CTA_TUPLE_ORIG)?,
        );
        for kind in [CTA_ZONE, CTA_ID] {
            if let Some(value) = attribute(attributes, kind) {
                put(&mut wanted.body, kind, value);
            }
        }
        Some(wanted)
    }
}

/// Attribute of a source address of this family.
fn source_kind(family: IpAddr) -> u16 {
    match family {
        IpAddr::V4(_) => CTA_IP_V4_SRC,
        IpAddr::V6(_) => CTA_IP_V6_SRC,
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
    use crate::netlink::Change;
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
        conntrack.forget(&which).unwrap();
        conntrack.forget(&[]).unwrap();
    }

    #[test]
    fn listed_connections_are_told_apart_and_deleted_one_by_one() {
        let netns = crate::netlink::new_netns().expect("root is needed");
        let shown = || {
            let mut rtnl = crate::netlink::Rtnl::open()?;
            let index = rtnl.link_by_name("lo")?.expect("lo").index;
            rtnl.apply(&[Change::SetUp { index, up: true }])?;
            let rule = "table inet t { chain c { type filter hook output priority 0; ct state new accept; }; }";
            let nft = std::process::Command::new("nft").arg(rule).status();
            assert!(nft.expect("nft is needed").success());
            let bind = || std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            let [client, one, other] = [bind(), bind(), bind()];
            for to in [&one, &other] {
                client.send_to(b"x", to.local_addr().unwrap()).unwrap();
            }
            let [one, other] = [one, other].map(|s| s.local_addr().unwrap().port());
            let (four, six) = ("127.0.0.1".parse().unwrap(), "::1".parse().unwrap());
            let mut socket = Socket::open(NETLINK_NETFILTER)?;
            let mut count = |which| list(&mut socket, which).map(|found| found.len());
            assert_eq!(count(Udp::SentTo(one, four))?, 1);
            assert_eq!(count(Udp::SentTo(one, six))?, 0, "another family");
            assert_eq!(count(Udp::AnsweredBy(four))?, 2);
            forget_listed(&mut socket, Udp::SentTo(one, four))?;
            assert_eq!(list(&mut socket, Udp::SentTo(one, four))?.len(), 0);
            assert_eq!(list(&mut socket, Udp::SentTo(other, four))?.len(), 1);
            forget_listed(&mut socket, Udp::AnsweredBy(four))?;
            assert_eq!(list(&mut socket, Udp::AnsweredBy(four))?.len(), 0);
            Ok::<(), NetlinkError>(())
        };
        let shown = crate::netlink::in_netns(netns.as_fd(), shown);
        shown.expect("enter the namespace").unwrap();
    }
}
