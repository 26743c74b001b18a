//! What the machine is: read from the kernel, never decided here. Blocking file reads of a few
//! bytes each.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Facts about a filesystem.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Filesystem {
    /// Size in bytes.
    pub capacity_bytes: u64,
    /// Bytes an ordinary user may still write.
    pub available_bytes: u64,
    /// Inodes; 0 when the filesystem has no such limit.
    pub inodes: u64,
    /// Free inodes.
    pub inodes_free: u64,
}

/// Facts that change while the machine runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    /// Memory that can be had without swapping, bytes.
    pub memory_available_bytes: u64,
    /// The filesystem of the kubelet's directory.
    pub nodefs: Filesystem,
    /// The filesystem of images.
    pub imagefs: Filesystem,
    /// Processes and threads there may be.
    pub pid_max: u64,
    /// Processes and threads there are.
    pub pids: u64,
}

/// Facts that do not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    /// CPUs online.
    pub cpus: u64,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Swap, bytes.
    pub swap_bytes: u64,
    /// Size in bytes of a huge page to how many there are.
    pub hugepages: BTreeMap<u64, u64>,
    /// /etc/machine-id.
    pub machine_id: String,
    /// DMI product UUID, else the machine id.
    pub system_uuid: String,
    /// The kernel's boot id.
    pub boot_id: String,
    /// Kernel release.
    pub kernel_version: String,
    /// PRETTY_NAME of os-release.
    pub os_image: String,
    /// Go's name of the architecture.
    pub architecture: String,
    /// Whether pods may have users of their own here.
    pub user_namespaces: bool,
}

fn text(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path)
        .map(|t| t.trim().to_owned())
        .unwrap_or_default()
}

/// Value of `Name: 123 kB` in bytes.
fn meminfo(text: &str, name: &str) -> u64 {
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    number.unwrap_or(0).saturating_mul(1024)
}

/// How many numbers a kernel list (`0-3,8`) names.
fn list_len(text: &str) -> u64 {
    let range = |part: &str| {
        let (a, b) = part.split_once('-').unwrap_or((part, part));
        let (a, b): (u64, u64) = (a.trim().parse().ok()?, b.trim().parse().ok()?);
        b.checked_sub(a).map(|n| n + 1)
    };
    text.split(',').filter_map(range).sum()
}

/// PRETTY_NAME of an os-release file.
fn pretty_name(text: &str) -> String {
    let line = text.lines().find_map(|l| l.strip_prefix("PRETTY_NAME="));
    line.unwrap_or("Linux").trim_matches(['"', '\'']).to_owned()
}

/// The architecture as Go and Kubernetes call it.
fn go_arch(machine: &str) -> &str {
    match machine {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "i686" | "i586" | "i386" => "386",
        "armv7l" | "armv6l" => "arm",
        other => other,
    }
}

fn hugepages(root: &Path) -> BTreeMap<u64, u64> {
    let mut found = BTreeMap::new();
    let Ok(entries) = std::fs::read_dir(root) else {
        return found;
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let size = name
            .strip_prefix("hugepages-")
            .and_then(|n| n.strip_suffix("kB")?.parse::<u64>().ok());
        if let Some(size) = size {
            let count = text(entry.path().join("nr_hugepages")).parse().unwrap_or(0);
            found.insert(size * 1024, count);
        }
    }
    found
}

/// Reads what the machine is.
pub fn machine() -> Machine {
    let memory = text("/proc/meminfo");
    let uname = rustix::system::uname();
    let machine_id = [text("/etc/machine-id"), text("/var/lib/dbus/machine-id")];
    let machine_id = machine_id.into_iter().find(|t| !t.is_empty());
    let boot_id = text("/proc/sys/kernel/random/boot_id");
    let machine_id = machine_id.unwrap_or_else(|| boot_id.replace('-', ""));
    let uuid = text("/sys/class/dmi/id/product_uuid");
    let os_release = [text("/etc/os-release"), text("/usr/lib/os-release")];
    let online = list_len(&text("/sys/devices/system/cpu/online"));
    let fallback = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    Machine {
        cpus: if online > 0 { online } else { fallback },
        memory_bytes: meminfo(&memory, "MemTotal"),
        swap_bytes: meminfo(&memory, "SwapTotal"),
        hugepages: hugepages(Path::new("/sys/kernel/mm/hugepages")),
        system_uuid: if uuid.is_empty() {
            machine_id.clone()
        } else {
            uuid
        },
        machine_id,
        boot_id,
        kernel_version: uname.release().to_string_lossy().into_owned(),
        os_image: pretty_name(os_release.iter().find(|t| !t.is_empty()).map_or("", |t| t)),
        architecture: go_arch(&uname.machine().to_string_lossy()).to_owned(),
        user_namespaces: has_user_namespaces(
            &uname.release().to_string_lossy(),
            &text("/proc/sys/user/max_user_namespaces"),
        ),
    }
}

/// Whether the kernel mounts overlays layer by layer (6.5), by which their ids can be mapped, and
/// makes user namespaces at all.
fn has_user_namespaces(release: &str, most: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || {
        numbers
            .next()
            .and_then(|n| n.parse::<u32>().ok())
            .unwrap_or(0)
    };
    let version = (number(), number());
    version >= (6, 5) && most.parse::<u64>().is_ok_and(|n| n > 0)
}

/// Space and inodes of the filesystem a path is on (of its nearest parent that exists).
pub fn filesystem(path: &Path) -> Filesystem {
    let mut path = PathBuf::from(path);
    loop {
        match rustix::fs::statvfs(&path) {
            Ok(stat) => {
                return Filesystem {
                    capacity_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
                    available_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
                    inodes: stat.f_files,
                    inodes_free: stat.f_ffree,
                };
            }
            Err(_) if path.pop() => {}
            Err(_) => return Filesystem::default(),
        }
    }
}

/// Reads how full the machine is.
pub fn usage(nodefs: &Path, imagefs: &Path) -> Usage {
    let memory = text("/proc/meminfo");
    // Fourth word of /proc/loadavg: running/existing.
    let load = text("/proc/loadavg");
    let pids = load
        .split_whitespace()
        .nth(3)
        .and_then(|w| w.split('/').nth(1)?.parse().ok());
    let limit = |path| text(path).parse::<u64>().unwrap_or(u64::MAX);
    let pid_max = limit("/proc/sys/kernel/pid_max").min(limit("/proc/sys/kernel/threads-max"));
    Usage {
        memory_available_bytes: meminfo(&memory, "MemAvailable"),
        nodefs: filesystem(nodefs),
        imagefs: filesystem(imagefs),
        pid_max,
        pids: pids.unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_namespaces_need_a_kernel_that_has_them() {
        assert!(has_user_namespaces("6.18.44-fc-v669", "96365"));
        assert!(has_user_namespaces("7.0.0", "1"));
        for (release, most) in [("6.1.0-18-cloud", "9"), ("6.18.0", "0"), ("6.18.0", "")] {
            assert!(!has_user_namespaces(release, most));
        }
    }

    #[test]
    fn kernel_texts_are_read() {
        assert_eq!(
            meminfo("MemFree: 1 kB\nMemTotal:  2048 kB\n", "MemTotal"),
            2048 * 1024
        );
        assert_eq!(meminfo("", "MemTotal"), 0);
        assert_eq!(list_len("0-3,8,10-11"), 7);
        assert_eq!(list_len(""), 0);
        assert_eq!(list_len("3-1"), 0);
        assert_eq!(
            pretty_name("NAME=x\nPRETTY_NAME=\"Debian 12\"\n"),
            "Debian 12"
        );
        assert_eq!(go_arch("x86_64"), "amd64");
    }

    #[test]
    fn this_machine_has_something() {
        let machine = machine();
        assert!(machine.cpus >= 1 && machine.memory_bytes > 0);
        assert!(!machine.kernel_version.is_empty() && !machine.machine_id.is_empty());
        let usage = usage(Path::new("/nonexistent/deep"), Path::new("/"));
        assert!(usage.nodefs.capacity_bytes > 0);
        assert_eq!(usage.nodefs.capacity_bytes, usage.imagefs.capacity_bytes);
        assert!(usage.pid_max > 0);
    }
}
