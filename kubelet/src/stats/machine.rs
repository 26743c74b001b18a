//! The machine's own numbers, from `/proc`: what a cgroup at the root does not tell on every
//! kernel. Blocking reads of small files; parsing is pure.

use linux::cgroup::{Pressure, pressure};
use std::path::Path;

/// Numbers of the moment.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MachineUsage {
    /// CPU time used since boot, nanoseconds.
    pub cpu_usage_ns: u64,
    /// Of it in user mode.
    pub cpu_user_ns: u64,
    /// Memory there is, bytes.
    pub memory_total: u64,
    /// Memory not free, bytes.
    pub memory_usage: u64,
    /// Memory not free but for inactive file cache, bytes.
    pub memory_working_set: u64,
    /// Anonymous memory, bytes.
    pub memory_rss: u64,
    /// Page cache, bytes.
    pub memory_cache: u64,
    /// Files mapped, bytes.
    pub memory_mapped: u64,
    /// Page faults.
    pub page_faults: u64,
    /// Major page faults.
    pub major_page_faults: u64,
    /// Swap there is, bytes.
    pub swap_total: u64,
    /// Swap in use, bytes.
    pub swap_usage: u64,
    /// Standing still for want of CPU, memory and IO; none on kernels that do not tell.
    pub pressure: Option<[Pressure; 3]>,
}

fn text(path: &str) -> String {
    std::fs::read_to_string(Path::new(path)).unwrap_or_default()
}

/// Seconds since the epoch at which the machine was started.
pub fn boot_time_s() -> Option<i64> {
    boot_time(&text("/proc/stat"))
}

fn boot_time(stat: &str) -> Option<i64> {
    let line = stat.lines().find_map(|l| l.strip_prefix("btime "))?;
    line.trim().parse().ok()
}

/// Reads all of it.
pub fn usage() -> MachineUsage {
    let read = |name: &str| {
        let text = std::fs::read_to_string(Path::new("/proc/pressure").join(name)).ok()?;
        Some(pressure(&text))
    };
    let stalls = || Some([read("cpu")?, read("memory")?, read("io")?]);
    MachineUsage {
        pressure: stalls(),
        ..parse(
            &text("/proc/stat"),
            &text("/proc/meminfo"),
            &text("/proc/vmstat"),
            linux::sysconf::clock_ticks(),
        )
    }
}

fn parse(stat: &str, memory: &str, vm: &str, ticks: u64) -> MachineUsage {
    let cpu: Vec<u64> = stat
        .lines()
        .find_map(|l| l.strip_prefix("cpu "))
        .map(|l| {
            l.split_whitespace()
                .filter_map(|n| n.parse().ok())
                .collect()
        })
        .unwrap_or_default();
    let tick_ns = 1_000_000_000 / ticks.max(1);
    // user nice system idle iowait irq softirq steal; guests are within user and nice.
    let sum = |fields: &[usize]| -> u64 {
        let ticks = fields.iter().filter_map(|i| cpu.get(*i));
        ticks.sum::<u64>().saturating_mul(tick_ns)
    };
    let kib = |name: &str| {
        let line = memory
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
        let number = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
        number.unwrap_or(0).saturating_mul(1024)
    };
    let count = |name: &str| {
        let line = vm
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
    };
    let used = kib("MemTotal").saturating_sub(kib("MemFree"));
    MachineUsage {
        cpu_usage_ns: sum(&[0, 1, 2, 5, 6]),
        cpu_user_ns: sum(&[0, 1]),
        memory_total: kib("MemTotal"),
        memory_usage: used,
        memory_working_set: used.saturating_sub(kib("Inactive(file)")),
        memory_rss: kib("AnonPages"),
        memory_cache: kib("Cached"),
        memory_mapped: kib("Mapped"),
        page_faults: count("pgfault"),
        major_page_faults: count("pgmajfault"),
        swap_total: kib("SwapTotal"),
        swap_usage: kib("SwapTotal").saturating_sub(kib("SwapFree")),
        pressure: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_texts_are_read() {
        let found = parse(
            "cpu  10 1 5 1000 3 2 2 9 0 0\ncpu0 1 1 1\nbtime 1700000000\n",
            "MemTotal: 100 kB\nMemFree: 40 kB\nInactive: 9 kB\nInactive(file): 10 kB\n\
             AnonPages: 20 kB\nSwapTotal: 8 kB\nSwapFree: 6 kB\n",
            "pgfault 12\npgfaultx 1\npgmajfault 3\n",
            100,
        );
        assert_eq!(found.cpu_usage_ns, 20 * 10_000_000);
        assert_eq!(found.cpu_user_ns, 11 * 10_000_000);
        assert_eq!(found.memory_usage, 60 * 1024);
        assert_eq!(found.memory_working_set, 50 * 1024);
        assert_eq!((found.page_faults, found.major_page_faults), (12, 3));
        assert_eq!(found.swap_usage, 2 * 1024);
        assert_eq!(boot_time("btime 5\n"), Some(5));
    }

    #[test]
    fn this_machine_has_done_something() {
        let found = usage();
        assert!(found.cpu_usage_ns > 0 && found.memory_working_set > 0);
        assert!(found.memory_working_set <= found.memory_usage);
        assert!(boot_time_s().unwrap() > 0);
    }

    proptest::proptest! {
        #[test]
        fn no_text_is_too_strange(a in ".{0,80}", b in ".{0,80}", c in ".{0,80}") {
            parse(&a, &b, &c, 0);
            boot_time(&a);
        }
    }
}
