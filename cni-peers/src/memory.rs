//! The nodes as they were last known, on tmpfs: an agent that is started again while the apiserver
//! is away keeps the kernel as it should be. Nothing is removed by it: see `Snapshot::complete`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use ipnet::IpNet;
use linux::fs::{Durability, FsError, read_file, write_atomic};
use serde::{Deserialize, Serialize};

use crate::kernel::Snapshot;
use crate::node::{Endpoint, Family, PeerNode, PerFamily};

const FILE: &str = "nodes.json";
const VERSION: u32 = 1;
/// Some 300 bytes a node.
const MAX_BYTES: usize = 64 << 20;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    version: u32,
    own: String,
    nodes: Vec<WireNode>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireNode {
    name: String,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Vec<IpNet>,
    addresses: Vec<IpAddr>,
    backend: Option<String>,
    vni: Option<u32>,
    endpoints: Vec<WireEndpoint>,
    overwrite: Vec<IpAddr>,
    flannel: bool,
    announced: bool,
}

#[derive(Serialize, Deserialize)]
struct WireEndpoint {
    address: IpAddr,
    mac: Option<String>,
}

/// Keeps a full list.
///
/// # Errors
/// When it cannot be written.
pub(crate) fn save(dir: &Path, own: &str, snapshot: &Snapshot) -> Result<(), FsError> {
    let wire = Wire {
        version: VERSION,
        own: own.to_owned(),
        nodes: snapshot.nodes.values().map(|node| to_wire(node)).collect(),
    };
    // Plain values always serialise.
    let text = serde_json::to_vec(&wire).unwrap_or_default();
    linux::fs::create_dirs(dir, 0o755)?;
    write_atomic(&dir.join(FILE), &text, 0o600, Durability::Process)
}

/// The list that was kept for this node; none when there is none that can be used.
pub(crate) fn load(dir: &Path, own: &str) -> Option<Snapshot> {
    let bytes = read_file(&dir.join(FILE), MAX_BYTES).ok()?;
    parse(&bytes, own)
}

fn parse(bytes: &[u8], own: &str) -> Option<Snapshot> {
    let wire: Wire = serde_json::from_slice(bytes).ok()?;
    if wire.version != VERSION || wire.own != own {
        return None;
    }
    let nodes = wire.nodes.into_iter().map(from_wire);
    let nodes: BTreeMap<String, Arc<PeerNode>> = nodes
        .map(|node| (node.name.clone(), Arc::new(node)))
        .collect();
    Some(Snapshot {
        own: nodes.get(own).cloned(),
        nodes,
        complete: false,
    })
}

fn to_wire(node: &PeerNode) -> WireNode {
    let endpoints = Family::BOTH.iter().filter_map(|f| *node.endpoints.of(*f));
    let overwrite = Family::BOTH.iter().filter_map(|f| *node.overwrite.of(*f));
    WireNode {
        name: node.name.clone(),
        pod_cidrs: node.pod_cidrs.clone(),
        addresses: node.addresses.clone(),
        backend: node.backend.clone(),
        vni: node.vni,
        endpoints: endpoints
            .map(|endpoint| WireEndpoint {
                address: endpoint.address,
                mac: endpoint.mac.map(|mac| mac.to_string()),
            })
            .collect(),
        overwrite: overwrite.collect(),
        flannel: node.flannel,
        announced: node.announced,
    }
}

fn from_wire(wire: WireNode) -> PeerNode {
    let mut endpoints = PerFamily::default();
    for endpoint in wire.endpoints {
        let address = endpoint.address;
        let mac = endpoint.mac.and_then(|mac| mac.parse().ok());
        *endpoints.of_mut(Family::of(address)) = Some(Endpoint { address, mac });
    }
    let mut overwrite = PerFamily::default();
    for address in wire.overwrite {
        *overwrite.of_mut(Family::of(address)) = Some(address);
    }
    PeerNode {
        name: wire.name,
        pod_cidrs: wire.pod_cidrs.iter().map(IpNet::trunc).collect(),
        addresses: wire.addresses,
        backend: wire.backend,
        endpoints,
        vni: wire.vni,
        overwrite,
        flannel: wire.flannel,
        announced: wire.announced,
        complaint: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> Snapshot {
        let node = |name: &str, last: u8| {
            let mac = linux::netlink::Mac([2, 0, 0, 0, 0, last]);
            let address: IpAddr = [192, 0, 2, last].into();
            Arc::new(PeerNode {
                name: name.into(),
                pod_cidrs: vec![format!("10.244.{last}.0/24").parse().unwrap()],
                addresses: vec![address],
                backend: Some("vxlan".into()),
                endpoints: PerFamily {
                    v4: Some(Endpoint {
                        address,
                        mac: Some(mac),
                    }),
                    v6: None,
                },
                vni: Some(1),
                overwrite: PerFamily::default(),
                flannel: false,
                announced: true,
                complaint: None,
            })
        };
        let (own, peer) = (node("own", 1), node("peer", 2));
        Snapshot {
            own: Some(Arc::clone(&own)),
            nodes: BTreeMap::from([("own".into(), own), ("peer".into(), peer)]),
            complete: true,
        }
    }

    #[test]
    fn what_was_known_is_known_again_and_is_no_full_list() {
        let dir = tempfile::tempdir().unwrap();
        assert!(load(dir.path(), "own").is_none());
        save(dir.path(), "own", &snapshot()).unwrap();
        let loaded = load(dir.path(), "own").unwrap();
        assert_eq!(loaded.nodes, snapshot().nodes);
        assert_eq!(loaded.own, snapshot().own);
        assert!(!loaded.complete);
        assert!(load(dir.path(), "another").is_none());
    }

    #[test]
    fn a_file_cut_anywhere_is_as_good_as_none() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), "own", &snapshot()).unwrap();
        let text = std::fs::read(dir.path().join(FILE)).unwrap();
        for length in 0..text.len() {
            assert!(parse(&text[..length], "own").is_none(), "{length}");
        }
    }
}
