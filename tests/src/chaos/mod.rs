//! Chaos: random pods on the nodes of a lab while agents, shims and the apiserver are killed the
//! hard way at random moments; then everything that must still be true is looked up.
//!
//! ```text
//!   act ── creates, deletes, kills ──▶ lab            watch ── every event ──▶ record
//!    └──── which pods it hurt ─────────────────▶ judge ◀────────────────────────┘
//! ```
//!
//! The choices come from a seed that is printed: the same seed makes the same choices, although
//! not the same interleaving.

mod act;
mod judge;
mod random;
mod record;
mod workload;

use crate::audit;
use crate::process::until;
use crate::scenario::Scenario;
use anyhow::{Context, Result, ensure};
use record::Record;
use std::time::{Duration, Instant};

/// How long and how hard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChaosOptions {
    /// Decides every choice.
    pub seed: u64,
    /// How long the killing lasts; settling and judging come on top.
    pub duration: Duration,
    /// Pods alive at once, at most.
    pub pods: usize,
}

/// What was done and seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    /// Pods created.
    pub created: u32,
    /// Pods deleted during the chaos.
    pub deleted: u32,
    /// Agents killed.
    pub agents: u32,
    /// Shims killed.
    pub shims: u32,
    /// Times the apiserver was killed.
    pub apiservers: u32,
    /// Events of the watch that were judged.
    pub events: usize,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} pods created, {} deleted; {} agents, {} shims, {} apiservers killed; {} events",
            self.created, self.deleted, self.agents, self.shims, self.apiservers, self.events
        )
    }
}

/// Longest wait for the pods to come to rest, and for the last trace of them to go.
const SETTLE: Duration = Duration::from_secs(120);

/// Runs the chaos in the scenario's namespace, on all nodes of its lab.
///
/// # Errors
/// With everything that was found untrue, one line each, and the seed.
pub fn run(scenario: &Scenario, options: ChaosOptions) -> Result<Report> {
    let outcome = judged(scenario, options);
    outcome.with_context(|| format!("chaos with seed {}", options.seed))
}

fn judged(scenario: &Scenario, options: ChaosOptions) -> Result<Report> {
    let record = Record::start(scenario)?;
    let mut actor = act::Actor::new(scenario, options)?;
    let end = Instant::now() + options.duration;
    while Instant::now() < end {
        actor.step()?;
    }
    actor.calm()?;
    let settled = until(
        "the pods to come to rest",
        SETTLE,
        || Ok(()),
        || {
            let pods = scenario.json(&["get", "pods"])?;
            let restless = judge::restless(&pods, &actor.pods);
            ensure!(restless.is_empty(), "{}", restless.join("\n"));
            Ok(pods)
        },
    )?;
    let mut found = judge::end_state(scenario, &settled, &actor.pods)?;
    let uids = record.uids();
    scenario.kubectl(&["delete", "pods", "--all", "--wait=false"])?;
    until(
        "the pods to be gone",
        SETTLE,
        || Ok(()),
        || {
            let left = scenario.kubectl(&["get", "pods", "--no-headers", "--ignore-not-found"])?;
            ensure!(left.trim().is_empty(), "still there:\n{left}");
            Ok(())
        },
    )?;
    let nodes = actor.nodes.clone();
    let trace = || {
        let mut left: Vec<String> = judge::traces(scenario, &nodes, &uids);
        let of_lab = format!("{}/", scenario.layout.name);
        let findings = audit::audit()?;
        let ours = findings.iter().filter(|f| f.object.starts_with(&of_lab));
        left.extend(ours.map(|f| format!("{:?} {}: {}", f.kind, f.object, f.because)));
        ensure!(left.is_empty(), "left behind:\n{}", left.join("\n"));
        Ok(())
    };
    if let Err(error) = until("every trace of the pods to go", SETTLE, || Ok(()), trace) {
        found.push(format!("{error:#}"));
    }
    let events = record.stop();
    found.extend(judge::history(&events, &actor.pods));
    found.extend(actor.found.iter().cloned());
    found.sort();
    found.dedup();
    ensure!(found.is_empty(), "{}", found.join("\n"));
    Ok(Report {
        events: events.len(),
        ..actor.report
    })
}
