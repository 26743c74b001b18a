//! `/logs/`: files below `/var/log`, for `kubectl get --raw …/proxy/logs/`. Read-only, and nothing
//! outside the directory can be named: paths are resolved as if it were the root (openat2).

use super::routes::{Body, stream_body, text};
use bytes::Bytes;
use hyper::body::Frame;
use hyper::header::{CONTENT_TYPE, HeaderValue, LOCATION};
use hyper::{Response, StatusCode};
use linux::fs::{list_dir, open_dir, open_in_root};
use rustix::fs::{FileType, Mode, OFlags};
use std::fmt::Write;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use tokio::io::AsyncReadExt;

/// Entries listed of one directory.
const MAX_ENTRIES: usize = 10_000;
/// Read at a time.
const CHUNK: usize = 32 << 10;

/// What a path leads to.
enum Found {
    Directory(Vec<(String, bool)>),
    File(std::fs::File, u64),
}

/// Answers for `path`, which is what follows `/logs/` in a request for `asked`.
pub(super) async fn answer(root: &'static str, asked: &str, path: String) -> Response<Body> {
    let looked_up = path.clone();
    let found = tokio::task::spawn_blocking(move || look(Path::new(root), &looked_up)).await;
    match found {
        // Relative names in the listing need the slash.
        Ok(Ok(Found::Directory(_))) if !path.is_empty() && !path.ends_with('/') => {
            let last = asked.rsplit('/').next().unwrap_or_default();
            let mut response = text(StatusCode::MOVED_PERMANENTLY, "");
            if let Ok(location) = HeaderValue::from_str(&format!("{last}/")) {
                response.headers_mut().insert(LOCATION, location);
            }
            response
        }
        Ok(Ok(Found::Directory(entries))) => html(&listing(&entries)),
        Ok(Ok(Found::File(file, size))) => send(file, size),
        Ok(Err(error)) if error.kind() == io::ErrorKind::PermissionDenied => {
            text(StatusCode::FORBIDDEN, "403 Forbidden\n")
        }
        // What is not there, leads out, or is no file.
        Ok(Err(_)) => text(StatusCode::NOT_FOUND, "404 page not found\n"),
        Err(_) => text(
            StatusCode::INTERNAL_SERVER_ERROR,
            "500 Internal Server Error\n",
        ),
    }
}

fn look(root: &Path, path: &str) -> io::Result<Found> {
    let refused = || io::Error::from(io::ErrorKind::NotFound);
    let dir = open_dir(root).map_err(|_| refused())?;
    let relative = if path.is_empty() { "." } else { path };
    if path.contains('\0') || path.split('/').any(|part| part == "..") {
        return Err(refused());
    }
    // A fifo must not hang us.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = open_in_root(dir.as_fd(), Path::new(relative), flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&fd)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let size = u64::try_from(stat.st_size).unwrap_or(0);
            Ok(Found::File(std::fs::File::from(fd), size))
        }
        FileType::Directory => {
            let opened = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
            let names = list_dir(Path::new(&opened)).map_err(|_| refused())?;
            let mut entries: Vec<(String, bool)> = names
                .into_iter()
                .take(MAX_ENTRIES)
                .map(|name| {
                    let is_dir =
                        std::fs::metadata(Path::new(&opened).join(&name)).is_ok_and(|m| m.is_dir());
                    (name.to_string_lossy().into_owned(), is_dir)
                })
                .collect();
            entries.sort();
            Ok(Found::Directory(entries))
        }
        _ => Err(refused()),
    }
}

/// A page of links, as Go's file server makes them.
fn listing(entries: &[(String, bool)]) -> String {
    let mut page =
        "<!doctype html>\n<meta name=\"viewport\" content=\"width=device-width\">\n<pre>\n"
            .to_owned();
    for (name, is_dir) in entries {
        let slash = if *is_dir { "/" } else { "" };
        let shown = format!("{name}{slash}")
            .replace('&', "&amp;")
            .replace('<', "&lt;")
            .replace('>', "&gt;")
            .replace('"', "&#34;");
        let mut link = String::new();
        for byte in name.bytes() {
            if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
                link.push(byte.into());
            } else {
                let _ = write!(link, "%{byte:02X}");
            }
        }
        let _ = writeln!(page, "<a href=\"{link}{slash}\">{shown}</a>");
    }
    page + "</pre>\n"
}

fn html(page: &str) -> Response<Body> {
    let mut response = text(StatusCode::OK, page);
    let html = HeaderValue::from_static("text/html; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, html);
    response
}

/// Sends a file as long as it was when it was opened. Dropped with the connection.
fn send(file: std::fs::File, size: u64) -> Response<Body> {
    let file = tokio::fs::File::from_std(file).take(size);
    let chunks = futures::stream::unfold(file, |mut file| async move {
        let mut buffer = vec![0; CHUNK];
        match file.read(&mut buffer).await {
            Ok(0) => None,
            Ok(length) => {
                buffer.truncate(length);
                Some((Ok(Frame::data(Bytes::from(buffer))), file))
            }
            Err(error) => {
                tracing::warn!(%error, "Reading a log of the node failed");
                None
            }
        }
    });
    let mut response = Response::new(stream_body(chunks));
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, plain);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_outside_the_directory_can_be_named() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("log");
        std::fs::create_dir_all(root.join("sub dir")).unwrap();
        std::fs::write(root.join("kern.log"), "line\n").unwrap();
        std::fs::write(dir.path().join("secret"), "x").unwrap();
        std::os::unix::fs::symlink(dir.path().join("secret"), root.join("out")).unwrap();
        std::os::unix::fs::symlink("kern.log", root.join("in")).unwrap();
        for path in ["../secret", "sub dir/../../secret", "out", "none", "a\0b"] {
            assert!(look(&root, path).is_err(), "{path}");
        }
        assert!(matches!(look(&root, "in"), Ok(Found::File(_, 5))));
        let Ok(Found::Directory(entries)) = look(&root, "") else {
            panic!("no directory");
        };
        let page = listing(&entries);
        assert!(
            page.contains("<a href=\"sub%20dir/\">sub dir/</a>\n"),
            "{page}"
        );
        assert!(
            page.contains("<a href=\"kern.log\">kern.log</a>\n"),
            "{page}"
        );
    }
}
