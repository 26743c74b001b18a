//! Pods bound to this node, by a watch with field selector and bookmarks.
//!
//! The task never gives up: an apiserver that is away is asked again with back-off, and pods that
//! run are not touched meanwhile. After an interruption the watch goes on where it was; when that
//! version is too old, everything is listed again and what vanished is reported as gone.

use super::{ANNOTATION_MIRROR, ANNOTATION_SOURCE, PodChange, Source};
use futures::{Stream, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::runtime::watcher::{self, Event, InitialListStrategy};
use std::collections::{HashMap, HashSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Back-off after an error of the watch.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// Sends the pods of `node` until cancelled or until nobody listens.
pub async fn run(
    client: kube::Client,
    node: String,
    changes: mpsc::Sender<PodChange>,
    cancel: CancellationToken,
) {
    let api: Api<Pod> = Api::all(client);
    let mut shown = Shown::default();
    let mut strategy = InitialListStrategy::StreamingList;
    loop {
        let config = watcher::Config {
            initial_list_strategy: strategy.clone(),
            list_semantic: watcher::ListSemantic::Any,
            ..watcher::Config::default().fields(&format!("spec.nodeName={node}"))
        };
        let stream = watcher::watcher(api.clone(), config).map_err(Problem::from);
        let ended = tokio::select! {
            () = cancel.cancelled() => return,
            ended = follow(stream, &mut shown, &changes) => ended,
        };
        match ended {
            Ended::NobodyListens => return,
            Ended::NoStreamingList => {
                info!("Apiserver does not stream lists, listing instead");
                strategy = InitialListStrategy::ListWatch;
            }
        }
    }
}

/// Why a watch was given up.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    /// The manager is gone.
    NobodyListens,
    /// The apiserver refuses `sendInitialEvents`.
    NoStreamingList,
}

/// An error of the watch, as far as it matters here.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
struct Problem {
    message: String,
    refused_streaming: bool,
}

impl From<watcher::Error> for Problem {
    fn from(error: watcher::Error) -> Self {
        let code = match &error {
            watcher::Error::WatchStartFailed(kube::Error::Api(s))
            | watcher::Error::InitialListFailed(kube::Error::Api(s)) => s.code,
            watcher::Error::WatchError(s) => s.code,
            watcher::Error::WatchStartFailed(_)
            | watcher::Error::InitialListFailed(_)
            | watcher::Error::WatchFailed(_)
            | watcher::Error::NoResourceVersion => 0,
        };
        Self {
            refused_streaming: matches!(code, 400 | 422),
            message: error.to_string(),
        }
    }
}

/// Passes events on; backs off after errors.
async fn follow(
    stream: impl Stream<Item = Result<Event<Pod>, Problem>>,
    shown: &mut Shown,
    changes: &mpsc::Sender<PodChange>,
) -> Ended {
    let mut stream = pin!(stream);
    let mut delay = RETRY_FIRST;
    while let Some(event) = stream.next().await {
        match event {
            Ok(event) => {
                delay = RETRY_FIRST;
                for change in shown.apply(event) {
                    if changes.send(change).await.is_err() {
                        return Ended::NobodyListens;
                    }
                }
            }
            Err(problem) if problem.refused_streaming && !shown.synced => {
                return Ended::NoStreamingList;
            }
            Err(problem) => {
                warn!(error = problem.message, "Pod watch interrupted");
                tokio::time::sleep(delay).await;
                delay = RETRY_MAX.min(delay * 2);
            }
        }
    }
    // The watcher's stream has no end.
    Ended::NobodyListens
}

/// What was shown so far: tells what vanished during a new list. Pure.
#[derive(Debug, Default)]
struct Shown {
    pods: HashMap<String, Arc<Pod>>,
    listed: HashSet<String>,
    synced: bool,
}

impl Shown {
    fn apply(&mut self, event: Event<Pod>) -> Vec<PodChange> {
        match event {
            Event::Init => {
                self.listed.clear();
                Vec::new()
            }
            Event::InitApply(pod) => {
                let change = self.set(pod);
                if let PodChange::Set(pod) = &change {
                    self.listed.insert(uid(pod));
                }
                vec![change]
            }
            Event::Apply(pod) => vec![self.set(pod)],
            Event::Delete(pod) => {
                self.pods.remove(&uid(&pod));
                vec![PodChange::Gone(Arc::new(trim(pod)))]
            }
            Event::InitDone => {
                let listed = std::mem::take(&mut self.listed);
                let (kept, vanished): (HashMap<_, _>, HashMap<_, _>) =
                    std::mem::take(&mut self.pods)
                        .into_iter()
                        .partition(|(u, _)| listed.contains(u));
                self.pods = kept;
                self.synced = true;
                let mut changes: Vec<_> = vanished.into_values().map(PodChange::Gone).collect();
                changes.push(PodChange::Synced(Source::Api));
                changes
            }
        }
    }

    fn set(&mut self, pod: Pod) -> PodChange {
        let pod = Arc::new(trim(pod));
        self.pods.insert(uid(&pod), pod.clone());
        PodChange::Set(pod)
    }
}

fn uid(pod: &Pod) -> String {
    pod.metadata.uid.clone().unwrap_or_default()
}

/// Drops what no part of the agent reads (managed fields are half of a pod object), and the
/// claim of a pod of the API to be a static one.
fn trim(mut pod: Pod) -> Pod {
    pod.metadata.managed_fields = None;
    if let Some(annotations) = &mut pod.metadata.annotations
        && !annotations.contains_key(ANNOTATION_MIRROR)
    {
        annotations.remove(ANNOTATION_SOURCE);
    }
    pod
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.uid = Some(uid.to_owned());
        pod
    }

    fn words(changes: &[PodChange]) -> Vec<String> {
        let mut words: Vec<_> = changes
            .iter()
            .map(|c| match c {
                PodChange::Set(p) => format!("set {}", uid(p)),
                PodChange::Gone(p) => format!("gone {}", uid(p)),
                PodChange::Synced(_) => "synced".to_owned(),
            })
            .collect();
        words.sort();
        words
    }

    #[test]
    fn a_pod_that_vanished_during_an_interruption_is_reported_gone() {
        let mut shown = Shown::default();
        let mut all = Vec::new();
        for event in [
            Event::Init,
            Event::InitApply(pod("a")),
            Event::InitApply(pod("b")),
            Event::InitDone,
        ] {
            all.extend(shown.apply(event));
        }
        assert_eq!(words(&all), ["set a", "set b", "synced"]);
        shown.apply(Event::Apply(pod("c")));
        let mut second = Vec::new();
        for event in [Event::Init, Event::InitApply(pod("c")), Event::InitDone] {
            second.extend(shown.apply(event));
        }
        assert_eq!(words(&second), ["gone a", "gone b", "set c", "synced"]);
    }

    #[tokio::test]
    async fn a_refused_streaming_list_falls_back_and_other_errors_are_outlived() {
        let (tx, mut rx) = mpsc::channel(8);
        let refused = Problem {
            message: "no".to_owned(),
            refused_streaming: true,
        };
        let stream = futures::stream::iter([Err(refused)]);
        let mut shown = Shown::default();
        assert_eq!(
            follow(stream, &mut shown, &tx).await,
            Ended::NoStreamingList
        );
        tokio::time::pause();
        let down = || Problem {
            message: "down".to_owned(),
            refused_streaming: false,
        };
        let stream = futures::stream::iter([Err(down()), Err(down()), Ok(Event::Apply(pod("a")))]);
        Box::pin(follow(stream, &mut shown, &tx)).await;
        assert_eq!(words(&[rx.recv().await.unwrap()]), ["set a"]);
    }
}
