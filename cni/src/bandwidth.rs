//! Limits of bandwidth: the keys of containernetworking's `bandwidth`, as the capability of this
//! name or in the configuration itself.
//!
//! "Ingress" and "egress" are the container's. What it receives is what the node's end of its
//! pair sends: a token bucket there. What it sends arrives at the node's end, where nothing can
//! wait; so it takes a detour by an `ifb` device named after the attachment, and waits there.

use linux::netlink::{Change, Link, NetlinkError, Rtnl, TokenBucket};

use crate::attach::names;
use crate::ipam::Owner;
use crate::keys::{self, Object};
use crate::types::{CniError, ErrorCode, Interface};

/// What may wait in a bucket is what it lets through in this time, on top of the burst. The
/// reference's number.
const LATENCY_MILLISECONDS: u64 = 25;

/// A limit in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// Bits per second in the long run.
    pub rate_bits: u64,
    /// Bits at once.
    pub burst_bits: u64,
}

impl Limit {
    fn bucket(self, index: u32) -> TokenBucket {
        let (rate, burst) = (self.rate_bits / 8, self.burst_bits / 8);
        let narrow = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
        let waiting = rate.saturating_mul(LATENCY_MILLISECONDS) / 1000;
        TokenBucket {
            index,
            rate_bytes: rate.max(1),
            burst_bytes: narrow(burst).max(1),
            limit_bytes: narrow(waiting.saturating_add(burst)),
        }
    }
}

/// Both directions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// What the container receives.
    pub ingress: Option<Limit>,
    /// What it sends.
    pub egress: Option<Limit>,
}

impl Bandwidth {
    /// Reads the configuration's own keys, else `runtimeConfig.bandwidth`.
    ///
    /// # Errors
    /// Code 7 naming the key.
    pub fn parse(conf: &Object) -> Result<Self, CniError> {
        let own = ["ingressRate", "ingressBurst", "egressRate", "egressBurst"];
        if own.iter().any(|key| keys::at(conf, &[key]).is_some()) {
            return Self::read(conf);
        }
        let runtime = keys::object(conf, "runtimeConfig")?;
        match runtime.map(|r| keys::object(r, "bandwidth")).transpose()? {
            Some(Some(bandwidth)) => Self::read(bandwidth),
            Some(None) | None => Ok(Self::default()),
        }
    }

    fn read(object: &Object) -> Result<Self, CniError> {
        Ok(Self {
            ingress: limit(object, "ingressRate", "ingressBurst")?,
            egress: limit(object, "egressRate", "egressBurst")?,
        })
    }
}

fn limit(object: &Object, rate: &str, burst: &str) -> Result<Option<Limit>, CniError> {
    // The kernel counts a burst in 32 bits of bytes.
    let most_burst = u64::from(u32::MAX) * 8;
    let rate_bits = keys::number(object, rate, 0..=u64::MAX)?.unwrap_or(0);
    let burst_bits = keys::number(object, burst, 0..=most_burst)?.unwrap_or(0);
    match (rate_bits, burst_bits) {
        (0, 0) => Ok(None),
        (0, _) => Err(keys::invalid(rate, format!("is needed with {burst}"))),
        (_, 0) => Err(keys::invalid(burst, format!("is needed with {rate}"))),
        (rate_bits, burst_bits) => Ok(Some(Limit {
            rate_bits,
            burst_bits,
        })),
    }
}

/// Limits an attachment; returns the device that was made for it, if any.
///
/// # Errors
/// [`NetlinkError`]; [`remove`] undoes what was done.
pub fn ensure(
    rtnl: &mut Rtnl,
    network: &str,
    owner: &Owner,
    host: &Link,
    bandwidth: Bandwidth,
) -> Result<Option<Interface>, NetlinkError> {
    let index = host.index;
    if let Some(ingress) = bandwidth.ingress {
        rtnl.apply(&[Change::SetTokenBucket(ingress.bucket(index))])?;
    }
    let Some(egress) = bandwidth.egress else {
        return Ok(None);
    };
    let name = names::detour_name(network, owner);
    rtnl.apply(&[Change::AddIfb {
        name: name.clone(),
        mtu_bytes: host.mtu_bytes,
    }])?;
    let detour = rtnl.link_by_name(&name)?.unwrap_or_default();
    rtnl.apply(&[
        Change::SetAlias {
            index: detour.index,
            alias: names::alias(network, owner),
        },
        Change::SetTokenBucket(egress.bucket(detour.index)),
        Change::AddIngress { index },
        Change::Redirect {
            index,
            to: detour.index,
        },
    ])?;
    Ok(Some(Interface {
        name,
        mac: detour.mac.map(|mac| mac.to_string()).unwrap_or_default(),
        mtu: Some(detour.mtu_bytes),
        ..Interface::default()
    }))
}

/// Takes away the device of an attachment; buckets go with the link they are on.
#[must_use]
pub fn removal(network: &str, owner: &Owner) -> Change {
    Change::RemoveLink {
        name: names::detour_name(network, owner),
    }
}

/// Sees whether an attachment is limited as configured.
///
/// # Errors
/// Code 101 for a difference, 100 when the kernel cannot be asked.
pub fn check(
    rtnl: &mut Rtnl,
    network: &str,
    owner: &Owner,
    host: &Link,
    bandwidth: Bandwidth,
) -> Result<(), CniError> {
    let kernel = |e: NetlinkError| CniError::caused(ErrorCode::Kernel, "look at the limits", &e);
    let detour = names::detour_name(network, owner);
    let mut limits = Vec::new();
    if let Some(ingress) = bandwidth.ingress {
        limits.push((host.index, host.name.clone(), ingress));
    }
    if let Some(egress) = bandwidth.egress {
        let index = rtnl.link_by_name(&detour).map_err(kernel)?;
        let index = index.map(|link| link.index).unwrap_or_default();
        limits.push((index, detour, egress));
    }
    for (index, name, limit) in limits {
        let wanted = limit.bucket(index);
        let found = rtnl.token_bucket_of(index).map_err(kernel)?;
        let same = found.is_some_and(|found| {
            (found.rate_bytes, found.limit_bytes) == (wanted.rate_bytes, wanted.limit_bytes)
        });
        if !same {
            let msg = format!("link {name} has not the configured bandwidth limit");
            return Err(CniError::new(ErrorCode::StateDiffers, msg));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(conf: &str, expected: &str) {
        let conf: Object = serde_json::from_str(conf).unwrap();
        let said = match Bandwidth::parse(&conf) {
            Ok(bandwidth) => format!("{bandwidth:?}"),
            Err(error) => format!("{} {}", error.code.number(), error.msg),
        };
        assert!(said.contains(expected), "{said}\n  lacks {expected}");
    }

    #[test]
    fn limits_come_from_the_runtime_or_the_configuration() {
        check("{}", "ingress: None, egress: None");
        check(
            r#"{"runtimeConfig":{"bandwidth":{"ingressRate":8,"ingressBurst":16,"egressRate":0,"egressBurst":0}}}"#,
            "ingress: Some(Limit { rate_bits: 8, burst_bits: 16 }), egress: None",
        );
        check(
            r#"{"egressRate":1,"egressBurst":2,"runtimeConfig":{"bandwidth":{"ingressRate":8,"ingressBurst":16}}}"#,
            "ingress: None, egress: Some",
        );
    }

    #[test]
    fn a_half_or_bad_limit_names_its_key() {
        check(r#"{"ingressRate":8}"#, "7 ingressBurst is needed");
        check(r#"{"egressBurst":8}"#, "7 egressRate is needed");
        check(
            r#"{"egressRate":"much","egressBurst":8}"#,
            "7 egressRate is",
        );
        check(
            r#"{"egressRate":1,"egressBurst":34359738368}"#,
            "7 egressBurst is",
        );
    }

    #[test]
    fn a_bucket_holds_the_burst_and_25_ms() {
        let limit = Limit {
            rate_bits: 8_000_000,
            burst_bits: 80_000,
        };
        let bucket = limit.bucket(3);
        assert_eq!((bucket.rate_bytes, bucket.burst_bytes), (1_000_000, 10_000));
        assert_eq!(bucket.limit_bytes, 35_000);
    }
}
