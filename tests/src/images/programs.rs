//! Programs inside the test images that are compiled here.

use crate::artefacts::cache::{self, Inputs};
use crate::artefacts::go;
use crate::{command, paths};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Sleeps, reaps, and leaves at SIGINT or SIGTERM.
const PAUSE_SOURCE: &str = include_str!("../../images/pause.c");

/// Chooses the shell of the busybox image.
const SHELL_SOURCE: &str = include_str!("../../images/sh.c");

/// The pause program: static, a few KiB of our own and libc.
pub(super) fn pause(cache: &Path) -> Result<PathBuf> {
    compiled(cache, "pause", PAUSE_SOURCE)
}

/// The busybox image's `/bin/sh`.
pub(super) fn shell(cache: &Path) -> Result<PathBuf> {
    compiled(cache, "sh", SHELL_SOURCE)
}

/// A static program of one C file.
fn compiled(cache: &Path, name: &str, source: &str) -> Result<PathBuf> {
    let mut inputs = Inputs::default();
    inputs.word(source);
    let dir = cache::ensure(cache, name, &inputs, |dir| {
        let file = dir.join(name).with_extension("c");
        std::fs::write(&file, source)?;
        let mut cc = Command::new("cc");
        cc.args(["-Os", "-static", "-s", "-o"])
            .arg(dir.join(name))
            .arg(&file);
        command::stdout(&mut cc)?;
        Ok(())
    })?;
    Ok(dir.join(name))
}

/// agnhost itself.
pub(super) fn agnhost() -> Result<PathBuf> {
    Ok(go::agnhost()?.join("agnhost"))
}

/// The program of the nonewprivs image.
pub(super) fn nnp(cache: &Path) -> Result<PathBuf> {
    go_program(cache, "nnp", "nonewprivs")
}

/// The program of the upstream suite's image of that name.
pub(super) fn upstream(cache: &Path, name: &str) -> Result<PathBuf> {
    go_program(cache, name, name)
}

/// A program of the directory `image` of the upstream images.
fn go_program(cache: &Path, name: &str, image: &str) -> Result<PathBuf> {
    let module = module();
    let mut inputs = Inputs::default();
    inputs.word(name).word(go::KUBERNETES_VERSION);
    let dir = cache::ensure(cache, name, &inputs, |dir| {
        let mut go = command::command("go", &["build", "-trimpath", "-ldflags=-s -w", "-o"]);
        go.arg(dir.join(name))
            .arg(format!("k8s.io/kubernetes/test/images/{image}"));
        go.current_dir(&module).env("CGO_ENABLED", "0");
        command::stdout(&mut go)?;
        Ok(())
    })?;
    Ok(dir.join(name))
}

/// Directory of the upstream images' static files.
pub(super) fn upstream_images() -> Result<PathBuf> {
    let mut go = command::command("go", &["list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes"]);
    let dir = command::stdout(go.current_dir(module()))
        .context("find the Kubernetes module's directory")?;
    Ok(PathBuf::from(dir.trim()).join("test/images"))
}

fn module() -> PathBuf {
    paths::workspace().join("tests/controlplane")
}
