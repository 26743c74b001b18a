//! What is done to the lab.

use super::random::Random;
use super::workload::{ChaosPod, MARK};
use super::{ChaosOptions, Report, SETTLE};
use crate::cluster::{Lab, controlplane};
use crate::paths;
use crate::process::{self, ProcessIdentity, until};
use crate::scenario::Scenario;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

/// Longest a killed process takes to be gone.
const DEATH: Duration = Duration::from_secs(10);

/// Acts, and remembers what it did.
#[derive(Debug)]
pub(super) struct Actor<'a> {
    scenario: &'a Scenario,
    random: Random,
    options: ChaosOptions,
    /// Nodes of the lab.
    pub(super) nodes: Vec<String>,
    /// Every pod ever made.
    pub(super) pods: Vec<ChaosPod>,
    /// What was found untrue while acting.
    pub(super) found: Vec<String>,
    /// What was done.
    pub(super) report: Report,
}

impl<'a> Actor<'a> {
    /// An actor on all nodes of the lab.
    pub(super) fn new(scenario: &'a Scenario, options: ChaosOptions) -> Result<Self> {
        let lab = Lab::open(&scenario.layout.name)?;
        let nodes: Vec<String> = lab.state.nodes.keys().cloned().collect();
        ensure!(!nodes.is_empty(), "the lab has no node");
        Ok(Self {
            scenario,
            random: Random::new(options.seed),
            options,
            nodes,
            pods: Vec::new(),
            found: Vec::new(),
            report: Report::default(),
        })
    }

    /// One thing, chosen at random, and a look at what must hold at every moment.
    pub(super) fn step(&mut self) -> Result<()> {
        let alive = self.pods.iter().filter(|pod| !pod.deleted).count();
        match self.random.below(100) {
            0..45 if alive < self.options.pods => self.create()?,
            0..60 => self.delete()?,
            60..80 => self.kill_agent()?,
            80..90 => self.kill_shim()?,
            90..94 => self.kill_apiserver()?,
            _ => self.pause(300),
        }
        self.doubles();
        Ok(())
    }

    /// Lets everything run again.
    pub(super) fn calm(&mut self) -> Result<()> {
        for node in self.nodes.clone() {
            self.scenario.agent(&node).start()?;
        }
        Ok(())
    }

    /// A moment, so that what was begun is caught at another point each time.
    fn pause(&mut self, most_ms: u64) {
        std::thread::sleep(Duration::from_millis(self.random.below(most_ms)));
    }

    fn mark(&self) -> &str {
        &self.scenario.namespace
    }

    fn create(&mut self) -> Result<()> {
        let node = self.random.pick(&self.nodes).cloned().unwrap_or_default();
        let pod = ChaosPod::choose(self.report.created, &node, &mut self.random);
        self.scenario
            .apply(&pod.manifest(self.mark()).to_string())?;
        self.report.created += 1;
        self.pods.push(pod);
        self.pause(100);
        Ok(())
    }

    fn delete(&mut self) -> Result<()> {
        let alive: Vec<usize> = (0..self.pods.len())
            .filter(|at| !self.pods[*at].deleted)
            .collect();
        let Some(at) = self.random.pick(&alive).copied() else {
            return Ok(());
        };
        let mut args = vec!["delete", "pod", &self.pods[at].name, "--wait=false"];
        if self.random.below(4) == 0 {
            args.extend(["--force", "--grace-period=0"]);
        }
        self.scenario.kubectl(&args)?;
        self.pods[at].deleted = true;
        self.report.deleted += 1;
        Ok(())
    }

    fn kill_agent(&mut self) -> Result<()> {
        let node = self.random.pick(&self.nodes).cloned().unwrap_or_default();
        let agent = self.scenario.agent(&node);
        agent.kill()?;
        self.report.agents += 1;
        self.pause(800);
        agent.start()
    }

    fn kill_shim(&mut self) -> Result<()> {
        let shims = self.shims();
        let Some((process, name)) = self.random.pick(&shims).cloned() else {
            return Ok(());
        };
        // Before the act: its death may be seen before we are back.
        for pod in self.pods.iter_mut().filter(|pod| pod.name == name) {
            pod.hurt = true;
        }
        process::kill(process, DEATH)?;
        self.report.shims += 1;
        Ok(())
    }

    /// Shims of this chaos's pods, with the pods' names.
    fn shims(&self) -> Vec<(ProcessIdentity, String)> {
        let labs = paths::labs().join(&self.scenario.layout.name).join("nodes");
        let of_sandbox = |id: &str| {
            self.nodes.iter().find_map(|node| {
                let file = labs.join(node).join("ferrule/sandboxes").join(id);
                let record = fs::read(file.join("sandbox.json")).ok()?;
                let record: serde_json::Value = serde_json::from_slice(&record).ok()?;
                let config = find_config(&record)?;
                (config["namespace"] == self.mark())
                    .then(|| config["name"].as_str().map(str::to_owned))?
            })
        };
        let shims = process::all().into_iter().filter_map(|process| {
            let line = fs::read(format!("/proc/{}/cmdline", process.pid)).ok()?;
            let words: Vec<&str> = std::str::from_utf8(&line).ok()?.split('\0').collect();
            if !words.first()?.ends_with("pod-shim") {
                return None;
            }
            let at = words.iter().position(|word| *word == "--dir")?;
            let id = words.get(at + 1)?.rsplit('/').next()?;
            Some((process, of_sandbox(id)?))
        });
        shims.collect()
    }

    fn kill_apiserver(&mut self) -> Result<()> {
        let name = &self.scenario.layout.name;
        let identity = {
            let lab = Lab::open(name)?;
            let record = lab.state.processes.get("kube-apiserver");
            record.and_then(|record| record.identity)
        };
        process::kill(identity.context("the apiserver was never started")?, DEATH)?;
        self.report.apiservers += 1;
        self.pause(2000);
        let mut lab = Lab::open(name)?;
        let limit = || Ok(());
        until("the control plane", SETTLE, limit, || {
            controlplane::ensure(&mut lab)
        })
    }

    /// Two first processes of one container at the same time, ever, are one too many.
    fn doubles(&mut self) {
        let marks = first_processes(self.mark());
        for (container, count) in marks.iter().filter(|(_, count)| **count > 1) {
            self.found.push(format!(
                "{container}: {count} instances ran at the same time"
            ));
        }
    }
}

/// The sandbox's configuration within its record, wherever the record's version keeps it.
fn find_config(record: &serde_json::Value) -> Option<&serde_json::Value> {
    if record.get("namespace").is_some() && record.get("uid").is_some() {
        return Some(record);
    }
    record.as_object()?.values().find_map(find_config)
}

/// How many processes are PID 1 of a container, by the mark in their environment.
fn first_processes(namespace: &str) -> BTreeMap<String, usize> {
    let prefix = format!("{MARK}={namespace}/");
    let mut counts = BTreeMap::new();
    for process in process::all() {
        let mark = mark_of(process.pid, &prefix).filter(|_| is_first(process.pid));
        // Its environment is read again: it may have been another process in between.
        if let Some(mark) = mark.filter(|_| process.is_alive()) {
            *counts.entry(mark).or_default() += 1;
        }
    }
    counts
}

fn mark_of(pid: i32, prefix: &str) -> Option<String> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    environment.split(|byte| *byte == 0).find_map(|entry| {
        Some(
            std::str::from_utf8(entry)
                .ok()?
                .strip_prefix(prefix)?
                .to_owned(),
        )
    })
}

fn is_first(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("NSpid:"));
    line.is_some_and(|line| {
        let numbers: Vec<&str> = line.split_whitespace().skip(1).collect();
        numbers.len() > 1 && numbers.last() == Some(&"1")
    })
}
