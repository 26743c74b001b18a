//! Our own programs, built by cargo into the workspace's target directory.

use crate::{command, paths};
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::Command;

/// Cargo profile of the agent in labs and tests: the one its unit tests are compiled with, so
/// that nothing is compiled twice.
pub const TEST_PROFILE: &str = "dev";

/// The target the small programs are built for: naming it explicitly keeps their flags away from
/// build scripts and procedural macros.
const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Flags that make a program static and at a fixed address: no loader, no relocations to fault in.
const STATIC_FLAGS: &str = "-C target-feature=+crt-static -C relocation-model=static";

/// Where the built programs lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Programs {
    /// The agent.
    pub kubelet: PathBuf,
    /// One per pod.
    pub pod_shim: PathBuf,
    /// The network plugin.
    pub cni_bridge: PathBuf,
}

/// Builds the agent with `profile` and the small programs, and says where they are.
///
/// # Errors
/// When cargo fails; its own messages are on the terminal.
pub fn build(profile: &str) -> Result<Programs> {
    if std::env::var_os(NO_BUILD).is_none() {
        compile(profile)?;
    }
    let programs = Programs {
        kubelet: paths::target().join(directory(profile)).join("kubelet"),
        pod_shim: paths::target().join(STATIC_TARGET).join("tiny/pod-shim"),
        cni_bridge: paths::target().join(STATIC_TARGET).join("tiny/cni-bridge"),
    };
    for program in [&programs.kubelet, &programs.pod_shim, &programs.cni_bridge] {
        anyhow::ensure!(program.is_file(), "cargo built no {}", program.display());
    }
    Ok(programs)
}

/// Where cargo puts what a profile builds.
fn directory(profile: &str) -> &str {
    match profile {
        "dev" | "test" => "debug",
        other => other,
    }
}

/// When set, what cargo built last is taken as it is: to repeat a measurement while the sources
/// change.
const NO_BUILD: &str = "FERRULE_NO_BUILD";

fn compile(profile: &str) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let workspace = paths::workspace();
    let agent = &[
        "build",
        "--quiet",
        // The features of the whole workspace: what the tests compiled is used again.
        "--workspace",
        "--bin",
        "kubelet",
        "--profile",
        profile,
    ];
    command::interactive(command::command(&cargo, agent).current_dir(&workspace))
        .context("build kubelet")?;
    let small = [
        "build",
        "--quiet",
        "--package",
        "pod-shim",
        "--package",
        "cni-bridge",
        "--profile",
        "tiny",
        "--target",
        STATIC_TARGET,
    ];
    let mut command: Command = command::command(&cargo, &small);
    command
        .current_dir(&workspace)
        .env("RUSTFLAGS", STATIC_FLAGS);
    command::interactive(&mut command).context("build pod-shim and cni-bridge")?;
    Ok(())
}
