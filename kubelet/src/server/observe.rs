//! What one can look at without touching a container: health, pods, statistics, metrics,
//! configuration, logs of the node. Shared by the HTTPS API and the read-only port.

use super::routes::{Body, json, query, text};
use super::{Server, debug, health, node_logs, zpages};
use crate::metrics::text::{CONTENT_TYPE as METRICS_TYPE, Family, Page};
use crate::metrics::{self, metrics};
use crate::node::object::KUBELET_VERSION;
use crate::pod::index::PodEntry;
use crate::stats::resource;
use crate::status::derive::is_terminal_phase;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use k8s_openapi::api::core::v1::Pod;
use runtime::service::{ContainerState, ImageService, RuntimeService, SandboxState};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Where `/logs/` looks.
const NODE_LOGS: &str = "/var/log";
/// Paths that need `enableDebuggingHandlers`.
const DEBUGGING: [&str; 7] = [
    "run",
    "exec",
    "attach",
    "portForward",
    "containerLogs",
    "runningpods",
    "logs",
];

/// What `http_requests` calls a path: its first part, or both of a metrics path.
pub(super) fn bucket(path: &str) -> &'static str {
    let mut parts = path.trim_start_matches('/').splitn(3, '/');
    let (root, next) = (parts.next().unwrap_or_default(), parts.next());
    if root == "metrics" {
        return match next {
            Some("cadvisor") => "metrics/cadvisor",
            Some("probes") => "metrics/probes",
            Some("resource") => "metrics/resource",
            Some(_) | None => "metrics",
        };
    }
    let known = [
        "healthz",
        "pods",
        "stats",
        "configz",
        "checkpoint",
        "debug",
        "statusz",
        "flagz",
    ];
    let mut all = known.iter().chain(&DEBUGGING);
    all.find(|k| **k == root).copied().unwrap_or("other")
}

/// A kind of page made off the async threads.
#[derive(Debug, Clone, Copy)]
enum Measured {
    Summary { only_cpu_and_memory: bool },
    Cadvisor,
    Resource,
    Kubelet,
}

impl<R: RuntimeService + ImageService> Server<R> {
    /// Answers what the read-only port has too; none for other paths.
    pub(super) async fn observe<B>(
        &self,
        request: &Request<B>,
        parts: &[&str],
    ) -> Option<Response<Body>> {
        let get = *request.method() == Method::GET;
        let answer = match parts {
            ["healthz" | "livez" | "readyz", ..] => {
                let problem = (self.problem)();
                health::answer(request.uri(), problem.as_deref())?
            }
            ["pods"] if get => self.pods(),
            ["stats", "summary"] if get || *request.method() == Method::POST => {
                let query = query(request.uri());
                let mut asked = query.iter().filter(|(k, _)| k == "only_cpu_and_memory");
                let only = asked.next().is_some_and(|(_, v)| v == "true");
                let only_cpu_and_memory = only && asked.next().is_none();
                self.measured(Measured::Summary {
                    only_cpu_and_memory,
                })
                .await
            }
            ["metrics"] => self.measured(Measured::Kubelet).await,
            ["metrics", "cadvisor"] => self.measured(Measured::Cadvisor).await,
            ["metrics", "resource"] => self.measured(Measured::Resource).await,
            ["metrics", "probes"] => exposition(self.probes()),
            ["metrics", "slis"] => exposition(slis()),
            ["pods" | "stats"] | ["stats", "summary"] => {
                text(StatusCode::METHOD_NOT_ALLOWED, "405: Method Not Allowed")
            }
            ["pods" | "stats", ..] => text(StatusCode::NOT_FOUND, "404: Page Not Found"),
            _ => return None,
        };
        Some(answer)
    }

    /// Answers what only those may look at who have proven themselves; none for other paths.
    pub(super) async fn inspect<B>(
        &self,
        request: &Request<B>,
        path: &str,
        parts: &[&str],
    ) -> Option<Response<Body>> {
        let settings = &self.config.server;
        let root = parts.first().copied().unwrap_or_default();
        if !settings.debugging_handlers {
            let refused = DEBUGGING.contains(&root) || path.starts_with("/debug/pprof/");
            return refused.then(debugging_disabled);
        }
        let get = *request.method() == Method::GET;
        let answer = match parts {
            ["configz"] => json(&serde_json::json!({ "kubeletconfig": self.config.effective })),
            ["runningpods"] if get => self.running_pods(),
            ["statusz"] => zpages::statusz(request.headers(), self.started),
            ["flagz"] => zpages::flagz(request.headers()),
            ["logs", ..] if !settings.system_logs => text(
                StatusCode::METHOD_NOT_ALLOWED,
                "logs endpoint is disabled.\n",
            ),
            ["logs", ..] if get => {
                let below = path.strip_prefix("/logs").unwrap_or_default();
                let mut wanted = parts[1..].join("/");
                if below.len() > 1 && below.ends_with('/') {
                    wanted.push('/');
                }
                node_logs::answer(NODE_LOGS, path, wanted).await
            }
            ["debug", "flags", "v"] if !settings.debug_flags => text(
                StatusCode::METHOD_NOT_ALLOWED,
                "flags endpoint is disabled.\n",
            ),
            ["debug", "pprof", ..] if !settings.profiling => text(
                StatusCode::METHOD_NOT_ALLOWED,
                "profiling endpoint is disabled.\n",
            ),
            ["debug", ..] if get => return debug::answer(&parts[1..]),
            ["runningpods"] | ["logs", ..] => {
                text(StatusCode::METHOD_NOT_ALLOWED, "405: Method Not Allowed")
            }
            _ => return None,
        };
        Some(answer)
    }

    fn pods(&self) -> Response<Body> {
        let entries = self.index.list();
        pod_list(entries.iter().map(|e| e.pod_with_status()).collect())
    }

    /// What the runtime runs, told from its own records only.
    fn running_pods(&self) -> Response<Body> {
        let mut pods = Vec::new();
        for sandbox in self.runtime.list_sandboxes() {
            if sandbox.state != SandboxState::Ready {
                continue;
            }
            let mut pod = Pod::default();
            let config = &sandbox.config;
            pod.metadata.name = Some(config.name.clone());
            pod.metadata.namespace = Some(config.namespace.clone());
            pod.metadata.uid = Some(config.uid.clone());
            let running = |s: &ContainerState| matches!(s, ContainerState::Running { .. });
            let containers = self.runtime.list_containers(Some(&sandbox.id));
            let containers = containers.into_iter().filter(|c| running(&c.state));
            let spec = pod.spec.get_or_insert_default();
            spec.containers = containers
                .map(|c| k8s_openapi::api::core::v1::Container {
                    name: c.config.name,
                    image: Some(c.config.user_image),
                    ..Default::default()
                })
                .collect();
            if !spec.containers.is_empty() {
                pods.push(pod);
            }
        }
        pod_list(pods)
    }

    /// Makes a page that needs blocking reads.
    async fn measured(&self, what: Measured) -> Response<Body> {
        let stats = Arc::clone(&self.stats);
        let machine = Arc::clone(&self.machine);
        let (runtime, index) = (Arc::clone(&self.runtime), self.index.clone());
        let about = self.about();
        let work = move || match what {
            Measured::Summary {
                only_cpu_and_memory: true,
            } => json(&stats.cpu_and_memory()),
            Measured::Summary {
                only_cpu_and_memory: false,
            } => json(&stats.summary()),
            Measured::Cadvisor => exposition(stats.cadvisor(&machine)),
            Measured::Resource => exposition(resource::page(&stats.cpu_and_memory())),
            Measured::Kubelet => {
                let mut page = Page::new();
                metrics::write(metrics(), &mut page);
                metrics::process(&mut page);
                about_page(&mut page, &about);
                running_page(&mut page, &*runtime);
                pods_page(&mut page, &index.list());
                stats.claims(&mut page);
                exposition(page)
            }
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(response) => response,
            Err(error) => {
                tracing::error!(%error, "Measuring failed");
                let message = format!("Internal Error: {error}");
                text(StatusCode::INTERNAL_SERVER_ERROR, message)
            }
        }
    }

    fn about(&self) -> About {
        About {
            node: self.config.node_name.clone(),
            cgroup_version: if self.cgroup_v2 { 2 } else { 1 },
            certificate_ttl_s: (self.certificate_ttl_s)(),
        }
    }

    /// Probes of pods that are still here.
    fn probes(&self) -> Page {
        let entries = self.index.list();
        let uids: BTreeSet<&str> = entries.iter().map(|e| e.uid()).collect();
        let names: BTreeSet<(&str, &str)> = entries
            .iter()
            .map(|e| {
                let meta = &e.pod.metadata;
                let namespace = meta.namespace.as_deref().unwrap_or_default();
                (namespace, meta.name.as_deref().unwrap_or_default())
            })
            .collect();
        let all = metrics();
        all.probes
            .retain(|labels| uids.contains(labels[5].as_str()));
        all.probe_durations
            .retain(|labels| names.contains(&(labels[3].as_str(), labels[2].as_str())));
        let mut page = Page::new();
        all.probes.write(&mut page);
        all.probe_durations.write(&mut page);
        page
    }
}

/// The answer where debugging is not wanted.
pub(super) fn debugging_disabled() -> Response<Body> {
    text(
        StatusCode::METHOD_NOT_ALLOWED,
        "Debug endpoints are disabled.\n",
    )
}

fn pod_list(items: Vec<Pod>) -> Response<Body> {
    json(&serde_json::json!({
        "kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items,
    }))
}

fn exposition(page: Page) -> Response<Body> {
    let mut response = text(StatusCode::OK, page.render());
    let kind = HeaderValue::from_static(METRICS_TYPE);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

fn slis() -> Page {
    let mut page = Page::new();
    metrics().health.write(&mut page);
    metrics().healthchecks.write(&mut page);
    page
}

/// Facts about the agent.
#[derive(Debug)]
struct About {
    node: String,
    cgroup_version: u8,
    certificate_ttl_s: Option<i64>,
}

fn about_page(page: &mut Page, about: &About) {
    let gauge = |page: &mut Page, name, help, labels: &[(&str, &str)], value: f64| {
        page.put(Family::gauge(name, help), labels, value);
    };
    gauge(
        page,
        "kubelet_node_name",
        "1, labelled by the name of the node.",
        &[("node", &about.node)],
        1.0,
    );
    gauge(
        page,
        "kubelet_cgroup_version",
        "Version of control groups in use.",
        &[],
        about.cgroup_version.into(),
    );
    gauge(
        page,
        "kubelet_metrics_provider",
        "1, labelled by where statistics of containers come from.",
        &[("provider", "cadvisor")],
        1.0,
    );
    gauge(
        page,
        "kubernetes_build_info",
        "1, labelled by version and platform.",
        &[
            ("build_date", ""),
            ("compiler", "rustc"),
            ("git_commit", ""),
            ("git_tree_state", ""),
            ("git_version", KUBELET_VERSION),
            ("go_version", ""),
            ("major", "1"),
            ("minor", "36"),
            ("platform", concat_platform()),
        ],
        1.0,
    );
    // Without a certificate there is no end that could be near.
    let ttl = about.certificate_ttl_s.map_or(f64::INFINITY, |s| s as f64);
    gauge(
        page,
        "kubelet_certificate_manager_client_ttl_seconds",
        "Life left of the client certificate in seconds, negative when it has expired.",
        &[],
        ttl,
    );
}

fn concat_platform() -> &'static str {
    if cfg!(target_arch = "aarch64") {
        "linux/arm64"
    } else {
        "linux/amd64"
    }
}

/// Sandboxes and containers there are.
fn running_page<R: RuntimeService>(page: &mut Page, runtime: &R) {
    let sandboxes = runtime.list_sandboxes();
    let ready = sandboxes.iter().filter(|s| s.state == SandboxState::Ready);
    let uids: BTreeSet<&str> = ready.map(|s| s.config.uid.as_str()).collect();
    let family = Family::gauge("kubelet_running_pods", "Pods that have a running sandbox.");
    page.put(family, &[], uids.len() as f64);
    let mut states: BTreeMap<&str, u32> = BTreeMap::from([("running", 0)]);
    for container in runtime.list_containers(None) {
        let state = match container.state {
            ContainerState::Created => "created",
            ContainerState::Running { .. } => "running",
            ContainerState::Exited { .. } => "exited",
        };
        *states.entry(state).or_default() += 1;
    }
    let family = Family::gauge("kubelet_running_containers", "Containers, by state.");
    for (state, count) in states {
        page.put(family, &[("container_state", state)], count.into());
    }
}

/// Pods by where they came from.
fn pods_page(page: &mut Page, entries: &[Arc<PodEntry>]) {
    let annotation = |e: &PodEntry, name: &str| {
        let annotations = e.pod.metadata.annotations.as_ref();
        annotations.and_then(|a| a.get(name).cloned())
    };
    let is_static = |e: &PodEntry| {
        annotation(e, "kubernetes.io/config.source").is_some_and(|source| source != "api")
    };
    let is_mirror = |e: &PodEntry| annotation(e, "kubernetes.io/config.mirror").is_some();
    let desired = Family::gauge("kubelet_desired_pods", "Pods the node was told to run.");
    let active = Family::gauge("kubelet_active_pods", "Pods that are not finished.");
    for (label, wanted) in [("", false), ("true", true)] {
        let these = || entries.iter().filter(|e| is_static(e) == wanted);
        page.put(desired, &[("static", label)], these().count() as f64);
        let going = these().filter(|e| !is_terminal_phase(&e.status));
        page.put(active, &[("static", label)], going.count() as f64);
    }
    let mirrors = Family::gauge("kubelet_mirror_pods", "Mirrors of static pods.");
    let count = entries.iter().filter(|e| is_mirror(e)).count();
    page.put(mirrors, &[], count as f64);
    let ephemeral = entries.iter().map(|e| {
        let spec = e.pod.spec.as_ref();
        spec.and_then(|s| s.ephemeral_containers.as_ref())
            .map_or(0, Vec::len)
    });
    let family = Family::gauge(
        "kubelet_managed_ephemeral_containers",
        "Ephemeral containers of this node's pods.",
    );
    page.put(family, &[], ephemeral.sum::<usize>() as f64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_under_few_names() {
        assert_eq!(bucket("/pods"), "pods");
        assert_eq!(bucket("/metrics/resource"), "metrics/resource");
        assert_eq!(bucket("/metrics/x"), "metrics");
        assert_eq!(bucket("/containerLogs/ns/p/c"), "containerLogs");
        assert_eq!(bucket("/anything/else"), "other");
        assert_eq!(bucket(""), "other");
    }
}
