//! Runs one line of shell in the virtual machine: `cargo run -p testkit --example vm_shell -- 'uname -a'`.

use anyhow::{Context, Result};
use std::time::Duration;
use testkit::vm::{NEEDS, image, job::Job, machine};
use testkit::{packages, paths};

fn main() -> Result<()> {
    let script = std::env::args().nth(1).context("give one line of shell")?;
    packages::ensure(NEEDS, true)?;
    let image = image::ensure(&paths::cache()?)?;
    let dir = tempfile::tempdir()?;
    let options = machine::Options {
        dir: dir.path().to_owned(),
        memory_mib: 2048,
        tap: None,
        limit: Duration::from_secs(600),
    };
    let code = machine::Machine::boot(&image, &Job::new(script), &options)?
        .finish(|line| println!("{line}"))?;
    drop(dir);
    std::process::exit(code)
}
