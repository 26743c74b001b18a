//! Who asks, and whether they may.
//!
//! Authentication: a client certificate of the client CA (common name is the user, organisations
//! are groups), or a bearer token shown to the apiserver (TokenReview), or anonymous when the
//! configuration allows it. Authorization: a SubjectAccessReview on the `nodes` resource of this
//! node, with the fine-grained subresource first and `nodes/proxy` as the fallback (KEP-2862).
//! Answers are believed for the configured times; both caches are bounded.

use crate::api::{REQUEST_TIMEOUT, within};
use crate::config::{AuthorizationMode, ServerConfig};
use hyper::Method;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kube::api::PostParams;
use kube::{Api, Client};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Entries kept per cache; beyond that the expired ones go, then all.
const CACHE_ENTRIES: usize = 4096;

/// Who shows nothing.
const ANONYMOUS: &str = "system:anonymous";

/// Somebody who asks.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct User {
    /// Name.
    pub name: String,
    /// UID, from a token.
    pub uid: String,
    /// Groups.
    pub groups: Vec<String>,
    /// Extra attributes, from a token.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl User {
    /// The holder of a verified client certificate.
    pub fn from_certificate(name: String, groups: Vec<String>) -> Self {
        Self {
            name,
            groups: with_authenticated(groups),
            ..Self::default()
        }
    }

    /// Whether it is nobody in particular.
    pub(super) fn is_anonymous(&self) -> bool {
        self.name == ANONYMOUS
    }

    fn anonymous() -> Self {
        Self {
            name: ANONYMOUS.to_owned(),
            groups: vec!["system:unauthenticated".to_owned()],
            ..Self::default()
        }
    }
}

/// The groups of somebody who has proven to be somebody.
fn with_authenticated(mut groups: Vec<String>) -> Vec<String> {
    const AUTHENTICATED: &str = "system:authenticated";
    if !groups.iter().any(|g| g == AUTHENTICATED) {
        groups.push(AUTHENTICATED.to_owned());
    }
    groups
}

/// What a request is about, for authorization.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Attributes {
    /// RBAC verb.
    pub verb: &'static str,
    /// Subresources of `nodes`, tried in order: one that is allowed suffices.
    pub subresources: Vec<&'static str>,
}

/// The attributes of a request. Pure.
pub fn attributes(method: &Method, path: &str) -> Attributes {
    let verb = match method.as_str() {
        "POST" => "create",
        "GET" => "get",
        "PUT" => "update",
        "PATCH" => "patch",
        "DELETE" => "delete",
        // Methods without a verb (HEAD, OPTIONS) are for those who may everything.
        _ => "",
    };
    let below = |prefix: &str| {
        path.strip_prefix(prefix)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let subresources = if below("/stats") {
        vec!["stats"]
    } else if below("/metrics") {
        vec!["metrics"]
    } else if below("/logs") {
        vec!["log"]
    } else if below("/checkpoint") {
        vec!["checkpoint"]
    } else if below("/statusz") {
        vec!["statusz"]
    } else if below("/flagz") {
        vec!["configz"]
    } else if below("/pods") || below("/runningpods") {
        vec!["pods", "proxy"]
    } else if below("/healthz") {
        vec!["healthz", "proxy"]
    } else if below("/configz") {
        vec!["configz", "proxy"]
    } else {
        vec!["proxy"]
    };
    Attributes { verb, subresources }
}

/// A refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Denied {
    /// No or bad credentials (401).
    Unauthenticated,
    /// Not allowed (403); the words of the stock kubelet.
    Forbidden(String),
    /// The apiserver could not be asked (500).
    Unavailable(String),
}

/// Authenticates and authorizes.
pub struct Auth {
    client: Client,
    node: String,
    config: ServerConfig,
    tokens: Cache<[u8; 32], Option<User>>,
    verdicts: Cache<(User, &'static str, &'static str), bool>,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth")
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

impl Auth {
    /// Asks through `client` on behalf of node `node`.
    pub fn new(client: Client, node: &str, config: ServerConfig) -> Self {
        Self {
            client,
            node: node.to_owned(),
            config,
            tokens: Cache::default(),
            verdicts: Cache::default(),
        }
    }

    /// Who asks: by certificate (verified by TLS already) or bearer token.
    ///
    /// # Errors
    /// [`Denied::Unauthenticated`], also when a token cannot be reviewed now.
    pub async fn authenticate(
        &self,
        certificate: Option<&User>,
        bearer: Option<&str>,
    ) -> Result<User, Denied> {
        if let Some(user) = certificate {
            return Ok(user.clone());
        }
        // A token that is not good is refused even where nobody needs one; where tokens are not
        // looked at, who shows one is as anonymous as others.
        if let Some(token) = bearer.filter(|_| self.config.token_review) {
            return self
                .review_token(token)
                .await?
                .ok_or(Denied::Unauthenticated);
        }
        if self.config.anonymous {
            return Ok(User::anonymous());
        }
        Err(Denied::Unauthenticated)
    }

    /// Whether `user` may.
    ///
    /// # Errors
    /// [`Denied::Forbidden`], or [`Denied::Unavailable`] when the apiserver cannot be asked.
    pub async fn authorize(&self, user: &User, attributes: &Attributes) -> Result<(), Denied> {
        match self.config.authorization {
            AuthorizationMode::AlwaysAllow => return Ok(()),
            AuthorizationMode::Webhook => {}
        }
        for &subresource in &attributes.subresources {
            let asked = self.review_access(user, attributes.verb, subresource);
            let allowed = asked.await.map_err(|error| {
                tracing::warn!(user = user.name, subresource, %error, "Cannot review access");
                Denied::Unavailable(format!(
                    "Authorization error (user={}, verb={}, resource=nodes, subresource={subresource})",
                    user.name, attributes.verb
                ))
            })?;
            if allowed {
                return Ok(());
            }
        }
        Err(Denied::Forbidden(format!(
            "Forbidden (user={}, verb={}, resource=nodes, subresource(s)=[{}])\n",
            user.name,
            attributes.verb,
            attributes.subresources.join(" ")
        )))
    }

    async fn review_token(&self, token: &str) -> Result<Option<User>, Denied> {
        // The cache holds digests, so that no token lies around in memory longer than needed.
        let key: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        if let Some(known) = self.tokens.get(&key) {
            return Ok(known);
        }
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: token.to_owned(),
                ..TokenReviewSpec::default()
            },
            ..TokenReview::default()
        };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let answer = within(REQUEST_TIMEOUT, api.create(&PostParams::default(), &review)).await;
        let status = answer
            .map_err(|error| {
                tracing::warn!(%error, "Cannot review a bearer token");
                Denied::Unauthenticated
            })?
            .status
            .unwrap_or_default();
        let user = status
            .user
            .filter(|_| status.authenticated == Some(true))
            .map(|u| User {
                name: u.username.unwrap_or_default(),
                uid: u.uid.unwrap_or_default(),
                groups: with_authenticated(u.groups.unwrap_or_default()),
                extra: u.extra.unwrap_or_default(),
            });
        self.tokens.put(key, user.clone(), self.config.token_ttl);
        Ok(user)
    }

    async fn review_access(
        &self,
        user: &User,
        verb: &'static str,
        subresource: &'static str,
    ) -> Result<bool, kube::Error> {
        let key = (user.clone(), verb, subresource);
        if let Some(known) = self.verdicts.get(&key) {
            return Ok(known);
        }
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(user.name.clone()),
                uid: Some(user.uid.clone()).filter(|u| !u.is_empty()),
                groups: Some(user.groups.clone()),
                extra: Some(user.extra.clone()).filter(|e| !e.is_empty()),
                resource_attributes: Some(ResourceAttributes {
                    verb: Some(verb.to_owned()),
                    version: Some("v1".to_owned()),
                    resource: Some("nodes".to_owned()),
                    subresource: Some(subresource.to_owned()),
                    name: Some(self.node.clone()),
                    ..ResourceAttributes::default()
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let api: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let answer = within(REQUEST_TIMEOUT, api.create(&PostParams::default(), &review)).await;
        let allowed = answer?
            .status
            .is_some_and(|s| s.allowed && s.denied != Some(true));
        let ttl = if allowed {
            self.config.allowed_ttl
        } else {
            self.config.denied_ttl
        };
        self.verdicts.put(key, allowed, ttl);
        Ok(allowed)
    }
}

/// A bounded map whose entries expire.
struct Cache<K, V> {
    entries: Mutex<HashMap<K, (Instant, V)>>,
}

impl<K, V> Default for Cache<K, V> {
    fn default() -> Self {
        Self {
            entries: Mutex::default(),
        }
    }
}

impl<K: Eq + Hash, V: Clone> Cache<K, V> {
    fn get(&self, key: &K) -> Option<V> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let (until, value) = entries.get(key)?;
        (*until > Instant::now()).then(|| value.clone())
    }

    fn put(&self, key: K, value: V, ttl: Duration) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() >= CACHE_ENTRIES {
            let now = Instant::now();
            entries.retain(|_, (until, _)| *until > now);
            if entries.len() >= CACHE_ENTRIES {
                entries.clear();
            }
        }
        entries.insert(key, (Instant::now() + ttl, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(method: &str, path: &str) -> (&'static str, Vec<&'static str>) {
        let a = attributes(&Method::from_bytes(method.as_bytes()).unwrap(), path);
        (a.verb, a.subresources)
    }

    #[test]
    fn paths_map_to_the_documented_subresources() {
        assert_eq!(of("GET", "/pods"), ("get", vec!["pods", "proxy"]));
        assert_eq!(of("GET", "/podsx"), ("get", vec!["proxy"]));
        assert_eq!(of("GET", "/metrics/resource"), ("get", vec!["metrics"]));
        assert_eq!(of("GET", "/stats/summary"), ("get", vec!["stats"]));
        assert_eq!(of("POST", "/exec/ns/p/c"), ("create", vec!["proxy"]));
        assert_eq!(of("GET", "/exec/ns/p/c"), ("get", vec!["proxy"]));
        assert_eq!(of("GET", "/runningpods/"), ("get", vec!["pods", "proxy"]));
        assert_eq!(of("GET", "/logs/kern.log"), ("get", vec!["log"]));
        assert_eq!(of("GET", "/statusz"), ("get", vec!["statusz"]));
        assert_eq!(of("GET", "/flagz"), ("get", vec!["configz"]));
        assert_eq!(of("HEAD", "/metrics"), ("", vec!["metrics"]));
        assert_eq!(
            of("GET", "/healthz/ping"),
            ("get", vec!["healthz", "proxy"])
        );
    }

    #[test]
    fn a_cache_forgets_and_stays_bounded() {
        let cache: Cache<usize, bool> = Cache::default();
        cache.put(0, true, Duration::ZERO);
        assert_eq!(cache.get(&0), None);
        for i in 0..=CACHE_ENTRIES * 2 {
            cache.put(i, true, Duration::from_secs(60));
        }
        assert!(cache.entries.lock().unwrap().len() <= CACHE_ENTRIES);
        assert_eq!(cache.get(&(CACHE_ENTRIES * 2)), Some(true));
    }
}
