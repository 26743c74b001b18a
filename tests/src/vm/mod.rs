//! A virtual machine for what the build machine's kernel cannot show: a whole Debian with systemd,
//! cgroup v2 with every controller, and all capabilities.
//!
//! [`image`] makes the disk once and keeps it by content; [`machine`] boots it under emulation
//! (`-accel tcg`, no `/dev/kvm` needed) with a second disk that carries one job; [`job`] describes
//! what to run there. [`suite`] runs test programs in it, [`node`] makes it a node of a control
//! plane. The machine's own disk is never written: every boot is a fresh one.
//!
//! It computes several times slower than the machine it runs on: right for correctness, wrong for
//! figures.

pub mod image;
pub mod job;
pub mod machine;
pub mod node;
mod node_checks;
pub mod suite;

use crate::packages::{self, Need};
use crate::paths;
use crate::progress::Step;
use crate::suite::Tally;
use anyhow::Result;

/// The lab the machine joins as a node, and what its processes are known by.
pub const LAB: &str = "vm";

/// Owner variable of the machine's process.
const OWNER: &str = "vm/machine";

/// Runs everything that needs the machine and returns the tally; `cluster` says whether it joins a
/// control plane as a node, too.
///
/// # Errors
/// When the machine cannot be made or ends before its job.
pub fn run(may_install: bool, cluster: bool) -> Result<Tally> {
    packages::ensure(NEEDS, may_install)?;
    let step = Step::begin("virtual machine (about 2 min the first time)");
    let image = image::ensure(&paths::cache()?)?;
    step.done("");
    let mut tally = suite::run(&image)?;
    if cluster {
        tally.add(node::run(&image, may_install, None)?);
    }
    Ok(tally)
}

/// What the virtual machine needs.
pub const NEEDS: &[Need] = &[
    Need {
        file: "qemu-system-x86_64",
        package: "qemu-system-x86",
        why: "emulates the machine",
    },
    Need {
        file: "debootstrap",
        package: "debootstrap",
        why: "makes its root filesystem",
    },
    Need {
        file: "mkfs.ext4",
        package: "e2fsprogs",
        why: "writes it into a disk image",
    },
];
