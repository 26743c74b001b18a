//! Commands that test and measure.

use crate::cli::LabName;
use anyhow::Result;
use clap::{Args, Subcommand};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use testkit::chaos::{self, ChaosOptions};
use testkit::scenario::Scenario;
use testkit::storage;
use testkit::{bench, check as checks, suite};

/// Exit code 1 when a check fails.
pub(crate) fn check() -> Result<ExitCode> {
    checks::check()?;
    Ok(ExitCode::SUCCESS)
}

/// Exit code 1 when a rule is broken.
pub(crate) fn tidy() -> Result<ExitCode> {
    checks::house_rules()?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Args)]
pub(crate) struct Test {
    /// Only tests that need no cluster
    #[arg(long)]
    no_cluster: bool,
    /// Only the tests of a node, in a virtual machine with systemd and cgroup v2, and that machine
    /// as a node of a cluster
    #[arg(long, conflicts_with_all = ["scenario", "keep"])]
    vm: bool,
    /// Only scenarios whose name contains this
    #[arg(long, value_name = "TEXT", conflicts_with = "no_cluster")]
    scenario: Option<String>,
    /// Also what certification asks of a node (`conformance --suite node-core`), which takes longest
    #[arg(long, conflicts_with_all = ["no_cluster", "scenario"])]
    conformance: bool,
    /// Leave the lab `test` up, to look at a failure
    #[arg(long)]
    keep: bool,
    /// Fail instead of installing Debian packages that are missing
    #[arg(long)]
    no_install: bool,
}

impl Test {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let tally = suite::run(&suite::TestOptions {
            may_install: !self.no_install,
            cluster: !self.no_cluster,
            conformance: self.conformance,
            vm: self.vm,
            keep: self.keep,
            filter: self.scenario,
        })?;
        println!("{} passed, {} failed", tally.passed, tally.failed);
        Ok(if tally.failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Pod latency, density and idle cost of a node, seen from the apiserver
    Pods(Pods),
    /// How soon running pods follow their ConfigMap and their resources, what probes cost, and
    /// how memory grows with pods
    Life(Life),
    /// ADD and DEL of the network plugin, alone and at once, beside few and many pods
    Cni(Cni),
    /// Throughput and latency between pods of two nodes, beside the nodes' own
    Network(Network),
    /// Making, staging, copying and removing volumes of csi-driver; needs no lab
    Csi(Csi),
}

#[derive(Debug, Args)]
struct Csi {
    /// Cargo profile of the driver
    #[arg(long, default_value = "release")]
    profile: String,
    /// Fail instead of installing Debian packages that are missing
    #[arg(long)]
    no_install: bool,
}

/// What our node is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Against {
    /// kubelet, containerd, runc and the CNI plugins, unmodified
    Stock,
}

#[derive(Debug, Args)]
struct Pods {
    /// Measure this node too and print ratios
    #[arg(long, value_enum)]
    against: Option<Against>,
    /// Pods started one after the other
    #[arg(long, default_value_t = 20)]
    serial: u32,
    /// Pods started at once
    #[arg(long, default_value_t = 100)]
    burst: u32,
    /// The measuring script
    #[arg(long, value_name = "FILE", default_value_os_t = bench::default_script())]
    script: PathBuf,
    /// Cargo profile of our kubelet
    #[arg(long, default_value = "release")]
    profile: String,
    /// Print the figures as JSON
    #[arg(long)]
    json: bool,
    /// Fail instead of installing Debian packages that are missing
    #[arg(long)]
    no_install: bool,
}

#[derive(Debug, Args)]
struct Life {
    /// Measure this node too and print ratios
    #[arg(long, value_enum)]
    against: Option<Against>,
    /// Changes of a ConfigMap; the stock node gets three at most
    #[arg(long, default_value_t = 200)]
    changes: u32,
    /// Changes of a pod's CPU limit
    #[arg(long, default_value_t = 50)]
    resizes: u32,
    /// Pods of the last row of the memory table
    #[arg(long, default_value_t = 300)]
    many: u32,
    /// Cargo profile of our kubelet
    #[arg(long, default_value = "release")]
    profile: String,
    /// Print the figures as JSON
    #[arg(long)]
    json: bool,
    /// Fail instead of installing Debian packages that are missing
    #[arg(long)]
    no_install: bool,
}

impl Life {
    fn run(self) -> Result<ExitCode> {
        let results = bench::life::life(&bench::life::LifeOptions {
            against_stock: self.against == Some(Against::Stock),
            changes: self.changes,
            resizes: self.resizes,
            many: self.many,
            may_install: !self.no_install,
            profile: self.profile,
        })?;
        print_figures(&results, self.json)
    }
}

fn print_figures(results: &BTreeMap<String, Value>, json: bool) -> Result<ExitCode> {
    if json {
        println!("{}", serde_json::to_string_pretty(results)?);
    } else {
        print!("{}", bench::render(results));
    }
    Ok(ExitCode::SUCCESS)
}

/// What our network plugin is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Peer {
    /// containernetworking's bridge, host-local and portmap
    Reference,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    /// A table for people
    Table,
    /// For programs
    Json,
}

#[derive(Debug, Args)]
struct Cni {
    /// Measure these plugins too
    #[arg(long, value_enum)]
    against: Option<Peer>,
    /// Pods measured one at a time, and again 16 at once
    #[arg(long, default_value_t = 100)]
    count: usize,
    /// Existing pods of the rows with many
    #[arg(long, default_value_t = 5000)]
    crowd: usize,
    /// The same for the reference, which needs minutes to make them
    #[arg(long, default_value_t = 1000)]
    reference_crowd: usize,
    /// Form of the figures
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
    /// Fail instead of installing Debian packages that are missing
    #[arg(long)]
    no_install: bool,
}

impl Cni {
    fn run(self) -> Result<ExitCode> {
        let rows = bench::cni::measure(&bench::cni::CniOptions {
            against_reference: self.against == Some(Peer::Reference),
            count: self.count,
            crowd: self.crowd,
            reference_crowd: self.reference_crowd,
            may_install: !self.no_install,
        })?;
        match self.output {
            Output::Table => print!("{}", bench::cni::render(&rows)),
            Output::Json => {
                let rows = bench::cni::to_json(&rows);
                println!("{}", serde_json::to_string_pretty(&rows)?);
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// What our networks are compared with, besides the nodes' own network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Rival {
    /// flannel's back ends vxlan and host-gw
    Flannel,
}

#[derive(Debug, Args)]
struct Network {
    /// Measure these networks too
    #[arg(long, value_enum)]
    against: Option<Rival>,
    /// Turns of each network under each load, by turns
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Length of a turn of iperf3
    #[arg(long, default_value_t = 1)]
    seconds: u32,
    /// Streams of the loads with many
    #[arg(long, default_value_t = 8)]
    streams: u32,
    /// Requests of a turn, one after the other
    #[arg(long, default_value_t = 3000)]
    requests: usize,
    /// Form of the figures
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
    /// Fail instead of installing Debian packages that are missing
    #[arg(long)]
    no_install: bool,
}

impl Network {
    fn run(self) -> Result<ExitCode> {
        let rows = bench::network::measure(&bench::network::NetworkOptions {
            against_flannel: self.against == Some(Rival::Flannel),
            rounds: self.rounds,
            seconds: self.seconds,
            streams: self.streams,
            requests: self.requests,
            may_install: !self.no_install,
        })?;
        match self.output {
            Output::Table => print!("{}", bench::network::render(&rows)),
            Output::Json => {
                let rows = bench::network::to_json(&rows);
                println!("{}", serde_json::to_string_pretty(&rows)?);
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Bench {
    pub(crate) fn run(self) -> Result<ExitCode> {
        match self.what {
            What::Pods(pods) => pods.run(),
            What::Life(life) => life.run(),
            What::Cni(cni) => cni.run(),
            What::Network(network) => network.run(),
            What::Csi(csi) => {
                storage::bench(&csi.profile, !csi.no_install)?;
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

impl Pods {
    fn run(self) -> Result<ExitCode> {
        let pods = self;
        let results = bench::pods(&bench::BenchOptions {
            against_stock: pods.against == Some(Against::Stock),
            serial: pods.serial,
            burst: pods.burst,
            may_install: !pods.no_install,
            script: pods.script,
            profile: pods.profile,
        })?;
        print_figures(&results, pods.json)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Chaos {
    #[command(flatten)]
    lab: LabName,
    /// How long the killing lasts; coming to rest and the checks come on top
    #[arg(long, default_value_t = 300)]
    seconds: u64,
    /// Pods alive at once, at most
    #[arg(long, default_value_t = 30)]
    pods: usize,
    /// Decides every choice [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
}

impl Chaos {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let scenario = Scenario::alone_in(&self.lab.lab, "chaos")?;
        let clock = || {
            std::time::UNIX_EPOCH
                .elapsed()
                .map_or(0, |now| now.as_secs())
        };
        let seed = self.seed.unwrap_or_else(clock);
        println!("seed {seed}");
        let report = chaos::run(
            &scenario,
            ChaosOptions {
                seed,
                duration: Duration::from_secs(self.seconds),
                pods: self.pods,
            },
        )?;
        println!("{report}; nothing was lost");
        Ok(ExitCode::SUCCESS)
    }
}
