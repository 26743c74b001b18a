//! The only writer of pod status, and the only one who confirms a pod's deletion.
//!
//! Workers leave their newest status in a slot per pod ([`StatusPublisher::publish`]; it never
//! waits); one task, [`PublishTask::run`], carries slots to the apiserver: urgent ones (an
//! address, readiness, an end) at once, others after a moment in which a newer status may replace
//! them. One request per pod at a time; no GET before a PATCH: the base is what the watch showed
//! or what we wrote last, whichever is newer. Failures are retried for ever with back-off.

use super::derive::is_terminal_phase;
use super::patch;
use crate::metrics::metrics;
use crate::pod::spec;
use crate::source::is_static;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// How long a status that is not urgent waits for a newer one.
const COALESCE: Duration = Duration::from_millis(250);
/// Requests in flight. More only queue up in the apiserver.
const PARALLEL: usize = 16;
/// Back-off of a failed request: first and greatest.
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// Why the apiserver did not take a status.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StatusApiError {
    /// The pod does not exist any more, or another one has its name.
    #[error("pod is gone")]
    Gone,
    /// Understood and refused; the same request will be refused again.
    #[error("apiserver refused: {0}")]
    Refused(String),
    /// Not reached or overloaded.
    #[error("apiserver not reached: {0}")]
    Unavailable(String),
}

/// The two requests a publisher makes. One real implementation and one in tests.
pub trait StatusApi: Send + Sync + 'static {
    /// PATCH of the status subresource; returns the new resourceVersion.
    fn patch(
        &self,
        namespace: &str,
        name: &str,
        body: &Value,
    ) -> impl Future<Output = Result<u64, StatusApiError>> + Send;
    /// DELETE with no grace and the UID as precondition.
    fn delete(
        &self,
        namespace: &str,
        name: &str,
        uid: &str,
    ) -> impl Future<Output = Result<(), StatusApiError>> + Send;
}

/// Where workers leave statuses. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct StatusPublisher {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    slots: Mutex<HashMap<String, Slot>>,
    /// What the apiserver has of static pods, by the static pod's UID.
    mirrors: Mutex<HashMap<String, Arc<Object>>>,
    changed: Notify,
}

/// A pod as the apiserver has it.
#[derive(Debug, Clone, PartialEq)]
struct Object {
    uid: String,
    version: u64,
    status: Arc<PodStatus>,
}

impl Object {
    fn of(pod: &Pod) -> Self {
        Self {
            uid: spec::uid(pod).to_owned(),
            version: resource_version(pod),
            status: Arc::new(pod.status.clone().unwrap_or_default()),
        }
    }
}

impl Shared {
    fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locked after [`Shared::slots`] where both are.
    fn mirrors(&self) -> MutexGuard<'_, HashMap<String, Arc<Object>>> {
        self.mirrors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    /// Takes what the apiserver has, unless something newer of the same object is known.
    fn learn(&mut self, object: &Object) {
        let other = self.object_uid.as_ref() != Some(&object.uid);
        if other || object.version > self.base_version || self.base_version == 0 {
            self.object_uid = Some(object.uid.clone());
            self.base = object.status.clone();
            self.base_version = object.version;
        }
    }
}

/// One pod.
#[derive(Debug)]
struct Slot {
    namespace: String,
    name: String,
    /// UID of the object the status goes to: the pod's own, or that of the mirror of a static
    /// pod. None while there is no mirror.
    object_uid: Option<String>,
    wanted: Arc<PodStatus>,
    base: Arc<PodStatus>,
    base_version: u64,
    /// When to send; none when base and wanted agree.
    due: Option<Instant>,
    /// Since when something waits to be told.
    changed: Option<Instant>,
    in_flight: bool,
    failures: u32,
    farewell: Option<oneshot::Sender<()>>,
}

impl StatusPublisher {
    /// Leaves the newest status of a pod. `pod` is the newest object the watch has shown.
    pub fn publish(&self, pod: &Pod, status: Arc<PodStatus>) {
        self.put(pod, status, None);
    }

    /// Publishes the last status of a pod, then confirms its deletion. Resolves when the
    /// apiserver has done it, or when the pod is gone there.
    pub fn farewell(&self, pod: &Pod, status: Arc<PodStatus>) -> oneshot::Receiver<()> {
        let (tx, rx) = oneshot::channel();
        self.put(pod, status, Some(tx));
        rx
    }

    /// Forgets a pod: nothing more is sent for it.
    pub fn forget(&self, uid: &str) {
        self.shared.slots().remove(uid);
    }

    /// What the apiserver has of a static pod: its newest mirror, or none. The pod's status is
    /// sent to it when it differs.
    pub fn set_mirror(&self, static_uid: &str, mirror: Option<&Pod>) {
        let mut slots = self.shared.slots();
        let mut mirrors = self.shared.mirrors();
        let object = mirror.map(|pod| Arc::new(Object::of(pod)));
        let slot = slots.get_mut(static_uid);
        match (&object, slot) {
            (Some(object), Some(slot)) => {
                slot.learn(object);
                slot.due = slot.due.or_else(|| Some(Instant::now()));
            }
            (None, Some(slot)) => {
                slot.object_uid = None;
                slot.base_version = 0;
            }
            (_, None) => {}
        }
        match object {
            Some(object) => mirrors.insert(static_uid.to_owned(), object),
            None => mirrors.remove(static_uid),
        };
        drop(mirrors);
        drop(slots);
        self.shared.changed.notify_one();
    }

    fn put(&self, pod: &Pod, status: Arc<PodStatus>, farewell: Option<oneshot::Sender<()>>) {
        let now = Instant::now();
        let object = if is_static(pod) {
            self.shared.mirrors().get(spec::uid(pod)).cloned()
        } else {
            Some(Arc::new(Object::of(pod)))
        };
        let mut slots = self.shared.slots();
        let slot = slots
            .entry(spec::uid(pod).to_owned())
            .or_insert_with(|| Slot {
                namespace: spec::namespace(pod).to_owned(),
                name: spec::name(pod).to_owned(),
                object_uid: None,
                wanted: status.clone(),
                base: Arc::default(),
                base_version: 0,
                due: None,
                changed: None,
                in_flight: false,
                failures: 0,
                farewell: None,
            });
        if let Some(object) = &object {
            slot.learn(object);
        }
        slot.wanted = status;
        slot.changed.get_or_insert(now);
        let last = farewell.is_some();
        if last {
            slot.farewell = farewell;
        }
        // A pod being deleted ends with the farewell, a moment later: one request for both.
        let ending = pod.metadata.deletion_timestamp.is_some();
        let urgent = last || !ending && is_urgent(&slot.base, &slot.wanted);
        let at = if urgent { now } else { now + COALESCE };
        // A status already on its way to be sent is not put off by a newer one, and a failed
        // request keeps its back-off.
        slot.due = Some(match slot.due {
            Some(due) if slot.failures > 0 => due,
            Some(due) => due.min(at),
            None => at,
        });
        drop(slots);
        self.shared.changed.notify_one();
    }

    /// The task that sends.
    pub fn task<A: StatusApi>(&self, api: A) -> PublishTask<A> {
        PublishTask {
            shared: self.shared.clone(),
            api: Arc::new(api),
        }
    }
}

/// Whether somebody waits for what changed: an end, an address, readiness, a restart.
fn is_urgent(base: &PodStatus, wanted: &PodStatus) -> bool {
    let ready = |s: &PodStatus| {
        s.conditions
            .iter()
            .flatten()
            .any(|c| c.type_ == "Ready" && c.status == "True")
    };
    let restarts = |s: &PodStatus| -> i64 {
        s.container_statuses
            .iter()
            .flatten()
            .map(|c| i64::from(c.restart_count))
            .sum()
    };
    is_terminal_phase(wanted) != is_terminal_phase(base)
        || ready(base) != ready(wanted)
        || restarts(base) != restarts(wanted)
        || base.pod_ip != wanted.pod_ip && ready(wanted)
}

/// A resourceVersion as a number (allowed since Kubernetes 1.35); 0 without one.
fn resource_version(pod: &Pod) -> u64 {
    pod.metadata
        .resource_version
        .as_deref()
        .and_then(|v| v.parse().ok())
        .unwrap_or(0)
}

/// Sends statuses.
#[derive(Debug)]
pub struct PublishTask<A> {
    shared: Arc<Shared>,
    api: Arc<A>,
}

/// One request taken from a slot.
struct Job {
    uid: String,
    object_uid: String,
    namespace: String,
    name: String,
    body: Option<Value>,
    sent: Arc<PodStatus>,
    delete: bool,
}

/// How a request went.
struct Done {
    uid: String,
    object_uid: String,
    sent: Arc<PodStatus>,
    delete: bool,
    result: Result<Option<u64>, StatusApiError>,
}

impl<A: StatusApi> PublishTask<A> {
    /// Sends until cancelled.
    pub async fn run(self, cancel: CancellationToken) {
        let mut flying: JoinSet<Done> = JoinSet::new();
        loop {
            while flying.len() < PARALLEL
                && let Some(job) = self.take()
            {
                let api = self.api.clone();
                flying.spawn(async move { send(&*api, job).await });
            }
            let next_due = if flying.len() < PARALLEL {
                self.next_due()
            } else {
                None
            };
            tokio::select! {
                () = cancel.cancelled() => return,
                () = self.shared.changed.notified() => {}
                Some(done) = flying.join_next(), if !flying.is_empty() => match done {
                    Ok(done) => self.settle(done),
                    Err(error) => warn!(%error, "Status request panicked"),
                },
                () = sleep_until(next_due) => {}
            }
        }
    }

    /// The next request that is due, ends first.
    fn take(&self) -> Option<Job> {
        let now = Instant::now();
        let mut slots = self.shared.slots();
        loop {
            let uid = slots
                .iter()
                .filter(|(_, s)| !s.in_flight && s.due.is_some_and(|d| d <= now))
                .min_by_key(|(_, s)| (!is_terminal_phase(&s.wanted), s.due))
                .map(|(uid, _)| uid.clone())?;
            let slot = slots.get_mut(&uid)?;
            slot.due = None;
            // Without a mirror there is nobody to tell; it is told when there is one.
            let Some(object_uid) = slot.object_uid.clone() else {
                continue;
            };
            if object_uid != uid {
                slot.wanted = Arc::new(keep_times(&slot.base, &slot.wanted));
            }
            let body = patch::patch(&object_uid, &slot.base, &slot.wanted);
            if body.is_none() && slot.farewell.is_none() {
                continue;
            }
            slot.in_flight = true;
            return Some(Job {
                namespace: slot.namespace.clone(),
                name: slot.name.clone(),
                body,
                sent: slot.wanted.clone(),
                delete: slot.farewell.is_some(),
                object_uid,
                uid,
            });
        }
    }

    fn next_due(&self) -> Option<Instant> {
        self.shared
            .slots()
            .values()
            .filter(|s| !s.in_flight)
            .filter_map(|s| s.due)
            .min()
    }

    /// Notes the outcome of a request.
    fn settle(&self, done: Done) {
        let mut slots = self.shared.slots();
        let Some(slot) = slots.get_mut(&done.uid) else {
            return;
        };
        slot.in_flight = false;
        if slot.object_uid.as_ref() != Some(&done.object_uid) {
            // It was about a mirror that has been replaced meanwhile.
            slot.due = slot.due.or_else(|| Some(Instant::now()));
            return;
        }
        match done.result {
            Ok(version) => {
                slot.failures = 0;
                // What changed meanwhile goes on waiting.
                if slot.due.is_none()
                    && let Some(changed) = slot.changed.take()
                {
                    metrics().pod_status_sync.observe_time(changed.elapsed());
                }
                if let Some(version) = version.filter(|v| *v > slot.base_version) {
                    slot.base = done.sent;
                    slot.base_version = version;
                }
                if done.delete
                    && let Some(farewell) = slot.farewell.take()
                {
                    slots.remove(&done.uid);
                    // The worker may have gone: nobody needs to know then.
                    let _ = farewell.send(());
                }
            }
            Err(StatusApiError::Gone) if self.shared.mirrors().remove(&done.uid).is_some() => {
                slot.object_uid = None;
                slot.base_version = 0;
            }
            Err(StatusApiError::Gone) => {
                debug!(
                    uid = done.uid,
                    "Pod is gone from the apiserver, status dropped"
                );
                if let Some(mut slot) = slots.remove(&done.uid)
                    && let Some(farewell) = slot.farewell.take()
                {
                    let _ = farewell.send(());
                }
            }
            Err(StatusApiError::Refused(message)) if !done.delete => {
                warn!(
                    uid = done.uid,
                    pod = slot.name,
                    message,
                    "Status refused by the apiserver"
                );
                slot.base = done.sent;
            }
            Err(error) => {
                slot.failures = slot.failures.saturating_add(1);
                let delay = RETRY_MAX.min(RETRY_FIRST * 2_u32.pow(slot.failures.min(7) - 1));
                if slot.failures.is_power_of_two() {
                    info!(pod = slot.name, %error, failures = slot.failures, "Status not sent, retrying");
                }
                slot.due = Some(Instant::now() + delay);
            }
        }
    }
}

/// A static pod's status does not survive the agent as an object of the API does: what its mirror
/// says about times holds where nothing has changed since.
fn keep_times(base: &PodStatus, wanted: &PodStatus) -> PodStatus {
    let mut status = wanted.clone();
    if base.start_time.is_some() {
        status.start_time.clone_from(&base.start_time);
    }
    for condition in status.conditions.iter_mut().flatten() {
        let same = base
            .conditions
            .iter()
            .flatten()
            .find(|c| c.type_ == condition.type_ && c.status == condition.status);
        if let Some(time) = same.and_then(|c| c.last_transition_time.clone()) {
            condition.last_transition_time = Some(time);
        }
    }
    status
}

/// Sleeps until then; for ever without a time.
async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Makes the requests of one job.
async fn send<A: StatusApi>(api: &A, job: Job) -> Done {
    let result = async {
        let mut version = None;
        if let Some(body) = &job.body {
            match api.patch(&job.namespace, &job.name, body).await {
                Ok(v) => version = Some(v),
                // The deletion is to be confirmed even if the last words are not liked.
                Err(StatusApiError::Refused(message)) if job.delete => {
                    warn!(
                        pod = job.name,
                        message, "Last status refused by the apiserver"
                    );
                }
                Err(error) => return Err(error),
            }
        }
        if job.delete {
            api.delete(&job.namespace, &job.name, &job.object_uid)
                .await?;
        }
        Ok(version)
    };
    Done {
        result: result.await,
        uid: job.uid,
        sent: job.sent,
        delete: job.delete,
        object_uid: job.object_uid,
    }
}

/// The apiserver.
#[derive(Clone)]
pub struct KubeStatusApi {
    client: kube::Client,
}

impl std::fmt::Debug for KubeStatusApi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KubeStatusApi").finish_non_exhaustive()
    }
}

/// All of an answer we need: the rest is skipped while parsing.
#[derive(Debug, Deserialize)]
struct Answer {
    metadata: AnswerMetadata,
}

#[derive(Debug, Deserialize)]
struct AnswerMetadata {
    #[serde(default, rename = "resourceVersion")]
    resource_version: String,
}

impl KubeStatusApi {
    /// Over a client with the node's own identity.
    pub fn new(client: kube::Client) -> Self {
        Self { client }
    }

    /// A request with a body whose answer shall be metadata only.
    async fn request(
        &self,
        method: http::Method,
        uri: String,
        content_type: &str,
        body: &Value,
    ) -> Result<Answer, StatusApiError> {
        let request = http::Request::builder()
            .method(method)
            .uri(uri)
            .header(http::header::CONTENT_TYPE, content_type)
            .header(
                http::header::ACCEPT,
                "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1",
            )
            .body(body.to_string().into_bytes())
            .map_err(|e| StatusApiError::Refused(e.to_string()))?;
        self.client.request(request).await.map_err(classify)
    }
}

/// Sorts an error of the client.
fn classify(error: kube::Error) -> StatusApiError {
    match error {
        kube::Error::Api(status) => match status.code {
            404 => StatusApiError::Gone,
            // The only precondition we send is the UID.
            409 if status.message.contains("UID") || status.message.contains("uid") => {
                StatusApiError::Gone
            }
            409 | 429 | 500.. => StatusApiError::Unavailable(status.message.clone()),
            _ => StatusApiError::Refused(status.message.clone()),
        },
        other => StatusApiError::Unavailable(other.to_string()),
    }
}

impl StatusApi for KubeStatusApi {
    async fn patch(
        &self,
        namespace: &str,
        name: &str,
        body: &Value,
    ) -> Result<u64, StatusApiError> {
        let uri = format!("/api/v1/namespaces/{namespace}/pods/{name}/status");
        let kind = "application/strategic-merge-patch+json";
        let answer = self.request(http::Method::PATCH, uri, kind, body).await?;
        Ok(answer.metadata.resource_version.parse().unwrap_or(0))
    }

    async fn delete(&self, namespace: &str, name: &str, uid: &str) -> Result<(), StatusApiError> {
        let uri = format!("/api/v1/namespaces/{namespace}/pods/{name}");
        let body = json!({
            "apiVersion": "v1", "kind": "DeleteOptions",
            "gracePeriodSeconds": 0, "preconditions": {"uid": uid},
        });
        let answer = self
            .request(http::Method::DELETE, uri, "application/json", &body)
            .await;
        answer.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

    #[derive(Default)]
    struct FakeApi {
        calls: Mutex<Vec<String>>,
        failures: Mutex<Vec<StatusApiError>>,
        called: Notify,
    }

    impl FakeApi {
        fn call(&self, text: String) -> Result<u64, StatusApiError> {
            let failure = self.failures.lock().unwrap().pop();
            self.calls.lock().unwrap().push(text);
            self.called.notify_one();
            failure.map_or(Ok(100), Err)
        }

        async fn wait_for(&self, count: usize) -> Vec<String> {
            loop {
                let calls = self.calls.lock().unwrap().clone();
                if calls.len() >= count {
                    return calls;
                }
                self.called.notified().await;
            }
        }
    }

    impl StatusApi for Arc<FakeApi> {
        async fn patch(&self, _: &str, name: &str, body: &Value) -> Result<u64, StatusApiError> {
            self.call(format!("patch {name} {}", body["status"]["phase"]))
        }
        async fn delete(&self, _: &str, name: &str, uid: &str) -> Result<(), StatusApiError> {
            self.call(format!("delete {name} {uid}")).map(drop)
        }
    }

    fn pod() -> Pod {
        Pod {
            metadata: ObjectMeta {
                name: Some("web".to_owned()),
                namespace: Some("ns".to_owned()),
                uid: Some("u1".to_owned()),
                resource_version: Some("5".to_owned()),
                ..ObjectMeta::default()
            },
            ..Pod::default()
        }
    }

    fn status(phase: &str) -> Arc<PodStatus> {
        Arc::new(PodStatus {
            phase: Some(phase.to_owned()),
            ..PodStatus::default()
        })
    }

    fn start(api: &Arc<FakeApi>) -> (StatusPublisher, CancellationToken) {
        let publisher = StatusPublisher::default();
        let cancel = CancellationToken::new();
        let task = publisher.task(api.clone());
        tokio::spawn(task.run(cancel.clone()));
        (publisher, cancel)
    }

    #[tokio::test(start_paused = true)]
    async fn statuses_that_are_not_urgent_are_coalesced_into_the_newest() {
        let api = Arc::new(FakeApi::default());
        let (publisher, cancel) = start(&api);
        publisher.publish(&pod(), status("Pending"));
        publisher.publish(&pod(), status("Running"));
        assert_eq!(api.wait_for(1).await, ["patch web \"Running\""]);
        publisher.publish(&pod(), status("Running"));
        publisher.publish(&pod(), status("Failed"));
        assert_eq!(api.wait_for(2).await[1], "patch web \"Failed\"");
        cancel.cancel();
    }

    #[tokio::test(start_paused = true)]
    async fn a_farewell_reports_first_and_deletes_then_through_outages() {
        let api = Arc::new(FakeApi::default());
        let down = || StatusApiError::Unavailable("connection refused".to_owned());
        api.failures.lock().unwrap().extend([down(), down()]);
        let (publisher, cancel) = start(&api);
        publisher
            .farewell(&pod(), status("Succeeded"))
            .await
            .unwrap();
        let calls = api.wait_for(4).await;
        assert_eq!(calls.last().unwrap(), "delete web u1");
        assert_eq!(calls.iter().filter(|c| c.starts_with("delete")).count(), 1);
        cancel.cancel();
    }

    #[tokio::test(start_paused = true)]
    async fn a_static_pods_status_goes_to_its_mirror_and_to_the_next_one() {
        let api = Arc::new(FakeApi::default());
        let (publisher, cancel) = start(&api);
        let mut own = pod();
        own.metadata.annotations =
            Some([("kubernetes.io/config.source".to_owned(), "file".to_owned())].into());
        publisher.publish(&own, status("Running"));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(api.calls.lock().unwrap().is_empty(), "nobody to tell");
        let mut mirror = pod();
        mirror.metadata.uid = Some("m1".to_owned());
        publisher.set_mirror("u1", Some(&mirror));
        assert_eq!(api.wait_for(1).await, ["patch web \"Running\""]);
        // Deleted by a user, made again.
        publisher.set_mirror("u1", None);
        mirror.metadata.uid = Some("m2".to_owned());
        publisher.set_mirror("u1", Some(&mirror));
        assert_eq!(api.wait_for(2).await[1], "patch web \"Running\"");
        cancel.cancel();
    }

    #[test]
    fn a_new_agent_does_not_turn_the_clocks_of_a_mirror() {
        let with = |ready: &str, at: &str| -> PodStatus {
            serde_json::from_value(json!({"startTime": at, "conditions": [
                {"type": "Ready", "status": ready, "lastTransitionTime": at},
                {"type": "PodScheduled", "status": "True", "lastTransitionTime": at}]}))
            .unwrap()
        };
        let (old, new) = ("2026-01-01T00:00:00Z", "2026-02-02T00:00:00Z");
        assert_eq!(
            keep_times(&with("True", old), &with("True", new)),
            with("True", old)
        );
        let kept = keep_times(&with("False", old), &with("True", new));
        let times = serde_json::to_value(&kept).unwrap();
        assert_eq!(times["conditions"][0]["lastTransitionTime"], new);
        assert_eq!(times["conditions"][1]["lastTransitionTime"], old);
        assert_eq!(times["startTime"], old);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_gone_at_the_apiserver_is_dropped() {
        let api = Arc::new(FakeApi::default());
        api.failures.lock().unwrap().push(StatusApiError::Gone);
        let (publisher, cancel) = start(&api);
        publisher
            .farewell(&pod(), status("Succeeded"))
            .await
            .unwrap();
        assert_eq!(api.wait_for(1).await.len(), 1);
        cancel.cancel();
    }
}
