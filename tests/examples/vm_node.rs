//! The second half of `cargo xtask test --vm` alone: the virtual machine as a node of a control
//! plane. `cargo run -p testkit --example vm_node [DIR]`, where DIR holds `kubelet`, `pod-shim` and
//! `cni-bridge` that were built before.

use anyhow::Result;
use std::path::PathBuf;
use testkit::artefacts::ours::Programs;
use testkit::vm::{NEEDS, image, node};
use testkit::{packages, paths};

fn main() -> Result<()> {
    packages::ensure(NEEDS, true)?;
    let programs = std::env::args()
        .nth(1)
        .map(PathBuf::from)
        .map(|dir| Programs {
            kubelet: dir.join("kubelet"),
            pod_shim: dir.join("pod-shim"),
            cni_bridge: dir.join("cni-bridge"),
        });
    let tally = node::run(&image::ensure(&paths::cache()?)?, true, programs)?;
    println!("{} passed, {} failed", tally.passed, tally.failed);
    std::process::exit(i32::from(tally.failed > 0))
}
