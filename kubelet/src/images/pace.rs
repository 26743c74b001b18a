//! How many different images are pulled at once, and how often a registry is asked.
//!
//! Pods that want an image already being pulled join without a slot of their own: a hundred pods
//! of one slow image take one slot and leave the others to other images.

use crate::config::ImageSettings;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

type Permit = OnceCell<Option<OwnedSemaphorePermit>>;

/// The right to pull an image; shared by all who pull the same.
#[derive(Debug)]
pub(super) struct Slot {
    _permit: Arc<Permit>,
}

#[derive(Debug)]
pub(super) struct Pace {
    slots: Arc<Semaphore>,
    /// By image as written.
    running: Mutex<HashMap<String, Weak<Permit>>>,
    bucket: Option<Mutex<Bucket>>,
}

/// A token bucket whose tokens may be owed: who takes one too many waits for it.
#[derive(Debug)]
struct Bucket {
    per_second: f64,
    burst: f64,
    tokens: f64,
    at: Instant,
}

impl Bucket {
    /// How long the caller has to wait.
    fn take(&mut self) -> Duration {
        let now = Instant::now();
        let grown = now.duration_since(self.at).as_secs_f64() * self.per_second;
        self.tokens = (self.tokens + grown).min(self.burst) - 1.0;
        self.at = now;
        Duration::from_secs_f64((-self.tokens / self.per_second).max(0.0))
    }
}

impl Pace {
    pub(super) fn new(settings: &ImageSettings) -> Self {
        let burst = f64::from(settings.registry_burst.max(1));
        let bucket = (settings.registry_qps > 0).then(|| {
            Mutex::new(Bucket {
                per_second: f64::from(settings.registry_qps),
                burst,
                tokens: burst,
                at: Instant::now(),
            })
        });
        Self {
            slots: Arc::new(Semaphore::new(settings.max_parallel_pulls.max(1))),
            running: Mutex::default(),
            bucket,
        }
    }

    /// Waits for a slot, or shares that of the same image.
    pub(super) async fn enter(&self, image: &str) -> Slot {
        let permit = {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            running.retain(|_, p| p.strong_count() > 0);
            if let Some(permit) = running.get(image).and_then(Weak::upgrade) {
                permit
            } else {
                let permit = Arc::new(Permit::new());
                running.insert(image.to_owned(), Arc::downgrade(&permit));
                permit
            }
        };
        // Cancel-safe: a waiter that is dropped leaves the cell to the next.
        permit
            .get_or_init(async || {
                let wait = self
                    .bucket
                    .as_ref()
                    .map(|b| b.lock().unwrap_or_else(PoisonError::into_inner).take());
                if let Some(wait) = wait.filter(|w| !w.is_zero()) {
                    tokio::time::sleep(wait).await;
                }
                // Never closed.
                Arc::clone(&self.slots).acquire_owned().await.ok()
            })
            .await;
        Slot { _permit: permit }
    }
}
