//! Local PersistentVolumes: a directory or a block device of this node. All functions block.
//!
//! ```text
//! <root>/pods/<uid>/volumes/kubernetes.io~local-volume/<pv>         bind mount of the directory
//! <root>/pods/<uid>/volumeDevices/kubernetes.io~local-volume/<pv>   link to the device
//! <root>/plugins/kubernetes.io/local-volume/mounts/<pv>             filesystem of a device
//! ```
//!
//! A device is given a filesystem only when its beginning and its end hold nothing but zeros:
//! what cannot be read, or is not understood, is never taken for empty.

use super::csi::is_file_name;
use super::{Step, VolumeError};
use crate::errors::chain;
use linux::command::ShortCommand;
use linux::fs::create_dirs;
use linux::mount::MountAttrs;
use rustix::fs::{AtFlags, CWD};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, symlink};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

/// Directory name in a pod's directory.
const PLUGIN: &str = "kubernetes.io~local-volume";
/// Filesystem of devices that name none.
const DEFAULT_FILESYSTEM: &str = "ext4";
/// So much of a device's beginning and end has to be zero before it is formatted.
const BLANK: u64 = 1 << 20;
/// A program that makes a filesystem has so long.
const FORMAT_LIMIT: Duration = Duration::from_secs(600);
/// Where such programs are.
const PROGRAMS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// A local volume as a pod wants it.
#[derive(Debug, Clone)]
pub(crate) struct Local {
    pub(crate) uid: String,
    /// Name of the PersistentVolume.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) fs_type: Option<String>,
    pub(crate) options: Vec<String>,
    pub(crate) readonly: bool,
    pub(crate) block: bool,
}

/// What a path is.
enum Found {
    Directory,
    Device,
}

fn look(path: &Path) -> Result<Found, String> {
    let escapes = path.components().any(|c| c == Component::ParentDir);
    if !path.is_absolute() || escapes {
        return Err(format!(
            "invalid path: {} must not contain '..'",
            path.display()
        ));
    }
    let kind = match std::fs::metadata(path) {
        Ok(found) => found.file_type(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(format!("path {path:?} does not exist"));
        }
        Err(e) => return Err(format!("stat {}: {e}", path.display())),
    };
    if kind.is_dir() {
        Ok(Found::Directory)
    } else if kind.is_block_device() {
        Ok(Found::Device)
    } else {
        Err("only directory and block device are supported".to_owned())
    }
}

/// Where local volumes of the node are.
#[derive(Debug, Clone)]
pub(crate) struct LocalVolumes {
    root: PathBuf,
}

/// A volume that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mounted {
    /// What containers use.
    pub(crate) path: PathBuf,
    /// Another pod has it already: who owns its files is settled.
    pub(crate) shared: bool,
    /// It was there before.
    pub(crate) again: bool,
}

impl LocalVolumes {
    /// `root` is the kubelet's, a real path.
    pub(crate) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    fn pod(&self, uid: &str, kind: &str) -> PathBuf {
        self.root.join("pods").join(uid).join(kind).join(PLUGIN)
    }

    fn filesystems(&self) -> PathBuf {
        self.root.join("plugins/kubernetes.io/local-volume/mounts")
    }

    /// Makes the volume ready for a pod.
    ///
    /// # Errors
    /// Stock's words where it has some.
    pub(crate) fn mount(&self, volume: &Local) -> Result<Mounted, VolumeError> {
        let fail = |what: Step| {
            move |message: String| VolumeError::Failed {
                what,
                volume: volume.name.clone(),
                message,
            }
        };
        if !is_file_name(&volume.name) || !is_file_name(&volume.uid) {
            return Err(fail(Step::NewMounter)(
                "its name is no file name".to_owned(),
            ));
        }
        let found = look(&volume.path).map_err(fail(Step::NewMounter))?;
        if volume.block {
            let linked = self.link(volume, &found);
            return linked.map_err(fail(Step::MapPodDevice));
        }
        let from = match found {
            Found::Directory => volume.path.clone(),
            Found::Device => self.filesystem(volume).map_err(fail(Step::MountDevice))?,
        };
        self.bind(volume, &from).map_err(fail(Step::SetUp))
    }

    fn bind(&self, volume: &Local, from: &Path) -> Result<Mounted, String> {
        let at = self.pod(&volume.uid, "volumes").join(&volume.name);
        let table = mounts()?;
        let done = |again| Mounted {
            path: at.clone(),
            shared: self.is_shared(&table, volume),
            again,
        };
        if table.iter().any(|m| m.mount_point == at) {
            return Ok(done(true));
        }
        create_dirs(&at, 0o750).map_err(|e| chain(&e))?;
        let refused =
            |e: std::io::Error| format!("mount {} on {}: {e}", from.display(), at.display());
        let mount = linux::mount::clone_path(from, false).map_err(refused)?;
        linux::mount::add_attrs(mount.as_fd(), attrs(volume), false).map_err(refused)?;
        let target = linux::mount::open_path(&at).map_err(refused)?;
        linux::mount::attach(mount.as_fd(), target.as_fd()).map_err(refused)?;
        Ok(done(false))
    }

    /// Whether another pod has the volume mounted.
    fn is_shared(&self, table: &[linux::mountinfo::MountEntry], volume: &Local) -> bool {
        let pods = self.root.join("pods");
        let own = pods.join(&volume.uid);
        let tail = Path::new("volumes").join(PLUGIN).join(&volume.name);
        table.iter().any(|m| {
            m.mount_point.starts_with(&pods)
                && !m.mount_point.starts_with(&own)
                && m.mount_point.ends_with(&tail)
        })
    }

    fn link(&self, volume: &Local, found: &Found) -> Result<Mounted, String> {
        if matches!(found, Found::Directory) {
            return Err(format!("{} is not a block device", volume.path.display()));
        }
        let dir = self.pod(&volume.uid, "volumeDevices");
        create_dirs(&dir, 0o750).map_err(|e| chain(&e))?;
        let at = dir.join(&volume.name);
        match symlink(&volume.path, &at) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(format!("link {}: {e}", at.display()));
            }
            Ok(()) | Err(_) => {}
        }
        Ok(Mounted {
            path: at,
            shared: true,
            again: false,
        })
    }

    /// Mounts the filesystem of a device; makes one on a device that is blank.
    fn filesystem(&self, volume: &Local) -> Result<PathBuf, String> {
        let at = self.filesystems().join(&volume.name);
        if mounts()?.iter().any(|m| m.mount_point == at) {
            return Ok(at);
        }
        create_dirs(&at, 0o750).map_err(|e| chain(&e))?;
        let kind = volume.fs_type.as_deref().filter(|k| !k.is_empty());
        let kind = kind.unwrap_or(DEFAULT_FILESYSTEM);
        let device = &volume.path;
        let failed = |e: String| {
            format!(
                "local: failed to mount device {} at {} (fstype: {kind}), error {e}",
                device.display(),
                at.display()
            )
        };
        if !volume.readonly && is_blank(device).map_err(&failed)? {
            format_device(device, kind).map_err(&failed)?;
        }
        let source = device.to_string_lossy();
        let options = &volume.options;
        let attrs = MountAttrs {
            readonly: volume.readonly,
            ..MountAttrs::default()
        };
        let mount = linux::mount::filesystem(kind, &source, options, attrs);
        let mount = mount.map_err(|e| failed(e.to_string()))?;
        let target = linux::mount::open_path(&at).map_err(|e| failed(e.to_string()))?;
        linux::mount::attach(mount.as_fd(), target.as_fd()).map_err(|e| failed(e.to_string()))?;
        Ok(at)
    }

    /// Takes away what a pod had of local volumes: its mounts and links, and filesystems of
    /// devices nobody has any more. Never looks at what is mounted.
    ///
    /// # Errors
    /// A mount that is busy.
    pub(crate) fn unmount_pod(&self, uid: &str) -> Result<(), String> {
        if !is_file_name(uid) {
            return Err("the UID is no directory name".to_owned());
        }
        let dir = self.pod(uid, "volumes");
        for name in linux::fs::list_dir(&dir).map_err(|e| chain(&e))? {
            unmount(&dir.join(&name))?;
            let Some(name) = name.to_str() else { continue };
            let at = self.filesystems().join(name);
            let tail = Path::new("volumes").join(PLUGIN).join(name);
            let pods = self.root.join("pods");
            let used = mounts()?
                .iter()
                .any(|m| m.mount_point.starts_with(&pods) && m.mount_point.ends_with(&tail));
            if !used {
                unmount(&at)?;
            }
        }
        let links = self.pod(uid, "volumeDevices");
        for name in linux::fs::list_dir(&links).map_err(|e| chain(&e))? {
            linux::fs::remove_file(&links.join(name)).map_err(|e| chain(&e))?;
        }
        Ok(())
    }
}

fn mounts() -> Result<Vec<linux::mountinfo::MountEntry>, String> {
    linux::mountinfo::read().map_err(|e| format!("read the mount table: {e}"))
}

/// What a bind mount can honour of mount options.
fn attrs(volume: &Local) -> MountAttrs {
    let has = |word: &str| volume.options.iter().any(|o| o == word);
    MountAttrs {
        readonly: volume.readonly || has("ro"),
        nosuid: has("nosuid"),
        nodev: has("nodev"),
        noexec: has("noexec"),
    }
}

/// Takes down what is mounted at a path and removes the empty directory.
fn unmount(at: &Path) -> Result<(), String> {
    let refused = |what: &str, e: Errno| {
        let e = std::io::Error::from(e);
        format!("{what} {}: {e}", at.display())
    };
    let count = mounts()?.iter().filter(|m| m.mount_point == at).count();
    for _ in 0..count {
        match rustix::mount::unmount(at, UnmountFlags::NOFOLLOW) {
            Ok(()) | Err(Errno::INVAL) => {}
            Err(e) => return Err(refused("unmount", e)),
        }
    }
    match rustix::fs::unlinkat(CWD, at, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(refused("remove", e)),
    }
}

/// Whether a device holds nothing: its beginning and end were read and are zeros.
fn is_blank(device: &Path) -> Result<bool, String> {
    let refused = |e: std::io::Error| format!("read {}: {e}", device.display());
    let mut file = File::open(device).map_err(refused)?;
    let size = file.seek(SeekFrom::End(0)).map_err(refused)?;
    if size == 0 {
        return Err(format!("{} has no size", device.display()));
    }
    for start in [0, size.saturating_sub(BLANK)] {
        file.seek(SeekFrom::Start(start)).map_err(refused)?;
        let mut left = BLANK.min(size - start);
        let mut buffer = [0u8; 1 << 16];
        while left > 0 {
            let most = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            file.read_exact(&mut buffer[..most]).map_err(refused)?;
            if buffer[..most].iter().any(|b| *b != 0) {
                return Ok(false);
            }
            left -= most as u64;
        }
    }
    Ok(true)
}

fn format_device(device: &Path, kind: &str) -> Result<(), String> {
    if !kind.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return Err(format!("{kind:?} is no filesystem"));
    }
    let name = format!("mkfs.{kind}");
    let program = PROGRAMS.iter().map(|dir| Path::new(dir).join(&name));
    let program = program.into_iter().find(|p| p.exists());
    let program = program.ok_or_else(|| format!("this node has no {name}"))?;
    tracing::info!(device = %device.display(), kind, "Blank device gets a filesystem");
    let args = match kind {
        "ext3" | "ext4" => vec!["-F".into(), "-m0".into()],
        _ => Vec::new(),
    };
    let command = ShortCommand {
        program,
        args: args.into_iter().chain([device.into()]).collect(),
        env: vec![("PATH".into(), PROGRAMS.join(":").into())],
        stdin: Vec::new(),
        max_output_bytes: 1 << 16,
        time_limit: FORMAT_LIMIT,
    };
    let output = command.run().map_err(|e| chain(&e))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{name}: {}: {}", output.status, said.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(path: &Path, uid: &str) -> Local {
        Local {
            uid: uid.to_owned(),
            name: "pv".to_owned(),
            path: path.to_owned(),
            fs_type: None,
            options: vec![],
            readonly: false,
            block: false,
        }
    }

    #[test]
    fn a_directory_is_mounted_for_each_pod_and_outlives_them() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        let (root, disk) = (base.join("root"), base.join("disk"));
        std::fs::create_dir_all(&disk).unwrap();
        std::fs::write(disk.join("f"), "kept").unwrap();
        let volumes = LocalVolumes::new(&root);
        let first = volumes.mount(&local(&disk, "u1")).unwrap();
        assert!(!first.shared && !first.again);
        assert_eq!(
            std::fs::read_to_string(first.path.join("f")).unwrap(),
            "kept"
        );
        assert!(volumes.mount(&local(&disk, "u1")).unwrap().again);
        assert!(volumes.mount(&local(&disk, "u2")).unwrap().shared);
        for uid in ["u1", "u2", "u2", "none"] {
            volumes.unmount_pod(uid).unwrap();
        }
        assert!(!first.path.exists());
        assert_eq!(std::fs::read_to_string(disk.join("f")).unwrap(), "kept");
    }

    #[test]
    fn what_is_no_volume_is_refused_in_stocks_words() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = LocalVolumes::new(&dir.path().join("root"));
        let none = dir.path().join("none");
        assert_eq!(
            volumes.mount(&local(&none, "u")).unwrap_err().to_string(),
            format!(
                "MountVolume.NewMounter initialization failed for volume \"pv\" : path {none:?} does not exist"
            )
        );
        std::fs::write(&none, "").unwrap();
        let error = volumes.mount(&local(&none, "u")).unwrap_err().to_string();
        assert!(
            error.ends_with("only directory and block device are supported"),
            "{error}"
        );
        let mut block = local(dir.path(), "u");
        block.block = true;
        assert!(volumes.mount(&block).is_err());
        assert!(volumes.mount(&local(Path::new("/a/../b"), "u")).is_err());
    }

    #[test]
    fn a_device_is_blank_only_when_both_ends_are_read_and_zero() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let file = File::create(&path).unwrap();
        assert!(is_blank(&path).is_err());
        file.set_len(4 << 20).unwrap();
        assert_eq!(is_blank(&path), Ok(true));
        use std::os::unix::fs::FileExt as _;
        file.write_at(&[1], (4 << 20) - 1).unwrap();
        assert_eq!(is_blank(&path), Ok(false));
        file.write_at(&[0], (4 << 20) - 1).unwrap();
        file.write_at(&[1], 1080).unwrap();
        assert_eq!(is_blank(&path), Ok(false));
        assert!(is_blank(&dir.path().join("none")).is_err());
    }
}
