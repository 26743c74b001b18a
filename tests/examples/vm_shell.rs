//! Runs one line of shell in the virtual machine: `cargo run -p testkit --example vm_shell -- 'uname -a'`.

use anyhow::{Context, Result};
use testkit::vm::{NEEDS, image, job::Job, machine};
use testkit::{packages, paths};

fn main() -> Result<()> {
    let script = std::env::args().nth(1).context("give one line of shell")?;
    packages::ensure(NEEDS, true)?;
    let image = image::ensure(&paths::cache()?)?;
    let dir = std::env::temp_dir().join(format!("ferrule-vm-{}", std::process::id()));
    let options = machine::Options {
        dir: dir.clone(),
        memory_mib: 2048,
        tap: None,
    };
    let code = machine::Machine::boot(&image, &Job::new(script), &options)?
        .finish(|line| println!("{line}"))?;
    std::fs::remove_dir_all(&dir)?;
    std::process::exit(code)
}
