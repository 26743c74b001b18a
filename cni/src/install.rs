//! Puts a plugin into a runtime's directory: written beside its place, then renamed, so that
//! nobody executes half of it and one that runs is not disturbed.

use std::path::Path;

use linux::fs::{Durability, FsError, create_dirs, read_file, write_atomic};

/// A plugin has one or two MiB.
const MAX_PROGRAM_BYTES: usize = 64 << 20;

/// Copies the program `from` into the directory `to` under the name given; one that is there and
/// the same is left alone.
///
/// # Errors
/// When it cannot be read or written.
pub fn install(from: &Path, to: &Path, name: &str) -> Result<(), FsError> {
    let program = read_file(from, MAX_PROGRAM_BYTES)?;
    let target = to.join(name);
    if read_file(&target, MAX_PROGRAM_BYTES).is_ok_and(|found| found == program) {
        return Ok(());
    }
    create_dirs(to, 0o755)?;
    write_atomic(&target, &program, 0o755, Durability::PowerLoss)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn a_program_is_replaced_as_a_whole_and_only_when_it_differs() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("opt/cni/bin"));
        std::fs::write(&from, "one").unwrap();
        install(&from, &to, "cni-x").unwrap();
        let installed = to.join("cni-x");
        let found = || std::fs::metadata(&installed).unwrap();
        let first = found().ino();
        assert_eq!(found().permissions().mode() & 0o777, 0o755);
        install(&from, &to, "cni-x").unwrap();
        assert_eq!(found().ino(), first);
        let running = std::fs::File::open(&installed).unwrap();
        std::fs::write(&from, "two").unwrap();
        install(&from, &to, "cni-x").unwrap();
        assert_ne!(found().ino(), first);
        assert_eq!(std::io::read_to_string(running).unwrap(), "one");
    }
}
