//! Images in the cache: an OCI image layout whose layers are found by what they are made from.

use super::layer::Layer;
use crate::artefacts::cache::{self, Inputs};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

/// Changes whenever the way layers are written does.
const FORMAT: &str = "layer format 2";

/// A layer in the cache.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Blob {
    pub(super) path: PathBuf,
    pub(super) digest: String,
    pub(super) size: u64,
    diff_id: String,
}

/// A whole image: layers on disk, the rest in memory.
#[derive(Debug, Clone)]
pub(super) struct Image {
    pub(super) manifest: Vec<u8>,
    pub(super) config: Vec<u8>,
    pub(super) layers: Vec<Blob>,
}

/// How an image is run.
#[derive(Debug, Clone, Default)]
pub(super) struct Run<'a> {
    pub(super) entrypoint: &'a [&'a str],
    pub(super) cmd: &'a [&'a str],
    pub(super) user: &'a str,
    pub(super) working_dir: &'a str,
    pub(super) ports: &'a [&'a str],
    /// Makes images of equal content differ.
    pub(super) version: &'a str,
}

/// Layers kept by their inputs.
#[derive(Debug)]
pub(super) struct Store {
    dir: PathBuf,
}

impl Store {
    pub(super) fn open(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(Self {
            dir: dir.to_owned(),
        })
    }

    /// The layer `name` with these inputs, built if it is not there.
    pub(super) fn layer(
        &self,
        name: &str,
        mut inputs: Inputs,
        build: impl FnOnce(&mut Layer) -> Result<()>,
    ) -> Result<Blob> {
        inputs.word(FORMAT);
        let dir = cache::ensure(&self.dir, name, &inputs, |dir| {
            let mut layer = Layer::default();
            build(&mut layer)?;
            let path = dir.join("layer.tar.gz");
            let mut out = BufWriter::new(File::create(&path)?);
            layer.write(&mut out)?;
            out.flush()?;
            let packed = fs::read(&path)?;
            let mut plain = flate2::read::GzDecoder::new(packed.as_slice());
            let mut hash = Sha256::new();
            let mut buffer = vec![0; 1 << 16];
            loop {
                match plain.read(&mut buffer)? {
                    0 => break,
                    read => hash.update(&buffer[..read]),
                }
            }
            let blob = Blob {
                path: PathBuf::new(),
                digest: digest(&packed),
                size: packed.len() as u64,
                diff_id: text(&hash.finalize()),
            };
            fs::write(dir.join("blob.json"), serde_json::to_vec(&blob)?)?;
            Ok(())
        })?;
        let record = fs::read(dir.join("blob.json"))?;
        let blob: Blob = serde_json::from_slice(&record)?;
        Ok(Blob {
            path: dir.join("layer.tar.gz"),
            ..blob
        })
    }
}

/// Puts an image together.
pub(super) fn image(layers: Vec<Blob>, run: &Run<'_>) -> Image {
    let ports: serde_json::Map<_, _> = run
        .ports
        .iter()
        .map(|p| ((*p).to_owned(), serde_json::json!({})))
        .collect();
    let mut config = serde_json::json!({
        "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "Labels": {"dev.ferrule.test-image": run.version},
    });
    for (key, words) in [("Entrypoint", run.entrypoint), ("Cmd", run.cmd)] {
        if !words.is_empty() {
            config[key] = serde_json::json!(words);
        }
    }
    for (key, word) in [("User", run.user), ("WorkingDir", run.working_dir)] {
        if !word.is_empty() {
            config[key] = serde_json::json!(word);
        }
    }
    if !ports.is_empty() {
        config["ExposedPorts"] = ports.into();
    }
    let diff_ids: Vec<&str> = layers.iter().map(|l| l.diff_id.as_str()).collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "created": "2023-11-14T22:13:20Z",
        "config": config, "rootfs": {"type": "layers", "diff_ids": diff_ids},
    })
    .to_string()
    .into_bytes();
    let described: Vec<_> = layers
        .iter()
        .map(|l| {
            serde_json::json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": l.digest, "size": l.size,
            })
        })
        .collect();
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": digest(&config), "size": config.len(),
        },
        "layers": described,
    })
    .to_string()
    .into_bytes();
    Image {
        manifest,
        config,
        layers,
    }
}

/// `sha256:` and hex.
#[must_use]
pub fn digest(bytes: &[u8]) -> String {
    text(&Sha256::digest(bytes))
}

fn text(hash: &[u8]) -> String {
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}
