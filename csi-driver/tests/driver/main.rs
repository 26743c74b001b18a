//! The driver as a process on a pool of its own, called as a kubelet and its sidecars call it.
//! Needs root: filesystems, loop devices and mounts are real.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on shall stop")]

mod damage;
mod figures;
mod kills;
mod lab;
mod life;
mod room;
