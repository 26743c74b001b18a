//! What an attachment has in the packet filter: host ports, a guarded hardware address, admission
//! through FORWARD. Recorded before it is made and forgotten after it is gone, under the network's
//! lock; see [`crate::records`].
//!
//! An attachment that wants none of it costs nothing here.

use std::net::IpAddr;

use ipnet::IpNet;
use linux::conntrack::Udp;
use linux::netlink::NetlinkError;
use linux::nft::Nft;

use crate::firewall::{self, Forward, HostPorts, PortRules, xtables};
use crate::ipam::Owner;
use crate::records::{Backend, Guard, Record, Records, RulesLock};
use crate::types::{CniError, ErrorCode};

const IPPROTO_UDP: u8 = 17;

/// The chain that the administrator may fill, unless `iptablesAdminChainName` names another.
pub const ADMIN_CHAIN: &str = "FERRULE-ADMIN";

/// The packet filter of one network, as far as it concerns attachments.
#[derive(Debug)]
pub struct Rules<'a> {
    /// Name of the network.
    pub network: &'a str,
    /// Where records are kept.
    pub records: Records,
    /// Host ports and their settings.
    pub ports: &'a HostPorts,
    /// The administrator's chain, when addresses are to be admitted through FORWARD of iptables.
    pub admin_chain: Option<&'a str>,
    /// Where the network's pods are.
    pub subnets: Vec<IpNet>,
}

/// A kernel's refusal as the specification wants it told.
fn kernel(error: &NetlinkError) -> CniError {
    CniError::caused(ErrorCode::Kernel, "change the node's packet filter", error)
}

fn records_failed(error: &std::io::Error) -> CniError {
    CniError::caused(
        ErrorCode::Io,
        "keep the record of an attachment's rules",
        error,
    )
}

/// Either kind of failure, while both are in play.
struct Failed(CniError);

impl From<NetlinkError> for Failed {
    fn from(error: NetlinkError) -> Self {
        Self(kernel(&error))
    }
}

impl Rules<'_> {
    /// Makes what an attachment with these addresses wants.
    ///
    /// # Errors
    /// Codes 100 and 5; [`Rules::remove`] undoes what was done.
    pub fn ensure(
        &self,
        owner: &Owner,
        addresses: &[IpNet],
        guard: Option<Guard>,
    ) -> Result<(), CniError> {
        let admitted: Vec<IpAddr> = match self.admin_chain {
            Some(_) => addresses.iter().map(IpNet::addr).collect(),
            None => Vec::new(),
        };
        let record = Record {
            owner: owner.clone(),
            forwards: self.ports.forwards(addresses),
            backend: self.ports.backend,
            guard,
            admitted,
        };
        if record.is_empty() && !self.records.has(owner) {
            return Ok(());
        }
        let lock = self.records.lock().map_err(|e| records_failed(&e))?;
        self.forget_former(&lock, &record)?;
        if record.is_empty() {
            return self
                .records
                .remove(&lock, owner)
                .map_err(|e| records_failed(&e));
        }
        self.records
            .put(&lock, &record)
            .map_err(|e| records_failed(&e))?;
        self.make(&lock, &record)
    }

    /// What an earlier ADD of this attachment made and this one does not want.
    fn forget_former(&self, lock: &RulesLock, record: &Record) -> Result<(), CniError> {
        let former = self.records.get(&record.owner);
        match former.map_err(|e| records_failed(&e))? {
            Some(former) if former != *record => self.unmake(lock, &former).map(|_| ()),
            Some(_) | None => Ok(()),
        }
    }

    fn make(&self, lock: &RulesLock, record: &Record) -> Result<(), CniError> {
        let owner = &record.owner;
        let mut nft = None;
        if !record.forwards.is_empty() {
            match record.backend {
                Backend::Nftables => {
                    let rules = PortRules::of(self.network, self.ports, &self.subnets)?;
                    let nft = opened(&mut nft)?;
                    let all = || self.all_forwards(lock).map_err(Failed);
                    let own = (owner, record.forwards.as_slice());
                    firewall::add_forwards(nft, self.network, &rules, own, all)
                        .map_err(|Failed(e)| e)?;
                }
                Backend::Iptables => {
                    let (ports, forwards) = (self.ports, &record.forwards);
                    xtables::add_forwards(self.network, owner, ports, forwards, &self.subnets)?;
                }
            }
        }
        if let Some(guard) = &record.guard {
            let nft = opened(&mut nft)?;
            let all = || self.all_guards(lock).map_err(Failed);
            firewall::ensure_guard(nft, guard, owner, all).map_err(|Failed(e)| e)?;
        }
        if let Some(chain) = self.admin_chain {
            xtables::admit(&record.admitted, chain)?;
        }
        // Connections that began before the port led here.
        forget_udp(&mut nft, &record.forwards, |forward| {
            Udp::SentTo(forward.host_port, forward.to)
        });
        Ok(())
    }

    fn unmake(&self, _lock: &RulesLock, record: &Record) -> Result<Option<Nft>, CniError> {
        let owner = &record.owner;
        let mut used = None;
        if record.backend == Backend::Iptables && !record.forwards.is_empty() {
            xtables::remove_forwards(self.network, owner, self.ports)?;
        }
        let by_nft = record.backend == Backend::Nftables && !record.forwards.is_empty();
        if by_nft || record.guard.is_some() {
            let mut nft = Nft::open().map_err(|e| kernel(&e))?;
            if by_nft {
                firewall::remove_forwards(&mut nft, self.network, owner, &record.forwards)
                    .map_err(|e| kernel(&e))?;
            }
            if let Some(guard) = &record.guard {
                firewall::remove_guard(&mut nft, guard, owner).map_err(|e| kernel(&e))?;
            }
            used = Some(nft);
        }
        if !record.admitted.is_empty() {
            xtables::expel(&record.admitted)?;
        }
        // Connections that would go on to whoever has the address next.
        forget_udp(&mut used, &record.forwards, |forward| {
            Udp::AnsweredBy(forward.to)
        });
        Ok(used)
    }

    fn all_forwards(&self, lock: &RulesLock) -> Result<Vec<(Owner, Vec<Forward>)>, CniError> {
        let all = self.records.all(lock).map_err(|e| records_failed(&e))?;
        let by_nft = all.into_iter().filter(|r| r.backend == Backend::Nftables);
        Ok(by_nft.map(|r| (r.owner, r.forwards)).collect())
    }

    fn all_guards(&self, lock: &RulesLock) -> Result<Vec<(Owner, Guard)>, CniError> {
        let all = self.records.all(lock).map_err(|e| records_failed(&e))?;
        let guarded = all.into_iter();
        Ok(guarded.filter_map(|r| Some((r.owner, r.guard?))).collect())
    }

    /// Takes away what an attachment has. Having nothing is success.
    ///
    /// Whoever closes a connection to nftables waits until the kernel has really freed what was
    /// removed, some 20 ms. So it is returned: let the links be removed, which takes as long, and
    /// drop it then.
    ///
    /// # Errors
    /// Codes 100 and 5; repeat then.
    pub fn remove(&self, owner: &Owner) -> Result<Option<Nft>, CniError> {
        if !self.records.has(owner) {
            return Ok(None);
        }
        let lock = self.records.lock().map_err(|e| records_failed(&e))?;
        let record = self.records.get(owner).map_err(|e| records_failed(&e))?;
        let used = match record {
            Some(record) => self.unmake(&lock, &record)?,
            None => None,
        };
        self.records
            .remove(&lock, owner)
            .map_err(|e| records_failed(&e))?;
        Ok(used)
    }

    /// Sees whether an attachment has what it wants.
    ///
    /// # Errors
    /// Code 101 naming the first difference, 100 when the kernel cannot be asked.
    pub fn check(
        &self,
        owner: &Owner,
        addresses: &[IpNet],
        guard: Option<&Guard>,
    ) -> Result<(), CniError> {
        let differs = |msg: String| Err(CniError::new(ErrorCode::StateDiffers, msg));
        let forwards = self.ports.forwards(addresses);
        if !forwards.is_empty() {
            match self.ports.backend {
                Backend::Nftables => {
                    let rules = PortRules::of(self.network, self.ports, &self.subnets)?;
                    let mut nft = Nft::open().map_err(|e| kernel(&e))?;
                    let own = (owner, forwards.as_slice());
                    let there = firewall::forwards_are_there(&mut nft, self.network, &rules, own);
                    if let Err(difference) = there.map_err(|e| kernel(&e))? {
                        return differs(difference);
                    }
                }
                Backend::Iptables => {
                    if !xtables::forwards_are_there(self.network, owner, &forwards)? {
                        return differs("iptables lacks the host ports".into());
                    }
                }
            }
        }
        if let Some(guard) = guard {
            let mut nft = Nft::open().map_err(|e| kernel(&e))?;
            if !firewall::guard_is_there(&mut nft, guard, owner).map_err(|e| kernel(&e))? {
                return differs(format!("port {} is not guarded", guard.port));
            }
        }
        if self.admin_chain.is_some() {
            let addresses: Vec<IpAddr> = addresses.iter().map(IpNet::addr).collect();
            if !xtables::are_admitted(&addresses)? {
                return differs("iptables does not admit the addresses".into());
            }
        }
        Ok(())
    }

    /// Puts back what others flushed, for all attachments on record. Cheap when all is there.
    ///
    /// # Errors
    /// Codes 100 and 5.
    pub fn repair(&self) -> Result<(), CniError> {
        if !self.records.any() {
            return Ok(());
        }
        let lock = self.records.lock().map_err(|e| records_failed(&e))?;
        let all = self.records.all(&lock).map_err(|e| records_failed(&e))?;
        let mut nft = Nft::open().map_err(|e| kernel(&e))?;
        let by_nft = |r: &&Record| r.backend == Backend::Nftables && !r.forwards.is_empty();
        if let Some(one) = all.iter().find(by_nft)
            && self.ports.backend == Backend::Nftables
        {
            let rules = PortRules::of(self.network, self.ports, &self.subnets)?;
            let restored = || self.all_forwards(&lock).map_err(Failed);
            let nothing = (&one.owner, [].as_slice());
            firewall::add_forwards(&mut nft, self.network, &rules, nothing, restored)
                .map_err(|Failed(e)| e)?;
        }
        if let Some((owner, guard)) = all.iter().find_map(|r| Some((&r.owner, r.guard.as_ref()?))) {
            let guards = || self.all_guards(&lock).map_err(Failed);
            firewall::ensure_guard(&mut nft, guard, owner, guards).map_err(|Failed(e)| e)?;
        }
        for record in &all {
            if record.backend == Backend::Iptables
                && !xtables::forwards_are_there(self.network, &record.owner, &record.forwards)?
            {
                let (ports, forwards) = (self.ports, &record.forwards);
                let (network, subnets) = (self.network, &self.subnets);
                xtables::add_forwards(network, &record.owner, ports, forwards, subnets)?;
            }
        }
        Ok(())
    }

    /// Takes away what belongs to nobody valid; with nobody left, the network's rules too. Goes on
    /// after a failure and tells the first.
    ///
    /// # Errors
    /// Codes 100 and 5; repeat then.
    pub fn collect(&self, is_valid: impl Fn(&Owner) -> bool, none: bool) -> Result<(), CniError> {
        let mut outcome = Ok(());
        if self.records.any() {
            let lock = self.records.lock().map_err(|e| records_failed(&e))?;
            let all = self.records.all(&lock).map_err(|e| records_failed(&e))?;
            for record in all.iter().filter(|record| !is_valid(&record.owner)) {
                let removed = self.unmake(&lock, record).and_then(|_| {
                    let removed = self.records.remove(&lock, &record.owner);
                    removed.map_err(|e| records_failed(&e))
                });
                outcome = outcome.and(removed);
            }
        }
        if none {
            let removed = Nft::open()
                .and_then(|mut nft| firewall::remove_port_rules(&mut nft, self.network))
                .map_err(|e| kernel(&e));
            outcome = outcome.and(removed);
        }
        outcome
    }
}

fn opened(nft: &mut Option<Nft>) -> Result<&mut Nft, CniError> {
    match nft {
        Some(nft) => Ok(nft),
        None => Ok(nft.insert(Nft::open().map_err(|e| kernel(&e))?)),
    }
}

/// UDP connections of former rules would keep going where they went. Failing to forget them is
/// not worth failing an ADD or DEL for: they pass with their time-out.
fn forget_udp(nft: &mut Option<Nft>, forwards: &[Forward], which: impl Fn(&Forward) -> Udp) {
    let of_udp = forwards.iter().filter(|f| f.protocol == IPPROTO_UDP);
    let mut which: Vec<Udp> = of_udp.map(which).collect();
    which.dedup();
    if which.is_empty() {
        return;
    }
    if let Ok(nft) = opened(nft) {
        let _ = nft.forget(&which);
    }
}
