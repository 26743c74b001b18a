//! `cni-vxlan-agent`: keeps a node's VXLAN devices, routes, neighbours and forwarding entries as
//! the cluster's nodes say.

fn main() -> std::process::ExitCode {
    cni_peers::main(cni_peers::Backend::Vxlan)
}
