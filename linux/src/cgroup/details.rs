//! What only thorough readers of a cgroup ask for (a metrics scrape), and the texts it is in.
//!
//! References: kernel `admin-guide/cgroup-v2` (`cpu.stat`, `io.stat`, `*.pressure`),
//! `admin-guide/cgroup-v1/{memory,blkio-controller}`, `accounting/psi`.

use std::collections::BTreeMap;

/// How long tasks stood still for want of a resource.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Stall {
    /// Share of the last 10 seconds, percent.
    pub avg10: f64,
    /// Share of the last minute, percent.
    pub avg60: f64,
    /// Share of the last five minutes, percent.
    pub avg300: f64,
    /// In all, microseconds.
    pub total_us: u64,
}

/// One pressure file.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pressure {
    /// Some task stood still.
    pub some: Stall,
    /// All tasks stood still.
    pub full: Stall,
}

/// Traffic with one block device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceIo {
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// Counters and limits beyond [`super::Stats`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Details {
    /// CPU time in user mode, nanoseconds.
    pub cpu_user_ns: u64,
    /// CPU time in the kernel, nanoseconds.
    pub cpu_system_ns: u64,
    /// Periods of a quota that have passed.
    pub cpu_periods: u64,
    /// Periods in which the quota was used up.
    pub cpu_throttled_periods: u64,
    /// Time spent throttled, nanoseconds.
    pub cpu_throttled_ns: u64,
    /// `cpu.shares`, or the shares a v2 weight stands for.
    pub cpu_shares: u64,
    /// Quota per period, microseconds; none without one.
    pub cpu_quota_us: Option<u64>,
    /// Period, microseconds.
    pub cpu_period_us: u64,
    /// Page cache, bytes.
    pub memory_cache: u64,
    /// Files mapped, bytes.
    pub memory_mapped_file: u64,
    /// Active file cache, bytes.
    pub memory_active_file: u64,
    /// Kernel memory, bytes.
    pub memory_kernel: u64,
    /// Greatest use so far, bytes.
    pub memory_max_usage: u64,
    /// How often the limit was hit.
    pub memory_failures: u64,
    /// Memory and swap together in bytes, none when unlimited.
    pub memory_swap_limit: Option<u64>,
    /// Processes that the kernel killed for memory.
    pub oom_kills: u64,
    /// Processes in the cgroup itself.
    pub processes: Vec<i32>,
    /// Threads there may be; none when unlimited.
    pub threads_max: Option<u64>,
    /// By device number (major, minor).
    pub io: BTreeMap<(u32, u32), DeviceIo>,
}

/// Parses a pressure file; lines that are not understood count as nothing.
#[must_use]
pub fn pressure(text: &str) -> Pressure {
    let mut found = Pressure::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let stall = match words.next() {
            Some("some") => &mut found.some,
            Some("full") => &mut found.full,
            Some(_) | None => continue,
        };
        for (name, value) in words.filter_map(|w| w.split_once('=')) {
            let share = || value.parse().unwrap_or(0.0);
            match name {
                "avg10" => stall.avg10 = share(),
                "avg60" => stall.avg60 = share(),
                "avg300" => stall.avg300 = share(),
                "total" => stall.total_us = value.parse().unwrap_or(0),
                _ => {}
            }
        }
    }
    found
}

fn device(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Parses `io.stat` of v2.
pub(super) fn io_v2(text: &str) -> BTreeMap<(u32, u32), DeviceIo> {
    let mut found: BTreeMap<_, DeviceIo> = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some(number) = words.next().and_then(device) else {
            continue;
        };
        let entry = found.entry(number).or_default();
        for (name, value) in words.filter_map(|w| w.split_once('=')) {
            let value = value.parse().unwrap_or(0);
            match name {
                "rbytes" => entry.read_bytes = value,
                "wbytes" => entry.write_bytes = value,
                "rios" => entry.reads = value,
                "wios" => entry.writes = value,
                _ => {}
            }
        }
    }
    found
}

/// Parses `blkio.throttle.io_service_bytes` and `…io_serviced` of v1.
pub(super) fn io_v1(bytes: &str, operations: &str) -> BTreeMap<(u32, u32), DeviceIo> {
    let mut found: BTreeMap<_, DeviceIo> = BTreeMap::new();
    for (text, counts_bytes) in [(bytes, true), (operations, false)] {
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [number, operation, value] = words.as_slice() else {
                continue;
            };
            let (Some(number), Ok(value)) = (device(number), value.parse()) else {
                continue;
            };
            let entry = found.entry(number).or_default();
            match (*operation, counts_bytes) {
                ("Read", true) => entry.read_bytes = value,
                ("Write", true) => entry.write_bytes = value,
                ("Read", false) => entry.reads = value,
                ("Write", false) => entry.writes = value,
                _ => {}
            }
        }
    }
    found
}

/// `cpu.shares` for a `cpu.weight`: the inverse of [`super::weight_of_shares`], to the nearest.
pub(super) fn shares_of_weight(weight: u64) -> u64 {
    let (mut low, mut high) = (2u64, 262_144u64);
    while low < high {
        let middle = u64::midpoint(low, high);
        if super::weight_of_shares(middle) < weight {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    // The default weight stands for the default shares, not for the first that round up to it.
    if weight == 100 { 1024 } else { low }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pressure_file_is_read() {
        let text = "some avg10=1.50 avg60=0.25 avg300=0.00 total=12345\n\
                    full avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        let found = pressure(text);
        assert_eq!(found.some.total_us, 12_345);
        assert!((found.some.avg10 - 1.5).abs() < 1e-9);
        assert_eq!(found.full.total_us, 7);
        assert_eq!(pressure("garbage\nsome avg10\n"), Pressure::default());
    }

    #[test]
    fn both_kernels_tell_of_the_same_traffic() {
        let v2 = io_v2("8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0\nbad line\n");
        let v1 = io_v1(
            "8:0 Read 10\n8:0 Write 20\n8:0 Sync 30\nTotal 30\n",
            "8:0 Read 1\n8:0 Write 2\nTotal 3\n",
        );
        assert_eq!(v1, v2);
        assert_eq!(v1[&(8, 0)].write_bytes, 20);
    }

    #[test]
    fn weights_become_shares_that_become_the_same_weight() {
        assert_eq!(shares_of_weight(100), 1024);
        assert_eq!(shares_of_weight(1), 2);
        for weight in [1, 2, 39, 100, 1000, 10_000] {
            let shares = shares_of_weight(weight);
            assert_eq!(super::super::weight_of_shares(shares), weight, "{weight}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_is_too_strange(text in ".{0,200}") {
            let _ = pressure(&text);
            io_v2(&text);
            io_v1(&text, &text);
        }
    }
}
