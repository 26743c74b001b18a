//! The pods' network: CNI as this engine uses it.
//!
//! Wraps [`cni::invoke::Networks`]: loads the network list anew when its directory changed,
//! turns a sandbox into an attachment, remembers whether the plugins are ready. Everything here
//! blocks (plugins are executed).

use crate::error::{chain, error};
use crate::sandbox::state::SandboxRecord;
use crate::service::{Result, RuntimeErrorKind};
use cni::invoke::{Attachment, AttachmentKey, Networks};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Interface in the pod.
const INTERFACE: &str = "eth0";

/// How long an answer about readiness is believed: plugins must be executed to ask.
const READY_AGE: Duration = Duration::from_secs(30);
/// How long a refusal is believed.
const UNREADY_AGE: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
struct State {
    networks: Option<Arc<Networks>>,
    readiness: Option<(Instant, std::result::Result<(), String>)>,
    pod_cidrs: Vec<String>,
}

/// The pods' network.
#[derive(Debug)]
pub struct Network {
    conf_dir: PathBuf,
    bin_dirs: Vec<PathBuf>,
    record_dir: PathBuf,
    state: Mutex<State>,
}

impl Network {
    /// Reads nothing yet.
    #[must_use]
    pub fn new(conf_dir: PathBuf, bin_dirs: Vec<PathBuf>, record_dir: PathBuf) -> Self {
        Self {
            conf_dir,
            bin_dirs,
            record_dir,
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The network list as it is now.
    fn networks(&self) -> std::result::Result<Arc<Networks>, String> {
        let mut state = self.lock();
        if let Some(current) = state.networks.as_ref().filter(|n| n.is_current()) {
            return Ok(Arc::clone(current));
        }
        let loaded = Networks::load(&self.conf_dir, &self.bin_dirs, &self.record_dir);
        let networks = Arc::new(loaded.map_err(|e| chain(&e))?);
        for rejected in networks.rejected() {
            tracing::warn!(error = %chain(rejected), "network configuration passed over");
        }
        state.networks = Some(Arc::clone(&networks));
        state.readiness = None;
        Ok(networks)
    }

    /// Whether there is a network to attach to; asked before anything is made.
    ///
    /// # Errors
    /// Class `Network`, naming the directory or the file.
    pub fn ensure_configured(&self) -> Result<()> {
        let loaded = self.networks().map(|_| ());
        loaded.map_err(|text| error(RuntimeErrorKind::Network, text))
    }

    /// Attaches a sandbox; its addresses, the primary one first.
    ///
    /// # Errors
    /// Class `Network`. Whatever was made must be released by [`Network::detach`].
    pub fn attach(&self, record: &SandboxRecord) -> Result<Vec<IpAddr>> {
        let refused = |text: String| error(RuntimeErrorKind::Network, text);
        let networks = self.networks().map_err(refused)?;
        let attachment = self.attachment(record);
        let attached = networks.add(&attachment);
        let attached = attached.map_err(|e| refused(chain(&e)))?;
        Ok(attached.ips.iter().map(|ip| ip.addr()).collect())
    }

    /// Releases a sandbox's attachment; idempotent.
    ///
    /// # Errors
    /// Class `Network`: it is still owed then.
    pub fn detach(&self, record: &SandboxRecord) -> Result<()> {
        let refused = |text: String| error(RuntimeErrorKind::Network, text);
        let networks = match self.networks() {
            Ok(networks) => networks,
            // The configuration is gone or broken: what was attached with it must still go.
            Err(text) => {
                let last = self.lock().networks.clone();
                last.ok_or_else(|| refused(text))?
            }
        };
        let attachment = self.attachment(record);
        networks.del(&attachment).map_err(|e| refused(chain(&e)))
    }

    /// Releases everything that belongs to none of these sandboxes.
    ///
    /// # Errors
    /// Class `Network`, after everything was tried.
    pub fn collect(&self, valid: impl FnOnce() -> Vec<String>) -> Result<usize> {
        let refused = |text: String| error(RuntimeErrorKind::Network, text);
        let networks = self.networks().map_err(refused)?;
        let keys = || {
            let key = |container_id| AttachmentKey {
                container_id,
                ifname: INTERFACE.to_owned(),
            };
            valid().into_iter().map(key).collect()
        };
        let report = networks.gc(keys).map_err(|e| refused(chain(&e)))?;
        Ok(report.detached.len())
    }

    /// Whether pods can be attached; else why not.
    ///
    /// # Errors
    /// A sentence for the Node's condition.
    pub fn ready(&self) -> std::result::Result<(), String> {
        let networks = self.networks()?;
        if let Some((when, outcome)) = &self.lock().readiness {
            let age = if outcome.is_ok() {
                READY_AGE
            } else {
                UNREADY_AGE
            };
            if when.elapsed() < age {
                return outcome.clone();
            }
        }
        let outcome = networks.status().map_err(|e| chain(&e));
        self.lock().readiness = Some((Instant::now(), outcome.clone()));
        outcome
    }

    /// Takes the pods' address ranges, for plugins that declare the capability `ipRanges`.
    pub fn set_pod_cidrs(&self, cidrs: &[String]) {
        self.lock().pod_cidrs = cidrs.to_vec();
    }

    fn attachment(&self, record: &SandboxRecord) -> Attachment {
        let config = &record.config;
        let cidrs = self.lock().pod_cidrs.clone();
        Attachment {
            container_id: record.id.0.clone(),
            netns: record.netns.clone().unwrap_or_default(),
            ifname: INTERFACE.to_owned(),
            pod_name: config.name.clone(),
            pod_namespace: config.namespace.clone(),
            pod_uid: config.uid.clone(),
            capability_args: capability_args(record, &cidrs),
        }
    }
}

/// Values for plugins that declared the capability (CNI CONVENTIONS.md).
fn capability_args(record: &SandboxRecord, cidrs: &[String]) -> BTreeMap<String, Value> {
    let config = &record.config;
    let mut args = BTreeMap::new();
    let port = |p: &crate::service::PortMapping| {
        json!({
            "hostPort": p.host_port,
            "containerPort": p.container_port,
            "protocol": p.protocol.to_ascii_lowercase(),
            "hostIP": p.host_ip,
        })
    };
    // Ports that are only declared have no port on the node.
    let mapped = config.port_mappings.iter().filter(|p| p.host_port > 0);
    let ports: Vec<Value> = mapped.map(port).collect();
    if !ports.is_empty() {
        args.insert("portMappings".to_owned(), Value::Array(ports));
    }
    if let Some(dns) = &config.dns {
        let value = json!({
            "servers": dns.servers, "searches": dns.searches, "options": dns.options,
        });
        args.insert("dns".to_owned(), value);
    }
    if !cidrs.is_empty() {
        let ranges: Vec<Value> = cidrs.iter().map(|c| json!([{"subnet": c}])).collect();
        args.insert("ipRanges".to_owned(), Value::Array(ranges));
    }
    args
}
