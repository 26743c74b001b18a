//! Events for users: `kubectl describe pod` shows them.
//!
//! Any part of the agent holds an [`EventSink`] and says what happened; it never waits and never
//! fails. One task, [`EventPoster::run`], owns the correlator and talks to the apiserver, one
//! request at a time on purpose: events are the least urgent traffic of a node, and this leaves
//! the apiserver to pod status when a hundred pods start at once.
//! The queue is bounded; when the apiserver is away, the newest events are dropped and counted.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Api, Patch, PatchParams, PostParams};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// Events waiting for the poster. A hundred pods make about five hundred events at start.
const QUEUE: usize = 2048;
/// Different messages of one object and reason within [`AGGREGATE_WINDOW_S`] before they are
/// combined into one event (as client-go).
const AGGREGATE_MAX: usize = 10;
/// Seconds within which similar events are combined.
const AGGREGATE_WINDOW_S: i64 = 600;
/// Events one object may have in a burst.
const SPAM_BURST: f64 = 25.0;
/// After the burst: one event in this many seconds.
const SPAM_REFILL_S: f64 = 300.0;
/// Correlator entries kept; beyond it the oldest half is forgotten.
const CORRELATOR_ENTRIES: usize = 4096;
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

/// What to do with an event.
#[derive(Debug, Clone, PartialEq)]
enum Correlated {
    /// Too many for this object.
    Drop,
    /// New.
    Create(Event),
    /// Known: the same name with a higher count.
    Again(Event),
}

/// Same object, type and reason: what similar events share.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct SimilarKey {
    object: String,
    type_: EventType,
    reason: String,
}

#[derive(Debug)]
struct Similar {
    messages: Vec<String>,
    since: Timestamp,
}

#[derive(Debug)]
struct Known {
    event: Event,
    /// It was sent at least once.
    created: bool,
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    at: Timestamp,
}

/// Client-go's three filters as one value: aggregation, counting, spam limit.
#[derive(Debug)]
struct Correlator {
    node: String,
    similar: HashMap<SimilarKey, Similar>,
    known: HashMap<(SimilarKey, String), Known>,
    buckets: HashMap<String, Bucket>,
}

impl Correlator {
    fn new(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            similar: HashMap::new(),
            known: HashMap::new(),
            buckets: HashMap::new(),
        }
    }

    /// Decides about one event.
    fn correlate(&mut self, event: &RecordedEvent) -> Correlated {
        self.bound();
        let admitted = self.admit(event);
        let key = SimilarKey {
            object: event.object.uid.clone().unwrap_or_default(),
            type_: event.type_,
            reason: event.reason.clone(),
        };
        let (message, identity) = self.aggregate(&key, event);
        let at = Time(event.at);
        let node = &self.node;
        let mut again = true;
        let known = self.known.entry((key, identity)).or_insert_with(|| {
            again = false;
            Known {
                event: new_event(event, node),
                created: false,
            }
        });
        known.event.message = Some(message);
        if again {
            known.event.count = Some(known.event.count.unwrap_or(1).saturating_add(1));
            known.event.last_timestamp = Some(at);
        }
        // What is not sent is counted all the same.
        match (admitted, known.created) {
            (false, _) => Correlated::Drop,
            (true, true) => Correlated::Again(known.event.clone()),
            (true, false) => {
                known.created = true;
                Correlated::Create(known.event.clone())
            }
        }
    }

    /// The message to show and the identity under which repeats are counted.
    fn aggregate(&mut self, key: &SimilarKey, event: &RecordedEvent) -> (String, String) {
        let similar = self.similar.entry(key.clone()).or_insert_with(|| Similar {
            messages: Vec::new(),
            since: event.at,
        });
        if event.at.as_second() - similar.since.as_second() > AGGREGATE_WINDOW_S {
            similar.messages.clear();
        }
        similar.since = event.at;
        if !similar.messages.contains(&event.message) {
            similar.messages.push(event.message.clone());
        }
        if similar.messages.len() < AGGREGATE_MAX {
            let path = event.object.field_path.as_deref().unwrap_or_default();
            return (event.message.clone(), format!("{path}\0{}", event.message));
        }
        similar.messages.truncate(AGGREGATE_MAX - 1);
        (
            format!("(combined from similar events): {}", event.message),
            String::new(),
        )
    }

    /// Token bucket per object.
    fn admit(&mut self, event: &RecordedEvent) -> bool {
        let object = event.object.uid.clone().unwrap_or_default();
        let bucket = self.buckets.entry(object).or_insert(Bucket {
            tokens: SPAM_BURST,
            at: event.at,
        });
        let passed = (event.at.as_millisecond() - bucket.at.as_millisecond()) as f64 / 1000.0;
        bucket.tokens = (bucket.tokens + passed.max(0.0) / SPAM_REFILL_S).min(SPAM_BURST);
        bucket.at = event.at;
        if bucket.tokens < 1.0 {
            return false;
        }
        bucket.tokens -= 1.0;
        true
    }

    /// Forgets the oldest when a table is full.
    fn bound(&mut self) {
        if self.similar.len() > CORRELATOR_ENTRIES {
            let mut ages: Vec<_> = self.similar.values().map(|s| s.since).collect();
            ages.sort_unstable();
            let middle = ages[ages.len() / 2];
            self.similar.retain(|_, s| s.since > middle);
        }
        if self.known.len() > CORRELATOR_ENTRIES {
            let age = |k: &Known| k.event.last_timestamp.as_ref().map(|t| t.0);
            let mut ages: Vec<_> = self.known.values().map(age).collect();
            ages.sort_unstable();
            let middle = ages[ages.len() / 2];
            self.known.retain(|_, k| age(k) > middle);
        }
        if self.buckets.len() > CORRELATOR_ENTRIES {
            let mut ages: Vec<_> = self.buckets.values().map(|b| b.at).collect();
            ages.sort_unstable();
            let middle = ages[ages.len() / 2];
            self.buckets.retain(|_, b| b.at > middle);
        }
    }
}

/// The API object of an event seen for the first time.
fn new_event(event: &RecordedEvent, node: &str) -> Event {
    let object = &event.object;
    let name = object.name.as_deref().unwrap_or_default();
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{name}.{:x}", event.at.as_nanosecond())),
            namespace: Some(
                object
                    .namespace
                    .clone()
                    .unwrap_or_else(|| "default".to_owned()),
            ),
            ..ObjectMeta::default()
        },
        involved_object: object.clone(),
        type_: Some(event.type_.as_str().to_owned()),
        reason: Some(event.reason.clone()),
        message: Some(event.message.clone()),
        count: Some(1),
        first_timestamp: Some(Time(event.at)),
        last_timestamp: Some(Time(event.at)),
        source: Some(EventSource {
            component: Some("kubelet".to_owned()),
            host: Some(node.to_owned()),
        }),
        reporting_component: Some("kubelet".to_owned()),
        reporting_instance: Some(node.to_owned()),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(at_s: i64, reason: &str, message: &str) -> RecordedEvent {
        RecordedEvent {
            object: ObjectReference {
                name: Some("web".to_owned()),
                namespace: Some("shop".to_owned()),
                uid: Some("u1".to_owned()),
                ..ObjectReference::default()
            },
            type_: EventType::Warning,
            reason: reason.to_owned(),
            message: message.to_owned(),
            at: Timestamp::from_second(1_700_000_000 + at_s).unwrap(),
        }
    }

    #[test]
    fn the_same_event_again_raises_the_count_under_the_same_name() {
        let mut c = Correlator::new("n1");
        let Correlated::Create(first) = c.correlate(&event(0, "BackOff", "back-off")) else {
            panic!("not created")
        };
        let Correlated::Again(second) = c.correlate(&event(5, "BackOff", "back-off")) else {
            panic!("not counted")
        };
        assert_eq!(first.metadata.name, second.metadata.name);
        assert_eq!(second.count, Some(2));
        assert_eq!(first.metadata.namespace.as_deref(), Some("shop"));
    }

    #[test]
    fn many_different_messages_of_one_reason_are_combined() {
        let mut c = Correlator::new("n1");
        let mut created = 0;
        for i in 0..20 {
            if let Correlated::Create(e) = c.correlate(&event(0, "Failed", &format!("try {i}"))) {
                created += 1;
                if created >= AGGREGATE_MAX {
                    assert!(
                        e.message
                            .unwrap()
                            .starts_with("(combined from similar events): ")
                    );
                }
            }
        }
        assert_eq!(created, AGGREGATE_MAX);
    }

    #[test]
    fn a_crash_loop_of_three_days_posts_a_bounded_number_of_events() {
        let mut c = Correlator::new("n1");
        let (mut sent, mut created, mut last) = (0, 0, 0);
        for second in (0..3 * 86_400).step_by(10) {
            match c.correlate(&event(second, "BackOff", "restarting")) {
                Correlated::Drop => continue,
                Correlated::Create(_) => created += 1,
                Correlated::Again(event) => last = event.count.unwrap(),
            }
            sent += 1;
        }
        // 25 at once, then one in five minutes, all of them one object, and all are counted.
        assert!(sent <= 25 + 3 * 288, "{sent} events");
        assert_eq!(created, 1);
        assert!(last > 3 * 86_400 / 10 - 60, "{last}");
    }

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
