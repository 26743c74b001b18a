//! A lab's addresses and file names, all computed from its name and its number. Pure.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

/// Highest lab number; keeps every derived network inside 10.0.0.0/8 and apart from the others.
pub const MAX_INDEX: u8 = 50;

/// Most nodes of one lab: node addresses start at .11 of a /24.
pub const MAX_NODES: usize = 100;

/// Which addresses nodes, pods and services have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    #[default]
    Ipv4,
    /// IPv4 first, and IPv6.
    Dual,
}

/// A lab and where everything of it lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The lab's name.
    pub name: String,
    /// The lab's number, which decides its addresses.
    pub index: u8,
    /// Everything the lab writes lies below.
    pub dir: PathBuf,
}

impl Layout {
    /// # Errors
    /// When the name cannot be part of a path, or the index is out of range.
    pub fn new(labs: &Path, name: &str, index: u8) -> Result<Self> {
        check_name(name)?;
        ensure!(
            index <= MAX_INDEX,
            "lab number {index} is above {MAX_INDEX}"
        );
        Ok(Self {
            name: name.to_owned(),
            index,
            dir: labs.join(name),
        })
    }

    /// Bridge all nodes and the control plane are on.
    #[must_use]
    pub fn bridge(&self) -> String {
        format!("ferrule{}", self.index)
    }

    /// Host end of a node's veth.
    #[must_use]
    pub fn veth(&self, node: usize) -> String {
        format!("ferrule{}n{node}", self.index)
    }

    /// Address of the control plane and the registry, on the bridge.
    #[must_use]
    pub fn control_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 99, self.index, 1)
    }

    /// Address of node number `node`, counted from 1.
    #[must_use]
    pub fn node_address(&self, node: usize) -> Ipv4Addr {
        Ipv4Addr::new(
            10,
            99,
            self.index,
            u8::try_from(10 + node).unwrap_or(u8::MAX),
        )
    }

    /// IPv6 address of the control plane.
    #[must_use]
    pub fn control_address6(&self) -> Ipv6Addr {
        self.address6(1)
    }

    /// IPv6 address of node number `node`.
    #[must_use]
    pub fn node_address6(&self, node: usize) -> Ipv6Addr {
        self.address6(u16::try_from(10 + node).unwrap_or(u16::MAX))
    }

    fn address6(&self, host: u16) -> Ipv6Addr {
        Ipv6Addr::new(0xfd99, u16::from(self.index), 0, 0, 0, 0, 0, host)
    }

    /// All addresses of a node, the first family first.
    #[must_use]
    pub fn node_addresses(&self, node: usize, family: Family) -> String {
        match family {
            Family::Ipv4 => self.node_address(node).to_string(),
            Family::Dual => format!("{},{}", self.node_address(node), self.node_address6(node)),
        }
    }

    /// `node-1`, `node-2`, …
    #[must_use]
    pub fn node_name(node: usize) -> String {
        format!("node-{node}")
    }

    /// All pods of the cluster; each node gets a /24 of it.
    #[must_use]
    pub fn pod_network(&self) -> String {
        match self.index {
            0 => "10.244.0.0/16".to_owned(),
            index => format!("10.{}.0.0/16", 128 + u16::from(index)),
        }
    }

    /// The networks of all pods, the first family first.
    #[must_use]
    pub fn pod_networks(&self, family: Family) -> String {
        match family {
            Family::Ipv4 => self.pod_network(),
            // Each node gets a /64 of it.
            Family::Dual => format!("{},fd98:{:x}::/48", self.pod_network(), self.index),
        }
    }

    /// The networks of all services, the first family first.
    #[must_use]
    pub fn service_networks(&self, family: Family) -> String {
        match family {
            Family::Ipv4 => self.service_network(),
            Family::Dual => format!("{},fd97:{:x}::/112", self.service_network(), self.index),
        }
    }

    /// Virtual addresses of services.
    #[must_use]
    pub fn service_network(&self) -> String {
        let [a, b, ..] = self.service_address(0).octets();
        format!("{a}.{b}.0.0/16")
    }

    /// The n-th service address: 1 is the apiserver's, 10 cluster DNS.
    #[must_use]
    pub fn service_address(&self, n: u8) -> Ipv4Addr {
        match self.index {
            0 => Ipv4Addr::new(10, 96, 0, n),
            index => Ipv4Addr::new(10, 180 + index, 0, n),
        }
    }

    /// The n-th IPv6 service address.
    #[must_use]
    pub fn service_address6(&self, n: u16) -> Ipv6Addr {
        Ipv6Addr::new(0xfd97, u16::from(self.index), 0, 0, 0, 0, 0, n)
    }

    /// The apiserver's URL.
    #[must_use]
    pub fn server(&self) -> String {
        format!("https://{}:6443", self.control_address())
    }

    /// The registry, as images name it.
    #[must_use]
    pub fn registry(&self) -> String {
        format!("{}:5000", self.control_address())
    }

    /// Record of what the lab is made of.
    #[must_use]
    pub fn state_file(&self) -> PathBuf {
        self.dir.join("lab.json")
    }

    /// Certificates and keys.
    #[must_use]
    pub fn pki(&self, file: &str) -> PathBuf {
        self.dir.join("pki").join(file)
    }

    /// The administrator's kubeconfig.
    #[must_use]
    pub fn admin_kubeconfig(&self) -> PathBuf {
        self.dir.join("admin.kubeconfig")
    }

    /// Log of a process.
    #[must_use]
    pub fn log(&self, process: &str) -> PathBuf {
        self.dir.join("logs").join(format!("{process}.log"))
    }

    /// Private directories of a node.
    #[must_use]
    pub fn node_dir(&self, node: &str) -> PathBuf {
        self.dir.join("nodes").join(node)
    }

    /// The node's cgroup as KubeletConfiguration names it.
    #[must_use]
    pub fn cgroup_root(&self, node: &str) -> String {
        format!("/{CGROUP_TOP}/{}/{node}", self.name)
    }
}

/// Every cgroup of every lab lies below this one.
pub const CGROUP_TOP: &str = "ferrule-lab";

/// Before anything is made for a lab: a name `down` refuses could not be cleaned up after.
pub(super) fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    ensure!(
        !name.is_empty() && name.len() <= 20 && name.chars().all(plain) && !name.starts_with('-'),
        "lab name {name:?} is not 1 to 20 lower-case letters, digits and dashes"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn no_two_labs_share_a_network_or_an_interface_name() {
        let mut seen = BTreeSet::new();
        for index in 0..=MAX_INDEX {
            let lab = Layout::new(Path::new("/x"), "a", index).unwrap();
            assert!(seen.insert(lab.pod_network()), "{}", lab.pod_network());
            assert!(
                seen.insert(lab.service_network()),
                "{}",
                lab.service_network()
            );
            assert!(seen.insert(lab.control_address().to_string()));
            assert!(lab.veth(MAX_NODES).len() < 16, "{}", lab.veth(MAX_NODES));
        }
    }

    #[test]
    fn a_name_that_could_leave_its_directory_is_refused() {
        for name in ["", "..", "a/b", "-x", "A", "aaaaaaaaaaaaaaaaaaaaaaaaa"] {
            assert!(Layout::new(Path::new("/x"), name, 0).is_err(), "{name}");
        }
    }
}
