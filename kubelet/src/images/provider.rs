//! Credentials from programs on the node (KEP-2133): `--image-credential-provider-config` names
//! them and the images each is for, `--image-credential-provider-bin-dir` holds them. A program
//! reads a CredentialProviderRequest and prints a CredentialProviderResponse; what it printed is
//! kept for as long as it says, for the image, its registry or everything.
//!
//! No task: the caller's future waits; a program runs on a blocking thread with a time limit, once
//! for all who want the same image. Secrets are never logged: of a response that does not parse
//! nothing is told but that.

use super::Keyring;
use super::keyring::fits;
use linux::command::ShortCommand;
use runtime::service::RegistryAuth;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::time::Instant;
use tracing::warn;

/// A program that takes longer is killed (as the stock kubelet).
const TIME_LIMIT: Duration = Duration::from_secs(60);
/// A response has some credentials of a few kilobytes each.
const MAX_RESPONSE: usize = 1 << 20;
/// A configuration names a handful of programs.
const MAX_CONFIG: usize = 1 << 20;
/// Responses kept by one provider; beyond it expired ones go, then all.
const MAX_KEPT: usize = 1024;
/// Versions of the protocol spoken.
const VERSIONS: [&str; 3] = [
    "credentialprovider.kubelet.k8s.io/v1",
    "credentialprovider.kubelet.k8s.io/v1beta1",
    "credentialprovider.kubelet.k8s.io/v1alpha1",
];

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProviderConfigError {
    /// It cannot be read.
    #[error("read credential provider configuration {}: {cause}", path.display())]
    Read {
        /// File or directory.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// Something in it is wrong.
    #[error("credential provider configuration {}: {what}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What, by field.
        what: String,
    },
    /// A program is not there.
    #[error("credential provider {name}: no program {}: {cause}", program.display())]
    Program {
        /// Its name.
        name: String,
        /// Where it should be.
        program: PathBuf,
        /// Why not.
        cause: std::io::Error,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Document {
    api_version: String,
    kind: String,
    #[serde(default)]
    providers: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Entry {
    name: String,
    #[serde(default)]
    match_images: Vec<String>,
    default_cache_duration: Option<String>,
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<Variable>,
    token_attributes: Option<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Variable {
    name: String,
    value: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Request<'a> {
    kind: &'static str,
    api_version: &'a str,
    image: &'a str,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    api_version: String,
    kind: String,
    cache_key_type: String,
    cache_duration: Option<String>,
    #[serde(default)]
    auth: BTreeMap<String, Credentials>,
}

#[derive(Deserialize)]
struct Credentials {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
}

/// What a response is good for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum CacheKey {
    Image(String),
    Registry(String),
    Global,
}

/// Credentials of a response, by the images they are for.
type Found = Arc<Keyring>;
/// Held by whoever asks for an image's credentials right now.
type Turn = tokio::sync::Mutex<()>;

struct Provider {
    name: String,
    match_images: Vec<String>,
    default_cache: Duration,
    api_version: String,
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    kept: Mutex<HashMap<CacheKey, (Instant, Found)>>,
    turns: Mutex<HashMap<String, Weak<Turn>>>,
}

/// All credential providers of the node.
#[derive(Default)]
pub struct Providers {
    all: Vec<Provider>,
}

impl std::fmt::Debug for Providers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = self.all.iter().map(|provider| &provider.name);
        f.debug_list().entries(names).finish()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Providers {
    /// Reads the configuration, a file or a directory of `*.json`, `*.yaml` and `*.yml`, whose
    /// programs are in `bin_dir`. Blocking; for the start of the agent.
    ///
    /// # Errors
    /// [`ProviderConfigError`] with the file and what is wrong in it.
    pub fn load(config: &Path, bin_dir: &Path) -> Result<Self, ProviderConfigError> {
        let mut all: Vec<Provider> = Vec::new();
        let mut names = HashSet::new();
        for path in files(config)? {
            for entry in document(&path)?.providers {
                let wrong = |what: String| ProviderConfigError::Content {
                    path: path.clone(),
                    what: format!("provider {:?}: {what}", entry.name),
                };
                let default_cache = check(&entry).map_err(wrong)?;
                if !names.insert(entry.name.clone()) {
                    return Err(wrong("is there twice".to_owned()));
                }
                let program = bin_dir.join(&entry.name);
                executable(&program).map_err(|cause| ProviderConfigError::Program {
                    name: entry.name.clone(),
                    program: program.clone(),
                    cause,
                })?;
                all.push(Provider::new(entry, program, default_cache));
            }
        }
        if all.is_empty() {
            return Err(ProviderConfigError::Content {
                path: config.to_owned(),
                what: "providers: at least one is required".to_owned(),
            });
        }
        Ok(Self { all })
    }

    /// Credentials for `repository` (`host/path`). A program that fails is logged: the image may
    /// be had with other credentials, or without.
    pub async fn lookup(&self, repository: &str) -> Vec<RegistryAuth> {
        let mut credentials = Vec::new();
        for provider in &self.all {
            if !provider.match_images.iter().any(|m| fits(m, repository)) {
                continue;
            }
            match provider.credentials(repository).await {
                Ok(found) => {
                    let found = found.lookup(repository);
                    credentials.extend(found.into_iter().map(|c| c.auth));
                }
                Err(error) => {
                    warn!(
                        provider = provider.name,
                        image = repository,
                        error,
                        "No credentials"
                    );
                }
            }
        }
        credentials
    }
}

/// The files of a configuration, in order.
fn files(config: &Path) -> Result<Vec<PathBuf>, ProviderConfigError> {
    let failed = |cause: String| ProviderConfigError::Read {
        path: config.to_owned(),
        cause,
    };
    let meta = std::fs::metadata(config).map_err(|e| failed(e.to_string()))?;
    if !meta.is_dir() {
        return Ok(vec![config.to_owned()]);
    }
    let names = linux::fs::list_dir(config).map_err(|e| failed(e.to_string()))?;
    let mut files: Vec<PathBuf> = names.into_iter().map(|name| config.join(name)).collect();
    files.retain(|path| {
        let ending = path.extension().and_then(|e| e.to_str());
        matches!(ending, Some("json" | "yaml" | "yml")) && path.is_file()
    });
    files.sort();
    if files.is_empty() {
        return Err(failed("no configuration files found in it".to_owned()));
    }
    Ok(files)
}

fn document(path: &Path) -> Result<Document, ProviderConfigError> {
    let wrong = |what: String| ProviderConfigError::Content {
        path: path.to_owned(),
        what,
    };
    let text = linux::fs::read_file(path, MAX_CONFIG).map_err(|e| ProviderConfigError::Read {
        path: path.to_owned(),
        cause: e.to_string(),
    })?;
    let text = String::from_utf8(text).map_err(|e| wrong(e.to_string()))?;
    let document: Document = serde_saphyr::from_str(&text).map_err(|e| wrong(e.to_string()))?;
    let group = document.api_version.split('/').next();
    if document.kind != "CredentialProviderConfig" || group != Some("kubelet.config.k8s.io") {
        let (version, kind) = (&document.api_version, &document.kind);
        return Err(wrong(format!(
            "is a {version} {kind}, not a kubelet.config.k8s.io/v1 CredentialProviderConfig"
        )));
    }
    Ok(document)
}

/// What is wrong with an entry; else how long its responses are kept when they do not say.
fn check(entry: &Entry) -> Result<Duration, String> {
    let name = &entry.name;
    if name.is_empty() || name.contains(['/', ' ']) || name == "." || name == ".." {
        return Err("name: must be the name of a program, without '/' and spaces".to_owned());
    }
    if !VERSIONS.contains(&entry.api_version.as_str()) {
        let version = &entry.api_version;
        return Err(format!("apiVersion: {version:?} is none of {VERSIONS:?}"));
    }
    if entry.match_images.is_empty() {
        return Err("matchImages: at least one is required".to_owned());
    }
    if entry.token_attributes.is_some() {
        return Err("tokenAttributes: service account tokens are not given to plugins".to_owned());
    }
    let Some(duration) = &entry.default_cache_duration else {
        return Err("defaultCacheDuration: is required".to_owned());
    };
    crate::config::duration::parse(duration)
        .ok_or_else(|| format!("defaultCacheDuration: {duration:?} is not a duration"))
}

fn executable(program: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let meta = std::fs::metadata(program)?;
    if meta.is_file() && meta.permissions().mode() & 0o111 != 0 {
        return Ok(());
    }
    Err(std::io::Error::other("not an executable file"))
}

impl Provider {
    fn new(entry: Entry, program: PathBuf, default_cache: Duration) -> Self {
        let added = entry.env.into_iter();
        let added = added.map(|v| (v.name.into(), v.value.into()));
        // What is configured wins over what we were started with.
        let env: HashMap<OsString, OsString> = std::env::vars_os().chain(added).collect();
        Self {
            name: entry.name,
            match_images: entry.match_images,
            default_cache,
            api_version: entry.api_version,
            program,
            args: entry.args.into_iter().map(OsString::from).collect(),
            env: env.into_iter().collect(),
            kept: Mutex::default(),
            turns: Mutex::default(),
        }
    }

    async fn credentials(&self, repository: &str) -> Result<Found, String> {
        let turn = self.turn(repository);
        let _turn = turn.lock().await;
        if let Some(found) = self.kept(repository) {
            return Ok(found);
        }
        let request = Request {
            kind: "CredentialProviderRequest",
            api_version: &self.api_version,
            image: repository,
        };
        let command = ShortCommand {
            program: self.program.clone(),
            args: self.args.clone(),
            env: self.env.clone(),
            stdin: serde_json::to_vec(&request).map_err(|e| e.to_string())?,
            max_output_bytes: MAX_RESPONSE,
            time_limit: TIME_LIMIT,
        };
        let output = tokio::task::spawn_blocking(move || command.run())
            .await
            .map_err(|e| e.to_string())?
            .map_err(|e| crate::errors::chain(&e))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("it ended with {}: {}", output.status, said.trim()));
        }
        let (key, keep, found) = self.understand(&output.stdout, repository)?;
        if !keep.is_zero() {
            self.keep(key, keep, &found);
        }
        Ok(found)
    }

    /// One at a time for the same image; different images side by side.
    fn turn(&self, repository: &str) -> Arc<Turn> {
        let mut turns = lock(&self.turns);
        turns.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = turns.get(repository).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::new(Turn::default());
        turns.insert(repository.to_owned(), Arc::downgrade(&turn));
        turn
    }

    fn kept(&self, repository: &str) -> Option<Found> {
        let now = Instant::now();
        let kept = lock(&self.kept);
        let keys = [
            CacheKey::Image(repository.to_owned()),
            CacheKey::Registry(registry(repository)),
            CacheKey::Global,
        ];
        let found = keys.iter().filter_map(|key| kept.get(key));
        let mut valid = found.filter(|(until, _)| now < *until);
        valid.next().map(|(_, found)| Arc::clone(found))
    }

    fn keep(&self, key: CacheKey, time: Duration, found: &Found) {
        let now = Instant::now();
        let Some(until) = now.checked_add(time) else {
            return;
        };
        let mut kept = lock(&self.kept);
        kept.retain(|_, (until, _)| now < *until);
        if kept.len() >= MAX_KEPT {
            kept.clear();
        }
        kept.insert(key, (until, Arc::clone(found)));
    }

    /// What a response says: for what it is good, for how long, and the credentials.
    fn understand(
        &self,
        stdout: &[u8],
        repository: &str,
    ) -> Result<(CacheKey, Duration, Found), String> {
        // The parser's words could show a secret.
        let response: Response = serde_json::from_slice(stdout)
            .map_err(|_| "error decoding credential provider plugin response from stdout")?;
        if response.api_version != self.api_version || response.kind != "CredentialProviderResponse"
        {
            return Err(format!(
                "it answered with a {} {}, asked for {} CredentialProviderResponse",
                response.api_version, response.kind, self.api_version
            ));
        }
        let key = match response.cache_key_type.as_str() {
            "Image" => CacheKey::Image(repository.to_owned()),
            "Registry" => CacheKey::Registry(registry(repository)),
            "Global" => CacheKey::Global,
            other => return Err(format!("it did not return a valid cacheKeyType: {other:?}")),
        };
        let keep = match &response.cache_duration {
            None => self.default_cache,
            Some(text) => crate::config::duration::parse(text)
                .ok_or_else(|| format!("its cacheDuration {text:?} is not a duration"))?,
        };
        let entries = response.auth.into_iter().map(|(location, credentials)| {
            let Credentials { username, password } = credentials;
            (location, RegistryAuth::Basic { username, password })
        });
        Ok((key, keep, Arc::new(Keyring::of(entries))))
    }
}

/// `host:port` of `host:port/path`.
fn registry(repository: &str) -> String {
    let host = repository.split('/').next();
    host.unwrap_or_default().to_owned()
}

#[cfg(test)]
#[path = "provider_tests.rs"]
mod tests;
