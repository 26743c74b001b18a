//! One layer being put together in memory, written as a reproducible gzipped archive.

use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::io::{Read, Write};

/// What is at a path.
#[derive(Debug, Clone)]
enum Content {
    Directory,
    File(Vec<u8>),
    Symlink(String),
    Hardlink(String),
}

#[derive(Debug, Clone)]
struct Entry {
    content: Content,
    mode: u32,
    uid: u64,
    gid: u64,
}

/// Files by path without a leading slash.
#[derive(Debug, Default)]
pub(super) struct Layer {
    entries: BTreeMap<String, Entry>,
}

/// All files carry this time, so that equal inputs give equal digests.
const MTIME: u64 = 1_700_000_000;

impl Layer {
    fn put(&mut self, path: &str, content: Content, mode: u32) -> &mut Self {
        self.entries.insert(
            path.to_owned(),
            Entry {
                content,
                mode,
                uid: 0,
                gid: 0,
            },
        );
        self
    }

    pub(super) fn dir(&mut self, path: &str, mode: u32) -> &mut Self {
        self.put(path, Content::Directory, mode)
    }

    pub(super) fn file(&mut self, path: &str, mode: u32, content: impl Into<Vec<u8>>) -> &mut Self {
        self.put(path, Content::File(content.into()), mode)
    }

    pub(super) fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.put(path, Content::Symlink(target.to_owned()), 0o777)
    }

    pub(super) fn hardlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.put(path, Content::Hardlink(target.to_owned()), 0o755)
    }

    pub(super) fn owner(&mut self, path: &str, uid: u64, gid: u64) -> &mut Self {
        if let Some(entry) = self.entries.get_mut(path) {
            (entry.uid, entry.gid) = (uid, gid);
        }
        self
    }

    pub(super) fn contains(&self, path: &str) -> bool {
        self.entries.contains_key(path)
    }

    /// Takes over the entries of an archive whose path, as changed by `place`, is some.
    pub(super) fn merge(
        &mut self,
        archive: impl Read,
        place: impl Fn(&str) -> Option<String>,
    ) -> Result<()> {
        let mut archive = tar::Archive::new(archive);
        for entry in archive.entries()? {
            let mut entry = entry?;
            let path = entry.path()?.to_string_lossy().into_owned();
            let Some(path) = place(path.trim_start_matches("./").trim_matches('/')) else {
                continue;
            };
            let link = || -> Result<String> {
                let name = entry.link_name()?.context("link without target")?;
                Ok(name.to_string_lossy().into_owned())
            };
            let content = match entry.header().entry_type() {
                tar::EntryType::Directory => Content::Directory,
                tar::EntryType::Symlink => Content::Symlink(link()?),
                tar::EntryType::Link => {
                    let target = link()?;
                    let target = target.trim_start_matches("./");
                    Content::Hardlink(place(target).context("link to a file left out")?)
                }
                tar::EntryType::Regular => {
                    let mut bytes = Vec::new();
                    entry.read_to_end(&mut bytes)?;
                    Content::File(bytes)
                }
                other => bail!("{path} has the unexpected type {other:?}"),
            };
            let header = entry.header();
            let (mode, uid, gid) = (header.mode()?, header.uid()?, header.gid()?);
            // A directory that is there keeps its mode: packages disagree, the first is ours.
            if matches!(content, Content::Directory) && self.contains(&path) {
                continue;
            }
            self.entries.insert(
                path,
                Entry {
                    content,
                    mode,
                    uid,
                    gid,
                },
            );
        }
        Ok(())
    }

    /// Writes the gzipped archive; parents come before children, links after their targets.
    pub(super) fn write(&self, to: impl Write) -> Result<()> {
        let gzip = flate2::write::GzEncoder::new(to, flate2::Compression::new(4));
        let mut out = tar::Builder::new(gzip);
        let is_link = |e: &Entry| matches!(e.content, Content::Hardlink(_));
        let first = self.entries.iter().filter(|(_, e)| !is_link(e));
        let last = self.entries.iter().filter(|(_, e)| is_link(e));
        for (path, entry) in first.chain(last) {
            append(&mut out, path, entry).with_context(|| format!("pack {path}"))?;
        }
        out.into_inner()?.finish()?.flush()?;
        Ok(())
    }
}

fn append<W: Write>(out: &mut tar::Builder<W>, path: &str, entry: &Entry) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(entry.mode);
    header.set_uid(entry.uid);
    header.set_gid(entry.gid);
    header.set_mtime(MTIME);
    header.set_size(0);
    match &entry.content {
        Content::Directory => {
            header.set_entry_type(tar::EntryType::Directory);
            out.append_data(&mut header, format!("{path}/"), std::io::empty())?;
        }
        Content::File(bytes) => {
            header.set_entry_type(tar::EntryType::Regular);
            header.set_size(bytes.len() as u64);
            out.append_data(&mut header, path, bytes.as_slice())?;
        }
        Content::Symlink(target) => {
            header.set_entry_type(tar::EntryType::Symlink);
            out.append_link(&mut header, path, target)?;
        }
        Content::Hardlink(target) => {
            header.set_entry_type(tar::EntryType::Link);
            out.append_link(&mut header, path, target)?;
        }
    }
    Ok(())
}
