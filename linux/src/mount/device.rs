//! Filesystems on block devices, mounted where a path says, and taken away again (mount(2),
//! umount2(2)). What the kernel says afterwards is read from mountinfo by the caller.

use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::CString;
use std::io;
use std::path::Path;

/// Splits mount options into flags of the mount and what goes to the filesystem.
#[must_use]
pub fn parse_options(options: &[String]) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    let mut rest = String::new();
    for option in options.iter().flat_map(|option| option.split(',')) {
        let flag = match option {
            "ro" => MountFlags::RDONLY,
            "nosuid" => MountFlags::NOSUID,
            "nodev" => MountFlags::NODEV,
            "noexec" => MountFlags::NOEXEC,
            "sync" => MountFlags::SYNCHRONOUS,
            "dirsync" => MountFlags::DIRSYNC,
            "noatime" => MountFlags::NOATIME,
            "nodiratime" => MountFlags::NODIRATIME,
            "relatime" => MountFlags::RELATIME,
            "strictatime" => MountFlags::STRICTATIME,
            "lazytime" => MountFlags::LAZYTIME,
            "" | "rw" | "defaults" | "suid" | "dev" | "exec" | "async" | "atime" => {
                continue;
            }
            other => {
                if !rest.is_empty() {
                    rest.push(',');
                }
                rest.push_str(other);
                continue;
            }
        };
        flags |= flag;
    }
    (flags, rest)
}

/// Mounts the filesystem on `device` at `target`.
///
/// # Errors
/// `EINVAL` for an unknown option or no such filesystem there, `EUCLEAN` for a damaged one.
pub fn mount_device(
    device: &Path,
    target: &Path,
    fstype: &str,
    options: &[String],
) -> io::Result<()> {
    let (flags, data) = parse_options(options);
    let data = CString::new(data)?;
    let data = (!data.is_empty()).then_some(data.as_c_str());
    Ok(rustix::mount::mount(device, target, fstype, flags, data)?)
}

/// Takes away the topmost mount at `target`; a symbolic link there is not followed.
///
/// # Errors
/// `EBUSY` when it is in use, `EINVAL` when nothing is mounted there.
pub fn unmount(target: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(target, UnmountFlags::NOFOLLOW)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_split_between_mount_and_filesystem() {
        let options = ["noatime,discard".to_owned(), "ro".into(), "commit=5".into()];
        let (flags, rest) = parse_options(&options);
        assert_eq!(flags, MountFlags::NOATIME | MountFlags::RDONLY);
        assert_eq!(rest, "discard,commit=5");
    }
}
