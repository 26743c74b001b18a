//! `cargo xtask conformance`: the unmodified upstream end-to-end binary against a lab.

use crate::cluster::{self, Lab, NodeKind, UpOptions};
use crate::{artefacts, command};
use anyhow::{Context, Result, bail};
use std::process::Command;

/// What to run, where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConformanceOptions {
    /// The lab; brought up when it is not there, and left up.
    pub lab: String,
    /// Node kind of a new lab.
    pub kind: NodeKind,
    /// Regular expression of what to run.
    pub focus: String,
    /// Regular expression of what to leave out; slow, serial and disruptive specs by default.
    pub skip: Option<String>,
    /// Specs at once.
    pub procs: u32,
    /// Missing Debian packages may be installed.
    pub may_install: bool,
    /// Only print which specs would run.
    pub dry_run: bool,
}

/// Groups of the suite under short names.
pub const SUITES: &[(&str, &str)] = &[
    (
        "first-node",
        r"\[sig-node\] (Pods|Variable Expansion|Containers|ConfigMap|Secrets|Downward API|Kubelet|InitContainer \[NodeConformance\]).*\[NodeConformance\]|\[sig-storage\] (ConfigMap|Secrets|Downward API volume|EmptyDir volumes|Projected).*\[NodeConformance\]",
    ),
    ("node-conformance", r"\[NodeConformance\]"),
    ("conformance", r"\[Conformance\]"),
];

/// Left out unless told otherwise: specs that take minutes by design, want a cluster for
/// themselves, or need features that are off by default.
const DEFAULT_SKIP: &str = r"\[Slow\]|\[Serial\]|\[Disruptive\]|\[Feature:";

/// The focus of a suite.
///
/// # Errors
/// When there is no suite of that name.
pub fn suite_focus(name: &str) -> Result<&'static str> {
    let found = SUITES.iter().find(|(suite, _)| *suite == name);
    let names: Vec<&str> = SUITES.iter().map(|(suite, _)| *suite).collect();
    let (_, focus) =
        found.with_context(|| format!("no suite {name}; there are {}", names.join(", ")))?;
    Ok(focus)
}

/// Runs it with its output on the terminal.
///
/// # Errors
/// When the lab or the binary cannot be had, or a spec fails.
pub fn run(options: &ConformanceOptions) -> Result<()> {
    let programs = artefacts::go::e2e_suite()?;
    let lab = cluster::up(&UpOptions {
        lab: options.lab.clone(),
        // Some specs need a second node to schedule on.
        nodes: None,
        kind: options.kind,
        may_install: options.may_install,
        agents: true,
        services: true,
        sample: false,
        profile: artefacts::ours::TEST_PROFILE.to_owned(),
    })?;
    let reports = lab.layout.dir.join("conformance");
    std::fs::create_dir_all(&reports).context("create the report directory")?;
    // A dry run is refused in parallel.
    let procs = if options.dry_run { 1 } else { options.procs };
    let mut runner = command::command(programs.join("ginkgo"), &[]);
    runner
        .arg(format!("--procs={procs}"))
        .arg("--no-color")
        .arg("--flake-attempts=1");
    runner.arg(format!("--focus={}", options.focus));
    let skip = options.skip.as_deref().unwrap_or(DEFAULT_SKIP);
    runner.arg(format!("--skip={skip}"));
    if options.dry_run {
        runner.args(["--dry-run", "-v"]);
    }
    runner.arg(programs.join("e2e.test")).arg("--");
    suite_arguments(&mut runner, &lab);
    runner.arg(format!("--report-dir={}", reports.display()));
    // The lab must not be locked for hours.
    drop(lab);
    let status = runner.status().context("run ginkgo")?;
    if !status.success() {
        bail!(
            "the suite failed ({status}); reports in {}",
            reports.display()
        );
    }
    Ok(())
}

fn suite_arguments(runner: &mut Command, lab: &Lab) {
    runner
        .arg(format!(
            "--kubeconfig={}",
            lab.layout.admin_kubeconfig().display()
        ))
        .args(["--provider=skeleton", "--dump-logs-on-failure=false"])
        .args(["--prepull-images=false", "--node-os-distro=debian"])
        // The lab's system namespace is empty.
        .args(["--minStartupPods=0", "--allowed-not-ready-nodes=0"])
        .env("KUBECONFIG", lab.layout.admin_kubeconfig());
}
