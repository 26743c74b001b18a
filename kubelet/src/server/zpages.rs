//! `/statusz` and `/flagz`: what runs here and how it was started, for people (KEP-4827, 4828).

use super::routes::{Body, json, text};
use crate::node::object::KUBELET_VERSION;
use hyper::header::{ACCEPT, HeaderMap};
use hyper::{Response, StatusCode};
use jiff::Timestamp;
use serde_json::json as value;
use std::fmt::Write;

/// Roots of all paths served.
const PATHS: [&str; 13] = [
    "/attach",
    "/configz",
    "/containerLogs",
    "/debug",
    "/exec",
    "/flagz",
    "/healthz",
    "/logs",
    "/metrics",
    "/pods",
    "/portForward",
    "/runningpods",
    "/stats",
];

/// The version a client asks for in `Accept: application/json;as=Statusz;v=…;g=config.k8s.io`.
fn structured<'a>(headers: &'a HeaderMap, kind: &str) -> Option<&'a str> {
    let accept = headers.get(ACCEPT)?.to_str().ok()?;
    accept.split(',').find_map(|one| {
        let mut words = one.split(';').map(str::trim);
        let json = words.next() == Some("application/json");
        let of = |name: &str| {
            one.split(';')
                .find_map(|w| w.trim().strip_prefix(name)?.strip_prefix('='))
        };
        let fits = json && of("as") == Some(kind) && of("g") == Some("config.k8s.io");
        of("v").filter(|v| fits && matches!(*v, "v1alpha1" | "v1beta1"))
    })
}

fn heading(name: &str) -> String {
    format!("\nkubelet {name}\nWarning: for people who debug, not for programs; it may change.\n\n")
}

/// Answers `/statusz`; `started` is when the agent was.
pub(super) fn statusz(headers: &HeaderMap, started: Timestamp) -> Response<Body> {
    let up = (Timestamp::now().as_second() - started.as_second()).max(0);
    let started = Timestamp::from_second(started.as_second()).unwrap_or_default();
    if let Some(version) = structured(headers, "Statusz") {
        return json(&value!({
            "kind": "Statusz", "apiVersion": format!("config.k8s.io/{version}"),
            "metadata": {"name": "kubelet"},
            "startTime": started.to_string(), "uptimeSeconds": up,
            "binaryVersion": KUBELET_VERSION, "paths": PATHS,
        }));
    }
    let mut page = heading("statusz");
    let _ = write!(
        page,
        "Started: {started}\nUp: {} hr {:02} min {:02} sec\nBinary version: {KUBELET_VERSION}\n\
         Paths: {}\n",
        up / 3600,
        up / 60 % 60,
        up % 60,
        PATHS.join(" ")
    );
    text(StatusCode::OK, page)
}

/// Answers `/flagz` with the flags given on the command line (none of ours holds a secret).
pub(super) fn flagz(headers: &HeaderMap) -> Response<Body> {
    let flags = flags(std::env::args().skip(1));
    if let Some(version) = structured(headers, "Flagz") {
        let flags: serde_json::Map<_, _> = flags
            .into_iter()
            .map(|(k, v)| (k, serde_json::Value::String(v)))
            .collect();
        return json(&value!({
            "kind": "Flagz", "apiVersion": format!("config.k8s.io/{version}"),
            "metadata": {"name": "kubelet"}, "flags": flags,
        }));
    }
    let mut page = heading("flagz");
    for (name, given) in flags {
        let _ = writeln!(page, "{name}={given}");
    }
    text(StatusCode::OK, page)
}

/// Flags by name, whichever way their values were given.
fn flags(words: impl Iterator<Item = String>) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    let mut open = false;
    for word in words {
        if let Some(flag) = word.strip_prefix("--") {
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, value),
                None => (flag, "true"),
            };
            open = !flag.contains('=');
            found.push((name.to_owned(), value.to_owned()));
        } else if std::mem::take(&mut open)
            && let Some(last) = found.last_mut()
        {
            last.1 = word;
        }
    }
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;

    #[test]
    fn flags_are_read_in_both_spellings() {
        let words = ["--v=4", "--config", "/etc/k.yaml", "--no-x", "--a", "b"];
        let found = flags(words.iter().map(|w| (*w).to_owned()));
        let shown: Vec<_> = found.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(shown, ["a=b", "config=/etc/k.yaml", "no-x=true", "v=4"]);
    }

    #[test]
    fn json_is_for_those_who_name_the_kind() {
        let mut headers = HeaderMap::new();
        let asks = |headers: &HeaderMap| structured(headers, "Statusz").map(str::to_owned);
        assert_eq!(asks(&headers), None);
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        assert_eq!(asks(&headers), None);
        let full = "text/x, application/json;as=Statusz;v=v1beta1;g=config.k8s.io";
        headers.insert(ACCEPT, HeaderValue::from_static(full));
        assert_eq!(asks(&headers).as_deref(), Some("v1beta1"));
    }
}
