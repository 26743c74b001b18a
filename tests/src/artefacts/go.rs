//! The Go programs: the control plane, the upstream suite, the stock peers.

use super::cache::{self, Inputs};
use crate::command::{self, describe};
use crate::{paths, progress::Step};
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The release the control plane and the suite are built as.
pub const KUBERNETES_VERSION: &str = "v1.36.3";

/// Names the multi-call binary answers to.
pub const KUBERNETES_PROGRAMS: [&str; 7] = [
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubelet",
    "kubeadm",
    "kubectl",
];

/// One `go build` or `go test -c`.
#[derive(Debug)]
struct GoBuild<'a> {
    /// Module directory, relative to `tests/`.
    module: &'a str,
    /// Package, as the go command takes it.
    package: &'a str,
    /// File name of the program.
    output: &'a str,
    /// Words after `go build`/`go test -c`, such as tags.
    flags: Vec<String>,
    /// Compile the package's tests instead of the package.
    test: bool,
    /// Link against C libraries.
    cgo: bool,
}

/// Directory with the symlinks [`KUBERNETES_PROGRAMS`], built when it is not in the cache.
///
/// # Errors
/// When Go is missing or the build fails.
pub fn kubernetes() -> Result<PathBuf> {
    let build = GoBuild {
        module: "controlplane",
        package: ".",
        output: "kubernetes",
        flags: vec![kubernetes_linker_flags()],
        test: false,
        cgo: false,
    };
    ensure(
        "kubernetes",
        "Kubernetes control plane (about 5 min the first time)",
        &[build],
        |dir| {
            for program in KUBERNETES_PROGRAMS {
                symlink("kubernetes", dir.join(program))
                    .with_context(|| format!("link {program} to the multi-call binary"))?;
            }
            Ok(())
        },
    )
}

/// Directory with `etcd`.
///
/// # Errors
/// When Go is missing or the build fails.
pub fn etcd() -> Result<PathBuf> {
    let build = GoBuild {
        module: "controlplane/etcd",
        package: ".",
        output: "etcd",
        flags: vec!["-ldflags=-s -w".into()],
        test: false,
        cgo: false,
    };
    ensure("etcd", "etcd", &[build], |_| Ok(()))
}

/// Directory with `e2e.test` and `ginkgo`.
///
/// # Errors
/// When Go is missing or the build fails.
pub fn e2e_suite() -> Result<PathBuf> {
    let suite = GoBuild {
        module: "controlplane",
        package: "k8s.io/kubernetes/test/e2e",
        output: "e2e.test",
        flags: vec![kubernetes_linker_flags()],
        test: true,
        cgo: false,
    };
    let runner = GoBuild {
        module: "controlplane",
        package: "github.com/onsi/ginkgo/v2/ginkgo",
        output: "ginkgo",
        flags: vec!["-ldflags=-s -w".into()],
        test: false,
        cgo: false,
    };
    ensure(
        "e2e",
        "upstream suite (about 7 min the first time)",
        &[suite, runner],
        |_| Ok(()),
    )
}

/// Directory with `agnhost`, the program inside the suite's main test image.
///
/// # Errors
/// When Go is missing or the build fails.
pub fn agnhost() -> Result<PathBuf> {
    let build = GoBuild {
        module: "controlplane",
        package: "k8s.io/kubernetes/test/images/agnhost",
        output: "agnhost",
        flags: vec!["-ldflags=-s -w".into()],
        test: false,
        cgo: false,
    };
    ensure("agnhost", "agnhost", &[build], |_| Ok(()))
}

/// Directory with `kube-proxy` as a program of its own, small enough for an image.
///
/// # Errors
/// When Go is missing or the build fails.
pub fn kube_proxy() -> Result<PathBuf> {
    let build = GoBuild {
        module: "controlplane",
        package: "k8s.io/kubernetes/cmd/kube-proxy",
        output: "kube-proxy",
        flags: vec![kubernetes_linker_flags()],
        test: false,
        cgo: false,
    };
    ensure("kube-proxy", "kube-proxy", &[build], |_| Ok(()))
}

/// The release of the cluster's name server.
pub const COREDNS_VERSION: &str = "v1.15.0";

/// Directory with `coredns`.
///
/// # Errors
/// When Go is missing or the build fails.
pub fn coredns() -> Result<PathBuf> {
    let build = GoBuild {
        module: "controlplane/coredns",
        package: "github.com/coredns/coredns",
        output: "coredns",
        flags: vec!["-ldflags=-s -w".into()],
        test: false,
        cgo: false,
    };
    ensure(
        "coredns",
        "CoreDNS (about 3 min the first time)",
        &[build],
        |_| Ok(()),
    )
}

/// Directory with `sample-apiserver`, the aggregated server of the upstream suite's test image.
///
/// # Errors
/// When Go is missing or the build fails.
pub fn sample_apiserver() -> Result<PathBuf> {
    let build = GoBuild {
        module: "controlplane/sample-apiserver",
        package: "k8s.io/sample-apiserver",
        output: "sample-apiserver",
        flags: vec!["-ldflags=-s -w".into()],
        test: false,
        cgo: false,
    };
    ensure("sample-apiserver", "sample-apiserver", &[build], |_| Ok(()))
}

/// Directory with the stock node: `containerd`, its shim, `runc` and the CNI plugins. The stock
/// kubelet is in [`kubernetes`].
///
/// # Errors
/// When Go or a C library is missing or a build fails.
pub fn stock_peers() -> Result<PathBuf> {
    let plain = |module, package, output| GoBuild {
        module,
        package,
        output,
        flags: vec!["-ldflags=-s -w".into()],
        test: false,
        cgo: false,
    };
    let mut builds = vec![
        plain(
            "peers/containerd",
            "github.com/containerd/containerd/v2/cmd/containerd",
            "containerd",
        ),
        plain(
            "peers/containerd",
            "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
            "containerd-shim-runc-v2",
        ),
        GoBuild {
            module: "peers/runc",
            package: "github.com/opencontainers/runc",
            output: "runc",
            flags: vec!["-tags=seccomp".into(), "-ldflags=-s -w".into()],
            test: false,
            cgo: true,
        },
    ];
    let plugins = "peers/cni-plugins";
    for (package, output) in [
        (
            "github.com/containernetworking/plugins/plugins/main/bridge",
            "bridge",
        ),
        (
            "github.com/containernetworking/plugins/plugins/main/loopback",
            "loopback",
        ),
        (
            "github.com/containernetworking/plugins/plugins/ipam/host-local",
            "host-local",
        ),
        (
            "github.com/containernetworking/plugins/plugins/meta/portmap",
            "portmap",
        ),
    ] {
        builds.push(plain(plugins, package, output));
    }
    ensure(
        "stock",
        "stock node: containerd, runc, CNI plugins (about 2 min)",
        &builds,
        |_| Ok(()),
    )
}

/// Directory with `flannel`: its own VXLAN and host-gw back ends with its kube subnet manager.
///
/// # Errors
/// When Go is missing or the build fails.
pub fn flannel() -> Result<PathBuf> {
    let build = GoBuild {
        module: "peers/flannel",
        package: ".",
        output: "flannel",
        flags: vec!["-ldflags=-s -w".into()],
        test: false,
        cgo: false,
    };
    ensure("flannel", "flannel (about 1 min)", &[build], |_| Ok(()))
}

/// Directory with `cnitool`, the specification's own command.
///
/// # Errors
/// When Go is missing or the build fails.
pub fn cnitool() -> Result<PathBuf> {
    let build = GoBuild {
        module: "peers/cnitool",
        package: "github.com/containernetworking/cni/cnitool",
        output: "cnitool",
        flags: vec!["-ldflags=-s -w".into()],
        test: false,
        cgo: false,
    };
    ensure("cnitool", "cnitool", &[build], |_| Ok(()))
}

/// Directory with `csi-sanity`, the test program for CSI drivers.
///
/// # Errors
/// When Go is missing or the build fails.
pub fn csi_sanity() -> Result<PathBuf> {
    let build = GoBuild {
        module: "peers/csi-sanity",
        package: "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity",
        output: "csi-sanity",
        flags: vec!["-ldflags=-s -w".into()],
        test: false,
        cgo: false,
    };
    ensure("csi-sanity", "csi-sanity", &[build], |_| Ok(()))
}

fn kubernetes_linker_flags() -> String {
    let mut flags = String::from("-ldflags=-s -w");
    let values = [
        ("gitVersion", KUBERNETES_VERSION),
        ("gitMajor", "1"),
        ("gitMinor", "36"),
        ("gitCommit", "unknown"),
        ("gitTreeState", "clean"),
        ("buildDate", "2026-07-22T18:07:38Z"),
    ];
    for package in [
        "k8s.io/component-base/version",
        "k8s.io/client-go/pkg/version",
    ] {
        for (name, value) in values {
            flags.push_str(&format!(" -X {package}.{name}={value}"));
        }
    }
    flags
}

fn ensure(
    name: &str,
    title: &str,
    builds: &[GoBuild<'_>],
    finish: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let tests = paths::workspace().join("tests");
    let version = command::stdout(&mut command::command("go", &["env", "GOVERSION"]))
        .context("Go is needed to build the control plane; install it from https://go.dev/dl")?;
    let mut inputs = Inputs::default();
    inputs.word(version.trim());
    for build in builds {
        inputs.directory(&tests.join(build.module), &[".go", "go.mod", "go.sum"])?;
        inputs.word(build.package).word(build.output);
        for flag in &build.flags {
            inputs.word(flag);
        }
    }
    cache::ensure(&paths::cache()?, name, &inputs, |dir| {
        for build in builds {
            run(build, &tests, dir, title)?;
        }
        finish(dir)
    })
}

/// Runs one build; `-v` makes the go command name each package it compiles, which is the only
/// progress it offers.
fn run(build: &GoBuild<'_>, tests: &Path, dir: &Path, title: &str) -> Result<()> {
    let mut step = Step::begin(format!("build {title}: {}", build.output));
    let mut command = Command::new("go");
    command.args(if build.test {
        &["test", "-c"][..]
    } else {
        &["build"][..]
    });
    command.args(["-v", "-trimpath"]).args(&build.flags);
    command
        .arg("-o")
        .arg(dir.join(build.output))
        .arg(build.package);
    command
        .current_dir(tests.join(build.module))
        .env("CGO_ENABLED", if build.cgo { "1" } else { "0" })
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let line = describe(&command);
    let mut child = command.spawn().with_context(|| format!("run `{line}`"))?;
    let stderr = child
        .stderr
        .take()
        .context("standard error was not piped")?;
    // The last lines are the error, if there is one.
    let mut tail = std::collections::VecDeque::with_capacity(KEPT_LINES);
    let mut packages = 0_u32;
    for text in BufReader::new(stderr).lines() {
        let text = text.with_context(|| format!("read the output of `{line}`"))?;
        packages += 1;
        step.detail(&format!("{packages} packages, now {text}"));
        if tail.len() == KEPT_LINES {
            tail.pop_front();
        }
        tail.push_back(text);
    }
    let status = child.wait().with_context(|| format!("wait for `{line}`"))?;
    if !status.success() {
        let tail: Vec<String> = tail.into();
        bail!("`{line}` failed ({status}):\n{}", tail.join("\n"));
    }
    let size = fs::metadata(dir.join(build.output)).map_or(0, |meta| meta.len() >> 20);
    step.done(&format!("{size} MiB"));
    Ok(())
}

/// Lines of a failed build that are shown.
const KEPT_LINES: usize = 30;
