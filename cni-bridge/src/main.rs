//! `cni-bridge`: connects containers to a bridge on the node. A drop-in for containernetworking's
//! `bridge` with `host-local` addresses in the same process.

use std::process::ExitCode;

use cni::skel::{Environment, run};
use cni_bridge::Bridge;

fn main() -> ExitCode {
    run(
        &Bridge,
        &Environment::of_process(),
        std::io::stdin(),
        std::io::stdout(),
    )
}
