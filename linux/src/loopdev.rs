//! Loop devices: a regular file as a block device (loop(4), `linux/loop.h`).
//!
//! A device is found by the inode behind it, never by a path: paths lie after renames and inside
//! mount namespaces. What is attached, and for how long, is decided by the caller.
#![expect(unsafe_code, reason = "ioctls without a safe wrapper")]

use rustix::fs::{FileType, Mode, OFlags};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CLR_FD: libc::c_ulong = 0x4C01;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
const LOOP_SET_CAPACITY: libc::c_ulong = 0x4C07;
const LOOP_SET_DIRECT_IO: libc::c_ulong = 0x4C08;

const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// Major number of loop devices (Documentation/admin-guide/devices.txt).
pub const LOOP_MAJOR: u32 = 7;

/// Bytes of a device's name, the closing zero not counted.
const NAME_BYTES: usize = 63;

/// Others take free devices too: between asking for one and configuring it, it may be gone.
const ATTEMPTS: u32 = 64;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl LoopInfo64 {
    const fn zero() -> Self {
        Self {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            sizelimit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: 0,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

/// How a file becomes a device.
#[derive(Debug, Clone, Copy)]
pub struct LoopOptions<'a> {
    /// Writes are refused.
    pub read_only: bool,
    /// The device lets go of the file when nobody has it open or mounted any more.
    pub autoclear: bool,
    /// Past the page cache of the file, where the filesystem below can.
    pub direct_io: bool,
    /// A name people see in `losetup`; cut at 63 bytes.
    pub name: &'a str,
}

/// What a device says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoopStatus {
    /// Device number of the filesystem that holds the file, as fstat(2) gives it.
    pub backing_device: u64,
    /// Inode of the file.
    pub backing_inode: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// It goes with its last user.
    pub autoclear: bool,
    /// Past the page cache of the file.
    pub direct_io: bool,
    /// Its name.
    pub name: String,
}

/// An attached device, held open: while this lives, it cannot clear itself.
#[derive(Debug)]
pub struct LoopDevice {
    /// Its number: N of `/dev/loopN`.
    pub index: u32,
    fd: OwnedFd,
}

impl LoopDevice {
    /// Its node.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        node(self.index)
    }

    /// What it says of itself.
    ///
    /// # Errors
    /// `ENXIO` when no file is attached.
    pub fn status(&self) -> io::Result<LoopStatus> {
        let mut info = LoopInfo64::zero();
        // SAFETY: the kernel fills one `loop_info64`, which lives over the call.
        let rc = unsafe { libc::ioctl(self.fd.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) };
        check(rc)?;
        let end = info.file_name.iter().position(|b| *b == 0);
        let name = &info.file_name[..end.unwrap_or(info.file_name.len())];
        Ok(LoopStatus {
            backing_device: info.device,
            backing_inode: info.inode,
            read_only: info.flags & LO_FLAGS_READ_ONLY != 0,
            autoclear: info.flags & LO_FLAGS_AUTOCLEAR != 0,
            direct_io: info.flags & LO_FLAGS_DIRECT_IO != 0,
            name: String::from_utf8_lossy(name).into_owned(),
        })
    }

    /// Takes over the file's present size.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn refresh_capacity(&self) -> io::Result<()> {
        self.plain(LOOP_SET_CAPACITY, 0)
    }

    /// Switches between direct and buffered access.
    ///
    /// # Errors
    /// `EINVAL` when the filesystem below cannot.
    pub fn set_direct_io(&self, on: bool) -> io::Result<()> {
        self.plain(LOOP_SET_DIRECT_IO, libc::c_ulong::from(on))
    }

    /// Lets go of the file; with users left, when the last of them has gone.
    ///
    /// # Errors
    /// The kernel's refusal; that nothing was attached is fine.
    pub fn detach(self) -> io::Result<()> {
        match self.plain(LOOP_CLR_FD, 0) {
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(()),
            outcome => outcome,
        }
    }

    /// Writes back what is dirty in the device's own cache.
    ///
    /// # Errors
    /// `EIO` when a write failed.
    pub fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.fd)?)
    }

    fn plain(&self, request: libc::c_ulong, argument: libc::c_ulong) -> io::Result<()> {
        // SAFETY: these requests take a number, no memory of ours is touched.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument) })
    }
}

impl AsFd for LoopDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Makes a device of an open file.
///
/// # Errors
/// `ENOENT` when the kernel has no loop devices, `EPERM`, and other refusals.
pub fn attach(file: BorrowedFd<'_>, options: LoopOptions<'_>) -> io::Result<LoopDevice> {
    let control = rustix::fs::open(
        "/dev/loop-control",
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let mut config = LoopConfig {
        fd: file.as_raw_fd().cast_unsigned(),
        // What every filesystem here is made for; the kernel's own choice follows the disk.
        block_size: 512,
        info: LoopInfo64::zero(),
        reserved: [0; 8],
    };
    for (on, flag) in [
        (options.read_only, LO_FLAGS_READ_ONLY),
        (options.autoclear, LO_FLAGS_AUTOCLEAR),
        (options.direct_io, LO_FLAGS_DIRECT_IO),
    ] {
        if on {
            config.info.flags |= flag;
        }
    }
    let name = options.name.as_bytes();
    let name = &name[..name.len().min(NAME_BYTES)];
    config.info.file_name[..name.len()].copy_from_slice(name);
    let mut last = io::Error::from_raw_os_error(libc::EBUSY);
    for _ in 0..ATTEMPTS {
        // SAFETY: takes no argument.
        let index = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        check(index)?;
        let device = open(index.cast_unsigned())?;
        // SAFETY: the kernel reads one `loop_config`, which lives over the call, and takes a
        // reference of its own to the file.
        let rc = unsafe { libc::ioctl(device.fd.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
        match check(rc) {
            Ok(()) => return Ok(device),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => last = e,
            Err(e) => return Err(e),
        }
    }
    Err(last)
}

/// Devices whose file is this inode, oldest number first. Each is held open.
///
/// # Errors
/// When `/sys/block` cannot be read.
pub fn find(backing_device: u64, backing_inode: u64) -> io::Result<Vec<LoopDevice>> {
    let mut found = Vec::new();
    for (device, status) in list()? {
        if (status.backing_device, status.backing_inode) == (backing_device, backing_inode) {
            found.push(device);
        }
    }
    Ok(found)
}

/// All devices with a file, oldest number first. Each is held open.
///
/// # Errors
/// When `/sys/block` cannot be read.
pub fn list() -> io::Result<Vec<(LoopDevice, LoopStatus)>> {
    let mut indices = Vec::new();
    for entry in std::fs::read_dir("/sys/block")? {
        let entry = entry?;
        let name = entry.file_name();
        let index = name.to_str().and_then(|name| name.strip_prefix("loop"));
        let Some(index) = index.and_then(|index| index.parse::<u32>().ok()) else {
            continue;
        };
        // Unattached devices have no such directory.
        if entry.path().join("loop").is_dir() {
            indices.push(index);
        }
    }
    indices.sort_unstable();
    let mut found = Vec::new();
    for index in indices {
        // It may have gone since; only what answers counts.
        let Ok(device) = open(index) else { continue };
        if let Ok(status) = device.status() {
            found.push((device, status));
        }
    }
    Ok(found)
}

/// The device with a number, whether a file is attached or not.
///
/// # Errors
/// `ENXIO` or `ENOENT` when there is none.
pub fn open(index: u32) -> io::Result<LoopDevice> {
    let path = node(index);
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let fd = match rustix::fs::open(&path, flags, Mode::empty()) {
        // A /dev that is no devtmpfs does not learn of new devices by itself.
        Err(rustix::io::Errno::NOENT) => {
            let number = rustix::fs::makedev(LOOP_MAJOR, index);
            let mode = Mode::from_raw_mode(0o660);
            match rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::BlockDevice, mode, number) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(e) => return Err(e.into()),
            }
            rustix::fs::open(&path, flags, Mode::empty())?
        }
        opened => opened?,
    };
    Ok(LoopDevice { index, fd })
}

fn node(index: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{index}"))
}

fn check(rc: libc::c_int) -> io::Result<()> {
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn structures_have_the_kernels_sizes() {
        assert_eq!(size_of::<LoopInfo64>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 8 + 232 + 64);
    }

    #[test]
    fn a_file_becomes_a_device_found_by_its_inode_and_goes_with_its_last_user() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let meta = file.metadata().unwrap();
        let options = LoopOptions {
            read_only: false,
            autoclear: true,
            direct_io: false,
            name: "a-test-of-loopdev",
        };
        let device = attach(file.as_fd(), options).unwrap();
        let status = device.status().unwrap();
        assert_eq!(status.backing_inode, meta.ino());
        assert_eq!(status.backing_device, meta.dev());
        assert_eq!(status.name, "a-test-of-loopdev");
        assert!(status.autoclear);
        let found = find(meta.dev(), meta.ino()).unwrap();
        assert_eq!(found.len(), 1);
        file.set_len(2 << 20).unwrap();
        device.refresh_capacity().unwrap();
        assert_eq!(
            crate::blockfile::device_size(device.as_fd()).unwrap(),
            2 << 20
        );
        drop((device, found));
        assert!(find(meta.dev(), meta.ino()).unwrap().is_empty());
    }
}
