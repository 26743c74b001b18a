//! Grants running pods the other resources they ask for, or lets them wait.

use super::{Handle, Manager};
use crate::events::EventType;
use crate::launch::resources::totals_in_use;
use crate::pod::environment::PodEnvironment;
use crate::pod::resize::allocation::Allocation;
use crate::pod::resize::queue::{Waiter, order};
use crate::pod::resize::{PENDING, PendingResize, words};
use crate::pod::spec;
use crate::quantity::Quantity;
use k8s_openapi::api::core::v1::Pod;
use runtime::service::RuntimeService;
use std::sync::Arc;
use tracing::{info, warn};

/// What the apiserver was told of a request that waits, by the agent before this one.
pub(super) fn told(pod: &Pod) -> Option<PendingResize> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let pending = conditions.iter().find(|c| c.type_ == PENDING)?;
    Some(PendingResize {
        infeasible: pending.reason.as_deref() == Some("Infeasible"),
        message: pending.message.clone().unwrap_or_default(),
        generation: pending.observed_generation.unwrap_or(0),
    })
}

/// CPU (thousandths) and memory (bytes) a pod takes: what shrinks is free only when its cgroups
/// have shrunk.
fn taken(pod: &Pod) -> (i64, i64) {
    let requests = totals_in_use(pod).unwrap_or_default().requests;
    let of = |name: &str| requests.get(name).copied().unwrap_or(Quantity::ZERO);
    (of("cpu").milli_value(), of("memory").value())
}

impl<R: RuntimeService, E: PodEnvironment> Manager<R, E> {
    /// The source has a newer object of a pod that has a worker.
    pub(super) fn changed(&mut self, uid: &str, pod: Arc<Pod>) {
        let synced = self.is_synced();
        let Some(worker) = self.workers.get_mut(uid) else {
            return;
        };
        let before = worker.desired.borrow().pod.clone();
        worker.newest = pod.clone();
        let Some(granted) = worker.allocation.granted(&pod) else {
            let freed = taken(&pod);
            let used = taken(&before);
            let ended = spec::is_terminal(&pod) && !spec::is_terminal(&before);
            worker.desired.send_modify(|d| {
                d.pod = pod;
                d.resize.pending = None;
            });
            if ended || freed.0 < used.0 || freed.1 < used.1 {
                self.grant_waiting();
            }
            return;
        };
        if !synced {
            worker.desired.send_modify(|d| d.pod = granted);
            return;
        }
        // The worker learns of the object and of the decision in one.
        self.grant_waiting();
        if let Some(worker) = self.workers.get(uid)
            && let Some(granted) = worker.allocation.granted(&worker.newest)
        {
            worker.desired.send_modify(|d| d.pod = granted);
        }
    }

    /// Asks again for all requests that wait, the most deserving first.
    pub(super) fn grant_waiting(&mut self) {
        if !self.is_synced() {
            return;
        }
        let mut waiting: Vec<(String, Arc<Pod>, Arc<Pod>)> = self
            .workers
            .iter()
            .filter(|(_, worker)| worker.may_resize())
            .filter_map(|(uid, worker)| {
                let granted = worker.allocation.granted(&worker.newest)?;
                Some((uid.clone(), worker.newest.clone(), granted))
            })
            .collect();
        waiting.sort_by(|(_, wanted, granted), (_, other_wanted, other_granted)| {
            let one = Waiter { wanted, granted };
            let other = Waiter {
                wanted: other_wanted,
                granted: other_granted,
            };
            order(&one, &other)
        });
        for (uid, wanted, granted) in waiting {
            self.decide(&uid, &wanted, &granted);
        }
    }

    /// Decides about one request.
    fn decide(&mut self, uid: &str, wanted: &Arc<Pod>, granted: &Arc<Pod>) {
        let others = self.others(uid);
        let environment = &self.deps.environment;
        let generation = wanted.metadata.generation.unwrap_or(0);
        let verdict = environment.admit_resize(wanted, granted, &others);
        let Some(worker) = self.workers.get_mut(uid) else {
            return;
        };
        let refusal = match verdict {
            Ok(admission) => {
                let allocation = Allocation::of(wanted);
                if let Err(error) = environment.save_allocation(uid, &allocation) {
                    // Not recorded, not granted: the next look tries again.
                    warn!(pod = spec::describe(wanted), %error, "Allocation not recorded");
                    return;
                }
                info!(
                    pod = spec::describe(wanted),
                    generation, "Other resources granted"
                );
                worker.allocation = allocation;
                worker.recorded = true;
                worker.desired.send_modify(|d| {
                    d.pod = wanted.clone();
                    d.resize.pending = None;
                    d.resize.granted = Some(generation);
                });
                let text = words::started(wanted, generation);
                let (normal, reason) = (EventType::Normal, "ResizeStarted");
                let events = &self.deps.events;
                events.pod_event(wanted, None, normal, reason, text);
                self.preempt(&admission.preempt);
                return;
            }
            Err(refusal) => refusal,
        };
        let pending = PendingResize {
            infeasible: refusal.infeasible,
            message: refusal.message,
            generation,
        };
        let before = worker.desired.borrow().resize.pending.clone();
        if before.as_ref() == Some(&pending) {
            return;
        }
        let key = |p: &PendingResize| (p.infeasible, p.generation);
        if before.as_ref().map(key) != Some(key(&pending)) {
            let text = words::pending(wanted, &refusal.reason, generation, &pending.message);
            let reason = if pending.infeasible {
                "ResizeInfeasible"
            } else {
                "ResizeDeferred"
            };
            let events = &self.deps.events;
            events.pod_event(wanted, None, EventType::Warning, reason, text);
        }
        worker.desired.send_modify(|d| {
            d.pod = granted.clone();
            d.resize.pending = Some(pending);
        });
    }
}

impl Handle {
    /// Whether a request of the pod matters still.
    fn may_resize(&self) -> bool {
        let desired = self.desired.borrow();
        desired.rejected.is_none()
            && !desired.gone
            && self.newest.metadata.deletion_timestamp.is_none()
            && !spec::is_terminal(&self.newest)
    }
}
