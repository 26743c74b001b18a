//! hostPath: a path of the node, of a given type. Links are followed, as the user asked.

use super::plan::HostPathKind;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;

/// Checks the type and makes what may be made. Blocking.
///
/// # Errors
/// Stock's words.
pub(crate) fn prepare(path: &Path, kind: HostPathKind) -> Result<(), String> {
    let found = std::fs::metadata(path);
    let missing = matches!(&found, Err(e) if e.kind() == io::ErrorKind::NotFound);
    match kind {
        // A source that is missing becomes a directory, as container runtimes do it.
        HostPathKind::Any | HostPathKind::DirectoryOrCreate if missing => {
            linux::fs::create_dirs(path, 0o755).map_err(|e| e.to_string())
        }
        HostPathKind::FileOrCreate if missing => std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(path)
            .map(drop)
            .map_err(|e| format!("cannot make {}: {e}", path.display())),
        HostPathKind::Any => Ok(()),
        HostPathKind::DirectoryOrCreate
        | HostPathKind::Directory
        | HostPathKind::FileOrCreate
        | HostPathKind::File
        | HostPathKind::Socket
        | HostPathKind::CharDevice
        | HostPathKind::BlockDevice => {
            let file = found.map(|m| m.file_type());
            let is = |test: fn(&std::fs::FileType) -> bool| file.as_ref().is_ok_and(test);
            let (right, what) = match kind {
                HostPathKind::Directory | HostPathKind::DirectoryOrCreate | HostPathKind::Any => {
                    (is(std::fs::FileType::is_dir), "directory")
                }
                HostPathKind::File | HostPathKind::FileOrCreate => {
                    (is(std::fs::FileType::is_file), "file")
                }
                HostPathKind::Socket => (is(|f| f.is_socket()), "socket file"),
                HostPathKind::CharDevice => (is(|f| f.is_char_device()), "character device"),
                HostPathKind::BlockDevice => (is(|f| f.is_block_device()), "block device"),
            };
            if right {
                Ok(())
            } else {
                Err(format!(
                    "hostPath type check failed: {} is not a {what}",
                    path.display()
                ))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_checked_and_made_as_stock_does() {
        let dir = tempfile::tempdir().unwrap();
        let (d, f, s) = (
            dir.path().join("d/e"),
            dir.path().join("f"),
            dir.path().join("s"),
        );
        let none = dir.path().join("none");
        let _listener = std::os::unix::net::UnixListener::bind(&s).unwrap();
        for (path, kind, want) in [
            (&d, HostPathKind::Directory, Some("directory")),
            (&d, HostPathKind::DirectoryOrCreate, None),
            (&d, HostPathKind::Directory, None),
            (&d, HostPathKind::File, Some("file")),
            (&f, HostPathKind::File, Some("file")),
            (&f, HostPathKind::FileOrCreate, None),
            (&f, HostPathKind::File, None),
            (&f, HostPathKind::DirectoryOrCreate, Some("directory")),
            (&s, HostPathKind::Socket, None),
            (&f, HostPathKind::Socket, Some("socket file")),
            (&s, HostPathKind::BlockDevice, Some("block device")),
            (
                &Path::new("/dev/null").to_owned(),
                HostPathKind::CharDevice,
                None,
            ),
            (&f, HostPathKind::CharDevice, Some("character device")),
            (&none, HostPathKind::Any, None),
            (&none, HostPathKind::Directory, None),
        ] {
            let want = want.map(|w| {
                format!(
                    "hostPath type check failed: {} is not a {w}",
                    path.display()
                )
            });
            assert_eq!(prepare(path, kind).err(), want, "{kind:?}");
        }
    }

    #[test]
    fn links_are_followed() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        assert_eq!(prepare(&link, HostPathKind::Directory), Ok(()));
    }
}
