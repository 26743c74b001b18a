//! Takes the newest desire in, and tells what became of granted resources.

use super::{Ended, Outcome, Worker};
use crate::events::EventType;
use crate::pod::environment::PodEnvironment;
use crate::pod::resize::allocation::Allocation;
use crate::pod::resize::tracker::Told;
use crate::pod::resize::words;
use k8s_openapi::api::core::v1::Pod;
use runtime::service::RuntimeService;
use tracing::info;

impl<R: RuntimeService, E: PodEnvironment> Worker<R, E> {
    /// Reads the newest desire.
    pub(super) fn take_desired(&mut self) {
        if !self.desired.has_changed().unwrap_or(false) {
            return;
        }
        let newest = self.desired.borrow_and_update().clone();
        self.measure.updated();
        let old = std::mem::replace(&mut self.pod, newest.pod);
        self.gone |= newest.gone;
        self.ended = newest.rejected;
        self.ended_grace_s = newest.grace_s;
        self.published = false;
        let resized = Allocation::of(&self.pod) != Allocation::of(&old);
        if resized {
            self.resize.wanted = self.deps.environment.wanted_resources(&self.pod);
        }
        if self.resize.take(&newest.resize) || resized {
            self.steps.resize.retry_at(0);
        }
        let shown = |p: &Pod| {
            let m = &p.metadata;
            (m.labels.clone(), m.annotations.clone(), m.generation)
        };
        if self.volumes.is_some() && (resized || shown(&old) != shown(&self.pod)) {
            let environment = self.deps.environment.clone();
            let pod = self.pod.clone();
            self.actions.spawn(async move {
                environment.update_volumes(&pod).await;
                Outcome {
                    ended: Ended::VolumesUpdated,
                    result: Ok(()),
                }
            });
        }
    }

    /// Tells users what became of granted resources.
    pub(in crate::pod) fn tell_resize(&mut self, told: Option<Told>) {
        let (type_, reason, text) = match told {
            None => return,
            Some(Told::Completed(generation)) => {
                self.deps.room.notify_one();
                let text = words::completed(&self.pod, generation);
                (EventType::Normal, "ResizeCompleted", text)
            }
            Some(Told::Error(generation, error)) => {
                let text = words::error(&self.pod, generation, &error);
                (EventType::Warning, "ResizeError", text)
            }
        };
        info!(reason, text, "Resize of the pod");
        self.deps
            .events
            .pod_event(&self.pod, None, type_, reason, text);
    }
}
