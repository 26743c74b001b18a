//! Just enough of the distribution API over plain HTTP to push an image.

use super::layout::{Blob, Image, digest};
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// A registry at `host:port`.
#[derive(Debug)]
pub(super) struct Registry {
    host: String,
}

/// Status and headers; bodies of answers are only shown in errors.
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: String,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, v)| v.as_str())
    }

    fn expect(self, status: u16, what: &str) -> Result<Self> {
        if self.status != status {
            bail!(
                "{what}: the registry answered {}: {}",
                self.status,
                self.body.trim()
            );
        }
        Ok(self)
    }
}

impl Registry {
    pub(super) fn new(host: &str) -> Self {
        Self {
            host: host.to_owned(),
        }
    }

    /// Pushes the image unless the tag is it already.
    pub(super) fn ensure(&self, repository: &str, tag: &str, image: &Image) -> Result<()> {
        let path = format!("/v2/{repository}/manifests/{tag}");
        let there = self.request("HEAD", &path, &[ACCEPT], Box::new(std::io::empty()), 0)?;
        let wanted = digest(&image.manifest);
        if there.status == 200 && there.header("Docker-Content-Digest") == Some(wanted.as_str()) {
            return Ok(());
        }
        for layer in &image.layers {
            self.layer(repository, layer)?;
        }
        let config = image.config.clone();
        let size = config.len() as u64;
        self.blob(repository, &digest(&image.config), size, || {
            Ok(Box::new(Cursor::new(config)))
        })?;
        let manifest = image.manifest.clone();
        let size = manifest.len() as u64;
        let body = Box::new(Cursor::new(manifest));
        self.request("PUT", &path, &[CONTENT_MANIFEST], body, size)?
            .expect(201, "put manifest")?;
        Ok(())
    }

    fn layer(&self, repository: &str, layer: &Blob) -> Result<()> {
        self.blob(repository, &layer.digest, layer.size, || {
            let file = File::open(&layer.path)
                .with_context(|| format!("open {}", layer.path.display()))?;
            Ok(Box::new(file))
        })
    }

    fn blob(
        &self,
        repository: &str,
        digest: &str,
        size: u64,
        open: impl FnOnce() -> Result<Box<dyn Read>>,
    ) -> Result<()> {
        let path = format!("/v2/{repository}/blobs/{digest}");
        let none = || Box::new(std::io::empty());
        if self.request("HEAD", &path, &[], none(), 0)?.status == 200 {
            return Ok(());
        }
        let start = format!("/v2/{repository}/blobs/uploads/");
        let answer = self
            .request("POST", &start, &[], none(), 0)?
            .expect(202, "start upload")?;
        let location = answer
            .header("Location")
            .context("upload without a location")?;
        let location = match location.split_once("://") {
            Some((_, rest)) => rest.find('/').map_or("/", |slash| &rest[slash..]),
            None => location,
        };
        let mark = if location.contains('?') { '&' } else { '?' };
        let target = format!("{location}{mark}digest={digest}");
        let kind = ("Content-Type", "application/octet-stream");
        self.request("PUT", &target, &[kind], open()?, size)?
            .expect(201, "upload blob")?;
        Ok(())
    }

    fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        mut body: Box<dyn Read>,
        size: u64,
    ) -> Result<Answer> {
        let what = || format!("{method} http://{}{path}", self.host);
        let mut stream = TcpStream::connect(&self.host).with_context(what)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\n", self.host);
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str(&format!(
            "Content-Length: {size}\r\nConnection: close\r\n\r\n"
        ));
        stream.write_all(head.as_bytes()).with_context(what)?;
        std::io::copy(&mut body, &mut stream).with_context(what)?;
        read_answer(stream).with_context(what)
    }
}

fn read_answer(stream: TcpStream) -> Result<Answer> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|s| s.parse().ok());
    let status = status.with_context(|| format!("no HTTP answer: {line:?}"))?;
    let mut headers = Vec::new();
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 || line.trim_end().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':') {
            headers.push((name.trim().to_owned(), value.trim().to_owned()));
        }
    }
    let mut body = Vec::new();
    reader.take(MAX_BODY).read_to_end(&mut body)?;
    Ok(Answer {
        status,
        headers,
        body: String::from_utf8_lossy(&body).into_owned(),
    })
}

/// Registry and disk are local; a large blob's hash takes a while.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bodies are error texts.
const MAX_BODY: u64 = 64 << 10;
const ACCEPT: (&str, &str) = ("Accept", "application/vnd.oci.image.manifest.v1+json");
const CONTENT_MANIFEST: (&str, &str) =
    ("Content-Type", "application/vnd.oci.image.manifest.v1+json");
