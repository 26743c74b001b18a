//! Writes all files of a volume in one step, in the layout users know:
//!
//! ```text
//! volume/..2026_11_21_13_20_05.123456789/key   the files
//! volume/..data -> ..2026_11_21_13_20_05.123456789
//! volume/key -> ..data/key
//! ```
//!
//! A reader sees all old or all new files: the swap is one rename of `..data`. A kill leaves at
//! most a timestamped directory nobody points to; the next write removes it. Blocking.

use super::payload::Payload;
use rustix::fs::{AtFlags, CWD, Gid, Mode, Uid};
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

const DATA: &str = "..data";
const DATA_NEW: &str = "..data_tmp";

/// Brings the directory `volume` to `files`; makes it when missing. Tells whether it changed.
///
/// # Errors
/// Names the path the kernel refused.
pub(crate) fn write(volume: &Path, files: &Payload, group: Option<u32>) -> io::Result<bool> {
    match current(volume) {
        Some(old) if same(&volume.join(&old), files) && links_stand(volume, files) => {
            return Ok(false);
        }
        Some(_) => {}
        None => ensure_volume(volume, group)?,
    }
    let name = timestamp();
    let dir = volume.join(&name);
    make_dir(&dir, group)?;
    for (path, file) in files {
        write_file(&dir, path, file, group).map_err(|e| at(&dir.join(path), &e))?;
    }
    let new = volume.join(DATA_NEW);
    remove_link(&new)?;
    std::os::unix::fs::symlink(&name, &new).map_err(|e| at(&new, &e))?;
    std::fs::rename(&new, volume.join(DATA)).map_err(|e| at(&new, &e))?;
    link_names(volume, files, group)?;
    remove_old(volume, &name)?;
    Ok(true)
}

fn at(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Makes the volume's directory, owned and open as it shall be.
fn ensure_volume(volume: &Path, group: Option<u32>) -> io::Result<()> {
    if let Some(parent) = volume.parent() {
        let mut builder = std::fs::DirBuilder::new();
        let made = builder.recursive(true).mode(0o750).create(parent);
        made.map_err(|e| at(parent, &e))?;
    }
    make_dir(volume, group)
}

fn make_dir(path: &Path, group: Option<u32>) -> io::Result<()> {
    match std::fs::create_dir(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(at(path, &error)),
    }
    own(path, None, group)?;
    let mode = if group.is_some() { 0o2755 } else { 0o755 };
    let mode = std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(path, mode).map_err(|e| at(path, &e))
}

fn own(path: &Path, user: Option<u32>, group: Option<u32>) -> io::Result<()> {
    if user.is_none() && group.is_none() {
        return Ok(());
    }
    let (user, group) = (user.map(Uid::from_raw), group.map(Gid::from_raw));
    rustix::fs::chownat(CWD, path, user, group, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|e| at(path, &e.into()))
}

fn write_file(
    dir: &Path,
    path: &Path,
    file: &super::payload::File,
    group: Option<u32>,
) -> io::Result<()> {
    let mut above = dir.to_owned();
    if let Some(parents) = path.parent() {
        for part in parents {
            above.push(part);
            if !above.is_dir() {
                make_dir(&above, group)?;
            }
        }
    }
    let path = dir.join(path);
    std::fs::write(&path, &file.data)?;
    own(&path, file.user, group)?;
    // A group reads what it owns.
    let mode = if group.is_some() {
        file.mode | 0o440
    } else {
        file.mode
    };
    rustix::fs::chmod(&path, Mode::from_raw_mode(mode))?;
    Ok(())
}

/// The directory `..data` points to, when it is one of ours.
fn current(volume: &Path) -> Option<OsString> {
    let target = std::fs::read_link(volume.join(DATA)).ok()?;
    let name = target.file_name()?;
    (name == target.as_os_str()).then(|| name.to_owned())
}

fn same(dir: &Path, files: &Payload) -> bool {
    let mut count = 0;
    count_files(dir, &mut count);
    count == files.len()
        && files
            .iter()
            .all(|(path, file)| std::fs::read(dir.join(path)).is_ok_and(|old| old == file.data))
}

fn count_files(dir: &Path, count: &mut usize) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => count_files(&entry.path(), count),
            Ok(_) | Err(_) => *count += 1,
        }
    }
}

fn first_names(files: &Payload) -> BTreeSet<&OsStr> {
    files.keys().filter_map(|path| path.iter().next()).collect()
}

fn link_target(name: &OsStr) -> PathBuf {
    Path::new(DATA).join(name)
}

fn links_stand(volume: &Path, files: &Payload) -> bool {
    first_names(files)
        .into_iter()
        .all(|name| std::fs::read_link(volume.join(name)).is_ok_and(|t| t == link_target(name)))
}

/// Makes the names users see and removes those that stand for nothing any more.
fn link_names(volume: &Path, files: &Payload, group: Option<u32>) -> io::Result<()> {
    let names = first_names(files);
    for name in &names {
        let path = volume.join(name);
        let target = link_target(name);
        if std::fs::read_link(&path).is_ok_and(|t| t == target) {
            continue;
        }
        // A nested mount point of the same name stays a directory.
        match std::os::unix::fs::symlink(&target, &path) {
            Ok(()) => own(&path, None, group)?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(at(&path, &error)),
        }
    }
    for entry in std::fs::read_dir(volume).map_err(|e| at(volume, &e))? {
        let name = entry?.file_name();
        if names.contains(name.as_os_str()) || name.to_string_lossy().starts_with("..") {
            continue;
        }
        let path = volume.join(&name);
        if std::fs::read_link(&path).is_ok_and(|t| t == link_target(&name)) {
            remove_link(&path)?;
        }
    }
    Ok(())
}

fn remove_link(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(path, &error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Removes timestamped directories but the current one.
fn remove_old(volume: &Path, keep: &OsStr) -> io::Result<()> {
    for entry in std::fs::read_dir(volume).map_err(|e| at(volume, &e))? {
        let entry = entry?;
        let name = entry.file_name();
        let ours = name.to_string_lossy().starts_with("..20");
        if ours && name != keep && entry.file_type()?.is_dir() {
            linux::fs::remove_tree(&entry.path()).map_err(io::Error::other)?;
        }
    }
    Ok(())
}

/// `..2026_11_21_13_20_05.123456789`, UTC.
fn timestamp() -> OsString {
    let now = jiff::Timestamp::now();
    let nanos = now.subsec_nanosecond();
    format!("..{}.{nanos:09}", now.strftime("%Y_%m_%d_%H_%M_%S")).into()
}

#[cfg(test)]
mod tests {
    use super::super::payload::File;
    use super::*;
    use proptest::prelude::*;

    fn files(list: &[(String, u8)]) -> Payload {
        let file = |n: u8| File {
            data: vec![n; n.into()],
            mode: 0o640,
            user: None,
        };
        list.iter()
            .map(|(path, n)| (PathBuf::from(path), file(*n)))
            .collect()
    }

    /// What a reader of the volume sees, through the names users use.
    fn view(volume: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        fn walk(root: &Path, dir: &Path, out: &mut Vec<(PathBuf, Vec<u8>)>) {
            for entry in std::fs::read_dir(dir).unwrap().flatten() {
                if entry.file_name().to_string_lossy().starts_with("..") {
                    continue;
                }
                let path = entry.path();
                if path.is_dir() {
                    walk(root, &path, out);
                } else {
                    out.push((
                        path.strip_prefix(root).unwrap().to_owned(),
                        std::fs::read(&path).unwrap(),
                    ));
                }
            }
        }
        let mut out = Vec::new();
        walk(volume, volume, &mut out);
        out.sort();
        out
    }

    fn stamped(volume: &Path) -> usize {
        let names = std::fs::read_dir(volume).unwrap().flatten();
        names
            .filter(|e| e.file_name().to_string_lossy().starts_with("..20"))
            .count()
    }

    #[test]
    fn the_layout_is_the_one_users_know_and_sameness_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("v");
        let one = files(&[("a".into(), 1), ("d/b".into(), 2)]);
        assert!(write(&volume, &one, None).unwrap());
        assert!(!write(&volume, &one, None).unwrap());
        assert_eq!(
            std::fs::read_link(volume.join("a")).unwrap(),
            Path::new("..data/a")
        );
        assert_eq!(
            std::fs::read_link(volume.join("d")).unwrap(),
            Path::new("..data/d")
        );
        let target = std::fs::read_link(volume.join("..data")).unwrap();
        let name = target.to_str().unwrap();
        assert!(
            name.starts_with("..20") && name.len() == "..2026_11_21_13_20_05.123456789".len(),
            "{name}"
        );
        assert_eq!(
            std::fs::metadata(volume.join("a"))
                .unwrap()
                .permissions()
                .mode()
                & 0o7777,
            0o640
        );
    }

    #[test]
    fn a_nested_mount_point_survives_updates() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("v");
        write(&volume, &files(&[("a".into(), 1)]), None).unwrap();
        std::fs::create_dir(volume.join("nested")).unwrap();
        write(&volume, &files(&[("b".into(), 1)]), None).unwrap();
        assert!(volume.join("nested").is_dir() && !volume.join("a").exists());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn readers_see_exactly_the_last_payload_whatever_a_kill_left(
            steps in prop::collection::vec(
                (prop::collection::vec(("[a-c](/[d-e])?", 0_u8..9), 0..5), 0_u8..4), 1..6),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let volume = dir.path().join("v");
            for (list, debris) in steps {
                // A path that is both file and directory is refused before the writer.
                let list: Vec<_> = list.iter()
                    .filter(|(p, _)| !list.iter().any(|(q, _)| q != p && (Path::new(q).starts_with(p) || Path::new(p).starts_with(q))))
                    .cloned().collect();
                let wanted = files(&list);
                write(&volume, &wanted, None).unwrap();
                let want: Vec<_> = wanted.iter().map(|(p, f)| (p.clone(), f.data.clone())).collect();
                prop_assert_eq!(view(&volume), want);
                prop_assert!(stamped(&volume) <= 2);
                match debris {
                    0 => { std::fs::create_dir_all(volume.join("..2020_01_01_00_00_00.000000000/x")).unwrap(); }
                    1 => { let _ = std::os::unix::fs::symlink("..nowhere", volume.join(DATA_NEW)); }
                    2 => { let _ = std::fs::remove_file(volume.join("a")); }
                    _ => {}
                }
            }
        }
    }
}
