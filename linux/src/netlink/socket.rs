//! Framing: requests with acknowledgement, many in one `sendmsg`, and their answers.
//!
//! Header layout and error messages: netlink(7), `Documentation/userspace-api/netlink/intro.rst`.

use std::io;
use std::os::fd::BorrowedFd;

use netlink_sys::{Socket as RawSocket, SocketAddr};

use super::{NetlinkError, in_netns};
use crate::failpoint;

const HEADER_BYTES: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `struct nlmsgerr`: the code and the header it answers.
const NLMSGERR_BYTES: usize = 4 + HEADER_BYTES;
const NLMSGERR_ATTR_MSG: u16 = 1;
const NLM_F_DUMP_INTR: u16 = 0x10;

pub(crate) const NLM_F_REQUEST: u16 = 0x01;
pub(crate) const NLM_F_ACK: u16 = 0x04;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_REPLACE: u16 = 0x100;
pub(crate) const NLM_F_EXCL: u16 = 0x200;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLM_F_APPEND: u16 = 0x800;

/// A dump of one bridge's ports fits in far less; a table that never ends is a fault.
const MAX_DUMP_MESSAGES: usize = 1 << 20;

/// One message to send. Length and sequence number are filled in when it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) kind: u16,
    /// Besides `NLM_F_REQUEST`, which is always set.
    pub(crate) flags: u16,
    pub(crate) body: Vec<u8>,
    /// For messages: "create veth", "set".
    pub(crate) operation: &'static str,
    /// For messages: the interface, address or table.
    pub(crate) object: String,
}

/// One message received.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) kind: u16,
    pub(crate) body: Vec<u8>,
}

/// What the kernel said to one request: its errno and its own words, if any.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) source: io::Error,
    pub(crate) said: String,
}

impl Refusal {
    pub(crate) fn is(&self, errno: i32) -> bool {
        self.source.raw_os_error() == Some(errno)
    }

    pub(crate) fn about(self, request: &Request) -> NetlinkError {
        NetlinkError {
            operation: request.operation,
            object: request.object.clone(),
            said: self.said,
            source: self.source,
        }
    }
}

/// A blocking netlink socket of one family, bound to the namespace it was opened in.
#[derive(Debug)]
pub(crate) struct Socket {
    raw: RawSocket,
    next_sequence: u32,
}

impl Socket {
    /// Opens one in the caller's network namespace. `family` is `NETLINK_ROUTE` and the like.
    pub(crate) fn open(family: isize) -> Result<Self, NetlinkError> {
        Self::open_raw(family).map_err(|source| NetlinkError::opening(family, source))
    }

    /// Opens one in another network namespace, by way of a thread that enters it and ends.
    pub(crate) fn open_in(netns: BorrowedFd<'_>, family: isize) -> Result<Self, NetlinkError> {
        in_netns(netns, || Self::open_raw(family))
            .and_then(|opened| opened)
            .map_err(|source| NetlinkError::opening(family, source))
    }

    /// Opens one in another network namespace by a visit of the calling thread there. For
    /// programs of one thread: it saves starting another.
    ///
    /// A thread that cannot come home must not go on: the process is aborted.
    pub(crate) fn open_visiting(
        netns: BorrowedFd<'_>,
        home: BorrowedFd<'_>,
        family: isize,
    ) -> Result<Self, NetlinkError> {
        let visit = || {
            nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET)?;
            let opened = Self::open_raw(family);
            if nix::sched::setns(home, nix::sched::CloneFlags::CLONE_NEWNET).is_err() {
                std::process::abort();
            }
            opened
        };
        visit().map_err(|source| NetlinkError::opening(family, source))
    }

    fn open_raw(family: isize) -> io::Result<Self> {
        let raw = RawSocket::new(family)?;
        // Without the request's payload in answers, and with the kernel's reason in words.
        raw.set_cap_ack(true)?;
        raw.set_ext_ack(true)?;
        raw.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            raw,
            next_sequence: 1,
        })
    }

    /// Lets the kernel honour filters in dump requests (`NETLINK_GET_STRICT_CHK`).
    pub(crate) fn strict(&self) -> io::Result<()> {
        self.raw.set_netlink_get_strict_chk(true)
    }

    /// Sends all requests in one message, each with `NLM_F_ACK`, and gathers one verdict each, in
    /// order. The kernel goes on after a failed one.
    pub(crate) fn send_batch(
        &mut self,
        requests: &[Request],
    ) -> io::Result<Vec<Result<(), Refusal>>> {
        let first = self.next_sequence;
        let mut bytes = Vec::with_capacity(requests.len() * 128);
        for request in requests {
            self.put(request, NLM_F_ACK, &mut bytes);
        }
        failpoint::step();
        self.raw.send(&bytes, 0)?;
        failpoint::step();
        let mut verdicts: Vec<Option<Result<(), Refusal>>> = Vec::new();
        verdicts.resize_with(requests.len(), || None);
        while verdicts.iter().any(Option::is_none) {
            for message in messages(&self.receive()?)? {
                let place = message.sequence.wrapping_sub(first) as usize;
                if message.kind == NLMSG_ERROR
                    && let Some(verdict) = verdicts.get_mut(place)
                {
                    *verdict = Some(message.verdict());
                }
            }
        }
        Ok(verdicts.into_iter().flatten().collect())
    }

    /// Sends a transaction: `envelope.0`, the requests, `envelope.1`; stops at the first refusal,
    /// which the kernel answers by doing none of it. Returns the refused request's place.
    pub(crate) fn send_transaction(
        &mut self,
        envelope: (&Request, &Request),
        requests: &[Request],
    ) -> io::Result<Result<(), (usize, Refusal)>> {
        let begin = self.next_sequence;
        let mut bytes = Vec::with_capacity(requests.len() * 256);
        self.put(envelope.0, 0, &mut bytes);
        for request in requests {
            self.put(request, NLM_F_ACK, &mut bytes);
        }
        self.put(envelope.1, 0, &mut bytes);
        failpoint::step();
        self.raw.send(&bytes, 0)?;
        failpoint::step();
        let mut done = 0;
        while done < requests.len() {
            for message in messages(&self.receive()?)? {
                let place = message.sequence.wrapping_sub(begin) as usize;
                // Beyond the closing envelope: left over from a transaction refused earlier.
                if message.kind != NLMSG_ERROR || place > requests.len() + 1 {
                    continue;
                }
                // A refusal of the envelope itself (no right) counts for the first request.
                let place = place.max(1) - 1;
                match message.verdict() {
                    Ok(()) => done += 1,
                    Err(refusal) => {
                        return Ok(Err((place.min(requests.len() - 1), refusal)));
                    }
                }
            }
        }
        Ok(Ok(()))
    }

    /// Sends one request for one object and returns it.
    pub(crate) fn get(&mut self, request: &Request) -> io::Result<Result<Answer, Refusal>> {
        let sequence = self.next_sequence;
        let mut bytes = Vec::with_capacity(128);
        self.put(request, 0, &mut bytes);
        self.raw.send(&bytes, 0)?;
        loop {
            for message in messages(&self.receive()?)? {
                if message.sequence != sequence {
                    continue;
                }
                if message.kind == NLMSG_ERROR {
                    let refusal = message.verdict().err().unwrap_or_else(|| Refusal {
                        source: io::ErrorKind::UnexpectedEof.into(),
                        said: "acknowledged without an object".into(),
                    });
                    return Ok(Err(refusal));
                }
                return Ok(Ok(Answer {
                    kind: message.kind,
                    body: message.body.to_vec(),
                }));
            }
        }
    }

    /// Sends a dump request and returns every object. `None` when the table changed meanwhile
    /// (`NLM_F_DUMP_INTR` on any message, the closing one included): ask again.
    pub(crate) fn dump(
        &mut self,
        request: &Request,
    ) -> io::Result<Result<Option<Vec<Answer>>, Refusal>> {
        let sequence = self.next_sequence;
        let mut bytes = Vec::with_capacity(128);
        self.put(request, NLM_F_DUMP, &mut bytes);
        self.raw.send(&bytes, 0)?;
        let mut answers = Vec::new();
        let mut interrupted = false;
        while answers.len() < MAX_DUMP_MESSAGES {
            for message in messages(&self.receive()?)? {
                if message.sequence != sequence {
                    continue;
                }
                interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                match message.kind {
                    NLMSG_DONE => return Ok(Ok((!interrupted).then_some(answers))),
                    NLMSG_ERROR => match message.verdict() {
                        Ok(()) => return Ok(Ok(Some(answers))),
                        Err(refusal) => return Ok(Err(refusal)),
                    },
                    kind => answers.push(Answer {
                        kind,
                        body: message.body.to_vec(),
                    }),
                }
            }
        }
        Err(io::Error::other("a dump without end"))
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        /// The kernel fills at most 32 KiB at once; asking for the size first would double the
        /// system calls.
        const MOST_BYTES: usize = 64 << 10;
        loop {
            let mut bytes = Vec::with_capacity(MOST_BYTES);
            match self.raw.recv(&mut bytes, 0) {
                Ok(_) => return Ok(bytes),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn put(&mut self, request: &Request, extra_flags: u16, into: &mut Vec<u8>) {
        let length = (HEADER_BYTES + request.body.len()) as u32;
        into.extend(length.to_ne_bytes());
        into.extend(request.kind.to_ne_bytes());
        into.extend((request.flags | NLM_F_REQUEST | extra_flags).to_ne_bytes());
        into.extend(self.next_sequence.to_ne_bytes());
        into.extend(0_u32.to_ne_bytes());
        into.extend(&request.body);
        into.resize(into.len().next_multiple_of(4), 0);
        self.next_sequence = self.next_sequence.wrapping_add(1);
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    flags: u16,
    sequence: u32,
    pub(super) body: &'a [u8],
}

impl Message<'_> {
    /// Reads an `NLMSG_ERROR`: code 0 is the acknowledgement.
    fn verdict(&self) -> Result<(), Refusal> {
        let malformed = || Refusal {
            source: io::ErrorKind::InvalidData.into(),
            said: "short error message".into(),
        };
        let code = self.body.first_chunk::<4>().map(|b| i32::from_ne_bytes(*b));
        match code {
            None => Err(malformed()),
            Some(0) => Ok(()),
            Some(code) => {
                let attributes = self.body.get(NLMSGERR_BYTES..).unwrap_or_default();
                let said = attribute(attributes, NLMSGERR_ATTR_MSG)
                    .map(|text| {
                        String::from_utf8_lossy(text)
                            .trim_end_matches('\0')
                            .to_owned()
                    })
                    .unwrap_or_default();
                Err(Refusal {
                    source: io::Error::from_raw_os_error(code.saturating_neg()),
                    said,
                })
            }
        }
    }
}

/// Splits what one `recv` gave.
pub(super) fn messages(mut bytes: &[u8]) -> io::Result<Vec<Message<'_>>> {
    let broken = || io::Error::new(io::ErrorKind::InvalidData, "malformed netlink message");
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let header = bytes.first_chunk::<HEADER_BYTES>().ok_or_else(broken)?;
        let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, ..] = *header;
        let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        if length < HEADER_BYTES {
            return Err(broken());
        }
        found.push(Message {
            kind: u16::from_ne_bytes([k0, k1]),
            flags: u16::from_ne_bytes([f0, f1]),
            sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
            body: bytes.get(HEADER_BYTES..length).ok_or_else(broken)?,
        });
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(found)
}

/// The value of the first attribute of this kind; none when absent or when the list is broken
/// before it.
pub(crate) fn attribute(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    each_attribute(attributes)
        .find(|(found, _)| *found == kind)
        .map(|(_, value)| value)
}

/// Every well-formed attribute up to the first broken one. The two upper bits of a kind are flags
/// (nested, byte order) and are taken off.
pub(crate) fn each_attribute(mut attributes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let [l0, l1, k0, k1] = *attributes.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = attributes.get(4..length)?;
        attributes = attributes
            .get(length.next_multiple_of(4)..)
            .unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & 0x3fff, value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(((HEADER_BYTES + body.len()) as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(7_u32.to_ne_bytes());
        bytes.extend(0_u32.to_ne_bytes());
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn several_messages_in_one_buffer_are_split() {
        let mut bytes = message(16, 2, &[1, 2, 3]);
        bytes.extend(message(NLMSG_DONE, NLM_F_DUMP_INTR, &[0; 4]));
        let found = messages(&bytes).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(
            (found[0].kind, found[0].sequence, found[0].body),
            (16, 7, &[1, 2, 3][..])
        );
        assert_eq!(found[1].flags & NLM_F_DUMP_INTR, NLM_F_DUMP_INTR);
    }

    #[test]
    fn an_error_carries_errno_and_the_kernels_words() {
        let mut body = (-22_i32).to_ne_bytes().to_vec();
        body.extend([0; HEADER_BYTES]);
        body.extend([9, 0, 1, 0]);
        body.extend(b"why\0\0");
        let bytes = message(NLMSG_ERROR, 0x200, &body);
        let refusal = messages(&bytes).unwrap()[0].verdict().unwrap_err();
        assert!(refusal.is(22));
        assert_eq!(refusal.said, "why");
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes: Vec<u8>) {
            if let Ok(found) = messages(&bytes) {
                for message in found {
                    let _ = message.verdict();
                    let _ = each_attribute(message.body).count();
                }
            }
        }

        #[test]
        fn no_error_body_makes_the_reader_panic(body: Vec<u8>) {
            let bytes = message(NLMSG_ERROR, 0, &body);
            let _ = messages(&bytes).unwrap()[0].verdict();
        }
    }
}
