//! `cargo xtask test --vm`: the same test programs, run in a virtual machine whose kernel has
//! cgroup v2 and every capability.

use crate::progress::Step;
use crate::suite::{Tally, parse_result};
use crate::vm::{self, image, job::Job, machine};
use crate::{command, packages, paths};
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::PathBuf;

/// Packages whose tests depend on the kernel's cgroup version or on capabilities.
const PACKAGES: [&str; 3] = ["linux", "pod-shim", "runtime"];

/// Runs the tests and returns the tally.
///
/// # Errors
/// When the machine cannot be made or ends before its job.
pub fn run(may_install: bool) -> Result<Tally> {
    packages::ensure(vm::NEEDS, may_install)?;
    let step = Step::begin("virtual machine (about 2 min the first time)");
    let image = image::ensure(&paths::cache()?)?;
    step.done("");
    let programs = test_programs()?;
    let mut script = String::new();
    for program in &programs.tests {
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        script.push_str(&format!(
            "echo \"== {name}\"; (cd {} 2>/dev/null; {} --test-threads=2); code=$((code|$?))\n",
            paths::workspace().display(),
            program.display()
        ));
    }
    script.push_str("exit $code");
    let script = format!("code=0\n{script}");
    let files = programs.tests.iter().chain(&programs.helpers);
    let job = files.fold(Job::new(script), |job, file| job.same(file));
    let dir = std::env::temp_dir().join(format!("ferrule-vm-{}", std::process::id()));
    let options = machine::Options {
        dir: dir.clone(),
        memory_mib: 2048,
        tap: None,
    };
    let mut tally = Tally::default();
    let step = Step::begin("tests in the virtual machine");
    let machine = machine::Machine::boot(&image, &job, &options)?;
    let code = machine.finish(|line| {
        println!("{line}");
        if let Some(counted) = parse_result(line) {
            tally.add(counted);
        }
    });
    std::fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))?;
    if code? != 0 && tally.failed == 0 {
        tally.failed = 1;
    }
    step.done(&format!("{} passed, {} failed", tally.passed, tally.failed));
    Ok(tally)
}

#[derive(Debug, Default)]
struct Programs {
    tests: Vec<PathBuf>,
    helpers: Vec<PathBuf>,
}

/// Compiles the tests and asks cargo where the programs are.
fn test_programs() -> Result<Programs> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = command::command(&cargo, &["test", "--no-run", "--message-format=json"]);
    for package in PACKAGES {
        build.args(["--package", package]);
    }
    let text = command::stdout(build.current_dir(paths::workspace()))?;
    let mut programs = Programs::default();
    for line in text.lines() {
        let message: Value = serde_json::from_str(line).context("parse cargo's messages")?;
        let Some(executable) = message["executable"].as_str() else {
            continue;
        };
        if message["profile"]["test"] == true {
            programs.tests.push(executable.into());
        } else {
            programs.helpers.push(executable.into());
        }
    }
    anyhow::ensure!(!programs.tests.is_empty(), "cargo built no test program");
    Ok(programs)
}
