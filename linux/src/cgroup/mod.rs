//! Control groups: one trait, two kernels' worth of files (cgroup v1 and v2).
//!
//! A [`Cgroups`] works below a root of its own in every hierarchy and never touches what is
//! beside it. Paths are given relative to that root (`/kubepods/burstable/pod1`).
//!
//! Everything blocks. `kill` and `remove` may wait (bounded) for processes to end: call them
//! from a blocking thread. Nothing moves a process: joining is done by the process itself or by
//! its parent, with [`Cgroups::directories`].
//!
//! References: kernel `admin-guide/cgroup-v1`, `admin-guide/cgroup-v2`.

mod details;
mod devices;
pub mod fake;
mod files;
mod v1;
mod v2;

pub use details::{Details, DeviceIo, Pressure, Stall, pressure};
pub use devices::{DeviceAccess, DeviceKind, DeviceRule, default_devices};
pub use files::{Files, RealFiles};
pub use v1::{Hierarchy, V1};
pub use v2::V2;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long [`Cgroups::kill`] waits for killed processes to be gone.
pub const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Limits to apply; `None` leaves a value as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// `cpu.shares`, 2…262144; on v2 converted by [`weight_of_shares`].
    pub cpu_shares: Option<u64>,
    /// CFS quota in microseconds per period; negative is unlimited.
    pub cpu_quota_us: Option<i64>,
    /// CFS period in microseconds.
    pub cpu_period_us: Option<u64>,
    /// Memory in bytes; negative is unlimited. Swap beyond it is forbidden.
    pub memory_bytes: Option<i64>,
    /// Processes and threads; negative is unlimited.
    pub pids: Option<i64>,
    /// CPUs in list form (`0-3,5`).
    pub cpuset_cpus: Option<String>,
    /// Memory nodes in list form.
    pub cpuset_mems: Option<String>,
    /// Bytes by huge page size as the kernel names it (`2MB`).
    pub hugepages: BTreeMap<String, u64>,
    /// v2 only: file name to content.
    pub unified: BTreeMap<String, String>,
}

/// What a cgroup used.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stats {
    /// CPU time in nanoseconds.
    pub cpu_usage_ns: u64,
    /// Memory in bytes, page cache included.
    pub memory_usage: u64,
    /// Inactive file cache in bytes.
    pub memory_inactive_file: u64,
    /// Anonymous memory in bytes.
    pub memory_anon: u64,
    /// Page faults.
    pub page_faults: u64,
    /// Major page faults.
    pub major_page_faults: u64,
    /// Limit in bytes, none when unlimited.
    pub memory_limit: Option<u64>,
    /// Processes and threads.
    pub pids: u64,
    /// Swap in use in bytes.
    pub swap_usage: u64,
    /// Swap that may be used in bytes, none when unlimited.
    pub swap_limit: Option<u64>,
    /// Standing still for want of CPU, memory and IO; none on kernels that do not tell (v1).
    pub pressure: Option<[Pressure; 3]>,
}

/// A cgroup operation failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The kernel refused.
    #[error("{operation} {path}")]
    Io {
        /// What was tried; for a write, with the value.
        operation: String,
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A path with empty, `.` or `..` parts, or a file name with a slash.
    #[error("cgroup path {0:?} is not acceptable")]
    BadPath(String),
    /// Processes would not die.
    #[error("cgroup {path} still holds processes {pids:?}")]
    Populated {
        /// The cgroup below the root.
        path: String,
        /// Who.
        pids: Vec<i32>,
    },
    /// A limit whose controller this machine lacks.
    #[error("set {what}: the {controller} controller is not available")]
    NoController {
        /// The limit.
        what: &'static str,
        /// Its controller.
        controller: &'static str,
    },
    /// No usable hierarchy is mounted.
    #[error("no cgroup hierarchy with controllers is mounted")]
    NotMounted,
}

impl CgroupError {
    pub(crate) fn io(operation: impl Into<String>, path: &Path, source: io::Error) -> Self {
        Self::Io {
            operation: operation.into(),
            path: path.to_owned(),
            source,
        }
    }
}

/// Cgroups below one root.
pub trait Cgroups: std::fmt::Debug + Send + Sync {
    /// Makes a cgroup and its missing parents below the root. Idempotent.
    ///
    /// # Errors
    /// [`CgroupError`].
    fn ensure(&self, path: &str) -> Result<(), CgroupError>;

    /// Applies limits to an existing cgroup.
    ///
    /// # Errors
    /// [`CgroupError`] naming the first file that was refused.
    fn apply(&self, path: &str, limits: &Limits) -> Result<(), CgroupError>;

    /// Quota, period, memory limit and (v1) shares in force, `-1` for unlimited; none when the
    /// cgroup is not there. What cannot be read stays `None`.
    fn limits(&self, path: &str) -> Option<Limits>;

    /// Allows these devices only.
    ///
    /// # Errors
    /// [`CgroupError`].
    fn set_devices(&self, path: &str, allowed: &[DeviceRule]) -> Result<(), CgroupError>;

    /// The directories a process must join to be in the cgroup: one per v1 hierarchy, or one.
    ///
    /// # Errors
    /// [`CgroupError::BadPath`].
    fn directories(&self, path: &str) -> Result<Vec<PathBuf>, CgroupError>;

    /// Whether it exists (in any hierarchy).
    fn exists(&self, path: &str) -> bool;

    /// Processes in it and below it.
    fn processes(&self, path: &str) -> Vec<i32>;

    /// Names of its children (in any hierarchy), sorted.
    fn children(&self, path: &str) -> Vec<String>;

    /// Kills all processes in it and below it and waits until they are gone. Idempotent.
    ///
    /// # Errors
    /// [`CgroupError::Populated`] after [`KILL_LIMIT`].
    fn kill(&self, path: &str) -> Result<(), CgroupError>;

    /// Removes it with all its children, which must hold no process. Idempotent.
    ///
    /// # Errors
    /// [`CgroupError`]; what could be removed is removed.
    fn remove(&self, path: &str) -> Result<(), CgroupError>;

    /// Usage; none when the cgroup is not there.
    fn stats(&self, path: &str) -> Option<Stats>;

    /// More of it, for those who read everything; none when the cgroup is not there.
    fn details(&self, path: &str) -> Option<Details>;

    /// How often the kernel killed a process in it for memory.
    fn oom_kills(&self, path: &str) -> u64;

    /// Whether this is cgroup v2.
    fn is_v2(&self) -> bool;
}

/// Finds the hierarchies of this machine and works below `root` (`/` or `/some/where`) in each.
///
/// # Errors
/// [`CgroupError::NotMounted`], [`CgroupError::BadPath`], or when the mount table cannot be read.
pub fn detect(root: &str) -> Result<Box<dyn Cgroups>, CgroupError> {
    let table = crate::mountinfo::read()
        .map_err(|e| CgroupError::io("read", Path::new("/proc/self/mountinfo"), e))?;
    let root = relative(root)?;
    let hierarchies = v1::hierarchies(&table);
    if hierarchies.iter().any(|h| h.has("memory") || h.has("cpu")) {
        return Ok(Box::new(V1::new(RealFiles, hierarchies, root)));
    }
    let unified = table.iter().find(|m| m.fstype == "cgroup2");
    let unified = unified.ok_or(CgroupError::NotMounted)?;
    Ok(Box::new(V2::new(
        RealFiles,
        unified.mount_point.clone(),
        root,
    )))
}

/// A path below the root as a relative one; empty for the root itself.
pub(crate) fn relative(path: &str) -> Result<PathBuf, CgroupError> {
    let trimmed = path.trim_matches('/');
    if trimmed.is_empty() {
        return Ok(PathBuf::new());
    }
    let bad = |part: &str| part.is_empty() || part == "." || part == ".." || part.contains('\0');
    if trimmed.split('/').any(bad) {
        return Err(CgroupError::BadPath(path.to_owned()));
    }
    Ok(PathBuf::from(trimmed))
}

/// `cpu.weight` for `cpu.shares`: 2 → 1, 1024 → 100, 262144 → 10000, smooth on a logarithmic
/// scale in between (the mapping of current OCI runtimes, which keeps a default container at
/// the default weight).
#[must_use]
pub fn weight_of_shares(shares: u64) -> u64 {
    let clamped = u32::try_from(shares.clamp(2, 262_144)).unwrap_or(262_144);
    let log = f64::from(clamped).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    let weight = 10f64.powf(exponent).ceil().clamp(1.0, 10_000.0);
    // In range by the clamp, so the cast is exact.
    weight as u64
}

/// The number after `key` in a flat keyed file (`memory.stat`).
pub(crate) fn keyed(content: &str, key: &str) -> Option<u64> {
    content.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        (name == key).then(|| value.trim().parse().ok()).flatten()
    })
}

/// Process ids of a `cgroup.procs` file; 0 stands for one in a foreign PID namespace.
pub(crate) fn pids(content: &str) -> impl Iterator<Item = i32> {
    let parsed = content.lines().filter_map(|line| line.trim().parse().ok());
    parsed.filter(|pid| *pid > 0)
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod path_tests {
    use super::*;

    #[test]
    fn shares_become_weights_with_the_ends_and_the_default_fixed() {
        assert_eq!(weight_of_shares(0), 1);
        assert_eq!(weight_of_shares(2), 1);
        assert_eq!(weight_of_shares(1024), 100);
        assert_eq!(weight_of_shares(262_144), 10_000);
        assert_eq!(weight_of_shares(u64::MAX), 10_000);
    }

    #[test]
    fn a_path_cannot_climb() {
        for bad in ["/a/../b", "a//b", "./a", "/.."] {
            assert!(relative(bad).is_err(), "{bad}");
        }
        assert_eq!(relative("/").unwrap(), PathBuf::new());
        assert_eq!(relative("/a/b/").unwrap(), PathBuf::from("a/b"));
    }

    proptest::proptest! {
        #[test]
        fn more_shares_never_mean_less_weight(a in 0u64..300_000, b in 0u64..300_000) {
            let (low, high) = (a.min(b), a.max(b));
            proptest::prop_assert!(weight_of_shares(low) <= weight_of_shares(high));
        }
    }
}
