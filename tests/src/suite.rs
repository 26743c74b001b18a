//! `cargo xtask test`: every test there is, from those that need nothing to those that need a
//! cluster, and the audit that nothing is left behind.

use crate::cluster::{self, Family, Network, NodeKind, UpOptions};
use crate::command::describe;
use crate::{artefacts, audit, command, conformance, packages};
use anyhow::{Context, Result};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

/// The lab the scenarios run in; apart from the one a developer may have up.
pub const TEST_LAB: &str = "test";

/// The lab of the few scenarios that ask for more than pods on bridges with one family.
pub const SPANNING_LAB: &str = "test-vxlan";

/// How many passed and failed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Passed.
    pub passed: u32,
    /// Failed.
    pub failed: u32,
}

impl Tally {
    /// Adds another tally to this one.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }

    /// One test.
    pub(crate) fn one(passed: bool) -> Self {
        Self {
            passed: u32::from(passed),
            failed: u32::from(!passed),
        }
    }
}

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestOptions {
    /// Missing Debian packages may be installed.
    pub may_install: bool,
    /// Run what needs a cluster.
    pub cluster: bool,
    /// Run the part of the upstream suite that certification asks of a node.
    pub conformance: bool,
    /// Run what needs cgroup v2 and all capabilities in a virtual machine, and nothing else.
    pub vm: bool,
    /// Keep the lab up afterwards, to look at a failure.
    pub keep: bool,
    /// Only scenarios whose name contains this.
    pub filter: Option<String>,
}

/// Runs the tests and returns the tally; a test that fails does not stop the others.
///
/// # Errors
/// When tests cannot be run at all.
pub fn run(options: &TestOptions) -> Result<Tally> {
    packages::ensure(packages::CONTROL_PLANE, options.may_install)?;
    packages::ensure(packages::NODES, options.may_install)?;
    if options.vm {
        return crate::vm::run(options.may_install, options.cluster);
    }
    let mut tally = Tally::default();
    if options.filter.is_none() {
        let args = ["--workspace", "--exclude", "testkit", "--no-fail-fast"];
        tally.add(stage(
            "unit, network namespace and cgroup tests",
            &args,
            TEST_LAB,
            options,
        )?);
        tally.add(stage(
            "tests of the harness",
            &["--package", "testkit", "--lib"],
            TEST_LAB,
            options,
        )?);
        tally.add(stage(
            "network plugins beside real peers",
            &["--package", "testkit", "--test", "netns"],
            TEST_LAB,
            options,
        )?);
    }
    if options.cluster {
        tally.add(scenarios(options)?);
        if options.filter.is_none() {
            tally.add(spanning(options)?);
        }
        if options.conformance && options.filter.is_none() {
            tally.add(upstream(options)?);
        }
    }
    if !options.keep {
        tally.add(clean_up()?);
    }
    Ok(tally)
}

/// Services and pods of both families, on the network that wraps their packets: in a lab of its
/// own, which is gone afterwards.
fn spanning(options: &TestOptions) -> Result<Tally> {
    let lab = up(
        SPANNING_LAB,
        Some(Family::Dual),
        Some(Network::Vxlan),
        options,
    );
    let tally = match lab {
        Some(_) => stage(
            "scenarios with two families on cni-vxlan",
            &[
                "--package",
                "testkit",
                "--test",
                "e2e",
                "--",
                "services_and_names",
                "networks_span_nodes::",
            ],
            SPANNING_LAB,
            options,
        )?,
        None => Tally::one(false),
    };
    if options.keep {
        return Ok(tally);
    }
    cluster::down(SPANNING_LAB).with_context(|| format!("take down lab {SPANNING_LAB}"))?;
    Ok(tally)
}

fn scenarios(options: &TestOptions) -> Result<Tally> {
    let Some(()) = up(TEST_LAB, None, None, options) else {
        return Ok(Tally::one(false));
    };
    stage(
        "scenarios on a real control plane",
        &["--package", "testkit", "--test", "e2e"],
        TEST_LAB,
        options,
    )
}

/// Brings a lab of two nodes up; `None` after saying why it did not come.
fn up(
    lab: &str,
    family: Option<Family>,
    network: Option<Network>,
    options: &TestOptions,
) -> Option<()> {
    let up = cluster::up(&UpOptions {
        lab: lab.to_owned(),
        nodes: Some(2),
        kind: NodeKind::Ferrule,
        may_install: options.may_install,
        agents: true,
        addons: cluster::Addons::ALL,
        family,
        network,
        sample: true,
        profile: artefacts::ours::TEST_PROFILE.to_owned(),
    });
    // The scenarios open the lab themselves: what is held of it here is dropped.
    match up {
        Ok(_) => Some(()),
        Err(error) => {
            eprintln!("✗ bring up lab {lab}: {error:#}");
            None
        }
    }
}

/// Suite of the upstream stage: the largest that fits into a CI run.
const UPSTREAM_SUITE: &str = "node-core";

/// As many as keep two cores busy; most specs wait most of the time.
const UPSTREAM_PROCS: u32 = 8;

/// The unmodified upstream suite on the lab the scenarios ran in.
fn upstream(options: &TestOptions) -> Result<Tally> {
    let title = "upstream conformance of a node";
    eprintln!("\n== {title}");
    let started = Instant::now();
    let suite = conformance::suite(UPSTREAM_SUITE)?;
    let result = conformance::run(&conformance::ConformanceOptions {
        lab: TEST_LAB.to_owned(),
        kind: NodeKind::Ferrule,
        focus: suite.focus.to_owned(),
        skip: suite.skip.to_owned(),
        procs: UPSTREAM_PROCS,
        may_install: options.may_install,
        keep: true,
        reports: conformance::default_reports(),
    });
    let tally = match result {
        Ok(report) => {
            print!("{}", conformance::table(&report));
            let total = report.total();
            let failed = match total.failed {
                0 => u32::from(!report.is_green()),
                failed => failed,
            };
            Tally {
                passed: total.passed,
                failed,
            }
        }
        Err(error) => {
            eprintln!("✗ {title}: {error:#}");
            Tally::one(false)
        }
    };
    eprintln!(
        "== {title}: {} passed, {} failed ({:.0} s)",
        tally.passed,
        tally.failed,
        started.elapsed().as_secs_f32()
    );
    Ok(tally)
}

/// Leaves the machine as it was, and counts as a test whether that worked.
fn clean_up() -> Result<Tally> {
    if let Err(error) = cluster::down(TEST_LAB) {
        eprintln!("✗ {error:#}");
        return Ok(Tally::one(false));
    }
    let findings = audit::audit()?;
    if findings.is_empty() {
        eprintln!("✓ audit: nothing is left");
    } else {
        eprintln!("✗ audit:\n{}", audit::render(&findings));
    }
    Ok(Tally::one(findings.is_empty()))
}

/// Runs one `cargo test` and counts from what it prints.
fn stage(title: &str, args: &[&str], lab: &str, options: &TestOptions) -> Result<Tally> {
    eprintln!("\n== {title}");
    let started = Instant::now();
    let mut command: Command = command::cargo(&["test", "--quiet"]);
    command
        .args(args)
        .env("FERRULE_LAB", lab)
        // Failed scenarios say what they saw; where in the harness is noise.
        .env("RUST_LIB_BACKTRACE", "0");
    if args.contains(&"e2e") {
        // Scenarios mostly wait: for back-offs, graces, probes.
        command.env("RUST_TEST_THREADS", "6");
    }
    if !args.contains(&"--") {
        command.arg("--");
    }
    if let Some(filter) = &options.filter {
        command.arg(filter);
    }
    let line = describe(&command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("run `{line}`"))?;
    let stdout = child
        .stdout
        .take()
        .context("standard output was not piped")?;
    let mut tally = Tally::default();
    for text in BufReader::new(stdout).lines() {
        let text = text.with_context(|| format!("read the output of `{line}`"))?;
        println!("{text}");
        if let Some(counted) = parse_result(&text) {
            tally.add(counted);
        }
    }
    let status = child.wait().with_context(|| format!("wait for `{line}`"))?;
    if !status.success() && tally.failed == 0 {
        // It did not compile, or a test took the whole process with it.
        eprintln!("✗ `{line}` failed ({status})");
        tally.failed = 1;
    }
    eprintln!(
        "== {title}: {} passed, {} failed ({:.0} s)",
        tally.passed,
        tally.failed,
        started.elapsed().as_secs_f32()
    );
    Ok(tally)
}

/// Reads `test result: ok. 5 passed; 1 failed; …`.
pub(crate) fn parse_result(line: &str) -> Option<Tally> {
    let rest = line.trim().strip_prefix("test result: ")?;
    let number = |word: &str| {
        let (before, _) = rest.split_once(word)?;
        before.trim_end().rsplit(' ').next()?.parse().ok()
    };
    Some(Tally {
        passed: number(" passed")?,
        failed: number(" failed")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_result_line_of_a_test_program_is_counted() {
        let line = "test result: FAILED. 12 passed; 3 failed; 0 ignored; 0 measured";
        assert_eq!(
            parse_result(line),
            Some(Tally {
                passed: 12,
                failed: 3
            })
        );
        assert_eq!(parse_result("running 3 tests"), None);
    }
}
