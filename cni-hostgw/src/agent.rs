//! `cni-hostgw-agent`: keeps a node's routes to its peers as the cluster's nodes say.

fn main() -> std::process::ExitCode {
    cni_peers::main(cni_peers::Backend::HostGw)
}
