//! Service account tokens: bound to the pod, refreshed in time.

use super::plan::TokenSpec;
use crate::launch::{pod_name, pod_namespace, pod_uid};
use crate::objects::{api_message, with_forbidden_retries};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::Client;
use kube::api::{Api, PostParams};
use std::time::Duration;

/// No token is used for longer.
const MOST: Duration = Duration::from_hours(24);
/// Refreshes are spread over so many milliseconds.
const JITTER_MS: u64 = 10_000;

/// A token and when it is to be replaced.
#[derive(Clone)]
pub(crate) struct Token {
    pub(crate) text: String,
    pub(crate) refresh_at: Timestamp,
    pub(crate) expires_at: Timestamp,
}

impl std::fmt::Debug for Token {
    /// Never prints the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token")
            .field("refresh_at", &self.refresh_at)
            .field("expires_at", &self.expires_at)
            .finish_non_exhaustive()
    }
}

/// When a token issued and expiring at these times is to be replaced: after four fifths of its
/// life or a day, less up to ten seconds decided by `seed`.
pub(crate) fn refresh_time(issued: Timestamp, expires: Timestamp, seed: u64) -> Timestamp {
    let life = u64::try_from(expires.as_second() - issued.as_second()).unwrap_or(0);
    let spread = (seed % JITTER_MS).min(life * 100);
    let after = Duration::from_millis(life * 800).min(MOST);
    let after = after.saturating_sub(Duration::from_millis(spread));
    issued.checked_add(after).unwrap_or(expires)
}

fn seed(pod: &Pod) -> u64 {
    // Pods made at once shall not all refresh at once.
    pod_uid(pod).bytes().fold(17, |hash: u64, b| {
        hash.wrapping_mul(31).wrapping_add(b.into())
    })
}

/// Asks the apiserver for a token.
///
/// # Errors
/// Stock's words with those of the apiserver.
pub(crate) async fn request(client: &Client, pod: &Pod, spec: &TokenSpec) -> Result<Token, String> {
    let account = pod.spec.as_ref().and_then(|s| {
        let name = s.service_account_name.as_deref();
        name.filter(|n| !n.is_empty())
    });
    let account = account.unwrap_or("default");
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: Some(spec.audience.iter().cloned().collect()),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                name: Some(pod_name(pod).to_owned()),
                uid: Some(pod_uid(pod).to_owned()),
            }),
            expiration_seconds: Some(spec.expiration_seconds),
        }),
        ..TokenRequest::default()
    };
    let api: Api<ServiceAccount> = Api::namespaced(client.clone(), pod_namespace(pod));
    let params = PostParams::default();
    let asked = Timestamp::now();
    let answer: Result<TokenRequest, kube::Error> =
        with_forbidden_retries(|| api.create_subresource("token", account, &params, &request))
            .await;
    let answer = answer.map_err(|e| format!("failed to fetch token: {}", api_message(&e)))?;
    let status = answer.status.unwrap_or_default();
    match (status.token, status.expiration_timestamp) {
        (Some(text), Some(expires)) => {
            let issued = times(&text).map_or(asked, |(issued, _)| issued);
            let expires_at = expires.0;
            Ok(Token {
                refresh_at: refresh_time(issued, expires_at, seed(pod)),
                expires_at,
                text,
            })
        }
        (_, _) => Err("failed to fetch token: the apiserver sent none".to_owned()),
    }
}

/// The token already in a file, when it is good for longer.
pub(crate) fn reuse(text: String, pod: &Pod) -> Option<Token> {
    let (issued, expires_at) = times(&text)?;
    let refresh_at = refresh_time(issued, expires_at, seed(pod));
    (Timestamp::now() < refresh_at).then_some(Token {
        text,
        refresh_at,
        expires_at,
    })
}

/// When a JSON web token was issued and when it ends. Tokens the apiserver extends (by a year,
/// for old clients) say in `warnafter` when they were meant to. The signature is the apiserver's
/// business.
fn times(token: &str) -> Option<(Timestamp, Timestamp)> {
    let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let claims: serde_json::Value = serde_json::from_slice(&claims).ok()?;
    let time = |value: Option<&serde_json::Value>| Timestamp::from_second(value?.as_i64()?).ok();
    let meant = time(claims.pointer("/kubernetes.io/warnafter"));
    Some((
        time(claims.get("iat"))?,
        meant.or_else(|| time(claims.get("exp")))?,
    ))
}

#[cfg(test)]
pub(crate) fn unsigned(issued: i64, expires: i64) -> String {
    let claims = format!("{{\"iat\":{issued},\"exp\":{expires}}}");
    format!("e30.{}.sig", URL_SAFE_NO_PAD.encode(claims))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::testing::pod;
    use serde_json::json;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn tokens_are_replaced_after_four_fifths_of_their_life_or_a_day() {
        for seed in [0, 1, 9_999, 123_456_789] {
            let hour = refresh_time(at(0), at(3600), seed).as_second();
            assert!((2870..=2880).contains(&hour), "{hour}");
            let year = refresh_time(at(0), at(365 * 86_400), seed).as_second();
            assert!((86_390..=86_400).contains(&year), "{year}");
        }
    }

    #[test]
    fn a_token_in_a_file_is_used_again_while_it_is_good() {
        let pod = pod(json!({}));
        let now = Timestamp::now().as_second();
        assert!(reuse(unsigned(now - 10, now + 3600), &pod).is_some());
        assert!(reuse(unsigned(now - 3500, now + 100), &pod).is_none());
        for text in ["", "x", "a.b.c", "a.e30.c"] {
            assert!(reuse(text.to_owned(), &pod).is_none());
        }
    }
}
