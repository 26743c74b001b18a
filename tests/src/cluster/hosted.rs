//! A node that runs its own control plane: etcd and kube-apiserver are static pods of a lab of one
//! node, as kubeadm makes them. Nothing but the node's agent is started from outside.
//!
//! The lab is made of the programs that another lab's node runs and pulls from that lab's
//! registry; it is taken down when the value is dropped.

use super::kubectl::Kubectl;
use super::node::{self, NodeContext};
use super::pki::{self, Authority, Subject};
use super::state::{NodeKind, write_file};
use super::{Lab, controlplane, ferrule, layout::Layout, network};
use crate::artefacts::{go, ours};
use crate::process::{self, ProcessIdentity, ProcessSpec};
use crate::{images, paths};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// The only node.
pub const NODE: &str = "node-1";

/// Where the node keeps certificates, as its pods see it.
const PKI: &str = "/etc/kubernetes/pki";

/// Longest time for an agent to die.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Files of the authorities and servers that go to the node.
const FILES: [&str; 12] = [
    "etcd-ca.crt",
    "etcd.crt",
    "etcd.key",
    "apiserver-etcd-client.crt",
    "apiserver-etcd-client.key",
    "apiserver.crt",
    "apiserver.key",
    "apiserver-kubelet-client.crt",
    "apiserver-kubelet-client.key",
    "service-account.crt",
    "service-account.key",
    "ca.crt",
];

/// A node that hosts its control plane.
#[derive(Debug)]
pub struct Hosted {
    /// kubectl as administrator of the hosted cluster.
    pub kubectl: Kubectl,
    layout: Layout,
    /// Of the lab whose programs and images are used.
    registry: String,
}

impl Drop for Hosted {
    fn drop(&mut self) {
        // A failure leaves what `cargo xtask down` of that name removes.
        drop(super::down(&self.layout.name));
    }
}

impl Hosted {
    /// Makes the node, without an agent. `host` is the lab whose programs it gets.
    ///
    /// # Errors
    /// When a step fails; what was made is removed.
    pub fn new(host: &Layout) -> Result<Self> {
        let name = format!("{}-h", host.name);
        super::down(&name).context("remove an earlier one")?;
        images::ensure_control_plane(&host.registry(), &paths::cache()?)?;
        let mut lab = Lab::open_or_new(&name)?;
        let hosted = Self {
            kubectl: Kubectl::new(&lab.programs, lab.layout.dir.join("hosted.kubeconfig")),
            layout: lab.layout.clone(),
            registry: host.registry(),
        };
        lab.ours = Some(programs(host)?);
        network::ensure_bridge(&lab.layout, lab.state.family)?;
        hosted.ensure_certificates()?;
        let authorities = pki::ensure_control_plane(&lab.layout)?;
        node::ensure(&mut lab, &authorities, 1, NodeKind::Ferrule, false)?;
        hosted.write_files()?;
        Ok(hosted)
    }

    /// The node's address, which is the apiserver's.
    #[must_use]
    pub fn address(&self) -> String {
        self.layout.node_address(1).to_string()
    }

    /// An address of the machine that the node reaches.
    #[must_use]
    pub fn machine_address(&self) -> String {
        self.layout.control_address().to_string()
    }

    /// A directory of the node as the machine sees it.
    #[must_use]
    pub fn directory(&self, name: &str) -> PathBuf {
        self.layout.node_dir(NODE).join(name)
    }

    /// The log of the agent.
    #[must_use]
    pub fn log(&self) -> String {
        let path = self.layout.log(&format!("{NODE}-kubelet"));
        fs::read_to_string(path).unwrap_or_default()
    }

    /// The apiserver's certificate names the node's address. Made first, and kept by all who come
    /// later.
    fn ensure_certificates(&self) -> Result<()> {
        let cluster = Authority::ensure(&self.layout, "ca")?;
        let names = [
            self.address(),
            "127.0.0.1".into(),
            "localhost".into(),
            self.layout.service_address(1).to_string(),
            "kubernetes.default.svc".into(),
        ];
        let subject = Subject::server("kube-apiserver", &names);
        cluster.ensure_issued(&self.layout, "apiserver", subject)?;
        Ok(())
    }

    /// Certificates, kubeconfigs that lead to the node itself, and the registry's name.
    fn write_files(&self) -> Result<()> {
        let kubernetes = self.directory("kubernetes");
        for file in FILES {
            let content =
                fs::read(self.layout.pki(file)).with_context(|| format!("read {file}"))?;
            write_file(&kubernetes.join("pki").join(file), &content, 0o600)?;
        }
        let own = format!("https://{}:6443", self.address());
        for (from, to) in [
            (
                self.layout.admin_kubeconfig(),
                self.layout.dir.join("hosted.kubeconfig"),
            ),
            (
                kubernetes.join("kubelet.kubeconfig"),
                kubernetes.join("own.kubeconfig"),
            ),
        ] {
            let text = fs::read_to_string(&from)
                .with_context(|| format!("read {}", from.display()))?
                .replace(&self.layout.server(), &own);
            write_file(&to, text.as_bytes(), 0o600)?;
        }
        let shim = self.directory("bin").join("pod-shim");
        let runtime = ferrule::runtime_configuration(&self.registry, &shim);
        write_file(&kubernetes.join("ferrule.yaml"), runtime.as_bytes(), 0o644)?;
        fs::create_dir_all(kubernetes.join("manifests"))?;
        Ok(())
    }

    /// Writes a manifest into the node's directory, by name, as an installer does.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_manifest(&self, name: &str, pod: &Value) -> Result<()> {
        let path = self.directory("kubernetes").join("manifests");
        let text = serde_json::to_string_pretty(pod)?;
        write_file(&path.join(format!("{name}.yaml")), text.as_bytes(), 0o600)
    }

    /// Starts the agent: alone, or with a kubeconfig. `extra` are further fields of its
    /// configuration.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, standalone: bool, extra: &str) -> Result<()> {
        let mut lab = Lab::open(&self.layout.name)?;
        let context = node::existing(&lab, NODE)?;
        let mut text = node::kubelet_configuration(&self.layout, NODE, extra);
        let mut flags = ferrule::agent_flags(NODE, &self.address());
        flags.retain(|flag| !flag.starts_with("--kubeconfig"));
        if standalone {
            text = text
                .replace(
                    "webhook: {enabled: true, cacheTTL: 2m0s}",
                    "webhook: {enabled: false}",
                )
                .replace("mode: Webhook", "mode: AlwaysAllow");
        } else {
            flags.push("--kubeconfig=/etc/kubernetes/own.kubeconfig".to_owned());
        }
        let file = self.directory("kubernetes").join("kubelet.yaml");
        write_file(&file, text.as_bytes(), 0o644)?;
        start(&mut lab, &context, flags)
    }

    /// Kills the agent the hard way.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&self) -> Result<()> {
        let lab = Lab::open(&self.layout.name)?;
        let record = lab.state.processes.get(&format!("{NODE}/kubelet"));
        let identity: ProcessIdentity = record
            .and_then(|record| record.identity)
            .context("the agent was never started")?;
        process::kill(identity, KILL_LIMIT)
    }

    /// Lets the apiserver use the agents' API, as installers do.
    ///
    /// # Errors
    /// When the apiserver refuses.
    pub fn grant_access(&self) -> Result<()> {
        self.kubectl.apply(controlplane::ACCESS).map(drop)
    }

    /// Kills the apiserver's process.
    ///
    /// # Errors
    /// When there is none.
    pub fn kill_apiserver(&self) -> Result<()> {
        let word = format!("--advertise-address={}", self.address());
        let found = process::all().into_iter().find(|process| {
            let line = fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
            line.starts_with(b"kube-apiserver") && String::from_utf8_lossy(&line).contains(&word)
        });
        process::kill(found.context("the apiserver does not run")?, KILL_LIMIT)
    }

    /// What the agent's HTTPS API shows under `/pods`, asked with the apiserver's certificate.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn pods(&self) -> Result<Value> {
        let pki = |file: &str| self.layout.pki(file).display().to_string();
        let mut curl = crate::command::command("curl", &["--silent", "--show-error", "--fail"]);
        curl.args(["--max-time", "5", "--cacert", &pki("ca.crt")])
            .args(["--cert", &pki("apiserver-kubelet-client.crt")])
            .args(["--key", &pki("apiserver-kubelet-client.key")])
            .arg(format!("https://{}:10250/pods", self.address()));
        let text = crate::command::stdout(&mut curl)?;
        serde_json::from_str(&text).context("the agent's list of pods is no JSON")
    }
}

fn start(lab: &mut Lab, context: &NodeContext, flags: Vec<String>) -> Result<()> {
    let mut spec = ProcessSpec::new(context.dir.join("bin/kubelet"), flags);
    spec.env.push(("RUST_BACKTRACE".into(), "1".into()));
    node::ensure_agent(lab, context, "kubelet", spec)
}

/// The programs that run on the first node of a lab.
fn programs(host: &Layout) -> Result<ours::Programs> {
    let dir = host.node_dir(NODE);
    let programs = ours::Programs {
        kubelet: dir.join("bin/kubelet"),
        pod_shim: dir.join("bin/pod-shim"),
        cni_bridge: dir.join("cni-bin/cni-bridge"),
    };
    anyhow::ensure!(programs.kubelet.is_file(), "{} has no node", host.name);
    // Known to be there, so that nobody builds them during a scenario.
    go::etcd()?;
    Ok(programs)
}

/// A static pod of the control plane as kubeadm writes it.
fn component(name: &str, command: &[String], volumes: &[(&str, &str)], probes: &Value) -> Value {
    let image = format!("registry.k8s.io/{}", images::control_plane_image(name));
    let mounts: Vec<Value> = volumes
        .iter()
        .map(|(name, path)| json!({"name": name, "mountPath": path}))
        .collect();
    let volumes: Vec<Value> = volumes
        .iter()
        .map(|(name, path)| {
            json!({"name": name, "hostPath": {"path": path, "type": "DirectoryOrCreate"}})
        })
        .collect();
    let mut container = json!({
        "name": name, "image": image, "imagePullPolicy": "IfNotPresent", "command": command,
        "resources": {"requests": {"cpu": "100m", "memory": "100Mi"}},
        "volumeMounts": mounts,
    });
    for (kind, probe) in probes.as_object().into_iter().flatten() {
        container[kind.as_str()] = probe.clone();
    }
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": "kube-system",
            "labels": {"component": name, "tier": "control-plane"},
        },
        "spec": {
            "hostNetwork": true,
            "priorityClassName": "system-node-critical",
            "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
            "volumes": volumes,
        },
    })
}

/// etcd, with its data on the node's disk.
#[must_use]
pub fn etcd() -> Value {
    let command = [
        "etcd",
        "--name=node-1",
        "--data-dir=/var/lib/etcd",
        "--listen-client-urls=https://127.0.0.1:2379",
        "--advertise-client-urls=https://127.0.0.1:2379",
        "--listen-peer-urls=https://127.0.0.1:2380",
        "--initial-advertise-peer-urls=https://127.0.0.1:2380",
        "--initial-cluster=node-1=https://127.0.0.1:2380",
        "--listen-metrics-urls=http://127.0.0.1:2381",
        "--client-cert-auth=true",
        "--trusted-ca-file=/etc/kubernetes/pki/etcd-ca.crt",
        "--cert-file=/etc/kubernetes/pki/etcd.crt",
        "--key-file=/etc/kubernetes/pki/etcd.key",
        "--peer-client-cert-auth=true",
        "--peer-trusted-ca-file=/etc/kubernetes/pki/etcd-ca.crt",
        "--peer-cert-file=/etc/kubernetes/pki/etcd.crt",
        "--peer-key-file=/etc/kubernetes/pki/etcd.key",
        "--unsafe-no-fsync=true",
        "--log-level=warn",
    ]
    .map(str::to_owned);
    let get = |path: &str| json!({"host": "127.0.0.1", "path": path, "port": 2381});
    let probes = json!({
        "livenessProbe": {"httpGet": get("/livez"), "periodSeconds": 10,
            "failureThreshold": 8, "timeoutSeconds": 15},
        "readinessProbe": {"httpGet": get("/readyz"), "periodSeconds": 1,
            "failureThreshold": 3, "timeoutSeconds": 15},
        "startupProbe": {"httpGet": get("/readyz"), "periodSeconds": 1,
            "failureThreshold": 120, "timeoutSeconds": 15},
    });
    let volumes = [("etcd-data", "/var/lib/etcd"), ("etcd-certs", PKI)];
    component("etcd", &command, &volumes, &probes)
}

impl Hosted {
    /// The apiserver, on the node's address.
    #[must_use]
    pub fn apiserver(&self) -> Value {
        let address = self.address();
        let pki = |flag: &str, file: &str| format!("--{flag}={PKI}/{file}");
        let command = [
            "kube-apiserver".to_owned(),
            format!("--advertise-address={address}"),
            "--secure-port=6443".to_owned(),
            "--allow-privileged=true".to_owned(),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            "--etcd-servers=https://127.0.0.1:2379".to_owned(),
            pki("etcd-cafile", "etcd-ca.crt"),
            pki("etcd-certfile", "apiserver-etcd-client.crt"),
            pki("etcd-keyfile", "apiserver-etcd-client.key"),
            pki("client-ca-file", "ca.crt"),
            pki("tls-cert-file", "apiserver.crt"),
            pki("tls-private-key-file", "apiserver.key"),
            pki("kubelet-client-certificate", "apiserver-kubelet-client.crt"),
            pki("kubelet-client-key", "apiserver-kubelet-client.key"),
            pki("kubelet-certificate-authority", "ca.crt"),
            "--kubelet-preferred-address-types=InternalIP".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_owned(),
            pki("service-account-key-file", "service-account.crt"),
            pki("service-account-signing-key-file", "service-account.key"),
            format!(
                "--service-cluster-ip-range={}",
                self.layout.service_network()
            ),
        ];
        let get =
            |path: &str| json!({"host": address, "path": path, "port": 6443, "scheme": "HTTPS"});
        let probes = json!({
            "livenessProbe": {"httpGet": get("/livez"), "periodSeconds": 10,
                "failureThreshold": 8, "timeoutSeconds": 15, "initialDelaySeconds": 10},
            "readinessProbe": {"httpGet": get("/readyz"), "periodSeconds": 1,
                "failureThreshold": 3, "timeoutSeconds": 15},
            "startupProbe": {"httpGet": get("/livez"), "periodSeconds": 1,
                "failureThreshold": 120, "timeoutSeconds": 15},
        });
        component("kube-apiserver", &command, &[("k8s-certs", PKI)], &probes)
    }
}
