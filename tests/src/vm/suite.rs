//! The first half of `cargo xtask test --vm`: the same test programs, run in a virtual machine
//! whose kernel has cgroup v2 and every capability.

use super::machine::{Machine, Options};
use super::{image::Image, job::Job};
use crate::command;
use crate::progress::Step;
use crate::suite::{Tally, parse_result};
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::PathBuf;
use std::time::Duration;

/// Packages whose tests depend on the kernel's cgroup version or on capabilities.
const PACKAGES: [&str; 5] = ["linux", "cni", "cni-bridge", "pod-shim", "runtime"];

/// Longest run of one test program; emulation is several times slower than the machine.
const PROGRAM_LIMIT: &str = "300";

/// Longest run of all.
const LIMIT: Duration = Duration::from_secs(1200);

/// Runs the tests and returns the tally.
///
/// # Errors
/// When the tests cannot be built or the machine ends before its job.
pub fn run(image: &Image) -> Result<Tally> {
    let step = Step::begin("build the tests for the virtual machine");
    let programs = test_programs()?;
    step.done(&format!("{} programs", programs.tests.len()));
    let files = programs.tests.iter().chain(&programs.helpers);
    let job = files.fold(Job::new(script(&programs.tests)), |job, file| {
        job.same(file)
    });
    let dir = tempfile::tempdir().context("make the machine's directory")?;
    let options = Options {
        dir: dir.path().to_owned(),
        memory_mib: 2048,
        tap: None,
        limit: LIMIT,
    };
    let step = Step::begin("tests in the virtual machine");
    let mut tally = Tally::default();
    let mut filter = Filter::default();
    let code = Machine::boot(image, &job, &options)?.finish(|line| {
        if filter.shows(line) {
            println!("{line}");
        }
        if let Some(counted) = parse_result(line) {
            tally.add(counted);
        }
    })?;
    if code != 0 && tally.failed == 0 {
        // A program that was killed prints no result of its own.
        tally.failed = 1;
    }
    step.done(&format!("{} passed, {} failed", tally.passed, tally.failed));
    Ok(tally)
}

/// Runs each program, whatever became of the one before; the code is not 0 when one failed.
fn script(programs: &[PathBuf]) -> String {
    let mut script = String::from(
        "code=0\nexport PROPTEST_CASES=16 FERRULE_STORM=60\necho \"kernel $(uname -r), $(stat -fc %T /sys/fs/cgroup): \
         $(cat /sys/fs/cgroup/cgroup.controllers)\"\n",
    );
    for program in programs {
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        let (name, _) = name.rsplit_once('-').unwrap_or((&name, ""));
        script.push_str(&format!(
            "echo \"== {name}\"; start=$(date +%s); \
             timeout {PROGRAM_LIMIT} {} --test-threads=2 --color=never --show-output 2>&1 || {{ code=1; echo \"!! {name} failed\"; }}; \
             echo \"== {name}: $(($(date +%s) - start)) s\"\n",
            program.display()
        ));
    }
    script.push_str("exit $code");
    script
}

/// Hides what tests that passed have printed, but for the reasons why they skipped something: a
/// machine that is there to show everything must not skip in silence.
#[derive(Debug, Default)]
struct Filter {
    successes: bool,
}

impl Filter {
    fn shows(&mut self, line: &str) -> bool {
        if line == "successes:" {
            self.successes = true;
        } else if line == "failures:" || line.starts_with("test result:") {
            self.successes = false;
        }
        !self.successes || line.starts_with("skipped")
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Programs {
    tests: Vec<PathBuf>,
    helpers: Vec<PathBuf>,
}

/// Compiles the tests and asks cargo where the programs are.
fn test_programs() -> Result<Programs> {
    let mut build = command::cargo(&["test", "--no-run", "--message-format=json"]);
    for package in PACKAGES {
        build.args(["--package", package]);
    }
    let text = command::stdout(&mut build)?;
    let programs = parse_programs(&text)?;
    anyhow::ensure!(!programs.tests.is_empty(), "cargo built no test program");
    Ok(programs)
}

/// Picks the programs out of cargo's messages: tests, and what tests start.
fn parse_programs(messages: &str) -> Result<Programs> {
    let mut programs = Programs::default();
    for line in messages.lines() {
        let message: Value = serde_json::from_str(line).context("parse cargo's messages")?;
        let Some(executable) = message["executable"].as_str() else {
            continue;
        };
        if message["profile"]["test"] == true {
            programs.tests.push(executable.into());
        } else if message["target"]["kind"][0] == "bin" {
            programs.helpers.push(executable.into());
        }
    }
    programs.tests.sort();
    Ok(programs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_and_the_programs_they_start_are_told_apart_and_examples_left_out() {
        let messages = r#"{"reason":"compiler-artifact","executable":null}
{"executable":"/t/b","profile":{"test":true},"target":{"kind":["lib"]}}
{"executable":"/t/a","profile":{"test":true},"target":{"kind":["bin"]}}
{"executable":"/t/shim","profile":{"test":false},"target":{"kind":["bin"]}}
{"executable":"/t/measure","profile":{"test":false},"target":{"kind":["example"]}}"#;
        let programs = parse_programs(messages).unwrap();
        assert_eq!(programs.tests, ["/t/a", "/t/b"].map(PathBuf::from));
        assert_eq!(programs.helpers, ["/t/shim"].map(PathBuf::from));
    }

    #[test]
    fn of_tests_that_passed_only_the_reasons_for_skipping_are_shown() {
        let mut filter = Filter::default();
        let output = "test a ... ok\nsuccesses:\n---- a stdout ----\nnoise\nskipped: no wheel\n\
                      failures:\n---- b stdout ----\nwhy\ntest result: FAILED.";
        let shown: Vec<&str> = output.lines().filter(|line| filter.shows(line)).collect();
        assert_eq!(
            shown,
            [
                "test a ... ok",
                "skipped: no wheel",
                "failures:",
                "---- b stdout ----",
                "why",
                "test result: FAILED."
            ]
        );
    }

    #[test]
    fn a_failed_program_does_not_hide_the_next_but_fails_the_job() {
        let script = script(&["/bin/false".into(), "/bin/echo".into()]);
        let out = std::process::Command::new("sh")
            .args(["-c", &script])
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(1));
        let text = String::from_utf8(out.stdout).unwrap();
        assert!(text.contains("--test-threads=2"), "{text}");
    }
}
