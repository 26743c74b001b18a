//! Our network plugins beside real peers: driven by the specification's own command, in chains
//! with containernetworking's plugins, and next to them on one machine. Needs root and Go, no
//! cluster; every test has network namespaces of its own.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on shall stop")]

mod cni_bridge_beside_real_peers;
