//! Puts the parts together and owns the tasks: one that follows the nodes, one that publishes, one
//! that serves; and the kernel thread. All end with the process; what they made stays.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use kube::Client;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use crate::api;
use crate::cli::{self, Asked, Config, FlannelAnnotations};
use crate::health::{self, Health};
use crate::kernel::{self, Report, Snapshot};
use crate::memory;
use crate::netconf::Backend;
use crate::node::{Announcement, PeerNode};

/// First and longest wait between attempts to publish.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LONGEST: Duration = Duration::from_secs(30);
/// Nodes that change are kept after this long, however many more change meanwhile.
const KEEP_AFTER: Duration = Duration::from_secs(2);

/// Runs the agent until it is told to stop.
pub fn main(backend: Backend) -> ExitCode {
    let refused = |problem: anyhow::Error| {
        eprintln!("error: {problem:#}");
        ExitCode::from(2)
    };
    let config = match cli::asked(backend) {
        Ok(Asked::Run(config)) => *config,
        Ok(Asked::Install { from, to }) => {
            return put_in_place(&from, &to).map_or_else(refused, |()| ExitCode::SUCCESS);
        }
        Err(problem) => return refused(problem),
    };
    log(config.log_json);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let outcome = runtime
        .context("start the runtime")
        .and_then(|runtime| runtime.block_on(run(config)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            error!("{problem:#}");
            ExitCode::FAILURE
        }
    }
}

fn put_in_place(from: &Path, to: &Path) -> Result<()> {
    let name = from.file_name().and_then(|name| name.to_str());
    let name = name.with_context(|| format!("{} names no program", from.display()))?;
    cni::install::install(from, to, name)
        .with_context(|| format!("install {} into {}", from.display(), to.display()))
}

fn log(json: bool) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,kube=off"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if json {
        builder.json().init();
    } else {
        builder.init();
    }
}

async fn run(config: Config) -> Result<()> {
    // Two providers may be in one program; this one is asked for by name.
    let _ = rustls::crypto::ring::default_provider().install_default();
    info!(
        "Keeping node {} of the {} network {}",
        config.node_name, config.kernel.backend, config.kernel.network
    );
    for key in &config.kernel.conf.ignored {
        warn!("Network configuration: key {key} means nothing here and is ignored");
    }
    let mut terminate = signal(SignalKind::terminate()).context("hear SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("hear SIGINT")?;
    let client = api::client(config.kubeconfig.as_deref()).await?;
    let (health, told) = watch::channel(Health::default());
    let mut tasks = JoinSet::new();
    if let Some(address) = config.listen {
        tasks.spawn(health::serve(health::listen(address).await?, told));
    }
    let (kernel, mut reports) =
        kernel::spawn(config.kernel.clone()).context("open the kernel's network state")?;
    let known = memory::load(&config.kernel.state_dir, &config.node_name);
    if let Some(known) = &known {
        kernel.send(known.clone());
    }
    let (sender, mut snapshots) = watch::channel(known.unwrap_or_default());
    tasks.spawn(api::follow(
        client.clone(),
        config.node_name.clone(),
        sender,
    ));
    let publisher = Publisher {
        client,
        config,
        health,
    };
    tasks.spawn(publisher.run(snapshots.clone(), reports.clone()));
    reports.mark_unchanged();
    loop {
        // Each arm is cancel-safe: signals stay pending, a watch keeps its newest value.
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            changed = snapshots.changed() => {
                changed.context("the task that follows the nodes ended")?;
                kernel.send(snapshots.borrow_and_update().clone());
            }
            Some(ended) = tasks.join_next() => {
                ended.context("a task ended")?;
                anyhow::bail!("a task ended that should run for ever");
            }
        }
    }
    info!("Stopping; routes, devices and rules stay");
    tasks.shutdown().await;
    drop(kernel);
    Ok(())
}

/// What was announced last, and what this node's object said before.
#[derive(Debug, PartialEq)]
struct Said {
    before: Arc<PeerNode>,
    announcement: Announcement,
    for_flannel: bool,
}

/// Tells others: the apiserver by annotations, runtimes by the network list, callers by health.
struct Publisher {
    client: Client,
    config: Config,
    health: watch::Sender<Health>,
}

impl Publisher {
    async fn run(
        self,
        mut snapshots: watch::Receiver<Snapshot>,
        mut reports: watch::Receiver<Report>,
    ) {
        let mut retry = None;
        let mut wait = RETRY_FIRST;
        let mut keep = None;
        let mut said = None;
        loop {
            // Each arm is cancel-safe: a watch keeps its newest value, a sleep has no effect.
            tokio::select! {
                changed = snapshots.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    keep.get_or_insert_with(|| tokio::time::Instant::now() + KEEP_AFTER);
                }
                changed = reports.changed() => if changed.is_err() { return },
                () = sleep_until(retry) => {}
                () = sleep_until(keep) => {
                    keep = None;
                    self.keep(&snapshots.borrow());
                    continue;
                }
            }
            let snapshot = snapshots.borrow_and_update().clone();
            let report = reports.borrow_and_update().clone();
            let due = retry.is_none_or(|at| tokio::time::Instant::now() >= at);
            let mut unpublished = self.health.borrow().unpublished.clone();
            if due {
                unpublished = self.publish(&snapshot, &report, &mut said).await.err();
                if let Some(why) = &unpublished {
                    warn!("Cannot publish: {why}");
                    retry = Some(tokio::time::Instant::now() + wait);
                    wait = (wait * 2).min(RETRY_LONGEST);
                } else {
                    retry = None;
                    wait = RETRY_FIRST;
                }
            }
            let unlisted = self.list(&report, unpublished.is_none());
            self.health.send_replace(Health {
                listed: snapshot.complete,
                nodes: snapshot.nodes.len(),
                report,
                unpublished,
                unlisted,
            });
        }
    }

    /// Keeps the nodes for a restart while the apiserver is away.
    fn keep(&self, snapshot: &Snapshot) {
        if !snapshot.complete {
            return;
        }
        let dir = &self.config.kernel.state_dir;
        if let Err(problem) = memory::save(dir, &self.config.node_name, snapshot) {
            warn!("Cannot keep the nodes: {:#}", anyhow::Error::new(problem));
        }
    }

    /// Sets this node's annotations, unless they say it already.
    async fn publish(
        &self,
        snapshot: &Snapshot,
        report: &Report,
        said: &mut Option<Said>,
    ) -> Result<(), String> {
        let (Some(own), Some(announcement)) = (&snapshot.own, &report.announcement) else {
            return Ok(());
        };
        let for_flannel = match self.config.flannel_annotations {
            FlannelAnnotations::Always => true,
            FlannelAnnotations::Never => false,
            FlannelAnnotations::Auto => snapshot.nodes.values().any(|node| node.flannel),
        };
        if says(own, announcement, for_flannel) {
            return Ok(());
        }
        // What was said comes back with the next list of nodes; until this node's object has
        // changed, once is enough.
        let said_now = Said {
            before: Arc::clone(own),
            announcement: announcement.clone(),
            for_flannel,
        };
        if said.as_ref() == Some(&said_now) {
            return Ok(());
        }
        let changes = announcement.changes(for_flannel);
        let annotated = api::annotate(&self.client, &own.name, &changes).await;
        annotated.map_err(|e| format!("{e:#}"))?;
        let endpoints = [announcement.endpoints.v4, announcement.endpoints.v6];
        for endpoint in endpoints.iter().flatten() {
            match endpoint.mac {
                Some(mac) => info!("Announced {} with {mac}", endpoint.address),
                None => info!("Announced {}", endpoint.address),
            }
        }
        *said = Some(said_now);
        Ok(())
    }

    /// Puts the network list in place once pods can be served; it is never taken away.
    fn list(&self, report: &Report, published: bool) -> Option<String> {
        if report.announcement.is_none() || !report.state_written {
            return Some("no network list yet: this node's podCIDR is not known".into());
        }
        if !published {
            return None;
        }
        match self.config.list.ensure() {
            Ok(true) => info!("Wrote the network list"),
            Ok(false) => {}
            Err(problem) => return Some(format!("{:#}", anyhow::Error::new(problem))),
        }
        None
    }
}

async fn sleep_until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Whether the node's annotations say this already.
fn says(own: &PeerNode, announcement: &Announcement, for_flannel: bool) -> bool {
    let vni = match announcement.backend {
        Backend::Vxlan => Some(announcement.vni),
        Backend::HostGw => own.vni,
    };
    own.backend.as_deref() == Some(announcement.backend.as_str())
        && own.endpoints == announcement.endpoints
        && own.vni == vni
        && own.flannel == for_flannel
        && own.announced
}
