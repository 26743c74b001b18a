//! Upkeep of volumes that are prepared.
//!
//! One task listens to object changes and rewrites the volumes that show the object, at once and
//! several pods at a time. Pods with tokens have one sleeping task each that refreshes them; a
//! refused refresh keeps the old token and is tried again.

use super::plan::Source;
use super::{Inner, PodState, lock};
use crate::events::EventType;
use crate::launch::pod_namespace;
use crate::objects::{ObjectChange, ObjectKind};
use jiff::Timestamp;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::AbortHandle;

/// Pods rewritten at the same time.
const AT_ONCE: usize = 16;
/// Pause before a refused token is asked for again.
const TOKEN_RETRY: Duration = Duration::from_secs(10);

/// The listening task; ends with it.
pub(super) struct Live {
    task: AbortHandle,
}

impl Drop for Live {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Live {
    pub(super) fn start(inner: &Arc<Inner>) -> Self {
        let mut changes = inner.objects.changes();
        let inner = Arc::downgrade(inner);
        let permits = Arc::new(Semaphore::new(AT_ONCE));
        let task = tokio::spawn(async move {
            loop {
                let change = match changes.recv().await {
                    Ok(change) => Some(change),
                    Err(RecvError::Lagged(_)) => None,
                    Err(RecvError::Closed) => return,
                };
                let Some(inner) = inner.upgrade() else {
                    return;
                };
                for state in concerned(&inner, change.as_ref()) {
                    let Ok(permit) = permits.clone().acquire_owned().await else {
                        return;
                    };
                    let inner = inner.clone();
                    tokio::spawn(async move {
                        rewrite(&inner, &state).await;
                        drop(permit);
                    });
                }
            }
        });
        Self {
            task: task.abort_handle(),
        }
    }
}

/// Pods with a volume that shows the object; every pod when it is not known what changed.
fn concerned(inner: &Inner, change: Option<&ObjectChange>) -> Vec<Arc<PodState>> {
    let shows = |state: &PodState| {
        let Some(change) = change else {
            return true;
        };
        pod_namespace(&state.pod()) == change.namespace
            && state.uses(|source| match (source, change.kind) {
                (Source::ConfigMap(keys), ObjectKind::ConfigMap)
                | (Source::Secret(keys), ObjectKind::Secret) => keys.name == change.name,
                (
                    Source::ConfigMap(_)
                    | Source::Secret(_)
                    | Source::Downward(_)
                    | Source::Token(_),
                    ObjectKind::ConfigMap | ObjectKind::Secret,
                ) => false,
            })
    };
    let pods = lock(&inner.pods);
    pods.values()
        .filter(|state| shows(state))
        .cloned()
        .collect()
}

async fn rewrite(inner: &Inner, state: &PodState) {
    if let Err(error) = inner.rewrite(state).await {
        // The files stay as they were; the next change tries again.
        tracing::warn!(pod_uid = state.uid, %error, "volume not updated");
        let (pod, warning) = (state.pod(), EventType::Warning);
        inner
            .events
            .pod_event(&pod, None, warning, error.reason(), error.to_string());
    }
}

/// Starts the pod's refresh task when it has tokens.
pub(super) fn schedule_refresh(inner: &Arc<Inner>, state: &Arc<PodState>) {
    if lock(&state.tokens).is_empty() {
        return;
    }
    let (inner, weak) = (Arc::downgrade(inner), Arc::downgrade(state));
    let task = tokio::spawn(refresh(inner, weak)).abort_handle();
    if let Some(old) = lock(&state.refresh).replace(task) {
        old.abort();
    }
}

async fn refresh(inner: Weak<Inner>, state: Weak<PodState>) {
    loop {
        let next = match state.upgrade() {
            Some(state) => lock(&state.tokens).values().map(|t| t.refresh_at).min(),
            None => return,
        };
        let Some(next) = next else {
            return;
        };
        tokio::time::sleep(pause(Timestamp::now(), next)).await;
        let (Some(inner), Some(state)) = (inner.upgrade(), state.upgrade()) else {
            return;
        };
        rewrite(&inner, &state).await;
    }
}

/// Until the refresh is due; one that is overdue was refused and waits a little.
fn pause(now: Timestamp, due: Timestamp) -> Duration {
    match Duration::try_from(due.duration_since(now)) {
        Ok(wait) if !wait.is_zero() => wait,
        Ok(_) | Err(_) => TOKEN_RETRY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overdue_refresh_waits_before_it_is_tried_again() {
        let at = |s| Timestamp::from_second(s).unwrap();
        assert_eq!(pause(at(100), at(160)), Duration::from_secs(60));
        assert_eq!(pause(at(100), at(100)), TOKEN_RETRY);
        assert_eq!(pause(at(100), at(40)), TOKEN_RETRY);
    }
}
