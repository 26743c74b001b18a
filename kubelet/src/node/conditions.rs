//! The Node's conditions. Pure: facts in, conditions out.

use super::capacity::share_of;
use super::machine::{Filesystem, Machine, Usage};
use crate::config::Threshold;
use crate::eviction::thresholds::Pressure;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::NodeCondition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use std::collections::{BTreeMap, BTreeSet};

/// What conditions are derived from.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// The machine.
    pub machine: &'a Machine,
    /// How full it is.
    pub usage: &'a Usage,
    /// Hard thresholds.
    pub thresholds: &'a BTreeMap<String, Threshold>,
    /// What the node is known to run short of, or did until a while ago.
    pub pressures: &'a BTreeSet<Pressure>,
    /// The runtime's word on the network.
    pub network: &'a Result<(), String>,
    /// Other reasons not to be ready, in words (a subsystem that does not work).
    pub troubles: &'a [String],
}

/// One condition before its times.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Type.
    pub type_: &'static str,
    /// Status.
    pub holds: bool,
    /// CamelCase reason.
    pub reason: &'static str,
    /// Sentence.
    pub message: String,
}

fn below(threshold: Option<&Threshold>, available: u64, capacity: u64) -> bool {
    match threshold {
        None => false,
        Some(Threshold::Amount(least)) => available < *least,
        Some(Threshold::Share(share)) => available < share_of(capacity, *share),
    }
}

/// The four conditions every node has, in the stock order.
pub fn verdicts(inputs: &Inputs<'_>) -> Vec<Verdict> {
    let at = |signal: &str| inputs.thresholds.get(signal);
    let usage = inputs.usage;
    let known = |pressure| inputs.pressures.contains(&pressure);
    let memory = known(Pressure::Memory)
        || below(
            at("memory.available"),
            usage.memory_available_bytes,
            inputs.machine.memory_bytes,
        );
    let full = |fs: &Filesystem, name: &str| {
        fs.capacity_bytes > 0
            && (below(
                at(&format!("{name}.available")),
                fs.available_bytes,
                fs.capacity_bytes,
            ) || (fs.inodes > 0
                && below(at(&format!("{name}.inodesFree")), fs.inodes_free, fs.inodes)))
    };
    let disk =
        known(Pressure::Disk) || full(&usage.nodefs, "nodefs") || full(&usage.imagefs, "imagefs");
    let pids_left = usage.pid_max.saturating_sub(usage.pids);
    let pid = known(Pressure::Pid) || below(at("pid.available"), pids_left, usage.pid_max);
    vec![
        pressure(
            "MemoryPressure",
            memory,
            "InsufficientMemory",
            "SufficientMemory",
            "memory",
        ),
        pressure(
            "DiskPressure",
            disk,
            "DiskPressure",
            "NoDiskPressure",
            "disk",
        ),
        pressure(
            "PIDPressure",
            pid,
            "InsufficientPID",
            "SufficientPID",
            "PID",
        ),
        ready(inputs),
    ]
}

fn pressure(
    type_: &'static str,
    holds: bool,
    bad: &'static str,
    good: &'static str,
    what: &str,
) -> Verdict {
    // The words are the stock kubelet's; users grep for them.
    let has = match (holds, what) {
        (true, "disk") => "kubelet has disk pressure".to_owned(),
        (false, "disk") => "kubelet has no disk pressure".to_owned(),
        (true, _) => format!("kubelet has insufficient {what} available"),
        (false, _) => format!("kubelet has sufficient {what} available"),
    };
    Verdict {
        type_,
        holds,
        reason: if holds { bad } else { good },
        message: has,
    }
}

fn ready(inputs: &Inputs<'_>) -> Verdict {
    let mut reasons: Vec<String> = inputs.troubles.to_vec();
    if let Err(why) = inputs.network {
        reasons.push(format!(
            "container runtime network not ready: NetworkReady=false \
             reason:NetworkPluginNotReady message:{why}"
        ));
    }
    if reasons.is_empty() {
        return Verdict {
            type_: "Ready",
            holds: true,
            reason: "KubeletReady",
            message: "kubelet is posting ready status".to_owned(),
        };
    }
    Verdict {
        type_: "Ready",
        holds: false,
        reason: "KubeletNotReady",
        message: format!("[{}]", reasons.join(", "))
            .trim_matches(['[', ']'])
            .to_owned(),
    }
}

/// Puts times to verdicts: a transition time changes only with the status.
pub fn dated(
    verdicts: Vec<Verdict>,
    before: &[NodeCondition],
    now: Timestamp,
) -> Vec<NodeCondition> {
    let one = |verdict: Verdict| {
        let status = if verdict.holds { "True" } else { "False" };
        let old = before.iter().find(|c| c.type_ == verdict.type_);
        let kept = old
            .filter(|c| c.status == status)
            .and_then(|c| c.last_transition_time.clone());
        NodeCondition {
            type_: verdict.type_.to_owned(),
            status: status.to_owned(),
            reason: Some(verdict.reason.to_owned()),
            message: Some(verdict.message),
            last_heartbeat_time: Some(Time(now)),
            last_transition_time: Some(kept.unwrap_or(Time(now))),
        }
    };
    verdicts.into_iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(
        usage: Usage,
        network: Result<(), String>,
        thresholds: &[(&str, Threshold)],
    ) -> Vec<(&'static str, bool, &'static str)> {
        let machine = Machine {
            memory_bytes: 1000,
            ..Machine::default()
        };
        let thresholds = thresholds
            .iter()
            .map(|(k, v)| ((*k).to_owned(), v.clone()))
            .collect();
        let inputs = Inputs {
            machine: &machine,
            usage: &usage,
            thresholds: &thresholds,
            pressures: &BTreeSet::new(),
            network: &network,
            troubles: &[],
        };
        let found = verdicts(&inputs);
        found
            .into_iter()
            .map(|v| (v.type_, v.holds, v.reason))
            .collect()
    }

    fn roomy() -> Usage {
        let fs = Filesystem {
            capacity_bytes: 1000,
            available_bytes: 500,
            inodes: 100,
            inodes_free: 50,
        };
        Usage {
            memory_available_bytes: 500,
            nodefs: fs,
            imagefs: fs,
            pid_max: 1000,
            pids: 10,
        }
    }

    #[test]
    fn a_roomy_node_is_ready() {
        let found = check(
            roomy(),
            Ok(()),
            &[("nodefs.available", Threshold::Share(0.1))],
        );
        assert_eq!(
            found,
            [
                ("MemoryPressure", false, "SufficientMemory"),
                ("DiskPressure", false, "NoDiskPressure"),
                ("PIDPressure", false, "SufficientPID"),
                ("Ready", true, "KubeletReady"),
            ]
        );
    }

    #[test]
    fn thresholds_make_pressure() {
        let mut usage = roomy();
        usage.imagefs.inodes_free = 1;
        usage.pids = 990;
        let found = check(
            usage,
            Ok(()),
            &[
                ("memory.available", Threshold::Amount(501)),
                ("imagefs.inodesFree", Threshold::Share(0.05)),
                ("pid.available", Threshold::Share(0.1)),
            ],
        );
        let holds: Vec<bool> = found.iter().map(|f| f.1).collect();
        assert_eq!(holds, [true, true, true, true]);
    }

    #[test]
    fn no_network_is_not_ready_and_says_why() {
        let usage = roomy();
        let machine = Machine::default();
        let inputs = Inputs {
            machine: &machine,
            usage: &usage,
            thresholds: &BTreeMap::new(),
            pressures: &BTreeSet::new(),
            network: &Err("cni config uninitialized".to_owned()),
            troubles: &[],
        };
        let verdict = verdicts(&inputs).pop().unwrap();
        assert!(!verdict.holds);
        assert_eq!(
            verdict.message,
            "container runtime network not ready: NetworkReady=false \
             reason:NetworkPluginNotReady message:cni config uninitialized"
        );
    }

    #[test]
    fn a_transition_time_changes_only_with_the_status() {
        let at = |s| Timestamp::from_second(s).unwrap();
        let verdict = |holds| {
            vec![Verdict {
                type_: "Ready",
                holds,
                reason: "x",
                message: String::new(),
            }]
        };
        let first = dated(verdict(true), &[], at(1));
        let second = dated(verdict(true), &first, at(2));
        assert_eq!(second[0].last_transition_time, Some(Time(at(1))));
        assert_eq!(second[0].last_heartbeat_time, Some(Time(at(2))));
        let third = dated(verdict(false), &second, at(3));
        assert_eq!(third[0].last_transition_time, Some(Time(at(3))));
    }
}
