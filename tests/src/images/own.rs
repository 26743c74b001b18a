//! Images of our own programs: static files in an otherwise empty image, equal bytes for equal
//! programs. Written as OCI archives for users, pushed into the lab's registry for tests.

use super::layout::{Image, Run, Store, digest, image};
use super::push::Registry;
use crate::artefacts::cache::Inputs;
use crate::artefacts::ours::NetworkPrograms;
use anyhow::{Context, Result};
use serde_json::json;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The plugin and its peer agent; what is started is the agent, or the plugin itself to be put in
/// place.
fn network(store: &Store, programs: &NetworkPrograms) -> Result<Image> {
    let files = programs.files();
    let mut inputs = Inputs::default();
    for file in &files {
        inputs.file(file)?;
    }
    let layer = store.layer(programs.name, inputs, |layer| {
        for file in &files {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            layer.file(&name, 0o755, fs::read(file)?);
        }
        Ok(())
    })?;
    let agent = format!("/{}-agent", programs.name);
    let plugin = format!("/{}", programs.name);
    let run = Run {
        entrypoint: match programs.agent {
            Some(_) => &[&agent],
            None => &[&plugin, "install"],
        },
        working_dir: "/",
        version: programs.name,
        ..Run::default()
    };
    Ok(image(vec![layer], &run))
}

/// Makes sure that `registry` serves the image; returns its name, whose tag changes with its
/// content.
///
/// # Errors
/// When it cannot be built or pushed.
pub fn ensure_network(registry: &str, cache: &Path, programs: &NetworkPrograms) -> Result<String> {
    let store = Store::open(&cache.join("images"))?;
    let image = network(&store, programs)?;
    let digest = digest(&image.manifest);
    let tag = digest
        .trim_start_matches("sha256:")
        .get(..12)
        .unwrap_or("latest");
    let pushed = Registry::new(registry).ensure(programs.name, tag, &image);
    pushed.with_context(|| format!("push {} to {registry}", programs.name))?;
    Ok(format!("{registry}/{}:{tag}", programs.name))
}

/// Writes the image as an OCI archive `<name>.tar` into `dir`; returns the file and the manifest's
/// digest.
///
/// # Errors
/// When it cannot be built or written.
pub fn write_network(
    dir: &Path,
    cache: &Path,
    programs: &NetworkPrograms,
) -> Result<(PathBuf, String)> {
    let store = Store::open(&cache.join("images"))?;
    let image = network(&store, programs)?;
    write(dir, programs.name, &image)
}

/// Writes an image as `<name>.tar` into `dir`; returns the file and the manifest's digest.
pub(super) fn write(dir: &Path, name: &str, image: &Image) -> Result<(PathBuf, String)> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let path = dir.join(format!("{name}.tar"));
    let name = format!("ferrule.dev/{name}:latest");
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    archive(image, &name, file).with_context(|| format!("write {}", path.display()))?;
    Ok((path, digest(&image.manifest)))
}

/// An OCI image layout in a tar file (image-spec v1.1, image-layout.md), the same bytes every time.
fn archive(image: &Image, name: &str, to: impl Write) -> Result<()> {
    let manifest = digest(&image.manifest);
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": manifest, "size": image.manifest.len(),
            "platform": {"architecture": "amd64", "os": "linux"},
            // containerd goes by the first, others by the second.
            "annotations": {
                "io.containerd.image.name": name,
                "org.opencontainers.image.ref.name": name,
            },
        }],
    });
    let mut out = tar::Builder::new(to);
    let layout = json!({"imageLayoutVersion": "1.0.0"});
    add(&mut out, "oci-layout", layout.to_string().as_bytes())?;
    add(&mut out, "index.json", index.to_string().as_bytes())?;
    add(&mut out, &blob(&manifest), &image.manifest)?;
    add(&mut out, &blob(&digest(&image.config)), &image.config)?;
    for layer in &image.layers {
        let content =
            fs::read(&layer.path).with_context(|| format!("read {}", layer.path.display()))?;
        add(&mut out, &blob(&layer.digest), &content)?;
    }
    out.into_inner()?.flush()?;
    Ok(())
}

fn blob(digest: &str) -> String {
    format!("blobs/{}", digest.replace(':', "/"))
}

fn add<W: Write>(out: &mut tar::Builder<W>, path: &str, content: &[u8]) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(content.len() as u64);
    header.set_mtime(0);
    out.append_data(&mut header, path, content)
        .with_context(|| format!("pack {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    #[test]
    fn equal_programs_make_equal_archives_whose_index_leads_to_every_blob() {
        let dir = tempfile::tempdir().unwrap();
        let programs = NetworkPrograms {
            name: "cni-x",
            plugin: dir.path().join("cni-x"),
            agent: Some(dir.path().join("cni-x-agent")),
        };
        fs::write(&programs.plugin, "plugin").unwrap();
        fs::write(dir.path().join("cni-x-agent"), "agent").unwrap();
        let write = |name: &str| {
            let to = dir.path().join(name);
            // A cache of its own each time: nothing is taken from the first.
            let (file, digest) = write_network(&to, &to.join("cache"), &programs).unwrap();
            (fs::read(file).unwrap(), digest)
        };
        let (one, digest) = write("one");
        assert_eq!((one.clone(), digest.clone()), write("two"));

        let mut found = Vec::new();
        for entry in tar::Archive::new(one.as_slice()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().to_string_lossy().into_owned();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            if let Some(name) = path.strip_prefix("blobs/sha256/") {
                assert_eq!(super::digest(&content), format!("sha256:{name}"));
            }
            found.push(path);
        }
        assert!(found.contains(&blob(&digest)), "{found:?}");
        assert_eq!(found.len(), 5, "{found:?}");
    }
}
