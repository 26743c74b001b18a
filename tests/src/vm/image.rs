//! The machine's disk: Debian 12 by debootstrap, with one unit that runs the job.

use crate::artefacts::cache::{self, Inputs};
use crate::command;
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// Debian's release.
const RELEASE: &str = "bookworm";

/// Besides the minimal base: what a node needs, and what the tests look with.
const PACKAGES: &[&str] = &[
    "busybox-static",
    "ca-certificates",
    "conntrack",
    "dbus",
    "iproute2",
    "iptables",
    "kmod",
    "linux-image-cloud-amd64",
    "nftables",
    "procps",
    "systemd",
    "systemd-sysv",
    "udev",
];

/// Size of the disk image; sparse, so only its content takes space.
const DISK_SIZE: &str = "3G";

/// Runs the job from the second disk with its output on the second serial port, then powers off,
/// whatever happened.
const UNIT: &str = "[Unit]
Description=The job of this boot
After=multi-user.target
Wants=network.target
SuccessAction=poweroff
FailureAction=poweroff

[Service]
Type=oneshot
Delegate=yes
ExecStartPre=/bin/mount -o ro /dev/vdb /ferrule
ExecStart=/ferrule/job
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS1
TimeoutStartSec=infinity

[Install]
WantedBy=default.target
";

/// A bootable machine.
#[derive(Debug, Clone)]
pub struct Image {
    /// Compressed kernel.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: PathBuf,
    /// Raw ext4 disk; boot it without writing to it.
    pub disk: PathBuf,
}

/// The image, made when this machine has none with the same content yet (about two minutes).
///
/// # Errors
/// When a package cannot be had or the disk cannot be written.
pub fn ensure(cache_dir: &Path) -> Result<Image> {
    let mut inputs = Inputs::default();
    inputs.word(RELEASE).word(DISK_SIZE).word(UNIT);
    for package in PACKAGES {
        inputs.word(package);
    }
    let dir = cache::ensure(cache_dir, "vm", &inputs, build)?;
    Ok(Image {
        kernel: dir.join("vmlinuz"),
        initrd: dir.join("initrd.img"),
        disk: dir.join("disk.ext4"),
    })
}

fn build(dir: &Path) -> Result<()> {
    let root = dir.join("root");
    command::stdout(
        command::command("debootstrap", &["--variant=minbase"])
            .arg(format!("--include={}", PACKAGES.join(",")))
            .arg(RELEASE)
            .arg(&root),
    )?;
    configure(&root)?;
    for entry in fs::read_dir(root.join("boot")).context("list the new root's /boot")? {
        let entry = entry.context("read the new root's /boot")?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let target = match name.split('-').next() {
            Some("vmlinuz") => "vmlinuz",
            Some("initrd.img") => "initrd.img",
            _ => continue,
        };
        fs::copy(entry.path(), dir.join(target)).with_context(|| format!("copy {name}"))?;
    }
    command::stdout(
        command::command("mkfs.ext4", &["-q", "-L", "root", "-d"])
            .arg(&root)
            .arg(dir.join("disk.ext4"))
            .arg(DISK_SIZE),
    )?;
    // Ours: made above, nothing is mounted in it (debootstrap unmounts /proc when it ends well).
    fs::remove_dir_all(&root).with_context(|| format!("remove {}", root.display()))
}

fn configure(root: &Path) -> Result<()> {
    let write = |path: &str, content: &str| {
        let path = root.join(path);
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))
    };
    write("etc/fstab", "/dev/vda / ext4 rw,noatime 0 1\n")?;
    write("etc/hostname", "vm\n")?;
    write("etc/hosts", "127.0.0.1 localhost\n127.0.1.1 vm\n")?;
    write("etc/systemd/system/ferrule-job.service", UNIT)?;
    fs::create_dir_all(root.join("ferrule")).context("make the job's mount point")?;
    let wants = root.join("etc/systemd/system/default.target.wants");
    fs::create_dir_all(&wants).context("make default.target.wants")?;
    symlink(
        "/etc/systemd/system/ferrule-job.service",
        wants.join("ferrule-job.service"),
    )
    .context("enable the job")
}
