//! What an image says of itself: the superblocks of ext4 and xfs, read without mounting
//! (Documentation/filesystems/ext4/super.rst, XFS Algorithms & Data Structures).
//!
//! "Nothing known is there" and "it cannot be read" are different answers.

use crate::model::Filesystem;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes looked at: both superblocks are within.
const HEAD_BYTES: usize = 4096;

/// A filesystem found in an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Which.
    pub filesystem: Filesystem,
    /// Its UUID, in the usual form.
    pub uuid: String,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// How many blocks it has.
    pub blocks: u64,
    /// xfs: how many per cent inodes may take.
    pub inode_percent: u8,
}

impl Superblock {
    /// Size of the filesystem, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.blocks.saturating_mul(self.block_bytes)
    }
}

/// Reads the superblock of an image or device; none when there is no filesystem we know.
///
/// # Errors
/// When it cannot be read.
pub fn read(file: &File) -> io::Result<Option<Superblock>> {
    let mut head = [0; HEAD_BYTES];
    let mut filled = 0;
    while filled < HEAD_BYTES {
        match file.read_at(&mut head[filled..], filled as u64)? {
            0 => break,
            bytes => filled += bytes,
        }
    }
    Ok(parse(&head[..filled]))
}

/// Finds a superblock in the first bytes of an image.
#[must_use]
pub fn parse(head: &[u8]) -> Option<Superblock> {
    xfs(head).or_else(|| ext4(head))
}

fn ext4(head: &[u8]) -> Option<Superblock> {
    const MAGIC: u16 = 0xEF53;
    /// INCOMPAT_64BIT: block counts have an upper half.
    const WIDE: u32 = 0x80;
    let block = head.get(1024..2048)?;
    if le16(block, 0x38)? != MAGIC {
        return None;
    }
    let mut blocks = u64::from(le32(block, 0x4)?);
    if le32(block, 0x60)? & WIDE != 0 {
        blocks |= u64::from(le32(block, 0x150)?) << 32;
    }
    let shift = le32(block, 0x18)?;
    Some(Superblock {
        filesystem: Filesystem::Ext4,
        uuid: uuid(block.get(0x68..0x78)?),
        block_bytes: 1024_u64.checked_shl(shift).filter(|_| shift <= 6)?,
        blocks,
        inode_percent: 0,
    })
}

fn xfs(head: &[u8]) -> Option<Superblock> {
    if head.get(..4)? != b"XFSB" {
        return None;
    }
    let block_bytes = u32::from_be_bytes(head.get(4..8)?.try_into().ok()?);
    Some(Superblock {
        filesystem: Filesystem::Xfs,
        uuid: uuid(head.get(32..48)?),
        block_bytes: u64::from(block_bytes),
        blocks: u64::from_be_bytes(head.get(8..16)?.try_into().ok()?),
        inode_percent: *head.get(127)?,
    })
}

fn le16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Sixteen bytes in the usual form.
#[must_use]
pub fn uuid(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(36);
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_no_filesystem() {
        assert_eq!(parse(&[0; HEAD_BYTES]), None);
        assert_eq!(parse(&[]), None);
    }

    #[test]
    fn a_superblock_of_each_sort_is_read() {
        let mut head = vec![0; HEAD_BYTES];
        head[1024 + 0x38..1024 + 0x3a].copy_from_slice(&[0x53, 0xEF]);
        head[1024 + 0x4] = 7;
        head[1024 + 0x18] = 2;
        head[1024 + 0x60] = 0x80;
        head[1024 + 0x150] = 1;
        let found = parse(&head).unwrap();
        assert_eq!(found.filesystem, Filesystem::Ext4);
        assert_eq!((found.block_bytes, found.blocks), (4096, (1 << 32) + 7));
        head[..4].copy_from_slice(b"XFSB");
        head[6] = 0x10;
        head[15] = 9;
        let found = parse(&head).unwrap();
        assert_eq!(found.filesystem, Filesystem::Xfs);
        assert_eq!(found.bytes(), 9 * 4096);
    }

    #[test]
    fn a_uuid_has_its_usual_form() {
        let bytes: Vec<u8> = (0..16).collect();
        assert_eq!(uuid(&bytes), "00010203-0405-0607-0809-0a0b0c0d0e0f");
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_parsed_without_a_crash(bytes: Vec<u8>) {
            let _ = parse(&bytes);
            let mut head = bytes.clone();
            head.splice(..head.len().min(4), *b"XFSB");
            let _ = parse(&head);
        }
    }
}
