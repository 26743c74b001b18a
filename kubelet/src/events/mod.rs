//! Events for users: `kubectl describe pod` shows them.
//!
//! Any part of the agent holds an [`EventSink`] and says what happened; it never waits and never
//! fails. One task, [`EventPoster::run`], owns the correlator and talks to the apiserver, one
//! request at a time on purpose: events are the least urgent traffic of a node, and this leaves
//! the apiserver to pod status when a hundred pods start at once.
//! The queue is bounded; when the apiserver is away, the newest events are dropped and counted.

mod correlate;

use correlate::{Correlated, Correlator};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, ObjectReference, Pod};
use kube::api::{Api, Patch, PatchParams, PostParams};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// Events waiting for the poster. A hundred pods make about five hundred events at start.
const QUEUE: usize = 2048;
/// Tries for one event.
const POST_TRIES: u32 = 4;

/// Whether an event is good news or bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventType {
    /// Information.
    Normal,
    /// Something that needs a person's eye.
    Warning,
}

impl EventType {
    /// The API's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

/// One thing that happened, before correlation.
#[derive(Debug, Clone, PartialEq)]
pub struct RecordedEvent {
    /// What it is about; with a namespace for namespaced objects.
    pub object: ObjectReference,
    /// Good or bad.
    pub type_: EventType,
    /// CamelCase word.
    pub reason: String,
    /// Sentence for people.
    pub message: String,
    /// When.
    pub at: Timestamp,
}

/// Where parts of the agent drop events. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EventSink {
    inner: Arc<SinkInner>,
}

#[derive(Debug)]
enum SinkInner {
    /// To the poster.
    Queue {
        tx: mpsc::Sender<RecordedEvent>,
        dropped: AtomicU64,
    },
    /// Kept, for tests.
    Memory(Mutex<Vec<RecordedEvent>>),
}

/// How many events a node may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventPace {
    /// Per second on average; 0 is no limit.
    pub qps: u32,
    /// At once.
    pub burst: u32,
}

impl Default for EventPace {
    fn default() -> Self {
        Self {
            qps: 50,
            burst: 100,
        }
    }
}

/// The posting end of an [`EventSink`].
#[derive(Debug)]
pub struct EventPoster {
    rx: mpsc::Receiver<RecordedEvent>,
    correlator: Correlator,
    pace: EventPace,
    /// When the allowance is whole again: the further ahead, the less is left.
    whole_at: tokio::time::Instant,
}

/// The field path of a container, `spec.containers{name}`.
pub fn container_path(name: &str) -> String {
    format!("spec.containers{{{name}}}")
}

/// The field path of an init container.
pub fn init_container_path(name: &str) -> String {
    format!("spec.initContainers{{{name}}}")
}

/// The field path of an ephemeral container, `spec.ephemeralContainers{name}`.
pub fn ephemeral_container_path(name: &str) -> String {
    format!("spec.ephemeralContainers{{{name}}}")
}

/// Where in the spec of a pod a container stands.
pub fn field_path(pod: &Pod, name: &str) -> String {
    let spec = pod.spec.as_ref();
    let init = spec.and_then(|s| s.init_containers.as_deref());
    let ephemeral = spec.and_then(|s| s.ephemeral_containers.as_deref());
    if init.unwrap_or_default().iter().any(|c| c.name == name) {
        init_container_path(name)
    } else if ephemeral.unwrap_or_default().iter().any(|c| c.name == name) {
        ephemeral_container_path(name)
    } else {
        container_path(name)
    }
}

/// A reference to a pod for an event.
pub fn pod_reference(pod: &Pod, field_path: Option<&str>) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        name: pod.metadata.name.clone(),
        namespace: pod.metadata.namespace.clone(),
        uid: pod.metadata.uid.clone(),
        resource_version: pod.metadata.resource_version.clone(),
        field_path: field_path.map(str::to_owned),
    }
}

impl EventSink {
    /// A sink and the poster that empties it. `node` is the event source's host.
    pub fn new(node: &str, pace: EventPace) -> (Self, EventPoster) {
        let (tx, rx) = mpsc::channel(QUEUE);
        let sink = Self {
            inner: Arc::new(SinkInner::Queue {
                tx,
                dropped: AtomicU64::new(0),
            }),
        };
        (
            sink,
            EventPoster {
                rx,
                correlator: Correlator::new(node),
                pace,
                whole_at: tokio::time::Instant::now(),
            },
        )
    }

    /// A sink that only remembers: for tests.
    pub fn memory() -> Self {
        Self {
            inner: Arc::new(SinkInner::Memory(Mutex::default())),
        }
    }

    /// What a [`EventSink::memory`] sink has seen; empty for others.
    pub fn recorded(&self) -> Vec<RecordedEvent> {
        match &*self.inner {
            SinkInner::Queue { .. } => Vec::new(),
            SinkInner::Memory(seen) => seen.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// Tells about a pod, or with `field_path` (see [`container_path`]) about one of its
    /// containers.
    pub fn pod_event(
        &self,
        pod: &Pod,
        field_path: Option<&str>,
        type_: EventType,
        reason: &str,
        message: impl Into<String>,
    ) {
        self.object_event(pod_reference(pod, field_path), type_, reason, message);
    }

    /// Tells about any object.
    pub fn object_event(
        &self,
        object: ObjectReference,
        type_: EventType,
        reason: &str,
        message: impl Into<String>,
    ) {
        let event = RecordedEvent {
            object,
            type_,
            reason: reason.to_owned(),
            message: message.into(),
            at: Timestamp::now(),
        };
        match &*self.inner {
            SinkInner::Queue { tx, dropped } => {
                if tx.try_send(event).is_err() {
                    let lost = dropped.fetch_add(1, Ordering::Relaxed) + 1;
                    // One line per power of two: says it without a flood.
                    if lost.is_power_of_two() {
                        warn!(lost, "Event queue is full or closed, events dropped");
                    }
                }
            }
            SinkInner::Memory(seen) => {
                seen.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(event);
            }
        }
    }
}

impl EventPoster {
    /// Posts events until cancelled or until every sink is gone.
    pub async fn run(mut self, client: kube::Client, cancel: CancellationToken) {
        loop {
            let next = tokio::select! {
                () = cancel.cancelled() => return,
                event = self.rx.recv() => event,
            };
            let Some(event) = next else { return };
            let action = self.correlator.correlate(&event);
            if action == Correlated::Drop {
                continue;
            }
            let wait = self.turn();
            tokio::select! {
                () = cancel.cancelled() => return,
                () = async {
                    tokio::time::sleep(wait).await;
                    post(&client, action).await;
                } => {}
            }
        }
    }

    /// How long the next event has to wait for its turn, which is taken.
    fn turn(&mut self) -> Duration {
        if self.pace.qps == 0 {
            return Duration::ZERO;
        }
        let each = Duration::from_secs(1) / self.pace.qps;
        let now = tokio::time::Instant::now();
        self.whole_at = self.whole_at.max(now) + each;
        let ahead = self.whole_at - now;
        ahead.saturating_sub(each * self.pace.burst.max(1))
    }
}

impl EventPoster {
    /// Writes events to the log until cancelled: for a node without an apiserver.
    pub async fn log(mut self, cancel: CancellationToken) {
        loop {
            let next = tokio::select! {
                () = cancel.cancelled() => return,
                event = self.rx.recv() => event,
            };
            let Some(event) = next else { return };
            let reason = event.reason.as_str();
            let object = event.object.name.unwrap_or_default();
            let message = event.message;
            match event.type_ {
                EventType::Normal => info!(object, reason, "{message}"),
                EventType::Warning => warn!(object, reason, "{message}"),
            }
        }
    }
}

/// Carries one correlated event to the apiserver; gives up after [`POST_TRIES`].
async fn post(client: &kube::Client, action: Correlated) {
    let mut delay = Duration::from_millis(250);
    for _ in 0..POST_TRIES {
        let result = match &action {
            Correlated::Drop => return,
            Correlated::Create(event) => create(client, event).await,
            Correlated::Again(event) => patch(client, event).await,
        };
        match result {
            Ok(()) => return,
            // The server understood and refused (namespace going away, for one): no use to repeat.
            Err(kube::Error::Api(status)) if status.code < 500 && status.code != 429 => {
                debug!(code = status.code, message = %status.message, "Event refused");
                return;
            }
            Err(error) => debug!(%error, "Event not posted, retrying"),
        }
        tokio::time::sleep(delay).await;
        delay *= 4;
    }
}

/// The namespaced API of an event.
fn api(client: &kube::Client, event: &Event) -> Api<Event> {
    let namespace = event.metadata.namespace.as_deref().unwrap_or("default");
    Api::namespaced(client.clone(), namespace)
}

/// First sight of an event.
async fn create(client: &kube::Client, event: &Event) -> kube::Result<()> {
    api(client, event)
        .create(&PostParams::default(), event)
        .await
        .map(drop)
}

/// An event seen again: raise its count; if it has expired in the meantime, create it anew.
async fn patch(client: &kube::Client, event: &Event) -> kube::Result<()> {
    let name = event.metadata.name.as_deref().unwrap_or_default();
    let body = serde_json::json!({
        "count": event.count, "lastTimestamp": event.last_timestamp, "message": event.message,
    });
    let result = api(client, event)
        .patch(name, &PatchParams::default(), &Patch::Strategic(body))
        .await;
    match result {
        Err(kube::Error::Api(status)) if status.code == 404 => create(client, event).await,
        other => other.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_node_sends_a_burst_and_then_at_its_pace() {
        let pace = EventPace { qps: 10, burst: 3 };
        let (_sink, mut poster) = EventSink::new("n1", pace);
        let waits: Vec<_> = (0..5).map(|_| poster.turn().as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 100, 200]);
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(poster.turn(), Duration::ZERO);
    }

    #[test]
    fn a_memory_sink_keeps_what_it_was_told() {
        let sink = EventSink::memory();
        sink.pod_event(
            &Pod::default(),
            Some("spec.containers{a}"),
            EventType::Normal,
            "Started",
            "Started container a",
        );
        assert_eq!(sink.recorded().len(), 1);
        assert_eq!(
            sink.recorded()[0].object.field_path.as_deref(),
            Some("spec.containers{a}")
        );
    }
}
