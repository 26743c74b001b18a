//! Hands the files of a volume to a pod's fsGroup.
//!
//! Another pod may write to the volume meanwhile: every file is reached through descriptors below
//! the volume's root, links are never followed, other mounts are never entered. The root is
//! changed last, so that a run that broke off is begun anew under `OnRootMismatch`.

use crate::events::{EventSink, EventType};
use crate::launch::pod_uid;
use k8s_openapi::api::core::v1::Pod;
use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// When users are told that it takes long, and how often from then on.
const FIRST_REPORT: Duration = Duration::from_secs(30);
const NEXT_REPORT: Duration = Duration::from_secs(60);

/// Group may read and write (and enter, and give its name to new files).
const FILE_BITS: u32 = 0o660;
const DIR_BITS: u32 = 0o2770;

/// Hands a volume to a pod's group as the pod's change policy says. Large volumes take their
/// time, which users are told.
///
/// # Errors
/// A directory that cannot be read.
pub(crate) async fn apply(
    events: &EventSink,
    pod: &Pod,
    root: &Path,
    group: u32,
) -> Result<(), String> {
    let context = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    let policy = context.and_then(|c| c.fs_group_change_policy.as_deref());
    let only_if_wrong = policy == Some("OnRootMismatch");
    let done = Arc::new(AtomicU64::new(0));
    let (path, count) = (root.to_owned(), done.clone());
    let mut work = tokio::task::spawn_blocking(move || {
        hand_over(&path, group, only_if_wrong, &count).map_err(|e| e.to_string())
    });
    let shown = root.to_string_lossy();
    let shown = shown.find(pod_uid(pod)).map_or(&*shown, |at| &shown[at..]);
    let mut pause = FIRST_REPORT;
    let ended = loop {
        tokio::select! {
            ended = &mut work => break ended,
            () = tokio::time::sleep(pause) => {
                let text = if pause == FIRST_REPORT {
                    format!("Setting volume ownership for {shown} is taking longer than expected, consider using OnRootMismatch - https://kubernetes.io/docs/tasks/configure-pod-container/security-context/#configure-volume-permission-and-ownership-change-policy-for-pods")
                } else {
                    let files = done.load(Ordering::Relaxed);
                    format!("Setting volume ownership for {shown}, processed {files} files.")
                };
                let (warning, reason) = (EventType::Warning, "VolumePermissionChangeInProgress");
                events.pod_event(pod, None, warning, reason, text);
                pause = NEXT_REPORT;
            }
        }
    };
    let refused = ended.map_err(|e| format!("file work did not end: {e}"))??;
    if refused > 0 {
        tracing::warn!(refused, volume = %root.display(), "Files keep their group");
    }
    Ok(())
}

/// Whether the root is as it would be left, so that nothing is to be done.
fn root_is_right(stat: &Stat, group: u32) -> bool {
    stat.st_gid == group
        && FileType::from_raw_mode(stat.st_mode) == FileType::Directory
        && stat.st_mode & DIR_BITS == DIR_BITS
}

/// Hands everything below `root`, and `root` itself, to the group; with `only_if_wrong` nothing
/// when the root is right already. `done` counts files. Files that refuse are left as they are,
/// as the stock kubelet does; tells how many.
///
/// # Errors
/// A directory that cannot be read.
pub(crate) fn hand_over(
    root: &Path,
    group: u32,
    only_if_wrong: bool,
    done: &AtomicU64,
) -> io::Result<u64> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = rustix::fs::open(root, flags, Mode::empty()).map_err(|e| at(root, e))?;
    let stat = rustix::fs::fstat(&top).map_err(|e| at(root, e))?;
    if only_if_wrong && root_is_right(&stat, group) {
        return Ok(0);
    }
    let mut walk = Walk {
        group,
        done,
        refused: 0,
        waiting: vec![PathBuf::new()],
    };
    while let Some(dir) = walk.waiting.pop() {
        walk.directory(&top, &dir)
            .map_err(|e| at(&root.join(&dir), e))?;
    }
    walk.one(top.as_fd(), &stat);
    Ok(walk.refused)
}

fn at(path: &Path, error: rustix::io::Errno) -> io::Error {
    let error = io::Error::from(error);
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

struct Walk<'a> {
    group: u32,
    done: &'a AtomicU64,
    refused: u64,
    /// Directories below the root still to be entered.
    waiting: Vec<PathBuf>,
}

impl Walk<'_> {
    fn directory(&mut self, top: &OwnedFd, path: &Path) -> Result<(), rustix::io::Errno> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let here = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let dir = match rustix::fs::openat2(top, here, flags, Mode::empty(), resolve) {
            Ok(dir) => dir,
            // Gone, replaced, or another mount: no file of this volume.
            Err(
                rustix::io::Errno::NOENT
                | rustix::io::Errno::NOTDIR
                | rustix::io::Errno::LOOP
                | rustix::io::Errno::XDEV,
            ) => return Ok(()),
            Err(error) => return Err(error),
        };
        for entry in Dir::read_from(&dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let Ok(file) = rustix::fs::openat(&dir, name, flags, Mode::empty()) else {
                continue;
            };
            let Ok(stat) = rustix::fs::fstat(&file) else {
                continue;
            };
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                self.waiting
                    .push(path.join(OsStr::from_bytes(name.to_bytes())));
            }
            self.one(file.as_fd(), &stat);
        }
        Ok(())
    }

    fn one(&mut self, file: BorrowedFd<'_>, stat: &Stat) {
        self.done.fetch_add(1, Ordering::Relaxed);
        if self.change(file, stat).is_err() {
            self.refused += 1;
        }
    }

    fn change(&self, file: BorrowedFd<'_>, stat: &Stat) -> io::Result<()> {
        if stat.st_gid != self.group {
            let group = Some(Gid::from_raw(self.group));
            rustix::fs::chownat(file, "", None, group, AtFlags::EMPTY_PATH)?;
        }
        let bits = match FileType::from_raw_mode(stat.st_mode) {
            // The mode of a link means nothing.
            FileType::Symlink => return Ok(()),
            FileType::Directory => DIR_BITS,
            _ => FILE_BITS,
        };
        let (now, wanted) = (stat.st_mode & 0o7777, stat.st_mode & 0o7777 | bits);
        // A change of group takes set-id bits away from files.
        if now == wanted && (stat.st_gid == self.group || now & 0o6000 == 0) {
            return Ok(());
        }
        // The descriptor is no path to the content; its name in /proc is.
        let name = format!("/proc/self/fd/{}", file.as_raw_fd());
        std::fs::set_permissions(name, std::fs::Permissions::from_mode(wanted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    fn mode(path: &Path) -> (u32, u32) {
        let found = std::fs::symlink_metadata(path).unwrap();
        (found.gid(), found.mode() & 0o7777)
    }

    #[test]
    fn everything_in_the_volume_and_nothing_behind_links_is_handed_over() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("volume"), dir.path().join("outside"));
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        for path in [&root.join("a/b/f"), &root.join("tool"), &outside] {
            std::fs::write(path, "x").unwrap();
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        std::fs::set_permissions(root.join("tool"), std::fs::Permissions::from_mode(0o4711))
            .unwrap();
        std::os::unix::fs::symlink(&outside, root.join("link")).unwrap();
        std::os::unix::fs::symlink(dir.path(), root.join("up")).unwrap();
        let done = AtomicU64::new(0);
        assert_eq!(hand_over(&root, 4711, false, &done).unwrap(), 0);
        assert_eq!(done.into_inner(), 7);
        assert_eq!(mode(&root.join("a/b/f")), (4711, 0o660));
        assert_eq!(mode(&root.join("tool")), (4711, 0o4771));
        assert_eq!(mode(&root.join("a/b")), (4711, 0o2775));
        assert_eq!(mode(&root), (4711, 0o2775));
        assert_eq!(mode(&root.join("link")).0, 4711);
        assert_eq!(mode(&outside), (0, 0o600));
        assert_ne!(mode(dir.path()).0, 4711);
    }

    #[test]
    fn a_root_that_is_right_spares_the_walk() {
        let dir = tempfile::tempdir().unwrap();
        let done = AtomicU64::new(0);
        hand_over(dir.path(), 7, true, &done).unwrap();
        assert_eq!(done.load(Ordering::Relaxed), 1);
        std::fs::write(dir.path().join("f"), "x").unwrap();
        // It got the group of its directory.
        std::os::unix::fs::lchown(dir.path().join("f"), None, Some(0)).unwrap();
        hand_over(dir.path(), 7, true, &done).unwrap();
        assert_ne!(mode(&dir.path().join("f")).0, 7);
        // Another group is a mismatch.
        hand_over(dir.path(), 8, true, &done).unwrap();
        assert_eq!(mode(&dir.path().join("f")).0, 8);
    }
}
