//! What the agent's own process takes, by the names every Prometheus client uses.

use super::text::{Family, Page};
use crate::stats::machine;

/// Writes the `process_…` families. Blocking reads of `/proc/self`.
pub fn process(page: &mut Page) {
    let gauge = |page: &mut Page, name, help, value: f64| {
        page.put(Family::gauge(name, help), &[], value);
    };
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The program's name is in parentheses and may hold anything.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let field = |number: usize| -> f64 {
        // Numbers of proc(5); the third is the first after the name.
        let word = fields.split_whitespace().nth(number - 3);
        word.and_then(|w| w.parse().ok()).unwrap_or(0.0)
    };
    let ticks = linux::sysconf::clock_ticks() as f64;
    page.put(
        Family::counter(
            "process_cpu_seconds_total",
            "User and system CPU time of the process in seconds.",
        ),
        &[],
        (field(14) + field(15)) / ticks,
    );
    gauge(
        page,
        "process_virtual_memory_bytes",
        "Virtual memory of the process in bytes.",
        field(23),
    );
    gauge(
        page,
        "process_resident_memory_bytes",
        "Resident memory of the process in bytes.",
        field(24) * linux::sysconf::page_size() as f64,
    );
    let boot = machine::boot_time_s().unwrap_or(0) as f64;
    gauge(
        page,
        "process_start_time_seconds",
        "Start of the process in seconds since the epoch.",
        boot + field(22) / ticks,
    );
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    gauge(
        page,
        "process_open_fds",
        "Open file descriptors of the process.",
        open as f64,
    );
    let limit = |resource| {
        let limit = rustix::process::getrlimit(resource).current;
        limit.map_or(f64::INFINITY, |n| n as f64)
    };
    gauge(
        page,
        "process_max_fds",
        "File descriptors the process may open.",
        limit(rustix::process::Resource::Nofile),
    );
    gauge(
        page,
        "process_virtual_memory_max_bytes",
        "Virtual memory the process may have in bytes.",
        limit(rustix::process::Resource::As),
    );
}
