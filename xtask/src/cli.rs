//! The commands, their arguments and their help.

use crate::conformance::Conformance;
use crate::develop::{Bench, Chaos, Test};
use anyhow::{Context, Result};
use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;
use testkit::cluster::kubectl::Kubectl;
use testkit::cluster::layout::Layout;
use testkit::cluster::state::{LabState, lab_names};
use testkit::cluster::{
    self, Addons, DEFAULT_LAB, Family, Network, NodeKind, ProxyMode, UpOptions,
};
use testkit::{artefacts, audit, images, paths};

/// Build, run and test Ferrule on this machine.
///
/// Start with `cargo xtask up`: it brings up a real Kubernetes control plane and one node, runs a
/// sample on it and prints what to type next. `cargo xtask down` removes all of it again.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Bring up a control plane, nodes and a sample; complete what is already up
    Up(Up),
    /// Remove a lab: its processes, links, cgroups and directories
    Down(Down),
    /// Run the real kubectl on a lab, as its administrator
    Kubectl(KubectlArgs),
    /// Run a command (or a shell) inside a node's namespaces
    Enter(Enter),
    /// Run every test: unit, network namespace, cgroup, scenarios on a real control plane
    Test(Test),
    /// Check formatting, lints, licences and the house rules
    Check,
    /// Check the house rules only: dependency arrows, sizes, headers, links
    Tidy,
    /// Measure
    Bench(Bench),
    /// Kill agents, shims and the apiserver of a lab at random, then check that nothing was lost
    Chaos(Chaos),
    /// Run the unmodified upstream end-to-end suite on a lab
    Conformance(Conformance),
    /// Write images of our own programs, as OCI archives; equal programs make equal images
    Image(Image),
    /// List what labs left behind; exit code 1 when there is anything
    Audit(Audit),
}

/// Which lab a command is about.
#[derive(Debug, Args)]
pub(crate) struct LabName {
    /// Name of the lab; several can be up side by side
    #[arg(long, default_value = DEFAULT_LAB, env = "FERRULE_LAB")]
    pub(crate) lab: String,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Kind {
    /// Our kubelet with its own runtime
    Ferrule,
    /// The stock kubelet with containerd and runc
    Stock,
}

impl From<Kind> for NodeKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Ferrule => NodeKind::Ferrule,
            Kind::Stock => NodeKind::Stock,
        }
    }
}

/// What kube-proxy writes its rules with.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Mode {
    /// nftables
    Nftables,
    /// iptables
    Iptables,
}

impl From<Mode> for ProxyMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Nftables => ProxyMode::Nftables,
            Mode::Iptables => ProxyMode::Iptables,
        }
    }
}

/// Addresses of nodes, pods and services.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum AddressFamily {
    /// IPv4
    Ipv4,
    /// IPv4 and IPv6
    Dual,
}

impl From<AddressFamily> for Family {
    fn from(family: AddressFamily) -> Self {
        match family {
            AddressFamily::Ipv4 => Family::Ipv4,
            AddressFamily::Dual => Family::Dual,
        }
    }
}

/// How pods of different nodes reach each other.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum PodNetwork {
    /// cni-bridge, and routes the lab makes
    Bridge,
    /// cni-vxlan with its agents
    Vxlan,
    /// cni-hostgw with its agents
    Hostgw,
}

impl From<PodNetwork> for Network {
    fn from(network: PodNetwork) -> Self {
        match network {
            PodNetwork::Bridge => Network::Bridge,
            PodNetwork::Vxlan => Network::Vxlan,
            PodNetwork::Hostgw => Network::Hostgw,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    #[command(flatten)]
    lab: LabName,
    /// Number of nodes; 0 brings up the control plane only [default: as many as there are, or 1]
    #[arg(long, value_name = "N")]
    nodes: Option<usize>,
    /// What new nodes run
    #[arg(long, value_enum, default_value = "ferrule")]
    kind: Kind,
    /// Fail instead of installing Debian packages that are missing
    #[arg(long)]
    no_install: bool,
    /// Prepare the nodes, but do not start their kubelets
    #[arg(long)]
    no_agent: bool,
    /// Leave the sample out
    #[arg(long)]
    no_sample: bool,
    /// What kube-proxy writes its rules with [default: as it does, or nftables]
    #[arg(long, value_enum, value_name = "MODE")]
    proxy_mode: Option<Mode>,
    /// Start no kube-proxy: services have no addresses that work
    #[arg(long, conflicts_with = "proxy_mode")]
    no_proxy: bool,
    /// Start no CoreDNS
    #[arg(long)]
    no_dns: bool,
    /// Addresses of a new lab
    #[arg(long, value_enum, value_name = "FAMILY")]
    ip_family: Option<AddressFamily>,
    /// How pods of different nodes reach each other, in a lab without nodes
    #[arg(long, value_enum, value_name = "NETWORK")]
    network: Option<PodNetwork>,
    /// Cargo profile the kubelet is built with
    #[arg(long, default_value = testkit::artefacts::ours::TEST_PROFILE)]
    profile: String,
}

impl Up {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let lab = cluster::up(&UpOptions {
            lab: self.lab.lab,
            nodes: self.nodes,
            kind: self.kind.into(),
            may_install: !self.no_install,
            agents: !self.no_agent,
            addons: Addons {
                proxy: !self.no_proxy,
                mode: self.proxy_mode.map(Mode::into),
                // Without services nobody reaches it, nor it the apiserver.
                dns: !self.no_dns && !self.no_proxy,
            },
            family: self.ip_family.map(AddressFamily::into),
            network: self.network.map(PodNetwork::into),
            sample: !self.no_sample,
            profile: self.profile,
        })?;
        println!("\n{}", cluster::sample::summary(&lab)?);
        Ok(ExitCode::SUCCESS)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Down {
    #[command(flatten)]
    lab: LabName,
    /// Every lab of this machine, whatever `--lab` or `FERRULE_LAB` say
    #[arg(long)]
    all: bool,
}

impl Down {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let names = if self.all {
            lab_names(&paths::labs())?
        } else {
            vec![self.lab.lab]
        };
        for name in names {
            cluster::down(&name)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

#[derive(Debug, Args)]
pub(crate) struct KubectlArgs {
    #[command(flatten)]
    lab: LabName,
    /// Arguments of kubectl
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

impl KubectlArgs {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let name = &self.lab.lab;
        let state = LabState::load(&paths::labs(), name)?
            .with_context(|| format!("lab {name} is not up; run `cargo xtask up --lab {name}`"))?;
        let layout = Layout::new(&paths::labs(), name, state.index)?;
        let kubeconfig = layout.admin_kubeconfig();
        // Without it kubectl would look for an apiserver on this machine's port 8080.
        anyhow::ensure!(
            kubeconfig.exists(),
            "lab {name} has no control plane yet; `cargo xtask up --lab {name}` is at it, or was stopped"
        );
        let kubectl = Kubectl::new(&artefacts::go::kubernetes()?, kubeconfig);
        let args: Vec<&str> = self.args.iter().map(String::as_str).collect();
        // Becomes kubectl: signals, terminal and exit code are its own.
        Err(kubectl.command(&args).exec()).context("run kubectl")
    }
}

#[derive(Debug, Args)]
pub(crate) struct Enter {
    #[command(flatten)]
    lab: LabName,
    /// The node
    #[arg(long, default_value = "node-1")]
    node: String,
    /// What to run there [default: a shell]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

impl Enter {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let state = LabState::load(&paths::labs(), &self.lab.lab)?.with_context(|| {
            let name = &self.lab.lab;
            format!("lab {name} is not up; run `cargo xtask up --lab {name}`")
        })?;
        let node = state.nodes.get(&self.node);
        let holder = node
            .and_then(|node| node.holder)
            .filter(|holder| holder.is_alive())
            .with_context(|| format!("lab {} has no node {} up", self.lab.lab, self.node))?;
        let args = if self.args.is_empty() {
            vec!["bash".to_owned()]
        } else {
            self.args
        };
        Err(cluster::node::enter(holder.pid, &args).exec()).context("run nsenter")
    }
}

/// Form of a command's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people
    Text,
    /// For programs
    Json,
}

/// The storage driver, whose image is not one of a network.
const CSI_DRIVER: &str = "csi-driver";

#[derive(Debug, Args)]
pub(crate) struct Image {
    /// Which [default: all]
    #[arg(value_name = "NAME", value_parser = PossibleValuesParser::new(artefacts::ours::PLUGINS.into_iter().chain([CSI_DRIVER])))]
    names: Vec<String>,
    /// Directory the archives are written into [default: images in the target directory]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

impl Image {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let dir = self
            .output
            .unwrap_or_else(|| paths::target().join("images"));
        let wanted = |name: &&str| self.names.is_empty() || self.names.iter().any(|n| n == name);
        for name in artefacts::ours::PLUGINS.into_iter().filter(wanted) {
            let programs = artefacts::ours::plugin(name)?;
            let (file, digest) = images::own::write_network(&dir, &paths::cache()?, &programs)?;
            println!("{}  {digest}", file.display());
        }
        if wanted(&CSI_DRIVER) {
            let program = artefacts::ours::static_csi_driver()?;
            let (file, digest) = images::storage::write(&dir, &paths::cache()?, &program)?;
            println!("{}  {digest}", file.display());
        }
        Ok(ExitCode::SUCCESS)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Audit {
    /// Form of the answer
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

impl Audit {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let findings = audit::audit()?;
        match self.output {
            Output::Json => println!("{}", serde_json::to_string_pretty(&findings)?),
            Output::Text if findings.is_empty() => println!("nothing is left"),
            Output::Text => print!("{}", audit::render(&findings)),
        }
        Ok(if findings.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}
