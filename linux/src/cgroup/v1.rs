//! cgroup v1: every mounted hierarchy with controllers, joined or separate.
//!
//! Named hierarchies (`name=systemd`) belong to others and are left alone. A hierarchy that is
//! not mounted is a controller that is not there: limits that need it are refused, except
//! those whose absence is harmless.

use super::{
    CgroupError, Cgroups, Details, DeviceRule, Files, KILL_LIMIT, Limits, Stats, keyed, pids,
};
use crate::mountinfo::MountEntry;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A limit of the kernel for "no limit" is about `i64::MAX` rounded to pages.
const UNLIMITED: u64 = 1 << 62;
const UNLIMITED_BYTES: i64 = 1 << 62;

/// rmdir is refused for a moment after the last process left; tries and their growing pauses.
const REMOVE_ATTEMPTS: u32 = 9;

/// One mounted v1 hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// Its controllers.
    pub controllers: Vec<String>,
}

impl Hierarchy {
    /// Whether it carries a controller.
    #[must_use]
    pub fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|c| c == controller)
    }
}

/// The v1 hierarchies of a mount table, each once.
#[must_use]
pub(super) fn hierarchies(table: &[MountEntry]) -> Vec<Hierarchy> {
    const KNOWN: [&str; 13] = [
        "cpu",
        "cpuacct",
        "cpuset",
        "memory",
        "devices",
        "freezer",
        "blkio",
        "pids",
        "hugetlb",
        "net_cls",
        "net_prio",
        "perf_event",
        "rdma",
    ];
    let mut seen = Vec::new();
    let mut found = Vec::new();
    for mount in table.iter().filter(|m| m.fstype == "cgroup") {
        let controllers: Vec<String> = mount
            .super_options
            .split(',')
            .filter(|o| KNOWN.contains(o))
            .map(str::to_owned)
            .collect();
        if controllers.is_empty() || seen.contains(&mount.device) {
            continue;
        }
        seen.push(mount.device);
        found.push(Hierarchy {
            mount_point: mount.mount_point.clone(),
            controllers,
        });
    }
    found
}

/// cgroup v1 below one root.
#[derive(Debug)]
pub struct V1<F> {
    files: F,
    hierarchies: Vec<Hierarchy>,
    root: PathBuf,
}

impl<F: Files> V1<F> {
    /// Works below `root` (relative) in each hierarchy.
    pub fn new(files: F, hierarchies: Vec<Hierarchy>, root: PathBuf) -> Self {
        Self {
            files,
            hierarchies,
            root,
        }
    }

    fn dir(&self, controller: &str, path: &str) -> Result<Option<PathBuf>, CgroupError> {
        let relative = self.root.join(super::relative(path)?);
        let hierarchy = self.hierarchies.iter().find(|h| h.has(controller));
        Ok(hierarchy.map(|h| h.mount_point.join(relative)))
    }

    fn write(&self, file: &Path, value: &str) -> Result<(), CgroupError> {
        self.files
            .write(file, value)
            .map_err(|e| CgroupError::io(format!("write {value:?} to"), file, e))
    }

    /// Writes a limit into a controller's file.
    fn limit(
        &self,
        path: &str,
        controller: &'static str,
        file: &'static str,
        value: &str,
    ) -> Result<(), CgroupError> {
        let dir = self.dir(controller, path)?;
        let dir = dir.ok_or(CgroupError::NoController {
            what: file,
            controller,
        })?;
        self.write(&dir.join(file), value)
    }

    /// A new cpuset has no CPUs and no memory, and nothing can join it: it gets its parent's.
    fn fill_cpuset(&self, dir: &Path) -> Result<(), CgroupError> {
        let Some(parent) = dir.parent() else {
            return Ok(());
        };
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let own = dir.join(file);
            let read = |p: &Path| {
                self.files
                    .read(p)
                    .map_err(|e| CgroupError::io("read", p, e))
            };
            if read(&own)?.trim().is_empty() {
                let inherited = read(&parent.join(file))?;
                self.write(&own, inherited.trim())?;
            }
        }
        Ok(())
    }

    fn apply_cpu(&self, path: &str, limits: &Limits) -> Result<(), CgroupError> {
        if let Some(shares) = limits.cpu_shares {
            let shares = shares.clamp(2, 262_144).to_string();
            self.limit(path, "cpu", "cpu.shares", &shares)?;
        }
        let period = limits.cpu_period_us.map(|p| p.to_string());
        let quota = limits.cpu_quota_us.map(|q| q.max(-1).to_string());
        let set_period = || match &period {
            Some(p) => self.limit(path, "cpu", "cpu.cfs_period_us", p),
            None => Ok(()),
        };
        let set_quota = || match &quota {
            Some(q) => self.limit(path, "cpu", "cpu.cfs_quota_us", q),
            None => Ok(()),
        };
        // Each write alone must make a valid pair; which order does depends on old values.
        if set_period().is_err() {
            set_quota()?;
            return set_period();
        }
        set_quota()
    }

    fn apply_memory(&self, path: &str, bytes: i64) -> Result<(), CgroupError> {
        let value = bytes.max(-1).to_string();
        let memory = || self.limit(path, "memory", "memory.limit_in_bytes", &value);
        let dir = self.dir("memory", path)?;
        let swap = dir.map(|d| d.join("memory.memsw.limit_in_bytes"));
        let Some(swap) = swap.filter(|s| self.files.read(s).is_ok()) else {
            return memory();
        };
        // Memory may never exceed memory+swap: growing needs the second file first.
        match memory() {
            Ok(()) => self.write(&swap, &value),
            Err(_) => {
                self.write(&swap, &value)?;
                memory()
            }
        }
    }

    fn each_dir(&self, path: &str) -> Vec<PathBuf> {
        self.directories(path).unwrap_or_default()
    }

    fn remove_below(&self, dir: &Path) -> Result<(), CgroupError> {
        let children = match self.files.subdirs(dir) {
            Ok(children) => children,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(CgroupError::io("list", dir, e)),
        };
        for child in children {
            self.remove_below(&dir.join(child))?;
        }
        remove_dir_patiently(&self.files, dir)
    }

    fn collect_pids(&self, dir: &Path, found: &mut Vec<i32>) {
        if let Ok(content) = self.files.read(&dir.join("cgroup.procs")) {
            found.extend(pids(&content));
        }
        for child in self.files.subdirs(dir).unwrap_or_default() {
            self.collect_pids(&dir.join(child), found);
        }
    }

    fn read_number(&self, dir: Option<PathBuf>, file: &str) -> Option<u64> {
        let content = self.files.read(&dir?.join(file)).ok()?;
        content.trim().parse().ok()
    }
}

/// Removes a cgroup directory that may be busy for some moments yet.
pub(super) fn remove_dir_patiently(files: &impl Files, dir: &Path) -> Result<(), CgroupError> {
    let mut pause = Duration::from_millis(1);
    for attempt in 1..=REMOVE_ATTEMPTS {
        match files.remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && attempt < REMOVE_ATTEMPTS => {
                // v1 announces nothing here; the state lasts from the last exit to its RCU end.
                std::thread::sleep(pause);
                pause *= 2;
            }
            Err(e) => return Err(CgroupError::io("remove", dir, e)),
        }
    }
    Ok(())
}

impl<F: Files> Cgroups for V1<F> {
    fn ensure(&self, path: &str) -> Result<(), CgroupError> {
        let relative = self.root.join(super::relative(path)?);
        for hierarchy in &self.hierarchies {
            let whole = hierarchy.mount_point.join(&relative);
            let cpuset = hierarchy.has("cpuset");
            // Mostly only the last level is missing.
            let parent_made = relative.parent().is_none() || {
                match self.files.make_dir(&whole) {
                    Ok(()) => true,
                    Err(e) if e.kind() == io::ErrorKind::NotFound => false,
                    Err(e) => return Err(CgroupError::io("make", &whole, e)),
                }
            };
            if parent_made && !cpuset {
                continue;
            }
            let mut dir = hierarchy.mount_point.clone();
            for part in relative.components() {
                dir.push(part);
                self.files
                    .make_dir(&dir)
                    .map_err(|e| CgroupError::io("make", &dir, e))?;
                if cpuset {
                    self.fill_cpuset(&dir)?;
                }
            }
        }
        Ok(())
    }

    fn apply(&self, path: &str, limits: &Limits) -> Result<(), CgroupError> {
        self.apply_cpu(path, limits)?;
        if let Some(bytes) = limits.memory_bytes {
            self.apply_memory(path, bytes)?;
        }
        if let Some(count) = limits.pids {
            let value = if count < 0 {
                "max".to_owned()
            } else {
                count.to_string()
            };
            self.limit(path, "pids", "pids.max", &value)?;
        }
        let cpus = limits.cpuset_cpus.as_deref().filter(|s| !s.is_empty());
        if let Some(cpus) = cpus {
            self.limit(path, "cpuset", "cpuset.cpus", cpus)?;
        }
        let mems = limits.cpuset_mems.as_deref().filter(|s| !s.is_empty());
        if let Some(mems) = mems {
            self.limit(path, "cpuset", "cpuset.mems", mems)?;
        }
        for (size, bytes) in &limits.hugepages {
            // Without the controller only an allowance can be granted, and it is granted.
            let Some(dir) = self.dir("hugetlb", path)? else {
                continue;
            };
            let file = dir.join(format!("hugetlb.{size}.limit_in_bytes"));
            self.write(&file, &bytes.to_string())?;
        }
        Ok(())
    }

    fn limits(&self, path: &str) -> Option<Limits> {
        let cpu = self.dir("cpu", path).ok()?;
        let memory = self.dir("memory", path).ok()?;
        if !self.exists(path) {
            return None;
        }
        let signed = |dir: &Option<PathBuf>, file: &str| -> Option<i64> {
            let content = self.files.read(&dir.as_ref()?.join(file)).ok()?;
            content.trim().parse().ok()
        };
        let quota = signed(&cpu, "cpu.cfs_quota_us");
        let bytes = signed(&memory, "memory.limit_in_bytes");
        Some(Limits {
            cpu_shares: self.read_number(cpu.clone(), "cpu.shares"),
            cpu_quota_us: quota,
            cpu_period_us: self.read_number(cpu, "cpu.cfs_period_us"),
            memory_bytes: bytes.map(|bytes| if bytes < UNLIMITED_BYTES { bytes } else { -1 }),
            ..Limits::default()
        })
    }

    fn set_devices(&self, path: &str, allowed: &[DeviceRule]) -> Result<(), CgroupError> {
        let Some(dir) = self.dir("devices", path)? else {
            return Ok(());
        };
        if allowed.iter().any(DeviceRule::is_everything) {
            return self.write(&dir.join("devices.allow"), "a");
        }
        self.write(&dir.join("devices.deny"), "a")?;
        for rule in allowed {
            self.write(&dir.join("devices.allow"), &rule.to_v1())?;
        }
        Ok(())
    }

    fn directories(&self, path: &str) -> Result<Vec<PathBuf>, CgroupError> {
        let relative = self.root.join(super::relative(path)?);
        let join = |h: &Hierarchy| h.mount_point.join(&relative);
        Ok(self.hierarchies.iter().map(join).collect())
    }

    fn exists(&self, path: &str) -> bool {
        let dirs = self.each_dir(path);
        dirs.iter().any(|dir| self.files.subdirs(dir).is_ok())
    }

    fn processes(&self, path: &str) -> Vec<i32> {
        let mut found = Vec::new();
        for dir in self.each_dir(path) {
            self.collect_pids(&dir, &mut found);
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    fn children(&self, path: &str) -> Vec<String> {
        let mut names: Vec<String> = self
            .each_dir(path)
            .iter()
            .flat_map(|dir| self.files.subdirs(dir).unwrap_or_default())
            .collect();
        names.sort();
        names.dedup();
        names
    }

    fn kill(&self, path: &str) -> Result<(), CgroupError> {
        let freezer = self.dir("freezer", path)?.map(|d| d.join("freezer.state"));
        let set = |state: &str| {
            if let Some(file) = &freezer {
                // Not there means nothing is in it; stopping halfway is no error either.
                let _ = self.files.write(file, state);
            }
        };
        let end = Instant::now() + KILL_LIMIT;
        loop {
            if self.processes(path).is_empty() {
                return Ok(());
            }
            // Frozen, nobody forks between our list and our signal.
            set("FROZEN");
            let list = self.processes(path);
            let left = end.saturating_duration_since(Instant::now());
            let confirm = || self.processes(path);
            self.files.kill(&list, &confirm, &|| set("THAWED"), left);
            if Instant::now() >= end {
                let pids = self.processes(path);
                if pids.is_empty() {
                    return Ok(());
                }
                let path = path.to_owned();
                return Err(CgroupError::Populated { path, pids });
            }
        }
    }

    fn remove(&self, path: &str) -> Result<(), CgroupError> {
        if super::relative(path)?.as_os_str().is_empty() && self.root.as_os_str().is_empty() {
            return Err(CgroupError::BadPath(path.to_owned()));
        }
        let mut failed = None;
        for dir in self.directories(path)? {
            if let Err(error) = self.remove_below(&dir) {
                failed = failed.or(Some(error));
            }
        }
        failed.map_or(Ok(()), Err)
    }

    fn stats(&self, path: &str) -> Option<Stats> {
        let memory = self.dir("memory", path).ok()?;
        let stat = self.files.read(&memory.clone()?.join("memory.stat")).ok()?;
        // Its own: what it is allowed, not what happens to be left of its parents' limits.
        let limit = self
            .read_number(memory.clone(), "memory.limit_in_bytes")
            .filter(|l| *l < UNLIMITED);
        let total = |key: &str| keyed(&stat, key).unwrap_or(0);
        let cpuacct = self.dir("cpuacct", path).ok()?;
        let pids_dir = self.dir("pids", path).ok()?;
        Some(Stats {
            cpu_usage_ns: self.read_number(cpuacct, "cpuacct.usage").unwrap_or(0),
            memory_usage: self
                .read_number(memory.clone(), "memory.usage_in_bytes")
                .unwrap_or(0),
            memory_inactive_file: total("total_inactive_file"),
            memory_anon: total("total_rss"),
            page_faults: total("total_pgfault"),
            major_page_faults: total("total_pgmajfault"),
            memory_limit: limit,
            pids: self.read_number(pids_dir, "pids.current").unwrap_or(0),
            swap_usage: total("total_swap"),
            swap_limit: self
                .read_number(memory, "memory.memsw.limit_in_bytes")
                .filter(|l| *l < UNLIMITED)
                .map(|both| both.saturating_sub(limit.unwrap_or(0))),
            pressure: None,
        })
    }

    fn details(&self, path: &str) -> Option<Details> {
        let dir = |controller: &str| self.dir(controller, path).ok().flatten();
        let (cpu, memory, acct) = (dir("cpu"), dir("memory"), dir("cpuacct"));
        let text = |dir: &Option<PathBuf>, file: &str| {
            let read = dir.as_ref().map(|d| self.files.read(&d.join(file)));
            read.and_then(Result::ok).unwrap_or_default()
        };
        let number = |dir: &Option<PathBuf>, file: &str| self.read_number(dir.clone(), file);
        let stat = text(&memory, "memory.stat");
        if stat.is_empty() && text(&cpu, "cpu.shares").is_empty() {
            return None;
        }
        let throttled = text(&cpu, "cpu.stat");
        let blkio = dir("blkio");
        let recursive = |name: &str| {
            let all = text(&blkio, &format!("blkio.throttle.{name}_recursive"));
            // Kernels before 4.16 count only the cgroup itself.
            let own = || text(&blkio, &format!("blkio.throttle.{name}"));
            if all.is_empty() { own() } else { all }
        };
        let pids = dir("pids");
        let of = |text: &str, key: &str| keyed(text, key).unwrap_or(0);
        Some(Details {
            cpu_user_ns: number(&acct, "cpuacct.usage_user").unwrap_or(0),
            cpu_system_ns: number(&acct, "cpuacct.usage_sys").unwrap_or(0),
            cpu_periods: of(&throttled, "nr_periods"),
            cpu_throttled_periods: of(&throttled, "nr_throttled"),
            cpu_throttled_ns: of(&throttled, "throttled_time"),
            cpu_shares: number(&cpu, "cpu.shares").unwrap_or(0),
            // No quota is -1, which is no number here.
            cpu_quota_us: number(&cpu, "cpu.cfs_quota_us"),
            cpu_period_us: number(&cpu, "cpu.cfs_period_us").unwrap_or(0),
            memory_cache: of(&stat, "total_cache"),
            memory_mapped_file: of(&stat, "total_mapped_file"),
            memory_active_file: of(&stat, "total_active_file"),
            memory_kernel: number(&memory, "memory.kmem.usage_in_bytes").unwrap_or(0),
            memory_max_usage: number(&memory, "memory.max_usage_in_bytes").unwrap_or(0),
            memory_failures: number(&memory, "memory.failcnt").unwrap_or(0),
            memory_swap_limit: number(&memory, "memory.memsw.limit_in_bytes")
                .filter(|l| *l < UNLIMITED),
            oom_kills: self.oom_kills(path),
            processes: super::pids(&text(&memory, "cgroup.procs")).collect(),
            threads_max: number(&pids, "pids.max"),
            io: super::details::io_v1(&recursive("io_service_bytes"), &recursive("io_serviced")),
        })
    }

    fn oom_kills(&self, path: &str) -> u64 {
        let Ok(Some(dir)) = self.dir("memory", path) else {
            return 0;
        };
        let content = self.files.read(&dir.join("memory.oom_control"));
        keyed(&content.unwrap_or_default(), "oom_kill").unwrap_or(0)
    }

    fn is_v2(&self) -> bool {
        false
    }
}
