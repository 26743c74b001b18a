//! A large cluster: five thousand nodes that exist in the list only.

use std::time::{Duration, Instant};

use linux::netlink::{Change, TABLE_MAIN, VxlanConfig};

use super::lab::{Families, Lab, heals, link};
use crate::netconf::Backend;
use crate::node::{Announcement, Endpoint, Family, PeerNode, PerFamily, peer_node};
use crate::peers::vtep_mac;

const NODES: usize = 5000;

/// The bound; the programs under test are not optimised.
const CONVERGED: Duration = Duration::from_secs(5);

fn far_node(n: usize) -> PeerNode {
    let name = format!("far-{n}");
    let (high, low) = (n / 200, n % 200);
    let announcement = Announcement {
        backend: Backend::Vxlan,
        vni: 1,
        endpoints: PerFamily {
            v4: Some(Endpoint {
                address: format!("198.18.{high}.{low}").parse().unwrap(),
                mac: Some(vtep_mac(&name, 1, Family::V4)),
            }),
            v6: None,
        },
    };
    let annotations = announcement.changes(false).into_iter();
    let annotations = annotations
        .filter_map(|(key, value)| Some((key, value?)))
        .collect();
    let cidr = format!("10.{}.{}.0/24", 128 + n / 250, n % 250);
    peer_node(&name, &annotations, &[cidr], &[])
}

fn resident_kib() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn five_thousand_nodes_converge_in_time_with_a_tiny_event_buffer_and_bounded_memory() {
    let mut lab = Lab::with(2, Backend::Vxlan, Families::V4, |settings| {
        // The kernel doubles this; a handful of messages fit.
        settings.event_buffer_bytes = 2048;
    });
    let (one, two) = lab.pods();
    heals(&one, &two, "the start");
    let memory = resident_kib();
    let far: Vec<PeerNode> = (0..NODES).map(far_node).collect();
    let begun = Instant::now();
    lab.tell_with(&far);
    lab.nodes[0].wait(|report| report.reached == NODES + 1 && report.trouble.is_none());
    let took = begun.elapsed();
    eprintln!("{NODES} nodes converged after {took:?}");
    assert!(took < CONVERGED, "{took:?}");
    let mut rtnl = lab.nodes[0].rtnl();
    let device = link(&mut rtnl, "fvx.1");
    assert!(matches!(device.vxlan, Some(VxlanConfig { vni: 1, .. })));
    let count = |lab: &Lab| {
        let mut rtnl = lab.nodes[0].rtnl();
        let index = link(&mut rtnl, "fvx.1").index;
        let routes = rtnl.routes_of_table(TABLE_MAIN).unwrap();
        let far = routes
            .iter()
            .filter(|route| route.protocol == cni_routed::PEER_ROUTE_PROTOCOL);
        (
            far.count(),
            rtnl.fdb_of(index).unwrap().len(),
            rtnl.neighbours_of(index).unwrap().len(),
        )
    };
    // Ours, the near one's, the far ones'.
    assert_eq!(count(&lab), (NODES + 2, NODES + 1, NODES + 1));
    // A storm: the device with all its entries is gone, which is ten thousand events at once.
    let begun = Instant::now();
    rtnl.apply(&[Change::RemoveLink {
        name: "fvx.1".into(),
    }])
    .unwrap();
    heals(
        &one,
        &two,
        "the device was deleted among five thousand peers",
    );
    while count(&lab) != (NODES + 2, NODES + 1, NODES + 1) {
        assert!(begun.elapsed() < CONVERGED, "{:?}", count(&lab));
    }
    eprintln!("all are back after {:?}", begun.elapsed());
    let report = lab.nodes[0].wait(|report| report.trouble.is_none());
    assert!(
        report.overruns > 0,
        "the buffer was meant to overflow: {report:?}"
    );
    let grown = resident_kib().saturating_sub(memory);
    eprintln!("memory grew by {grown} KiB for two agents and the list itself");
    assert!(grown < 96 << 10, "{grown} KiB");
    // All but the near one leave.
    let begun = Instant::now();
    lab.tell();
    lab.nodes[0].wait(|report| report.reached == 1 && report.trouble.is_none());
    assert!(begun.elapsed() < CONVERGED);
    assert_eq!(count(&lab), (2, 1, 1));
}
