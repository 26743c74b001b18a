//! Limits of bandwidth: a token bucket on what a link sends, and a detour by an `ifb` device for
//! what it receives, so that this can be sent through a bucket too.
//!
//! Layouts: `include/uapi/linux/pkt_sched.h`, `pkt_cls.h`, `tc_act/tc_mirred.h`.

use super::attribute::{link_header, put, put_nested, put_text, put_u32};
use super::socket::{Answer, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, Request, attribute};

const RTM_NEWLINK: u16 = 16;
const RTM_NEWQDISC: u16 = 36;
const RTM_GETQDISC: u16 = 38;
const RTM_NEWTFILTER: u16 = 44;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_ECHO: u16 = 0x08;

/// `struct tcmsg`
const TCMSG_BYTES: usize = 20;
const TC_H_ROOT: u32 = 0xffff_ffff;
const TC_H_INGRESS: u32 = 0xffff_fff1;
/// Handle 1: of the bucket.
const BUCKET_HANDLE: u32 = 0x0001_0000;
/// Handle ffff: that ingress queues have by custom.
const INGRESS_HANDLE: u32 = 0xffff_0000;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
const TC_LINKLAYER_ETHERNET: u8 = 1;

/// A token bucket at the root of what a link sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenBucket {
    /// The link.
    pub index: u32,
    /// Bytes per second in the long run.
    pub rate_bytes: u64,
    /// Bytes at once.
    pub burst_bytes: u32,
    /// Bytes that may wait; what comes on top is dropped.
    pub limit_bytes: u32,
}

fn tc_header(index: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    let mut body = vec![0; 4];
    for number in [index, handle, parent, info] {
        body.extend(number.to_ne_bytes());
    }
    body
}

impl TokenBucket {
    pub(super) fn request(&self) -> Request {
        let mut body = tc_header(self.index, BUCKET_HANDLE, TC_H_ROOT, 0);
        put_text(&mut body, TCA_KIND, "tbf");
        put_nested(&mut body, TCA_OPTIONS, |options| {
            put(options, TCA_TBF_PARMS, &self.parameters());
            put(options, TCA_TBF_RATE64, &self.rate_bytes.to_ne_bytes());
            // In bytes: no need for the kernel's clock ticks.
            put_u32(options, TCA_TBF_BURST, self.burst_bytes);
        });
        Request {
            kind: RTM_NEWQDISC,
            flags: NLM_F_CREATE | NLM_F_REPLACE,
            body,
            operation: "limit bandwidth of link",
            object: self.index.to_string(),
        }
    }

    /// `struct tc_tbf_qopt`: two `tc_ratespec`, then limit, buffer, mtu. A link layer that is
    /// known spares the rate tables.
    fn parameters(&self) -> Vec<u8> {
        let rate = u32::try_from(self.rate_bytes).unwrap_or(u32::MAX);
        let mut bytes = vec![0, TC_LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0];
        bytes.extend(rate.to_ne_bytes());
        bytes.extend([0; 12]);
        for number in [self.limit_bytes, 0, 0] {
            bytes.extend(number.to_ne_bytes());
        }
        bytes
    }

    pub(super) fn get(index: u32) -> Request {
        Request {
            kind: RTM_GETQDISC,
            // A queue is told to those who listen, and to who asks only when he wants an echo;
            // for some there is nothing to tell, and the acknowledgement is the answer.
            flags: NLM_F_ECHO | NLM_F_ACK,
            body: tc_header(index, 0, TC_H_ROOT, 0),
            operation: "look up queue of link",
            object: index.to_string(),
        }
    }

    /// Reads the answer to [`TokenBucket::get`]; none when it is another kind of queue. The burst
    /// is told in the kernel's clock ticks and is not read back.
    pub(super) fn decode(answer: &Answer) -> Option<Self> {
        if answer.kind != RTM_NEWQDISC {
            return None;
        }
        let index = answer.body.get(4..8)?.first_chunk::<4>()?;
        let attributes = answer.body.get(TCMSG_BYTES..)?;
        if attribute(attributes, TCA_KIND)? != b"tbf\0" {
            return None;
        }
        let options = attribute(attributes, TCA_OPTIONS)?;
        let parameters = attribute(options, TCA_TBF_PARMS)?;
        let number = |at: usize| {
            let bytes = parameters.get(at..)?.first_chunk::<4>()?;
            Some(u32::from_ne_bytes(*bytes))
        };
        let rate64 = attribute(options, TCA_TBF_RATE64).and_then(|v| v.first_chunk::<8>());
        Some(Self {
            index: u32::from_ne_bytes(*index),
            rate_bytes: match rate64 {
                Some(bytes) => u64::from_ne_bytes(*bytes),
                None => u64::from(number(8)?),
            },
            burst_bytes: 0,
            limit_bytes: number(24)?,
        })
    }
}

/// An `ifb` device; it comes up with it.
pub(super) fn add_ifb(name: &str, mtu_bytes: u32) -> Request {
    const IFLA_IFNAME: u16 = 3;
    const IFLA_MTU: u16 = 4;
    const IFLA_LINKINFO: u16 = 18;
    const IFLA_INFO_KIND: u16 = 1;
    const IFF_UP: u32 = 1;
    let mut body = link_header(0, 0);
    body[8..12].copy_from_slice(&IFF_UP.to_ne_bytes());
    body[12..16].copy_from_slice(&IFF_UP.to_ne_bytes());
    put_text(&mut body, IFLA_IFNAME, name);
    put_u32(&mut body, IFLA_MTU, mtu_bytes);
    put_nested(&mut body, IFLA_LINKINFO, |info| {
        put_text(info, IFLA_INFO_KIND, "ifb");
    });
    Request {
        kind: RTM_NEWLINK,
        flags: NLM_F_CREATE | NLM_F_EXCL,
        body,
        operation: "create ifb",
        object: name.to_owned(),
    }
}

/// The hook for what a link receives.
pub(super) fn add_ingress(index: u32) -> Request {
    let mut body = tc_header(index, INGRESS_HANDLE, TC_H_INGRESS, 0);
    put_text(&mut body, TCA_KIND, "ingress");
    Request {
        kind: RTM_NEWQDISC,
        flags: NLM_F_CREATE | NLM_F_EXCL,
        body,
        operation: "add ingress queue to link",
        object: index.to_string(),
    }
}

/// Everything a link receives is sent through another one. By `u32`, which every kernel has.
pub(super) fn redirect(index: u32, to: u32) -> Request {
    const TCA_U32_CLASSID: u16 = 1;
    const TCA_U32_SEL: u16 = 5;
    const TCA_U32_ACT: u16 = 7;
    const TCA_ACT_KIND: u16 = 1;
    const TCA_ACT_OPTIONS: u16 = 2;
    const TCA_MIRRED_PARMS: u16 = 2;
    const TC_U32_TERMINAL: u8 = 1;
    const TC_ACT_STOLEN: u32 = 4;
    const TCA_EGRESS_REDIR: u32 = 1;
    const FIRST_PRIORITY: u32 = 1 << 16;
    let every_protocol = u32::from((libc::ETH_P_ALL as u16).to_be());
    let mut body = tc_header(index, 0, INGRESS_HANDLE, FIRST_PRIORITY | every_protocol);
    put_text(&mut body, TCA_KIND, "u32");
    put_nested(&mut body, TCA_OPTIONS, |options| {
        put_u32(options, TCA_U32_CLASSID, BUCKET_HANDLE | 1);
        // `struct tc_u32_sel` with one key that matches everything.
        let mut selector = vec![TC_U32_TERMINAL, 0, 1];
        selector.resize(32, 0);
        put(options, TCA_U32_SEL, &selector);
        put_nested(options, TCA_U32_ACT, |actions| {
            put_nested(actions, 1, |action| {
                put_text(action, TCA_ACT_KIND, "mirred");
                put_nested(action, TCA_ACT_OPTIONS, |parameters| {
                    let mut mirred = Vec::new();
                    // index, capab, action, refcnt, bindcnt, eaction, ifindex
                    for number in [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to] {
                        mirred.extend(number.to_ne_bytes());
                    }
                    put(parameters, TCA_MIRRED_PARMS, &mirred);
                });
            });
        });
    });
    Request {
        kind: RTM_NEWTFILTER,
        flags: NLM_F_CREATE | NLM_F_EXCL,
        body,
        operation: "redirect what arrives at link",
        object: format!("{index} to {to}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_queue_reader_panic(body: Vec<u8>) {
            let _ = TokenBucket::decode(&Answer { kind: RTM_NEWQDISC, body });
        }
    }

    #[test]
    fn the_structures_have_the_kernels_sizes() {
        let bucket = TokenBucket {
            index: 1,
            rate_bytes: 1,
            burst_bytes: 1,
            limit_bytes: 1,
        };
        assert_eq!(bucket.parameters().len(), 36);
        assert_eq!(tc_header(1, 2, 3, 4).len(), TCMSG_BYTES);
    }
}
