//! A cgroup filesystem in memory, for tests of what uses one.
//!
//! It keeps to the kernel's rules that callers trip over: a new v1 cpuset is empty, a v2 child
//! has a controller's files only when its parent hands it down, a directory with children or
//! processes cannot be removed.

use super::Files;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Which kernel is imitated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Flavour {
    /// All v1 files in every directory.
    #[default]
    V1,
    /// v2 with `cpu memory pids cpuset io hugetlb`.
    V2,
}

#[derive(Debug, Default)]
struct Tree {
    dirs: BTreeSet<PathBuf>,
    files: BTreeMap<PathBuf, String>,
    refused: BTreeMap<PathBuf, i32>,
    writes: Vec<(PathBuf, String)>,
    flavour: Flavour,
}

/// The tree; clones share it.
#[derive(Debug, Clone, Default)]
pub struct FakeFiles(Arc<Mutex<Tree>>);

const V2_FILES: [(&str, &str, &str); 13] = [
    ("cpu", "cpu.weight", "100"),
    ("cpu", "cpu.max", "max 100000"),
    ("memory", "memory.max", "max"),
    ("memory", "memory.high", "max"),
    ("memory", "memory.swap.max", "max"),
    ("memory", "memory.current", "0"),
    ("memory", "memory.oom.group", "0"),
    ("pids", "pids.max", "max"),
    ("pids", "pids.current", "0"),
    ("cpuset", "cpuset.cpus", ""),
    ("cpuset", "cpuset.mems", ""),
    ("io", "io.weight", "default 100"),
    ("hugetlb", "hugetlb.2MB.max", "max"),
];

const V1_FILES: [(&str, &str); 14] = [
    ("cgroup.procs", ""),
    ("cpu.shares", "1024"),
    ("cpu.cfs_period_us", "100000"),
    ("cpu.cfs_quota_us", "-1"),
    ("cpuacct.usage", "0"),
    ("memory.limit_in_bytes", "9223372036854771712"),
    ("memory.usage_in_bytes", "0"),
    ("pids.max", "max"),
    ("devices.allow", ""),
    ("devices.deny", ""),
    ("freezer.state", "THAWED"),
    ("cpuset.cpus", ""),
    ("cpuset.mems", ""),
    ("hugetlb.2MB.limit_in_bytes", "0"),
];

impl FakeFiles {
    /// A tree with these mount points, each given the files of a root cgroup.
    #[must_use]
    pub fn new(flavour: Flavour, mount_points: &[&Path]) -> Self {
        let fake = Self::default();
        let mut tree = fake.lock();
        tree.flavour = flavour;
        for mount_point in mount_points {
            let dir = mount_point.to_path_buf();
            tree.populate(&dir, &["cpu", "memory", "pids", "cpuset", "io", "hugetlb"]);
            tree.files.insert(dir.join("cpuset.cpus"), "0-1\n".into());
            tree.files.insert(dir.join("cpuset.mems"), "0\n".into());
            tree.dirs.insert(dir);
        }
        drop(tree);
        fake
    }

    fn lock(&self) -> MutexGuard<'_, Tree> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a file there, or changes it.
    pub fn put(&self, path: &Path, content: &str) {
        self.lock()
            .files
            .insert(path.to_owned(), content.to_owned());
    }

    /// Writes to this file fail with an errno.
    pub fn refuse(&self, path: &Path, errno: i32) {
        self.lock().refused.insert(path.to_owned(), errno);
    }

    /// Everything written, in order.
    #[must_use]
    pub fn writes(&self) -> Vec<(PathBuf, String)> {
        self.lock().writes.clone()
    }

    /// Whether a directory is there.
    #[must_use]
    pub fn has_dir(&self, path: &Path) -> bool {
        self.lock().dirs.contains(path)
    }
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

impl Tree {
    fn populate(&mut self, dir: &Path, controllers: &[&str]) {
        let mut put = |name: &str, content: &str| {
            self.files.insert(dir.join(name), content.to_owned());
        };
        match self.flavour {
            Flavour::V1 => V1_FILES.iter().for_each(|(name, c)| put(name, c)),
            Flavour::V2 => {
                put("cgroup.procs", "");
                put("cgroup.kill", "");
                put("cgroup.events", "populated 0\nfrozen 0\n");
                put("cgroup.controllers", &controllers.join(" "));
                put("cgroup.subtree_control", "");
                put("cpu.stat", "usage_usec 0\n");
                let given = V2_FILES.iter().filter(|f| controllers.contains(&f.0));
                given.for_each(|(_, name, content)| put(name, content));
            }
        }
    }

    fn has_processes(&self, dir: &Path) -> bool {
        let procs = self.files.get(&dir.join("cgroup.procs"));
        procs.is_some_and(|p| !p.trim().is_empty())
    }
}

impl Files for FakeFiles {
    fn make_dir(&self, path: &Path) -> io::Result<()> {
        let mut tree = self.lock();
        if tree.dirs.contains(path) {
            return Ok(());
        }
        let parent = path.parent().ok_or_else(|| errno(libc::ENOENT))?;
        if !tree.dirs.contains(parent) {
            return Err(errno(libc::ENOENT));
        }
        let control = parent.join("cgroup.subtree_control");
        let control = tree.files.get(&control).cloned().unwrap_or_default();
        let controllers: Vec<&str> = control.split_whitespace().collect();
        tree.populate(path, &controllers);
        tree.dirs.insert(path.to_owned());
        Ok(())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let mut tree = self.lock();
        if !tree.dirs.contains(path) {
            return Err(errno(libc::ENOENT));
        }
        let child = tree.dirs.iter().any(|d| d.parent() == Some(path));
        if child || tree.has_processes(path) {
            return Err(errno(libc::EBUSY));
        }
        tree.dirs.remove(path);
        tree.files.retain(|file, _| file.parent() != Some(path));
        Ok(())
    }

    fn read(&self, path: &Path) -> io::Result<String> {
        let found = self.lock().files.get(path).cloned();
        found.ok_or_else(|| errno(libc::ENOENT))
    }

    fn write(&self, path: &Path, value: &str) -> io::Result<()> {
        let mut tree = self.lock();
        if let Some(number) = tree.refused.get(path) {
            return Err(errno(*number));
        }
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
        let Some(old) = tree.files.get(path).cloned() else {
            return Err(errno(libc::ENOENT));
        };
        tree.writes.push((path.to_owned(), value.to_owned()));
        let parent = path.parent().unwrap_or(path).to_owned();
        let new = match name {
            "cgroup.subtree_control" => {
                let added = value.trim_start_matches('+');
                format!("{old} {added}").trim().to_owned()
            }
            "cgroup.kill" => {
                let below = |f: &Path| f.starts_with(&parent);
                let files = tree.files.iter_mut().filter(|(f, _)| below(f));
                for (file, content) in files {
                    if file.ends_with("cgroup.procs") {
                        content.clear();
                    } else if file.ends_with("cgroup.events") {
                        *content = "populated 0\nfrozen 0\n".to_owned();
                    }
                }
                String::new()
            }
            _ => value.to_owned(),
        };
        tree.files.insert(path.to_owned(), new);
        Ok(())
    }

    fn subdirs(&self, path: &Path) -> io::Result<Vec<String>> {
        let tree = self.lock();
        if !tree.dirs.contains(path) {
            return Err(errno(libc::ENOENT));
        }
        let children = tree.dirs.iter().filter(|d| d.parent() == Some(path));
        let name = |d: &PathBuf| d.file_name().map(|n| n.to_string_lossy().into_owned());
        Ok(children.filter_map(name).collect())
    }

    fn wait_change(&self, _path: &Path, _limit: Duration) {}

    fn kill(
        &self,
        pids: &[i32],
        _confirm: &dyn Fn() -> Vec<i32>,
        release: &dyn Fn(),
        _limit: Duration,
    ) {
        let mut tree = self.lock();
        let procs = tree.files.iter_mut();
        for (_, content) in procs.filter(|(f, _)| f.ends_with("cgroup.procs")) {
            let left = super::pids(content).filter(|p| !pids.contains(p));
            let left: Vec<String> = left.map(|p| p.to_string()).collect();
            *content = left.join("\n");
        }
        drop(tree);
        release();
    }

    fn attach_devices(&self, dir: &Path, program: &[u64]) -> io::Result<()> {
        let mut tree = self.lock();
        let note = format!("{} instructions", program.len());
        tree.writes.push((dir.join("devices"), note));
        Ok(())
    }
}
