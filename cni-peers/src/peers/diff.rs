//! What to change so that the kernel holds what is wanted: strangers of ours first, then what is
//! missing or different. One table each, all the same shape.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use linux::netlink::{Change, FdbEntry, FdbSpec, Mac, Neighbour, NeighbourSpec, NodeRoute};

/// The routes that carry our protocol number against the wanted ones. A route that differs is
/// replaced in one step; one to a destination nobody wants is removed, when `remove` says so.
pub(crate) fn route_changes(
    wanted: &[NodeRoute],
    found: &[NodeRoute],
    remove: bool,
) -> Vec<Change> {
    type Key = (u32, IpAddr, u8, Option<u32>);
    let key = |route: &NodeRoute| -> Key {
        (
            route.table,
            route.destination,
            route.prefix_len,
            route.metric,
        )
    };
    let keys: HashSet<Key> = wanted.iter().map(key).collect();
    let there: HashSet<&NodeRoute> = found.iter().collect();
    let strangers = found
        .iter()
        .filter(|route| remove && !keys.contains(&key(route)));
    let removals = strangers.cloned().map(Change::RemoveNodeRoute);
    let missing = wanted.iter().filter(|route| !there.contains(route));
    let additions = missing.cloned().map(Change::SetNodeRoute);
    removals.chain(additions).collect()
}

/// The neighbours of one VXLAN device. Entries that age are the kernel's own.
pub(crate) fn neighbour_changes(
    index: u32,
    wanted: &[NeighbourSpec],
    found: &[Neighbour],
    remove: bool,
) -> Vec<Change> {
    let ours = wanted.iter().filter(|neighbour| neighbour.index == index);
    let ours: HashMap<IpAddr, Mac> = ours.map(|n| (n.address, n.mac)).collect();
    let there: HashMap<IpAddr, Option<Mac>> = found
        .iter()
        .filter(|neighbour| neighbour.permanent)
        .map(|neighbour| (neighbour.address, neighbour.mac))
        .collect();
    let mut changes = Vec::new();
    for (address, mac) in &there {
        if remove && !ours.contains_key(address) {
            changes.push(Change::RemoveNeighbour(NeighbourSpec {
                index,
                address: *address,
                mac: mac.unwrap_or(Mac([0; 6])),
            }));
        }
    }
    for neighbour in wanted.iter().filter(|neighbour| neighbour.index == index) {
        if there.get(&neighbour.address) != Some(&Some(neighbour.mac)) {
            changes.push(Change::SetNeighbour(neighbour.clone()));
        }
    }
    changes
}

/// The forwarding entries of one VXLAN device. What it learned itself ages and is left.
pub(crate) fn fdb_changes(
    index: u32,
    wanted: &[FdbSpec],
    found: &[FdbEntry],
    remove: bool,
) -> Vec<Change> {
    let mut there: HashMap<Mac, Vec<IpAddr>> = HashMap::new();
    for entry in found.iter().filter(|entry| entry.permanent) {
        let destinations = there.entry(entry.mac).or_default();
        destinations.extend(entry.destination);
    }
    let ours: HashMap<Mac, &FdbSpec> = wanted
        .iter()
        .filter(|entry| entry.index == index)
        .map(|entry| (entry.mac, entry))
        .collect();
    let mut removals = Vec::new();
    let mut additions = Vec::new();
    for (mac, destinations) in &there {
        let wanted = ours.get(mac).map(|entry| entry.destination);
        // One wrong destination is replaced in one step; of several the wrong ones go first.
        let replaced = wanted.is_some() && destinations.len() == 1;
        for destination in destinations {
            if remove && Some(*destination) != wanted && !replaced {
                removals.push(Change::RemoveFdb(FdbSpec {
                    index,
                    mac: *mac,
                    destination: *destination,
                }));
            }
        }
    }
    for entry in wanted.iter().filter(|entry| entry.index == index) {
        let known = there.get(&entry.mac);
        if !known.is_some_and(|known| known.contains(&entry.destination)) {
            additions.push(Change::SetFdb(entry.clone()));
        }
    }
    removals.extend(additions);
    removals
}
