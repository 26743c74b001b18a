//! `/debug` and `/checkpoint`: what people ask of a kubelet written in Go, or of a runtime that can
//! write a container to disk, has a clear answer here too.

use super::Server;
use super::routes::{Body, text};
use hyper::{Request, Response, StatusCode};
use runtime::service::{ImageService, RuntimeService};

/// What profiles there are instead.
const NO_PROFILES: &str = "this kubelet is not a Go program and has no such profile; \
     perf(1) and gdb(1) work on it\n";

/// Answers for what follows `/debug/`; none for unknown paths.
pub(super) fn answer(parts: &[&str]) -> Option<Response<Body>> {
    match parts {
        ["pprof"] | ["pprof", ""] => Some(text(
            StatusCode::OK,
            format!("/debug/pprof/\n\ncmdline\n\nothers: {NO_PROFILES}"),
        )),
        ["pprof", "cmdline"] => {
            let words: Vec<String> = std::env::args_os()
                .map(|word| word.to_string_lossy().into_owned())
                .collect();
            Some(text(StatusCode::OK, words.join("\0")))
        }
        ["pprof", ..] => Some(text(StatusCode::NOT_IMPLEMENTED, NO_PROFILES)),
        _ => None,
    }
}

impl<R: RuntimeService + ImageService> Server<R> {
    /// Refuses to write a container to disk as the stock kubelet does on a runtime that cannot
    /// (KEP-2008); who asks for what is not there learns that first.
    pub(super) fn checkpoint<B>(
        &self,
        request: &Request<B>,
        namespace: &str,
        pod: &str,
        container: &str,
    ) -> Response<Body> {
        let not_found = |message: String| text(StatusCode::NOT_FOUND, message);
        let Some(entry) = self.index.get(namespace, pod) else {
            return not_found("pod does not exist".to_owned());
        };
        if !super::routes::declares(&entry, container) {
            return not_found(format!("container {container} does not exist"));
        }
        let query = request.uri().query().unwrap_or_default().split('&');
        let timeout = query
            .filter_map(|pair| pair.strip_prefix("timeout="))
            .next_back();
        if timeout.is_some_and(|t| t.parse::<i64>().is_err()) {
            return not_found("cannot parse value of timeout parameter".to_owned());
        }
        text(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!(
                "checkpointing of {namespace}/{pod}/{container} failed (rpc error: code = \
                 Unimplemented desc = unknown method CheckpointContainer for service \
                 runtime.v1.RuntimeService)"
            ),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_of_go_programs_are_refused_in_words() {
        let status = |parts: &[&str]| answer(parts).map(|r| r.status());
        assert_eq!(
            status(&["pprof", "heap"]),
            Some(StatusCode::NOT_IMPLEMENTED)
        );
        assert_eq!(status(&["pprof"]), Some(StatusCode::OK));
        assert_eq!(status(&["pprof", "cmdline"]), Some(StatusCode::OK));
        assert_eq!(status(&["other"]), None);
    }
}
