//! Signals, thresholds, and which of them are met since when. Pure.

use crate::config::{Config, Threshold};
use crate::stats::summary::{FsStats, NodeStats};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;

/// What a threshold is about. In the order in which they are dealt with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Signal {
    /// Memory of the node.
    Memory,
    /// Memory of all pods together below their limit.
    AllocatableMemory,
    /// Bytes of the kubelet's filesystem.
    NodeFs,
    /// Its inodes.
    NodeFsInodes,
    /// Bytes of the filesystem of images.
    ImageFs,
    /// Its inodes.
    ImageFsInodes,
    /// Process ids.
    Pid,
}

impl Signal {
    const ALL: [Self; 7] = [
        Self::Memory,
        Self::AllocatableMemory,
        Self::NodeFs,
        Self::NodeFsInodes,
        Self::ImageFs,
        Self::ImageFsInodes,
        Self::Pid,
    ];

    /// As the configuration names it. Writable layers are on the filesystem of images here, so
    /// that thresholds of `containerfs` are those of `imagefs`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory.available",
            Self::AllocatableMemory => "allocatableMemory.available",
            Self::NodeFs => "nodefs.available",
            Self::NodeFsInodes => "nodefs.inodesFree",
            Self::ImageFs => "imagefs.available",
            Self::ImageFsInodes => "imagefs.inodesFree",
            Self::Pid => "pid.available",
        }
    }

    /// The starved resource, in the stock kubelet's words.
    pub fn resource(self) -> &'static str {
        match self {
            Self::Memory | Self::AllocatableMemory => "memory",
            Self::NodeFs | Self::ImageFs => "ephemeral-storage",
            Self::NodeFsInodes | Self::ImageFsInodes => "inodes",
            Self::Pid => "pids",
        }
    }

    /// The node's condition while a threshold of it is met.
    pub fn pressure(self) -> Pressure {
        match self {
            Self::Memory | Self::AllocatableMemory => Pressure::Memory,
            Self::NodeFs | Self::NodeFsInodes | Self::ImageFs | Self::ImageFsInodes => {
                Pressure::Disk
            }
            Self::Pid => Pressure::Pid,
        }
    }

    /// Whether unused images may help.
    pub fn is_disk(self) -> bool {
        self.pressure() == Pressure::Disk
    }
}

/// A condition of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pressure {
    /// `MemoryPressure`.
    Memory,
    /// `DiskPressure`.
    Disk,
    /// `PIDPressure`.
    Pid,
}

impl Pressure {
    /// `status.conditions[].type` of the Node.
    pub fn condition(self) -> &'static str {
        match self {
            Self::Memory => "MemoryPressure",
            Self::Disk => "DiskPressure",
            Self::Pid => "PIDPressure",
        }
    }
}

/// A threshold with all that belongs to it.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    /// What it is about.
    pub signal: Signal,
    /// It is met below this.
    pub least: Threshold,
    /// How long it must be met before a pod is evicted; none for a hard one.
    pub grace: Option<Duration>,
    /// How much more than `least` must be there before it counts as dealt with.
    pub reclaim: Option<Threshold>,
}

/// The rules of a node.
pub fn rules(config: &Config) -> Vec<Rule> {
    let mut rules = Vec::new();
    for signal in Signal::ALL {
        let name = signal.name();
        let also = match signal {
            Signal::ImageFs => "containerfs.available",
            Signal::ImageFsInodes => "containerfs.inodesFree",
            Signal::AllocatableMemory if config.enforce_pods_allocatable => "memory.available",
            Signal::AllocatableMemory
            | Signal::Memory
            | Signal::NodeFs
            | Signal::NodeFsInodes
            | Signal::Pid => name,
        };
        let reclaim = config.eviction_minimum_reclaim.get(name).cloned();
        let hard = config.eviction_hard.get(name);
        if let Some(least) = hard.or_else(|| config.eviction_hard.get(also)) {
            rules.push(Rule {
                signal,
                least: least.clone(),
                grace: None,
                reclaim: reclaim.clone(),
            });
        }
        if let Some(least) = config.eviction_soft.get(name) {
            let grace = config.eviction_soft_grace.get(name).copied();
            rules.push(Rule {
                signal,
                least: least.clone(),
                grace: Some(grace.unwrap_or_default()),
                reclaim,
            });
        }
    }
    rules
}

/// How much there is of something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observation {
    /// Left.
    pub available: u64,
    /// In all.
    pub capacity: u64,
}

/// What the node has left, by signal.
pub type Observations = BTreeMap<Signal, Observation>;

/// Reads them from the node's statistics.
pub fn observe(node: &NodeStats) -> Observations {
    let mut found = Observations::new();
    let mut put = |signal, available: Option<u64>, capacity: Option<u64>| {
        if let (Some(available), Some(capacity)) = (available, capacity) {
            let observation = Observation {
                available,
                capacity,
            };
            found.insert(signal, observation);
        }
    };
    let pods = node.system_containers.iter().find(|c| c.name == "pods");
    for (signal, memory) in [
        (Signal::Memory, node.memory.as_ref()),
        (
            Signal::AllocatableMemory,
            pods.and_then(|p| p.memory.as_ref()),
        ),
    ] {
        let available = memory.and_then(|m| m.available_bytes);
        let used = memory.and_then(|m| m.working_set_bytes);
        let capacity = available.zip(used).map(|(a, u)| a.saturating_add(u));
        put(signal, available, capacity);
    }
    let disks: [(Signal, Signal, Option<&FsStats>); 2] = [
        (Signal::NodeFs, Signal::NodeFsInodes, node.fs.as_ref()),
        (
            Signal::ImageFs,
            Signal::ImageFsInodes,
            node.runtime.as_ref().map(|r| &r.image_fs),
        ),
    ];
    for (bytes, inodes, fs) in disks {
        let Some(fs) = fs else { continue };
        put(bytes, fs.available_bytes, fs.capacity_bytes);
        // Filesystems without a limit of inodes tell none.
        put(inodes, fs.inodes_free, fs.inodes.filter(|n| *n > 0));
    }
    if let Some(pids) = &node.rlimit {
        let (most, now) = (pids.maxpid, pids.curproc);
        let left = u64::try_from(most.saturating_sub(now)).unwrap_or(0);
        put(Signal::Pid, Some(left), u64::try_from(most).ok());
    }
    found
}

/// A threshold as an amount.
pub fn amount(threshold: &Threshold, capacity: u64) -> u64 {
    match threshold {
        Threshold::Amount(amount) => *amount,
        Threshold::Share(share) => crate::node::capacity::share_of(capacity, *share),
    }
}

/// Whether a rule's threshold is met; `wholly` asks for its minimum reclaim too.
pub fn is_met(rule: &Rule, observations: &Observations, wholly: bool) -> bool {
    let Some(seen) = observations.get(&rule.signal) else {
        return false;
    };
    let mut least = amount(&rule.least, seen.capacity);
    if let Some(more) = rule.reclaim.as_ref().filter(|_| wholly) {
        least = least.saturating_add(amount(more, seen.capacity));
    }
    seen.available < least
}

/// What is remembered from look to look. Rules by their place in the list.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    since: BTreeMap<usize, Instant>,
    acting: BTreeSet<usize>,
    pressed: BTreeMap<Pressure, Instant>,
}

/// What a look found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Look {
    /// Conditions of the node.
    pub pressures: BTreeSet<Pressure>,
    /// Rules by which something has to be done, the most urgent first.
    pub due: Vec<usize>,
}

impl Memory {
    /// Takes new observations in. A condition stays for `transition` after it was last seen.
    pub fn look(
        &mut self,
        rules: &[Rule],
        observations: &Observations,
        transition: Duration,
        now: Instant,
    ) -> Look {
        let met: BTreeSet<usize> = (0..rules.len())
            .filter(|n| is_met(&rules[*n], observations, self.acting.contains(n)))
            .collect();
        self.since.retain(|n, _| met.contains(n));
        for n in &met {
            self.since.entry(*n).or_insert(now);
            self.pressed.insert(rules[*n].signal.pressure(), now);
        }
        self.pressed
            .retain(|_, last| now.saturating_duration_since(*last) < transition || *last == now);
        let waited = |n: &usize| {
            let grace = rules[*n].grace.unwrap_or_default();
            now.saturating_duration_since(self.since[n]) >= grace
        };
        self.acting = met.into_iter().filter(waited).collect();
        let mut due: Vec<usize> = self.acting.iter().copied().collect();
        due.sort_by_key(|n| rules[*n].signal);
        Look {
            pressures: self.pressed.keys().copied().collect(),
            due,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(signal: Signal, least: u64, grace_s: Option<u64>, reclaim: u64) -> Rule {
        Rule {
            signal,
            least: Threshold::Amount(least),
            grace: grace_s.map(Duration::from_secs),
            reclaim: Some(Threshold::Amount(reclaim)),
        }
    }

    fn left(signal: Signal, available: u64) -> Observations {
        let capacity = 1000;
        let observation = Observation {
            available,
            capacity,
        };
        [(signal, observation)].into()
    }

    const TRANSITION: Duration = Duration::from_secs(300);

    #[test]
    fn a_hard_threshold_is_acted_on_at_once_and_until_more_than_that_is_free() {
        let rules = [rule(Signal::Memory, 100, None, 50)];
        let mut memory = Memory::default();
        let now = Instant::now();
        let mut look =
            |available| memory.look(&rules, &left(Signal::Memory, available), TRANSITION, now);
        assert_eq!(look(100), Look::default());
        assert_eq!(look(99).due, [0]);
        assert_eq!(look(120).due, [0], "the minimum reclaim is not reached");
        assert!(look(150).due.is_empty());
        assert!(look(120).due.is_empty());
    }

    #[test]
    fn a_soft_threshold_waits_for_its_grace_and_starts_anew_after_relief() {
        let rules = [rule(Signal::NodeFs, 100, Some(30), 0)];
        let mut memory = Memory::default();
        let start = Instant::now();
        let mut look = |available, at_s| {
            let now = start + Duration::from_secs(at_s);
            memory.look(&rules, &left(Signal::NodeFs, available), TRANSITION, now)
        };
        assert!(look(50, 0).due.is_empty());
        assert!(look(50, 20).due.is_empty());
        assert!(look(500, 25).due.is_empty());
        assert!(look(50, 29).due.is_empty());
        assert!(look(50, 58).due.is_empty());
        let late = look(50, 59);
        assert_eq!(late.due, [0]);
        assert_eq!(late.pressures, [Pressure::Disk].into());
    }

    #[test]
    fn a_condition_stays_for_the_transition_period() {
        let rules = [rule(Signal::Pid, 100, None, 0)];
        let mut memory = Memory::default();
        let start = Instant::now();
        let mut pressed = |available, at_s| {
            let now = start + Duration::from_secs(at_s);
            let seen = left(Signal::Pid, available);
            let look = memory.look(&rules, &seen, TRANSITION, now);
            !look.pressures.is_empty()
        };
        assert!(pressed(10, 0));
        assert!(pressed(500, 299));
        assert!(!pressed(500, 301));
    }

    #[test]
    fn memory_comes_first_whatever_the_order_of_the_rules() {
        let rules = [
            rule(Signal::NodeFs, 100, None, 0),
            rule(Signal::Memory, 100, None, 0),
        ];
        let mut seen = left(Signal::Memory, 1);
        seen.extend(left(Signal::NodeFs, 1));
        let look = Memory::default().look(&rules, &seen, TRANSITION, Instant::now());
        assert_eq!(look.due, [1, 0]);
    }

    #[test]
    fn shares_are_of_the_capacity_and_what_is_not_seen_is_not_met() {
        let mut share = rule(Signal::ImageFs, 0, None, 0);
        share.least = Threshold::Share(0.15);
        assert!(is_met(&share, &left(Signal::ImageFs, 149), false));
        assert!(!is_met(&share, &left(Signal::ImageFs, 150), false));
        assert!(!is_met(&share, &left(Signal::NodeFs, 0), false));
    }
}
