//! Which addresses there are: ranges, sets of them, and the pool of one attachment.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Of a larger range only so many addresses are used: positions are stored in 32 bits, and a
/// node has no more pods than that.
const MAX_RANGE_ADDRESSES: u128 = 1 << 24;

/// A range that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// A border or gateway lies outside.
    #[error("{field} {address} is not in subnet {subnet}")]
    Outside {
        /// `rangeStart`, `rangeEnd` or `gateway`.
        field: &'static str,
        /// The value.
        address: IpAddr,
        /// The subnet.
        subnet: IpNet,
    },
    /// The end comes before the start.
    #[error("rangeEnd {end} comes before rangeStart {start}")]
    Backwards {
        /// First.
        start: IpAddr,
        /// Last.
        end: IpAddr,
    },
    /// A subnet of one or two addresses.
    #[error("subnet {0} is too small to allocate from")]
    TooSmall(IpNet),
    /// Host bits are set.
    #[error("subnet {0} has host bits set; did you mean {1}?")]
    HostBits(IpNet, IpNet),
    /// A set mixes families.
    #[error("a range set mixes IPv4 and IPv6")]
    Mixed,
    /// Two ranges share addresses.
    #[error("ranges {0} and {1} overlap")]
    Overlap(IpNet, IpNet),
    /// Nothing in it.
    #[error("a range set is empty")]
    Empty,
}

/// Addresses of one subnet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    /// Its subnet, host bits zero.
    pub subnet: IpNet,
    /// First address.
    pub start: IpAddr,
    /// Last address.
    pub end: IpAddr,
    /// Never given away.
    pub gateway: IpAddr,
}

impl Range {
    /// Checks and completes: without a start the first address after the network's own, without
    /// an end the last before the broadcast address (IPv6: the last), without a gateway the first
    /// after the network's own.
    ///
    /// # Errors
    /// [`RangeError`].
    pub fn new(
        subnet: IpNet,
        start: Option<IpAddr>,
        end: Option<IpAddr>,
        gateway: Option<IpAddr>,
    ) -> Result<Self, RangeError> {
        if subnet != subnet.trunc() {
            return Err(RangeError::HostBits(subnet, subnet.trunc()));
        }
        if subnet.max_prefix_len() - subnet.prefix_len() < 2 {
            return Err(RangeError::TooSmall(subnet));
        }
        let inside = |field, address: Option<IpAddr>| match address {
            Some(address) if !subnet.contains(&address) => Err(RangeError::Outside {
                field,
                address,
                subnet,
            }),
            address => Ok(address),
        };
        let first = step(subnet.network(), 1);
        let last = match subnet {
            IpNet::V4(v4) => step_back(v4.broadcast()),
            IpNet::V6(v6) => v6.broadcast().into(),
        };
        let range = Self {
            subnet,
            start: inside("rangeStart", start)?.unwrap_or(first),
            end: inside("rangeEnd", end)?.unwrap_or(last),
            gateway: inside("gateway", gateway)?.unwrap_or(first),
        };
        if number(range.end) < number(range.start) {
            return Err(RangeError::Backwards {
                start: range.start,
                end: range.end,
            });
        }
        Ok(range)
    }

    fn len(&self) -> u32 {
        let len = (number(self.end) - number(self.start)).saturating_add(1);
        len.min(MAX_RANGE_ADDRESSES) as u32
    }

    fn position(&self, address: IpAddr) -> Option<u32> {
        if address.is_ipv4() != self.start.is_ipv4() {
            return None;
        }
        let offset = number(address).checked_sub(number(self.start))?;
        u32::try_from(offset)
            .ok()
            .filter(|offset| *offset < self.len())
    }
}

/// Ranges of one family, of which an attachment gets one address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeSet {
    ranges: Vec<Range>,
}

impl RangeSet {
    /// Checks that they go together.
    ///
    /// # Errors
    /// [`RangeError`].
    pub fn new(ranges: Vec<Range>) -> Result<Self, RangeError> {
        let Some(first) = ranges.first() else {
            return Err(RangeError::Empty);
        };
        if ranges
            .iter()
            .any(|r| r.start.is_ipv4() != first.start.is_ipv4())
        {
            return Err(RangeError::Mixed);
        }
        for (index, a) in ranges.iter().enumerate() {
            for b in &ranges[index + 1..] {
                if number(a.start) <= number(b.end) && number(b.start) <= number(a.end) {
                    return Err(RangeError::Overlap(a.subnet, b.subnet));
                }
            }
        }
        Ok(Self { ranges })
    }

    /// How many positions there are, gateways included.
    #[must_use]
    pub fn positions(&self) -> u32 {
        self.ranges
            .iter()
            .fold(0, |sum: u32, range| sum.saturating_add(range.len()))
    }

    /// The address at a position, unless it is a gateway.
    #[must_use]
    pub fn address(&self, mut position: u32) -> Option<IpAddr> {
        for range in &self.ranges {
            if position < range.len() {
                let address = step(range.start, u128::from(position));
                return Some(address).filter(|a| *a != range.gateway);
            }
            position -= range.len();
        }
        None
    }

    /// The position of an address that may be given away.
    #[must_use]
    pub fn position(&self, address: IpAddr) -> Option<u32> {
        let mut before = 0;
        for range in &self.ranges {
            if let Some(offset) = range.position(address) {
                return Some(before + offset).filter(|_| address != range.gateway);
            }
            before += range.len();
        }
        None
    }

    /// The range an address belongs to.
    #[must_use]
    pub fn range_of(&self, address: IpAddr) -> Option<&Range> {
        self.ranges
            .iter()
            .find(|range| range.position(address).is_some())
    }

    /// Its ranges.
    #[must_use]
    pub fn ranges(&self) -> &[Range] {
        &self.ranges
    }
}

/// The sets of a network: an attachment gets one address of each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// In order of the configuration; the first gives the primary address.
    pub sets: Vec<RangeSet>,
}

impl Pool {
    /// A word that changes when the meaning of positions does.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let ranges = self.sets.iter().map(|set| {
            let parts = set
                .ranges
                .iter()
                .map(|r| format!("{}-{}~{}", r.start, r.end, r.gateway));
            parts.collect::<Vec<_>>().join("+")
        });
        ranges.collect::<Vec<_>>().join(",")
    }

    /// The set an address belongs to, by number.
    #[must_use]
    pub fn set_of(&self, address: IpAddr) -> Option<usize> {
        self.sets
            .iter()
            .position(|set| set.position(address).is_some())
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn step(address: IpAddr, by: u128) -> IpAddr {
    match address {
        // Callers stay within a subnet, so neither addition wraps.
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits().wrapping_add(by as u32)).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits().wrapping_add(by)).into(),
    }
}

fn step_back(address: Ipv4Addr) -> IpAddr {
    Ipv4Addr::from_bits(address.to_bits().wrapping_sub(1)).into()
}
