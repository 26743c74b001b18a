//! Debian packages the lab needs: found by the program they bring, installed only after saying
//! what and why.

use crate::command;
use anyhow::{Result, bail};
use std::env;
use std::path::Path;

/// A program (or file) the lab needs and the package that brings it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Name looked up in `PATH`, or an absolute path.
    pub file: &'static str,
    /// Debian package.
    pub package: &'static str,
    /// What for, as a person wants to know before agreeing.
    pub why: &'static str,
}

const fn need(file: &'static str, package: &'static str, why: &'static str) -> Need {
    Need { file, package, why }
}

/// What a control plane needs.
pub const CONTROL_PLANE: &[Need] = &[
    need("ip", "iproute2", "makes the lab's bridge and veths"),
    need("nsenter", "util-linux", "enters a node's namespaces"),
    need(
        "docker-registry",
        "docker-registry",
        "serves the test images",
    ),
];

/// What nodes need besides.
pub const NODES: &[Need] = &[
    need(
        "/bin/busybox",
        "busybox-static",
        "is inside the test images",
    ),
    need(
        "iptables",
        "iptables",
        "is one of the backends of host ports and of the stock peers",
    ),
    need("nft", "nftables", "shows rule sets in tests"),
    need(
        "conntrack",
        "conntrack",
        "is used by kube-proxy to flush stale flows",
    ),
];

/// What measuring throughput needs besides.
pub const THROUGHPUT: &[Need] = &[need("iperf3", "iperf3", "sends as much as goes")];

/// What building the stock peers needs besides.
pub const STOCK: &[Need] = &[
    need("gcc", "gcc", "links runc"),
    need(
        "/usr/include/seccomp.h",
        "libseccomp-dev",
        "is linked into runc",
    ),
    need("pkg-config", "pkg-config", "finds libseccomp"),
    need("python3", "python3", "runs podbench.py"),
    need(
        "/usr/lib/python3/dist-packages/yaml",
        "python3-yaml",
        "is used by podbench.py",
    ),
];

/// What the storage driver and its tests need besides.
pub const STORAGE: &[Need] = &[
    need("mkfs.ext4", "e2fsprogs", "makes and checks volumes"),
    need(
        "mkfs.xfs",
        "xfsprogs",
        "makes volumes, and the pool of tests",
    ),
];

/// Which of `needs` are not there.
#[must_use]
pub fn missing(needs: &[Need]) -> Vec<Need> {
    needs
        .iter()
        .copied()
        .filter(|need| !present(need.file))
        .collect()
}

fn present(file: &str) -> bool {
    if file.starts_with('/') {
        return Path::new(file).exists();
    }
    let path = env::var_os("PATH").unwrap_or_default();
    // A user's PATH often lacks the sbin directories; the programs are started by name later, so
    // only what PATH finds counts.
    env::split_paths(&path).any(|dir| dir.join(file).is_file())
}

/// Installs what is missing, after printing the list; with `may_install` false it only says what
/// to type.
///
/// # Errors
/// When something is missing and may not be or cannot be installed.
pub fn ensure(needs: &[Need], may_install: bool) -> Result<()> {
    let missing = missing(needs);
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    packages.sort_unstable();
    packages.dedup();
    let line = format!(
        "apt-get install --no-install-recommends {}",
        packages.join(" ")
    );
    for need in &missing {
        eprintln!(
            "  missing {}: package {}, which {}",
            need.file, need.package, need.why
        );
    }
    if !may_install {
        bail!("packages are missing and --no-install was given; run: {line}");
    }
    eprintln!("  installing: {line}");
    let install = || {
        let mut command = command::command("apt-get", &["install", "-y", "-q"]);
        command.arg("--no-install-recommends").args(&packages);
        // docker-registry's package would start a system service; the lab starts its own.
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("RUNLEVEL", "1");
        command::stdout(&mut command)
    };
    if install().is_err() {
        // Package lists of a fresh machine are often empty or stale.
        command::stdout(&mut command::command("apt-get", &["update", "-q"]))?;
        install()?;
    }
    let still = self::missing(needs);
    if let Some(need) = still.first() {
        bail!(
            "package {} was installed but {} is still missing",
            need.package,
            need.file
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_found_by_its_file() {
        let needs = [
            need("sh", "dash", "runs"),
            need("no-such-program", "nothing", "fails"),
        ];
        assert_eq!(missing(&needs), vec![needs[1]]);
    }

    #[test]
    fn nothing_is_installed_when_that_is_forbidden() {
        let needs = [need("no-such-program", "no-such-package", "fails")];
        let error = ensure(&needs, false).unwrap_err().to_string();
        assert!(error.contains("no-such-package"), "{error}");
    }
}
