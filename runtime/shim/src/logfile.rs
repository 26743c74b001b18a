//! One container's log file: appended, rotated, and never a reason to stop the container.
//!
//! The shim alone writes and renames, so no line can fall between two files. When the disk is
//! full the lines are dropped and counted; the first line that fits again is preceded by a note.

use crate::logline;
use pod_shim::protocol::LogSpec;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Rotations within one second get a number behind the time, at most this many.
const MAX_SAME_SECOND: u32 = 999;

/// An open log.
#[derive(Debug)]
pub(crate) struct LogFile {
    spec: LogSpec,
    file: File,
    size: u64,
    dropped_lines: u64,
    last_rotation: Option<Rotation>,
}

/// When a file was rotated, and the how manieth of that second it was.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rotation {
    /// `yyyymmdd-hhmmss`
    time: String,
    number: u32,
}

impl LogFile {
    /// Open or make the file, with its directory.
    pub(crate) fn open(spec: LogSpec) -> io::Result<Self> {
        let (file, size) = open_append(&spec.path)?;
        Ok(Self {
            spec,
            file,
            size,
            dropped_lines: 0,
            last_rotation: None,
        })
    }

    /// Open the path again after someone else moved the file away.
    pub(crate) fn reopen(&mut self) -> io::Result<()> {
        (self.file, self.size) = open_append(&self.spec.path)?;
        Ok(())
    }

    /// Append whole lines, rotating between lines where the limit says so.
    pub(crate) fn append(&mut self, mut lines: &[u8], now_ns: i64) {
        if self.dropped_lines > 0 && !lines.is_empty() {
            let note = format!(
                "{} stderr F [{} log lines were dropped: the log could not be written]\n",
                logline::stamp(now_ns),
                self.dropped_lines
            );
            if self.write_whole(note.as_bytes()).is_ok() {
                self.dropped_lines = 0;
            }
        }
        while !lines.is_empty() {
            let take = match plan(self.size, self.spec.max_bytes, lines) {
                Step::Write(count) => count,
                Step::Rotate => {
                    if let Err(error) = self.rotate(now_ns) {
                        // Better a log that is too long than one that is lost.
                        eprintln!("cannot rotate {}: {error}", self.spec.path.display());
                        lines.len()
                    } else {
                        continue;
                    }
                }
            };
            let (now, later) = lines.split_at(take);
            if self.write_whole(now).is_err() {
                self.dropped_lines += now.iter().filter(|b| **b == b'\n').count() as u64;
            }
            lines = later;
        }
    }

    /// All or nothing: a write cut short by a full disk is taken back, so that the file never
    /// holds half a line.
    fn write_whole(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self.file.write_all(bytes) {
            Ok(()) => {
                self.size += bytes.len() as u64;
                Ok(())
            }
            Err(error) => {
                let _ = self.file.set_len(self.size);
                Err(error)
            }
        }
    }

    fn rotate(&mut self, now_ns: i64) -> io::Result<()> {
        let (moved, rotation) = unused_name(&self.spec.path, now_ns, self.last_rotation.as_ref())?;
        std::fs::rename(&self.spec.path, &moved)?;
        self.last_rotation = Some(rotation);
        match open_append(&self.spec.path) {
            Ok((file, size)) => (self.file, self.size) = (file, size),
            Err(error) => {
                // Keep writing to the file we have, under its old name.
                let _ = std::fs::rename(&moved, &self.spec.path);
                return Err(error);
            }
        }
        remove_surplus(&self.spec.path, self.spec.max_files.max(2) as usize - 1)
    }
}

enum Step {
    /// Write this many bytes, a whole number of lines.
    Write(usize),
    /// Start a new file first.
    Rotate,
}

/// How much of `lines` goes into a file of `size` bytes that may have `max` (0: no limit).
fn plan(size: u64, max: u64, lines: &[u8]) -> Step {
    let room = max.saturating_sub(size);
    if max == 0 || lines.len() as u64 <= room {
        return Step::Write(lines.len());
    }
    // The room is smaller than the batch here, so it fits a usize.
    match lines[..room as usize].iter().rposition(|b| *b == b'\n') {
        Some(last) => Step::Write(last + 1),
        None if size > 0 => Step::Rotate,
        // One line larger than a whole file goes into a file of its own.
        None => Step::Write(
            lines
                .iter()
                .position(|b| *b == b'\n')
                .map_or(lines.len(), |first| first + 1),
        ),
    }
}

fn open_append(path: &Path) -> io::Result<(File, u64)> {
    let open = || {
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o640)
            .open(path)
    };
    let file = match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent)?;
            }
            open()?
        }
        other => other?,
    };
    let size = file.metadata()?.len();
    Ok((file, size))
}

/// `<log>.<yyyymmdd-hhmmss>`, with `.NNN` behind it when that is taken: names keep sorting by
/// age. A name is never given again, though its file may be gone: the newest file would have the
/// oldest name, be removed first and be followed in the wrong place.
fn unused_name(
    path: &Path,
    now_ns: i64,
    last: Option<&Rotation>,
) -> io::Result<(PathBuf, Rotation)> {
    let time = logline::compact(now_ns);
    let (time, first) = match last {
        // Within the same second, or the clock was set back.
        Some(last) if last.time >= time && last.number < MAX_SAME_SECOND => {
            (last.time.clone(), last.number + 1)
        }
        Some(_) | None => (time, 0),
    };
    for number in first..=MAX_SAME_SECOND {
        let mut name = format!("{}.{time}", path.display());
        if number > 0 {
            name.push_str(&format!(".{number:03}"));
        }
        match std::fs::symlink_metadata(&name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok((name.into(), Rotation { time, number }));
            }
            Ok(_) => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// Remove the oldest rotated files beyond `keep`, with their compressed forms: while the agent
/// compresses one it has two names, or three, and still counts as one.
fn remove_surplus(path: &Path, keep: usize) -> io::Result<()> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(());
    };
    let prefix = format!("{}.", name.to_string_lossy());
    let mut rotated: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for entry in std::fs::read_dir(dir)? {
        let Some(name) = entry.ok().and_then(|e| e.file_name().into_string().ok()) else {
            continue;
        };
        if name.strip_prefix(&prefix).is_some_and(is_rotation_suffix) {
            let whole = name.trim_end_matches(".tmp").trim_end_matches(".gz");
            rotated.entry(whole.to_owned()).or_default().push(name);
        }
    }
    let surplus = rotated.len().saturating_sub(keep);
    for name in rotated.into_values().take(surplus).flatten() {
        match std::fs::remove_file(dir.join(name)) {
            // Compressed, and therefore renamed, since it was listed.
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Only names we could have given ourselves (or their compressed form) are ever removed.
fn is_rotation_suffix(suffix: &str) -> bool {
    let bytes = suffix.as_bytes();
    bytes.len() >= 15
        && bytes[8] == b'-'
        && bytes[..15]
            .iter()
            .enumerate()
            .all(|(i, b)| i == 8 || b.is_ascii_digit())
        && (bytes.len() == 15 || bytes[15] == b'.')
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dir(PathBuf);

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn dir(name: &str) -> Dir {
        let path = std::env::temp_dir().join(format!("shimlog-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Dir(path)
    }

    fn all_lines(dir: &Path) -> Vec<String> {
        let mut names: Vec<PathBuf> = std::fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        // The live file is the newest although its name sorts first.
        names.sort_by_key(|p| (p.ends_with("0.log"), p.clone()));
        names
            .iter()
            .flat_map(|p| {
                std::fs::read_to_string(p)
                    .unwrap()
                    .lines()
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    #[test]
    fn rotation_within_one_second_loses_and_reorders_nothing() {
        let dir = dir("rotate");
        let spec = LogSpec {
            path: dir.0.join("sub/0.log"),
            max_bytes: 100,
            max_files: 500,
        };
        let mut log = LogFile::open(spec).unwrap();
        let wanted: Vec<String> = (0..1000).map(|n| format!("line {n:05}")).collect();
        for batch in wanted.chunks(7) {
            let text: String = batch.iter().map(|l| format!("{l}\n")).collect();
            log.append(text.as_bytes(), 1_000_000_000);
        }
        assert_eq!(all_lines(&dir.0.join("sub")), wanted);
    }

    #[test]
    fn of_many_rotations_within_one_second_the_newest_are_kept_in_order() {
        let dir = dir("burst");
        let spec = LogSpec {
            path: dir.0.join("sub/0.log"),
            max_bytes: 100,
            max_files: 5,
        };
        let mut log = LogFile::open(spec).unwrap();
        let all: Vec<String> = (0..500).map(|n| format!("line {n:05}")).collect();
        for (at, line) in all.iter().enumerate() {
            // The clock is set back in between.
            let now_s = if at < 300 { 1_000 } else { 900 };
            log.append(format!("{line}\n").as_bytes(), now_s * 1_000_000_000);
        }
        let kept = all_lines(&dir.0.join("sub"));
        assert!(
            kept.len() > 30 && kept == all[all.len() - kept.len()..],
            "{kept:?}"
        );
    }

    #[test]
    fn only_so_many_files_are_kept_and_foreign_files_are_left_alone() {
        let dir = dir("keep");
        std::fs::write(dir.0.join("0.log.backup"), "").unwrap();
        let spec = LogSpec {
            path: dir.0.join("0.log"),
            max_bytes: 10,
            max_files: 3,
        };
        let mut log = LogFile::open(spec).unwrap();
        for n in 0..50 {
            log.append(format!("number {n}\n").as_bytes(), n * 1_000_000_000);
        }
        assert_eq!(std::fs::read_dir(&dir.0).unwrap().count(), 4);
        assert_eq!(
            std::fs::read_to_string(dir.0.join("0.log")).unwrap(),
            "number 49\n"
        );
    }

    #[test]
    fn a_file_being_compressed_counts_once_and_goes_with_all_its_names() {
        let dir = dir("compressed");
        let stem = |day: u32| format!("0.log.2026010{day}-000000");
        for name in [
            format!("{}.gz", stem(1)),
            stem(2),
            format!("{}.gz", stem(2)),
            stem(3),
            format!("{}.tmp", stem(3)),
            stem(4),
        ] {
            std::fs::write(dir.0.join(name), "").unwrap();
        }
        remove_surplus(&dir.0.join("0.log"), 2).unwrap();
        let mut left: Vec<_> = std::fs::read_dir(&dir.0)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, [stem(3), format!("{}.tmp", stem(3)), stem(4)]);
    }

    #[test]
    fn a_line_larger_than_the_limit_gets_a_file_of_its_own() {
        assert!(matches!(plan(0, 5, b"0123456789\nab\n"), Step::Write(11)));
        assert!(matches!(plan(3, 5, b"0123456789\nab\n"), Step::Rotate));
        assert!(matches!(plan(0, 0, b"0123456789\nab\n"), Step::Write(14)));
        assert!(matches!(plan(0, 12, b"0123456789\nab\n"), Step::Write(11)));
    }

    #[test]
    fn a_full_disk_drops_lines_and_says_so_later() {
        let dir = dir("full");
        let spec = LogSpec {
            path: "/dev/full".into(),
            max_bytes: 0,
            max_files: 2,
        };
        let mut log = LogFile::open(spec).unwrap();
        log.append(b"a\nb\n", 0);
        assert_eq!(log.dropped_lines, 2);
        log.spec.path = dir.0.join("0.log");
        log.reopen().unwrap();
        log.append(b"c\n", 0);
        let lines = all_lines(&dir.0);
        assert!(lines[0].contains("2 log lines were dropped"), "{lines:?}");
        assert_eq!(lines[1], "c");
    }
}
