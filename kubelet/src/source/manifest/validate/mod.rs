//! Refusals of the apiserver that a static pod would otherwise never meet
//! (`pkg/apis/core/validation`): each names its field in the apiserver's words. What only makes
//! sense on a server (scheduling, affinity) or is refused again by the launch itself is left out.
//! Pure.

mod container;
mod spec;

use super::fields::{object, text};
use serde_json::Value;
use std::fmt::Display;

/// All problems of a complete pod, in the order of its fields.
pub(super) fn problems(pod: &Value) -> Vec<String> {
    let mut found = Problems::default();
    metadata(pod, &mut found);
    let path = Path::root("spec");
    if let Some(spec) = pod.get("spec") {
        spec::check(spec, &path, &mut found);
    }
    found.0
}

fn metadata(pod: &Value, found: &mut Problems) {
    let Some(metadata) = pod.get("metadata") else {
        return;
    };
    let path = Path::root("metadata");
    let name = text(metadata, "name");
    if !is_subdomain(name) {
        found.invalid(&path.child("name"), name, SUBDOMAIN);
    }
    let namespace = text(metadata, "namespace");
    if !is_label(namespace) {
        found.invalid(&path.child("namespace"), namespace, LABEL);
    }
    labels(metadata, "labels", &path, found);
    for key in object(metadata, "annotations")
        .into_iter()
        .flat_map(|m| m.keys())
    {
        if !is_qualified(&key.to_lowercase()) {
            found.invalid(&path.child("annotations"), key, QUALIFIED);
        }
    }
}

/// A map of labels: keys are qualified names, values short words.
fn labels(parent: &Value, key: &str, path: &Path, found: &mut Problems) {
    for (name, value) in object(parent, key).into_iter().flatten() {
        let value = value.as_str().unwrap_or_default();
        if !is_qualified(name) {
            found.invalid(&path.child(key), name, QUALIFIED);
        }
        if !is_label_value(value) {
            found.invalid(&path.child(key), value, LABEL_VALUE);
        }
    }
}

const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters \
    or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', \
    regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric \
    characters, '-' or '.', and must start and end with an alphanumeric character (e.g. \
    'example.com', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const QUALIFIED: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and \
    must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or \
    '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const LABEL_VALUE: &str = "a valid label must be an empty string or consist of alphanumeric \
    characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. \
    'MyValue',  or 'my_value',  or '12345', regex used for validation is \
    '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";

fn is_label(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(inner)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

fn is_subdomain(name: &str) -> bool {
    let part = |p: &str| {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        !p.is_empty() && p.bytes().all(inner) && !p.starts_with('-') && !p.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(part)
}

/// Letters, digits, `-`, `_` and `.`, with a letter or digit at both ends.
fn is_word(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let end = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    bytes.len() <= 63 && bytes.iter().copied().all(inner) && end(bytes.first()) && end(bytes.last())
}

fn is_label_value(text: &str) -> bool {
    text.is_empty() || is_word(text)
}

/// `name` or `prefix/name`.
fn is_qualified(key: &str) -> bool {
    match key.split_once('/') {
        None => is_word(key),
        Some((prefix, name)) => is_subdomain(prefix) && is_word(name),
    }
}

/// Where in the pod: `spec.containers[0].image`.
#[derive(Debug, Clone)]
struct Path(String);

impl Path {
    fn root(name: &str) -> Self {
        Self(name.to_owned())
    }

    fn child(&self, name: &str) -> Self {
        Self(format!("{}.{name}", self.0))
    }

    fn index(&self, index: usize) -> Self {
        Self(format!("{}[{index}]", self.0))
    }

    fn key(&self, key: &str) -> Self {
        Self(format!("{}[{key}]", self.0))
    }
}

/// The messages so far, worded as Go's `field.Error`.
#[derive(Debug, Default)]
struct Problems(Vec<String>);

impl Problems {
    fn required(&mut self, path: &Path, why: &str) {
        let why = if why.is_empty() {
            String::new()
        } else {
            format!(": {why}")
        };
        self.0.push(format!("{}: Required value{why}", path.0));
    }

    fn invalid(&mut self, path: &Path, value: &str, why: &str) {
        self.0
            .push(format!("{}: Invalid value: {value:?}: {why}", path.0));
    }

    fn number(&mut self, path: &Path, value: impl Display, why: &str) {
        self.0
            .push(format!("{}: Invalid value: {value}: {why}", path.0));
    }

    fn duplicate(&mut self, path: &Path, value: &str) {
        self.0
            .push(format!("{}: Duplicate value: {value:?}", path.0));
    }

    fn not_found(&mut self, path: &Path, value: &str) {
        self.0.push(format!("{}: Not found: {value:?}", path.0));
    }

    fn forbidden(&mut self, path: &Path, why: &str) {
        self.0.push(format!("{}: Forbidden: {why}", path.0));
    }

    /// A word that is not one of those allowed.
    fn word(&mut self, object: &Value, key: &str, path: &Path, allowed: &[&str]) {
        let found = text(object, key);
        if allowed.contains(&found) {
            return;
        }
        if found.is_empty() {
            return self.required(&path.child(key), "");
        }
        let list: Vec<String> = allowed
            .iter()
            .filter(|w| !w.is_empty())
            .map(|w| format!("{w:?}"))
            .collect();
        self.0.push(format!(
            "{}: Unsupported value: {found:?}: supported values: {}",
            path.child(key).0,
            list.join(", ")
        ));
    }

    /// A number that must not be negative.
    fn natural(&mut self, object: &Value, key: &str, path: &Path) {
        let number = object.get(key).and_then(Value::as_i64);
        if let Some(number) = number.filter(|n| *n < 0) {
            let why = "must be greater than or equal to 0";
            self.number(&path.child(key), number, why);
        }
    }

    /// A port number; absent is fine.
    fn port(&mut self, object: &Value, key: &str, path: &Path) {
        let number = object.get(key).and_then(Value::as_i64);
        if let Some(number) = number.filter(|n| !(1..=65535).contains(n)) {
            self.number(
                &path.child(key),
                number,
                "must be between 1 and 65535, inclusive",
            );
        }
    }

    /// A DNS label.
    fn label(&mut self, path: &Path, name: &str) {
        if name.is_empty() {
            self.required(path, "");
        } else if !is_label(name) {
            self.invalid(path, name, LABEL);
        }
    }

    /// A relative path that stays below its root.
    fn descending(&mut self, path: &Path, text: &str) {
        if text.starts_with('/') {
            self.invalid(path, text, "must be a relative path");
        }
        if text.split('/').any(|part| part == "..") {
            self.invalid(path, text, "must not contain '..'");
        }
    }
}
