//! Image archives in files: `docker save` format and OCI layout, in and out.
//!
//! A file is read once to index its members, then each layer is unpacked straight from its place
//! in the file. A compressed archive is first decompressed to a temporary file beside the store.

use super::ImageLease;
use super::error::{ImageError, Result};
use super::layer::{Expected, StagedLayer, decoder, digest_of, digest_text, stage};
use super::record::{Record, parse_config};
use super::reference::{self, is_sha256};
use super::store::{CommitError, NewImage, Store};
use super::unpack::Limits;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

/// Manifests, indexes and configurations are small; anything larger is not one.
const MAX_JSON_BYTES: u64 = 8 << 20;
/// Members of an archive.
const MAX_MEMBERS: usize = 100_000;

/// A seekable archive and where its members are.
struct Members {
    file: File,
    places: HashMap<String, (u64, u64)>,
}

/// An image found in an archive.
struct Found {
    config: Vec<u8>,
    /// Member and digest of each layer, lowest first.
    layers: Vec<(String, Option<String>)>,
    tags: Vec<String>,
    manifest_digest: Option<String>,
}

fn unusable(reason: impl Into<String>) -> ImageError {
    ImageError::Unusable {
        what: "image archive".to_owned(),
        reason: reason.into(),
    }
}

/// Loads every image of the archive. Blocking.
pub(crate) fn load(store: &Store, path: &Path) -> Result<Vec<Arc<Record>>> {
    let members = Members::open(path, store.layers_dir())?;
    let found = match members.places.contains_key("index.json") {
        true => members.oci_layout()?,
        false => members.docker()?,
    };
    if found.is_empty() {
        return Err(unusable("holds no image for linux/amd64"));
    }
    found
        .into_iter()
        .map(|image| members.load_one(store, image))
        .collect()
}

impl Members {
    fn open(path: &Path, scratch: &Path) -> Result<Self> {
        let failed = || ImageError::io("read archive", path);
        let mut file = File::open(path).map_err(failed())?;
        let mut head = [0u8; 4];
        let read = file.read(&mut head).map_err(failed())?;
        file.rewind().map_err(failed())?;
        let packed = head[..read].starts_with(&[0x1f, 0x8b]) || head == [0x28, 0xb5, 0x2f, 0xfd];
        if packed {
            let mut plain = tempfile::tempfile_in(scratch)
                .map_err(ImageError::io("make temporary file in", scratch))?;
            let mut content = decoder(file).map_err(failed())?;
            io::copy(&mut content, &mut plain).map_err(failed())?;
            plain.rewind().map_err(failed())?;
            drop(content);
            file = plain;
        }
        let places = index(&file).map_err(|e| unusable(format!("{}: {e}", path.display())))?;
        Ok(Self { file, places })
    }

    fn reader(&self, name: &str) -> Result<io::Take<File>> {
        let (offset, size) = self
            .places
            .get(name)
            .ok_or_else(|| unusable(format!("member {name:?} is missing")))?;
        let failed = || ImageError::io("read archive member", name);
        // Its own offset: members are read one after the other.
        let mut file = self.file.try_clone().map_err(failed())?;
        file.seek(SeekFrom::Start(*offset)).map_err(failed())?;
        Ok(file.take(*size))
    }

    fn small(&self, name: &str) -> Result<Vec<u8>> {
        let reader = self.reader(name)?;
        if reader.limit() > MAX_JSON_BYTES {
            return Err(unusable(format!("member {name:?} is too large")));
        }
        let mut bytes = Vec::new();
        { reader }
            .read_to_end(&mut bytes)
            .map_err(ImageError::io("read archive member", name))?;
        Ok(bytes)
    }

    fn blob(&self, digest: &str) -> Result<Vec<u8>> {
        let bytes = self.small(&blob_path(digest)?)?;
        let actual = digest_of(&bytes);
        match actual == digest {
            true => Ok(bytes),
            false => Err(ImageError::Digest {
                what: "archive member".to_owned(),
                expected: digest.to_owned(),
                actual,
            }),
        }
    }

    fn docker(&self) -> Result<Vec<Found>> {
        let manifests: Vec<DockerManifest> = parse(&self.small("manifest.json")?)?;
        manifests
            .into_iter()
            .map(|m| {
                Ok(Found {
                    config: self.small(&m.config)?,
                    layers: m.layers.into_iter().map(|l| (l, None)).collect(),
                    tags: m.repo_tags.unwrap_or_default(),
                    manifest_digest: None,
                })
            })
            .collect()
    }

    fn oci_layout(&self) -> Result<Vec<Found>> {
        let index: Index = parse(&self.small("index.json")?)?;
        let mut found = Vec::new();
        for entry in index.manifests {
            let tags = entry.names();
            let mut digest = entry.digest;
            let mut blob = self.blob(&digest)?;
            // An index within the index: a multi-platform image.
            if let Ok(inner) = serde_json::from_slice::<Index>(&blob) {
                let Some(ours) = inner.manifests.into_iter().find(Descriptor::is_ours) else {
                    continue;
                };
                digest = ours.digest;
                blob = self.blob(&digest)?;
            }
            let manifest: Manifest = parse(&blob)?;
            let layers = manifest.layers.into_iter();
            let layers = layers
                .map(|l| Ok((blob_path(&l.digest)?, Some(l.digest))))
                .collect::<Result<_>>()?;
            found.push(Found {
                config: self.blob(&manifest.config.digest)?,
                layers,
                tags,
                manifest_digest: Some(digest),
            });
        }
        Ok(found)
    }

    fn load_one(&self, store: &Store, image: Found) -> Result<Arc<Record>> {
        let parsed = parse_config(&image.config)?;
        if parsed.diff_ids.len() != image.layers.len() {
            return Err(unusable("numbers of layers and diff ids differ"));
        }
        let mut staged: Vec<Arc<StagedLayer>> = Vec::new();
        for ((member, digest), diff_id) in image.layers.iter().zip(&parsed.diff_ids) {
            let again = staged.iter().any(|s| s.info.diff_id == *diff_id);
            if again || store.has_layer(diff_id) {
                continue;
            }
            let expected = Expected {
                digest: digest.clone(),
                diff_id: diff_id.clone(),
            };
            let input = io::BufReader::with_capacity(256 << 10, self.reader(member)?);
            staged.push(Arc::new(stage(
                store.layers_dir(),
                &expected,
                input,
                Limits::default(),
            )?));
        }
        let (tags, digests) = names(&image)?;
        let new = NewImage {
            id: digest_of(&image.config),
            tags,
            digests,
            config: String::from_utf8(image.config)
                .map_err(|_| unusable("configuration is not UTF-8"))?,
            diff_ids: parsed.diff_ids,
        };
        store.commit(new, &staged).map_err(|e| match e {
            CommitError::Failed(error) => error,
            CommitError::LayerGone(layer) => unusable(format!("layer {layer} vanished")),
        })
    }
}

/// Tags and digest names an archive gives an image.
fn names(image: &Found) -> Result<(Vec<String>, Vec<String>)> {
    let mut tags = Vec::new();
    let mut digests = Vec::new();
    for name in &image.tags {
        let name = reference::parse(name)?;
        tags.extend(reference::tag_name(&name));
        if let Some(digest) = &image.manifest_digest {
            digests.push(reference::digest_name(&name, digest));
        }
    }
    digests.dedup();
    Ok((tags, digests))
}

fn parse<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Result<T> {
    serde_json::from_slice(json).map_err(|e| unusable(e.to_string()))
}

fn blob_path(digest: &str) -> Result<String> {
    match is_sha256(digest) {
        true => Ok(format!(
            "blobs/sha256/{}",
            digest.trim_start_matches("sha256:")
        )),
        false => Err(unusable(format!("{digest:?} is not a sha256 digest"))),
    }
}

/// Where the regular members are; later ones win. Links (old `docker save`) lead to their target.
fn index(file: &File) -> io::Result<HashMap<String, (u64, u64)>> {
    let mut archive = tar::Archive::new(file);
    let mut places = HashMap::new();
    let mut links = Vec::new();
    for entry in archive.entries_with_seek()? {
        let entry = entry?;
        let name = plain_name(&entry.path_bytes());
        match entry.header().entry_type() {
            tar::EntryType::Regular => {
                places.insert(name, (entry.raw_file_position(), entry.size()));
            }
            tar::EntryType::Symlink | tar::EntryType::Link => {
                if let Some(target) = entry.link_name_bytes() {
                    links.push((name, plain_name(&target)));
                }
            }
            _ => {}
        }
        if places.len() + links.len() > MAX_MEMBERS {
            return Err(io::Error::other("too many members"));
        }
    }
    for (name, target) in links {
        // `<id>/layer.tar` → `../<other id>/layer.tar`
        let target = target.trim_start_matches("../").to_owned();
        if let Some(place) = places.get(&target).copied() {
            places.insert(name, place);
        }
    }
    Ok(places)
}

fn plain_name(raw: &[u8]) -> String {
    let name = String::from_utf8_lossy(raw);
    name.trim_start_matches("./").trim_matches('/').to_owned()
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerManifest {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Descriptor {
    digest: String,
    #[serde(default)]
    annotations: HashMap<String, String>,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

impl Descriptor {
    fn is_ours(&self) -> bool {
        self.platform
            .as_ref()
            .is_none_or(|p| p.os == "linux" && p.architecture == "amd64")
    }

    /// containerd's annotation holds the whole name, the specified one often only the tag.
    fn names(&self) -> Vec<String> {
        let whole = self.annotations.get("io.containerd.image.name");
        let short = self.annotations.get("org.opencontainers.image.ref.name");
        let short = short.filter(|s| s.contains('/') || s.contains(':'));
        whole.or(short).cloned().into_iter().collect()
    }
}

/// Writes the leased image as an OCI layout. Blocking.
pub(crate) fn export(lease: &ImageLease, to: &Path) -> Result<()> {
    let failed = || ImageError::io("write archive", to);
    let dir = to
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let file = tempfile::NamedTempFile::new_in(dir).map_err(failed())?;
    let mut out = tar::Builder::new(io::BufWriter::new(file));
    let mut layers = Vec::new();
    let mut diff_ids = Vec::new();
    for layer in lease.layers().iter().rev() {
        let packed = super::pack::layer(layer, dir)?;
        let digest = packed.digest.clone();
        append(&mut out, &blob_path(&digest)?, packed.size, packed.file).map_err(failed())?;
        layers.push(serde_json::json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": digest, "size": packed.size,
        }));
        diff_ids.push(digest);
    }
    let mut config: serde_json::Value = parse(lease.record().config.as_bytes())?;
    config["rootfs"] = serde_json::json!({"type": "layers", "diff_ids": diff_ids});
    if let Some(config) = config.as_object_mut() {
        // One entry per layer of the original; need not fit any more.
        config.remove("history");
    }
    let config = put_json(&mut out, &config).map_err(failed())?;
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
                   "digest": config.0, "size": config.1},
        "layers": layers,
    });
    let manifest = put_json(&mut out, &manifest).map_err(failed())?;
    let mut entries = Vec::new();
    let names = lease.record().tags.iter().map(Some);
    let names: Vec<_> = if lease.record().tags.is_empty() {
        vec![None]
    } else {
        names.collect()
    };
    for name in names {
        let mut entry = serde_json::json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": manifest.0, "size": manifest.1,
        });
        if let Some(name) = name {
            entry["annotations"] = serde_json::json!({
                "io.containerd.image.name": name, "org.opencontainers.image.ref.name": name,
            });
        }
        entries.push(entry);
    }
    let index = serde_json::json!({"schemaVersion": 2, "manifests": entries}).to_string();
    let layout = br#"{"imageLayoutVersion":"1.0.0"}"#;
    append(&mut out, "index.json", index.len() as u64, index.as_bytes()).map_err(failed())?;
    append(&mut out, "oci-layout", layout.len() as u64, &layout[..]).map_err(failed())?;
    let mut file = out.into_inner().map_err(failed())?;
    file.flush().map_err(failed())?;
    let file = file
        .into_inner()
        .map_err(|e| ImageError::io("write archive", to)(e.into()))?;
    file.persist(to)
        .map_err(|e| ImageError::io("write archive", to)(e.error))?;
    Ok(())
}

fn put_json<W: Write>(
    out: &mut tar::Builder<W>,
    json: &serde_json::Value,
) -> io::Result<(String, usize)> {
    let text = json.to_string();
    let digest = digest_text(&Sha256::digest(text.as_bytes()));
    let path = format!("blobs/{}", digest.replace(':', "/"));
    append(out, &path, text.len() as u64, text.as_bytes())?;
    Ok((digest, text.len()))
}

fn append<W: Write>(
    out: &mut tar::Builder<W>,
    path: &str,
    size: u64,
    content: impl Read,
) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_entry_type(tar::EntryType::Regular);
    out.append_data(&mut header, path, content)
}
