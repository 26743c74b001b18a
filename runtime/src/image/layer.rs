//! One layer on its way to disk: decompress, hash, unpack, verify, all in one pass.
//!
//! A layer is unpacked into `<layers>/<diff id>.partial-<pid>-<n>/fs`. The directory is locked
//! (flock) while its maker lives, so a later start can tell rubbish from work in progress. It
//! gets its final name only when its digest and diff id were verified *and* an image that uses
//! it is committed (see `store`).

use super::error::{ImageError, Result, UnpackError};
use super::unpack::{Applied, Limits, apply};
use bytes::Bytes;
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::io::{self, BufRead, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::mpsc;

/// What the downloader hands to the unpacking thread.
#[derive(Debug)]
pub(crate) enum Feed {
    /// The next bytes.
    Data(Bytes),
    /// All bytes were sent. A channel that closes without it was cut off.
    End,
}

/// A downloaded stream seen as a blocking reader.
pub(crate) struct FeedReader {
    feed: mpsc::Receiver<Feed>,
    chunk: Bytes,
    ended: bool,
}

impl FeedReader {
    pub(crate) fn new(feed: mpsc::Receiver<Feed>) -> Self {
        Self {
            feed,
            chunk: Bytes::new(),
            ended: false,
        }
    }
}

impl BufRead for FeedReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.chunk.is_empty() && !self.ended {
            match self.feed.blocking_recv() {
                Some(Feed::Data(bytes)) => self.chunk = bytes,
                Some(Feed::End) => self.ended = true,
                None => return Err(io::ErrorKind::ConnectionAborted.into()),
            }
        }
        Ok(&self.chunk)
    }

    fn consume(&mut self, amount: usize) {
        drop(self.chunk.split_to(amount));
    }
}

impl Read for FeedReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let amount = available.len().min(buf.len());
        buf[..amount].copy_from_slice(&available[..amount]);
        self.consume(amount);
        Ok(amount)
    }
}

/// Hashes what passes through.
struct Hashing<R> {
    inner: R,
    hash: Sha256,
}

impl<R> Hashing<R> {
    fn new(inner: R) -> Self {
        Self {
            inner,
            hash: Sha256::new(),
        }
    }

    fn digest(self) -> String {
        digest_text(&self.hash.finalize())
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buf)?;
        self.hash.update(&buf[..read]);
        Ok(read)
    }
}

/// `sha256:` and hex.
pub(crate) fn digest_text(hash: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(7 + hash.len() * 2);
    text.push_str("sha256:");
    for byte in hash {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Digest of bytes in memory.
pub(crate) fn digest_of(bytes: &[u8]) -> String {
    digest_text(&Sha256::digest(bytes))
}

/// Decompresses by content, not by media type: registries lie about it.
///
/// # Errors
/// When the first bytes cannot be read.
pub(crate) fn decoder<'a>(mut raw: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut head = Vec::with_capacity(4);
    raw.by_ref().take(4).read_to_end(&mut head)?;
    let is_gzip = head.starts_with(&[0x1f, 0x8b]);
    let is_zstd = head == [0x28, 0xb5, 0x2f, 0xfd];
    let whole = io::BufReader::with_capacity(64 << 10, io::Cursor::new(head).chain(raw));
    Ok(match (is_gzip, is_zstd) {
        (true, _) => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
        (_, true) => Box::new(zstd::stream::read::Decoder::with_buffer(whole)?),
        _ => Box::new(whole),
    })
}

/// What is known of an unpacked layer; kept beside it as `layer.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerInfo {
    /// Format of this file.
    pub(crate) version: u32,
    /// Digest of the uncompressed archive.
    pub(crate) diff_id: String,
    /// Bytes of file content.
    pub(crate) size_bytes: u64,
    /// Entries.
    pub(crate) entries: u64,
    /// See [`Applied::implicit_dirs`].
    pub(crate) implicit_dirs: Vec<String>,
}

/// A verified layer that no image uses yet. Removes itself unless taken over by the store.
#[derive(Debug)]
pub(crate) struct StagedLayer {
    pub(crate) dir: PathBuf,
    pub(crate) info: LayerInfo,
    pub(crate) committed: AtomicBool,
    /// Says that the maker lives.
    _lock: OwnedFd,
}

impl Drop for StagedLayer {
    fn drop(&mut self) {
        if !self.committed.load(Ordering::Acquire) {
            remove_dir(&self.dir);
        }
    }
}

/// Name ending of directories under construction, and of those being deleted.
pub(crate) const PARTIAL: &str = ".partial-";

static SEQUENCE: AtomicU64 = AtomicU64::new(0);

/// A name no other process or task uses.
pub(crate) fn partial_name(stem: &str) -> String {
    let n = SEQUENCE.fetch_add(1, Ordering::Relaxed);
    format!("{stem}{PARTIAL}{}-{n}", std::process::id())
}

/// Opens a directory and takes its lock if nobody has it.
pub(crate) fn try_lock_dir(dir: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = rustix::fs::open(dir, flags, Mode::empty())?;
    flock(&fd, FlockOperation::NonBlockingLockExclusive)?;
    Ok(fd)
}

/// Removes a directory of ours, never through a mount; failure is logged, the next start tries
/// again.
pub(crate) fn remove_dir(dir: &Path) {
    if let Err(error) = linux::fs::remove_tree(dir) {
        tracing::warn!(dir = %dir.display(), error = crate::error::chain(&error),
            "cannot remove layer directory");
    }
}

/// Blob to unpack: what it is called in messages and what it must hash to.
#[derive(Debug, Clone)]
pub(crate) struct Expected {
    /// Digest of the (compressed) blob; none when it came from a local archive.
    pub(crate) digest: Option<String>,
    /// Digest of the uncompressed archive.
    pub(crate) diff_id: String,
}

/// Makes and locks a directory. Between the two another process that opens the store may take it
/// for rubbish; then a new one is made.
fn partial_dir(layers: &Path, stem: &str) -> Result<(PathBuf, OwnedFd)> {
    const TRIES: u32 = 8;
    let mut tries = 0;
    loop {
        tries += 1;
        let dir = layers.join(partial_name(stem));
        std::fs::create_dir(&dir).map_err(ImageError::io("make layer directory", &dir))?;
        match try_lock_dir(&dir) {
            Ok(lock) if dir.is_dir() => return Ok((dir, lock)),
            Err(error) if tries == TRIES => {
                return Err(ImageError::io("lock layer directory", &dir)(error));
            }
            Ok(_) | Err(_) => {}
        }
    }
}

/// Unpacks `input` into a new staged directory below `layers`. Blocking.
///
/// # Errors
/// [`ImageError::Digest`] when the content is not what was announced, [`ImageError::Unpack`],
/// [`ImageError::Io`]. Nothing stays behind.
pub(crate) fn stage(
    layers: &Path,
    expected: &Expected,
    input: impl Read,
    limits: Limits,
) -> Result<StagedLayer> {
    let (dir, lock) = partial_dir(layers, expected.diff_id.trim_start_matches("sha256:"))?;
    let fs = dir.join("fs");
    // From here on the directory goes when this value goes.
    let mut staged = StagedLayer {
        dir,
        info: LayerInfo::default(),
        committed: AtomicBool::new(false),
        _lock: lock,
    };
    std::fs::create_dir(&fs).map_err(ImageError::io("make layer directory", &fs))?;
    let root = rustix::fs::open(
        &fs,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::empty(),
    )
    .map_err(|e| ImageError::io("open layer directory", &fs)(e.into()))?;
    rustix::fs::fchmod(&root, Mode::from_raw_mode(0o755))
        .map_err(|e| ImageError::io("set mode of", &fs)(e.into()))?;
    let applied = unpack_verified(expected, input, root, limits)?;
    staged.info = LayerInfo {
        version: 1,
        diff_id: expected.diff_id.clone(),
        size_bytes: applied.bytes,
        entries: applied.entries,
        implicit_dirs: applied.implicit_dirs,
    };
    let path = staged.dir.join("layer.json");
    let json =
        serde_json::to_vec(&staged.info).map_err(|e| ImageError::io("write", &path)(e.into()))?;
    std::fs::write(&path, json).map_err(ImageError::io("write", &path))?;
    Ok(staged)
}

fn unpack_verified(
    expected: &Expected,
    input: impl Read,
    root: OwnedFd,
    limits: Limits,
) -> Result<Applied> {
    let name = expected.digest.as_ref().unwrap_or(&expected.diff_id);
    let failed = |source| ImageError::Unpack {
        layer: name.clone(),
        source,
    };
    let mut raw = Hashing::new(input);
    let outcome = unpack_hashed(&mut raw, root, limits);
    // System errors are told at once; a broken archive may be a broken download, which only the
    // digest of all of it can tell.
    let outcome = match outcome {
        Err(error) if !matches!(error, UnpackError::Archive(_) | UnpackError::Entry { .. }) => {
            return Err(failed(error));
        }
        outcome => outcome,
    };
    io::copy(&mut raw, &mut io::sink()).map_err(|_| failed(UnpackError::Cut))?;
    let actual = raw.digest();
    if let Some(wanted) = &expected.digest
        && *wanted != actual
    {
        let what = format!("layer {name}");
        return Err(ImageError::Digest {
            what,
            expected: wanted.clone(),
            actual,
        });
    }
    let (applied, diff_id) = outcome.map_err(failed)?;
    if diff_id != expected.diff_id {
        return Err(ImageError::Digest {
            what: format!("content of layer {name}"),
            expected: expected.diff_id.clone(),
            actual: diff_id,
        });
    }
    Ok(applied)
}

fn unpack_hashed(
    raw: &mut impl Read,
    root: OwnedFd,
    limits: Limits,
) -> std::result::Result<(Applied, String), UnpackError> {
    let mut plain = Hashing::new(decoder(raw).map_err(UnpackError::Archive)?);
    let applied = apply(&mut plain, root, limits)?;
    // The padding after the last entry belongs to the diff id.
    io::copy(&mut plain, &mut io::sink()).map_err(UnpackError::Archive)?;
    Ok((applied, plain.digest()))
}
