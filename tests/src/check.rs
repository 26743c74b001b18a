//! `cargo xtask check`: what must hold before a change is reviewed, without running it.

use crate::progress::Step;
use crate::{command, paths, tidy};
use anyhow::{Context, Result, bail};
use std::process::Command;

/// Formats, lints, licences, house rules. Everything is tried; failures are listed at the end.
///
/// # Errors
/// When any of them fails.
pub fn check() -> Result<()> {
    let cargo = command::cargo;
    let clippy = [
        "clippy",
        "--quiet",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ];
    let mut failed = Vec::new();
    let mut attempt = |name: &str, result: Result<()>| {
        if let Err(error) = result {
            eprintln!("✗ {name}: {error:#}");
            failed.push(name.to_owned());
        }
    };
    attempt("fmt", run("fmt", cargo(&["fmt", "--all", "--check"])));
    attempt("clippy", run("clippy", cargo(&clippy)));
    attempt("gofmt", gofmt());
    attempt("deny", deny(cargo));
    attempt("tidy", house_rules());
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn run(name: &str, mut command: Command) -> Result<()> {
    eprintln!("… {name}");
    command::interactive(&mut command)?;
    eprintln!("✓ {name}");
    Ok(())
}

fn gofmt() -> Result<()> {
    let step = Step::begin("gofmt");
    let dir = paths::workspace().join("tests");
    let list = command::stdout(command::command("gofmt", &["-l", "."]).current_dir(dir))?;
    if !list.trim().is_empty() {
        bail!(
            "not formatted: {}",
            list.split_whitespace().collect::<Vec<_>>().join(", ")
        );
    }
    step.done("");
    Ok(())
}

/// The database of advisories cannot be had on every machine; what needs none is checked.
fn deny(cargo: impl Fn(&[&str]) -> Command) -> Result<()> {
    let present = command::capture(&mut cargo(&["deny", "--version"]))?
        .status
        .success();
    if !present {
        eprintln!("- deny: skipped, cargo-deny is not installed");
        return Ok(());
    }
    if !paths::workspace().join("deny.toml").exists() {
        eprintln!("- deny: skipped, there is no deny.toml");
        return Ok(());
    }
    run(
        "deny",
        cargo(&["deny", "--offline", "check", "bans", "licenses", "sources"]),
    )
}

/// Runs [`tidy`] and lists what it finds.
///
/// # Errors
/// When a rule is broken.
pub fn house_rules() -> Result<()> {
    let step = Step::begin("tidy");
    let complaints = tidy::tidy().context("look through the repository")?;
    if !complaints.is_empty() {
        bail!("\n  {}", complaints.join("\n  "));
    }
    step.done("");
    Ok(())
}
