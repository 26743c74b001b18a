//! Running other programs: errors carry the command line and what it printed.

use anyhow::{Context, Result, bail};
use std::io::Write;
use std::process::{Command, Output, Stdio};

/// How a command reads in a message.
#[must_use]
pub fn describe(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(
        command
            .get_args()
            .map(|arg| arg.to_string_lossy().into_owned()),
    );
    let line = words.join(" ");
    match line.char_indices().nth(300) {
        Some((cut, _)) => format!("{} …", &line[..cut]),
        None => line,
    }
}

/// Builds a command from its words.
#[must_use]
pub fn command(program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    command
}

/// Cargo, as it runs us, for another run in the workspace. What it tells the program it runs
/// (`CARGO_MANIFEST_DIR` and others) is taken away: build scripts of some dependencies look at
/// it, and would be run again, with all that depends on them, each time the way we were started
/// changes.
#[must_use]
pub fn cargo(args: &[&str]) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = command(cargo, args);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command.current_dir(crate::paths::workspace());
    command
}

/// Runs to the end with output captured, whatever the exit code.
///
/// # Errors
/// When the program cannot be started.
pub fn capture(command: &mut Command) -> Result<Output> {
    command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run `{}`", describe(command)))
}

/// Runs to the end and returns standard output.
///
/// # Errors
/// When the program cannot be started or exits with anything but 0; the message carries what it
/// printed.
pub fn stdout(command: &mut Command) -> Result<String> {
    let output = capture(command)?;
    finish(command, output)
}

/// Like [`stdout`], with `input` on standard input.
///
/// # Errors
/// As [`stdout`].
pub fn stdout_with_input(command: &mut Command, input: &[u8]) -> Result<String> {
    let line = describe(command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("run `{line}`"))?;
    let mut stdin = child.stdin.take().context("standard input was not piped")?;
    let input = input.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child
        .wait_with_output()
        .with_context(|| format!("wait for `{line}`"))?;
    // A program that does not read its input closes the pipe; its exit code tells the story.
    drop(writer.join());
    finish(command, output)
}

fn finish(command: &Command, output: Output) -> Result<String> {
    if !output.status.success() {
        bail!(
            "`{}` failed ({}): {}{}",
            describe(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end(),
            String::from_utf8_lossy(&output.stdout).trim_end(),
        );
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("`{}` printed no UTF-8", describe(command)))
}

/// Runs with the terminal's own input and output.
///
/// # Errors
/// When the program cannot be started or exits with anything but 0.
pub fn interactive(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("run `{}`", describe(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", describe(command));
    }
    Ok(())
}
