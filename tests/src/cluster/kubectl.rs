//! The real kubectl, on one lab's administrator kubeconfig.

use crate::command;
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// kubectl with a kubeconfig.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
}

impl Kubectl {
    /// kubectl out of the directory of the built control plane.
    #[must_use]
    pub fn new(programs: &Path, kubeconfig: PathBuf) -> Self {
        Self {
            program: programs.join("kubectl"),
            kubeconfig,
        }
    }

    /// A command ready for more arguments.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = command::command(&self.program, args);
        // Only the lab's configuration: the user's own clusters must not be touched by accident.
        command.env("KUBECONFIG", &self.kubeconfig);
        command
    }

    /// Runs and returns standard output.
    ///
    /// # Errors
    /// When kubectl fails; the message carries what it printed.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        command::stdout(&mut self.command(args))
    }

    /// Runs and returns exit code and output, whatever they are.
    ///
    /// # Errors
    /// When kubectl cannot be started.
    pub fn output(&self, args: &[&str]) -> Result<Output> {
        command::capture(&mut self.command(args))
    }

    /// Runs with `-o json` and parses the answer.
    ///
    /// # Errors
    /// When kubectl fails or prints no JSON.
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let mut command = self.command(args);
        command.args(["-o", "json"]);
        let text = command::stdout(&mut command)?;
        serde_json::from_str(&text)
            .with_context(|| format!("`{}` printed no JSON", command::describe(&command)))
    }

    /// Applies a manifest.
    ///
    /// # Errors
    /// When kubectl fails; the message carries what it printed.
    pub fn apply(&self, manifest: &str) -> Result<String> {
        command::stdout_with_input(
            &mut self.command(&["apply", "-f", "-"]),
            manifest.as_bytes(),
        )
    }
}
