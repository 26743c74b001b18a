//! `cni-vxlan`: routed pairs for containers of a node whose peers are reached through VXLAN. The
//! one-shot path; what reaches the other nodes is kept by `cni-vxlan-agent`.

use std::process::ExitCode;

use cni::skel::{Environment, run};

fn main() -> ExitCode {
    run(
        &cni_routed::VXLAN,
        &Environment::of_process(),
        std::io::stdin(),
        std::io::stdout(),
    )
}
