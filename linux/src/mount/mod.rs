//! Mounts by descriptor (fsopen, open_tree, move_mount, mount_setattr), so that no path is
//! resolved twice and nothing outside a container's root can be reached by a symlink.
//!
//! Purpose: the pieces a container's filesystem is put together from. What is mounted where is
//! decided by the caller. A mount is first made detached, given its attributes, and attached as
//! the last step; whoever looks never sees it half made.
//!
//! [`device`] mounts filesystems on block devices by path. [`resolve`] walks paths beneath a root and makes what is missing.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

pub mod device;
pub mod resolve;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Attributes of a mount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MountAttrs {
    /// Read-only.
    pub readonly: bool,
    /// Ignore set-user-id bits and file capabilities.
    pub nosuid: bool,
    /// Device nodes do not work.
    pub nodev: bool,
    /// Nothing can be executed.
    pub noexec: bool,
}

impl MountAttrs {
    fn bits(self) -> u32 {
        let all = [
            (self.readonly, MountAttrFlags::MOUNT_ATTR_RDONLY),
            (self.nosuid, MountAttrFlags::MOUNT_ATTR_NOSUID),
            (self.nodev, MountAttrFlags::MOUNT_ATTR_NODEV),
            (self.noexec, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        ];
        all.iter()
            .filter(|(on, _)| *on)
            .fold(0, |bits, (_, flag)| bits | flag.bits())
    }
}

/// How mount events travel between a mount and its peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peering {
    /// Not at all.
    Private,
    /// From the peers to this mount.
    Slave,
    /// Both ways.
    Shared,
}

/// Make a detached mount of a filesystem type. Options are `key=value` or flags; the generic
/// words `ro`, `rw`, `nosuid`, `nodev`, `noexec`, `relatime` among them become attributes.
///
/// # Errors
/// `ENODEV` for an unknown type, `EINVAL` for a bad option, and other refusals.
pub fn filesystem(
    fstype: &str,
    source: &str,
    options: &[String],
    attrs: MountAttrs,
) -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC)?;
    // Some filesystems refuse a source; it is only a name in the mount table.
    let _ = rustix::mount::fsconfig_set_string(&context, "source", source);
    let mut attrs = attrs;
    for option in options {
        match option.as_str() {
            "ro" => attrs.readonly = true,
            "nosuid" => attrs.nosuid = true,
            "nodev" => attrs.nodev = true,
            "noexec" => attrs.noexec = true,
            "rw" | "relatime" | "defaults" | "" => {}
            other => match other.split_once('=') {
                Some((key, value)) => {
                    rustix::mount::fsconfig_set_string(&context, key, value)?;
                }
                None => rustix::mount::fsconfig_set_flag(&context, other)?,
            },
        }
    }
    rustix::mount::fsconfig_create(&context)?;
    Ok(rustix::mount::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::from_bits_retain(attrs.bits()),
    )?)
}

/// What an overlay is made of.
#[derive(Debug)]
pub struct Overlay<'a> {
    /// Lower directories, topmost first.
    pub lower: &'a [PathBuf],
    /// Writable layer, and a work directory on its filesystem. Without them the overlay is
    /// read-only and takes two lower directories at least.
    pub changes: Option<(&'a Path, &'a Path)>,
    /// More options.
    pub options: &'a [String],
}

/// A detached overlay. Kernels before Linux 6.5 have to mount it somewhere first: at `scratch`, a
/// directory nobody else uses in this mount namespace.
///
/// # Errors
/// As [`overlay_at`].
pub fn overlay_detached(overlay: &Overlay<'_>, scratch: &Path) -> io::Result<OwnedFd> {
    match overlay_by_context(overlay) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let mounted = overlay_by_string(overlay, scratch)?;
            let detached = clone_fd(mounted.as_fd(), false);
            rustix::mount::unmount(scratch, UnmountFlags::DETACH)?;
            detached
        }
        made => made,
    }
}

/// Mount an overlay and return a descriptor of its root, attached at `at`.
///
/// Uses one `lowerdir+` per layer (Linux 6.5); older kernels take all in one string, which is
/// kept short by naming the directories through descriptors.
///
/// # Errors
/// `ENOENT` when a directory is missing, and other refusals.
pub fn overlay_at(overlay: &Overlay<'_>, at: &Path) -> io::Result<OwnedFd> {
    match overlay_by_context(overlay) {
        Ok(mount) => {
            let target = open_path(at)?;
            attach(mount.as_fd(), target.as_fd())?;
            Ok(mount)
        }
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => overlay_by_string(overlay, at),
        Err(error) => Err(error),
    }
}

fn overlay_by_context(overlay: &Overlay<'_>) -> io::Result<OwnedFd> {
    use std::os::unix::ffi::OsStrExt;
    let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "source", "overlay")?;
    // A value may have 255 bytes; longer paths go by descriptor.
    let mut held = Vec::new();
    let mut set = |key: &str, path: &Path| -> io::Result<()> {
        if path.as_os_str().as_bytes().len() < 255 {
            return Ok(rustix::mount::fsconfig_set_string(&context, key, path)?);
        }
        let fd = open_path(path)?;
        let name = fd_path(fd.as_fd());
        held.push(fd);
        Ok(rustix::mount::fsconfig_set_string(&context, key, name)?)
    };
    for lower in overlay.lower {
        set("lowerdir+", lower)?;
    }
    if let Some((upper, work)) = overlay.changes {
        set("upperdir", upper)?;
        set("workdir", work)?;
    }
    for option in overlay.options {
        match option.split_once('=') {
            Some((key, value)) => rustix::mount::fsconfig_set_string(&context, key, value)?,
            None => rustix::mount::fsconfig_set_flag(&context, option.as_str())?,
        }
    }
    rustix::mount::fsconfig_create(&context)?;
    Ok(rustix::mount::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )?)
}

fn overlay_by_string(overlay: &Overlay<'_>, at: &Path) -> io::Result<OwnedFd> {
    // The descriptors stay open over the call, because the options name them.
    let lower = overlay
        .lower
        .iter()
        .map(|p| open_path(p))
        .collect::<io::Result<Vec<_>>>()?;
    let changes = match overlay.changes {
        Some((upper, work)) => Some((open_path(upper)?, open_path(work)?)),
        None => None,
    };
    let names: Vec<String> = lower.iter().map(|fd| fd_path(fd.as_fd())).collect();
    let mut data = format!("lowerdir={}", names.join(":"));
    if let Some((upper, work)) = &changes {
        for (key, fd) in [("upperdir", upper), ("workdir", work)] {
            data.push_str(&format!(",{key}={}", fd_path(fd.as_fd())));
        }
    }
    for option in overlay.options {
        data.push(',');
        data.push_str(option);
    }
    let data = std::ffi::CString::new(data)?;
    rustix::mount::mount(
        "overlay",
        at,
        "overlay",
        rustix::mount::MountFlags::empty(),
        Some(data.as_c_str()),
    )?;
    open_path(at)
}

/// A detached copy of the mount at `path`, with what is mounted below it when `recursive`.
///
/// # Errors
/// `ENOENT` when the path does not exist.
pub fn clone_path(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    Ok(rustix::mount::open_tree(
        rustix::fs::CWD,
        path,
        tree_flags(recursive),
    )?)
}

/// A detached copy of what an open descriptor refers to: exactly that file, no path again.
///
/// # Errors
/// The kernel's refusal.
pub fn clone_fd(fd: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    let flags = tree_flags(recursive) | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(rustix::mount::open_tree(fd, "", flags)?)
}

fn tree_flags(recursive: bool) -> OpenTreeFlags {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::OPEN_TREE_CLONE;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    flags
}

/// Attach a detached mount on top of the file or directory behind `target`.
///
/// # Errors
/// `ENOTDIR` when one is a directory and the other is not.
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(mount, "", target, "", flags)?)
}

/// Layout of `struct mount_attr` (mount_setattr(2)).
#[repr(C)]
#[derive(Default)]
struct RawMountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Add attributes to the mount a descriptor refers to, and to all below it when `recursive`
/// (mount_setattr(2), Linux 5.12).
///
/// # Errors
/// The kernel's refusal.
pub fn add_attrs(mount: BorrowedFd<'_>, attrs: MountAttrs, recursive: bool) -> io::Result<()> {
    if attrs == MountAttrs::default() {
        return Ok(());
    }
    let raw = RawMountAttr {
        attr_set: u64::from(attrs.bits()),
        ..RawMountAttr::default()
    };
    mount_setattr(mount, &raw, recursive)
}

/// Let a detached mount show ids as the user namespace behind `userns` maps them: a file of user
/// 0 on disk is one of the namespace's user 0 (MOUNT_ATTR_IDMAP, Linux 5.12; tmpfs 6.3). Mounts
/// below it are left as they are.
///
/// # Errors
/// `EINVAL` when the filesystem cannot, `EPERM` when the mount is mapped already.
pub fn map_ids(mount: BorrowedFd<'_>, userns: BorrowedFd<'_>) -> io::Result<()> {
    let raw = RawMountAttr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        userns_fd: userns.as_raw_fd() as u64,
        ..RawMountAttr::default()
    };
    mount_setattr(mount, &raw, false)
}

/// Change how mount events travel, for the mount and all below it.
///
/// # Errors
/// The kernel's refusal.
pub fn set_peering(mount: BorrowedFd<'_>, peering: Peering) -> io::Result<()> {
    let propagation = match peering {
        Peering::Private => libc::MS_PRIVATE,
        Peering::Slave => libc::MS_SLAVE,
        Peering::Shared => libc::MS_SHARED,
    };
    mount_setattr(
        mount,
        &RawMountAttr {
            propagation,
            ..RawMountAttr::default()
        },
        true,
    )
}

fn mount_setattr(mount: BorrowedFd<'_>, attr: &RawMountAttr, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: reads one `mount_attr` of the size given, which lives over the call.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags as u32,
            std::ptr::from_ref(attr),
            size_of::<RawMountAttr>(),
        )
    };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Cut every mount of this namespace off from its peers. Only in a mount namespace of one's own.
///
/// # Errors
/// The kernel's refusal.
pub fn make_all_private() -> io::Result<()> {
    let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    Ok(rustix::mount::mount_change("/", flags)?)
}

/// Make the directory behind `root` (which must be a mount) the root of this mount namespace
/// and let go of the old one. The working directory is then `/`.
///
/// # Errors
/// The kernel's refusal.
pub fn pivot_into(root: BorrowedFd<'_>) -> io::Result<()> {
    rustix::process::fchdir(root)?;
    // With both the same, the old root ends up mounted on top of the new one's "." …
    rustix::process::pivot_root(".", ".")?;
    // … and is what "." is now; nothing of it may stay reachable.
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir("/")?)
}

/// Open a path without access to its content (O_PATH).
///
/// # Errors
/// `ENOENT` when it does not exist.
pub fn open_path(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// The name of a descriptor in /proc, usable as a path by this process.
fn fd_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_become_the_kernels_bits() {
        let attrs = MountAttrs {
            readonly: true,
            nosuid: true,
            nodev: true,
            noexec: true,
        };
        assert_eq!(attrs.bits(), 0xf);
        assert_eq!(MountAttrs::default().bits(), 0);
    }

    #[test]
    fn a_detached_tmpfs_is_writable_and_vanishes_with_its_descriptor() {
        let options = ["size=64k".to_owned(), "mode=755".into(), "noexec".into()];
        let mount = filesystem("tmpfs", "x", &options, MountAttrs::default()).unwrap();
        resolve::make_dirs(mount.as_fd(), "a/b/c", 0o755).unwrap();
        assert!(resolve::lookup(mount.as_fd(), "/a/b/c").is_ok());
        add_attrs(
            mount.as_fd(),
            MountAttrs {
                readonly: true,
                ..MountAttrs::default()
            },
            false,
        )
        .unwrap();
        let error = resolve::make_dirs(mount.as_fd(), "d", 0o755).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    }

    #[test]
    fn an_unknown_filesystem_or_option_is_refused() {
        assert!(filesystem("nosuchfs", "x", &[], MountAttrs::default()).is_err());
        let bad = ["frobnicate=1".to_owned()];
        assert!(filesystem("tmpfs", "x", &bad, MountAttrs::default()).is_err());
    }
}
