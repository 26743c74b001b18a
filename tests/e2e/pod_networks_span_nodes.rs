//! The peer agents against a real apiserver, with the rights their manifests grant and no others:
//! nodes are network namespaces on the lab's bridge. The other node is flannel's own back end at
//! first, and migrates.

use anyhow::{Context, Result, ensure};
use rustix::thread::LinkNameSpaceType;
use serde_json::json;
use std::fs;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;
use testkit::artefacts::ours;
use testkit::cluster::bare::{BareNode, Site, ip};
use testkit::paths;
use testkit::process::until;
use testkit::scenario::{LIMIT, Scenario};

/// The nodes of this file.
fn node(scenario: &Scenario, dir: &Path, number: u8) -> Result<BareNode> {
    let site = Site {
        layout: &scenario.layout,
        admin: &scenario.admin,
        dir,
        prefix: "span",
        first_address: 220,
    };
    BareNode::new(site, number)
}

/// A pod by hand: flannel leaves this to other plugins.
fn add_plain_pod(node: &BareNode) -> Result<()> {
    let (pod, gateway) = (node.pod(), node.pod_cidr.replace(".0/24", ".1"));
    let address = format!("{}/24", node.pod_address());
    node.run(&[
        "ip", "link", "add", "pod0", "type", "veth", "peer", "name", "eth0", "netns", &pod,
    ])?;
    let own = format!("{gateway}/24");
    node.run(&["ip", "address", "add", &own, "dev", "pod0"])?;
    node.run(&["ip", "link", "set", "pod0", "up"])?;
    node.run(&["sysctl", "-qw", "net.ipv4.ip_forward=1"])?;
    let inside = |words: &[&str]| ip(&[&["-n", pod.as_str()], words].concat());
    inside(&["address", "add", &address, "dev", "eth0"])?;
    inside(&["link", "set", "eth0", "up"])?;
    inside(&["route", "add", "default", "via", &gateway])?;
    Ok(())
}

/// Datagrams from one node's pod to the other's, of the size given.
fn reaches(from: &BareNode, to: &BareNode, bytes: usize) -> Result<()> {
    let attempt = || datagram(&from.pod(), &to.pod(), &to.pod_address(), bytes);
    until("pods reach each other", LIMIT, || Ok(()), attempt)
        .with_context(|| format!("{} to {}: {}", from.name, to.name, from.log("agent")))
}

/// Does something in a named network namespace, in a thread of its own.
fn within<T: Send>(netns: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let file = fs::File::open(Path::new("/run/netns").join(netns))?;
    let enter = || {
        rustix::thread::move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
        work()
    };
    std::thread::scope(|scope| match scope.spawn(enter).join() {
        Ok(outcome) => outcome,
        Err(_) => anyhow::bail!("the thread in {netns} panicked"),
    })
}

/// Sends one datagram from a namespace to an address in another.
fn datagram(from: &str, to: &str, address: &str, bytes: usize) -> Result<()> {
    let receiver = within(to, || Ok(UdpSocket::bind("0.0.0.0:0")?))?;
    receiver.set_read_timeout(Some(Duration::from_millis(500)))?;
    let port = receiver.local_addr()?.port();
    within(from, || {
        let sender = UdpSocket::bind("0.0.0.0:0")?;
        Ok(sender.send_to(&vec![7; bytes], (address, port))?)
    })?;
    let mut buffer = vec![0; 65_536];
    ensure!(receiver.recv(&mut buffer)? == bytes, "cut off");
    Ok(())
}

/// The account of the manifest in deploy/, with the rights it has there.
fn account(scenario: &Scenario, dir: &Path) -> Result<PathBuf> {
    let manifest = paths::workspace().join("deploy/cni-vxlan/cni-vxlan.yaml");
    let manifest = fs::read_to_string(manifest)?;
    let rights: Vec<&str> = manifest.split("\n---\n").take(3).collect();
    scenario.admin.apply(&rights.join("\n---\n"))?;
    let token = ["create", "token", "cni-vxlan", "--namespace=kube-system"];
    let token = scenario.admin.run(&token)?;
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {
            "server": scenario.layout.server(),
            "certificate-authority": scenario.layout.pki("ca.crt"),
        }}],
        "users": [{"name": "u", "user": {"token": token.trim()}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    });
    let path = dir.join("agent.kubeconfig");
    fs::write(&path, config.to_string())?;
    Ok(path)
}

#[test]
fn a_cluster_of_flannel_migrates_node_by_node_and_no_pod_is_cut_off() -> Result<()> {
    let scenario = Scenario::begin("span")?;
    let programs = ours::peer_programs()?;
    let agent = programs.join("cni-vxlan-agent");
    let admin = scenario.layout.admin_kubeconfig();
    let dir = tempfile::tempdir()?;
    let net_conf = dir.path().join("net-conf.json");
    let network =
        json!({"Network": "10.250.0.0/16", "EnableNFTables": true, "Backend": {"Type": "vxlan"}});
    fs::write(&net_conf, network.to_string())?;
    let kubeconfig = account(&scenario, dir.path())?;
    let mut ours = node(&scenario, dir.path(), 1)?;
    let mut theirs = node(&scenario, dir.path(), 2)?;

    theirs.start_flannel(&admin, &net_conf)?;
    add_plain_pod(&theirs)?;
    ours.start_agent(&agent, &kubeconfig, &net_conf)?;
    ours.ready()?;
    ours.add_pod(&programs.join("cni-vxlan"))?;
    reaches(&ours, &theirs, 8).context(theirs.log("flannel"))?;
    reaches(&theirs, &ours, 8).context(theirs.log("flannel"))?;
    // What fits into 1450 bytes with the headers of IP and UDP.
    reaches(&ours, &theirs, 1422)?;

    // The second node migrates; the first is not touched.
    theirs.stop()?;
    ensure!(
        theirs.run(&["ip", "link", "show", "flannel.1"]).is_ok(),
        "flannel leaves its device"
    );
    theirs.start_agent(&agent, &kubeconfig, &net_conf)?;
    theirs.ready()?;
    ensure!(
        theirs.run(&["ip", "link", "show", "flannel.1"]).is_err(),
        "flannel's device stays"
    );
    reaches(&ours, &theirs, 8)?;
    reaches(&theirs, &ours, 8)?;

    // And back.
    ours.stop()?;
    ours.run(&["ip", "link", "delete", "fvx.1"])?;
    ours.start_flannel(&admin, &net_conf)?;
    reaches(&theirs, &ours, 8).context(ours.log("flannel"))?;
    reaches(&ours, &theirs, 8)?;

    // A node that leaves is forgotten.
    ours.stop()?;
    scenario.admin.run(&["delete", "node", &ours.name])?;
    let gone = || {
        let routes = theirs.run(&["ip", "route", "show", &ours.pod_cidr])?;
        ensure!(routes.trim().is_empty(), "{routes}");
        Ok(())
    };
    until(
        "the route to the node that left is gone",
        LIMIT,
        || Ok(()),
        gone,
    )?;
    Ok(())
}
