//! The time of the pod workers: the machine's, or in tests tokio's, which can be stopped.

use jiff::Timestamp;

/// Tells the time.
#[derive(Debug, Clone, Copy, Default)]
pub enum Clock {
    /// The machine's wall clock.
    #[default]
    Wall,
    /// Starts at a time and goes on with tokio's clock.
    #[cfg(test)]
    Tokio {
        /// The time at `since`, nanoseconds since the epoch.
        epoch_ns: i64,
        /// An instant of tokio's clock.
        since: tokio::time::Instant,
    },
}

impl Clock {
    /// The time.
    pub fn now(self) -> Timestamp {
        match self {
            Self::Wall => Timestamp::now(),
            #[cfg(test)]
            Self::Tokio { .. } => {
                Timestamp::from_nanosecond(i128::from(self.now_ns())).unwrap_or_default()
            }
        }
    }

    /// The time in nanoseconds since the epoch; until 2262.
    pub fn now_ns(self) -> i64 {
        match self {
            Self::Wall => nanoseconds(Timestamp::now()),
            #[cfg(test)]
            Self::Tokio { epoch_ns, since } => {
                let passed = i64::try_from(since.elapsed().as_nanos()).unwrap_or(i64::MAX);
                epoch_ns.saturating_add(passed)
            }
        }
    }
}

/// A time in nanoseconds since the epoch; until 2262.
pub(super) fn nanoseconds(at: Timestamp) -> i64 {
    i64::try_from(at.as_nanosecond()).unwrap_or(i64::MAX)
}
