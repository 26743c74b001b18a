//! Counters of the agent itself, by the stock kubelet's names so that its dashboards work.
//!
//! [`metrics()`] is the one place of the agent that is global on purpose: everybody counts, only
//! the HTTPS server reads, and nothing is ever decided by a count. Counting is an atomic
//! addition. What is a fact of the moment (running pods, sizes of volumes) is not counted here
//! but looked up when somebody asks; see [`crate::server`].

mod instruments;
#[cfg(test)]
pub(crate) mod parse;
mod process;
pub mod text;

pub use instruments::{Counter, Gauge, Histogram, Instrument, Labelled};
pub use process::process;

use std::sync::LazyLock;
use std::time::Duration;
use text::{Family, Page};

/// Prometheus' own default buckets, seconds.
const DEFAULT: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];
/// From half a second to an hour.
const POD_START: &[f64] = &[
    0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 20.0, 30.0, 45.0, 60.0, 120.0, 180.0, 240.0,
    300.0, 360.0, 480.0, 600.0, 900.0, 1200.0, 1800.0, 2700.0, 3600.0,
];
/// 5 ms times 2.5 to the n.
const RUNTIME: &[f64] = &[
    0.005,
    0.0125,
    0.03125,
    0.078_125,
    0.195_312_5,
    0.488_281_25,
    1.220_703_125,
    3.051_757_812_5,
    7.629_394_531_25,
    19.073_486_328_125,
    47.683_715_820_312_5,
    119.209_289_550_781_25,
    298.023_223_876_953_1,
    745.058_059_692_382_8,
];
const STATUS: &[f64] = &[0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0];
const CONTAINERS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0];
const IMAGE_PULL: &[f64] = &[
    1.0, 5.0, 10.0, 20.0, 30.0, 60.0, 180.0, 300.0, 600.0, 900.0, 1200.0, 1800.0, 2700.0, 3600.0,
];
const CLIENT: &[f64] = &[
    0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0,
];

/// The agent's counters.
#[derive(Debug)]
pub struct Metrics {
    /// Sandboxes made.
    pub started_pods: Counter,
    /// Sandboxes that could not be made.
    pub started_pods_errors: Counter,
    /// Sandboxes made with users of their own, tries included.
    pub started_user_pods: Counter,
    /// Those whose sandbox or first containers could not be made.
    pub started_user_pods_errors: Counter,
    /// By `container_type` (`container`, `init_container`, `ephemeral_container`).
    pub started_containers: Labelled<Counter, 1>,
    /// By `container_type` and waiting reason.
    pub started_containers_errors: Labelled<Counter, 2>,
    /// By `container_type`, exit code and reason.
    pub terminated_containers: Labelled<Counter, 3>,
    /// By the size of a pod.
    pub containers_per_pod: Histogram,
    /// From the first sight of a pod to its first look, seconds.
    pub pod_worker_start: Histogram,
    /// One look of a worker, seconds, by `create`, `update` or `sync`.
    pub pod_worker: Labelled<Histogram, 1>,
    /// From the first sight of a pod to all its containers running, seconds.
    pub pod_start: Histogram,
    /// From the creation of a pod to all its containers running, without pulls, seconds.
    pub pod_start_sli: Histogram,
    /// From the creation of a pod to all its containers running, seconds.
    pub pod_start_total: Histogram,
    /// From a change of a pod's status to the apiserver knowing it, seconds.
    pub pod_status_sync: Histogram,
    /// Operations of the engine, seconds, by `operation_type`; the counter comes from it.
    pub runtime_operations: Labelled<Histogram, 1>,
    /// Those that failed.
    pub runtime_errors: Labelled<Counter, 1>,
    /// Image pulls, seconds, by size.
    pub image_pull: Labelled<Histogram, 1>,
    /// Images collected, by `reason` (`age`, `space`).
    pub image_collected: Labelled<Counter, 1>,
    /// Pods the node refused, by reason.
    pub admission_rejections: Labelled<Counter, 1>,
    /// Evictions by signal.
    pub evictions: Labelled<Counter, 1>,
    /// Preemptions by resource.
    pub preemptions: Labelled<Counter, 1>,
    /// Streaming requests by WebSocket, by `exec`, `attach`, `portforward`.
    pub websocket_requests: Labelled<Counter, 1>,
    /// HTTP requests: method, path, server_type, long_running.
    pub http_requests: Labelled<Counter, 4>,
    /// Their duration, seconds.
    pub http_durations: Labelled<Histogram, 4>,
    /// Those under way.
    pub http_inflight: Labelled<Gauge, 4>,
    /// Requests to the apiserver: code, host, method.
    pub client_requests: Labelled<Counter, 3>,
    /// Their duration, seconds: host, verb.
    pub client_durations: Labelled<Histogram, 2>,
    /// Health checks: name, status, type.
    pub healthchecks: Labelled<Counter, 3>,
    /// The newest health: name, type.
    pub health: Labelled<Gauge, 2>,
    /// Probes: probe_type, result, container, pod, namespace, pod_uid.
    pub probes: Labelled<Counter, 6>,
    /// Their duration, seconds: probe_type, container, pod, namespace.
    pub probe_durations: Labelled<Histogram, 4>,
}

fn default_histogram() -> Histogram {
    Histogram::new(DEFAULT)
}

impl Default for Metrics {
    fn default() -> Self {
        const HTTP: [&str; 4] = ["method", "path", "server_type", "long_running"];
        let operation = ["operation_type"];
        Self {
            started_pods: Counter::default(),
            started_pods_errors: Counter::default(),
            started_user_pods: Counter::default(),
            started_user_pods_errors: Counter::default(),
            started_containers: Labelled::counter(
                "kubelet_started_containers_total",
                "Containers started.",
                ["container_type"],
            ),
            started_containers_errors: Labelled::counter(
                "kubelet_started_containers_errors_total",
                "Containers that could not be started.",
                ["container_type", "code"],
            ),
            terminated_containers: Labelled::counter(
                "kubelet_terminated_containers_total",
                "Containers that ended.",
                ["container_type", "exit_code", "reason"],
            ),
            containers_per_pod: Histogram::new(CONTAINERS),
            pod_worker_start: default_histogram(),
            pod_worker: Labelled::histogram(
                "kubelet_pod_worker_duration_seconds",
                "Duration of one look at a pod, by operation: create, update or sync.",
                operation,
                default_histogram,
            ),
            pod_start: Histogram::new(POD_START),
            pod_start_sli: Histogram::new(POD_START),
            pod_start_total: Histogram::new(POD_START),
            pod_status_sync: Histogram::new(STATUS),
            runtime_operations: Labelled::histogram(
                "kubelet_runtime_operations_duration_seconds",
                "Duration of operations of the runtime, by operation.",
                operation,
                || Histogram::new(RUNTIME),
            ),
            runtime_errors: Labelled::counter(
                "kubelet_runtime_operations_errors_total",
                "Operations of the runtime that failed, by operation.",
                operation,
            ),
            image_pull: Labelled::histogram(
                "kubelet_image_pull_duration_seconds",
                "Duration of image pulls, by size of the image.",
                ["image_size_in_bytes"],
                || Histogram::new(IMAGE_PULL),
            ),
            image_collected: Labelled::counter(
                "kubelet_image_garbage_collected_total",
                "Images removed to make room or for their age.",
                ["reason"],
            ),
            admission_rejections: Labelled::counter(
                "kubelet_admission_rejections_total",
                "Pods this node refused, by reason.",
                ["reason"],
            ),
            evictions: Labelled::counter(
                "kubelet_evictions",
                "Pods evicted, by signal.",
                ["eviction_signal"],
            ),
            preemptions: Labelled::counter(
                "kubelet_preemptions",
                "Pods ended in favour of critical ones, by resource.",
                ["preemption_signal"],
            ),
            websocket_requests: Labelled::counter(
                "kubelet_websocket_streaming_requests_total",
                "Streaming requests that came by WebSocket.",
                ["subresource"],
            ),
            http_requests: Labelled::counter(
                "kubelet_http_requests_total",
                "HTTP requests received.",
                HTTP,
            ),
            http_durations: Labelled::histogram(
                "kubelet_http_requests_duration_seconds",
                "Duration of HTTP requests.",
                HTTP,
                default_histogram,
            ),
            http_inflight: Labelled::gauge(
                "kubelet_http_inflight_requests",
                "HTTP requests under way.",
                HTTP,
            ),
            client_requests: Labelled::counter(
                "rest_client_requests_total",
                "Requests to the apiserver, by status code, method and host.",
                ["code", "host", "method"],
            ),
            client_durations: Labelled::histogram(
                "rest_client_request_duration_seconds",
                "Duration of requests to the apiserver up to the head of the answer.",
                ["host", "verb"],
                || Histogram::new(CLIENT),
            ),
            healthchecks: Labelled::counter(
                "kubernetes_healthchecks_total",
                "Results of all health checks.",
                ["name", "status", "type"],
            ),
            health: Labelled::gauge(
                "kubernetes_healthcheck",
                "Result of the newest health check.",
                ["name", "type"],
            ),
            probes: Labelled::counter(
                "prober_probe_total",
                "Liveness, readiness and startup probes of containers, by result.",
                [
                    "probe_type",
                    "result",
                    "container",
                    "pod",
                    "namespace",
                    "pod_uid",
                ],
            ),
            probe_durations: Labelled::histogram(
                "prober_probe_duration_seconds",
                "Duration of probes.",
                ["probe_type", "container", "pod", "namespace"],
                default_histogram,
            ),
        }
    }
}

/// The agent's counters.
pub fn metrics() -> &'static Metrics {
    static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::default);
    &METRICS
}

/// Counts an operation of the engine; `cgroup_…` ones are those on cgroups.
pub fn runtime_operation(operation: &'static str, took: Duration, success: bool) {
    let all = metrics();
    all.runtime_operations.with([operation]).observe_time(took);
    if !success {
        all.runtime_errors.with([operation]).inc();
    }
}

/// The label of an image's size.
pub fn image_size(bytes: u64) -> &'static str {
    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    match bytes {
        0 => "N/A",
        _ if bytes <= 10 * MIB => "0-10MB",
        _ if bytes <= 100 * MIB => "10MB-100MB",
        _ if bytes <= 500 * MIB => "100MB-500MB",
        _ if bytes <= GIB => "500MB-1GB",
        _ if bytes <= 5 * GIB => "1GB-5GB",
        _ if bytes <= 10 * GIB => "5GB-10GB",
        _ if bytes <= 20 * GIB => "10GB-20GB",
        _ if bytes <= 30 * GIB => "20GB-30GB",
        _ if bytes <= 40 * GIB => "30GB-40GB",
        _ if bytes <= 60 * GIB => "40GB-60GB",
        _ if bytes <= 100 * GIB => "60GB-100GB",
        _ => "GT100GB",
    }
}

/// Writes what `/metrics` shows of the counters.
pub fn write(all: &Metrics, page: &mut Page) {
    let counter = |page: &mut Page, name, help, counter: &Counter| {
        page.put(Family::counter(name, help), &[], counter.get() as f64);
    };
    let histogram = |page: &mut Page, name, help, histogram: &Histogram| {
        page.put_histogram(Family::histogram(name, help), &[], histogram);
    };
    counter(
        page,
        "kubelet_started_pods_total",
        "Pods started.",
        &all.started_pods,
    );
    counter(
        page,
        "kubelet_started_pods_errors_total",
        "Pods that could not be started.",
        &all.started_pods_errors,
    );
    counter(
        page,
        "kubelet_started_user_namespaced_pods_total",
        "Pods with user namespaces started.",
        &all.started_user_pods,
    );
    counter(
        page,
        "kubelet_started_user_namespaced_pods_errors_total",
        "Pods with user namespaces that could not be started.",
        &all.started_user_pods_errors,
    );
    for (name, help, one) in [
        (
            "kubelet_containers_per_pod_count",
            "Containers per pod.",
            &all.containers_per_pod,
        ),
        (
            "kubelet_pod_worker_start_duration_seconds",
            "Duration from the first sight of a pod to the start of its worker.",
            &all.pod_worker_start,
        ),
        (
            "kubelet_pod_start_duration_seconds",
            "Duration from the first sight of a pod to all its containers running.",
            &all.pod_start,
        ),
        (
            "kubelet_pod_start_sli_duration_seconds",
            "Duration from the creation of a pod to all its containers running, without the time \
             to pull images.",
            &all.pod_start_sli,
        ),
        (
            "kubelet_pod_start_total_duration_seconds",
            "Duration from the creation of a pod to all its containers running.",
            &all.pod_start_total,
        ),
        (
            "kubelet_pod_status_sync_duration_seconds",
            "Duration from a change of a pod's status to its arrival at the apiserver.",
            &all.pod_status_sync,
        ),
    ] {
        histogram(page, name, help, one);
    }
    all.started_containers.write(page);
    all.started_containers_errors.write(page);
    all.terminated_containers.write(page);
    all.pod_worker.write(page);
    all.runtime_operations.write(page);
    all.runtime_operations.write_counts(
        Family::counter(
            "kubelet_runtime_operations_total",
            "Operations of the runtime, by operation.",
        ),
        page,
    );
    all.runtime_errors.write(page);
    all.image_pull.write(page);
    all.image_collected.write(page);
    all.admission_rejections.write(page);
    all.evictions.write(page);
    all.preemptions.write(page);
    all.websocket_requests.write(page);
    all.http_requests.write(page);
    all.http_durations.write(page);
    all.http_inflight.write(page);
    all.client_requests.write(page);
    all.client_durations.write(page);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_page_is_one_a_scraper_accepts() {
        let all = Metrics::default();
        all.started_pods.inc();
        all.started_containers.with(["container"]).inc();
        all.runtime_operations
            .with(["start_container"])
            .observe(0.02);
        all.http_requests
            .with(["GET", "pods", "readwrite", "false"])
            .inc();
        all.pod_start.observe(0.7);
        let mut page = Page::new();
        write(&all, &mut page);
        let found = parse::parse(&page.render()).unwrap();
        assert_eq!(
            found.types["kubelet_pod_start_duration_seconds"],
            "histogram"
        );
        let operations = found.named("kubelet_runtime_operations_total");
        assert_eq!(operations[0].labels["operation_type"], "start_container");
        assert!((operations[0].value - 1.0).abs() < 1e-9);
    }

    #[test]
    fn image_sizes_have_the_documented_labels() {
        assert_eq!(image_size(0), "N/A");
        assert_eq!(image_size(1), "0-10MB");
        assert_eq!(image_size(10 << 20), "0-10MB");
        assert_eq!(image_size((10 << 20) + 1), "10MB-100MB");
        assert_eq!(image_size(u64::MAX), "GT100GB");
    }
}
