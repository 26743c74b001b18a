//! Services, in both ways kube-proxy writes them, and the names of the cluster: from pods on every
//! node, from the nodes, and from a machine beside the cluster.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::BTreeSet;
use testkit::cluster::{Lab, ProxyMode, addons};
use testkit::command::{self, command};
use testkit::process::until;
use testkit::scenario::{BUSYBOX, LIMIT, Scenario, text};

/// Has curl and dig.
const AGNHOST: &str = "registry.k8s.io/e2e-test-images/agnhost:2.63.0";

/// A web server on every node that tells its name and who asks, a client on every node, and
/// services of every kind before the servers.
fn manifests(namespace: &str) -> String {
    let server = r#"mkdir -p /w/cgi-bin && hostname > /w/index.html
        printf '#!/bin/sh\necho\necho $REMOTE_ADDR | tr -d []\n' > /w/cgi-bin/who && chmod +x /w/cgi-bin/who
        exec httpd -f -p 8080 -h /w"#;
    let server = Value::from(server);
    let set = |name: &str, image: &str, script: &Value| {
        format!(
            "apiVersion: apps/v1
kind: DaemonSet
metadata: {{name: {name}}}
spec:
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: main
        image: {image}
        command: [sh, -c, {script}]
---
"
        )
    };
    let service = |name: &str, spec: &str| {
        let ports = "ports: [{name: http, port: 80, targetPort: 8080}]";
        format!(
            "apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec: {{selector: {{app: web}}, {ports}, {spec}}}
---
"
        )
    };
    [
        set("web", BUSYBOX, &server),
        set("client", AGNHOST, &"exec sleep 100000".into()),
        service("plain", "type: ClusterIP"),
        service("sticky", "sessionAffinity: ClientIP"),
        service("headless", "clusterIP: None"),
        service("both", "type: NodePort, ipFamilyPolicy: PreferDualStack"),
        service("port", "type: NodePort"),
        service("local", "type: NodePort, externalTrafficPolicy: Local"),
        service("nobody", "type: ClusterIP").replace("app: web", "app: nobody"),
        format!(
            "apiVersion: v1
kind: Service
metadata: {{name: away}}
spec: {{type: ExternalName, externalName: plain.{namespace}.svc.cluster.local}}
"
        ),
    ]
    .concat()
}

/// A pod of the scenario and where it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    pod: String,
    address: String,
    address6: String,
    node: String,
    node_address: String,
}

struct Stage {
    scenario: Scenario,
    servers: Vec<Place>,
    clients: Vec<Place>,
}

impl Stage {
    fn set(scenario: Scenario) -> Result<Self> {
        scenario.apply(&manifests(&scenario.namespace))?;
        for set in ["daemonset/web", "daemonset/client"] {
            scenario.kubectl(&["rollout", "status", set, "--timeout=90s"])?;
        }
        let places = |app: &str| -> Result<Vec<Place>> {
            let pods = scenario.json(&["get", "pods", "-l", app])?;
            let pods = pods["items"].as_array().cloned().unwrap_or_default();
            let place = |pod: &Value| Place {
                pod: text(pod, "/metadata/name"),
                address: text(pod, "/status/podIP"),
                address6: text(pod, "/status/podIPs/1/ip"),
                node: text(pod, "/spec/nodeName"),
                node_address: text(pod, "/status/hostIP"),
            };
            Ok(pods.iter().map(place).collect())
        };
        let (servers, clients) = (places("app=web")?, places("app=client")?);
        ensure!(!servers.is_empty() && servers.len() == clients.len());
        Ok(Self {
            scenario,
            servers,
            clients,
        })
    }

    fn names(&self) -> BTreeSet<String> {
        self.servers.iter().map(|s| s.pod.clone()).collect()
    }

    /// What a command prints in a pod.
    fn run(&self, place: &Place, words: &[&str]) -> Result<String> {
        let exec = ["exec", place.pod.as_str(), "--"];
        let printed = self.scenario.kubectl(&[&exec[..], words].concat())?;
        Ok(printed.trim().to_owned())
    }

    /// A page, as a pod sees it.
    fn fetch(&self, place: &Place, url: &str) -> Result<String> {
        self.run(place, &["curl", "-sS", "--max-time", "5", url])
    }

    /// The pages that many requests of one pod get, by server.
    fn fetch_often(&self, place: &Place, url: &str, times: u32) -> Result<BTreeSet<String>> {
        let script =
            format!("for i in $(seq {times}); do curl -sS --max-time 5 {url} || exit; done");
        let pages = self.run(place, &["sh", "-c", &script])?;
        Ok(pages.lines().map(str::to_owned).collect())
    }

    fn field(&self, service: &str, pointer: &str) -> Result<Value> {
        let service = self.scenario.json(&["get", "service", service])?;
        let value = service.pointer(pointer).cloned();
        value.with_context(|| format!("{service} has no {pointer}"))
    }

    /// Everything at once: one stage is enough for it, and switching the proxy takes a while.
    fn check(&self) -> Result<()> {
        for client in &self.clients {
            let from = format!("from {}", client.node);
            self.names_resolve(client).context(from.clone())?;
            self.cluster_addresses(client).context(from.clone())?;
            self.node_ports(client).context(from)?;
        }
        self.hairpin()?;
        self.node_ports_from_beside()?;
        self.second_family().context("IPv6")
    }

    /// The same once more where nodes, pods and services have IPv6 addresses too.
    fn second_family(&self) -> Result<()> {
        let addresses = self.field("both", "/spec/clusterIPs")?;
        let Some(virtual_address) = addresses.get(1).and_then(Value::as_str) else {
            println!("IPv6 skipped: the lab has IPv4 only (cargo xtask up --ip-family dual)");
            return Ok(());
        };
        let port = self.field("both", "/spec/ports/0/nodePort")?;
        for client in &self.clients {
            let name = format!("both.{}.svc.cluster.local", self.scenario.namespace);
            let found = self.run(client, &["dig", "+short", "-t", "AAAA", &name])?;
            ensure!(found == virtual_address, "AAAA {name}: {found}");
            let seen = self.fetch_often(client, "-6 http://both/", 40)?;
            ensure!(seen == self.names(), "both: {seen:?}");
            let who = self.run(client, &["curl", "-sS6", "http://both/cgi-bin/who"])?;
            ensure!(who == client.address6, "{who}, not {}", client.address6);
        }
        for server in &self.servers {
            let node = self.scenario.json(&["get", "node", &server.node])?;
            let address = text(&node, "/status/addresses/1/address");
            let url = format!("http://[{address}]:{port}/");
            let page = command::stdout(&mut command("curl", &["-sSg", "--max-time", "5", &url]))?;
            ensure!(self.names().contains(page.trim()), "{url}: {page}");
        }
        Ok(())
    }

    fn names_resolve(&self, client: &Place) -> Result<()> {
        let zone = format!("{}.svc.cluster.local", self.scenario.namespace);
        let look = |kind: &str, name: &str| -> Result<BTreeSet<String>> {
            // As programs do, through the search list of resolv.conf.
            let answer = self.run(client, &["dig", "+short", "+search", "-t", kind, name])?;
            Ok(answer.lines().map(str::to_owned).collect())
        };
        let one = |answer: &str| BTreeSet::from([answer.to_owned()]);
        let expected = [
            (
                "A",
                "kubernetes.default".to_owned(),
                one(&self.scenario.layout.service_address(1).to_string()),
            ),
            (
                "A",
                "headless".to_owned(),
                self.servers.iter().map(|s| s.address.clone()).collect(),
            ),
            ("CNAME", "away".to_owned(), one(&format!("plain.{zone}."))),
            (
                "SRV",
                format!("_http._tcp.plain.{zone}"),
                one(&format!("0 100 80 plain.{zone}.")),
            ),
            ("A", format!("missing.{zone}."), BTreeSet::new()),
        ];
        for (kind, name, wanted) in expected {
            let found = look(kind, &name)?;
            ensure!(found == wanted, "{kind} {name}: {found:?}, not {wanted:?}");
        }
        Ok(())
    }

    fn cluster_addresses(&self, client: &Place) -> Result<()> {
        // The short name: what the search list of resolv.conf is for.
        let seen = self.fetch_often(client, "http://plain/", 40)?;
        ensure!(seen == self.names(), "plain: {seen:?}");
        let away = self.fetch(client, "http://away/")?;
        ensure!(self.names().contains(&away), "away: {away}");
        let seen = self.fetch_often(client, "http://sticky/", 20)?;
        ensure!(seen.len() == 1, "sticky: {seen:?}");
        let who = self.fetch(client, "http://plain/cgi-bin/who")?;
        ensure!(
            who.ends_with(&format!(":{}", client.address)),
            "the server saw {who}, not {}",
            client.address
        );
        let refused = self.fetch(client, "http://nobody/");
        let error = format!(
            "{:#}",
            refused.err().context("somebody answered for nobody")?
        );
        ensure!(
            error.contains("onnection refused") || error.contains("ouldn't connect"),
            "nobody: {error}"
        );
        Ok(())
    }

    fn node_ports(&self, client: &Place) -> Result<()> {
        let port = self.field("port", "/spec/ports/0/nodePort")?;
        for server in &self.servers {
            let url = format!("http://{}:{port}/", server.node_address);
            let page = self.fetch(client, &url)?;
            ensure!(self.names().contains(&page), "{url} from a pod: {page}");
            let node = self.scenario.agent(&client.node);
            let page = node.run(&["curl", "-sS", "--max-time", "5", &url])?;
            ensure!(
                self.names().contains(page.trim()),
                "{url} from a node: {page}"
            );
        }
        Ok(())
    }

    /// From a machine that is no node.
    fn node_ports_from_beside(&self) -> Result<()> {
        let beside = format!(":{}", self.scenario.layout.control_address());
        let fetch = |url: &str| -> Result<String> {
            let page = command::stdout(&mut command("curl", &["-sS", "--max-time", "5", url]))?;
            Ok(page.trim().to_owned())
        };
        let port = self.field("port", "/spec/ports/0/nodePort")?;
        let local = self.field("local", "/spec/ports/0/nodePort")?;
        for server in &self.servers {
            let page = fetch(&format!("http://{}:{port}/", server.node_address))?;
            ensure!(self.names().contains(&page), "port: {page}");
            let base = format!("http://{}:{local}/", server.node_address);
            let page = fetch(&base)?;
            ensure!(page == server.pod, "local on {}: {page}", server.node);
            let who = fetch(&format!("{base}cgi-bin/who"))?;
            ensure!(
                who.ends_with(&beside),
                "the server on {} saw {who}",
                server.node
            );
        }
        Ok(())
    }

    /// A pod that is behind a service reaches itself through it.
    fn hairpin(&self) -> Result<()> {
        let own = "apiVersion: v1
kind: Service
metadata: {name: own}
spec: {selector: {app: web, own: 'yes'}, ports: [{port: 80, targetPort: 8080}]}
";
        let server = self.servers.first().context("no server")?;
        self.scenario
            .kubectl(&["label", "--overwrite", "pod", &server.pod, "own=yes"])?;
        self.scenario.apply(own)?;
        let address = text(&self.field("own", "")?, "/spec/clusterIP");
        let ask = format!(r"printf 'GET / HTTP/1.0\r\n\r\n' | nc -w 5 {address} 80 | tail -n 1");
        let reach = || {
            let page = self.run(server, &["sh", "-c", &ask])?;
            ensure!(page == server.pod, "own: {page}");
            Ok(())
        };
        // The service is new: its rules are written within a second.
        until("a pod to reach itself", LIMIT, || Ok(()), reach)
    }
}

/// Puts kube-proxy back to the mode it had.
struct Restore {
    lab: String,
    mode: Option<ProxyMode>,
}

impl Drop for Restore {
    fn drop(&mut self) {
        let restored = Lab::open(&self.lab)
            .and_then(|mut lab| addons::set_proxy_mode(&mut lab, self.mode.unwrap_or_default()));
        if let Err(error) = restored {
            eprintln!("kube-proxy was not put back: {error:#}");
        }
    }
}

#[test]
fn services_and_names_lead_to_pods_from_everywhere_with_nftables_and_with_iptables() -> Result<()> {
    let stage = Stage::set(Scenario::alone("services")?)?;
    let lab = stage.scenario.layout.name.clone();
    let mode = Lab::open(&lab)?.state.proxy_mode;
    ensure!(
        mode.is_some(),
        "lab {lab} was brought up without kube-proxy"
    );
    let _restore = Restore {
        lab: lab.clone(),
        mode,
    };
    for mode in [ProxyMode::Nftables, ProxyMode::Iptables] {
        addons::set_proxy_mode(&mut Lab::open(&lab)?, mode)?;
        stage.check().with_context(|| format!("{mode:?}"))?;
    }
    Ok(())
}

#[test]
fn a_port_of_the_node_leads_to_its_pod_from_everywhere_and_goes_with_it() -> Result<()> {
    let scenario = Scenario::begin("host-port")?;
    let server = "apiVersion: v1
kind: Pod
metadata: {name: server}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: IMAGE
    args: [netexec, --http-port=8080, --udp-port=8081]
    ports:
    - {containerPort: 8080, hostPort: 18763}
    - {containerPort: 8081, hostPort: 18763, protocol: UDP}
";
    scenario.apply(&server.replace("IMAGE", AGNHOST))?;
    let pod = scenario.ready("server")?;
    let node = text(&pod, "/spec/nodeName");
    let host = text(&pod, "/status/hostIP");
    let client = server
        .replace("server", "client")
        .replace("18763", "18764")
        .replace("IMAGE", AGNHOST);
    scenario.apply(&client)?;
    scenario.ready("client")?;

    let url = format!("http://{host}:18763/hostname");
    let fetch = ["curl", "-sS", "--max-time", "5"];
    let from_pod = [&["exec", "client", "--"], &fetch[..], &[&url]].concat();
    let own = [&["exec", "server", "--"], &fetch[..], &[&url]].concat();
    let local = [&fetch[..], &["http://127.0.0.1:18763/hostname"]].concat();
    let agent = scenario.agent(&node);
    let udp = format!("echo hostname | nc -u -w 2 {host} 18763");
    let udp = ["exec", "client", "--", "sh", "-c", &udp];
    let beside = || command::stdout(command("curl", &["-sS", "--max-time", "5"]).arg(&url));
    for (from, answer) in [
        ("a pod", scenario.kubectl(&from_pod)),
        ("the pod itself", scenario.kubectl(&own)),
        ("the node, by loopback", agent.run(&local)),
        ("a pod, by UDP", scenario.kubectl(&udp)),
        ("a machine beside", beside()),
    ] {
        let answer = answer.with_context(|| format!("from {from}"))?;
        ensure!(answer.trim() == "server", "from {from}: {answer}");
    }
    scenario.kubectl(&["delete", "pod", "server"])?;
    ensure!(beside().is_err(), "somebody still answers at {url}");
    Ok(())
}
