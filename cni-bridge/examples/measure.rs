//! Measures ADD and DEL of a built `cni-bridge` as a runtime would call it: exec, environment,
//! standard input. Each run in network namespaces of its own; needs root.
//!
//! `cargo run --release -p cni-bridge --example measure -- <path of cni-bridge> [count] [parallel]`

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use linux::netlink::{in_netns, new_netns};

fn main() {
    let mut args = std::env::args().skip(1);
    let Some(program) = args.next().map(PathBuf::from) else {
        eprintln!("usage: measure <path of cni-bridge> [count] [parallel]");
        return;
    };
    let count = args.next().and_then(|n| n.parse().ok()).unwrap_or(100);
    let parallel = args.next().and_then(|n| n.parse().ok()).unwrap_or(1).max(1);
    let dir = PathBuf::from(format!("/dev/shm/ferrule-measure-{}", std::process::id()));
    let node = new_netns().expect("a network namespace");
    let conf = format!(
        r#"{{"cniVersion":"1.1.0","name":"measure","type":"cni-bridge","bridge":"cni0",
        "isDefaultGateway":true,"ipMasq":true,"hairpinMode":true,
        "ipam":{{"type":"host-local","dataDir":"{}","ranges":[[{{"subnet":"10.88.0.0/16"}}]]}}}}"#,
        dir.display()
    );
    let pods: Vec<File> = (0..count)
        .map(|_| new_netns().expect("a network namespace"))
        .collect();
    for verb in ["VERSION", "ADD", "DEL"] {
        let begin = Instant::now();
        let mut times = run_all(&program, verb, &conf, &node, &pods, parallel);
        let total = begin.elapsed();
        times.sort();
        let at = |part: usize| times[(times.len() - 1) * part / 100].as_secs_f64() * 1e3;
        let rate = f64::from(u32::try_from(count).unwrap_or(u32::MAX)) / total.as_secs_f64();
        let (p50, p99, max) = (at(50), at(99), at(100));
        println!(
            "{verb:8} x{count} by {parallel}: p50 {p50:.2} ms, p99 {p99:.2} ms, max {max:.2} ms, {rate:.0}/s"
        );
    }
    let _ = std::fs::remove_dir_all(dir);
}

fn run_all(
    program: &Path,
    verb: &str,
    conf: &str,
    node: &File,
    pods: &[File],
    parallel: usize,
) -> Vec<Duration> {
    let share = pods.len().div_ceil(parallel);
    std::thread::scope(|scope| {
        let workers: Vec<_> = pods
            .chunks(share)
            .enumerate()
            .map(|(worker, pods)| {
                scope.spawn(move || {
                    in_netns(node.as_fd(), || {
                        let calls = pods.iter().enumerate();
                        calls
                            .map(|(i, pod)| call(program, verb, conf, worker * share + i, pod))
                            .collect::<Vec<_>>()
                    })
                    .expect("enter the node's namespace")
                })
            })
            .collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().expect("a worker"))
            .collect()
    })
}

fn call(program: &Path, verb: &str, conf: &str, number: usize, pod: &File) -> Duration {
    let begin = Instant::now();
    let netns = format!("/proc/{}/fd/{}", std::process::id(), pod.as_raw_fd());
    let mut child = Command::new(program)
        .env_clear()
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", format!("pod-{number}"))
        .env("CNI_NETNS", netns)
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", "/opt/cni/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start cni-bridge");
    // Dropping the pipe closes it.
    let sent = child
        .stdin
        .take()
        .expect("a pipe")
        .write_all(conf.as_bytes());
    sent.expect("send the configuration");
    let output = child.wait_with_output().expect("wait for cni-bridge");
    let took = begin.elapsed();
    assert!(
        output.status.success(),
        "{verb}: {}",
        String::from_utf8_lossy(&output.stdout)
    );
    took
}
