//! How long a launch takes and what an idle shim weighs. Needs root.
//!
//! `POD_SHIM=<static pod-shim> cargo bench -p pod-shim`; without the variable it measures the
//! dynamic build beside it, which weighs more.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on stops"
)]

#[path = "../tests/common/mod.rs"]
mod common;

use common::*;
use std::time::Instant;

const SHIMS: usize = 50;
const LAUNCHES: usize = 100;

fn main() {
    let mut lab = Lab::new();
    let (mut started, mut gone) = (Vec::new(), Vec::new());
    for n in 0..LAUNCHES {
        let id = format!("c{n}");
        let spec = lab.spec(&id, &["true"]);
        let from = Instant::now();
        lab.launch(spec).expect("launch");
        started.push(from.elapsed());
        lab.wait_exit(&id);
        gone.push(from.elapsed());
    }
    print("launch of `true`, request to reply", &mut started);
    print("launch of `true`, request to exit event", &mut gone);
    let spec = lab.spec("x", &["sleep", "1000"]);
    lab.launch(spec).expect("launch");
    let mut execs = Vec::new();
    for n in 0..LAUNCHES {
        let from = Instant::now();
        lab.exec(&format!("e{n}"), "x", &["true"]);
        execs.push(from.elapsed());
    }
    print("exec of `true`, request to exit event", &mut execs);
    drop(lab);

    let shims: Vec<Lab> = (0..SHIMS)
        .map(|_| {
            let mut lab = Lab::new();
            let spec = lab.spec("a", &["sh", "-c", "echo up; exec sleep 1000"]);
            lab.launch(spec).expect("launch");
            lab
        })
        .collect();
    let pss: u64 = shims.iter().map(|lab| pss_kib(lab.shim.pid)).sum();
    if std::env::var_os("SHOW_MAPS").is_some() {
        let maps = std::fs::read_to_string(format!("/proc/{}/smaps", shims[0].shim.pid));
        println!("{}", maps.unwrap_or_default());
    }
    println!(
        "{SHIMS} idle shims with a container each: {} KiB PSS a shim",
        pss / SHIMS as u64
    );
}

fn print(what: &str, times: &mut [std::time::Duration]) {
    times.sort();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    println!(
        "{what}: p50 {:?}, p90 {:?}, p99 {:?}",
        at(50),
        at(90),
        at(99)
    );
}

fn pss_kib(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("smaps");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Pss:"))
        .expect("Pss");
    line.split_whitespace()
        .next()
        .and_then(|n| n.parse().ok())
        .expect("number")
}
