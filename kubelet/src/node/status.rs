//! Keeps the Node's status true: registers, then computes it when something may have changed and
//! sends it when it did, or when the last report is old.
//!
//! ```text
//!  Unregistered --register--> Registered --Node deleted--> Unregistered
//!                                 |^ compute; send on change or every report period
//! ```
//!
//! Woken by: the watch of our own Node, the network configuration directory, troubles told by
//! other parts, the clock. The only writer of the Node.

use super::machine::{self, Machine};
use super::notify::PathWatch;
use super::{NodeHandle, conditions, object, register};
use crate::api::{Clients, REQUEST_TIMEOUT, within};
use crate::config::Config;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, NodeStatus};
use kube::api::{Api, Patch, PatchParams};
use runtime::service::{ImageService, RuntimeService};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use tracing::info;

/// First and longest wait between tries to register or to send.
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_LONGEST: Duration = Duration::from_secs(7);
/// While the node is not ready its state is looked at this often, where no event tells.
const NOT_READY_LOOK: Duration = Duration::from_secs(1);

/// The task's own things.
pub(super) struct Reporter<R> {
    pub(super) runtime: Arc<R>,
    pub(super) config: Arc<Config>,
    pub(super) clients: Clients,
    pub(super) handle: NodeHandle,
    pub(super) machine: Arc<Machine>,
    pub(super) registered: bool,
    pub(super) sent_at: Option<Instant>,
}

impl<R: RuntimeService + ImageService> Reporter<R> {
    /// Runs until told to stop.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let mut failures = 0u32;
        let mut said = String::new();
        let mut conf_dir = None;
        let mut nodes = self.handle.subscribe();
        let mut troubles = self.handle.subscribe_troubles();
        let mut pressures = self.handle.subscribe_pressures();
        let mut volumes = self.handle.subscribe_volumes();
        loop {
            if conf_dir.is_none() {
                conf_dir = PathWatch::directory(&self.config.cni_conf_dir).ok();
            }
            nodes.mark_unchanged();
            troubles.mark_unchanged();
            pressures.mark_unchanged();
            volumes.mark_unchanged();
            let status = self.compute();
            let wait = match self.step(&status).await {
                Ok(()) => {
                    failures = 0;
                    said.clear();
                    self.pause(&status)
                }
                Err(error) => {
                    failures += 1;
                    self.clients
                        .credentials
                        .complain("report the Node", &error, &mut said);
                    (RETRY_FIRST * 2u32.saturating_pow(failures.min(8))).min(RETRY_LONGEST)
                }
            };
            // Every arm is cancel-safe: a timer, watch channels, a kernel queue. While failing,
            // only the timer counts, so that an event storm cannot become a request storm.
            let quiet = failures > 0;
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
                Ok(()) = nodes.changed(), if !quiet => {}
                Ok(()) = troubles.changed(), if !quiet => {}
                Ok(()) = pressures.changed(), if !quiet => {}
                Ok(()) = volumes.changed(), if !quiet => {}
                () = conf_changed(&mut conf_dir), if !quiet => {}
            }
        }
    }

    /// Registers if need be, sends if due.
    async fn step(&mut self, status: &NodeStatus) -> Result<(), kube::Error> {
        if self.registered && self.handle.node().is_none() {
            info!("The Node is gone; registering it again");
            self.registered = false;
        }
        if !self.registered {
            let node =
                register::register(&self.clients, &self.config, &self.machine, status).await?;
            self.handle.learn(node);
            self.registered = true;
        }
        if self.due(status) {
            let node = self.send(status).await?;
            self.log_readiness(status);
            self.handle.learn(node);
            self.sent_at = Some(Instant::now());
        }
        Ok(())
    }

    fn due(&self, status: &NodeStatus) -> bool {
        let old = self
            .sent_at
            .is_none_or(|at| at.elapsed() >= self.config.node_status_report_frequency);
        let known = self.handle.node().and_then(|n| n.status.clone());
        old || known.is_none_or(|have| object::differs(&have, status))
    }

    async fn send(&self, status: &NodeStatus) -> Result<Node, kube::Error> {
        let api: Api<Node> = Api::all(self.clients.heartbeat.clone());
        let patch = Patch::Strategic(object::status_patch(status));
        let params = PatchParams::default();
        let request = api.patch_status(&self.config.node_name, &params, &patch);
        match within(REQUEST_TIMEOUT, request).await {
            Err(kube::Error::Api(e)) if e.code == 404 => {
                // Deleted under us; the watch will say so too, but need not be first.
                self.handle.forget();
                Err(kube::Error::Api(e))
            }
            other => other,
        }
    }

    /// The status as it is now.
    fn compute(&self) -> NodeStatus {
        let imagefs = self.runtime.fs_usage().path;
        let usage = machine::usage(&self.config.root_dir, &imagefs);
        let network = self.runtime.network_ready();
        let verdicts = conditions::verdicts(&conditions::Inputs {
            machine: &self.machine,
            usage: &usage,
            thresholds: &self.config.eviction_hard,
            pressures: &self.handle.pressures(),
            network: &network,
            troubles: &self.handle.troubles(),
        });
        let before = self.handle.node();
        let before = before
            .as_ref()
            .and_then(|n| n.status.as_ref()?.conditions.clone())
            .unwrap_or_default();
        object::status(object::StatusInputs {
            config: &self.config,
            machine: &self.machine,
            capacity: self.handle.capacity(),
            allocatable: self.handle.allocatable(),
            conditions: conditions::dated(verdicts, &before, Timestamp::now()),
            images: &self.runtime.list(),
            volumes_in_use: self.handle.volumes_in_use(),
        })
    }

    fn pause(&self, status: &NodeStatus) -> Duration {
        if readiness(status).is_some_and(|(ready, _)| ready) {
            self.config.node_status_update_frequency
        } else {
            NOT_READY_LOOK.min(self.config.node_status_update_frequency)
        }
    }

    fn log_readiness(&self, now: &NodeStatus) {
        let known = self.handle.node();
        let before = known.as_ref().and_then(|n| n.status.as_ref());
        let before = before.and_then(readiness);
        let Some((ready, message)) = readiness(now) else {
            return;
        };
        if before != Some((ready, message)) || self.sent_at.is_none() {
            if ready {
                info!("The node is ready");
            } else {
                info!("The node is not ready: {message}");
            }
        }
    }
}

/// The Ready condition of a status, with its message.
fn readiness(status: &NodeStatus) -> Option<(bool, &str)> {
    let conditions = status.conditions.as_ref()?;
    let ready = conditions.iter().find(|c| c.type_ == "Ready")?;
    Some((
        ready.status == "True",
        ready.message.as_deref().unwrap_or(""),
    ))
}

/// Resolves when the network configuration directory changed; never without a watch.
async fn conf_changed(watch: &mut Option<PathWatch>) {
    match watch {
        None => std::future::pending().await,
        Some(open) => {
            if open.changed().await.is_err() {
                *watch = None;
            }
        }
    }
}
