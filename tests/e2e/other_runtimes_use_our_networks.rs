//! The stock kubelet with the real containerd runs pods with each of our plugins.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::net::IpAddr;
use std::path::Path;
use testkit::artefacts::ours;
use testkit::cluster::Lab;
use testkit::cluster::spare::Spare;
use testkit::process::{ProcessSpec, until};
use testkit::scenario::{BUSYBOX, LIMIT, Scenario, SpareNode, text};

/// Before the network list that the lab wrote.
const LIST: &str = "00-ferrule.conflist";

/// A pod that the node's kubelet finds ready once it has reached it.
fn pod(node: &SpareNode, name: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  terminationGracePeriodSeconds: 1
  nodeName: {}
  containers:
  - name: main
    image: {BUSYBOX}
    command: [httpd, -f, -p, '80']
    ports: [{{containerPort: 80, hostPort: 8081}}]
    readinessProbe: {{tcpSocket: {{port: 80}}, periodSeconds: 1}}
",
        node.name
    )
}

struct Node<'a> {
    scenario: &'a Scenario,
    node: &'a SpareNode,
    /// The node's directories.
    dir: &'a Path,
}

impl Node<'_> {
    /// A pod comes up with an address of the network given, is reached by it and by a host port,
    /// and leaves nothing behind.
    fn runs_a_pod(&self, plugin: &str, network: &str) -> Result<()> {
        self.scenario.apply(&pod(self.node, plugin))?;
        let ready = self.scenario.ready(plugin)?;
        let address: IpAddr = text(&ready, "/status/podIP").parse()?;
        ensure!(
            within(address, network),
            "{plugin}: {address} is not of {network}"
        );
        let leases = format!("/run/cni/ferrule/{plugin}/leases");
        let held = self.node.agent.run(&["ls", &leases])?;
        ensure!(!held.trim().is_empty(), "{plugin} holds no lease");
        let host = text(&ready, "/status/hostIP");
        for to in [format!("{address}:80"), format!("{host}:8081")] {
            let asks = || {
                let url = format!("http://{to}/");
                let words = ["curl", "-s", "-o", "/dev/null", "--max-time", "2", &url];
                self.node.agent.run(&words)
            };
            until(&format!("{to} to answer"), LIMIT, || Ok(()), asks)?;
        }
        let delete = ["delete", "pod", plugin, "--wait=true"];
        self.scenario.kubectl(&delete)?;
        let gone = || {
            let held = self.node.agent.run(&["ls", &leases])?;
            ensure!(held.trim().is_empty(), "{plugin} still holds {held}");
            let pairs = self
                .node
                .agent
                .run(&["ip", "-o", "link", "show", "type", "veth"])?;
            let mark = format!("ferrule:{plugin}:");
            ensure!(!pairs.contains(&mark), "{pairs}");
            Ok(())
        };
        until(
            "the pod's address and pair to be gone",
            LIMIT,
            || Ok(()),
            gone,
        )
    }

    /// A peer agent writes the network list, then a pod runs.
    fn runs_a_pod_beside_an_agent(&self, plugin: &str, backend: &str) -> Result<()> {
        let lab = &self.scenario.layout;
        let programs = ours::peer_programs()?;
        fs::copy(
            programs.join(plugin),
            self.node.agent.inside("/opt/cni/bin")?.join(plugin),
        )?;
        let net_conf = self.dir.join("kubernetes/net-conf.json");
        let networks = json!({"Network": lab.pod_network(), "Backend": {"Type": backend}});
        fs::write(&net_conf, networks.to_string())?;
        let name = format!("{plugin}-agent");
        let words = [
            format!("--kubeconfig={}", lab.admin_kubeconfig().display()),
            format!("--node-name={}", self.node.name),
            "--net-conf=/etc/kubernetes/net-conf.json".to_owned(),
            format!("--cni-conf-name={LIST}"),
            format!("--network-name={plugin}"),
        ];
        let spec = ProcessSpec::new(programs.join(&name), words.to_vec());
        self.node.agent.start_program(&name, spec)?;
        let written = || {
            let list: Value =
                serde_json::from_slice(&fs::read(self.dir.join("cni-conf").join(LIST))?)?;
            ensure!(text(&list, "/name") == plugin, "the list is {list}");
            Ok(())
        };
        until("the network list", LIMIT, || Ok(()), written)?;
        let own = self.scenario.json(&["get", "node", &self.node.name])?;
        self.runs_a_pod(plugin, &text(&own, "/spec/podCIDR"))?;
        self.node.agent.kill_program(&name)
    }
}

fn within(address: IpAddr, network: &str) -> bool {
    // All networks here are /24.
    let part = |text: &str| text.rsplit_once('.').map(|(first, _)| first.to_owned());
    part(&address.to_string()) == part(network)
}

#[test]
fn the_stock_kubelet_with_containerd_runs_pods_with_each_of_our_plugins() -> Result<()> {
    let scenario = Scenario::begin("others")?;
    let node = scenario.spare_node(&Spare {
        stock: true,
        ..Spare::default()
    })?;
    let dir = Lab::open(&scenario.layout.name)?
        .layout
        .node_dir(&node.name);
    let bridge = ours::plugins()?.join("cni-bridge");
    fs::copy(bridge, dir.join("cni-bin/cni-bridge")).context("install cni-bridge")?;
    let list = json!({
        "cniVersion": "1.1.0",
        "name": "cni-bridge",
        "plugins": [{
            "type": "cni-bridge",
            "bridge": "fbr0",
            "isDefaultGateway": true,
            "ipMasq": true,
            "hairpinMode": true,
            "capabilities": {"portMappings": true},
            "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.77.3.0/24"}]]},
        }],
    });
    fs::write(dir.join("cni-conf").join(LIST), list.to_string())?;
    let on = Node {
        scenario: &scenario,
        node: &node,
        dir: &dir,
    };
    on.runs_a_pod("cni-bridge", "10.77.3.0/24")
        .context("cni-bridge")?;
    on.runs_a_pod_beside_an_agent("cni-hostgw", "host-gw")
        .context("cni-hostgw")?;
    on.runs_a_pod_beside_an_agent("cni-vxlan", "vxlan")
        .context("cni-vxlan")
}
