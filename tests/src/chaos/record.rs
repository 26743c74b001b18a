//! Every event of the pods, over any number of deaths of the apiserver.

use crate::scenario::{Event, Scenario, Watch, text};
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// A recording.
#[derive(Debug)]
pub(super) struct Record {
    events: Arc<Mutex<Vec<Event>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Longest time until a request to stop is noticed.
const GLANCE: Duration = Duration::from_millis(300);

impl Record {
    /// Starts recording.
    pub(super) fn start(scenario: &Scenario) -> Result<Self> {
        let events = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let first = Watch::start(scenario, &["pods"])?;
        let admin = scenario.admin.clone();
        let namespace = scenario.namespace.clone();
        let (into, until) = (events.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut watch = Some(first);
            while !until.load(Ordering::Relaxed) {
                match &watch {
                    Some(running) => match running.next(GLANCE) {
                        Some(event) => into
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .push(event),
                        None if running.ended() => {
                            into.lock()
                                .unwrap_or_else(PoisonError::into_inner)
                                .extend(running.seen());
                            watch = None;
                        }
                        None => {}
                    },
                    None => {
                        watch = Watch::start_in(&admin, &namespace, &["pods"]).ok();
                    }
                }
            }
        });
        Ok(Self {
            events,
            stop,
            thread: Some(thread),
        })
    }

    /// UIDs of the pods seen so far, with their names.
    pub(super) fn uids(&self) -> BTreeMap<String, String> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let pair = |e: &Event| {
            (
                text(&e.object, "/metadata/uid"),
                text(&e.object, "/metadata/name"),
            )
        };
        events
            .iter()
            .map(pair)
            .filter(|(uid, _)| !uid.is_empty())
            .collect()
    }

    /// Ends the recording: its events in order, each state once.
    pub(super) fn stop(mut self) -> Vec<Event> {
        self.halt();
        let events =
            std::mem::take(&mut *self.events.lock().unwrap_or_else(PoisonError::into_inner));
        let mut seen = BTreeSet::new();
        let fresh = |event: &Event| {
            let version = text(&event.object, "/metadata/resourceVersion");
            seen.insert((text(&event.object, "/metadata/uid"), version))
        };
        let mut events: Vec<Event> = events;
        events.retain(fresh);
        events
    }

    fn halt(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.halt();
    }
}
