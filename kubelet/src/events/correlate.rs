//! Which events are sent, which are counted, which are kept back: client-go's three filters. Pure;
//! time comes with the events.

use super::{EventType, RecordedEvent};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use std::collections::HashMap;

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
/// What to do with an event.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Correlated {
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
pub(super) struct Correlator {
    node: String,
    similar: HashMap<SimilarKey, Similar>,
    known: HashMap<(SimilarKey, String), Known>,
    buckets: HashMap<String, Bucket>,
}

impl Correlator {
    pub(super) fn new(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            similar: HashMap::new(),
            known: HashMap::new(),
            buckets: HashMap::new(),
        }
    }

    /// Decides about one event.
    pub(super) fn correlate(&mut self, event: &RecordedEvent) -> Correlated {
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
    use k8s_openapi::api::core::v1::ObjectReference;

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
}
