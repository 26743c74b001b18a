//! How full the disk is.

use super::store::Store;
use crate::service::FsUsage;
use std::path::Path;

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
