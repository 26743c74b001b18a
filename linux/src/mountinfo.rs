//! The mount table of a mount namespace, read from `/proc/<pid>/mountinfo` (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Mount id, as statx(2) gives it (`STATX_MNT_ID`).
    pub id: u64,
    /// Id of the mount it is on.
    pub parent: u64,
    /// Device number, major and minor.
    pub device: (u32, u32),
    /// Directory of the filesystem that forms the root of this mount.
    pub root: PathBuf,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// Options of this mount.
    pub options: String,
    /// `shared:N`, `master:N`, … ; empty when private.
    pub propagation: Vec<String>,
    /// Filesystem type.
    pub fstype: String,
    /// Source as the filesystem names it.
    pub source: String,
    /// Options of the filesystem.
    pub super_options: String,
}

impl MountEntry {
    /// Whether the filesystem was mounted with this option.
    #[must_use]
    pub fn has_super_option(&self, option: &str) -> bool {
        self.super_options.split(',').any(|o| o == option)
    }
}

/// All mounts this process sees.
///
/// # Errors
/// When `/proc/self/mountinfo` cannot be read.
pub fn read() -> io::Result<Vec<MountEntry>> {
    Ok(parse(&std::fs::read(Path::new(
        "/proc/thread-self/mountinfo",
    ))?))
}

/// Parses the table; lines that are not understood are left out.
#[must_use]
pub fn parse(table: &[u8]) -> Vec<MountEntry> {
    table
        .split(|b| *b == b'\n')
        .filter_map(parse_line)
        .collect()
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut words = line.split(|b| *b == b' ').filter(|w| !w.is_empty());
    let id = number(words.next()?)?;
    let parent = number(words.next()?)?;
    let device = text(words.next()?);
    let (major, minor) = device.split_once(':')?;
    let root = path(words.next()?);
    let mount_point = path(words.next()?);
    let options = text(words.next()?);
    let propagation = words
        .by_ref()
        .take_while(|w| *w != b"-")
        .map(text)
        .collect();
    Some(MountEntry {
        id,
        parent,
        device: (major.parse().ok()?, minor.parse().ok()?),
        root,
        mount_point,
        options,
        propagation,
        fstype: text(words.next()?),
        source: text(words.next()?),
        super_options: words.next().map(text).unwrap_or_default(),
    })
}

fn number(word: &[u8]) -> Option<u64> {
    std::str::from_utf8(word).ok()?.parse().ok()
}

fn text(word: &[u8]) -> String {
    String::from_utf8_lossy(&unescape(word)).into_owned()
}

fn path(word: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape(word)))
}

/// Space, tab, newline and backslash come as `\` and three octal digits.
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&first, tail)) = rest.split_first() {
        let digits = tail
            .get(..3)
            .filter(|d| d.iter().all(|b| (b'0'..=b'7').contains(b)));
        match digits {
            Some(d) if first == b'\\' && d[0] <= b'3' => {
                out.push((d[0] - b'0') << 6 | (d[1] - b'0') << 3 | (d[2] - b'0'));
                rest = &tail[3..];
            }
            Some(_) | None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_escapes_and_propagation_is_understood() {
        let line = b"36 35 98:0 /a\\040b /mnt\\134x rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n";
        let entries = parse(line);
        assert_eq!(entries.len(), 1);
        let entry = &entries[0];
        assert_eq!(entry.root, Path::new("/a b"));
        assert_eq!(entry.mount_point, Path::new("/mnt\\x"));
        assert_eq!(entry.propagation, ["master:1", "shared:2"]);
        assert_eq!(entry.device, (98, 0));
        assert!(entry.has_super_option("errors=continue"));
    }

    #[test]
    fn our_own_table_has_a_root() {
        let entries = read().unwrap();
        assert!(entries.iter().any(|e| e.mount_point == Path::new("/")));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_parsed_without_a_crash(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
