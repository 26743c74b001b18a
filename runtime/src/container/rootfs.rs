//! Looking into an image's layers without mounting them, as overlayfs would show them.

use linux::fs::{FsError, open_dir, read_in_root};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, openat, statat};
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

/// Attribute that hides what lower layers have in a directory (overlayfs).
const OPAQUE: &str = "trusted.overlay.opaque";

/// Longest passwd or group file read from an image, in bytes.
const MAX_FILE_BYTES: usize = 4 << 20;

/// What a layer has at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// Nothing; lower layers decide.
    Nothing,
    /// A directory; lower layers add to it.
    Merged,
    /// A directory that hides lower layers.
    Opaque,
    /// Another file, or a link on the way.
    Other,
    /// A whiteout: it is not there, whatever lower layers have.
    Hidden,
}

/// Reads a file of the image; empty when it does not exist. Symbolic links are followed inside
/// the layer that holds them.
///
/// # Errors
/// [`FsError`] when the file exists and cannot be read or is unreasonably long.
pub(crate) fn read(layers: &[PathBuf], path: &str) -> Result<String, FsError> {
    for layer in layers {
        match look(layer, path)? {
            Found::Hidden => break,
            Found::Nothing => {}
            Found::Other => {
                return match read_in_root(layer, Path::new(path), MAX_FILE_BYTES) {
                    Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
                    Err(e) if e.is_not_found() => Ok(String::new()),
                    Err(e) => Err(e),
                };
            }
            Found::Merged | Found::Opaque => return Ok(String::new()),
        }
        if parent_hides(layer, path)? {
            break;
        }
    }
    Ok(String::new())
}

/// The directories that together form `path` in the image, topmost first; none when it is not
/// a directory (or a symbolic link is on the way).
///
/// # Errors
/// [`FsError`] when a layer cannot be read.
pub(crate) fn directories(layers: &[PathBuf], path: &str) -> Result<Vec<PathBuf>, FsError> {
    let relative = path.trim_matches('/');
    let mut found = Vec::new();
    for layer in layers {
        match look(layer, path)? {
            Found::Nothing => {}
            Found::Merged => found.push(layer.join(relative)),
            Found::Opaque => {
                found.push(layer.join(relative));
                break;
            }
            Found::Other | Found::Hidden => break,
        }
        if parent_hides(layer, path)? {
            break;
        }
    }
    Ok(found)
}

/// Whether the image has something at `path`, be it behind a symbolic link.
///
/// # Errors
/// [`FsError`] when a layer cannot be read.
pub(crate) fn exists(layers: &[PathBuf], path: &str) -> Result<bool, FsError> {
    for layer in layers {
        match look(layer, path)? {
            Found::Nothing => {}
            Found::Merged | Found::Opaque | Found::Other => return Ok(true),
            Found::Hidden => return Ok(false),
        }
        if parent_hides(layer, path)? {
            break;
        }
    }
    Ok(false)
}

fn parts(path: &str) -> Vec<&std::ffi::OsStr> {
    let components = Path::new(path).components();
    components
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name),
            Component::Prefix(_)
            | Component::RootDir
            | Component::CurDir
            | Component::ParentDir => None,
        })
        .collect()
}

fn look(layer: &Path, path: &str) -> Result<Found, FsError> {
    let mut dir = open_dir(layer)?;
    let parts = parts(path);
    let mut found = Found::Merged;
    for (index, name) in parts.iter().enumerate() {
        found = look_at(&dir, name, &layer.join(path.trim_start_matches('/')))?;
        match found {
            Found::Merged | Found::Opaque if index + 1 < parts.len() => {
                dir = match step(&dir, name) {
                    Ok(next) => next,
                    Err(_) => return Ok(Found::Nothing),
                };
            }
            Found::Merged | Found::Opaque => {}
            Found::Nothing | Found::Hidden | Found::Other => return Ok(found),
        }
    }
    Ok(found)
}

/// Whether a directory on the way to `path` is opaque in this layer.
fn parent_hides(layer: &Path, path: &str) -> Result<bool, FsError> {
    let mut dir = open_dir(layer)?;
    let parts = parts(path);
    for name in parts.iter().take(parts.len().saturating_sub(1)) {
        match look_at(&dir, name, layer)? {
            Found::Opaque => return Ok(true),
            Found::Merged => {}
            Found::Nothing | Found::Other | Found::Hidden => return Ok(false),
        }
        dir = match step(&dir, name) {
            Ok(next) => next,
            Err(_) => return Ok(false),
        };
    }
    Ok(false)
}

fn step(dir: &OwnedFd, name: &std::ffi::OsStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(dir, name, flags, Mode::empty())
}

fn look_at(dir: &OwnedFd, name: &std::ffi::OsStr, full: &Path) -> Result<Found, FsError> {
    let stat = match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(rustix::io::Errno::NOENT) => return Ok(Found::Nothing),
        Err(e) => {
            return Err(FsError::Io {
                operation: "inspect",
                path: full.to_owned(),
                source: e.into(),
            });
        }
    };
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            let opened = step(dir, name);
            let opaque = opened.is_ok_and(|fd| {
                let mut value = [0u8; 1];
                rustix::fs::fgetxattr(&fd, OPAQUE, &mut value).is_ok() && &value == b"y"
            });
            if opaque { Found::Opaque } else { Found::Merged }
        }
        FileType::CharacterDevice if stat.st_rdev == 0 => Found::Hidden,
        FileType::CharacterDevice
        | FileType::RegularFile
        | FileType::Symlink
        | FileType::BlockDevice
        | FileType::Fifo
        | FileType::Socket
        | FileType::Unknown => Found::Other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn layers(count: usize) -> (tempfile::TempDir, Vec<PathBuf>) {
        let dir = tempfile::tempdir().unwrap();
        let layers: Vec<PathBuf> = (0..count).map(|n| dir.path().join(n.to_string())).collect();
        for layer in &layers {
            fs::create_dir_all(layer.join("etc")).unwrap();
        }
        (dir, layers)
    }

    #[test]
    fn the_topmost_layer_with_the_file_wins() {
        let (_dir, layers) = layers(3);
        fs::write(layers[1].join("etc/passwd"), "upper").unwrap();
        fs::write(layers[2].join("etc/passwd"), "lower").unwrap();
        assert_eq!(read(&layers, "/etc/passwd").unwrap(), "upper");
        assert_eq!(read(&layers, "/etc/shadow").unwrap(), "");
    }

    #[test]
    fn a_whiteout_and_an_opaque_parent_hide_what_is_below() {
        let (_dir, layers) = layers(2);
        fs::write(layers[1].join("etc/passwd"), "hidden").unwrap();
        let whiteout = layers[0].join("etc/passwd");
        let device = rustix::fs::makedev(0, 0);
        let mode = Mode::from_raw_mode(0);
        let cwd = rustix::fs::CWD;
        rustix::fs::mknodat(cwd, &whiteout, FileType::CharacterDevice, mode, device).unwrap();
        assert_eq!(read(&layers, "/etc/passwd").unwrap(), "");
        fs::remove_file(&whiteout).unwrap();
        let etc = layers[0].join("etc");
        rustix::fs::setxattr(&etc, OPAQUE, b"y", rustix::fs::XattrFlags::empty()).unwrap();
        assert_eq!(read(&layers, "/etc/passwd").unwrap(), "");
    }

    #[test]
    fn a_directory_is_the_sum_of_its_layers_down_to_an_opaque_one() {
        let (_dir, layers) = layers(3);
        for layer in &layers {
            fs::create_dir_all(layer.join("data/x")).unwrap();
        }
        assert_eq!(directories(&layers, "/data/x").unwrap().len(), 3);
        let data = layers[1].join("data");
        rustix::fs::setxattr(&data, OPAQUE, b"y", rustix::fs::XattrFlags::empty()).unwrap();
        assert_eq!(directories(&layers, "/data/x").unwrap().len(), 2);
        assert!(directories(&layers, "/none").unwrap().is_empty());
    }
}
