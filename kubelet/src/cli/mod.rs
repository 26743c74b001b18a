//! The command line: which command, and what its end means to the caller.
//!
//! Exit codes are decided here and nowhere else: 0 done, 1 it failed, 2 it was asked wrongly
//! (flags, configuration).

mod image;
mod preflight;
mod run;

use clap::{Arg, ArgAction, ArgMatches, Command};
use kubelet::config::flags;
use kubelet::node::object::KUBELET_VERSION;
use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;

/// Asked wrongly.
const USAGE: u8 = 2;

const ABOUT: &str = "\
Ferrule's kubelet: turns the pods that the apiserver binds to this node into containers.

It is kubelet and container runtime in one process. It needs three things:
  a kubeconfig with this node's certificate (CN=system:node:<name>, O=system:nodes),
  a KubeletConfiguration file (kubelet.config.k8s.io/v1beta1; all fields are optional),
  a network configuration list in /etc/cni/net.d and its plugins in /opt/cni/bin.
Pods of manifests (staticPodPath, staticPodURL) run before there is an apiserver, and without
--kubeconfig they are all it runs (standalone).
Containers outlive it: stop, kill or replace it at any time.";

const EXAMPLES: &str = "\
Examples:
  kubelet --config /var/lib/kubelet/config.yaml --kubeconfig /etc/kubernetes/kubelet.conf
      Run this machine as a node, as kubeadm and kind start the stock kubelet.
  kubelet --config kubelet.yaml --kubeconfig node.kubeconfig --runtime-config ferrule.yaml \\
          --hostname-override node-1 --node-ip 10.0.0.5
      The same with our own settings (registry mirrors, directories) and a name of your choice.
  kubelet --config standalone.yaml
      Run the pods of the manifests that the file names, without any apiserver; it has to set
      authentication.webhook.enabled: false and authorization.mode: AlwaysAllow.
  kubelet --check --config kubelet.yaml
      Read the configuration, say what is wrong with it, and print what would hold.
  kubelet completion bash > /etc/bash_completion.d/kubelet

What goes on is logged to stderr (-v4 for more). The HTTPS API listens on 10250;
`curl http://127.0.0.1:10248/healthz` tells whether the agent is well.
Use `-h` for the short list of flags, `--help` for the flags the stock kubelet had too.";

/// The whole command line.
fn command() -> Command {
    let command = Command::new("kubelet")
        .about("Ferrule's kubelet: runs the pods of this node")
        .long_about(ABOUT)
        .after_help(EXAMPLES)
        .args_conflicts_with_subcommands(true)
        .disable_version_flag(true)
        .arg(
            Arg::new("version")
                .long("version")
                .short('V')
                .help("Print the version and end")
                .action(ArgAction::SetTrue),
        )
        .arg(
            Arg::new("check")
                .long("check")
                .help("Check the configuration, print what holds, and end")
                .action(ArgAction::SetTrue),
        )
        .subcommand(image::command())
        .subcommand(
            Command::new("completion")
                .about("Print a completion script for your shell")
                .arg(
                    Arg::new("shell")
                        .required(true)
                        .value_parser(clap::value_parser!(clap_complete::Shell)),
                ),
        );
    flags::add_to(command)
}

/// Does what the command line says.
pub(crate) fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let matches = match command().try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(USAGE));
        }
    };
    match matches.subcommand() {
        Some(("completion", matches)) => completion(matches),
        Some(("image", matches)) => image::main(matches),
        Some(_) | None if matches.get_flag("version") => {
            // The words stock tools look for (kubeadm reads the version from here).
            print(format!("Kubernetes {KUBELET_VERSION}\n").as_bytes())
        }
        Some(_) | None => agent(&matches),
    }
}

fn completion(matches: &ArgMatches) -> ExitCode {
    let Some(shell) = matches.get_one::<clap_complete::Shell>("shell") else {
        return ExitCode::from(USAGE);
    };
    let mut script = Vec::new();
    clap_complete::generate(*shell, &mut command(), "kubelet", &mut script);
    print(&script)
}

/// Writes to stdout. A reader that went away (`| head`) has all it wants.
fn print(bytes: &[u8]) -> ExitCode {
    match std::io::stdout().write_all(bytes) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            eprintln!("kubelet: write to stdout: {error}");
            ExitCode::FAILURE
        }
        Ok(()) | Err(_) => ExitCode::SUCCESS,
    }
}

fn agent(matches: &ArgMatches) -> ExitCode {
    let flags = flags::read(matches).map_err(|e| format!("flag {e}"));
    let config = flags.and_then(|flags| kubelet::config::load(&flags).map_err(|e| e.to_string()));
    let config = match config {
        Ok(config) => config,
        Err(error) => {
            eprintln!("kubelet: {error}");
            return ExitCode::from(USAGE);
        }
    };
    if matches.get_flag("check") {
        return check(&config);
    }
    match run::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kubelet: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn check(config: &kubelet::config::Config) -> ExitCode {
    for note in &config.notes {
        eprintln!("kubelet: note: {note}");
    }
    match serde_json::to_string_pretty(&config.effective) {
        Ok(text) => print(format!("{text}\n").as_bytes()),
        Err(error) => {
            eprintln!("kubelet: print the configuration: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn help_teaches() {
        let long = command().render_long_help().to_string();
        for part in ["system:nodes", "Examples:", "--eviction-hard", "completion"] {
            assert!(long.contains(part), "{part}");
        }
        let short = command().render_help().to_string();
        assert!(!short.contains("--eviction-hard"));
        assert!(short.contains("--kubeconfig"));
    }
}
