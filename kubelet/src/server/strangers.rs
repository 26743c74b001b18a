//! Connections whose client has not shown yet who it is.
//!
//! There is room for so many only, and a new one takes the place of the one that has waited
//! longest: whoever opens connections and says nothing closes his own, and never those of
//! clients that are known. A client is known by the certificate of its handshake or by the first
//! request that was authenticated.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use tokio_util::sync::CancellationToken;

/// Connections of unknown clients at once.
pub(super) const MAX_STRANGERS: usize = 128;

/// All of one listener's.
#[derive(Debug, Default)]
pub(super) struct Strangers(Mutex<Queue>);

#[derive(Debug, Default)]
struct Queue {
    next: u64,
    /// Oldest first.
    waiting: VecDeque<(u64, CancellationToken)>,
}

/// One connection's place; dropping it leaves the queue.
#[derive(Debug)]
pub(super) struct Stranger {
    all: Arc<Strangers>,
    number: u64,
    /// Cancelled when the place went to a newer one.
    pub(super) displaced: CancellationToken,
}

impl Strangers {
    /// A place for a new connection.
    pub(super) fn enter(self: &Arc<Self>) -> Arc<Stranger> {
        let displaced = CancellationToken::new();
        let mut queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.waiting.len() >= MAX_STRANGERS
            && let Some((_, oldest)) = queue.waiting.pop_front()
        {
            oldest.cancel();
        }
        let number = queue.next;
        queue.next += 1;
        queue.waiting.push_back((number, displaced.clone()));
        Arc::new(Stranger {
            all: Arc::clone(self),
            number,
            displaced,
        })
    }
}

impl Stranger {
    /// The client is known: its connection stays as long as it likes.
    pub(super) fn known(&self) {
        let mut queue = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Numbers only rise along the queue.
        if let Ok(place) = queue
            .waiting
            .binary_search_by_key(&self.number, |(n, _)| *n)
        {
            queue.waiting.remove(place);
        }
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.known();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stranger_that_waited_longest_makes_room_and_the_known_stay() {
        let all = Arc::new(Strangers::default());
        let friend = all.enter();
        let first = all.enter();
        let second = all.enter();
        friend.known();
        let gone = all.enter();
        drop(gone);
        let crowd: Vec<_> = (0..MAX_STRANGERS - 1).map(|_| all.enter()).collect();
        assert!(first.displaced.is_cancelled());
        assert!(!second.displaced.is_cancelled());
        assert!(!friend.displaced.is_cancelled());
        let _one_more = all.enter();
        assert!(second.displaced.is_cancelled() && !friend.displaced.is_cancelled());
        assert!(!crowd[0].displaced.is_cancelled());
    }
}
