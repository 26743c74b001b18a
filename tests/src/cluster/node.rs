//! A node: namespaces of its own held open by one process, private directories, its place on the
//! bridge, its certificate, and the agent. What belongs to one kind of node only is in
//! [`super::ferrule`] and [`super::stock`].

use super::layout::Layout;
use super::pki::{self, Authorities, Subject};
use super::state::{NodeKind, NodeRecord, write_file};
use super::{Lab, cgroup, ferrule, network, stock};
use crate::command::{command, stdout};
use crate::process::{self, ProcessSpec};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Gives the new namespaces a file system of their own: `/etc`, `/opt` and `/var` through an
/// overlay, so that nothing a node writes reaches the machine; real directories, which overlays of
/// containers need, bound over the places where kubelets and runtimes keep their state; `/sys` of
/// the node's own network namespace; and all of it shared from here on, as on a real node, so that
/// mounts can propagate into containers. A node with a disk of a given size has what kubelet and
/// runtime write on a tmpfs of that size, which can be filled without harm to anybody else.
const PREPARE_MOUNTS: &str = r#"
set -eu
dir=$1
for top in /etc /opt /var; do
    mkdir -p "$dir/overlay$top/upper" "$dir/overlay$top/work"
    mount -t overlay "node$top" -o \
        "lowerdir=$top,upperdir=$dir/overlay$top/upper,workdir=$dir/overlay$top/work" "$top"
done
mount -t tmpfs -o mode=755 tmpfs /run
disk=$dir
if [ -n "$6" ]; then
    mkdir -p "$dir/disk"
    mount -t tmpfs -o "mode=755,size=$6" disk "$dir/disk"
    disk=$dir/disk
fi
while read -r name place on; do
    from=$dir/$name
    if [ "$on" = disk ]; then from=$disk/$name; fi
    mkdir -p "$from" "$place"
    mount --bind "$from" "$place"
done <<'END'
kubernetes /etc/kubernetes
cni-conf /etc/cni/net.d
cni-bin /opt/cni/bin
kubelet /var/lib/kubelet disk
ferrule /var/lib/ferrule disk
cni /var/lib/cni
containerd /var/lib/containerd
pod-logs /var/log/pods disk
tmp /tmp
END
chmod 1777 /tmp
mkdir -p /run/cgroup /run/netns /run/lock
mount --rbind /sys/fs/cgroup /run/cgroup
mount -t sysfs sysfs /sys
mount --rbind /run/cgroup /sys/fs/cgroup
umount -l /run/cgroup
rmdir /run/cgroup
rm -f /etc/resolv.conf /etc/hosts /etc/machine-id
printf 'nameserver %s\n' "$3" > /etc/resolv.conf
printf '127.0.0.1 localhost\n%s %s\n' "$4" "$2" > /etc/hosts
printf '%s\n' "$2" > /etc/hostname
printf '%s' "$5-$2" | md5sum | cut -c1-32 > /etc/machine-id
echo 1 > /proc/sys/net/ipv4/ip_forward
[ ! -d /proc/sys/net/ipv6 ] || echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
mount --make-rshared /
"#;

/// What every part of setting up a node needs to know.
#[derive(Debug, Clone)]
pub struct NodeContext {
    /// The node's name.
    pub name: String,
    /// Its number from 1.
    pub number: usize,
    /// The process that holds its namespaces.
    pub holder: i32,
    /// Its directories.
    pub dir: PathBuf,
    /// Its cgroup in every hierarchy.
    pub cgroups: Vec<PathBuf>,
}

/// Who a node is and where its files are written.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The node's name.
    pub name: &'a str,
    /// Its number from 1, which decides its address.
    pub number: usize,
    /// Its directories.
    pub dir: &'a Path,
}

impl NodeContext {
    fn place(&self) -> Place<'_> {
        Place {
            name: &self.name,
            number: self.number,
            dir: &self.dir,
        }
    }
}

/// Makes the node (or completes it) and starts its agent if `agent` says so. It does not wait for
/// Ready.
///
/// # Errors
/// When a step fails; what was made stays recorded for `down`.
pub fn ensure(
    lab: &mut Lab,
    authorities: &Authorities,
    number: usize,
    kind: NodeKind,
    agent: bool,
) -> Result<()> {
    let name = Layout::node_name(number);
    let existing = lab.state.nodes.get(&name).map(|node| node.kind);
    anyhow::ensure!(
        existing.is_none_or(|existing| existing == kind),
        "{name} exists and is a {existing:?} node"
    );
    let record = NodeRecord {
        number,
        kind,
        holder: None,
        pod_networks: Vec::new(),
        disk_bytes: None,
    };
    lab.state.nodes.entry(name.clone()).or_insert(record);
    lab.save()?;
    let context = ensure_namespaces(lab, &name, number)?;
    network::ensure_node(&lab.layout, number, context.holder, lab.state.family)?;
    write_credentials(&lab.layout, authorities, &context.place())?;
    match kind {
        NodeKind::Ferrule => ferrule::ensure(lab, &context, agent),
        NodeKind::Stock => stock::ensure(lab, &context, agent),
    }
}

/// A node that is up.
///
/// # Errors
/// When the lab has no such node or its namespaces are gone.
pub fn existing(lab: &Lab, name: &str) -> Result<NodeContext> {
    let node = lab.state.nodes.get(name);
    let (number, holder) = node
        .and_then(|node| Some((node.number, node.holder.filter(|holder| holder.is_alive())?)))
        .with_context(|| format!("lab {} has no node {name} up", lab.layout.name))?;
    let dir = lab.layout.node_dir(name);
    let cgroups = cgroup::ensure_node(&lab.layout, name)?;
    Ok(NodeContext {
        name: name.into(),
        number,
        holder: holder.pid,
        dir,
        cgroups,
    })
}

fn ensure_namespaces(lab: &mut Lab, name: &str, number: usize) -> Result<NodeContext> {
    let dir = lab.layout.node_dir(name);
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let cgroups = cgroup::ensure_node(&lab.layout, name)?;
    let recorded = lab.state.nodes.get(name).and_then(|node| node.holder);
    if let Some(holder) = recorded.filter(|holder| holder.is_alive()) {
        return Ok(NodeContext {
            name: name.into(),
            number,
            holder: holder.pid,
            dir,
            cgroups,
        });
    }
    // Without its holder nothing of the node can be entered or trusted any more.
    remove_processes(lab, name)?;
    let owner = owner(&lab.layout, name);
    let log = lab.layout.log(&format!("{name}-namespaces"));
    let holder = process::spawn_namespace_holder(name, &owner, &log)?;
    let address = lab.layout.node_address(number).to_string();
    let control = lab.layout.control_address().to_string();
    let directory = dir.display().to_string();
    let target = holder.pid.to_string();
    let mut prepare = command(
        "nsenter",
        &["--target", &target, "--net", "--mount", "--uts", "--"],
    );
    prepare.args([
        "sh",
        "-c",
        PREPARE_MOUNTS,
        "sh",
        &directory,
        name,
        &control,
        &address,
    ]);
    let disk = lab.state.nodes.get(name).and_then(|node| node.disk_bytes);
    prepare.arg(&lab.layout.name);
    prepare.arg(disk.map_or_else(String::new, |bytes| bytes.to_string()));
    stdout(&mut prepare).with_context(|| format!("prepare the file system of {name}"))?;
    if let Some(node) = lab.state.nodes.get_mut(name) {
        node.holder = Some(holder);
    }
    lab.save()?;
    Ok(NodeContext {
        name: name.into(),
        number,
        holder: holder.pid,
        dir,
        cgroups,
    })
}

/// The owner variable of a node's processes.
#[must_use]
pub fn owner(layout: &Layout, node: &str) -> String {
    format!("{}/{node}", layout.name)
}

/// Kills every process of a node, whoever started it.
///
/// # Errors
/// When one survives.
pub fn remove_processes(lab: &Lab, node: &str) -> Result<()> {
    let limit = Duration::from_secs(30);
    let owner = owner(&lab.layout, node);
    for (process, _) in process::owned()
        .into_iter()
        .filter(|(_, name)| *name == owner)
    {
        process::kill(process, limit)?;
    }
    let mut dirs = cgroup::existing(Some(&lab.layout.name));
    for dir in &mut dirs {
        dir.push(node);
    }
    cgroup::kill_all(&dirs, limit)
}

/// The node's own certificate is the only way it can reach the apiserver: the Node authorizer and
/// NodeRestriction decide what it may do.
///
/// # Errors
/// When a certificate cannot be issued or a file not be written.
pub fn write_credentials(
    layout: &Layout,
    authorities: &Authorities,
    node: &Place<'_>,
) -> Result<()> {
    let user = format!("system:node:{}", node.name);
    let client = Subject::client(&user, Some("system:nodes"));
    let client = authorities
        .cluster
        .ensure_issued(layout, node.name, client)?;
    let names = [
        node.name.to_owned(),
        layout.node_address(node.number).to_string(),
        layout.node_address6(node.number).to_string(),
    ];
    let serving = Subject::server(&user, &names);
    let file = format!("{}-serving", node.name);
    let serving = authorities.cluster.ensure_issued(layout, &file, serving)?;
    let authority = &authorities.cluster.credentials.certificate;
    let dir = node.dir.join("kubernetes");
    let kubeconfig = pki::kubeconfig(layout, authority, &user, &client);
    write_changed(&dir.join("kubelet.kubeconfig"), &kubeconfig, 0o600)?;
    write_changed(&dir.join("pki/ca.crt"), authority, 0o644)?;
    write_changed(&dir.join("pki/kubelet.crt"), &serving.certificate, 0o644)?;
    write_changed(&dir.join("pki/kubelet.key"), &serving.key, 0o600)?;
    let configuration = kubelet_configuration(layout, node.name, "");
    write_changed(&dir.join("kubelet.yaml"), &configuration, 0o644)
}

/// Writes a file only when its content differs, so that watchers of it are not woken.
///
/// # Errors
/// When it cannot be written.
pub fn write_changed(path: &Path, content: &str, mode: u32) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == content.as_bytes()) {
        return Ok(());
    }
    write_file(path, content.as_bytes(), mode)
}

/// The node's KubeletConfiguration; `extra` is appended as further top-level fields.
///
/// The disk is the machine's, and how full that is says nothing about the lab: images are not
/// collected by percentage (100 switches that off), and pods are evicted by bytes.
#[must_use]
pub fn kubelet_configuration(layout: &Layout, node: &str, extra: &str) -> String {
    format!(
        "apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 0.0.0.0
port: 10250
healthzBindAddress: 127.0.0.1
healthzPort: 10248
authentication:
  anonymous: {{enabled: false}}
  webhook: {{enabled: true, cacheTTL: 2m0s}}
  x509: {{clientCAFile: /etc/kubernetes/pki/ca.crt}}
authorization: {{mode: Webhook}}
tlsCertFile: /etc/kubernetes/pki/kubelet.crt
tlsPrivateKeyFile: /etc/kubernetes/pki/kubelet.key
staticPodPath: /etc/kubernetes/manifests
clusterDNS: [{dns}]
clusterDomain: cluster.local
resolvConf: /etc/resolv.conf
cgroupDriver: cgroupfs
cgroupRoot: {cgroup_root}
failCgroupV1: false
failSwapOn: false
evictionHard: {{memory.available: 50Mi, nodefs.available: 500Mi, imagefs.available: 500Mi}}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
maxPods: 400
serializeImagePulls: false
{extra}",
        dns = layout.service_address(10),
        cgroup_root = layout.cgroup_root(node),
    )
}

/// Starts one of the node's own programs inside its namespaces and the cgroups of the agent.
///
/// # Errors
/// When it cannot be started.
pub fn ensure_agent(
    lab: &mut Lab,
    node: &NodeContext,
    process: &str,
    mut spec: ProcessSpec,
) -> Result<()> {
    spec.namespaces_of = Some(node.holder);
    for dir in &node.cgroups {
        let controller = dir
            .strip_prefix("/sys/fs/cgroup")
            .ok()
            .and_then(|rest| rest.iter().next());
        // Only hierarchies in which a kubelet makes groups of its own; the others stay untouched.
        let wanted = controller.is_some_and(|name| {
            [
                "cpu",
                "cpuacct",
                "memory",
                "pids",
                super::layout::CGROUP_TOP,
            ]
            .iter()
            .any(|wanted| name == *wanted)
        });
        if wanted {
            let agent = dir.join("agent");
            match fs::create_dir(&agent) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(error)
                        .with_context(|| format!("create cgroup {}", agent.display()));
                }
                _ => spec.cgroups.push(agent),
            }
        }
    }
    lab.ensure_process(&format!("{}/{process}", node.name), &spec)
}

/// Copies a program into the node when it differs, whole or not at all: one that runs is replaced
/// by name, never overwritten.
///
/// # Errors
/// When it cannot be copied.
pub fn install(program: &Path, place: &Path) -> Result<()> {
    let content = fs::read(program).with_context(|| format!("read {}", program.display()))?;
    if fs::read(place).is_ok_and(|old| old == content) {
        return Ok(());
    }
    write_file(place, &content, 0o755)
}

/// A command that runs inside the namespaces held by the process `holder`.
#[must_use]
pub fn enter(holder: i32, args: &[String]) -> Command {
    let target = holder.to_string();
    let mut nsenter = command(
        "nsenter",
        &["--target", &target, "--net", "--mount", "--uts", "--"],
    );
    nsenter.args(args);
    nsenter
}
