//! `/healthz`: what liveness checks of the kubelet ask, on both ports. Bodies are the stock ones.

use super::routes::{Body, query, text};
use crate::metrics::metrics;
use hyper::{Response, StatusCode};

/// The checks, in the order they are told. The log is written by ourselves: it is well when we are.
const CHECKS: [&str; 3] = ["ping", "log", "syncloop"];
/// What the checks are counted under.
const GROUP: &str = "healthz";

/// Answers `/healthz` and what is below it; none for other paths. `problem` is what is wrong with
/// the pod loop.
pub(super) fn answer(uri: &hyper::Uri, problem: Option<&str>) -> Option<Response<Body>> {
    let below = match uri.path() {
        // The health port of other components has these names too.
        "/healthz" | "/healthz/" | "/livez" | "/readyz" => return Some(all(uri, problem)),
        path => path.strip_prefix("/healthz/")?,
    };
    let check = CHECKS.into_iter().find(|c| *c == below)?;
    let failed = problem.filter(|_| check == "syncloop");
    Some(match failed {
        None => text(StatusCode::OK, "ok"),
        Some(problem) => text(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("internal server error: {problem}\n"),
        ),
    })
}

fn all(uri: &hyper::Uri, problem: Option<&str>) -> Response<Body> {
    let query = query(uri);
    let excluded = |check: &str| query.iter().any(|(k, v)| k == "exclude" && v == check);
    let verbose = query.iter().any(|(k, _)| k == "verbose");
    let mut lines = String::new();
    let mut failed = false;
    for check in CHECKS {
        if excluded(check) {
            lines.push_str(&format!("[+]{check} excluded: ok\n"));
            continue;
        }
        let bad = check == "syncloop" && problem.is_some();
        let status = if bad { "error" } else { "success" };
        metrics().healthchecks.with([check, status, GROUP]).inc();
        metrics().health.with([check, GROUP]).set(i64::from(!bad));
        failed |= bad;
        lines.push_str(&if bad {
            format!("[-]{check} failed: reason withheld\n")
        } else {
            format!("[+]{check} ok\n")
        });
    }
    match (failed, verbose) {
        (true, _) => {
            tracing::warn!(problem, "A health check failed");
            lines.push_str("healthz check failed\n");
            text(StatusCode::INTERNAL_SERVER_ERROR, lines)
        }
        (false, true) => text(StatusCode::OK, lines + "healthz check passed\n"),
        (false, false) => text(StatusCode::OK, "ok"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    async fn ask(path: &str, problem: Option<&str>) -> Option<(u16, String)> {
        let response = answer(&path.parse().unwrap(), problem)?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        Some((status, String::from_utf8_lossy(&body).into_owned()))
    }

    #[tokio::test]
    async fn a_stuck_pod_loop_fails_all_but_the_other_checks() {
        let ok = || (200, "ok".to_owned());
        assert_eq!(ask("/healthz", None).await, Some(ok()));
        assert_eq!(ask("/healthz/ping", Some("x")).await, Some(ok()));
        assert_eq!(ask("/healthz/log", Some("x")).await, Some(ok()));
        let (status, body) = ask("/healthz/syncloop", Some("it stands")).await.unwrap();
        assert_eq!(
            (status, body.as_str()),
            (500, "internal server error: it stands\n")
        );
        let (status, body) = ask("/healthz", Some("x")).await.unwrap();
        assert_eq!(status, 500);
        assert_eq!(
            body,
            "[+]ping ok\n[+]log ok\n[-]syncloop failed: reason withheld\nhealthz check failed\n"
        );
        assert_eq!(
            ask("/healthz?exclude=syncloop", Some("x")).await,
            Some(ok())
        );
        let (_, body) = ask("/healthz?verbose", None).await.unwrap();
        assert!(
            body.ends_with("[+]syncloop ok\nhealthz check passed\n"),
            "{body}"
        );
        assert_eq!(ask("/healthz/else", None).await, None);
        assert_eq!(ask("/other", None).await, None);
    }
}
