//! The families of `/metrics/cadvisor` and how they are written. Pure but for the names of block
//! devices.

use super::collect::Filesystem;
use crate::metrics::text::{Family, Page};
use linux::netdev::Interface;
use runtime::service::{CgroupDetails, CgroupStats};

const fn counter(name: &'static str, help: &'static str) -> Family {
    Family::counter(name, help)
}

pub(super) const fn gauge(name: &'static str, help: &'static str) -> Family {
    Family::gauge(name, help)
}

/// The labels every container sample has.
#[derive(Debug, Clone, Default)]
pub(super) struct Subject {
    pub(super) container: String,
    pub(super) id: String,
    pub(super) image: String,
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) pod: String,
}

/// Puts samples of one subject, taken at one time.
pub(super) struct Writer<'a> {
    pub(super) page: &'a mut Page,
    pub(super) subject: &'a Subject,
    pub(super) at_ms: i64,
}

impl Writer<'_> {
    pub(super) fn put(&mut self, family: Family, value: f64) {
        self.put_with(family, &[], value);
    }

    pub(super) fn put_with(&mut self, family: Family, more: &[(&str, &str)], value: f64) {
        self.sample(family, more, value, Some(self.at_ms));
    }

    /// Specifications carry no time.
    fn spec(&mut self, family: Family, value: f64) {
        self.sample(family, &[], value, None);
    }

    fn sample(&mut self, family: Family, more: &[(&str, &str)], value: f64, at: Option<i64>) {
        let subject = self.subject;
        let mut labels = vec![("container", subject.container.as_str())];
        labels.extend_from_slice(more);
        labels.extend([
            ("id", subject.id.as_str()),
            ("image", subject.image.as_str()),
            ("name", subject.name.as_str()),
            ("namespace", subject.namespace.as_str()),
            ("pod", subject.pod.as_str()),
        ]);
        match at {
            Some(at) => self.page.put_at(family, &labels, value, at),
            None => self.page.put(family, &labels, value),
        }
    }
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

pub(super) fn usage_samples(out: &mut Writer<'_>, stats: &CgroupStats, details: &CgroupDetails) {
    cpu_samples(out, stats, details);
    memory_samples(out, stats, details);
    let faults = counter(
        "container_memory_failures_total",
        "Page faults, by kind and by whether children are counted.",
    );
    for (kind, count) in [
        ("pgfault", stats.page_faults),
        ("pgmajfault", stats.major_page_faults),
    ] {
        for scope in ["container", "hierarchy"] {
            let labels = [("failure_type", kind), ("scope", scope)];
            out.put_with(faults, &labels, count as f64);
        }
    }
    let last_seen = gauge("container_last_seen", "When the container was last seen.");
    out.put(last_seen, (out.at_ms / 1000) as f64);
    let oom = counter(
        "container_oom_events_total",
        "Processes of the container that the kernel killed for memory.",
    );
    out.put(oom, details.oom_kills as f64);
    pressure_samples(out, stats);
}

fn cpu_samples(out: &mut Writer<'_>, stats: &CgroupStats, details: &CgroupDetails) {
    let total = counter(
        "container_cpu_usage_seconds_total",
        "CPU time used in seconds.",
    );
    out.put_with(total, &[("cpu", "total")], seconds(stats.cpu_usage_ns));
    for (family, ns) in [
        (
            counter(
                "container_cpu_user_seconds_total",
                "CPU time used in user mode in seconds.",
            ),
            details.cpu_user_ns,
        ),
        (
            counter(
                "container_cpu_system_seconds_total",
                "CPU time used in the kernel in seconds.",
            ),
            details.cpu_system_ns,
        ),
    ] {
        out.put(family, seconds(ns));
    }
    if details.cpu_quota_us.is_none() {
        return;
    }
    let periods = counter(
        "container_cpu_cfs_periods_total",
        "Periods of the CPU quota that have passed.",
    );
    out.put(periods, details.cpu_periods as f64);
    let throttled = counter(
        "container_cpu_cfs_throttled_periods_total",
        "Periods in which the CPU quota was used up.",
    );
    out.put(throttled, details.cpu_throttled_periods as f64);
    let time = counter(
        "container_cpu_cfs_throttled_seconds_total",
        "Time spent throttled in seconds.",
    );
    out.put(time, seconds(details.cpu_throttled_ns));
}

fn memory_samples(out: &mut Writer<'_>, stats: &CgroupStats, details: &CgroupDetails) {
    for (name, help, bytes) in [
        (
            "container_memory_cache",
            "Page cache in bytes.",
            details.memory_cache,
        ),
        (
            "container_memory_rss",
            "Anonymous memory in bytes.",
            stats.memory_rss_bytes,
        ),
        (
            "container_memory_kernel_usage",
            "Kernel memory in bytes.",
            details.memory_kernel,
        ),
        (
            "container_memory_mapped_file",
            "Files mapped in bytes.",
            details.memory_mapped_file,
        ),
        (
            "container_memory_swap",
            "Swap in use in bytes.",
            stats.swap_usage_bytes,
        ),
        (
            "container_memory_usage_bytes",
            "Memory in use in bytes, caches included.",
            stats.memory_usage_bytes,
        ),
        (
            "container_memory_max_usage_bytes",
            "Greatest memory use so far in bytes.",
            details.memory_max_usage,
        ),
        (
            "container_memory_working_set_bytes",
            "Working set in bytes.",
            stats.memory_working_set_bytes,
        ),
        (
            "container_memory_total_active_file_bytes",
            "Active file cache in bytes.",
            details.memory_active_file,
        ),
        (
            "container_memory_total_inactive_file_bytes",
            "Inactive file cache in bytes.",
            stats.memory_inactive_file_bytes,
        ),
    ] {
        out.put(gauge(name, help), bytes as f64);
    }
    let failures = counter(
        "container_memory_failcnt",
        "How often the memory limit was hit.",
    );
    out.put(failures, details.memory_failures as f64);
}

fn pressure_samples(out: &mut Writer<'_>, stats: &CgroupStats) {
    let Some([cpu, memory, io]) = &stats.pressure else {
        return;
    };
    for (name, help, stall) in [
        (
            "container_pressure_cpu_waiting_seconds_total",
            "Time in which some task waited for CPU in seconds.",
            &cpu.some,
        ),
        (
            "container_pressure_cpu_stalled_seconds_total",
            "Time in which all tasks waited for CPU in seconds.",
            &cpu.full,
        ),
        (
            "container_pressure_memory_waiting_seconds_total",
            "Time in which some task waited for memory in seconds.",
            &memory.some,
        ),
        (
            "container_pressure_memory_stalled_seconds_total",
            "Time in which all tasks waited for memory in seconds.",
            &memory.full,
        ),
        (
            "container_pressure_io_waiting_seconds_total",
            "Time in which some task waited for IO in seconds.",
            &io.some,
        ),
        (
            "container_pressure_io_stalled_seconds_total",
            "Time in which all tasks waited for IO in seconds.",
            &io.full,
        ),
    ] {
        out.put(counter(name, help), stall.total_us as f64 / 1e6);
    }
}

pub(super) fn io_samples(out: &mut Writer<'_>, details: &CgroupDetails) {
    let usage = counter(
        "container_blkio_device_usage_total",
        "Bytes read and written, by device and operation.",
    );
    for ((major, minor), io) in &details.io {
        let device = device_name(*major, *minor);
        let (major, minor) = (major.to_string(), minor.to_string());
        for (operation, bytes) in [("Read", io.read_bytes), ("Write", io.write_bytes)] {
            let labels = [
                ("device", device.as_str()),
                ("major", major.as_str()),
                ("minor", minor.as_str()),
                ("operation", operation),
            ];
            out.put_with(usage, &labels, bytes as f64);
        }
        let label = [("device", device.as_str())];
        for (name, help, count) in [
            (
                "container_fs_reads_bytes_total",
                "Bytes read.",
                io.read_bytes,
            ),
            ("container_fs_reads_total", "Reads.", io.reads),
            (
                "container_fs_writes_bytes_total",
                "Bytes written.",
                io.write_bytes,
            ),
            ("container_fs_writes_total", "Writes.", io.writes),
        ] {
            out.put_with(counter(name, help), &label, count as f64);
        }
    }
}

pub(super) fn spec_samples(
    out: &mut Writer<'_>,
    stats: &CgroupStats,
    details: &CgroupDetails,
    started_ns: i64,
) {
    let threads = gauge("container_threads", "Threads running.");
    out.put(threads, stats.pids as f64);
    // No limit is 0 by cAdvisor's convention.
    let most = gauge(
        "container_threads_max",
        "Threads there may be, 0 for no limit.",
    );
    out.put(most, details.threads_max.unwrap_or(0) as f64);
    let processes = gauge("container_processes", "Processes running.");
    out.put(processes, details.processes.len() as f64);
    if started_ns > 0 {
        let start = gauge(
            "container_start_time_seconds",
            "Start of the container in seconds since the epoch.",
        );
        out.spec(start, (started_ns / 1_000_000_000) as f64);
    }
    if let Some(quota) = details.cpu_quota_us {
        out.spec(
            gauge("container_spec_cpu_quota", "CPU quota in microseconds."),
            quota as f64,
        );
    }
    for (name, help, value) in [
        (
            "container_spec_cpu_period",
            "Period of the CPU quota in microseconds.",
            details.cpu_period_us,
        ),
        (
            "container_spec_cpu_shares",
            "CPU shares.",
            details.cpu_shares,
        ),
        (
            "container_spec_memory_limit_bytes",
            "Memory limit in bytes, 0 for none.",
            stats.memory_limit_bytes.unwrap_or(0),
        ),
        (
            "container_spec_memory_swap_limit_bytes",
            "Limit of memory and swap in bytes, 0 for none.",
            details.memory_swap_limit.unwrap_or(0),
        ),
        (
            "container_spec_memory_reservation_limit_bytes",
            "Memory reservation in bytes, 0 for none.",
            0,
        ),
    ] {
        out.spec(gauge(name, help), value as f64);
    }
}

pub(super) fn network_samples(out: &mut Writer<'_>, interface: &Interface) {
    let label = [("interface", interface.name.as_str())];
    for (name, help, count) in [
        (
            "container_network_receive_bytes_total",
            "Bytes received.",
            interface.rx_bytes,
        ),
        (
            "container_network_receive_packets_total",
            "Packets received.",
            interface.rx_packets,
        ),
        (
            "container_network_receive_packets_dropped_total",
            "Packets dropped on receipt.",
            interface.rx_dropped,
        ),
        (
            "container_network_receive_errors_total",
            "Receive errors.",
            interface.rx_errors,
        ),
        (
            "container_network_transmit_bytes_total",
            "Bytes sent.",
            interface.tx_bytes,
        ),
        (
            "container_network_transmit_packets_total",
            "Packets sent.",
            interface.tx_packets,
        ),
        (
            "container_network_transmit_packets_dropped_total",
            "Packets dropped when sending.",
            interface.tx_dropped,
        ),
        (
            "container_network_transmit_errors_total",
            "Transmit errors.",
            interface.tx_errors,
        ),
    ] {
        out.put_with(counter(name, help), &label, count as f64);
    }
}

pub(super) fn filesystem_samples(out: &mut Writer<'_>, fs: &Filesystem, device: &str, used: u64) {
    let label = [("device", device)];
    for (name, help, value) in [
        (
            "container_fs_usage_bytes",
            "Bytes of the filesystem taken by the container.",
            used,
        ),
        (
            "container_fs_limit_bytes",
            "Bytes of the filesystem the container may take.",
            fs.capacity,
        ),
        (
            "container_fs_inodes_total",
            "Inodes of the filesystem.",
            fs.inodes,
        ),
        (
            "container_fs_inodes_free",
            "Free inodes of the filesystem.",
            fs.inodes_free,
        ),
    ] {
        out.put_with(gauge(name, help), &label, value as f64);
    }
}

/// The name of a block device, else its numbers.
pub(super) fn device_name(major: u32, minor: u32) -> String {
    let link = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}"));
    let name = link
        .ok()
        .and_then(|l| Some(l.file_name()?.to_string_lossy().into_owned()));
    name.map_or_else(|| format!("{major}:{minor}"), |name| format!("/dev/{name}"))
}
