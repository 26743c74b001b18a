//! Flags, and what follows from them. Raw flags and checked settings are two types.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;

use crate::conflist::NetworkList;
use crate::kernel::Settings;
use crate::netconf::{Backend, NetConf};
use crate::peers::UnderlayWish;

/// Keeps this node's part of the pod network: watches the cluster's nodes and reconciles devices,
/// routes, neighbours, rules and kernel parameters, on events and at intervals.
///
/// It runs on every node, as a DaemonSet with host network or as a service. When it ends, all it
/// made stays: pods go on talking.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, args_conflicts_with_subcommands = true)]
struct Flags {
    #[command(subcommand)]
    command: Option<Command>,

    /// Kubeconfig of the agent's credentials. Without it: the service account of the pod it runs
    /// in.
    #[arg(long, value_name = "FILE", env = "KUBECONFIG")]
    kubeconfig: Option<PathBuf>,

    /// Name of this node's Node object [default: the host's name].
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    node_name: Option<String>,

    /// The network: JSON with flannel's keys (net-conf.json). Example:
    /// {"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}
    /// Keys: Network, IPv6Network, EnableIPv4 (true), EnableIPv6 (false), Backend.Type,
    /// Backend.VNI (1), Backend.Port (8472), Backend.MTU (from the node's network),
    /// Backend.DirectRouting (false), Backend.Learning (false), Backend.GBP (false).
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/ferrule/net-conf.json",
        verbatim_doc_comment
    )]
    net_conf: PathBuf,

    /// Directory for the network list that runtimes read; written when this node is ready.
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,

    /// Name of the network list's file [default: 10-ferrule-<vxlan|host-gw>.conflist].
    #[arg(long, value_name = "NAME")]
    cni_conf_name: Option<String>,

    /// Name of the network in that list [default: ferrule-<vxlan|host-gw>].
    #[arg(long, value_name = "NAME")]
    network_name: Option<String>,

    /// Directory on tmpfs where the plugin finds this node's podCIDRs and MTU
    /// [default: /run/cni/ferrule-<vxlan|hostgw>].
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,

    /// Interface by which the other nodes are reached: a name or one of its addresses
    /// [default: the one with the Node's InternalIP, else the one of the default route].
    #[arg(long, value_name = "NAME|ADDRESS")]
    iface: Option<String>,

    /// IPv4 address that the other nodes shall use, where it differs from the interface's
    /// (address translation). The annotation flannel.alpha.coreos.com/public-ip-overwrite comes
    /// before it.
    #[arg(long, value_name = "ADDRESS")]
    public_ip: Option<IpAddr>,

    /// The same for IPv6.
    #[arg(long, value_name = "ADDRESS")]
    public_ipv6: Option<IpAddr>,

    /// Give what leaves the pod networks the node's address.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    ip_masq: bool,

    /// Write flannel's annotations too: "auto" does when a node of the cluster carries them.
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    flannel_annotations: FlannelAnnotations,

    /// Where /healthz, /readyz and /metrics are served; "off" for nowhere.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:9473")]
    listen: String,

    /// Longest time between two looks at the kernel, in seconds. Events cause looks at once.
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    resync_seconds: u64,

    /// Room for kernel events not yet heard, in bytes. When it overflows everything is looked at.
    #[arg(long, value_name = "BYTES", default_value_t = 8 << 20, hide = true)]
    event_buffer_bytes: usize,

    /// Log as JSON lines.
    #[arg(long)]
    log_json: bool,
}

/// Something else than keeping the node.
#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Put a plugin into the directory of a container runtime, by rename, and end.
    Install {
        /// The plugin.
        #[arg(long, value_name = "FILE")]
        from: PathBuf,
        /// The directory.
        #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
        to: PathBuf,
    },
}

/// What the command line asks for.
#[derive(Debug)]
pub(crate) enum Asked {
    /// Keep the node.
    Run(Box<Config>),
    /// Put a plugin in place.
    Install {
        /// The plugin.
        from: PathBuf,
        /// The directory.
        to: PathBuf,
    },
}

/// When flannel's annotations are written beside ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum FlannelAnnotations {
    /// When a node of the cluster carries some.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// Everything the agent was told, checked.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) kubeconfig: Option<PathBuf>,
    pub(crate) node_name: String,
    pub(crate) flannel_annotations: FlannelAnnotations,
    pub(crate) listen: Option<SocketAddr>,
    pub(crate) list: NetworkList,
    pub(crate) kernel: Settings,
    pub(crate) log_json: bool,
}

/// Reads the command line; ends the process for --help, --version and bad flags, as clap does.
///
/// # Errors
/// When a value cannot be used; the error names the flag or field.
pub(crate) fn asked(backend: Backend) -> Result<Asked> {
    let mut flags = Flags::parse();
    match flags.command.take() {
        Some(Command::Install { from, to }) => Ok(Asked::Install { from, to }),
        None => Ok(Asked::Run(Box::new(check(flags, backend)?))),
    }
}

fn check(flags: Flags, backend: Backend) -> Result<Config> {
    let node_name = match flags.node_name {
        Some(name) if !name.is_empty() => name,
        _ => host_name().context("find this node's name (see --node-name)")?,
    };
    for (flag, address, v4) in [
        ("--public-ip", flags.public_ip, true),
        ("--public-ipv6", flags.public_ipv6, false),
    ] {
        if let Some(address) = address.filter(|address| address.is_ipv4() != v4) {
            bail!("{flag} {address} is of the other family");
        }
    }
    let listen = match flags.listen.as_str() {
        "off" => None,
        text => {
            let problem =
                || format!("--listen {text:?} is neither an address and port nor \"off\"");
            Some(text.parse().with_context(problem)?)
        }
    };
    if !(1..=3600).contains(&flags.resync_seconds) {
        bail!(
            "--resync-seconds {} is not from 1 to 3600",
            flags.resync_seconds
        );
    }
    let conf = NetConf::load(&flags.net_conf, backend)?;
    let plugin = backend.plugin();
    let network = flags
        .network_name
        .unwrap_or_else(|| format!("ferrule-{backend}"));
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if !network.starts_with(|c: char| c.is_ascii_alphanumeric()) || !network.chars().all(plain) {
        bail!("--network-name {network:?} may hold only letters, digits, '.', '_', '-'");
    }
    let file = flags
        .cni_conf_name
        .unwrap_or_else(|| format!("10-ferrule-{backend}.conflist"));
    if file.contains('/') || !file.ends_with(".conflist") {
        bail!("--cni-conf-name {file:?} is no file name ending in .conflist");
    }
    let state_dir = flags.state_dir.unwrap_or_else(|| plugin.state_dir.into());
    if !state_dir.is_absolute() {
        bail!(
            "--state-dir {} is not an absolute path",
            state_dir.display()
        );
    }
    Ok(Config {
        kubeconfig: flags.kubeconfig,
        node_name,
        flannel_annotations: flags.flannel_annotations,
        listen,
        list: NetworkList::new(&flags.cni_conf_dir, &file, &network, plugin, &state_dir),
        kernel: Settings {
            backend,
            conf,
            wish: UnderlayWish {
                interface: flags.iface.filter(|iface| !iface.is_empty()),
                public: flags
                    .public_ip
                    .into_iter()
                    .chain(flags.public_ipv6)
                    .collect(),
                internal: Vec::new(),
            },
            state_dir,
            data_dir: cni::ipam::DEFAULT_DIR.into(),
            network,
            masquerade: flags.ip_masq,
            resync: Duration::from_secs(flags.resync_seconds),
            event_buffer_bytes: flags.event_buffer_bytes,
        },
        log_json: flags.log_json,
    })
}

fn host_name() -> Result<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
    Ok(text.trim().to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(more: &[&str]) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("net-conf.json");
        std::fs::write(&file, r#"{"Network":"10.244.0.0/16"}"#).unwrap();
        let file = file.display().to_string();
        let words = ["agent", "--node-name=n", "--net-conf", &file];
        let flags = Flags::try_parse_from(words.iter().chain(more)).map_err(|e| e.to_string())?;
        check(flags, Backend::Vxlan).map_err(|e| e.to_string())
    }

    #[test]
    fn without_flags_the_defaults_of_the_back_end_hold() {
        let config = checked(&[]).unwrap();
        assert_eq!(config.kernel.network, "ferrule-vxlan");
        assert_eq!(
            config.kernel.state_dir.to_str(),
            Some("/run/cni/ferrule-vxlan")
        );
        assert_eq!(config.listen.unwrap().port(), 9473);
    }

    #[test]
    fn a_bad_flag_names_itself() {
        for (flag, said) in [
            (
                "--public-ip=fd00::1",
                "--public-ip fd00::1 is of the other family",
            ),
            (
                "--listen=here",
                "--listen \"here\" is neither an address and port nor \"off\"",
            ),
            (
                "--resync-seconds=0",
                "--resync-seconds 0 is not from 1 to 3600",
            ),
            ("--state-dir=x", "--state-dir x is not an absolute path"),
            (
                "--cni-conf-name=a.conf",
                "--cni-conf-name \"a.conf\" is no file name ending in .conflist",
            ),
        ] {
            assert_eq!(checked(&[flag]).unwrap_err(), said);
        }
    }
}
