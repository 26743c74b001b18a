//! What volumes cost: figures of the driver's own tests, on a pool of its own.

use crate::{command, packages, paths};
use anyhow::Result;

/// Measures with a driver of this cargo profile and prints the figures. Needs root.
///
/// # Errors
/// When something cannot be built, or a call fails.
pub fn bench(profile: &str, may_install: bool) -> Result<()> {
    packages::ensure(packages::STORAGE, may_install)?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let words = ["test", "--quiet", "--package", "csi-driver"];
    let mut command = command::command(cargo, &words);
    command
        .args(["--profile", profile, "--test", "driver", "--"])
        .args(["--ignored", "--nocapture", "what_volumes_cost"])
        .current_dir(paths::workspace());
    command::interactive(&mut command)
}
