//! What files need that serve as volumes: allocation, copies that share blocks, extents, and a
//! filesystem that holds still or grows (ioctl_ficlone(2), fiemap, ioctl_fifreeze, ioctl_xfs_*).
#![expect(unsafe_code, reason = "ioctls without a safe wrapper")]

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

const FIFREEZE: libc::c_ulong = 0xC004_5877;
const FITHAW: libc::c_ulong = 0xC004_5878;
const FS_IOC_FIEMAP: libc::c_ulong = 0xC020_660B;
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
/// `_IOW('f', 16, __u64)`, fs/ext4/ext4.h.
const EXT4_IOC_RESIZE_FS: libc::c_ulong = 0x4008_6610;
/// `_IOW('X', 110, struct xfs_growfs_data)`, fs/xfs/libxfs/xfs_fs.h.
const XFS_IOC_FSGROWFSDATA: libc::c_ulong = 0x4010_586E;

const FIEMAP_FLAG_SYNC: u32 = 1;
const FIEMAP_EXTENT_LAST: u32 = 1;
const FIEMAP_EXTENT_UNWRITTEN: u32 = 0x800;
const FIEMAP_EXTENT_SHARED: u32 = 0x2000;

/// Extents asked for at once.
const EXTENTS_PER_CALL: usize = 512;

/// Bytes copied by one call where the filesystem cannot share blocks: small enough to be
/// interrupted between two calls.
const COPY_BYTES: u64 = 64 << 20;

/// Part of a file that lies in one piece on its filesystem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where in the file, in bytes.
    pub logical: u64,
    /// Where on the device, in bytes.
    pub physical: u64,
    /// How long, in bytes.
    pub length: u64,
    /// Another file has the same blocks: a write needs new ones.
    pub shared: bool,
    /// Reserved but never written: reads as zeros.
    pub unwritten: bool,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RawExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct RawFiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [RawExtent; EXTENTS_PER_CALL],
}

/// Extents of a file, in order, given to `visit`; dirty pages are written first.
///
/// # Errors
/// `EOPNOTSUPP` when the filesystem cannot tell.
pub fn extents(file: BorrowedFd<'_>, mut visit: impl FnMut(Extent)) -> io::Result<()> {
    let mut map = Box::new(RawFiemap {
        start: 0,
        length: u64::MAX,
        flags: FIEMAP_FLAG_SYNC,
        mapped_extents: 0,
        extent_count: EXTENTS_PER_CALL as u32,
        reserved: 0,
        extents: [RawExtent::default(); EXTENTS_PER_CALL],
    });
    loop {
        map.mapped_extents = 0;
        // SAFETY: the kernel writes at most `extent_count` extents behind the header, which is
        // what the array has room for.
        let rc = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut *map) };
        check(rc)?;
        let got = (map.mapped_extents as usize).min(EXTENTS_PER_CALL);
        let Some(last) = map.extents[..got].last().copied() else {
            return Ok(());
        };
        for raw in &map.extents[..got] {
            visit(Extent {
                logical: raw.logical,
                physical: raw.physical,
                length: raw.length,
                shared: raw.flags & FIEMAP_EXTENT_SHARED != 0,
                unwritten: raw.flags & FIEMAP_EXTENT_UNWRITTEN != 0,
            });
        }
        let next = last.logical.saturating_add(last.length);
        // A filesystem that does not move on would keep us here for ever.
        if last.flags & FIEMAP_EXTENT_LAST != 0 || next <= map.start {
            return Ok(());
        }
        map.start = next;
        map.length = u64::MAX - next;
    }
}

/// Bytes of a file whose blocks another file has too.
///
/// # Errors
/// As [`extents`].
pub fn shared_bytes(file: BorrowedFd<'_>) -> io::Result<u64> {
    let mut shared = 0_u64;
    extents(file, |extent| {
        if extent.shared {
            shared = shared.saturating_add(extent.length);
        }
    })?;
    Ok(shared)
}

/// Gives a file blocks for all of its first `bytes` bytes and makes it at least that long;
/// content stays, and what was a hole reads as zeros.
///
/// # Errors
/// `ENOSPC`, or `EOPNOTSUPP` when the filesystem cannot.
pub fn allocate(file: BorrowedFd<'_>, bytes: u64) -> io::Result<()> {
    loop {
        match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
            Err(Errno::INTR) => {}
            outcome => return Ok(outcome?),
        }
    }
}

/// Makes `to` a copy of `from` that shares all its blocks until one of both is written
/// (FICLONE). Nothing is copied.
///
/// # Errors
/// `EOPNOTSUPP` or `EXDEV` when the filesystem cannot.
pub fn share_blocks(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::fs::ioctl_ficlone(to, from)?)
}

/// Copies what is data in `from` to the same places of `to`; holes are left out. `to` must read
/// as zeros there. `go_on` is asked between two pieces.
///
/// # Errors
/// `ECANCELED` when `go_on` said no, else the kernel's refusal.
pub fn copy_data(from: &File, to: &File, mut go_on: impl FnMut() -> bool) -> io::Result<u64> {
    let length = from.metadata()?.len();
    let mut copied = 0;
    let mut position = 0;
    while position < length {
        let start = match rustix::fs::seek(from, SeekFrom::Data(position)) {
            Ok(start) => start,
            // Nothing but a hole to the end.
            Err(Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(from, SeekFrom::Hole(start))?;
        copied += copy_range(from, to, start, end, &mut go_on)?;
        position = end;
    }
    Ok(copied)
}

fn copy_range(
    from: &File,
    to: &File,
    start: u64,
    end: u64,
    go_on: &mut impl FnMut() -> bool,
) -> io::Result<u64> {
    let (mut source, mut target) = (start, start);
    while source < end {
        if !go_on() {
            return Err(io::Error::from_raw_os_error(libc::ECANCELED));
        }
        let most = usize::try_from((end - source).min(COPY_BYTES)).unwrap_or(usize::MAX);
        let wanted = (Some(&mut source), Some(&mut target));
        if rustix::fs::copy_file_range(from, wanted.0, to, wanted.1, most)? == 0 {
            // The source became shorter: what is missing would be taken for data.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(end - start)
}

/// Makes the filesystem behind a descriptor hold still: what was written is on its device, and
/// writers wait until [`thaw`].
///
/// # Errors
/// `EBUSY` when it is frozen already.
pub fn freeze(filesystem: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the argument is not read.
    check(unsafe { libc::ioctl(filesystem.as_raw_fd(), FIFREEZE, 0) })
}

/// Lets writers go on. Whether it was frozen.
///
/// # Errors
/// The kernel's refusal.
pub fn thaw(filesystem: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: the argument is not read.
    match check(unsafe { libc::ioctl(filesystem.as_raw_fd(), FITHAW, 0) }) {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Size of a block device, in bytes.
///
/// # Errors
/// `ENOTTY` when it is none.
pub fn device_size(device: BorrowedFd<'_>) -> io::Result<u64> {
    let mut bytes = 0_u64;
    // SAFETY: the kernel writes one u64, which lives over the call.
    check(unsafe { libc::ioctl(device.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) })?;
    Ok(bytes)
}

/// Grows a mounted ext4 to this many of its blocks. Needs CAP_SYS_RESOURCE.
///
/// # Errors
/// `EPERM`, or `EINVAL` for fewer blocks than it has.
pub fn grow_ext4(filesystem: BorrowedFd<'_>, blocks: u64) -> io::Result<()> {
    // SAFETY: the kernel reads one u64, which lives over the call.
    check(unsafe {
        libc::ioctl(
            filesystem.as_raw_fd(),
            EXT4_IOC_RESIZE_FS,
            &raw const blocks,
        )
    })
}

#[repr(C)]
struct XfsGrowfsData {
    new_blocks: u64,
    inode_percent: u32,
    padding: u32,
}

/// Grows a mounted xfs to this many of its blocks; `inode_percent` is what its superblock says.
///
/// # Errors
/// `EINVAL` for fewer blocks than it has.
pub fn grow_xfs(filesystem: BorrowedFd<'_>, blocks: u64, inode_percent: u32) -> io::Result<()> {
    let data = XfsGrowfsData {
        new_blocks: blocks,
        inode_percent,
        padding: 0,
    };
    // SAFETY: the kernel reads one `xfs_growfs_data`, which lives over the call.
    check(unsafe {
        libc::ioctl(
            filesystem.as_raw_fd(),
            XFS_IOC_FSGROWFSDATA,
            &raw const data,
        )
    })
}

/// Whether files in a directory can share blocks: tried with two unnamed ones.
///
/// # Errors
/// When no file can be made there.
pub fn can_share_blocks(directory: &std::path::Path) -> io::Result<bool> {
    use rustix::fs::{CWD, Mode, OFlags};
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(0o600);
    let from = File::from(rustix::fs::openat(CWD, directory, flags, mode)?);
    let to = File::from(rustix::fs::openat(CWD, directory, flags, mode)?);
    io::Write::write_all(&mut &from, &[1; 4096])?;
    Ok(share_blocks(from.as_fd(), to.as_fd()).is_ok())
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
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn structures_have_the_kernels_sizes() {
        assert_eq!(size_of::<RawExtent>(), 56);
        assert_eq!(size_of::<RawFiemap>() - 56 * EXTENTS_PER_CALL, 32);
        assert_eq!(size_of::<XfsGrowfsData>(), 16);
    }

    #[test]
    fn an_allocated_file_has_its_blocks_and_reads_as_zeros() {
        let file = tempfile::tempfile().unwrap();
        allocate(file.as_fd(), 1 << 20).unwrap();
        let meta = file.metadata().unwrap();
        assert_eq!(meta.len(), 1 << 20);
        assert!(meta.blocks() * 512 >= 1 << 20);
        let mut byte = [1];
        file.read_exact_at(&mut byte, 4711).unwrap();
        assert_eq!(byte, [0]);
    }

    #[test]
    fn a_copy_holds_the_data_and_keeps_the_holes() {
        let from = tempfile::tempfile().unwrap();
        let to = tempfile::tempfile().unwrap();
        from.set_len(64 << 20).unwrap();
        from.write_all_at(b"one", 0).unwrap();
        from.write_all_at(b"two", 40 << 20).unwrap();
        to.set_len(64 << 20).unwrap();
        copy_data(&from, &to, || true).unwrap();
        let mut read = [0; 3];
        to.read_exact_at(&mut read, 40 << 20).unwrap();
        assert_eq!(&read, b"two");
        assert!(to.metadata().unwrap().blocks() * 512 < 4 << 20);
        assert!(copy_data(&from, &to, || false).is_err());
    }
}
