use super::*;
use crate::config::Threshold;
use crate::eviction::thresholds::Observation;
use crate::pod::fixture::pod;
use crate::stats::summary::{MemoryStats, ProcessStats, VolumeStats};
use serde_json::{Value, json};
use std::time::Duration;

const DISKS: Disks = Disks {
    dedicated_images: false,
};

fn candidate(name: &str, spec: Value, memory: Option<u64>) -> Candidate {
    let mut pod = pod(spec);
    pod.metadata.uid = Some(name.to_owned());
    pod.metadata.name = Some(name.to_owned());
    let stats = memory.map(|bytes| {
        let memory = MemoryStats {
            working_set_bytes: Some(bytes),
            ..MemoryStats::default()
        };
        PodStats {
            containers: vec![ContainerStats {
                name: "a".to_owned(),
                memory: Some(memory.clone()),
                ..ContainerStats::default()
            }],
            memory: Some(memory),
            ..PodStats::default()
        }
    });
    Candidate {
        pod: Arc::new(pod),
        stats,
    }
}

fn asks(memory: &str, priority: i32) -> Value {
    json!({"priority": priority, "containers": [
        {"name": "a", "resources": {"requests": {"memory": memory}}}]})
}

fn order(mut candidates: Vec<Candidate>, signal: Signal) -> Vec<String> {
    rank(&mut candidates, signal, DISKS);
    let uid = |c: &Candidate| spec::uid(&c.pod).to_owned();
    candidates.iter().map(uid).collect()
}

#[test]
fn memory_is_taken_from_those_beyond_their_requests_by_priority_and_excess() {
    let candidates = vec![
        candidate("modest", asks("1Gi", 0), Some(1 << 20)),
        candidate("important", asks("1Mi", 10), Some(1 << 30)),
        candidate("little", asks("1Mi", 0), Some(2 << 20)),
        candidate("much", asks("1Mi", 0), Some(9 << 20)),
        candidate("unknown", asks("1Gi", 10), None),
    ];
    assert_eq!(
        order(candidates, Signal::Memory),
        ["unknown", "much", "little", "important", "modest"]
    );
}

#[test]
fn process_ids_are_taken_by_priority_and_number() {
    let with = |name, priority, count| {
        let mut c = candidate(name, asks("1", priority), Some(0));
        let stats = c.stats.as_mut().unwrap();
        stats.process_stats = Some(ProcessStats {
            process_count: count,
        });
        c
    };
    let candidates = vec![
        with("many", 10, 500),
        with("few", 0, 2),
        with("some", 0, 20),
    ];
    assert_eq!(order(candidates, Signal::Pid), ["some", "few", "many"]);
}

#[test]
fn disks_count_layers_logs_and_local_volumes_where_they_are() {
    let fs = |used| {
        Some(FsStats {
            used_bytes: Some(used),
            inodes_used: Some(used / 10),
            ..FsStats::default()
        })
    };
    let volumes =
        json!([{"name": "v", "emptyDir": {}}, {"name": "m", "emptyDir": {"medium": "Memory"}}]);
    let mut c = candidate("a", json!({"containers": [], "volumes": volumes}), Some(0));
    let stats = c.stats.as_mut().unwrap();
    stats.containers[0].rootfs = fs(100);
    stats.containers[0].logs = fs(20);
    for (name, used) in [("v", 3000), ("m", 9000)] {
        stats.volume_stats.push(VolumeStats {
            name: name.to_owned(),
            fs: fs(used).unwrap(),
            ..VolumeStats::default()
        });
    }
    let stats = c.stats.as_ref().unwrap();
    let use_of =
        |signal, dedicated_images| disk_use(&c.pod, stats, signal, Disks { dedicated_images });
    assert_eq!(use_of(Signal::NodeFs, false), 3120);
    assert_eq!(use_of(Signal::NodeFs, true), 3020);
    assert_eq!(use_of(Signal::ImageFs, true), 100);
    assert_eq!(use_of(Signal::NodeFsInodes, false), 312);
}

#[test]
fn the_victim_is_told_in_the_stock_kubelets_words_and_critical_pods_are_spared() {
    let mut critical = asks("1", 2_000_000_000);
    critical["priority"] = json!(2_000_000_000);
    let victims = [
        candidate("critical", critical, Some(1 << 30)),
        candidate("greedy", asks("1Mi", 0), Some(3 << 20)),
    ];
    let hard = Rule {
        signal: Signal::Memory,
        least: Threshold::Amount(100 << 20),
        grace: None,
        reclaim: None,
    };
    let observation = Observation {
        available: 50 << 20,
        capacity: 1 << 30,
    };
    let seen = [(Signal::Memory, observation)].into();
    let eviction = choose(&victims, &hard, &[&hard], &seen, 90).unwrap();
    assert_eq!((eviction.uid.as_str(), eviction.grace_s), ("greedy", 1));
    assert_eq!(
        eviction.message,
        "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. \
         Container a was using 3Mi, request is 1Mi, has larger consumption of memory. "
    );
    let soft = Rule {
        grace: Some(Duration::from_secs(1)),
        ..hard
    };
    let eviction = choose(&victims[1..], &soft, &[&soft], &seen, 10).unwrap();
    assert_eq!(eviction.grace_s, 10);
    assert_eq!(choose(&victims[..1], &soft, &[&soft], &seen, 10), None);
}
