//! Reads a log into a channel, once or following.

use super::LogFile;
use super::parse::{Formatter, tail_start};
use bytes::Bytes;
use inotify::{EventMask, Inotify, WatchMask};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::fs::{File, Metadata};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;

/// How much is read and sent at a time.
const CHUNK: usize = 64 * 1024;
/// A record is at most a 16 KiB part and its head; a longer line is no record of ours.
const MAX_LINE: usize = 64 * 1024;

/// Files opened ahead of a reader that is slower than the writer. Each holds back the disk space of
/// one rotated file; with the usual 10 MiB this is more than half a gigabyte.
const MAX_AHEAD: usize = 64;

/// Sends what the options ask for. Ends when the log ends (without `follow`), when `ended`
/// resolves and the rest has been sent, when the limit is reached or the receiver is gone.
///
/// # Errors
/// When the file cannot be opened or read.
pub async fn send(
    log: LogFile,
    ended: impl Future<Output = ()>,
    out: mpsc::Sender<Bytes>,
) -> io::Result<()> {
    let watch = if log.options.follow {
        Some(Watch::new(&log.path)?)
    } else {
        None
    };
    let file = File::open(&log.path)?;
    let newest = file.try_clone()?;
    let mut reader = Reader {
        formatter: log.options.formatter(),
        left: log.options.limit_bytes,
        pending: Vec::new(),
        file,
        out,
    };
    reader.skip_to_tail(log.options.tail_lines)?;
    let Some(mut watch) = watch else {
        reader.drain().await?;
        return Ok(());
    };
    let ahead = Arc::new(Ahead::default());
    // A task of its own, which ends with this one: files have to be opened before they are
    // compressed or removed, whatever the reader is doing.
    let mut scout = JoinSet::new();
    let (path, shared) = (log.path.clone(), Arc::clone(&ahead));
    scout.spawn(async move { look_ahead(&mut watch, newest, &path, &shared).await });
    tokio::select! {
        sent = follow(&mut reader, &log.path, &ahead, ended) => sent,
        Some(failed) = scout.join_next() => match failed {
            Ok(Err(error)) => Err(error),
            Err(panic) => Err(io::Error::other(panic)),
        },
    }
}

/// Files that came after the one being read, oldest first.
#[derive(Debug, Default)]
struct Ahead {
    files: Mutex<VecDeque<File>>,
    /// Something was written, or a file was added.
    news: Notify,
}

impl Ahead {
    fn files(&self) -> MutexGuard<'_, VecDeque<File>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens each file of the log as soon as it is there.
async fn look_ahead(
    watch: &mut Watch,
    mut newest: File,
    path: &Path,
    ahead: &Ahead,
) -> io::Result<Infallible> {
    let mut missed = false;
    loop {
        missed |= watch.changed().await?;
        if missed && ahead.files().len() < MAX_AHEAD {
            missed = false;
            for file in successors(&newest, path)? {
                newest = file.try_clone()?;
                ahead.files().push_back(file);
            }
        }
        ahead.news.notify_one();
    }
}

/// Reads file after file.
async fn follow(
    reader: &mut Reader,
    path: &Path,
    ahead: &Ahead,
    ended: impl Future<Output = ()>,
) -> io::Result<()> {
    tokio::pin!(ended);
    let mut last = false;
    loop {
        if !reader.drain().await? {
            return Ok(());
        }
        let next = ahead.files().pop_front();
        if let Some(file) = next {
            // It is there, so nothing will be written to ours any more; but something may have
            // been since it was read to its end.
            if !reader.drain().await? {
                return Ok(());
            }
            reader.file = file;
            continue;
        }
        if last {
            // The last rotations may not have been noticed yet.
            for file in successors(&reader.file, path)? {
                reader.file = file;
                if !reader.drain().await? {
                    return Ok(());
                }
            }
            return Ok(());
        }
        tokio::select! {
            () = ahead.news.notified() => {}
            () = reader.out.closed() => return Ok(()),
            () = &mut ended => last = true,
        }
    }
}

/// The files that came after `open`: rotated ones in order, then the one now at `path`. Empty
/// when `open` is still that one, or its successor is not there yet.
fn successors(open: &File, path: &Path) -> io::Result<Vec<File>> {
    let current = match File::open(path) {
        Ok(file) => file,
        // Between rename and creation, or removed: nothing more for now.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let file = |m: &Metadata| (m.dev(), m.ino());
    let written = |m: &Metadata| (m.mtime(), m.mtime_nsec());
    let (mine, live) = (open.metadata()?, current.metadata()?);
    if file(&mine) == file(&live) {
        return Ok(Vec::new());
    }
    let mut newer = rotated(path)?;
    match newer.iter().position(|(_, m)| file(m) == file(&mine)) {
        Some(at) => drop(newer.drain(..=at)),
        // Ours was removed already: what was written later than it follows.
        None => newer.retain(|(_, m)| written(m) > written(&mine)),
    }
    // The one opened above may have been rotated since: it and what came after is for the next
    // look.
    if let Some(at) = newer.iter().position(|(_, m)| file(m) == file(&live)) {
        newer.truncate(at);
    }
    let mut files: Vec<File> = newer
        .iter()
        .filter_map(|(p, _)| File::open(p).ok())
        .collect();
    files.push(current);
    Ok(files)
}

/// Rotated files beside `path`, oldest first: their names end in the time of rotation. Compressed
/// ones are left out.
fn rotated(path: &Path) -> io::Result<Vec<(PathBuf, Metadata)>> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(Vec::new());
    };
    let prefix = format!("{}.", name.to_string_lossy());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // The time, and a number when several were rotated within one second.
        let time = |suffix: &str| {
            suffix
                .bytes()
                .all(|b| b.is_ascii_digit() || b"-.".contains(&b))
        };
        if name.strip_prefix(&prefix).is_some_and(time)
            && let Ok(metadata) = entry.metadata()
        {
            found.push((entry.path(), metadata));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

struct Reader {
    formatter: Formatter,
    left: Option<u64>,
    pending: Vec<u8>,
    file: File,
    out: mpsc::Sender<Bytes>,
}

impl Reader {
    /// Moves to the last `lines` lines, reading backwards in growing steps.
    fn skip_to_tail(&mut self, lines: Option<u64>) -> io::Result<()> {
        let Some(lines) = lines else { return Ok(()) };
        let end = self.file.metadata()?.len();
        let mut window = CHUNK as u64;
        loop {
            let start = end.saturating_sub(window);
            let mut buffer = vec![0; usize::try_from(end - start).unwrap_or(usize::MAX)];
            self.file.read_exact_at(&mut buffer, start)?;
            // Without the beginning of the file the first line may be cut: do not count it.
            let whole = if start == 0 {
                0
            } else {
                buffer
                    .iter()
                    .position(|b| *b == b'\n')
                    .map_or(buffer.len(), |p| p + 1)
            };
            let at = tail_start(&buffer[whole..], lines);
            if at > 0 || start == 0 {
                self.file
                    .seek(SeekFrom::Start(start + (whole + at) as u64))?;
                return Ok(());
            }
            window = window.saturating_mul(4);
        }
    }

    /// Sends all there is; false when nobody wants more.
    async fn drain(&mut self) -> io::Result<bool> {
        let mut buffer = vec![0; CHUNK];
        loop {
            let n = self.file.read(&mut buffer)?;
            if n == 0 {
                return Ok(true);
            }
            self.pending.extend_from_slice(&buffer[..n]);
            let shown = self.take_lines();
            if !shown.is_empty() && !self.send(shown).await {
                return Ok(false);
            }
        }
    }

    /// Formats the complete lines read so far.
    fn take_lines(&mut self) -> Vec<u8> {
        let mut shown = Vec::new();
        let mut start = 0;
        while let Some(length) = self.pending[start..].iter().position(|b| *b == b'\n') {
            self.formatter
                .format(&self.pending[start..start + length], &mut shown);
            start += length + 1;
        }
        self.pending.drain(..start);
        if self.pending.len() > MAX_LINE {
            self.pending.clear();
        }
        shown
    }

    async fn send(&mut self, mut shown: Vec<u8>) -> bool {
        let mut more = true;
        if let Some(left) = &mut self.left {
            if shown.len() as u64 >= *left {
                shown.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
                more = false;
            }
            *left -= shown.len() as u64;
        }
        self.out.send(Bytes::from(shown)).await.is_ok() && more
    }
}

/// Wakes when the log's directory or file changes.
struct Watch {
    fd: AsyncFd<Inotify>,
}

impl Watch {
    fn new(path: &Path) -> io::Result<Self> {
        let inotify = Inotify::init()?;
        // Watching the directory tells of writes to the file and of its successor alike.
        let dir = path.parent().unwrap_or(Path::new("/"));
        let mask = WatchMask::MODIFY | WatchMask::CREATE | WatchMask::MOVED_TO;
        inotify.watches().add(dir, mask)?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe; the descriptor lives as long as its owner"
        )]
        let fd = AsyncFd::new(inotify)?;
        Ok(Self { fd })
    }

    /// Waits for something to happen; whether a file came or went, not only grew.
    async fn changed(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 4096];
        loop {
            let mut guard = self.fd.readable_mut().await?;
            let grown = guard.try_io(|fd| {
                let mut events = fd.get_mut().read_events(&mut buffer)?;
                Ok(events.any(|event| !event.mask.contains(EventMask::MODIFY)))
            });
            match grown {
                Ok(done) => return done,
                Err(_would_block) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::LogOptions;
    use super::*;
    use std::io::Write;
    use tokio::sync::oneshot;

    fn line(text: &str) -> String {
        format!("2026-01-01T00:00:00.000000001Z stdout F {text}\n")
    }

    fn append(path: &Path, text: &str) {
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(path)
            .unwrap();
        file.write_all(line(text).as_bytes()).unwrap();
    }

    async fn read(path: &Path, options: LogOptions) -> String {
        let (tx, mut rx) = mpsc::channel(8);
        let log = LogFile {
            path: path.to_owned(),
            options,
        };
        let task = tokio::spawn(send(log, std::future::pending(), tx));
        let mut shown = Vec::new();
        while let Some(bytes) = rx.recv().await {
            shown.extend_from_slice(&bytes);
        }
        task.await.unwrap().unwrap();
        String::from_utf8(shown).unwrap()
    }

    #[tokio::test]
    async fn the_tail_of_a_large_log_is_found_from_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let text: String = (0..20_000).map(|i| line(&format!("line {i}"))).collect();
        std::fs::write(&path, text).unwrap();
        let tail = |n| LogOptions {
            tail_lines: Some(n),
            ..LogOptions::default()
        };
        assert_eq!(read(&path, tail(2)).await, "line 19998\nline 19999\n");
        assert_eq!(read(&path, tail(19_999)).await.lines().count(), 19_999);
        assert_eq!(read(&path, tail(30_000)).await.lines().count(), 20_000);
        let limited = LogOptions {
            limit_bytes: Some(9),
            ..tail(2)
        };
        assert_eq!(read(&path, limited).await, "line 1999");
    }

    #[tokio::test]
    async fn a_follower_loses_no_line_at_rotation_and_ends_with_the_container() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        append(&path, "0");
        let (tx, mut rx) = mpsc::channel(8);
        let (end, ended) = oneshot::channel::<()>();
        let options = LogOptions {
            follow: true,
            ..LogOptions::default()
        };
        let log = LogFile {
            path: path.clone(),
            options,
        };
        let ended = async {
            let _ = ended.await;
        };
        let task = tokio::spawn(send(log, ended, tx));
        let mut shown = Vec::new();
        let mut written = 1;
        while written < 60 {
            shown.extend_from_slice(&rx.recv().await.unwrap());
            if written % 7 == 0 {
                let old = dir.path().join(format!("0.log.{written:06}"));
                append(&path, &written.to_string());
                std::fs::rename(&path, old).unwrap();
                written += 1;
            }
            append(&path, &written.to_string());
            written += 1;
        }
        append(&path, "last");
        end.send(()).unwrap();
        while let Some(bytes) = rx.recv().await {
            shown.extend_from_slice(&bytes);
        }
        task.await.unwrap().unwrap();
        let expected: String = (0..written).map(|i| format!("{i}\n")).collect();
        assert_eq!(String::from_utf8(shown).unwrap(), expected + "last\n");
    }

    /// Waits until this process has a file open.
    fn until_open(path: &Path) {
        let start = std::time::Instant::now();
        let is_open = || {
            let fds = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
            let mut files = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
            files.any(|file| file == path)
        };
        while !is_open() {
            assert!(start.elapsed().as_secs() < 60, "nobody opened {path:?}");
            std::thread::yield_now();
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_follower_slower_than_the_writer_still_gets_every_line() {
        const FILES: usize = 40;
        const LINES: usize = 500;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        append(&path, "0");
        let (tx, mut rx) = mpsc::channel(1);
        let options = LogOptions {
            follow: true,
            ..LogOptions::default()
        };
        let log = LogFile {
            path: path.clone(),
            options,
        };
        let (end, ended) = oneshot::channel::<()>();
        let ended = async {
            let _ = ended.await;
        };
        let task = tokio::spawn(send(log, ended, tx));
        // The first bytes: it has begun.
        let mut shown = rx.recv().await.unwrap().to_vec();
        let place = dir.path().to_owned();
        let writer = tokio::task::spawn_blocking(move || {
            let path = place.join("0.log");
            let mut number = 1;
            for file in 0..FILES {
                let text: String = (0..LINES)
                    .map(|i| line(&(number + i).to_string()))
                    .collect();
                number += LINES;
                let mut open = File::options()
                    .append(true)
                    .create(true)
                    .open(&path)
                    .unwrap();
                open.write_all(text.as_bytes()).unwrap();
                let moved = place.join(format!("0.log.20260101-000000.{file:03}"));
                std::fs::rename(&path, moved).unwrap();
                File::create(&path).unwrap();
                until_open(&path);
                if file >= 4 {
                    // Older ones go, as they do under a writer in full flight.
                    let gone = format!("0.log.20260101-000000.{:03}", file - 4);
                    std::fs::remove_file(place.join(gone)).unwrap();
                }
            }
        });
        writer.await.unwrap();
        end.send(()).unwrap();
        while let Some(bytes) = rx.recv().await {
            shown.extend_from_slice(&bytes);
        }
        task.await.unwrap().unwrap();
        let expected: String = (0..=FILES * LINES).map(|i| format!("{i}\n")).collect();
        assert_eq!(String::from_utf8(shown).unwrap(), expected);
    }
}
