//! CPU use now, from counters that only tell the use in all. No poller: each reader's look is
//! also the beginning of the next one's window.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// A window shorter than this says more about the clock than about the use.
const WINDOW_NS: i64 = 5_000_000_000;
/// Series nobody asked for so long are forgotten.
const FORGET_NS: i64 = 600_000_000_000;

#[derive(Debug, Clone, Copy)]
struct Series {
    at_ns: i64,
    used_ns: u64,
    rate: Option<u64>,
}

/// The newest rates by cgroup.
#[derive(Debug, Default)]
pub(super) struct Rates {
    series: Mutex<HashMap<String, Series>>,
}

impl Rates {
    /// Nanoseconds of CPU per second in the last window. Before there is one: since the start at
    /// `started_ns`, when that is long enough ago.
    pub(super) fn observe(
        &self,
        key: &str,
        at_ns: i64,
        used_ns: u64,
        started_ns: i64,
    ) -> Option<u64> {
        let mut all = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let life = || {
            let lived = at_ns.saturating_sub(started_ns);
            (started_ns > 0).then(|| rate(used_ns, lived)).flatten()
        };
        let fresh = Series {
            at_ns,
            used_ns,
            rate: None,
        };
        let Some(last) = all.get_mut(key) else {
            let rate = life();
            all.insert(key.to_owned(), Series { rate, ..fresh });
            return rate;
        };
        if used_ns < last.used_ns || at_ns < last.at_ns {
            // Another cgroup of the same name, or another clock.
            *last = fresh;
        }
        let window = at_ns - last.at_ns;
        if window >= WINDOW_NS || last.rate.is_none() && window >= WINDOW_NS / 5 {
            let rate = rate(used_ns - last.used_ns, window);
            *last = Series { rate, ..fresh };
        }
        last.rate.or_else(life)
    }

    /// Forgets what nobody asked for.
    pub(super) fn prune(&self, now_ns: i64) {
        let mut all = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, s| now_ns.saturating_sub(s.at_ns) < FORGET_NS);
    }
}

fn rate(used_ns: u64, window_ns: i64) -> Option<u64> {
    let window = u128::try_from(window_ns).ok().filter(|w| *w > 0)?;
    u64::try_from(u128::from(used_ns) * 1_000_000_000 / window).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    #[test]
    fn the_first_look_tells_the_mean_of_life_and_later_ones_the_window() {
        let rates = Rates::default();
        let look = |at: i64, used: u64| rates.observe("c", at * SECOND, used, SECOND);
        assert_eq!(look(11, 1_000_000_000), Some(100_000_000));
        // Too early for a window of its own.
        assert_eq!(look(12, 1_900_000_000), Some(100_000_000));
        assert_eq!(look(21, 6_000_000_000), Some(500_000_000));
        assert_eq!(look(31, 6_000_000_000), Some(0));
    }

    #[test]
    fn without_a_known_start_the_second_look_tells() {
        let rates = Rates::default();
        assert_eq!(rates.observe("/", SECOND, 0, 0), None);
        assert_eq!(rates.observe("/", 3 * SECOND, 1_000, 0), Some(500));
    }

    #[test]
    fn a_counter_that_fell_begins_anew_and_old_series_go() {
        let rates = Rates::default();
        rates.observe("c", SECOND, 500, 0);
        assert_eq!(rates.observe("c", 10 * SECOND, 5, 0), None);
        assert_eq!(
            rates.observe("c", 20 * SECOND, 10_000_000_005, 0),
            Some(1_000_000_000)
        );
        rates.prune(20 * SECOND + FORGET_NS);
        assert_eq!(rates.series.lock().unwrap().len(), 0);
    }

    proptest::proptest! {
        #[test]
        fn no_sequence_is_too_strange(looks in proptest::collection::vec((0i64.., 0u64.., 0i64..), 0..20)) {
            let rates = Rates::default();
            for (at, used, started) in looks {
                rates.observe("c", at, used, started);
            }
        }
    }
}
