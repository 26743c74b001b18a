//! From single outcomes to a verdict, by thresholds. Pure.

use k8s_openapi::api::core::v1::Probe;

/// How many equal outcomes in a row change the verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thresholds {
    /// successThreshold, 1 by default.
    pub success: u32,
    /// failureThreshold, 3 by default.
    pub failure: u32,
}

impl Thresholds {
    /// Those of a probe.
    pub fn of(probe: &Probe) -> Self {
        let at_least_one = |v: Option<i32>, default: u32| {
            v.and_then(|v| u32::try_from(v).ok())
                .filter(|v| *v > 0)
                .unwrap_or(default)
        };
        Self {
            success: at_least_one(probe.success_threshold, 1),
            failure: at_least_one(probe.failure_threshold, 3),
        }
    }
}

/// Counts outcomes.
#[derive(Debug)]
pub struct Tracker {
    thresholds: Thresholds,
    verdict: Option<bool>,
    last: Option<bool>,
    run: u32,
}

impl Tracker {
    /// A tracker with a verdict to start from; none when nothing is decided yet.
    pub fn new(thresholds: Thresholds, verdict: Option<bool>) -> Self {
        Self {
            thresholds,
            verdict,
            last: None,
            run: 0,
        }
    }

    /// Takes one outcome; the new verdict when it changed.
    pub fn observe(&mut self, success: bool) -> Option<bool> {
        self.run = if self.last == Some(success) {
            self.run.saturating_add(1)
        } else {
            1
        };
        self.last = Some(success);
        let needed = if success {
            self.thresholds.success
        } else {
            self.thresholds.failure
        };
        if self.run < needed || self.verdict == Some(success) {
            return None;
        }
        self.verdict = Some(success);
        Some(success)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(t: Thresholds, from: Option<bool>, outcomes: &[bool]) -> Vec<(usize, bool)> {
        let mut tracker = Tracker::new(t, from);
        let seen = outcomes.iter().enumerate();
        seen.filter_map(|(i, o)| tracker.observe(*o).map(|v| (i, v)))
            .collect()
    }

    #[test]
    fn three_failures_in_a_row_fail_and_one_success_resets_the_count() {
        let t = Thresholds {
            success: 1,
            failure: 3,
        };
        assert_eq!(
            changes(t, Some(true), &[false, false, true, false, false, false]),
            [(5, false)]
        );
    }

    #[test]
    fn a_success_threshold_counts_too() {
        let t = Thresholds {
            success: 2,
            failure: 1,
        };
        assert_eq!(
            changes(t, Some(false), &[true, false, true, true]),
            [(3, true)]
        );
    }

    #[test]
    fn an_undecided_probe_reports_its_first_verdict_either_way() {
        let t = Thresholds {
            success: 1,
            failure: 2,
        };
        assert_eq!(
            changes(t, None, &[false, false, true]),
            [(1, false), (2, true)]
        );
    }

    proptest::proptest! {
        #[test]
        fn verdicts_alternate_and_follow_a_full_run(
            outcomes: Vec<bool>, success in 1u32..5, failure in 1u32..5
        ) {
            let found = changes(Thresholds { success, failure }, None, &outcomes);
            for pair in found.windows(2) {
                proptest::prop_assert_ne!(pair[0].1, pair[1].1);
            }
            for (at, verdict) in found {
                let needed = if verdict { success } else { failure } as usize;
                proptest::prop_assert!(at + 1 >= needed);
                proptest::prop_assert!(outcomes[at + 1 - needed..=at].iter().all(|o| *o == verdict));
            }
        }
    }
}
