//! Watches our own Node (the only one a node may watch) and tells the others of it.

use super::NodeHandle;
use crate::api::Clients;
use crate::config::Config;
use futures::StreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use runtime::service::RuntimeService;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

/// Watches until told to stop; kube backs off and lists again after errors.
pub(super) async fn run<R: RuntimeService>(
    runtime: Arc<R>,
    config: Arc<Config>,
    clients: Clients,
    handle: NodeHandle,
    stop: CancellationToken,
) {
    let api: Api<Node> = Api::all(clients.main.clone());
    let only_us = watcher::Config::default().fields(&format!("metadata.name={}", config.node_name));
    let stream = watcher(api, only_us).default_backoff();
    let mut stream = std::pin::pin!(stream);
    let mut seen_in_list = false;
    let mut cidrs: Vec<String> = Vec::new();
    loop {
        let event = tokio::select! {
            () = stop.cancelled() => return,
            event = stream.next() => event,
        };
        match event {
            Some(Ok(Event::Init)) => seen_in_list = false,
            Some(Ok(Event::InitApply(node))) => {
                seen_in_list = true;
                handle.learn(node);
            }
            Some(Ok(Event::InitDone)) => {
                if !seen_in_list {
                    handle.forget();
                }
            }
            Some(Ok(Event::Apply(node))) => handle.learn(node),
            Some(Ok(Event::Delete(_))) => handle.forget(),
            Some(Err(error)) => {
                debug!("The watch of our Node broke: {error}");
            }
            None => return,
        }
        let now = handle.pod_cidrs();
        if now != cidrs && !now.is_empty() {
            info!(cidrs = ?now, "The Node has its pod CIDRs");
            runtime.set_pod_cidrs(&now);
            cidrs = now;
        }
    }
}
