//! Which pods may use an image that is on the node already (KEP-2535): one that was pulled with
//! credentials is had only by pods that have them too. Others have to ask the registry.
//!
//! ```text
//!  pull begins ──▶ intent on disk ──▶ image stored ──▶ record on disk, intent removed
//! ```
//! An agent killed in between leaves the intent: what it named counts as pulled by nobody known,
//! so that credentials are asked for. Records and files are those of the stock kubelet, in
//! `<root-dir>/image_manager`: a node that changes from one to the other stays as strict.

use linux::fs::Durability;
use runtime::service::ImageStatus;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tracing::warn;

/// No record is longer: an image is used with at most [`MAX_MATCHES`] secrets of a pod each.
const MAX_BYTES: usize = 1 << 20;
/// So many secrets are remembered for an image beyond those it was pulled with.
const MAX_MATCHES: usize = 100;
const API_VERSION: &str = "kubelet.config.k8s.io/v1beta1";

/// When credentials are asked for (`imagePullCredentialsVerificationPolicy`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Verification {
    /// Never.
    Never,
    /// For images a kubelet pulled.
    #[default]
    UnlessPreloaded,
    /// For all but these: names without tag, or prefixes that end in `/`.
    UnlessListed(Vec<String>),
    /// Always.
    Always,
}

/// A pull secret, and which credentials it held. Never the credentials.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretSource {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
    /// SHA-256 of the credentials.
    pub credential_hash: String,
}

impl SecretSource {
    /// Whether it is the same object, whatever it holds.
    fn is_same(&self, other: &Self) -> bool {
        (&self.namespace, &self.name, &self.uid) == (&other.namespace, &other.name, &other.uid)
    }
}

/// Who may use an image under one name.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Credentials {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    kubernetes_secrets: Vec<SecretSource>,
    /// Written by the stock kubelet for credential providers; kept, and matched by nobody here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    kubernetes_service_accounts: Vec<serde_json::Value>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    node_pods_accessible: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Pulled {
    kind: String,
    api_version: String,
    last_updated_time: String,
    image_ref: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    credential_mapping: BTreeMap<String, Credentials>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Intent {
    kind: String,
    api_version: String,
    image: String,
}

/// What an image was pulled with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PulledWith {
    /// No credentials, or those of the node: every pod may use it.
    Node,
    /// A secret.
    Secret(SecretSource),
    /// Nobody knows.
    Unknown,
}

#[derive(Debug, Default)]
struct State {
    pulled: BTreeMap<String, Pulled>,
    intents: BTreeMap<String, usize>,
}

/// Records of pulls. One per agent.
#[derive(Debug)]
pub struct Access {
    dir: PathBuf,
    policy: Verification,
    state: Mutex<State>,
}

/// Whether a pod may use an image that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    May,
    /// It may, and this secret is to be remembered.
    MayWith(SecretSource),
    MustAsk,
}

impl Access {
    /// Reads what agents before left below the kubelet's root directory. `stored` are the images
    /// there are. Blocking; for the start of the agent.
    pub fn open(root: &Path, policy: Verification, stored: &[ImageStatus]) -> Self {
        let this = Self {
            dir: root.join("image_manager"),
            policy,
            state: Mutex::default(),
        };
        for sub in [PULLED, PULLING] {
            if let Err(error) = linux::fs::create_dirs(&this.dir.join(sub), 0o700) {
                warn!(%error, "Records of pulls cannot be kept");
            }
        }
        let records = read_all::<Pulled>(&this.dir.join(PULLED));
        this.lock().pulled = records
            .into_iter()
            .map(|r| (r.image_ref.clone(), r))
            .collect();
        let left: Vec<Intent> = read_all(&this.dir.join(PULLING));
        for intent in left {
            let names = |s: &&ImageStatus| {
                let mut names = s.repo_tags.iter().chain(&s.repo_digests);
                names.any(|name| *name == intent.image || name_of(name) == name_of(&intent.image))
            };
            for image in stored.iter().filter(names) {
                this.note(&intent.image, &image.id.0, PulledWith::Unknown);
            }
            this.remove(PULLING, &intent.image);
        }
        this
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a pull of `image` begins, before it does.
    pub fn begin(&self, image: &str) -> Pulling<'_> {
        let mut state = self.lock();
        let intents = state.intents.entry(image.to_owned()).or_default();
        *intents += 1;
        if *intents == 1 {
            let intent = Intent {
                kind: "ImagePullIntent".to_owned(),
                api_version: API_VERSION.to_owned(),
                image: image.to_owned(),
            };
            self.write(PULLING, image, &intent);
        }
        Pulling {
            access: self,
            image: image.to_owned(),
            over: false,
        }
    }

    /// Whether a pod with these pull secrets (those that fit the image) may use an image that is
    /// there without asking the registry.
    pub fn may_use(
        &self,
        image: &str,
        id: &str,
        secrets: impl FnOnce() -> Vec<SecretSource>,
    ) -> bool {
        let verdict = {
            let state = self.lock();
            let record = state.pulled.get(id);
            let known = record.is_some() || state.intents.contains_key(image);
            if !required(&self.policy, image, known) {
                return true;
            }
            let of_name = record.and_then(|r| r.credential_mapping.get(name_of(image)));
            match of_name {
                None => Verdict::MustAsk,
                Some(c) if c.node_pods_accessible => Verdict::May,
                Some(credentials) => decide(credentials, &secrets()),
            }
        };
        match verdict {
            Verdict::May => true,
            Verdict::MustAsk => false,
            Verdict::MayWith(secret) => {
                self.note(image, id, PulledWith::Secret(secret));
                true
            }
        }
    }

    /// Notes what an image was pulled with.
    fn note(&self, image: &str, id: &str, with: PulledWith) {
        let mut state = self.lock();
        let fresh = || Pulled {
            kind: "ImagePulledRecord".to_owned(),
            api_version: API_VERSION.to_owned(),
            last_updated_time: String::new(),
            image_ref: id.to_owned(),
            credential_mapping: BTreeMap::new(),
        };
        let before = state.pulled.get(id);
        let mut record = before.cloned().unwrap_or_else(fresh);
        merge(&mut record, name_of(image), with);
        if before == Some(&record) {
            return;
        }
        let now = jiff::Timestamp::now();
        record.last_updated_time = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        self.write(PULLED, id, &record);
        state.pulled.insert(id.to_owned(), record);
    }

    /// Forgets images that are not there any more. `stored` is asked while nothing changes.
    pub fn prune(&self, stored: impl FnOnce() -> Vec<ImageStatus>) {
        let mut state = self.lock();
        let there: BTreeSet<String> = stored().into_iter().map(|i| i.id.0).collect();
        state.pulled.retain(|id, _| {
            let keep = there.contains(id);
            if !keep {
                self.remove(PULLED, id);
            }
            keep
        });
    }

    fn write(&self, sub: &str, key: &str, record: &impl Serialize) {
        let Ok(content) = serde_json::to_vec(record) else {
            // Strings are always JSON.
            return;
        };
        let path = self.dir.join(sub).join(file_name(key));
        let written = linux::fs::write_atomic(&path, &content, 0o600, Durability::Process);
        if let Err(error) = written {
            warn!(%error, "Record of a pull not written");
        }
    }

    fn remove(&self, sub: &str, key: &str) {
        let path = self.dir.join(sub).join(file_name(key));
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                warn!(path = %path.display(), %error, "Record of a pull not removed");
            }
            Ok(()) | Err(_) => {}
        }
    }
}

const PULLED: &str = "pulled";
const PULLING: &str = "pulling";

/// A pull under way. See [`Access::begin`].
#[derive(Debug)]
pub struct Pulling<'a> {
    access: &'a Access,
    image: String,
    over: bool,
}

impl Pulling<'_> {
    /// The image is there.
    pub fn done(mut self, id: &str, with: PulledWith) {
        self.access.note(&self.image, id, with);
        self.over = true;
    }

    /// The image did not come.
    pub fn failed(mut self) {
        self.over = true;
    }
}

impl Drop for Pulling<'_> {
    /// Nobody may wait any more for a download that goes on: the intent stays then, and what
    /// comes is had by nobody without credentials.
    fn drop(&mut self) {
        if !self.over {
            return;
        }
        let mut state = self.access.lock();
        let Some(intents) = state.intents.get_mut(&self.image) else {
            return;
        };
        *intents -= 1;
        if *intents == 0 {
            state.intents.remove(&self.image);
            self.access.remove(PULLING, &self.image);
        }
    }
}

/// Whether the policy asks for credentials at all.
fn required(policy: &Verification, image: &str, pulled_by_kubelet: bool) -> bool {
    match policy {
        Verification::Never => false,
        Verification::UnlessPreloaded => pulled_by_kubelet,
        Verification::UnlessListed(list) => {
            let name = name_of(image);
            !list.iter().any(|listed| match listed.strip_suffix('*') {
                Some(prefix) => name.starts_with(prefix),
                None => name == listed,
            })
        }
        Verification::Always => true,
    }
}

/// Compares a pod's secrets with those an image was had with: equal credentials are enough, and
/// so is the same secret with newer ones.
fn decide(credentials: &Credentials, secrets: &[SecretSource]) -> Verdict {
    let known = &credentials.kubernetes_secrets;
    for secret in secrets {
        for before in known {
            let equal = !before.credential_hash.is_empty()
                && before.credential_hash == secret.credential_hash;
            if equal && before.is_same(secret) {
                return Verdict::May;
            }
            if equal || before.is_same(secret) {
                return if known.len() < MAX_MATCHES {
                    Verdict::MayWith(secret.clone())
                } else if equal {
                    Verdict::May
                } else {
                    continue;
                };
            }
        }
    }
    Verdict::MustAsk
}

/// Adds a way to use an image; the widest one stays.
fn merge(record: &mut Pulled, name: &str, with: PulledWith) {
    let secret = match with {
        PulledWith::Unknown => return,
        PulledWith::Node => None,
        PulledWith::Secret(secret) => Some(secret),
    };
    let own = record
        .credential_mapping
        .entry(name.to_owned())
        .or_default();
    let Some(secret) = secret else {
        *own = Credentials {
            node_pods_accessible: true,
            ..Credentials::default()
        };
        return;
    };
    if own.node_pods_accessible {
        return;
    }
    own.kubernetes_secrets.retain(|s| !s.is_same(&secret));
    own.kubernetes_secrets.push(secret);
    own.kubernetes_secrets.sort();
}

/// An image's name as the user wrote it, without tag and digest.
fn name_of(image: &str) -> &str {
    let bare = image.split_once('@').map_or(image, |(name, _)| name);
    match bare.rsplit_once(':') {
        // A colon before a slash belongs to the port.
        Some((name, tag)) if !tag.contains('/') => name,
        Some(_) | None => bare,
    }
}

/// What is wrong with an entry of `preloadedImagesVerificationAllowlist`.
pub fn check_listed(pattern: &str) -> Option<&'static str> {
    let bare = pattern.strip_suffix("/*");
    let name = bare.unwrap_or(pattern);
    if pattern.trim() != pattern {
        return Some("leading/trailing spaces are not allowed");
    }
    if name.is_empty() {
        return Some("at least registry hostname is required");
    }
    if name.contains('*') {
        return Some("only patterns ending with '/*' are allowed");
    }
    if bare.is_none() && name_of(name) != name {
        return Some("neither tag nor digest is accepted in an image reference");
    }
    None
}

fn file_name(key: &str) -> String {
    let mut name = String::from("sha256-");
    for byte in Sha256::digest(key.as_bytes()) {
        name.push_str(&format!("{byte:02x}"));
    }
    name
}

/// SHA-256 of a user and a password, as the stock kubelet computes it.
pub(super) fn credential_hash(username: &str, password: &str) -> String {
    #[derive(Serialize)]
    struct AuthConfig<'a> {
        #[serde(skip_serializing_if = "str::is_empty")]
        username: &'a str,
        #[serde(skip_serializing_if = "str::is_empty")]
        password: &'a str,
    }
    let text = serde_json::to_string(&AuthConfig { username, password });
    let name = file_name(&text.unwrap_or_default());
    name.trim_start_matches("sha256-").to_owned()
}

/// All records of a directory; those that do not parse are passed over and stay.
fn read_all<T: serde::de::DeserializeOwned>(dir: &Path) -> Vec<T> {
    let names = linux::fs::list_dir(dir).unwrap_or_default();
    let ours = |name: &OsString| name.to_string_lossy().starts_with("sha256-");
    let read = |name: OsString| -> Result<T, (PathBuf, String)> {
        let path = dir.join(name);
        let content = linux::fs::read_file(&path, MAX_BYTES);
        let content = content.map_err(|e| (path.clone(), e.to_string()))?;
        serde_json::from_slice(&content).map_err(|e| (path, e.to_string()))
    };
    let mut records = Vec::new();
    for name in names.into_iter().filter(ours) {
        match read(name) {
            Ok(record) => records.push(record),
            Err((path, error)) => {
                warn!(path = %path.display(), error, "Record of a pull not read");
            }
        }
    }
    records
}

#[cfg(test)]
#[path = "access_tests.rs"]
mod tests;
