//! Constants of the running kernel that files of `/proc` are counted in.

use nix::unistd::{SysconfVar, sysconf};

fn value(variable: SysconfVar, usual: u64) -> u64 {
    let found = sysconf(variable).ok().flatten();
    found.and_then(|n| u64::try_from(n).ok()).unwrap_or(usual)
}

/// Bytes of a page of memory.
#[must_use]
pub fn page_size() -> u64 {
    value(SysconfVar::PAGE_SIZE, 4096)
}

/// Ticks per second in `/proc/<pid>/stat` and `/proc/stat`.
#[must_use]
pub fn clock_ticks() -> u64 {
    value(SysconfVar::CLK_TCK, 100)
}

#[cfg(test)]
mod tests {
    #[test]
    fn pages_are_powers_of_two_and_time_ticks() {
        assert!(super::page_size().is_power_of_two());
        assert!(super::clock_ticks() > 0);
    }
}
