//! Many calls at once, kills among them, and neighbours that make a noise. Needs root.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use linux::netlink::{AddressSpec, Change};
use serde_json::json;

use crate::lab::{Lab, Pod};

/// Small numbers that look random and are the same every time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % limit
    }
}

#[test]
fn storms_of_adds_and_dels_with_random_kills_leak_nothing_and_double_nothing() {
    // `FERRULE_STORM=10000` takes minutes; the steps of a kill are each tested elsewhere.
    let rounds = std::env::var("FERRULE_STORM").map_or(600, |n| n.parse().unwrap());
    const WORKERS: u64 = 8;
    let lab = Lab::new().ranges(&["10.88.0.0/26"]).with(
        "runtimeConfig",
        json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "udp"}]}),
    );
    let held: Mutex<HashSet<String>> = Mutex::default();
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            let (lab, held) = (&lab, &held);
            scope.spawn(move || {
                let mut dice = Dice(worker + 1);
                let mut conf = lab.conf.clone();
                conf["runtimeConfig"]["portMappings"][0]["hostPort"] = (8080 + worker).into();
                for round in 0..rounds / WORKERS {
                    let pod = Pod::new(&format!("pod-{worker}-{round}"));
                    for verb in ["ADD", "DEL"] {
                        if dice.below(3) == 0 {
                            let step = [("FERRULE_DIE_AT", dice.below(60).to_string())];
                            let path = pod.path();
                            let child = lab.start_with(verb, &pod.id, &path, &conf, &step);
                            child.wait_with_output().unwrap();
                        }
                        if verb == "DEL" {
                            break;
                        }
                        let printed = lab.call("ADD", &pod.id, &pod.path(), &conf).unwrap();
                        let address = printed["ips"][0]["address"].to_string();
                        let new = held.lock().unwrap().insert(address.clone());
                        assert!(new, "{address} was given twice");
                        let mut checked = conf.clone();
                        checked["prevResult"] = printed;
                        lab.call("CHECK", &pod.id, &pod.path(), &checked).unwrap();
                        // Before DEL begins, or another worker may have it already.
                        held.lock().unwrap().remove(&address);
                    }
                    let netns = ["", "/dead/path"][dice.below(2) as usize];
                    lab.call("DEL", &pod.id, netns, &conf).unwrap();
                }
            });
        }
    });
    lab.assert_nothing_left("after the storm");
}

#[test]
fn addresses_and_links_that_come_and_go_disturb_no_add() {
    let lab = Lab::new();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (lab, stop) = (&lab, &stop);
        scope.spawn(move || {
            let mut rtnl = lab.rtnl();
            let lo = rtnl.link_by_name("lo").unwrap().unwrap().index;
            while !stop.load(Ordering::Relaxed) {
                for n in 0..200_u8 {
                    let spec = AddressSpec {
                        index: lo,
                        address: [172, 16, 0, n].into(),
                        prefix_len: 32,
                        detect_duplicates: false,
                    };
                    let (add, remove) = (spec.clone(), spec);
                    let changes = [Change::AddAddress(add), Change::RemoveAddress(remove)];
                    rtnl.apply(&changes).unwrap();
                }
            }
        });
        for n in 0..40 {
            let pod = Pod::new(&format!("pod-{n}"));
            let result = lab.add(&pod).unwrap();
            lab.check(&pod, &result).unwrap();
            lab.gc(&[&pod]).unwrap();
            lab.del(&pod).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    lab.assert_nothing_left("beside the noise");
}

#[test]
fn whoever_holds_the_lock_of_iptables_does_not_stop_an_add() {
    let lab = Lab::new().with(
        "runtimeConfig",
        json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}),
    );
    let lock = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open("/run/xtables.lock")
        .unwrap();
    lock.lock().unwrap();
    let begin = Instant::now();
    let pod = Pod::new("one");
    let result = lab.add(&pod).unwrap();
    lab.check(&pod, &result).unwrap();
    lab.del(&pod).unwrap();
    drop(lock);
    // Whoever waits for it waits for seconds.
    assert!(
        begin.elapsed() < Duration::from_secs(8),
        "{:?}",
        begin.elapsed()
    );
}

#[test]
fn a_boot_later_nothing_of_before_counts() {
    let lab = Lab::new().with(
        "runtimeConfig",
        json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}),
    );
    lab.add(&Pod::new("before")).unwrap();
    // As if the directory were on a disk and the machine came up again: other boot ids, no links.
    for dir in ["leases", "rules", "claims", "."] {
        let dir = lab.dir.join("leases/net").join(dir);
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            if entry.file_type().unwrap().is_file() {
                let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
                std::fs::write(entry.path(), aged(&text)).unwrap();
            }
        }
    }
    lab.shown("nft", &["flush", "ruleset"]);
    let after = Pod::new("after");
    let result = lab.add(&after).unwrap();
    assert_eq!(result.ips[0].address.to_string(), "10.88.0.2/24");
    lab.check(&after, &result).unwrap();
    lab.call("DEL", "before", "", &lab.conf).unwrap();
    lab.check(&after, &result).unwrap();
    lab.del(&after).unwrap();
    lab.assert_nothing_left("after a boot");
}

/// The same file of another boot, with its checksum.
fn aged(text: &str) -> String {
    let Some((_, body)) = text.split_once('\n') else {
        return text.to_owned();
    };
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let body = body.replace(boot.trim(), "another-boot");
    let sum = body.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{sum:016x}\n{body}")
}
