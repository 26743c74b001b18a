//! How full volumes are, as their drivers tell. Asked for now and then and remembered: a driver
//! that hangs shall not hang those who read statistics.

use super::client::RpcError;
use super::world::Place;
use super::{Csi, text};
use proto::csi::v1 as csi;
use proto::csi::v1::volume_usage::Unit;
use std::time::Duration;

/// What a driver has for an answer.
const LIMIT: Duration = Duration::from_secs(10);

/// How full a volume is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Size in bytes.
    pub capacity: u64,
    /// Bytes that can still be written.
    pub available: u64,
    /// Bytes taken.
    pub used: u64,
    /// Inodes.
    pub inodes: u64,
    /// Inodes that can still be made.
    pub inodes_free: u64,
    /// Inodes taken.
    pub inodes_used: u64,
}

impl Usage {
    /// None when the driver says nothing.
    fn read(answer: &csi::NodeGetVolumeStatsResponse) -> Option<Self> {
        let mut usage = Self::default();
        let number = |n: i64| u64::try_from(n).unwrap_or(0);
        for part in &answer.usage {
            match Unit::try_from(part.unit) {
                Ok(Unit::Bytes) => {
                    usage.capacity = number(part.total);
                    usage.available = number(part.available);
                    usage.used = number(part.used);
                }
                Ok(Unit::Inodes) => {
                    usage.inodes = number(part.total);
                    usage.inodes_free = number(part.available);
                    usage.inodes_used = number(part.used);
                }
                Ok(Unit::Unknown) | Err(_) => {}
            }
        }
        (!answer.usage.is_empty()).then_some(usage)
    }
}

impl Csi {
    /// Asks the driver of a volume; none when it cannot tell.
    pub(crate) async fn usage(
        &self,
        uid: &str,
        name: &str,
        driver: &str,
        handle: &str,
        block: bool,
    ) -> Option<Usage> {
        let inner = &self.inner;
        let place = if block {
            Place::Block {
                name: name.to_owned(),
            }
        } else {
            Place::Mount
        };
        let path = match &place {
            Place::Mount => inner.paths.target(uid, name),
            Place::Block { name } => inner.paths.block_publish(name).join(uid),
        };
        let asked = async {
            let driver = inner.drivers.node(driver).await.ok()?.within(LIMIT);
            if !driver.capabilities().await.ok()?.stats {
                return None;
            }
            let answer: Result<_, RpcError> = driver.stats(handle, text(&path)).await;
            match answer {
                Ok(answer) => Usage::read(&answer),
                Err(error) => {
                    tracing::debug!(volume = name, %error, "No statistics of a volume");
                    None
                }
            }
        };
        asked.await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_inodes_are_told_apart() {
        let part = |unit: Unit, total, used| csi::VolumeUsage {
            available: total - used,
            total,
            used,
            unit: unit as i32,
        };
        let answer = csi::NodeGetVolumeStatsResponse {
            usage: vec![part(Unit::Bytes, 100, 40), part(Unit::Inodes, 10, 3)],
        };
        let usage = Usage::read(&answer).unwrap();
        assert_eq!((usage.capacity, usage.available, usage.used), (100, 60, 40));
        assert_eq!((usage.inodes_free, usage.inodes_used), (7, 3));
        assert_eq!(
            Usage::read(&csi::NodeGetVolumeStatsResponse::default()),
            None
        );
    }
}
