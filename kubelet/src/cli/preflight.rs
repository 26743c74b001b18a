//! What must hold before the agent starts, and what only deserves a warning.

use kubelet::config::{AuthorizationMode, Config};
use std::path::Path;

/// Refuses to start where the configuration says so, or where nothing could work.
pub(super) fn check(config: &Config) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        anyhow::bail!("this must run as root (it makes namespaces, mounts and cgroups)");
    }
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    if config.fail_swap_on && swap_is_on(&swaps) {
        anyhow::bail!(
            "swap is on and failSwapOn is true: switch swap off, or set failSwapOn: false"
        );
    }
    let v2 = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    if config.fail_cgroup_v1 && !v2 {
        anyhow::bail!("this machine uses cgroup v1 and failCgroupV1 is true");
    }
    standalone(config)
}

/// Without an apiserver nobody can be asked who may do what (the stock kubelet refuses likewise).
fn standalone(config: &Config) -> anyhow::Result<()> {
    if !config.is_standalone() || !config.server.enabled {
        return Ok(());
    }
    if config.server.token_review {
        anyhow::bail!(
            "no --kubeconfig: tokens cannot be shown to an apiserver; set \
             authentication.webhook.enabled: false"
        );
    }
    match config.server.authorization {
        AuthorizationMode::AlwaysAllow => Ok(()),
        AuthorizationMode::Webhook => anyhow::bail!(
            "no --kubeconfig: an apiserver cannot be asked who may do what; set \
             authorization.mode: AlwaysAllow"
        ),
    }
}

/// /proc/swaps has a heading, then a line per swap; zram counts like any other.
fn swap_is_on(swaps: &str) -> bool {
    swaps.lines().skip(1).any(|line| !line.trim().is_empty())
}

/// Asks the kernel to spare us. A refusal (no CAP_SYS_RESOURCE) is worth a line, no more.
pub(super) fn spare_us(config: &Config) {
    let path = Path::new("/proc/self/oom_score_adj");
    if let Err(error) = std::fs::write(path, config.oom_score_adj.to_string()) {
        tracing::warn!(
            wanted = config.oom_score_adj,
            "Cannot set our own oom_score_adj: {error}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heading_is_no_swap() {
        assert!(!swap_is_on("Filename\tType\tSize\tUsed\tPriority\n"));
        assert!(swap_is_on("Filename\tType\n/dev/sda2 partition 1 0 -2\n"));
        assert!(!swap_is_on(""));
    }
}
