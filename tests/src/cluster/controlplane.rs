//! etcd, kube-apiserver, kube-controller-manager, kube-scheduler and the image registry.

use super::Lab;
use super::layout::{Family, Layout};
use super::state::write_file;
use crate::process::{ProcessSpec, until};
use crate::progress::Step;
use crate::{artefacts, paths};
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Longest wait for a part of the control plane; it takes 5 s on an idle machine.
const START_LIMIT: Duration = Duration::from_secs(120);

/// Grants what the control plane's own users lack by default.
pub(super) const ACCESS: &str = include_str!("access.yaml");

/// Starts what does not run yet and waits until the apiserver is ready.
///
/// # Errors
/// When a program cannot be built or started, or does not become ready; the message names its log.
pub fn ensure(lab: &mut Lab) -> Result<()> {
    let etcd_dir = artefacts::go::etcd()?;
    let programs = lab.programs.clone();
    let mut step = Step::begin("control plane");
    let (layout, family) = (lab.layout.clone(), lab.state.family);
    lab.ensure_process("etcd", &etcd(&layout, &etcd_dir))?;
    lab.ensure_process("kube-apiserver", &apiserver(&layout, &programs, family))?;
    lab.ensure_process("registry", &registry(&layout)?)?;
    step.detail("waiting for the apiserver");
    wait_ready(lab)?;
    lab.ensure_process(
        "kube-controller-manager",
        &controller_manager(&layout, &programs, family),
    )?;
    lab.ensure_process("kube-scheduler", &scheduler(&layout, &programs))?;
    lab.kubectl.apply(ACCESS).context("grant access")?;
    // Pods cannot be created before the controller manager has made the default account.
    let account = [
        "wait",
        "--for=create",
        "serviceaccount/default",
        "--timeout=60s",
    ];
    lab.kubectl
        .run(&account)
        .context("wait for the controller manager")?;
    step.done(&layout.server());
    Ok(())
}

fn wait_ready(lab: &Lab) -> Result<()> {
    let alive = || {
        lab.require_alive("etcd")?;
        lab.require_alive("kube-apiserver")
    };
    until("the apiserver to become ready", START_LIMIT, alive, || {
        lab.kubectl.run(&["get", "--raw", "/readyz"])
    })?;
    Ok(())
}

fn flags(pairs: &[(&str, String)]) -> Vec<String> {
    pairs
        .iter()
        .map(|(name, value)| format!("--{name}={value}"))
        .collect()
}

fn pki(layout: &Layout, file: &str) -> String {
    layout.pki(file).display().to_string()
}

fn etcd(layout: &Layout, programs: &Path) -> ProcessSpec {
    let address = layout.control_address();
    let args = flags(&[
        ("name", layout.name.clone()),
        ("data-dir", layout.dir.join("etcd").display().to_string()),
        ("listen-client-urls", format!("https://{address}:2379")),
        ("advertise-client-urls", format!("https://{address}:2379")),
        ("listen-peer-urls", format!("https://{address}:2380")),
        (
            "initial-advertise-peer-urls",
            format!("https://{address}:2380"),
        ),
        (
            "initial-cluster",
            format!("{}=https://{address}:2380", layout.name),
        ),
        ("client-cert-auth", "true".into()),
        ("trusted-ca-file", pki(layout, "etcd-ca.crt")),
        ("cert-file", pki(layout, "etcd.crt")),
        ("key-file", pki(layout, "etcd.key")),
        ("peer-client-cert-auth", "true".into()),
        ("peer-trusted-ca-file", pki(layout, "etcd-ca.crt")),
        ("peer-cert-file", pki(layout, "etcd.crt")),
        ("peer-key-file", pki(layout, "etcd.key")),
        // A lab is thrown away; what counts is that two cores are not kept waiting for the disk.
        ("unsafe-no-fsync", "true".into()),
        ("log-level", "warn".into()),
    ]);
    ProcessSpec::new(programs.join("etcd"), args)
}

fn apiserver(layout: &Layout, programs: &Path, family: Family) -> ProcessSpec {
    let address = layout.control_address().to_string();
    let args = flags(&[
        ("advertise-address", address.clone()),
        ("bind-address", address.clone()),
        ("secure-port", "6443".into()),
        ("etcd-servers", format!("https://{address}:2379")),
        ("etcd-cafile", pki(layout, "etcd-ca.crt")),
        ("etcd-certfile", pki(layout, "apiserver-etcd-client.crt")),
        ("etcd-keyfile", pki(layout, "apiserver-etcd-client.key")),
        ("client-ca-file", pki(layout, "ca.crt")),
        ("tls-cert-file", pki(layout, "apiserver.crt")),
        ("tls-private-key-file", pki(layout, "apiserver.key")),
        (
            "kubelet-client-certificate",
            pki(layout, "apiserver-kubelet-client.crt"),
        ),
        (
            "kubelet-client-key",
            pki(layout, "apiserver-kubelet-client.key"),
        ),
        ("kubelet-certificate-authority", pki(layout, "ca.crt")),
        // Node names do not resolve here.
        ("kubelet-preferred-address-types", "InternalIP".into()),
        (
            "service-account-issuer",
            "https://kubernetes.default.svc.cluster.local".into(),
        ),
        (
            "service-account-key-file",
            pki(layout, "service-account.crt"),
        ),
        (
            "service-account-signing-key-file",
            pki(layout, "service-account.key"),
        ),
        ("service-cluster-ip-range", layout.service_networks(family)),
        ("authorization-mode", "Node,RBAC".into()),
        ("enable-admission-plugins", "NodeRestriction".into()),
        ("allow-privileged", "true".into()),
        (
            "requestheader-client-ca-file",
            pki(layout, "front-proxy-ca.crt"),
        ),
        ("requestheader-allowed-names", "front-proxy-client".into()),
        ("requestheader-username-headers", "X-Remote-User".into()),
        ("requestheader-group-headers", "X-Remote-Group".into()),
        (
            "requestheader-extra-headers-prefix",
            "X-Remote-Extra-".into(),
        ),
        (
            "proxy-client-cert-file",
            pki(layout, "front-proxy-client.crt"),
        ),
        (
            "proxy-client-key-file",
            pki(layout, "front-proxy-client.key"),
        ),
        // The control plane runs no kube-proxy: aggregated servers are reached at their pods.
        ("enable-aggregator-routing", "true".into()),
        ("cert-dir", layout.dir.join("pki").display().to_string()),
    ]);
    ProcessSpec::new(programs.join("kube-apiserver"), args)
}

fn controller_manager(layout: &Layout, programs: &Path, family: Family) -> ProcessSpec {
    let kubeconfig = layout
        .dir
        .join("controller-manager.kubeconfig")
        .display()
        .to_string();
    let mut args = flags(&[
        ("kubeconfig", kubeconfig.clone()),
        ("authentication-kubeconfig", kubeconfig.clone()),
        ("authorization-kubeconfig", kubeconfig),
        ("bind-address", layout.control_address().to_string()),
        ("cluster-name", layout.name.clone()),
        ("cluster-signing-cert-file", pki(layout, "ca.crt")),
        ("cluster-signing-key-file", pki(layout, "ca.key")),
        ("root-ca-file", pki(layout, "ca.crt")),
        (
            "service-account-private-key-file",
            pki(layout, "service-account.key"),
        ),
        ("use-service-account-credentials", "true".into()),
        (
            "controllers",
            "*,bootstrap-signer-controller,token-cleaner-controller".into(),
        ),
        ("allocate-node-cidrs", "true".into()),
        ("cluster-cidr", layout.pod_networks(family)),
        ("service-cluster-ip-range", layout.service_networks(family)),
        // One replica: nobody to elect against.
        ("leader-elect", "false".into()),
        // The default of 20 requests a second would be what a burst of pods measures.
        ("kube-api-qps", "300".into()),
        ("kube-api-burst", "600".into()),
        ("cert-dir", layout.dir.join("pki").display().to_string()),
    ]);
    args.extend(match family {
        Family::Ipv4 => flags(&[("node-cidr-mask-size", "24".into())]),
        Family::Dual => flags(&[
            ("node-cidr-mask-size-ipv4", "24".into()),
            ("node-cidr-mask-size-ipv6", "64".into()),
        ]),
    });
    ProcessSpec::new(programs.join("kube-controller-manager"), args)
}

fn scheduler(layout: &Layout, programs: &Path) -> ProcessSpec {
    let kubeconfig = layout
        .dir
        .join("scheduler.kubeconfig")
        .display()
        .to_string();
    let args = flags(&[
        ("kubeconfig", kubeconfig.clone()),
        ("authentication-kubeconfig", kubeconfig.clone()),
        ("authorization-kubeconfig", kubeconfig),
        ("bind-address", layout.control_address().to_string()),
        ("leader-elect", "false".into()),
        ("kube-api-qps", "300".into()),
        ("kube-api-burst", "600".into()),
    ]);
    ProcessSpec::new(programs.join("kube-scheduler"), args)
}

/// The registry's storage is in the user's cache: what is in it is named by its content, and a
/// second lab need not push it again.
fn registry(layout: &Layout) -> Result<ProcessSpec> {
    let storage = paths::cache()?.join("registry");
    fs::create_dir_all(&storage).with_context(|| format!("create {}", storage.display()))?;
    let config = format!(
        "version: 0.1
log: {{level: warn, accesslog: {{disabled: true}}}}
storage:
  filesystem: {{rootdirectory: {}}}
  delete: {{enabled: true}}
http:
  addr: {}
",
        storage.display(),
        layout.registry()
    );
    let file = layout.dir.join("registry.yaml");
    write_file(&file, config.as_bytes(), 0o644)?;
    Ok(ProcessSpec::new(
        "/usr/bin/docker-registry",
        vec!["serve".into(), file.display().to_string()],
    ))
}
