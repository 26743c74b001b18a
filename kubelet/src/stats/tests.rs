//! The collector over a scripted runtime, and the pages made of what it collects.

use super::*;
use crate::config::{self, Flags};
use crate::metrics::parse::parse;
use crate::pod::index::{PodEntry, PodIndex};
use crate::volumes::{Fill, VolumePlace};
use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, Pod, PodSpec, PodStatus, Volume};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time as ApiTime};
use runtime::fake::FakeRuntime;
use runtime::service::{CgroupStats, ContainerConfig, ImageConfig, RuntimeService, SandboxConfig};
use std::path::Path;
use std::sync::Arc;

const POD_CGROUP: &str = "/kubepods/podu1";

fn usage(cpu_usage_ns: u64, memory: u64) -> CgroupStats {
    CgroupStats {
        time_ns: i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap(),
        cpu_usage_ns,
        memory_usage_bytes: memory + 100,
        memory_working_set_bytes: memory,
        memory_limit_bytes: Some(10 * memory),
        pids: 2,
        ..CgroupStats::default()
    }
}

/// A node with one pod of one running container that wrote nothing, and an emptyDir in `dir`.
async fn node(dir: &Path) -> Stats<FakeRuntime> {
    let runtime = Arc::new(FakeRuntime::new());
    runtime.preload("image", ImageConfig::default());
    let sandbox = SandboxConfig {
        name: "p".to_owned(),
        namespace: "ns".to_owned(),
        uid: "u1".to_owned(),
        cgroup_parent: POD_CGROUP.to_owned(),
        log_directory: dir.to_owned(),
        ..SandboxConfig::default()
    };
    let sandbox = runtime.run_sandbox(sandbox).await.unwrap();
    let config = ContainerConfig {
        name: "c".to_owned(),
        image: "image".to_owned(),
        log_path: "0.log".to_owned(),
        ..ContainerConfig::default()
    };
    let id = runtime.create_container(&sandbox.id, config).await.unwrap();
    runtime.start_container(&id).await.unwrap();
    runtime.set_stats(id.as_str(), usage(5_000_000_000, 1 << 20));
    runtime.set_stats(POD_CGROUP, usage(6_000_000_000, 2 << 20));
    let index = PodIndex::new();
    index.insert(PodEntry {
        pod: Arc::new(Pod {
            metadata: ObjectMeta {
                name: Some("p".to_owned()),
                namespace: Some("ns".to_owned()),
                uid: Some("u1".to_owned()),
                ..ObjectMeta::default()
            },
            spec: Some(PodSpec {
                volumes: Some(vec![Volume {
                    name: "v".to_owned(),
                    empty_dir: Some(EmptyDirVolumeSource::default()),
                    ..Volume::default()
                }]),
                ..PodSpec::default()
            }),
            status: None,
        }),
        status: Arc::new(PodStatus {
            start_time: Some(ApiTime(jiff::Timestamp::now())),
            ..PodStatus::default()
        }),
        containers: std::collections::BTreeMap::new(),
    });
    let flags = Flags {
        hostname_override: Some("n1".to_owned()),
        node_ips: vec![[10, 0, 0, 1].into()],
        root_dir: Some(dir.to_owned()),
        ..Flags::default()
    };
    let mut config = config::load(&flags).unwrap();
    config.runtime_root = dir.to_owned();
    let volume = dir.to_owned();
    let volumes: VolumePaths = Arc::new(move |_| {
        vec![VolumePlace {
            name: "v".to_owned(),
            path: volume.clone(),
            fill: Fill::Ask,
        }]
    });
    Stats::new(runtime, Arc::new(config), index, volumes)
}

#[tokio::test]
async fn a_summary_tells_of_node_pods_containers_and_volumes() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), vec![1u8; 50_000]).unwrap();
    let stats = node(dir.path()).await;
    let summary = serde_json::to_value(stats.summary()).unwrap();
    let node = &summary["node"];
    assert_eq!(node["nodeName"], "n1");
    assert!(node["memory"]["workingSetBytes"].as_u64().unwrap() > 0);
    assert!(node["fs"]["capacityBytes"].as_u64().unwrap() > 0);
    assert!(node["runtime"]["imageFs"]["usedBytes"].is_u64());
    assert!(node["rlimit"]["maxpid"].as_i64().unwrap() > 0);
    let pod = &summary["pods"][0];
    assert_eq!(pod["podRef"]["name"], "p");
    assert_eq!(pod["process_stats"]["process_count"], 2);
    assert_eq!(pod["cpu"]["usageCoreNanoSeconds"], 6_000_000_000_u64);
    let container = &pod["containers"][0];
    assert_eq!(container["name"], "c");
    assert_eq!(container["memory"]["availableBytes"], 9 << 20);
    assert_eq!(pod["volume"][0]["name"], "v");
    let used = pod["volume"][0]["usedBytes"].as_u64().unwrap();
    assert!(used >= 50_000, "{used}");
    assert!(pod["ephemeral-storage"]["usedBytes"].as_u64().unwrap() >= used);
    let small = serde_json::to_value(stats.cpu_and_memory()).unwrap();
    assert!(small["node"].get("fs").is_none() && small["pods"][0].get("volume").is_none());
}

#[tokio::test]
async fn the_resource_page_has_the_stable_names_and_labels() {
    let dir = tempfile::tempdir().unwrap();
    let stats = node(dir.path()).await;
    let page = resource::page(&stats.cpu_and_memory()).render();
    let found = parse(&page).unwrap();
    let cpu = found.named("container_cpu_usage_seconds_total");
    assert_eq!(cpu.len(), 1);
    let labels: Vec<_> = cpu[0]
        .labels
        .iter()
        .map(|(k, v)| format!("{k}={v}"))
        .collect();
    assert_eq!(labels, ["container=c", "namespace=ns", "pod=p"]);
    assert!((cpu[0].value - 5.0).abs() < 1e-9 && cpu[0].at_ms.is_some());
    for name in [
        "node_cpu_usage_seconds_total",
        "node_memory_working_set_bytes",
        "node_swap_usage_bytes",
        "pod_cpu_usage_seconds_total",
        "pod_memory_working_set_bytes",
        "pod_swap_usage_bytes",
        "container_memory_working_set_bytes",
        "container_swap_usage_bytes",
        "resource_scrape_error",
    ] {
        assert_eq!(found.named(name).len(), 1, "{name}");
    }
}

#[tokio::test]
async fn the_cadvisor_page_is_one_a_scraper_accepts() {
    let dir = tempfile::tempdir().unwrap();
    let stats = node(dir.path()).await;
    let page = stats.cadvisor(&crate::node::machine::machine()).render();
    let found = parse(&page).unwrap();
    assert_eq!(found.named("machine_cpu_cores").len(), 1);
    let root = found.named("container_cpu_usage_seconds_total");
    assert!(
        root.iter()
            .any(|s| s.labels["id"] == "/" && s.labels["cpu"] == "total")
    );
}
