//! Our own programs, built by cargo into the workspace's target directory.

use crate::progress::Step;
use crate::{command, paths};
use anyhow::{Context, Result};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

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
/// When cargo fails; the error carries its messages.
pub fn build(profile: &str) -> Result<Programs> {
    if std::env::var_os(NO_BUILD).is_none() {
        let title = format!("build kubelet ({profile}), pod-shim, cni-bridge");
        let mut step = Step::begin(title);
        compile(profile, &mut step)?;
        step.done("");
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

/// Builds the network plugins alone, small and static as they are installed, and says where they
/// are.
///
/// # Errors
/// When cargo fails; the error carries its messages.
pub fn plugins() -> Result<PathBuf> {
    let dir = paths::target().join(STATIC_TARGET).join("tiny");
    if std::env::var_os(NO_BUILD).is_none() {
        let mut step = Step::begin("build cni-bridge");
        let args = ["--package", "cni-bridge", "--profile", "tiny"];
        compile_static(&args, &mut step)?;
        step.done("");
    }
    anyhow::ensure!(
        dir.join("cni-bridge").is_file(),
        "cargo built no cni-bridge"
    );
    Ok(dir)
}

/// A network plugin and, when it spans nodes, its peer agent; all static.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkPrograms {
    /// Name of the plugin and of its package.
    pub name: &'static str,
    /// What runtimes execute.
    pub plugin: PathBuf,
    /// What keeps the node; none for a plugin that needs nobody.
    pub agent: Option<PathBuf>,
}

impl NetworkPrograms {
    /// All of it: the plugin and what comes with it.
    #[must_use]
    pub fn files(&self) -> Vec<&Path> {
        let agent = self.agent.as_deref();
        std::iter::once(self.plugin.as_path())
            .chain(agent)
            .collect()
    }
}

/// Every network plugin we have an image of.
pub const PLUGINS: [&str; 3] = ["cni-bridge", "cni-vxlan", "cni-hostgw"];

/// Builds one of [`PLUGINS`].
///
/// # Errors
/// When cargo fails; the error carries its messages.
pub fn plugin(name: &'static str) -> Result<NetworkPrograms> {
    match NETWORKS.contains(&name) {
        true => network(name),
        false => Ok(NetworkPrograms {
            name,
            plugin: plugins()?.join(name),
            agent: None,
        }),
    }
}

/// Packages of networks that span nodes.
pub const NETWORKS: [&str; 2] = ["cni-vxlan", "cni-hostgw"];

/// Builds the programs of one of [`NETWORKS`].
///
/// # Errors
/// When cargo fails; the error carries its messages.
pub fn network(name: &'static str) -> Result<NetworkPrograms> {
    let target = paths::target().join(STATIC_TARGET);
    let agent = format!("{name}-agent");
    let programs = NetworkPrograms {
        name,
        plugin: target.join("tiny").join(name),
        agent: Some(target.join("release").join(&agent)),
    };
    if std::env::var_os(NO_BUILD).is_none() {
        let mut step = Step::begin(format!("build {name}, {agent}"));
        // The plugin without what only the agent needs.
        let plugin = ["--profile", "tiny", "--no-default-features"];
        compile_static(
            &[&["--package", name, "--bin", name], &plugin[..]].concat(),
            &mut step,
        )?;
        let packages = ["--package", name, "--bin", &agent, "--profile", "release"];
        compile_static(&packages, &mut step)?;
        step.done("");
    }
    for program in programs.files() {
        anyhow::ensure!(program.is_file(), "cargo built no {}", program.display());
    }
    Ok(programs)
}

/// Builds the storage driver with `profile` and says where it is.
///
/// # Errors
/// When cargo fails; the error carries its messages.
pub fn csi_driver(profile: &str) -> Result<PathBuf> {
    if std::env::var_os(NO_BUILD).is_none() {
        let mut step = Step::begin(format!("build csi-driver ({profile})"));
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let words = ["build", "--package", "csi-driver", "--profile", profile];
        let mut command = command::command(cargo, &words);
        cargo_build(command.current_dir(paths::workspace()), &mut step)?;
        step.done("");
    }
    let program = paths::target().join(directory(profile)).join("csi-driver");
    anyhow::ensure!(program.is_file(), "cargo built no {}", program.display());
    Ok(program)
}

/// Builds the storage driver as it goes into its image: static, without debug information.
///
/// # Errors
/// When cargo fails; the error carries its messages.
pub fn static_csi_driver() -> Result<PathBuf> {
    if std::env::var_os(NO_BUILD).is_none() {
        let mut step = Step::begin("build csi-driver (static)".to_owned());
        let words = ["--package", "csi-driver", "--profile", "release"];
        compile_static(&words, &mut step)?;
        step.done("");
    }
    let program = paths::target()
        .join(STATIC_TARGET)
        .join("release/csi-driver");
    anyhow::ensure!(program.is_file(), "cargo built no {}", program.display());
    Ok(program)
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

fn compile(profile: &str, step: &mut Step) -> Result<()> {
    let agent = [
        "build",
        // The features of the whole workspace: what the tests compiled is used again.
        "--workspace",
        "--bin",
        "kubelet",
        "--profile",
        profile,
    ];
    let mut command = command::cargo(&agent);
    cargo_build(&mut command, step).context("build kubelet")?;
    let small = ["--package", "pod-shim", "--package", "cni-bridge"];
    compile_static(&[&small[..], &["--profile", "tiny"]].concat(), step)
}

/// Builds programs that need nothing but a kernel.
fn compile_static(args: &[&str], step: &mut Step) -> Result<()> {
    let mut command = command::cargo(&["build", "--target", STATIC_TARGET]);
    command.args(args).env("RUSTFLAGS", STATIC_FLAGS);
    cargo_build(&mut command, step)
}

/// Runs cargo, shows what it is at, and prints what it said when it fails. That it waits for
/// another build is said at once: this can take minutes, and looks like nothing at all.
fn cargo_build(command: &mut Command, step: &mut Step) -> Result<()> {
    let line = command::describe(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("run `{line}`"))?;
    let stderr = child
        .stderr
        .take()
        .context("standard error was not piped")?;
    let mut said = String::new();
    for text in BufReader::new(stderr).lines() {
        let text = text.with_context(|| format!("read the output of `{line}`"))?;
        if text.trim_start().starts_with("Blocking ") {
            step.say(text.trim());
        }
        step.detail(text.trim());
        said.push_str(&text);
        said.push('\n');
    }
    let status = child.wait().with_context(|| format!("wait for `{line}`"))?;
    anyhow::ensure!(status.success(), "`{line}` failed ({status}):\n{said}");
    Ok(())
}

/// Builds the networks that span nodes, plugins and peer agents, and says which directory they
/// are in.
///
/// # Errors
/// When cargo fails; the error carries its messages.
pub fn peer_programs() -> Result<PathBuf> {
    const PROGRAMS: [&str; 4] = [
        "cni-vxlan",
        "cni-vxlan-agent",
        "cni-hostgw",
        "cni-hostgw-agent",
    ];
    if std::env::var_os(NO_BUILD).is_none() {
        let mut step = Step::begin("build cni-vxlan, cni-hostgw and their agents".to_owned());
        let mut words = vec!["build", "--workspace", "--profile", TEST_PROFILE];
        for program in PROGRAMS {
            words.extend(["--bin", program]);
        }
        let mut command = command::cargo(&words);
        cargo_build(&mut command, &mut step)?;
        step.done("");
    }
    let dir = paths::target().join(directory(TEST_PROFILE));
    for program in PROGRAMS {
        let path = dir.join(program);
        anyhow::ensure!(path.is_file(), "cargo built no {}", path.display());
    }
    Ok(dir)
}
