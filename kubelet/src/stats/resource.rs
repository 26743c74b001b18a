//! `/metrics/resource`: what metrics-server and autoscalers scrape. Names, labels and times are
//! the stock kubelet's (a stable interface, KEP-727). Pure.

use super::summary::{ContainerStats, CpuStats, MemoryStats, PodStats, Summary, SwapStats, Time};
use crate::metrics::text::{Family, Labels, Page};

const NODE_CPU: Family = Family::counter(
    "node_cpu_usage_seconds_total",
    "CPU time the node used in seconds.",
);
const NODE_MEMORY: Family = Family::gauge(
    "node_memory_working_set_bytes",
    "Working set of the node in bytes.",
);
const NODE_SWAP: Family =
    Family::gauge("node_swap_usage_bytes", "Swap in use on the node in bytes.");
const CONTAINER_CPU: Family = Family::counter(
    "container_cpu_usage_seconds_total",
    "CPU time the container used in seconds.",
);
const CONTAINER_MEMORY: Family = Family::gauge(
    "container_memory_working_set_bytes",
    "Working set of the container in bytes.",
);
const CONTAINER_SWAP: Family = Family::gauge(
    "container_swap_usage_bytes",
    "Swap in use by the container in bytes.",
);
const CONTAINER_SWAP_LIMIT: Family = Family::gauge(
    "container_swap_limit_bytes",
    "Swap the container may use in bytes.",
);
const CONTAINER_START: Family = Family::gauge(
    "container_start_time_seconds",
    "Start of the container in seconds since the epoch.",
);
const POD_CPU: Family = Family::counter(
    "pod_cpu_usage_seconds_total",
    "CPU time the pod used in seconds.",
);
const POD_MEMORY: Family = Family::gauge(
    "pod_memory_working_set_bytes",
    "Working set of the pod in bytes.",
);
const POD_SWAP: Family = Family::gauge("pod_swap_usage_bytes", "Swap in use by the pod in bytes.");
const ERROR: Family = Family::gauge(
    "resource_scrape_error",
    "1 when the metrics of containers could not be had, else 0.",
);

/// The page.
pub fn page(summary: &Summary) -> Page {
    let mut page = Page::new();
    let node = &summary.node;
    cpu(&mut page, NODE_CPU, &[], node.cpu.as_ref());
    memory(&mut page, NODE_MEMORY, &[], node.memory.as_ref());
    swap(&mut page, NODE_SWAP, &[], node.swap.as_ref());
    for pod in &summary.pods {
        for stats in &pod.containers {
            container(&mut page, pod, stats);
        }
        let labels = [
            ("namespace", pod.pod_ref.namespace.as_str()),
            ("pod", pod.pod_ref.name.as_str()),
        ];
        cpu(&mut page, POD_CPU, &labels, pod.cpu.as_ref());
        memory(&mut page, POD_MEMORY, &labels, pod.memory.as_ref());
        swap(&mut page, POD_SWAP, &labels, pod.swap.as_ref());
    }
    page.put(ERROR, &[], 0.0);
    page
}

fn container(page: &mut Page, pod: &PodStats, stats: &ContainerStats) {
    let labels = [
        ("container", stats.name.as_str()),
        ("namespace", pod.pod_ref.namespace.as_str()),
        ("pod", pod.pod_ref.name.as_str()),
    ];
    if stats.start_time.0.as_second() > 0 {
        page.put(CONTAINER_START, &labels, stats.start_time.seconds());
    }
    cpu(page, CONTAINER_CPU, &labels, stats.cpu.as_ref());
    memory(page, CONTAINER_MEMORY, &labels, stats.memory.as_ref());
    swap(page, CONTAINER_SWAP, &labels, stats.swap.as_ref());
    let Some(swap) = &stats.swap else { return };
    if let Some(left) = swap.swap_available_bytes {
        let limit = left + swap.swap_usage_bytes.unwrap_or(0);
        put(page, CONTAINER_SWAP_LIMIT, &labels, limit as f64, swap.time);
    }
}

fn put(page: &mut Page, family: Family, labels: Labels<'_>, value: f64, at: Time) {
    page.put_at(family, labels, value, at.0.as_millisecond());
}

fn cpu(page: &mut Page, family: Family, labels: Labels<'_>, stats: Option<&CpuStats>) {
    if let Some((stats, used)) = stats.and_then(|s| Some((s, s.usage_core_nano_seconds?))) {
        put(page, family, labels, used as f64 / 1e9, stats.time);
    }
}

fn memory(page: &mut Page, family: Family, labels: Labels<'_>, stats: Option<&MemoryStats>) {
    if let Some((stats, used)) = stats.and_then(|s| Some((s, s.working_set_bytes?))) {
        put(page, family, labels, used as f64, stats.time);
    }
}

fn swap(page: &mut Page, family: Family, labels: Labels<'_>, stats: Option<&SwapStats>) {
    if let Some((stats, used)) = stats.and_then(|s| Some((s, s.swap_usage_bytes?))) {
        put(page, family, labels, used as f64, stats.time);
    }
}
