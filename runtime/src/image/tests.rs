//! Pulls against a small registry in this process; every image is made here.

use super::layer::digest_of;
use super::unpack::tests::Tar;
use super::*;
use crate::service::RuntimeErrorKind;
use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Mutex, PoisonError};

/// What the registry does to one path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Answers 503 so many times.
    Unavailable(u32),
    /// Sends half, then closes, so many times.
    Cut(u32),
    /// Sends nothing until released.
    Hold,
}

#[derive(Default)]
struct Shared {
    blobs: HashMap<String, Vec<u8>>,
    manifests: HashMap<String, Vec<u8>>,
    /// Requests by path.
    hits: BTreeMap<String, u32>,
    faults: HashMap<String, Fault>,
    /// Wanted `Authorization` header.
    basic: Option<String>,
}

#[derive(Clone)]
struct Registry {
    shared: Arc<(Mutex<Shared>, std::sync::Condvar)>,
    host: String,
}

impl Registry {
    fn start() -> Self {
        drop(rustls::crypto::ring::default_provider().install_default());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let registry = Self {
            shared: Arc::default(),
            host,
        };
        let serving = registry.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let registry = serving.clone();
                std::thread::spawn(move || stream.and_then(|s| registry.serve(s)));
            }
            Ok::<(), std::io::Error>(())
        });
        registry
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        loop {
            let (mut request, mut auth, mut offset, mut line) =
                (String::new(), None, 0usize, String::new());
            if reader.read_line(&mut request)? == 0 {
                return Ok(());
            }
            while reader.read_line(&mut line)? > 2 {
                let lower = line.to_ascii_lowercase();
                if let Some(range) = lower.strip_prefix("range: bytes=") {
                    offset = range.split('-').next().unwrap().parse().unwrap();
                }
                if lower.starts_with("authorization:") {
                    auth = Some(line["authorization:".len()..].trim().to_owned());
                }
                line.clear();
            }
            let path = request.split(' ').nth(1).unwrap_or("/");
            let path = path.split('?').next().unwrap_or(path).to_owned();
            if !self.answer(&mut stream, &path, auth.as_deref(), offset)? {
                return Ok(());
            }
        }
    }

    /// False closes the connection.
    fn answer(
        &self,
        out: &mut TcpStream,
        path: &str,
        auth: Option<&str>,
        offset: usize,
    ) -> std::io::Result<bool> {
        let mut shared = self.lock();
        *shared.hits.entry(path.to_owned()).or_default() += 1;
        self.shared.1.notify_all();
        let empty = |out: &mut TcpStream, head: &str| {
            write!(out, "HTTP/1.1 {head}\r\nContent-Length: 0\r\n\r\n").map(|()| true)
        };
        if shared.basic.is_some() && shared.basic.as_deref() != auth {
            return empty(
                out,
                "401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"",
            );
        }
        while shared.faults.get(path) == Some(&Fault::Hold) {
            shared = self.shared.1.wait(shared).unwrap();
        }
        let mut cut = false;
        match shared.faults.get_mut(path) {
            Some(Fault::Unavailable(n)) if *n > 0 => {
                *n -= 1;
                return empty(out, "503 Busy");
            }
            Some(Fault::Cut(n)) if *n > 0 => {
                *n -= 1;
                cut = true;
            }
            Some(Fault::Unavailable(_) | Fault::Cut(_) | Fault::Hold) | None => {}
        }
        if path == "/v2/" {
            return empty(out, "200 OK");
        }
        let last = path.rsplit('/').next().unwrap_or("");
        let body = match path.contains("/manifests/") {
            true => shared.manifests.get(last).cloned(),
            false => shared.blobs.get(last).cloned(),
        };
        drop(shared);
        let Some(body) = body else {
            return empty(out, "404 Not Found");
        };
        let body = &body[offset.min(body.len())..];
        let status = if path.contains("/blobs/") {
            "206 Partial Content"
        } else {
            "200 OK"
        };
        write!(
            out,
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )?;
        out.write_all(if cut { &body[..body.len() / 2] } else { body })?;
        Ok(!cut)
    }

    /// Publishes an image of these compressed layers (blob, diff id) under tags.
    fn publish(&self, tag: &str, layers: &[(Vec<u8>, String)]) -> String {
        let diff_ids: Vec<&String> = layers.iter().map(|(_, d)| d).collect();
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "tag": tag,
            "config": {"Entrypoint": ["/run"], "User": "1000"},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        })
        .to_string()
        .into_bytes();
        let described: Vec<_> = layers
            .iter()
            .map(|(blob, _)| {
                serde_json::json!({
                    "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                    "digest": digest_of(blob), "size": blob.len(),
                })
            })
            .collect();
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {"mediaType": "application/vnd.docker.container.image.v1+json",
                       "digest": digest_of(&config), "size": config.len()},
            "layers": described,
        })
        .to_string()
        .into_bytes();
        let digest = digest_of(&manifest);
        let mut shared = self.lock();
        for (blob, _) in layers {
            shared.blobs.insert(digest_of(blob), blob.clone());
        }
        shared.blobs.insert(digest_of(&config), config);
        shared.manifests.insert(tag.to_owned(), manifest.clone());
        shared.manifests.insert(digest.clone(), manifest);
        digest
    }

    fn hits(&self, path_end: &str) -> u32 {
        self.lock()
            .hits
            .iter()
            .filter(|(p, _)| p.ends_with(path_end))
            .map(|(_, n)| n)
            .sum()
    }

    fn fault(&self, path: String, fault: Fault) {
        self.lock().faults.insert(path, fault);
        self.shared.1.notify_all();
    }

    fn wait_for_hit(&self, path_end: &str) {
        let mut shared = self.lock();
        while !shared.hits.keys().any(|p| p.ends_with(path_end)) {
            shared = self.shared.1.wait(shared).unwrap();
        }
    }
}

fn gzip(tar: &[u8]) -> (Vec<u8>, String) {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(tar).unwrap();
    (out.finish().unwrap(), digest_of(tar))
}

fn layer(name: &str, bytes: usize) -> Vec<u8> {
    let mut tar = Tar::default();
    // Not compressible, so that streams have a middle.
    let mut x = 1u32;
    let content: Vec<u8> = std::iter::repeat_with(|| {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 24) as u8
    })
    .take(bytes)
    .collect();
    tar.entry(tar::EntryType::Regular, name, "", 0o755, &content);
    tar.finish()
}

struct Lab {
    registry: Registry,
    dir: tempfile::TempDir,
    store: ImageStore,
}

fn lab() -> Lab {
    let registry = Registry::start();
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path(), config(&registry)).unwrap();
    Lab {
        registry,
        dir,
        store,
    }
}

fn config(registry: &Registry) -> RegistryConfig {
    let mirrors = vec![format!("http://{}", registry.host)];
    RegistryConfig {
        mirrors: BTreeMap::from([("example.com".to_owned(), mirrors)]),
        insecure: Vec::new(),
        only_mirrors: true,
    }
}

impl Lab {
    fn leftovers(&self) -> usize {
        let names = std::fs::read_dir(self.dir.path().join("layers")).unwrap();
        names
            .filter(|n| {
                n.as_ref()
                    .unwrap()
                    .file_name()
                    .to_string_lossy()
                    .contains("partial")
            })
            .count()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_pulled_by_tag_and_digest_from_a_mirror_in_all_compressions() {
    let lab = lab();
    let (plain, zstd) = (layer("plain", 100), layer("zstd", 5000));
    let packed = zstd::encode_all(zstd.as_slice(), 3).unwrap();
    let layers = [
        gzip(&layer("gzip", 3000)),
        (plain.clone(), digest_of(&plain)),
        (packed, digest_of(&zstd)),
    ];
    let digest = lab.registry.publish("1", &layers);
    let status = lab.store.pull("example.com/a/b:1", &[]).await.unwrap();
    assert_eq!(status.repo_tags, ["example.com/a/b:1"]);
    assert_eq!(status.repo_digests, [format!("example.com/a/b@{digest}")]);
    assert_eq!((status.size_bytes, status.user.as_str()), (8100, "1000"));
    let lease = lab.store.lease("example.com/a/b:1").unwrap();
    assert_eq!(lease.config().entrypoint, ["/run"]);
    let dirs = lease.layers();
    assert!(dirs[0].join("zstd").is_file() && dirs[2].join("gzip").is_file());
    let again = lab
        .store
        .pull(&format!("example.com/a/b@{digest}"), &[])
        .await
        .unwrap();
    assert_eq!(again.id, status.id);
    assert_eq!(
        lab.store.status(&format!("example.com/a/b@{digest}")),
        Some(again)
    );
    for (blob, _) in &layers {
        assert_eq!(
            lab.registry.hits(&digest_of(blob)),
            1,
            "layers are fetched once"
        );
    }
    assert_eq!(lab.leftovers(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_index_leads_to_our_platform_and_its_digest_is_a_name() {
    let lab = lab();
    let ours = lab.registry.publish("x", &[gzip(&layer("f", 10))]);
    let entry = |digest: &str, arch: &str| {
        serde_json::json!({"mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest, "size": 1, "platform": {"os": "linux", "architecture": arch}})
    };
    let other = format!("sha256:{}", "0".repeat(64));
    let index = serde_json::json!({"schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry(&other, "arm64"), entry(&ours, "amd64")]})
    .to_string()
    .into_bytes();
    let digest = digest_of(&index);
    lab.registry
        .lock()
        .manifests
        .insert("multi".to_owned(), index);
    let status = lab.store.pull("example.com/m:multi", &[]).await.unwrap();
    assert_eq!(status.repo_digests[0], format!("example.com/m@{digest}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_pulls_of_one_image_and_pulls_sharing_a_layer_make_one_download() {
    let lab = lab();
    let shared = gzip(&layer("shared", 200_000));
    lab.registry.publish("1", std::slice::from_ref(&shared));
    lab.registry
        .publish("2", &[shared.clone(), gzip(&layer("more", 10))]);
    let blob = digest_of(&shared.0);
    let path = format!("/v2/a/blobs/{blob}");
    lab.registry.fault(path.clone(), Fault::Hold);
    let mut pulls = tokio::task::JoinSet::new();
    for i in 0..100 {
        let (store, name) = (lab.store.clone(), format!("example.com/a:{}", 1 + i % 2));
        pulls.spawn(async move { store.pull(&name, &[]).await.map(|s| s.id) });
    }
    let registry = lab.registry.clone();
    tokio::task::spawn_blocking(move || registry.wait_for_hit(&blob))
        .await
        .unwrap();
    lab.registry.fault(path.clone(), Fault::Cut(0));
    let results = pulls.join_all().await;
    assert!(
        results.iter().all(std::result::Result::is_ok),
        "{results:?}"
    );
    assert_eq!(lab.registry.hits(&path), 1);
    assert_eq!(lab.store.list().len(), 2);
    assert_eq!(lab.leftovers(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tiny_image_does_not_wait_behind_a_slow_big_one() {
    let lab = lab();
    for i in 0..8 {
        let big = gzip(&layer(&format!("big{i}"), 9 << 20));
        lab.registry
            .fault(format!("/v2/a/blobs/{}", digest_of(&big.0)), Fault::Hold);
        lab.registry.publish(&format!("big{i}"), &[big]);
    }
    lab.registry.publish("tiny", &[gzip(&layer("tiny", 10))]);
    let mut slow = tokio::task::JoinSet::new();
    for i in 0..8 {
        let store = lab.store.clone();
        slow.spawn(async move { store.pull(&format!("example.com/a:big{i}"), &[]).await });
    }
    lab.store.pull("example.com/a:tiny", &[]).await.unwrap();
    assert_eq!(lab.store.list().len(), 1);
    slow.abort_all();
}

#[tokio::test(flavor = "multi_thread")]
async fn passing_failures_are_retried_and_broken_streams_resumed() {
    let lab = lab();
    let big = gzip(&layer("big", 2_000_000));
    let blob = digest_of(&big.0);
    lab.registry.publish("1", &[big]);
    lab.registry
        .fault("/v2/a/manifests/1".to_owned(), Fault::Unavailable(2));
    lab.registry
        .fault(format!("/v2/a/blobs/{blob}"), Fault::Cut(3));
    lab.store.pull("example.com/a:1", &[]).await.unwrap();
    assert_eq!(lab.registry.hits(&blob), 4);
    assert_eq!(lab.registry.hits("/manifests/1"), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn corrupt_layers_are_named_and_leave_nothing() {
    let lab = lab();
    let good = gzip(&layer("f", 50_000));
    let digest = digest_of(&good.0);
    lab.registry.publish("1", std::slice::from_ref(&good));
    // Same length, other bytes.
    let mut bad = good.0.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 0xff;
    lab.registry.lock().blobs.insert(digest.clone(), bad);
    let error = lab.store.pull("example.com/a:1", &[]).await.unwrap_err();
    assert!(matches!(*error, ImageError::Digest { .. }), "{error:?}");
    assert!(error.to_string().contains(&digest), "{error}");
    assert_eq!(RuntimeErrorKind::ImagePull, error.kind());
    // Right digest, but not what the configuration says is inside.
    lab.registry
        .publish("2", &[(good.0.clone(), digest_of(b"other"))]);
    lab.registry
        .lock()
        .blobs
        .insert(digest.clone(), good.0.clone());
    let error = lab.store.pull("example.com/a:2", &[]).await.unwrap_err();
    assert!(matches!(*error, ImageError::Digest { .. }), "{error:?}");
    // A gzip stream that ends too early, with the digest it was published under.
    let torn = good.0[..good.0.len() - 100].to_vec();
    lab.registry.publish("3", &[(torn, good.1)]);
    let error = lab.store.pull("example.com/a:3", &[]).await.unwrap_err();
    assert!(matches!(*error, ImageError::Unpack { .. }), "{error:?}");
    assert!(lab.store.list().is_empty());
    assert_eq!(lab.leftovers(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_image_and_refused_credentials_are_told_apart() {
    let lab = lab();
    let error = lab.store.pull("example.com/none:1", &[]).await.unwrap_err();
    assert!(matches!(*error, ImageError::NotFound { .. }), "{error:?}");
    lab.registry.publish("1", &[gzip(&layer("f", 10))]);
    lab.registry.lock().basic = Some("Basic bWU6cHc=".to_owned());
    let error = lab.store.pull("example.com/a:1", &[]).await.unwrap_err();
    assert!(
        matches!(*error, ImageError::Unauthorized { .. }),
        "{error:?}"
    );
    let basic = |password: &str| RegistryAuth::Basic {
        username: "me".to_owned(),
        password: password.to_owned(),
    };
    lab.store
        .pull("example.com/a:1", &[basic("wrong"), basic("pw")])
        .await
        .unwrap();
    let error = lab.store.pull("UPPER", &[]).await.unwrap_err();
    assert_eq!(error.kind(), RuntimeErrorKind::Invalid);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_or_empty_mirror_falls_back_to_the_next_and_clear_answers_win() {
    let lab = lab();
    lab.registry.publish("1", &[gzip(&layer("f", 10))]);
    let empty = Registry::start();
    // A port nobody listens on.
    let closed = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let url = |host: &dyn std::fmt::Display| format!("http://{host}");
    let mirrors = vec![url(&empty.host), url(&closed), url(&lab.registry.host)];
    let config = RegistryConfig {
        mirrors: BTreeMap::from([("*".to_owned(), mirrors)]),
        insecure: Vec::new(),
        only_mirrors: true,
    };
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path(), config).unwrap();
    let status = store.pull("other.org/a:1", &[]).await.unwrap();
    assert_eq!(status.repo_tags, ["other.org/a:1"]);
    let error = store.pull("other.org/a:none", &[]).await.unwrap_err();
    assert!(matches!(*error, ImageError::NotFound { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_nobody_waits_for_stops_and_leaves_nothing() {
    let lab = lab();
    let big = gzip(&layer("f", 100_000));
    let blob = digest_of(&big.0);
    let path = format!("/v2/a/blobs/{blob}");
    lab.registry.publish("1", &[big]);
    lab.registry.fault(path.clone(), Fault::Hold);
    let store = lab.store.clone();
    let pull = tokio::spawn(async move { store.pull("example.com/a:1", &[]).await });
    let registry = lab.registry.clone();
    tokio::task::spawn_blocking(move || registry.wait_for_hit(&blob))
        .await
        .unwrap();
    assert_eq!(lab.leftovers(), 1);
    pull.abort();
    // The unpacking thread ends on its own; wait for its directory to go.
    while lab.leftovers() > 0 {
        tokio::task::yield_now().await;
    }
    // And a store opened after a kill -9 pulls it anew.
    lab.registry.fault(path, Fault::Cut(0));
    let again = ImageStore::open(lab.dir.path(), config(&lab.registry)).unwrap();
    again.pull("example.com/a:1", &[]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exported_image_loads_again_with_the_same_content() {
    let lab = lab();
    let mut base = Tar::default();
    base.dir("d", 0o1777)
        .file("d/f", "one")
        .hardlink("d/g", "d/f")
        .symlink("l", "d/f");
    let mut top = Tar::default();
    top.dir("d", 0o1777)
        .file("d/.wh.f", "")
        .dir("e", 0o755)
        .file("e/.wh..wh..opq", "");
    lab.registry
        .publish("1", &[gzip(&base.finish()), gzip(&top.finish())]);
    lab.store.pull("example.com/a:1", &[]).await.unwrap();
    let archive = lab.dir.path().join("a.tar");
    lab.store.export("example.com/a:1", &archive).await.unwrap();
    let other = tempfile::tempdir().unwrap();
    let store = ImageStore::open(other.path(), RegistryConfig::default()).unwrap();
    let packed = other.path().join("a.tar.gz");
    std::fs::write(&packed, gzip(&std::fs::read(&archive).unwrap()).0).unwrap();
    for archive in [&archive, &packed] {
        let loaded = store.load(archive).await.unwrap();
        assert_eq!(loaded[0].repo_tags, ["example.com/a:1"]);
        assert_eq!(loaded[0].config.entrypoint, ["/run"]);
    }
    let dirs = store.lease("example.com/a:1").unwrap().layers();
    let mode = |p: &str| {
        let meta = std::fs::symlink_metadata(dirs[1].join(p)).unwrap();
        (
            std::os::unix::fs::MetadataExt::mode(&meta),
            std::os::unix::fs::MetadataExt::nlink(&meta),
        )
    };
    assert_eq!(mode("d").0 & 0o7777, 0o1777);
    assert_eq!(mode("d/f").1, 2);
    assert!(
        std::fs::symlink_metadata(dirs[0].join("d/f")).is_ok(),
        "the whiteout"
    );
    assert!(
        xattr::get(dirs[0].join("e"), "trusted.overlay.opaque")
            .unwrap()
            .is_some()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_use_told_is_that_of_the_layers() {
    let lab = lab();
    lab.registry.publish("1", &[gzip(&layer("1", 1000))]);
    lab.store.pull("example.com/a:1", &[]).await.unwrap();
    let usage = lab.store.fs_usage();
    assert!(usage.used_bytes == 1000 && usage.capacity_bytes > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_that_is_none_is_refused_by_name() {
    let lab = lab();
    let path = lab.dir.path().join("junk.tar");
    std::fs::write(&path, "not an archive at all").unwrap();
    let error = lab.store.load(&path).await.unwrap_err();
    assert!(matches!(error, ImageError::Unusable { .. }), "{error:?}");
}
