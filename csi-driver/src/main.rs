//! The program: a driver, and commands for people who look after one.

use std::process::ExitCode;

fn main() -> ExitCode {
    csi_driver::cli::main()
}
