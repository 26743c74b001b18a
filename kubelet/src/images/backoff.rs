//! After a failed pull: 10 s, doubled up to 300 s, per pod and image, as the stock kubelet.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

const FIRST: Duration = Duration::from_secs(10);
const MAX: Duration = Duration::from_secs(300);
/// Forgotten this long after the last failure, so the map stays small.
const FORGET: Duration = Duration::from_secs(600);

#[derive(Debug)]
struct Entry {
    delay: Duration,
    failed_at: Instant,
    message: String,
}

/// Failures by pod UID and image. A mutex: pods are many tasks, each call is short.
#[derive(Debug, Default)]
pub(super) struct BackOff {
    entries: Mutex<HashMap<(String, String), Entry>>,
}

impl BackOff {
    fn entries(&self) -> std::sync::MutexGuard<'_, HashMap<(String, String), Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long still to wait, and why the last pull failed; none when one may be tried.
    pub(super) fn waiting(&self, uid: &str, image: &str) -> Option<(Duration, String)> {
        let entries = self.entries();
        let entry = entries.get(&(uid.to_owned(), image.to_owned()))?;
        let left = entry.delay.checked_sub(entry.failed_at.elapsed())?;
        (!left.is_zero()).then(|| (left, entry.message.clone()))
    }

    /// Notes a failure.
    pub(super) fn failed(&self, uid: &str, image: &str, message: &str) {
        let now = Instant::now();
        let mut entries = self.entries();
        entries.retain(|_, e| e.failed_at.elapsed() < FORGET);
        let key = (uid.to_owned(), image.to_owned());
        let delay = entries.get(&key).map_or(FIRST, |e| (e.delay * 2).min(MAX));
        entries.insert(
            key,
            Entry {
                delay,
                failed_at: now,
                message: message.to_owned(),
            },
        );
    }

    /// It worked.
    pub(super) fn forget(&self, uid: &str, image: &str) {
        self.entries().remove(&(uid.to_owned(), image.to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn delays_double_to_five_minutes_and_are_forgotten() {
        let backoff = BackOff::default();
        assert_eq!(backoff.waiting("u", "i"), None);
        for expect in [10, 20, 40, 80, 160, 300, 300] {
            backoff.failed("u", "i", "why");
            let (left, message) = backoff.waiting("u", "i").unwrap();
            assert_eq!((left.as_secs(), message.as_str()), (expect, "why"));
            tokio::time::advance(left).await;
            assert_eq!(backoff.waiting("u", "i"), None);
        }
        assert_eq!(backoff.waiting("other", "i"), None);
        tokio::time::advance(FORGET).await;
        backoff.failed("u", "i", "again");
        assert_eq!(backoff.waiting("u", "i").unwrap().0, FIRST);
    }
}
