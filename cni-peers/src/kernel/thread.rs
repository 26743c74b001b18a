//! The thread that looks: when the nodes changed, when the kernel says that something of ours
//! changed, and at the latest after the resync time.
//!
//! An event only wakes. Events come in bursts, our own changes among them: after one, the rest is
//! waited for a moment, and between two looks lies a pause, so that a storm costs a bounded share
//! of a core.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cni_routed::PEER_ROUTE_PROTOCOL;
use linux::event::{self, Interest, Poller};
use linux::netlink::{EventSocket, NetEvent, NetlinkError};
use tokio::sync::watch;
use tracing::warn;

use super::{Reconciler, Report, Settings, Snapshot, Watched};

/// After an event the rest of its burst is waited for.
const SETTLE: Duration = Duration::from_millis(20);
/// A look is followed by a pause of this many times its own length: at most a third of a core.
const PAUSE_FACTOR: u32 = 2;
/// While something is wrong it is looked at this often, whatever the resync time.
const TROUBLED: Duration = Duration::from_secs(1);

const ROUTES: u64 = 0;
const RULES: u64 = 1;
const WAKE: u64 = 2;

/// Tells the thread of new nodes and of the end.
#[derive(Debug)]
pub(crate) struct KernelThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Newest nodes not yet taken. Two threads: the one that hears of nodes, the one that looks.
    inbox: Mutex<Inbox>,
    wake: OwnedFd,
}

#[derive(Debug, Default)]
struct Inbox {
    snapshot: Option<Snapshot>,
    stop: bool,
}

/// Starts the thread. What it finds is in the channel, newest only.
///
/// # Errors
/// When a socket or the thread cannot be had.
pub(crate) fn spawn(
    settings: Settings,
) -> Result<(KernelThread, watch::Receiver<Report>), SpawnError> {
    let (sender, receiver) = watch::channel(Report::default());
    let looking = Looking::new(settings)?;
    let shared = Arc::new(Shared {
        inbox: Mutex::default(),
        wake: event::eventfd().map_err(SpawnError::Io)?,
    });
    let inside = Arc::clone(&shared);
    let thread = std::thread::Builder::new()
        .name("kernel".into())
        .spawn(move || looking.run(&inside, &sender))
        .map_err(SpawnError::Io)?;
    let handle = KernelThread {
        shared,
        thread: Some(thread),
    };
    Ok((handle, receiver))
}

/// The thread cannot be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpawnError {
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error("start watching the kernel's network state")]
    Io(#[source] io::Error),
}

impl KernelThread {
    /// Newest nodes.
    pub(crate) fn send(&self, snapshot: Snapshot) {
        self.inbox().snapshot = Some(snapshot);
        self.wake();
    }

    fn inbox(&self) -> std::sync::MutexGuard<'_, Inbox> {
        self.shared
            .inbox
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // The counter can only be full when it woke already.
        let _ = event::write(self.shared.wake.as_fd(), &1_u64.to_ne_bytes());
    }
}

impl Drop for KernelThread {
    /// What was made stays: pods go on talking while the agent is replaced.
    fn drop(&mut self) {
        self.inbox().stop = true;
        self.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Looking {
    reconciler: Reconciler,
    routes: EventSocket,
    rules: EventSocket,
    poller: Poller,
    resync: Duration,
}

impl Looking {
    fn new(settings: Settings) -> Result<Self, SpawnError> {
        let resync = settings.resync;
        let routes = EventSocket::routes(settings.event_buffer_bytes)?;
        let rules = EventSocket::rules(settings.event_buffer_bytes)?;
        Ok(Self {
            reconciler: Reconciler::new(settings)?,
            routes,
            rules,
            poller: Poller::new().map_err(SpawnError::Io)?,
            resync,
        })
    }

    fn run(mut self, shared: &Shared, reports: &watch::Sender<Report>) {
        let registered = self
            .poller
            .add(self.routes.as_fd(), ROUTES, Interest::READ)
            .and_then(|()| self.poller.add(self.rules.as_fd(), RULES, Interest::READ))
            .and_then(|()| self.poller.add(shared.wake.as_fd(), WAKE, Interest::READ));
        if let Err(error) = registered {
            // The resync time remains.
            warn!("Cannot wait for the kernel's events: {error}");
        }
        let mut snapshot = Snapshot::default();
        let mut next = Instant::now() + self.resync;
        loop {
            let now = Instant::now();
            let woken = self.wait(shared, next.saturating_duration_since(now));
            {
                let mut inbox = shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
                if inbox.stop {
                    return;
                }
                if let Some(newest) = inbox.snapshot.take() {
                    snapshot = newest;
                    self.reconciler.unsettle();
                }
            }
            if !woken && Instant::now() < next {
                continue;
            }
            let begun = Instant::now();
            let report = self.reconciler.reconcile(&snapshot);
            let troubled = report.trouble.is_some();
            reports.send_replace(report);
            let pause = begun.elapsed() * PAUSE_FACTOR;
            std::thread::park_timeout(pause.min(TROUBLED));
            let wait = if troubled {
                TROUBLED.min(self.resync)
            } else {
                self.resync
            };
            next = Instant::now() + wait;
        }
    }

    /// Waits for something that matters, at most this long; whether there was.
    fn wait(&mut self, shared: &Shared, limit: Duration) -> bool {
        let mut ready = Vec::new();
        let limit_ms = limit.as_millis().try_into().unwrap_or(u64::MAX);
        // Round up, or the last millisecond would be spent in a circle.
        if let Err(error) = self.poller.wait(&mut ready, Some(limit_ms + 1)) {
            warn!("Cannot wait for events: {error}");
            std::thread::park_timeout(limit);
            return true;
        }
        let mut matters = false;
        if ready.iter().any(|r| r.token == WAKE) {
            event::drain(shared.wake.as_fd());
            matters = true;
        }
        if ready.iter().any(|r| r.token != WAKE) && self.hear() {
            matters = true;
            // The rest of the burst.
            std::thread::park_timeout(SETTLE);
            self.hear();
        }
        matters
    }

    /// Takes all events that are there; whether one of them matters.
    fn hear(&mut self) -> bool {
        let watched = self.reconciler.watched().clone();
        let mut matters = false;
        let mut overruns = 0;
        let mut see = |event: NetEvent| match event {
            NetEvent::Overrun => {
                overruns += 1;
                matters = true;
            }
            other => matters |= concerns_us(&other, &watched),
        };
        let heard = self.routes.drain(&mut see);
        let heard = heard.and(self.rules.drain(&mut see));
        if let Err(error) = heard {
            warn!("Cannot hear the kernel's events: {error}");
        }
        for _ in 0..overruns {
            self.reconciler.count_overrun();
        }
        matters
    }
}

/// Pods come and go all the time: their links, neighbours and routes are not our business.
fn concerns_us(event: &NetEvent, watched: &Watched) -> bool {
    match event {
        NetEvent::Link { index } => {
            watched.links.is_empty()
                || watched.links.contains(index)
                || watched.devices.contains(index)
        }
        // The node's own neighbours change with every breath.
        NetEvent::Neighbour { index } => watched.devices.contains(index),
        // Pods' links have no addresses on our side; another's tell of a new underlay.
        NetEvent::Address { .. } | NetEvent::Setting | NetEvent::Overrun => true,
        NetEvent::Route { protocol } => *protocol == PEER_ROUTE_PROTOCOL,
        NetEvent::Rules { table } => table == linux::nft::TABLE.name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_that_come_and_go_wake_nobody() {
        let ours = Watched {
            links: vec![3],
            devices: vec![7],
        };
        for event in [
            NetEvent::Link { index: 9 },
            NetEvent::Neighbour { index: 9 },
            NetEvent::Neighbour { index: 3 },
            NetEvent::Route { protocol: 3 },
            NetEvent::Rules {
                table: "kube-proxy".into(),
            },
        ] {
            assert!(!concerns_us(&event, &ours), "{event:?}");
        }
        for event in [
            NetEvent::Link { index: 3 },
            NetEvent::Link { index: 7 },
            NetEvent::Neighbour { index: 7 },
            NetEvent::Route {
                protocol: PEER_ROUTE_PROTOCOL,
            },
            NetEvent::Rules {
                table: "ferrule".into(),
            },
            NetEvent::Setting,
            NetEvent::Overrun,
        ] {
            assert!(concerns_us(&event, &ours), "{event:?}");
        }
    }
}
