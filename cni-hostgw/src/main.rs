//! `cni-hostgw`: routed pairs for containers of a node whose peers are next hops on its own
//! network. The one-shot path; the routes to the other nodes are kept by `cni-hostgw-agent`.

use std::process::ExitCode;

use cni::skel::{Environment, run};

fn main() -> ExitCode {
    run(
        &cni_routed::HOST_GW,
        &Environment::of_process(),
        std::io::stdin(),
        std::io::stdout(),
    )
}
