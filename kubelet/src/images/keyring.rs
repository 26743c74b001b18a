//! Credentials in pull secrets, and which of them fit an image (Kubernetes: images, "Using a
//! private registry", with its wildcard and path rules).

use super::access::{SecretSource, credential_hash};
use base64::Engine as _;
use k8s_openapi::api::core::v1::Secret;
use runtime::service::RegistryAuth;
use serde::Deserialize;
use std::collections::BTreeMap;

/// Credentials of one pod.
#[derive(Debug, Default)]
pub struct Keyring {
    /// Host (with port and path) and credentials; most specific first.
    entries: Vec<(String, Credential)>,
}

/// Credentials, and the secret they are from; none when they are the node's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credential {
    /// What the registry gets.
    pub auth: RegistryAuth,
    /// Where they are from.
    pub source: Option<SecretSource>,
}

impl Credential {
    /// Of the node.
    pub fn of_node(auth: RegistryAuth) -> Self {
        Self { auth, source: None }
    }

    fn of_secret(auth: RegistryAuth, secret: &Secret) -> Self {
        let credential_hash = match &auth {
            RegistryAuth::Basic { username, password } => credential_hash(username, password),
            RegistryAuth::Anonymous | RegistryAuth::Token(_) => String::new(),
        };
        let meta = &secret.metadata;
        let source = SecretSource {
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
            uid: meta.uid.clone().unwrap_or_default(),
            credential_hash,
        };
        Self {
            auth,
            source: Some(source),
        }
    }
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    auth: String,
}

impl Entry {
    fn credentials(self) -> Option<RegistryAuth> {
        if self.auth.is_empty() {
            let (username, password) = (self.username, self.password);
            return Some(RegistryAuth::Basic { username, password });
        }
        // Written by several tools, with and without padding.
        let engine = base64::engine::general_purpose::STANDARD_NO_PAD;
        let decoded = engine.decode(self.auth.trim().trim_end_matches('=')).ok()?;
        let text = String::from_utf8(decoded).ok()?;
        let (username, password) = text.split_once(':')?;
        let password = password.trim_matches('\0').to_owned();
        Some(RegistryAuth::Basic {
            username: username.to_owned(),
            password,
        })
    }
}

const HUB: &str = "index.docker.io";

impl Keyring {
    /// Takes the credentials of secrets of type `dockerconfigjson` and `dockercfg`; others, and
    /// entries that do not parse, are passed over: the registry's refusal tells the rest.
    pub fn new<'a>(secrets: impl Iterator<Item = &'a Secret>) -> Self {
        let mut entries = Vec::new();
        for secret in secrets {
            let data = |key: &str| secret.data.as_ref().and_then(|d| d.get(key)).map(|b| &b.0);
            let found = if let Some(json) = data(".dockerconfigjson") {
                serde_json::from_slice::<DockerConfig>(json).map(|c| c.auths)
            } else if let Some(json) = data(".dockercfg") {
                serde_json::from_slice(json)
            } else {
                continue;
            };
            match found {
                Ok(found) => entries.extend(found.into_iter().filter_map(|(location, entry)| {
                    let auth = entry.credentials()?;
                    Some((key(&location), Credential::of_secret(auth, secret)))
                })),
                Err(error) => {
                    let name = secret.metadata.name.as_deref().unwrap_or_default();
                    tracing::warn!(secret = name, %error, "pull secret does not parse");
                }
            }
        }
        Self::sorted(entries)
    }

    /// Takes locations with their credentials as they are.
    pub fn of(entries: impl Iterator<Item = (String, RegistryAuth)>) -> Self {
        let entries = entries.map(|(at, auth)| (key(&at), Credential::of_node(auth)));
        Self::sorted(entries.collect())
    }

    fn sorted(mut entries: Vec<(String, Credential)>) -> Self {
        // The longer of two that fit must come first.
        entries.sort_by(|(a, _), (b, _)| b.cmp(a));
        Self { entries }
    }

    /// Credentials to try for `repository` (`host/path`), in order; none is anonymous.
    pub fn lookup(&self, repository: &str) -> Vec<Credential> {
        let mut fitting: Vec<Credential> = self
            .entries
            .iter()
            .filter(|(key, _)| fits(key, repository))
            .map(|(_, credentials)| credentials.clone())
            .collect();
        if fitting.is_empty() && repository.starts_with("docker.io/") {
            let hub = self
                .entries
                .iter()
                .filter(|(key, _)| key.split('/').next() == Some(HUB));
            fitting = hub.map(|(_, credentials)| credentials.clone()).collect();
        }
        fitting
    }
}

/// `https://host:port/v1/path` → `host:port/path`.
fn key(location: &str) -> String {
    let bare = location
        .split_once("://")
        .map_or(location, |(_, rest)| rest);
    let (host, path) = bare.split_once('/').unwrap_or((bare, ""));
    let path = path
        .strip_prefix("v1/")
        .or_else(|| path.strip_prefix("v2/"))
        .unwrap_or(path);
    match path.is_empty() {
        true => host.to_owned(),
        false => format!("{host}/{path}"),
    }
}

/// Whether credentials for `key` are meant for `repository`: equal ports, as many labels of the
/// host each matching (`*` within a label), the path a prefix.
pub(super) fn fits(key: &str, repository: &str) -> bool {
    let split = |text: &str| {
        let (host, path) = text.split_once('/').unwrap_or((text, ""));
        let (host, port) = host.split_once(':').unwrap_or((host, ""));
        (host.to_owned(), port.to_owned(), path.to_owned())
    };
    let ((host, port, path), (their_host, their_port, their_path)) =
        (split(key), split(repository));
    let (labels, theirs): (Vec<&str>, Vec<&str>) =
        (host.split('.').collect(), their_host.split('.').collect());
    port == their_port
        && their_path.starts_with(&path)
        && labels.len() == theirs.len()
        && labels
            .iter()
            .zip(theirs)
            .all(|(glob, label)| glob_fits(glob, label))
}

/// `*` for any run, `?` for one character.
fn glob_fits(glob: &str, text: &str) -> bool {
    match glob.chars().next() {
        None => text.is_empty(),
        Some('*') => {
            let ends = text.char_indices().map(|(i, _)| i).chain([text.len()]);
            ends.into_iter().any(|i| glob_fits(&glob[1..], &text[i..]))
        }
        Some(wanted) => {
            let mut rest = text.chars();
            let found = rest.next();
            (found == Some(wanted) || (wanted == '?' && found.is_some()))
                && glob_fits(&glob[wanted.len_utf8()..], rest.as_str())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::ByteString;

    fn keyring(key: &str, json: &str) -> Keyring {
        let data = BTreeMap::from([(key.to_owned(), ByteString(json.as_bytes().to_vec()))]);
        let secret = Secret {
            data: Some(data),
            ..Secret::default()
        };
        Keyring::new([secret].iter())
    }

    fn users(keyring: &Keyring, repository: &str) -> Vec<String> {
        let of = |c: Credential| match c.auth {
            RegistryAuth::Basic { username, password } => format!("{username}:{password}"),
            RegistryAuth::Anonymous | RegistryAuth::Token(_) => String::new(),
        };
        keyring.lookup(repository).into_iter().map(of).collect()
    }

    #[test]
    fn the_most_specific_entry_comes_first_and_wildcards_count_labels() {
        let ring = keyring(
            ".dockerconfigjson",
            r#"{"auths": {
                "quay.io": {"username": "host", "password": "1"},
                "https://quay.io/coreos": {"username": "path", "password": "2"},
                "*.example.com:5000": {"auth": "Z2xvYjoz"},
                "https://index.docker.io/v1/": {"username": "hub", "password": "4"},
                "broken": {"auth": "%%%"}}}"#,
        );
        assert_eq!(users(&ring, "quay.io/coreos/etcd"), ["path:2", "host:1"]);
        assert_eq!(users(&ring, "quay.io/other"), ["host:1"]);
        assert_eq!(users(&ring, "a.example.com:5000/x"), ["glob:3"]);
        assert!(users(&ring, "a.example.com/x").is_empty());
        assert!(users(&ring, "a.b.example.com:5000/x").is_empty());
        assert_eq!(users(&ring, "docker.io/library/busybox"), ["hub:4"]);
        assert!(users(&ring, "gcr.io/x").is_empty());
    }

    #[test]
    fn the_old_secret_type_and_broken_ones_are_read() {
        let ring = keyring(".dockercfg", r#"{"r.io": {"auth": "YTpiOmM="}}"#);
        assert_eq!(users(&ring, "r.io/x"), ["a:b:c"]);
        assert!(users(&keyring(".dockerconfigjson", "{"), "r.io/x").is_empty());
        assert!(
            !format!("{ring:?}").contains("b:c"),
            "secrets are never printed"
        );
    }
}
