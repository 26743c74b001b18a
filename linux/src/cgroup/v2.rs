//! cgroup v2: one tree; controllers are handed down level by level.

use super::v1::remove_dir_patiently;
use super::{
    CgroupError, Cgroups, Details, DeviceRule, Files, KILL_LIMIT, Limits, Stats, keyed, pids,
    weight_of_shares,
};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Controllers handed down where the kernel has them.
const WANTED: [&str; 6] = ["cpu", "memory", "pids", "cpuset", "io", "hugetlb"];

/// Those among them whose refusal is an error; without the others pods run all the same.
const NEEDED: [&str; 3] = ["cpu", "memory", "pids"];

/// cgroup v2 below one root.
#[derive(Debug)]
pub struct V2<F> {
    files: F,
    mount_point: PathBuf,
    root: PathBuf,
}

impl<F: Files> V2<F> {
    /// Works below `root` (relative) of the tree mounted at `mount_point`.
    pub fn new(files: F, mount_point: PathBuf, root: PathBuf) -> Self {
        Self {
            files,
            mount_point,
            root,
        }
    }

    fn dir(&self, path: &str) -> Result<PathBuf, CgroupError> {
        let relative = self.root.join(super::relative(path)?);
        Ok(self.mount_point.join(relative))
    }

    fn write(&self, file: &Path, value: &str) -> Result<(), CgroupError> {
        self.files
            .write(file, value)
            .map_err(|e| CgroupError::io(format!("write {value:?} to"), file, e))
    }

    /// Lets the children of `dir` have the controllers we use.
    fn hand_down(&self, dir: &Path) -> Result<(), CgroupError> {
        let read = |name: &str| {
            let file = dir.join(name);
            let content = self.files.read(&file);
            content.map_err(|e| CgroupError::io("read", &file, e))
        };
        let available = read("cgroup.controllers")?;
        let given = read("cgroup.subtree_control")?;
        let has = |list: &str, name: &str| list.split_whitespace().any(|c| c == name);
        let missing: Vec<&str> = WANTED
            .into_iter()
            .filter(|c| has(&available, c) && !has(&given, c))
            .collect();
        for controller in missing {
            let file = dir.join("cgroup.subtree_control");
            let written = self.write(&file, &format!("+{controller}"));
            if NEEDED.contains(&controller) {
                written?;
            }
        }
        Ok(())
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

    fn populated(&self, dir: &Path) -> bool {
        let events = self.files.read(&dir.join("cgroup.events"));
        keyed(&events.unwrap_or_default(), "populated") == Some(1)
    }

    fn number(&self, dir: &Path, file: &str) -> Option<u64> {
        let content = self.files.read(&dir.join(file)).ok()?;
        content.trim().parse().ok()
    }

    /// The pressure files; none where the kernel has none.
    fn pressure(&self, dir: &Path) -> Option<[super::Pressure; 3]> {
        let read = |name: &str| {
            let text = self.files.read(&dir.join(name)).ok()?;
            Some(super::pressure(&text))
        };
        Some([
            read("cpu.pressure")?,
            read("memory.pressure")?,
            read("io.pressure")?,
        ])
    }

    fn apply_memory(&self, dir: &Path, bytes: i64) -> Result<(), CgroupError> {
        let value = if bytes < 0 {
            "max".to_owned()
        } else {
            bytes.to_string()
        };
        // Swap is not granted with a limit; the file is absent on kernels without swap.
        let swap = dir.join("memory.swap.max");
        if self.files.read(&swap).is_ok() {
            self.write(&swap, if bytes < 0 { "max" } else { "0" })?;
        }
        self.write(&dir.join("memory.max"), &value)
    }
}

/// The content of `cpu.max`; none when nothing changes.
fn cpu_max(limits: &Limits) -> Option<String> {
    let period = limits.cpu_period_us;
    match (limits.cpu_quota_us, period) {
        (None, None) => None,
        (Some(quota), _) if quota >= 0 => Some(format!("{quota} {}", period.unwrap_or(100_000))),
        (_, period) => Some(format!("max {}", period.unwrap_or(100_000))),
    }
}

impl<F: Files> Cgroups for V2<F> {
    fn ensure(&self, path: &str) -> Result<(), CgroupError> {
        let relative = self.root.join(super::relative(path)?);
        let mut dir = self.mount_point.clone();
        for part in relative.components() {
            self.hand_down(&dir)?;
            dir.push(part);
            self.files
                .make_dir(&dir)
                .map_err(|e| CgroupError::io("make", &dir, e))?;
        }
        Ok(())
    }

    fn apply(&self, path: &str, limits: &Limits) -> Result<(), CgroupError> {
        let dir = self.dir(path)?;
        if let Some(shares) = limits.cpu_shares {
            let weight = weight_of_shares(shares).to_string();
            self.write(&dir.join("cpu.weight"), &weight)?;
        }
        if let Some(max) = cpu_max(limits) {
            self.write(&dir.join("cpu.max"), &max)?;
        }
        if let Some(bytes) = limits.memory_bytes {
            self.apply_memory(&dir, bytes)?;
        }
        if let Some(count) = limits.pids {
            let value = if count < 0 {
                "max".to_owned()
            } else {
                count.to_string()
            };
            self.write(&dir.join("pids.max"), &value)?;
        }
        let sets = [
            ("cpuset.cpus", &limits.cpuset_cpus),
            ("cpuset.mems", &limits.cpuset_mems),
        ];
        for (file, value) in sets {
            if let Some(value) = value.as_deref().filter(|v| !v.is_empty()) {
                self.write(&dir.join(file), value)?;
            }
        }
        for (size, bytes) in &limits.hugepages {
            let file = dir.join(format!("hugetlb.{size}.max"));
            if self.files.read(&file).is_ok() {
                self.write(&file, &bytes.to_string())?;
            }
        }
        for (file, value) in &limits.unified {
            if file.contains('/') || file.starts_with("cgroup.") {
                return Err(CgroupError::BadPath(file.clone()));
            }
            self.write(&dir.join(file), value)?;
        }
        Ok(())
    }

    fn limits(&self, path: &str) -> Option<Limits> {
        if !self.exists(path) {
            return None;
        }
        let dir = self.dir(path).ok()?;
        let read = |file: &str| self.files.read(&dir.join(file)).ok();
        // `max` is unlimited.
        let number = |word: &str| match word {
            "max" => Some(-1),
            word => word.parse().ok(),
        };
        let cpu = read("cpu.max").unwrap_or_default();
        let mut cpu = cpu.split_whitespace();
        Some(Limits {
            cpu_quota_us: cpu.next().and_then(number),
            cpu_period_us: cpu.next().and_then(|period| period.parse().ok()),
            memory_bytes: read("memory.max").and_then(|content| number(content.trim())),
            ..Limits::default()
        })
    }

    fn set_devices(&self, path: &str, allowed: &[DeviceRule]) -> Result<(), CgroupError> {
        if allowed.iter().any(DeviceRule::is_everything) {
            return Ok(());
        }
        let dir = self.dir(path)?;
        let program = super::devices::program(allowed);
        self.files
            .attach_devices(&dir, &program)
            .map_err(|e| CgroupError::io("attach device filter to", &dir, e))
    }

    fn directories(&self, path: &str) -> Result<Vec<PathBuf>, CgroupError> {
        Ok(vec![self.dir(path)?])
    }

    fn exists(&self, path: &str) -> bool {
        let dir = self.dir(path);
        dir.is_ok_and(|dir| self.files.subdirs(&dir).is_ok())
    }

    fn processes(&self, path: &str) -> Vec<i32> {
        let mut found = Vec::new();
        if let Ok(dir) = self.dir(path) {
            self.collect_pids(&dir, &mut found);
        }
        found.sort_unstable();
        found
    }

    fn children(&self, path: &str) -> Vec<String> {
        let dir = self.dir(path);
        dir.map(|dir| self.files.subdirs(&dir).unwrap_or_default())
            .unwrap_or_default()
    }

    fn kill(&self, path: &str) -> Result<(), CgroupError> {
        let dir = self.dir(path)?;
        let end = Instant::now() + KILL_LIMIT;
        while self.populated(&dir) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let pids = self.processes(path);
                let path = path.to_owned();
                return Err(CgroupError::Populated { path, pids });
            }
            match self.files.write(&dir.join("cgroup.kill"), "1") {
                Ok(()) => {}
                // Kernels before 5.14 have no such file.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    let list = self.processes(path);
                    let confirm = || self.processes(path);
                    self.files.kill(&list, &confirm, &|| (), left);
                    continue;
                }
                Err(e) => return Err(CgroupError::io("kill", &dir, e)),
            }
            if self.populated(&dir) {
                // Short, lest the change fell between the look and the wait.
                let step = left.min(std::time::Duration::from_millis(100));
                self.files.wait_change(&dir.join("cgroup.events"), step);
            }
        }
        Ok(())
    }

    fn remove(&self, path: &str) -> Result<(), CgroupError> {
        let dir = self.dir(path)?;
        if dir == self.mount_point {
            return Err(CgroupError::BadPath(path.to_owned()));
        }
        self.remove_below(&dir)
    }

    fn stats(&self, path: &str) -> Option<Stats> {
        let dir = self.dir(path).ok()?;
        let cpu = self.files.read(&dir.join("cpu.stat")).ok()?;
        let memory = self.files.read(&dir.join("memory.stat"));
        let memory = memory.unwrap_or_default();
        let of = |key: &str| keyed(&memory, key).unwrap_or(0);
        Some(Stats {
            cpu_usage_ns: keyed(&cpu, "usage_usec").unwrap_or(0).saturating_mul(1000),
            memory_usage: self.number(&dir, "memory.current").unwrap_or(0),
            memory_inactive_file: of("inactive_file"),
            memory_anon: of("anon"),
            page_faults: of("pgfault"),
            major_page_faults: of("pgmajfault"),
            memory_limit: self.number(&dir, "memory.max"),
            pids: self.number(&dir, "pids.current").unwrap_or(0),
            swap_usage: self.number(&dir, "memory.swap.current").unwrap_or(0),
            swap_limit: self.number(&dir, "memory.swap.max"),
            pressure: self.pressure(&dir),
        })
    }

    fn details(&self, path: &str) -> Option<Details> {
        let dir = self.dir(path).ok()?;
        let text = |file: &str| self.files.read(&dir.join(file)).unwrap_or_default();
        let cpu = self.files.read(&dir.join("cpu.stat")).ok()?;
        let (memory, events) = (text("memory.stat"), text("memory.events"));
        let of = |text: &str, key: &str| keyed(text, key).unwrap_or(0);
        let number = |file: &str| self.number(&dir, file);
        // `max 100000` or `20000 100000`.
        let max = text("cpu.max");
        let mut max = max.split_whitespace();
        let quota = max.next().and_then(|q| q.parse().ok());
        let limits = number("memory.max").zip(number("memory.swap.max"));
        Some(Details {
            cpu_user_ns: of(&cpu, "user_usec").saturating_mul(1000),
            cpu_system_ns: of(&cpu, "system_usec").saturating_mul(1000),
            cpu_periods: of(&cpu, "nr_periods"),
            cpu_throttled_periods: of(&cpu, "nr_throttled"),
            cpu_throttled_ns: of(&cpu, "throttled_usec").saturating_mul(1000),
            cpu_shares: number("cpu.weight").map_or(0, super::details::shares_of_weight),
            cpu_quota_us: quota,
            cpu_period_us: max.next().and_then(|p| p.parse().ok()).unwrap_or(0),
            memory_cache: of(&memory, "file"),
            memory_mapped_file: of(&memory, "file_mapped"),
            memory_active_file: of(&memory, "active_file"),
            memory_kernel: of(&memory, "kernel"),
            memory_max_usage: number("memory.peak").unwrap_or(0),
            memory_failures: of(&events, "max"),
            memory_swap_limit: limits.map(|(memory, swap)| memory.saturating_add(swap)),
            oom_kills: of(&events, "oom_kill"),
            processes: super::pids(&text("cgroup.procs")).collect(),
            threads_max: number("pids.max"),
            io: super::details::io_v2(&text("io.stat")),
        })
    }

    fn oom_kills(&self, path: &str) -> u64 {
        let Ok(dir) = self.dir(path) else {
            return 0;
        };
        let events = self.files.read(&dir.join("memory.events"));
        keyed(&events.unwrap_or_default(), "oom_kill").unwrap_or(0)
    }

    fn is_v2(&self) -> bool {
        true
    }
}
