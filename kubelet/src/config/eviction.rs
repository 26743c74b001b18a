//! Thresholds of eviction as the configuration writes them. Pure.

use super::check::Problem;
use super::resolve::problem;
use super::tree::Tree;
use super::{Threshold, duration};
use crate::quantity::Quantity;
use std::collections::BTreeMap;
use std::time::Duration;

/// Hard eviction thresholds of a node whose file names none (k8s docs, "Hard eviction
/// thresholds").
const DEFAULT_EVICTION: &[(&str, &str)] = &[
    ("memory.available", "100Mi"),
    ("nodefs.available", "10%"),
    ("nodefs.inodesFree", "5%"),
    ("imagefs.available", "15%"),
    ("imagefs.inodesFree", "5%"),
];

/// Signals a threshold can be about.
const SIGNALS: &[&str] = &[
    "memory.available",
    "nodefs.available",
    "nodefs.inodesFree",
    "imagefs.available",
    "imagefs.inodesFree",
    "containerfs.available",
    "containerfs.inodesFree",
    "allocatableMemory.available",
    "pid.available",
];

#[derive(Default)]
pub(super) struct Evictions {
    pub(super) hard: BTreeMap<String, Threshold>,
    pub(super) soft: BTreeMap<String, Threshold>,
    pub(super) grace: BTreeMap<String, Duration>,
    pub(super) reclaim: BTreeMap<String, Threshold>,
}

pub(super) fn evictions(tree: &Tree<'_>, problems: &mut Vec<Problem>) -> Evictions {
    let mut hard = tree.map("evictionHard");
    if tree.get("evictionHard").is_none() || tree.bool("mergeDefaultEvictionSettings", false) {
        for (signal, value) in DEFAULT_EVICTION {
            hard.entry((*signal).to_owned())
                .or_insert_with(|| (*value).to_owned());
        }
    }
    let soft = tree.map("evictionSoft");
    let grace = tree.map("evictionSoftGracePeriod");
    for signal in soft.keys().filter(|s| !grace.contains_key(*s)) {
        let what = format!("needs evictionSoftGracePeriod[{signal:?}]");
        problem(problems, &format!("evictionSoft[{signal:?}]"), what);
    }
    let reclaim = tree.map("evictionMinimumReclaim");
    Evictions {
        reclaim: thresholds("evictionMinimumReclaim", &reclaim, problems),
        hard: thresholds("evictionHard", &hard, problems),
        soft: thresholds("evictionSoft", &soft, problems),
        grace: grace
            .into_iter()
            .filter_map(|(k, v)| Some((k, duration::parse(&v)?)))
            .collect(),
    }
}

fn thresholds(
    field: &str,
    texts: &BTreeMap<String, String>,
    problems: &mut Vec<Problem>,
) -> BTreeMap<String, Threshold> {
    let mut found = BTreeMap::new();
    for (signal, text) in texts {
        let path = format!("{field}[{signal:?}]");
        if !SIGNALS.contains(&signal.as_str()) {
            let what = format!("no such signal; there are {}", SIGNALS.join(", "));
            problem(problems, &path, what);
            continue;
        }
        match threshold(text) {
            Some(t) => {
                found.insert(signal.clone(), t);
            }
            None => problem(
                problems,
                &path,
                format!(
                    "{text:?} is neither a quantity such as \"100Mi\" nor a share such as \"10%\""
                ),
            ),
        }
    }
    found
}

fn threshold(text: &str) -> Option<Threshold> {
    if let Some(percent) = text.strip_suffix('%') {
        let percent: f64 = percent.trim().parse().ok()?;
        return (0.0..=100.0)
            .contains(&percent)
            .then_some(Threshold::Share(percent / 100.0));
    }
    let amount = Quantity::parse(text).ok()?.value();
    u64::try_from(amount).ok().map(Threshold::Amount)
}
