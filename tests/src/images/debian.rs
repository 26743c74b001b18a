//! Files of Debian packages as layers: fetched by apt, opened by dpkg-deb, never installed.

use super::layer::Layer;
use crate::command;
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What agnhost's tests run beside agnhost, with the libraries it needs (bookworm).
pub(super) const TOOLS: &[&str] = &[
    // Shells and basics.
    "bash",
    "coreutils",
    "findutils",
    "grep",
    "sed",
    "mawk",
    "hostname",
    "procps",
    "mount",
    "util-linux",
    "util-linux-extra",
    "libc-bin",
    "tar",
    "gzip",
    "iperf",
    // Network tools.
    "curl",
    "wget",
    "bind9-dnsutils",
    "bind9-host",
    "netcat-openbsd",
    "net-tools",
    "iproute2",
    "iputils-ping",
    // Their libraries.
    "libc6",
    "libtinfo6",
    "libacl1",
    "libattr1",
    "libselinux1",
    "libpcre2-8-0",
    "libgmp10",
    "libproc2-0",
    "libblkid1",
    "libmount1",
    "libsmartcols1",
    "libuuid1",
    "libudev1",
    "libsystemd0",
    "libcap-ng0",
    "libcrypt1",
    "libncursesw6",
    "libreadline8",
    "libcap2",
    "libcurl4",
    "zlib1g",
    "libnghttp2-14",
    "libidn2-0",
    "libunistring2",
    "librtmp1",
    "libssh2-1",
    "libpsl5",
    "libssl3",
    "libgssapi-krb5-2",
    "libkrb5-3",
    "libk5crypto3",
    "libkrb5support0",
    "libcom-err2",
    "libkeyutils1",
    "libldap-2.5-0",
    "libsasl2-2",
    "libzstd1",
    "libbrotli1",
    "libgnutls30",
    "libhogweed6",
    "libnettle8",
    "libp11-kit0",
    "libtasn1-6",
    "libffi8",
    "libgcrypt20",
    "libgpg-error0",
    "liblz4-1",
    "liblzma5",
    "bind9-libs",
    "libuv1",
    "libxml2",
    "libicu72",
    "liblmdb0",
    "libmaxminddb0",
    "libjson-c5",
    "libprotobuf-c1",
    "libfstrm0",
    "libedit2",
    "libbsd0",
    "libmd0",
    "libstdc++6",
    "libgcc-s1",
    "libjemalloc2",
    "libelf1",
    "libbpf1",
    "libmnl0",
    "libtirpc3",
    "libxtables12",
    "libdb5.3",
    "libbz2-1.0",
];

/// Of no use in a container.
const LEFT_OUT: &[&str] = &[
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/bash-completion",
    "usr/share/bug",
    "usr/share/doc-base",
    "usr/share/gcc",
    "usr/share/systemd",
    "usr/lib/systemd",
    "usr/lib/init",
    "etc/init.d",
    "var/lib/systemd",
    "usr/lib/udev",
    "etc/cron.d",
    "etc/pam.d",
    "usr/lib/x86_64-linux-gnu/gconv",
];

/// Fetches packages into `dir`; returns their files, in the order asked for.
pub(super) fn download(packages: &[&str], dir: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let fetch = || {
        // Root's own directory is closed to apt's sandbox user.
        let mut apt = command::command("apt-get", &["-q", "-o", "APT::Sandbox::User=root"]);
        apt.arg("download").args(packages).current_dir(dir);
        command::stdout(&mut apt)
    };
    if fetch().is_err() {
        command::stdout(&mut command::command("apt-get", &["-q", "update"]))?;
        fetch()?;
    }
    packages.iter().map(|package| find(dir, package)).collect()
}

fn find(dir: &Path, package: &str) -> Result<PathBuf> {
    let start = format!("{package}_");
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(&start))
        {
            return Ok(path);
        }
    }
    bail!("package {package} was not downloaded")
}

/// Puts the files of a package into the layer, with `/usr` merged.
pub(super) fn add(layer: &mut Layer, package: &Path) -> Result<()> {
    let output = command::capture(Command::new("dpkg-deb").arg("--fsys-tarfile").arg(package))?;
    if !output.status.success() {
        bail!(
            "{}: {}",
            package.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    layer
        .merge(Cursor::new(output.stdout), place)
        .with_context(|| format!("add the files of {}", package.display()))
}

/// A file of a package, by its path in it.
pub(super) fn file(package: &Path, path: &str) -> Result<Vec<u8>> {
    let output = command::capture(Command::new("dpkg-deb").arg("--fsys-tarfile").arg(package))?;
    let mut archive = tar::Archive::new(Cursor::new(output.stdout));
    for entry in archive.entries()? {
        let mut entry = entry?;
        if entry.path()?.to_string_lossy().trim_start_matches("./") == path {
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut entry, &mut bytes)?;
            return Ok(bytes);
        }
    }
    bail!("{} has no {path}", package.display())
}

/// Where a package's file goes; none for what is left out.
fn place(path: &str) -> Option<String> {
    let merged = ["bin", "sbin", "lib", "lib64"].iter().any(|top| {
        path == *top
            || path
                .strip_prefix(top)
                .is_some_and(|rest| rest.starts_with('/'))
    });
    let path = if merged {
        format!("usr/{path}")
    } else {
        path.to_owned()
    };
    let left_out = LEFT_OUT.iter().any(|out| {
        path == *out
            || path
                .strip_prefix(out)
                .is_some_and(|rest| rest.starts_with('/'))
    });
    (!path.is_empty() && !left_out).then_some(path)
}

/// The directories every root has, and merged `/usr`.
pub(super) fn skeleton(layer: &mut Layer) {
    for dir in [
        "dev", "etc", "home", "mnt", "opt", "proc", "run", "srv", "sys", "usr", "var",
    ] {
        layer.dir(dir, 0o755);
    }
    for dir in [
        "usr/bin",
        "usr/sbin",
        "usr/lib",
        "usr/lib64",
        "usr/local",
        "usr/local/bin",
    ] {
        layer.dir(dir, 0o755);
    }
    for dir in ["bin", "sbin", "lib", "lib64"] {
        layer.symlink(dir, &format!("usr/{dir}"));
    }
    layer
        .dir("root", 0o700)
        .dir("tmp", 0o1777)
        .dir("var/tmp", 0o1777)
        .dir("var/log", 0o755);
    layer.file(
        "etc/os-release",
        0o644,
        "ID=debian\nPRETTY_NAME=\"Debian, test image\"\n",
    );
    layer.file(
        "etc/nsswitch.conf",
        0o644,
        "passwd: files\ngroup: files\nhosts: files dns\n",
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_files_move_below_usr_and_manuals_stay_out() {
        assert_eq!(place("bin/bash").as_deref(), Some("usr/bin/bash"));
        assert_eq!(place("library/x").as_deref(), Some("library/x"));
        assert_eq!(place("usr/share/doc/bash/README"), None);
        assert_eq!(place(""), None);
    }
}
