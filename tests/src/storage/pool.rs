//! A filesystem for a pool, in a sparse file, mounted for as long as a value lives.

use crate::command::{self, command};
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Size of the filesystem: volumes of 10 GiB have to fit several times. The file is sparse.
const POOL_BYTES: u64 = 256 << 30;

/// What the pool is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolFilesystem {
    /// xfs: files can share blocks.
    Xfs,
    /// ext4: they cannot.
    Ext4,
}

/// A directory with a mounted filesystem in it. What is mounted below it when it is dropped is
/// taken away; it was left by what was tested.
#[derive(Debug)]
pub struct ScratchPool {
    dir: tempfile::TempDir,
}

impl ScratchPool {
    /// Makes the filesystem and mounts it. Needs root.
    ///
    /// # Errors
    /// When it cannot be made or mounted.
    pub fn new(filesystem: PoolFilesystem) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("ferrule-csi-")
            .tempdir_in("/var/tmp")
            .context("create a directory for the pool")?;
        let scratch = Self { dir };
        let file = scratch.path("pool.img");
        File::create(&file)
            .and_then(|f| f.set_len(POOL_BYTES))
            .with_context(|| format!("create {}", file.display()))?;
        let name = file.display().to_string();
        let mut make = match filesystem {
            PoolFilesystem::Xfs => command("mkfs.xfs", &["-q", "-K", "-m", "reflink=1", &name]),
            PoolFilesystem::Ext4 => command("mkfs.ext4", &["-q", "-F", "-E", "nodiscard", &name]),
        };
        command::stdout(&mut make)?;
        let mount = scratch.path("mnt");
        fs::create_dir(&mount).with_context(|| format!("create {}", mount.display()))?;
        let target = mount.display().to_string();
        command::stdout(&mut command("mount", &["-o", "loop", &name, &target]))?;
        Ok(scratch)
    }

    /// The pool's directory, on the filesystem.
    #[must_use]
    pub fn pool(&self) -> PathBuf {
        self.path("mnt/pool")
    }

    /// A path beside the filesystem.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What is mounted below the directory, the pool's own filesystem not counted, topmost last.
    ///
    /// # Errors
    /// When the mount table cannot be read.
    pub fn mounts(&self) -> Result<Vec<PathBuf>> {
        let own = self.path("mnt");
        let mut found = below(self.dir.path())?;
        found.retain(|path| *path != own);
        Ok(found)
    }

    /// Loop devices whose file is in the pool.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn devices(&self) -> Result<Vec<String>> {
        use std::os::unix::fs::MetadataExt as _;
        let pool = self.path("mnt").metadata().context("inspect the pool")?;
        let all = linux::loopdev::list().context("list loop devices")?;
        let of_pool = all
            .into_iter()
            .filter(|(_, status)| status.backing_device == pool.dev());
        Ok(of_pool.map(|(_, status)| status.name).collect())
    }
}

fn below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mounts = linux::mountinfo::read().context("read the mount table")?;
    let found = mounts.into_iter().map(|mount| mount.mount_point);
    Ok(found.filter(|point| point.starts_with(dir)).collect())
}

impl Drop for ScratchPool {
    fn drop(&mut self) {
        for path in below(self.dir.path()).unwrap_or_default().iter().rev() {
            // The pool's own is the last; what was left above it goes with it.
            let _ = linux::mount::device::unmount(path);
        }
    }
}
