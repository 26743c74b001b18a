//! The way back: an unpacked layer directory as a layer archive, for `export`.
//!
//! Whiteouts become `.wh.` entries again, opaque directories get their mark, hard links within
//! the layer stay links. Entries are sorted, so equal content gives equal digests.

use super::error::{ImageError, Result};
use super::layer::digest_text;
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Seek as _, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

/// A packed layer in a temporary file, rewound.
pub(crate) struct Packed {
    pub(crate) file: File,
    pub(crate) digest: String,
    pub(crate) size: u64,
}

/// Writes to a file and hashes.
struct HashingFile {
    file: File,
    hash: Sha256,
    size: u64,
}

impl Write for HashingFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let written = self.file.write(buf)?;
        self.hash.update(&buf[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Packs the layer directory `root`; the temporary file is made in `scratch`.
pub(crate) fn layer(root: &Path, scratch: &Path) -> Result<Packed> {
    let failed = || ImageError::io("pack layer", root);
    let file = tempfile::tempfile_in(scratch).map_err(failed())?;
    let sink = HashingFile {
        file,
        hash: Sha256::new(),
        size: 0,
    };
    let mut out = tar::Builder::new(sink);
    let mut links = HashMap::new();
    // A stack instead of recursion: depth is the image's, not ours.
    let mut todo = vec![PathBuf::new()];
    while let Some(path) = todo.pop() {
        let children = entry(&mut out, root, &path, &mut links).map_err(failed())?;
        todo.extend(children.into_iter().rev());
    }
    let sink = out.into_inner().map_err(failed())?;
    let mut file = sink.file;
    file.rewind().map_err(failed())?;
    Ok(Packed {
        file,
        digest: digest_text(&sink.hash.finalize()),
        size: sink.size,
    })
}

/// Writes one entry; returns a directory's children in order.
fn entry(
    out: &mut tar::Builder<HashingFile>,
    root: &Path,
    path: &Path,
    links: &mut HashMap<(u64, u64), PathBuf>,
) -> io::Result<Vec<PathBuf>> {
    let full = root.join(path);
    let meta = full.symlink_metadata()?;
    let kind = meta.file_type();
    let mut header = tar::Header::new_gnu();
    header.set_metadata(&meta);
    if kind.is_char_device() && meta.rdev() == 0 {
        let mut name = std::ffi::OsString::from(".wh.");
        name.push(path.file_name().unwrap_or_default());
        empty_file(out, &path.with_file_name(name))?;
        return Ok(Vec::new());
    }
    if !kind.is_dir() && meta.nlink() > 1 {
        if let Some(first) = links.get(&(meta.dev(), meta.ino())) {
            header.set_entry_type(tar::EntryType::Link);
            header.set_size(0);
            out.append_link(&mut header, path, first)?;
            return Ok(Vec::new());
        }
        links.insert((meta.dev(), meta.ino()), path.to_owned());
    }
    if kind.is_symlink() {
        header.set_size(0);
        out.append_link(&mut header, path, std::fs::read_link(&full)?)?;
        return Ok(Vec::new());
    }
    if kind.is_socket() {
        // Has no form in an archive.
        return Ok(Vec::new());
    }
    xattrs(out, &full)?;
    if kind.is_file() {
        out.append_data(&mut header, path, File::open(&full)?)?;
        return Ok(Vec::new());
    }
    if kind.is_char_device() || kind.is_block_device() {
        header.set_device_major(rustix::fs::major(meta.rdev()))?;
        header.set_device_minor(rustix::fs::minor(meta.rdev()))?;
    }
    header.set_size(0);
    let name = if path.as_os_str().is_empty() {
        Path::new("./")
    } else {
        path
    };
    out.append_data(&mut header, name, io::empty())?;
    if !kind.is_dir() {
        return Ok(Vec::new());
    }
    let mut value = [0u8; 1];
    if rustix::fs::getxattr(&full, "trusted.overlay.opaque", &mut value).is_ok() {
        empty_file(out, &path.join(".wh..wh..opq"))?;
    }
    let names = std::fs::read_dir(&full)?.map(|e| e.map(|e| path.join(e.file_name())));
    let mut names = names.collect::<io::Result<Vec<PathBuf>>>()?;
    names.sort_by(|a, b| a.as_os_str().as_bytes().cmp(b.as_os_str().as_bytes()));
    Ok(names)
}

fn empty_file(out: &mut tar::Builder<HashingFile>, path: &Path) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.set_mode(0);
    header.set_entry_type(tar::EntryType::Regular);
    out.append_data(&mut header, path, io::empty())
}

/// A PAX record with the attributes the unpacker takes back.
fn xattrs(out: &mut tar::Builder<HashingFile>, full: &Path) -> io::Result<()> {
    let mut records = Vec::new();
    for name in xattr::list(full)? {
        let Some(text) = name.to_str() else { continue };
        if (text == "security.capability" || text.starts_with("user."))
            && let Some(value) = xattr::get(full, &name)?
        {
            records.push((format!("SCHILY.xattr.{text}"), value));
        }
    }
    if records.is_empty() {
        return Ok(());
    }
    out.append_pax_extensions(records.iter().map(|(k, v)| (k.as_str(), v.as_slice())))
}
