//! Puts a plugin into a runtime's directory: written beside its place, then renamed, so that
//! nobody executes half of it and one that runs is not disturbed.

use std::path::Path;

use anyhow::{Context, Result};
use linux::fs::{Durability, read_file, write_atomic};

/// A plugin has one or two MiB.
const MAX_PROGRAM_BYTES: usize = 64 << 20;

/// Copies the program `from` into the directory `to` under its own name.
///
/// # Errors
/// When it cannot be read or written.
pub(crate) fn install(from: &Path, to: &Path) -> Result<()> {
    let problem = || format!("install {} into {}", from.display(), to.display());
    let program = read_file(from, MAX_PROGRAM_BYTES).with_context(problem)?;
    let name = from.file_name().with_context(problem)?;
    let target = to.join(name);
    if read_file(&target, MAX_PROGRAM_BYTES).is_ok_and(|found| found == program) {
        return Ok(());
    }
    linux::fs::create_dirs(to, 0o755).with_context(problem)?;
    write_atomic(&target, &program, 0o755, Durability::PowerLoss).with_context(problem)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn a_program_is_replaced_as_a_whole_and_only_when_it_differs() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("cni-x"), dir.path().join("opt/cni/bin"));
        std::fs::write(&from, "one").unwrap();
        install(&from, &to).unwrap();
        let installed = to.join("cni-x");
        let inode = || std::fs::metadata(&installed).unwrap().ino();
        let first = inode();
        assert_eq!(
            std::fs::metadata(&installed).unwrap().permissions().mode() & 0o777,
            0o755
        );
        install(&from, &to).unwrap();
        assert_eq!(inode(), first);
        let running = std::fs::File::open(&installed).unwrap();
        std::fs::write(&from, "two").unwrap();
        install(&from, &to).unwrap();
        assert_ne!(inode(), first);
        assert_eq!(std::io::read_to_string(running).unwrap(), "one");
    }
}
