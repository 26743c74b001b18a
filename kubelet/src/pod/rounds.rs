//! Rounds of a pod: in each all its containers run from the start, init containers first. Another
//! round begins when a container ends with an exit code for which its rules say
//! `RestartAllContainers` (KEP-5532). Pure.
//!
//! ```text
//!  round n ──a container ends by such a rule──> restarting: the others are killed, without grace
//!     ^                                             │ no process is left
//!     └── the first instance of round n+1 is there ─┘
//! ```
//!
//! Which round it is follows from the instances alone: each carries the number of its round. So a
//! new agent goes on where the old one was killed, and dead instances stay for their logs, their
//! exit codes and the restart count. Ephemeral containers have no part in rounds.

use super::spec::{self, RestartAction};
use crate::launch::ANNOTATION_ROUND;
use crate::observe::{self, PodObservation};
use k8s_openapi::api::core::v1::PodSpec;
use runtime::service::ContainerStatus;

/// Where a pod is in its rounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Round<'a> {
    /// The round whose instances count.
    number: u32,
    /// The container that asked for the next one, while none of that is there.
    source: Option<&'a ContainerStatus>,
}

impl<'a> Round<'a> {
    /// Reads it from the instances.
    pub fn of(spec: &PodSpec, observed: &'a PodObservation) -> Self {
        if !could_restart_all(spec) {
            return Self {
                number: 0,
                source: None,
            };
        }
        let of = |c: &spec::ContainerRef<'_>| {
            let mut newest_first = observed.containers.iter();
            newest_first.find(|i| i.config.name == c.spec.name)
        };
        let newest = || spec::containers(spec).filter_map(|c| Some((c, of(&c)?)));
        let number = newest().map(|(_, i)| number(i)).max().unwrap_or(0);
        let source = newest()
            .find(|(c, instance)| self::number(instance) == number && is_source(*c, instance))
            .map(|(_, instance)| instance);
        Self { number, source }
    }

    /// The container that asked for the next round, if one did.
    pub fn source(&self) -> Option<&'a ContainerStatus> {
        self.source
    }

    /// Whether an instance belongs to the past: the next start of its container is the first of
    /// a round.
    pub fn is_past(&self, instance: &ContainerStatus) -> bool {
        self.source.is_some() || self.is_older(instance)
    }

    /// Whether an instance was started in an earlier round.
    pub fn is_older(&self, instance: &ContainerStatus) -> bool {
        number(instance) < self.number
    }

    /// The number instances are started with now.
    pub fn next(&self) -> u32 {
        self.number.saturating_add(u32::from(self.source.is_some()))
    }
}

/// Whether any container may restart all.
pub fn could_restart_all(spec: &PodSpec) -> bool {
    let rules = spec::containers(spec).flat_map(|c| c.spec.restart_policy_rules.iter().flatten());
    rules.into_iter().any(|r| r.action == RestartAction::ALL)
}

/// Whether an instance ended so that all containers restart.
pub fn is_source(container: spec::ContainerRef<'_>, instance: &ContainerStatus) -> bool {
    observe::exit(instance).is_some_and(|(code, _)| {
        spec::rule_action(container.spec, code) == Some(RestartAction::RestartAll)
    })
}

/// The round an instance was started in.
fn number(instance: &ContainerStatus) -> u32 {
    let recorded = instance.config.annotations.get(ANNOTATION_ROUND);
    recorded.and_then(|n| n.parse().ok()).unwrap_or(0)
}
