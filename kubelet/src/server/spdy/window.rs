//! How much may be sent: SPDY/3.1 flow control of our own data frames.
//!
//! Kubernetes' clients (and the stock kubelet) neither keep nor open windows; holding to the
//! initial 64 KiB would stall them for ever. So everything is counted, but only a peer that has
//! shown that it keeps windows (by SETTINGS or WINDOW_UPDATE) is held to them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// What a stream and the connection may send before the peer has said anything.
const INITIAL: i64 = 64 * 1024;

/// The windows of one connection. Shared by the reader, which opens them, and the writers of
/// the streams, which use them up; the lock is never held over a wait.
#[derive(Debug)]
pub(super) struct Windows {
    state: Mutex<State>,
    opened: Notify,
}

#[derive(Debug)]
struct State {
    enforced: bool,
    initial: i64,
    connection: i64,
    streams: HashMap<u32, i64>,
}

impl Default for Windows {
    fn default() -> Self {
        let state = State {
            enforced: false,
            initial: INITIAL,
            connection: INITIAL,
            streams: HashMap::new(),
        };
        Self {
            state: Mutex::new(state),
            opened: Notify::new(),
        }
    }
}

impl Windows {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self, stream: u32) {
        let mut state = self.lock();
        let initial = state.initial;
        state.streams.insert(stream, initial);
    }

    pub(super) fn end(&self, stream: u32) {
        self.lock().streams.remove(&stream);
    }

    /// SETTINGS: the difference applies to the streams that are open, too.
    pub(super) fn set_initial(&self, size: u32) {
        let mut state = self.lock();
        let change = i64::from(size) - state.initial;
        state.initial = i64::from(size);
        state.enforced = true;
        for window in state.streams.values_mut() {
            *window = window.saturating_add(change);
        }
        drop(state);
        self.opened.notify_waiters();
    }

    /// WINDOW_UPDATE.
    pub(super) fn open(&self, stream: u32, delta: u32) {
        let mut state = self.lock();
        state.enforced = true;
        let window = match stream {
            0 => Some(&mut state.connection),
            id => state.streams.get_mut(&id),
        };
        if let Some(window) = window {
            *window = window.saturating_add(i64::from(delta));
        }
        drop(state);
        self.opened.notify_waiters();
    }

    /// Takes up to `wanted` bytes, waiting until at least one may be sent.
    pub(super) async fn take(&self, stream: u32, wanted: usize) -> usize {
        loop {
            let opened = self.opened.notified();
            tokio::pin!(opened);
            // Before looking, so that no opening between look and wait is missed.
            opened.as_mut().enable();
            if let Some(taken) = self.try_take(stream, wanted) {
                return taken;
            }
            opened.await;
        }
    }

    fn try_take(&self, stream: u32, wanted: usize) -> Option<usize> {
        let mut state = self.lock();
        let own = *state.streams.get(&stream).unwrap_or(&INITIAL);
        let all = i64::try_from(wanted).unwrap_or(i64::MAX);
        let taken = if state.enforced {
            all.min(own).min(state.connection)
        } else {
            all
        };
        if taken <= 0 {
            return None;
        }
        state.connection = state.connection.saturating_sub(taken);
        if let Some(window) = state.streams.get_mut(&stream) {
            *window = window.saturating_sub(taken);
        }
        usize::try_from(taken).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[tokio::test]
    async fn a_peer_that_never_speaks_of_windows_is_not_held_back() {
        let windows = Windows::default();
        windows.begin(1);
        for _ in 0..100 {
            assert_eq!(windows.take(1, 32 << 10).await, 32 << 10);
        }
    }

    #[tokio::test]
    async fn a_peer_that_keeps_windows_is_obeyed() {
        let windows = Arc::new(Windows::default());
        windows.begin(1);
        windows.set_initial(10);
        assert_eq!(windows.take(1, 100).await, 10);
        let other = Arc::clone(&windows);
        let waiting = tokio::spawn(async move { other.take(1, 100).await });
        windows.open(0, 5);
        windows.open(1, 7);
        assert_eq!(waiting.await.unwrap(), 7);
        // The difference of the settings counts for open streams: 0 + (25 - 10).
        windows.set_initial(25);
        assert_eq!(windows.take(1, 100).await, 15);
        windows.end(1);
        windows.open(1, 1);
    }
}
