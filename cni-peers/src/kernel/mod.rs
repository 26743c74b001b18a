//! Brings this node's kernel to what `peers` plans: reads, plans, mends, tells. Every step is
//! idempotent and looks at the kernel anew; a step that fails is told and the others go on.

mod device;
mod settings;
mod thread;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cni::attach::rules::Rules;
use cni::firewall::{self, HostPorts};
use cni::records::Records;
use cni::types::CniError;
use cni_routed::PEER_ROUTE_PROTOCOL;
use cni_routed::state::{self, NodeState};
use linux::netlink::{Change, NetlinkError, Outcome, Rtnl, TABLE_MAIN};
use linux::nft::Nft;
use tracing::{info, warn};

use crate::netconf::{Backend, NetConf};
use crate::node::{Announcement, Family, PeerNode, PerFamily};
use crate::peers::{self, Indices, LinkFacts, Place, Skipped, Underlay, UnderlayWish, Wanted};

#[cfg(test)]
pub(crate) use thread::KernelThread;
pub(crate) use thread::spawn;

/// Changes that failed are logged one by one up to this many; the rest is counted.
const MAX_LOGGED_FAILURES: usize = 5;

/// Peers newly left out are named one by one up to this many; the rest is counted.
const MAX_LOGGED_SKIPPED: usize = 20;

/// What does not change while the agent runs.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) backend: Backend,
    pub(crate) conf: NetConf,
    /// `internal` is filled in from the Node.
    pub(crate) wish: UnderlayWish,
    pub(crate) state_dir: PathBuf,
    /// Where the plugin keeps its records.
    pub(crate) data_dir: PathBuf,
    /// Name of the network in the network list: rules are filed under it.
    pub(crate) network: String,
    pub(crate) masquerade: bool,
    /// The longest time without a look.
    pub(crate) resync: Duration,
    /// Room for events not yet heard, in bytes.
    pub(crate) event_buffer_bytes: usize,
}

/// The cluster's nodes at one moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Snapshot {
    pub(crate) own: Option<Arc<PeerNode>>,
    /// All nodes by name.
    pub(crate) nodes: BTreeMap<String, Arc<PeerNode>>,
    /// A full list was seen: what is not in it may be removed.
    pub(crate) complete: bool,
}

/// What came of one look.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Report {
    /// Why pods of this node do not reach everything they should; none when they do.
    pub(crate) trouble: Option<String>,
    /// For the other nodes, once it is known.
    pub(crate) announcement: Option<Announcement>,
    /// Pods can be given addresses.
    pub(crate) state_written: bool,
    /// Peers reached, once per family.
    pub(crate) reached: usize,
    pub(crate) skipped: Vec<Skipped>,
    pub(crate) mtu_bytes: Option<u32>,
    /// Changes made since the start: all, and those to mend what was complete before.
    pub(crate) changes: u64,
    pub(crate) repairs: u64,
    pub(crate) failures: u64,
    pub(crate) looks: u64,
    pub(crate) overruns: u64,
    /// How long this look took, in seconds.
    pub(crate) seconds: f64,
}

/// Why a step failed, for the log and `/readyz`.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KernelError {
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Sysctl(#[from] linux::sysctl::SysctlError),
    #[error(transparent)]
    State(#[from] state::StateError),
    #[error(transparent)]
    HostPorts(#[from] CniError),
    #[error("{0}")]
    Other(String),
}

impl KernelError {
    /// With all causes, joined by colons.
    fn told(&self) -> String {
        let mut text = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(source) = next {
            let _ = write!(text, ": {source}");
            next = source.source();
        }
        text
    }
}

/// Links whose events matter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Watched {
    /// The node's own, by which peers are reached.
    pub(crate) links: Vec<u32>,
    /// VXLAN devices of ours: their neighbours and forwarding entries matter too.
    pub(crate) devices: Vec<u32>,
}

/// Owns the sockets and the counters; used by one thread.
#[derive(Debug)]
pub(crate) struct Reconciler {
    settings: Settings,
    rtnl: Rtnl,
    nft: Nft,
    report: Report,
    /// The kernel was as wanted at the last look with these nodes: what differs now was altered by
    /// others.
    settled: bool,
    watched: Watched,
    said: String,
    said_skipped: Vec<Skipped>,
}

impl Reconciler {
    pub(crate) fn new(settings: Settings) -> Result<Self, NetlinkError> {
        Ok(Self {
            settings,
            rtnl: Rtnl::open()?,
            nft: Nft::open()?,
            report: Report::default(),
            settled: false,
            watched: Watched::default(),
            said: String::new(),
            said_skipped: Vec::new(),
        })
    }

    /// Links whose events matter.
    pub(crate) fn watched(&self) -> &Watched {
        &self.watched
    }

    /// The nodes changed: what differs now is no repair.
    pub(crate) fn unsettle(&mut self) {
        self.settled = false;
    }

    pub(crate) fn count_overrun(&mut self) {
        self.report.overruns += 1;
    }

    /// One look at everything.
    pub(crate) fn reconcile(&mut self, snapshot: &Snapshot) -> Report {
        let begun = Instant::now();
        let mut troubles = Vec::new();
        let changes = self.report.changes;
        self.report.skipped.clear();
        match &snapshot.own {
            Some(own) => self.keep(own, snapshot, &mut troubles),
            None if snapshot.complete => {
                troubles
                    .push("this node is not among the cluster's nodes (see --node-name)".into());
            }
            None => troubles.push("the nodes have not been listed yet".into()),
        }
        if self.settled {
            self.report.repairs += self.report.changes - changes;
        }
        self.settled = troubles.is_empty();
        self.report.looks += 1;
        self.report.trouble = (!troubles.is_empty()).then(|| troubles.join("; "));
        self.report.seconds = begun.elapsed().as_secs_f64();
        self.tell();
        self.report.clone()
    }

    /// Says what changed in words, once.
    fn tell(&mut self) {
        self.tell_skipped();
        let now = match &self.report.trouble {
            Some(trouble) => trouble.clone(),
            None => format!(
                "{} peer networks reached, MTU {}",
                self.report.reached,
                self.report.mtu_bytes.unwrap_or_default()
            ),
        };
        if now == self.said {
            return;
        }
        match &self.report.trouble {
            Some(trouble) => warn!("Not as it should be: {trouble}"),
            None => info!("The node's network is as it should be: {now}"),
        }
        self.said = now;
    }

    /// Names the peers that are left out now and were not before.
    fn tell_skipped(&mut self) {
        if self.report.skipped == self.said_skipped {
            return;
        }
        let known = &self.said_skipped;
        let new = self.report.skipped.iter().filter(|s| !known.contains(s));
        for Skipped { node, why } in new.clone().take(MAX_LOGGED_SKIPPED) {
            warn!("Left out: {node}: {why}");
        }
        let more = new.count().saturating_sub(MAX_LOGGED_SKIPPED);
        if more > 0 {
            warn!("Left out: {more} more peers");
        }
        self.said_skipped.clone_from(&self.report.skipped);
    }

    fn keep(&mut self, own: &PeerNode, snapshot: &Snapshot, troubles: &mut Vec<String>) {
        let underlays = match self.underlays(own) {
            Ok(underlays) => underlays,
            Err(error) => return troubles.push(error.told()),
        };
        let settings = self.settings.clone();
        let place = Place {
            backend: settings.backend,
            conf: &settings.conf,
            own,
            underlays: &underlays,
        };
        troubles.extend(place.lacking());
        if own.pod_cidrs.is_empty() {
            return;
        }
        for family in Family::BOTH {
            let used = peers::pod_cidr(own, family).is_some();
            if let Some(down) = underlays.of(family).as_ref().filter(|u| used && !u.up) {
                troubles.push(format!("interface {} is down", down.name));
            }
        }
        let indices = [&underlays.v4, &underlays.v6].into_iter().flatten();
        self.watched = Watched {
            links: indices.map(|underlay| underlay.index).collect(),
            devices: Vec::new(),
        };
        self.step(troubles, |this| this.keep_settings(&place));
        let indices = self.keep_devices(&place, troubles);
        let nodes = snapshot.nodes.values().map(Arc::as_ref);
        let wanted = peers::wanted(&place, &indices, nodes);
        let remove = snapshot.complete;
        self.step(troubles, |this| this.keep_tables(&wanted, &indices, remove));
        self.step(troubles, |this| this.keep_rules(own));
        self.report.reached = wanted.reached;
        self.report.skipped = wanted.skipped;
        self.report.announcement = Some(place.announcement());
        self.report.mtu_bytes = place.pod_mtu();
        if place.lacking().is_none()
            && let Some(mtu_bytes) = place.pod_mtu()
        {
            let state = NodeState {
                pod_cidrs: own.pod_cidrs.clone(),
                mtu_bytes,
            };
            self.step(troubles, |this| {
                if state::ensure(&this.settings.state_dir, &state)? {
                    this.report.changes += 1;
                }
                this.report.state_written = true;
                Ok(())
            });
        }
    }

    fn step(
        &mut self,
        troubles: &mut Vec<String>,
        work: impl FnOnce(&mut Self) -> Result<(), KernelError>,
    ) {
        if let Err(error) = work(self) {
            self.report.failures += 1;
            troubles.push(error.told());
        }
    }

    fn underlays(&mut self, own: &PeerNode) -> Result<PerFamily<Option<Underlay>>, KernelError> {
        let mut facts = LinkFacts {
            addresses: self.rtnl.addresses()?,
            ..LinkFacts::default()
        };
        let mut wish = self.settings.wish.clone();
        wish.internal.clone_from(&own.addresses);
        let has =
            |address: &std::net::IpAddr| facts.addresses.iter().any(|a| a.address == *address);
        // The table of routes can be long: asked only when it decides.
        let by_address = wish.internal.iter().all(has) && !wish.internal.is_empty();
        if wish.interface.is_none() && !by_address {
            facts.routes = self.rtnl.routes_of_table(TABLE_MAIN)?;
        }
        let mut indices: Vec<u32> = facts.addresses.iter().map(|a| a.index).collect();
        indices.sort_unstable();
        indices.dedup();
        for index in indices {
            facts.links.extend(self.rtnl.link_by_index(index)?);
        }
        // Our own devices have addresses too, and would be chosen by nobody's wish.
        facts
            .links
            .retain(|link| !link.alias.starts_with(peers::ALIAS));
        Ok(PerFamily {
            v4: peers::choose(Family::V4, &wish, &facts),
            v6: peers::choose(Family::V6, &wish, &facts),
        })
    }

    /// Makes the devices as planned and removes former ones.
    fn keep_devices(&mut self, place: &Place<'_>, troubles: &mut Vec<String>) -> Indices {
        let plans = place.devices();
        let mut indices = Indices::default();
        for plan in &plans {
            let flannel = place.own.flannel;
            match device::ensure(&mut self.rtnl, plan, flannel) {
                Ok(kept) => {
                    *indices.devices.of_mut(plan.family) = Some(kept.index);
                    self.watched.devices.push(kept.index);
                    self.report.changes += kept.changes;
                }
                Err(error) => {
                    self.report.failures += 1;
                    troubles.push(error.told());
                }
            }
        }
        self.step(troubles, |this| {
            let names: Vec<&str> = plans.iter().map(|plan| plan.spec.name.as_str()).collect();
            this.report.changes += device::remove_former(&mut this.rtnl, &names)?;
            let loopback = this.rtnl.link_by_name("lo")?;
            indices.loopback = loopback.map_or(1, |link| link.index);
            Ok(())
        });
        indices
    }

    fn keep_settings(&mut self, place: &Place<'_>) -> Result<(), KernelError> {
        self.report.changes += settings::keep_forwarding(place)?;
        Ok(())
    }

    /// Routes, neighbours and forwarding entries.
    fn keep_tables(
        &mut self,
        wanted: &Wanted,
        indices: &Indices,
        remove: bool,
    ) -> Result<(), KernelError> {
        let mut changes = Vec::new();
        for family in Family::BOTH {
            let Some(index) = *indices.devices.of(family) else {
                continue;
            };
            let found = self.rtnl.neighbours_of(index)?;
            changes.extend(peers::neighbour_changes(
                index,
                &wanted.neighbours,
                &found,
                remove,
            ));
            let found = self.rtnl.fdb_of(index)?;
            changes.extend(peers::fdb_changes(index, &wanted.fdb, &found, remove));
        }
        // Routes last: traffic goes where all else is ready.
        let found = self.rtnl.routes_of_protocol(PEER_ROUTE_PROTOCOL)?;
        changes.extend(peers::route_changes(&wanted.routes, &found, remove));
        self.carry_out(&changes)
    }

    fn carry_out(&mut self, changes: &[Change]) -> Result<(), KernelError> {
        let mut failed = 0;
        let mut first = None;
        for outcome in self.rtnl.apply_each(changes)? {
            match outcome {
                Ok(Outcome::Done) => self.report.changes += 1,
                Ok(Outcome::Unchanged) => {}
                Err(error) => {
                    failed += 1;
                    self.report.failures += 1;
                    let error = KernelError::from(error);
                    if failed <= MAX_LOGGED_FAILURES {
                        warn!("Refused: {}", error.told());
                    }
                    first.get_or_insert(error);
                }
            }
        }
        match first {
            None => Ok(()),
            Some(error) if failed == 1 => Err(error),
            Some(error) => {
                let told = error.told();
                Err(KernelError::Other(format!(
                    "{told} (and {} more)",
                    failed - 1
                )))
            }
        }
    }

    /// Puts back the host ports that the plugin has on record, as its network list configures them.
    fn repair_host_ports(&mut self, own: &PeerNode) -> Result<(), KernelError> {
        let ports = HostPorts::parse(&serde_json::Map::new())?;
        let rules = Rules {
            network: &self.settings.network,
            records: Records::of(&self.settings.data_dir, &self.settings.network),
            ports: &ports,
            admin_chain: None,
            subnets: own.pod_cidrs.clone(),
        };
        rules.repair()?;
        Ok(())
    }

    /// What leaves the pod networks gets the node's address, one static chain; outer packets are
    /// not tracked.
    fn keep_rules(&mut self, own: &PeerNode) -> Result<(), KernelError> {
        let prefix = firewall::masquerade_prefix(&self.settings.network);
        let mut wanted = Vec::new();
        let before = self.report.changes;
        if self.settings.backend == Backend::Vxlan {
            for chain in firewall::untracked(self.settings.conf.port) {
                if self.nft.ensure_chain(&chain)? {
                    self.report.changes += 1;
                }
                wanted.push(chain.name);
            }
        }
        if self.settings.masquerade {
            let networks = &self.settings.conf.networks;
            let chain = firewall::masquerade(&self.settings.network, &own.pod_cidrs, networks);
            if self.nft.ensure_chain(&chain)? {
                self.report.changes += 1;
            }
            wanted.push(chain.name);
        }
        if self.report.changes > before {
            // Whoever flushed these flushed the pods' host ports too.
            self.repair_host_ports(own)?;
        }
        if self.settled {
            return Ok(());
        }
        for name in self.nft.chains()? {
            let ours = name.starts_with(&prefix)
                || (self.settings.backend == Backend::Vxlan
                    && name.starts_with(firewall::UNTRACKED_PREFIX));
            if ours && !wanted.contains(&name) {
                self.nft.remove_chain(&name)?;
                self.report.changes += 1;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
