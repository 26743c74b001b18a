//! Making room: which images go, and how full the disk is.

use super::error::{ImageError, Result};
use super::store::Store;
use crate::service::{FsUsage, ImageId};
use std::path::Path;
use std::time::Duration;

/// What a collection removed. Images in use, pinned, or younger than the age asked for stay;
/// the longest unused go first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Bytes the filesystem has more now, by content size of the layers removed.
    pub freed_bytes: u64,
    /// Images removed.
    pub removed: Vec<ImageId>,
}

/// Removes unused images until `bytes` are freed.
pub(crate) fn collect(store: &Store, bytes: u64, min_age: Duration) -> Result<GcReport> {
    let mut report = GcReport::default();
    for record in store.unused(min_age) {
        if report.freed_bytes >= bytes {
            break;
        }
        let before = store.used_bytes();
        match store.remove(&record.id) {
            Ok(()) => {
                report.freed_bytes += before.saturating_sub(store.used_bytes());
                report.removed.push(ImageId(record.id.clone()));
            }
            // Taken meanwhile.
            Err(ImageError::InUse(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(report)
}

/// Use of the filesystem below `root`.
pub(crate) fn fs_usage(root: &Path, store: &Store) -> FsUsage {
    let mut usage = FsUsage {
        path: root.to_owned(),
        used_bytes: store.used_bytes(),
        ..FsUsage::default()
    };
    if let Ok(stat) = rustix::fs::statvfs(root) {
        usage.capacity_bytes = stat.f_blocks * stat.f_frsize;
        usage.available_bytes = stat.f_bavail * stat.f_frsize;
        usage.inodes = stat.f_files;
        usage.inodes_free = stat.f_favail;
    }
    usage
}
