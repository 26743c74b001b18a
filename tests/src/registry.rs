//! A registry of a scenario's own that can be told to misbehave: wrong bytes, short bytes, another
//! manifest, slow. Images are a stored one of the lab with a layer on top that no other image has.

use crate::images::digest;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How the registry serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// As it should.
    Honest,
    /// One byte in the middle of an image's own layer is another.
    WrongByte,
    /// An image's own layer ends before its announced length, again and again.
    Short,
    /// Every manifest that is asked for by digest is another one.
    WrongManifest,
    /// An image's own layer comes in pieces with pauses, some 100 kB/s.
    Slow,
}

/// An image it serves.
#[derive(Debug, Clone)]
pub struct Served {
    /// Digest of its manifest.
    pub digest: String,
    /// Digest of the layer that only this image has.
    pub layer: String,
    /// Digest of that layer's uncompressed content.
    pub diff_id: String,
}

#[derive(Debug)]
struct Shared {
    manner: Mutex<Manner>,
    /// By tag and by digest.
    manifests: Mutex<BTreeMap<String, Vec<u8>>>,
    blobs: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Layers that no other image has: only these are tampered with.
    own: Mutex<BTreeSet<String>>,
    stopped: AtomicBool,
}

/// A running registry; it ends with this value.
#[derive(Debug)]
pub struct Registry {
    /// Where it listens, by plain HTTP.
    pub address: SocketAddr,
    base: String,
    shared: Arc<Shared>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    /// Starts one on a free port of `host`; images are built on those of the registry `base`
    /// (`host:port`).
    ///
    /// # Errors
    /// When no port can be had.
    pub fn start(host: std::net::Ipv4Addr, base: &str) -> Result<Self> {
        let listener = TcpListener::bind((host, 0)).context("listen as a registry")?;
        let address = listener.local_addr().context("own address")?;
        let shared = Arc::new(Shared {
            manner: Mutex::new(Manner::Honest),
            manifests: Mutex::default(),
            blobs: Mutex::default(),
            own: Mutex::default(),
            stopped: AtomicBool::new(false),
        });
        let serving = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if serving.stopped.load(Ordering::Acquire) {
                    return;
                }
                let serving = Arc::clone(&serving);
                // A client that goes away is not our business.
                std::thread::spawn(move || drop(answer(&serving, stream)));
            }
        });
        Ok(Self {
            address,
            base: base.to_owned(),
            shared,
        })
    }

    /// How to serve from now on.
    pub fn behave(&self, manner: Manner) {
        *lock(&self.shared.manner) = manner;
    }

    /// Serves `<any repository>:<tag>`: the base's `repository:base_tag` with one more layer that
    /// holds the file `/marker` with `marker` and as many bytes that do not compress.
    ///
    /// # Errors
    /// When the base cannot be fetched.
    pub fn put(&self, tag: &str, from: (&str, &str), marker: &str, bytes: usize) -> Result<Served> {
        let (repository, base_tag) = from;
        let manifest = get(
            &self.base,
            &format!("/v2/{repository}/manifests/{base_tag}"),
        )?;
        let mut manifest: Value = serde_json::from_slice(&manifest).context("base manifest")?;
        let blob = |digest: &str| get(&self.base, &format!("/v2/{repository}/blobs/{digest}"));
        let name = |value: &Value| value.as_str().map(str::to_owned).context("no digest");
        let config = blob(&name(&manifest["config"]["digest"])?)?;
        let mut config: Value = serde_json::from_slice(&config).context("base configuration")?;
        for layer in manifest["layers"].as_array().context("no layers")? {
            let digest = name(&layer["digest"])?;
            let content = blob(&digest)?;
            lock(&self.shared.blobs).insert(digest, content);
        }
        let tar = layer(marker, bytes)?;
        let diff_id = digest(&tar);
        let packed = gzip(&tar)?;
        let served_layer = digest(&packed);
        let described = json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": served_layer, "size": packed.len(),
        });
        push(&mut manifest["layers"], described)?;
        push(&mut config["rootfs"]["diff_ids"], json!(diff_id))?;
        let config = config.to_string().into_bytes();
        manifest["config"]["digest"] = json!(digest(&config));
        manifest["config"]["size"] = json!(config.len());
        let manifest = manifest.to_string().into_bytes();
        let served = Served {
            digest: digest(&manifest),
            layer: served_layer.clone(),
            diff_id,
        };
        lock(&self.shared.own).insert(served_layer.clone());
        let mut blobs = lock(&self.shared.blobs);
        blobs.insert(digest(&config), config);
        blobs.insert(served_layer, packed);
        let mut manifests = lock(&self.shared.manifests);
        manifests.insert(tag.to_owned(), manifest.clone());
        manifests.insert(served.digest.clone(), manifest);
        Ok(served)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Release);
        // Wakes the listener.
        drop(TcpStream::connect(self.address));
    }
}

fn push(list: &mut Value, item: Value) -> Result<()> {
    list.as_array_mut().context("not a list")?.push(item);
    Ok(())
}

/// The marker and a file of noise.
fn layer(marker: &str, bytes: usize) -> Result<Vec<u8>> {
    let mut out = tar::Builder::new(Vec::new());
    let mut state = marker
        .bytes()
        .fold(0x9e37_79b9_7f4a_7c15_u64, |state, byte| {
            (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    let mut noise = Vec::with_capacity(bytes + 8);
    while noise.len() < bytes {
        // xorshift64: anything that gzip cannot shrink.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend(state.to_le_bytes());
    }
    for (path, content) in [("marker", marker.as_bytes()), ("noise", noise.as_slice())] {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(content.len() as u64);
        out.append_data(&mut header, path, content)?;
    }
    Ok(out.into_inner()?)
}

fn gzip(tar: &[u8]) -> Result<Vec<u8>> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(tar)?;
    Ok(out.finish()?)
}

/// Fetches from a registry by plain HTTP.
fn get(host: &str, path: &str) -> Result<Vec<u8>> {
    let what = || format!("GET http://{host}{path}");
    let mut stream = TcpStream::connect(host).with_context(what)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let accept = "application/vnd.oci.image.manifest.v1+json";
    write!(
        stream,
        "GET {path} HTTP/1.0\r\nHost: {host}\r\nAccept: {accept}\r\n\r\n"
    )
    .with_context(what)?;
    let mut text = Vec::new();
    stream.read_to_end(&mut text).with_context(what)?;
    let end = text.windows(4).position(|bytes| bytes == b"\r\n\r\n");
    let end = end.with_context(|| format!("{}: no answer", what()))?;
    let head = String::from_utf8_lossy(&text[..end]).into_owned();
    ensure!(head.contains(" 200 "), "{}: {head}", what());
    Ok(text.split_off(end + 4))
}

/// One request per connection.
fn answer(shared: &Shared, mut stream: TcpStream) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    let mut from = 0;
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(range) = line.strip_prefix("range: bytes=") {
            let start = range.split('-').next().unwrap_or_default();
            from = start.trim().parse().unwrap_or(0);
        }
    }
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    // Whoever asks a mirror names the registry it stands for in a query.
    let path = path.split('?').next().unwrap_or_default();
    let name = path.rsplit('/').next().unwrap_or_default();
    let manner = *lock(&shared.manner);
    let whole = method == "GET";
    if path.contains("/manifests/") {
        let kind = "application/vnd.oci.image.manifest.v1+json";
        match manifest(shared, name, manner) {
            Some(body) => respond(
                &mut stream,
                "200 OK",
                kind,
                whole.then_some(&body),
                body.len(),
            ),
            None => not_found(&mut stream),
        }
    } else if path.contains("/blobs/") {
        let blob = lock(&shared.blobs).get(name).cloned();
        let own = lock(&shared.own).contains(name);
        let manner = if own { manner } else { Manner::Honest };
        match blob {
            Some(body) => serve_blob(&mut stream, body, from, whole, manner),
            None => not_found(&mut stream),
        }
    } else {
        respond(&mut stream, "200 OK", "application/json", Some(b"{}"), 2)
    }
}

fn manifest(shared: &Shared, name: &str, manner: Manner) -> Option<Vec<u8>> {
    let manifests = lock(&shared.manifests);
    let right = manifests.get(name)?;
    let wrong = manner == Manner::WrongManifest && name.starts_with("sha256:");
    let other = manifests.values().find(|other| *other != right);
    Some(other.filter(|_| wrong).unwrap_or(right).clone())
}

fn serve_blob(
    stream: &mut TcpStream,
    mut body: Vec<u8>,
    from: usize,
    whole: bool,
    manner: Manner,
) -> std::io::Result<()> {
    let kind = "application/octet-stream";
    let middle = body.len() / 2;
    if manner == Manner::WrongByte {
        body[middle] ^= 0x55;
    }
    let status = if from > 0 {
        "206 Partial Content"
    } else {
        "200 OK"
    };
    let rest = body.get(from..).unwrap_or_default();
    let length = rest.len();
    let sent = match manner {
        Manner::Short => &rest[..length / 2],
        Manner::Honest | Manner::WrongByte | Manner::WrongManifest | Manner::Slow => rest,
    };
    if manner != Manner::Slow {
        return respond(stream, status, kind, whole.then_some(sent), length);
    }
    respond(stream, status, kind, Some(&[]), length)?;
    for piece in sent.chunks(10_000) {
        stream.write_all(piece)?;
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn not_found(stream: &mut TcpStream) -> std::io::Result<()> {
    let body = br#"{"errors":[{"code":"NAME_UNKNOWN","message":"not here"}]}"#;
    respond(
        stream,
        "404 Not Found",
        "application/json",
        Some(body),
        body.len(),
    )
}

fn respond(
    stream: &mut TcpStream,
    status: &str,
    kind: &str,
    body: Option<&[u8]>,
    length: usize,
) -> std::io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.unwrap_or_default())
}
