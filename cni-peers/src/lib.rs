//! The node's peer agent: learns the cluster's nodes and keeps this node's kernel so that their
//! pods are reached. What `cni-vxlan-agent` and `cni-hostgw-agent` are made of.
//!
//! ```text
//!  apiserver ──nodes──▶ api ──Snapshot──▶ kernel thread ──Report──▶ api: own annotations
//!                                          ▲      │                  health: /readyz, /metrics
//!                    netlink events, 5 s ──┘      └▶ state file, network list
//! ```
//!
//! * `cli`, `netconf`: flags and flannel's net-conf.json, checked; a bad value names itself.
//! * `node`: what a Node object says, annotations of flannel included.
//! * `peers`: **pure**: nodes in, wanted devices, routes, neighbours and forwarding entries out;
//!   and the difference to what is there. No IO, no clock.
//! * `kernel`: the one thread that touches the network. Level-based: an event only wakes it, then
//!   it reads what is there, plans and mends, removals included.
//! * `memory`: the nodes as they were last known, for a restart while the apiserver is away.
//! * `api`: watches the nodes, publishes this node's annotations.
//! * `health`: the HTTP side.
//!
//! One tokio thread and one kernel thread. Without an apiserver the kernel is kept as the nodes
//! were last known. Nothing is removed that does not carry our route protocol number, our alias or
//! our table, and no peer before the first full list of nodes.

mod agent;
mod api;
mod cli;
mod conflist;
mod health;
mod kernel;
mod memory;
mod netconf;
mod node;
mod peers;

pub use agent::main;
pub use netconf::Backend;
