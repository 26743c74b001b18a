//! `cargo xtask`: the one door to everything a developer does in this repository. It parses
//! arguments and prints; what the commands do is in `testkit`.

mod cli;
mod conformance;
mod develop;

use anyhow::Result;
use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    match run(cli::Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: cli::Cli) -> Result<ExitCode> {
    match cli.command {
        cli::Command::Up(args) => args.run(),
        cli::Command::Down(args) => args.run(),
        cli::Command::Kubectl(args) => args.run(),
        cli::Command::Enter(args) => args.run(),
        cli::Command::Test(args) => args.run(),
        cli::Command::Check => develop::check(),
        cli::Command::Tidy => develop::tidy(),
        cli::Command::Bench(args) => args.run(),
        cli::Command::Chaos(args) => args.run(),
        cli::Command::Conformance(args) => args.run(),
        cli::Command::Image(args) => args.run(),
        cli::Command::Audit(args) => args.run(),
    }
}
