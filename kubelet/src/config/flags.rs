//! The command line of the agent: our own flags, and one for every field that had one in the
//! stock kubelet (accepted with a note that the file is the place for it).
//!
//! The result is plain values: [`Flags`] for what has no place in the file, and a tree of the
//! same shape as the file for the rest. clap is used through its builder, because the second
//! group is made from [`super::schema`].

use super::duration;
use super::schema::{Field, KUBELET_CONFIGURATION, Kind};
use clap::{Arg, ArgAction, ArgMatches, Command, builder::ValueParser};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;

/// What the command line says that no configuration file can.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flags {
    /// `--config`.
    pub config: Option<PathBuf>,
    /// `--config-dir`.
    pub config_dir: Option<PathBuf>,
    /// `--kubeconfig`.
    pub kubeconfig: Option<PathBuf>,
    /// `--bootstrap-kubeconfig`.
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// `--runtime-config`.
    pub runtime_config: Option<PathBuf>,
    /// `--root-dir`.
    pub root_dir: Option<PathBuf>,
    /// `--cert-dir`.
    pub cert_dir: Option<PathBuf>,
    /// `--hostname-override`.
    pub hostname_override: Option<String>,
    /// `--node-ip`.
    pub node_ips: Vec<IpAddr>,
    /// `--node-labels`.
    pub node_labels: BTreeMap<String, String>,
    /// `--cloud-provider`.
    pub cloud_provider: Option<String>,
    /// `--shim-path`.
    pub shim_path: Option<PathBuf>,
    /// `--image-credential-provider-config`.
    pub credential_provider_config: Option<PathBuf>,
    /// `--image-credential-provider-bin-dir`.
    pub credential_provider_bin_dir: Option<PathBuf>,
    /// `-v`.
    pub verbosity: Option<u8>,
    /// Fields set by flags, in the shape of the file.
    pub fields: Map<String, Value>,
    /// What should be said about the flags used.
    pub notes: BTreeSet<String>,
}

/// A flag value that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("--{flag} {value:?}: {what}")]
pub struct FlagError {
    /// The flag.
    pub flag: String,
    /// What was given.
    pub value: String,
    /// What is wrong with it.
    pub what: String,
}

/// Flags of the stock kubelet that need nothing here: accepted, and named once.
const IGNORED: &[(&str, bool)] = &[
    ("pod-infra-container-image", false),
    ("container-runtime", false),
    ("runtime-cgroups", false),
    ("lock-file", false),
    ("exit-on-lock-contention", true),
    ("minimum-container-ttl-duration", false),
    ("maximum-dead-containers-per-container", false),
    ("maximum-dead-containers", false),
    ("experimental-mounter-path", false),
    ("experimental-allocatable-ignore-eviction", true),
    ("network-plugin", false),
    ("logtostderr", true),
    ("alsologtostderr", true),
    ("stderrthreshold", false),
    ("log-dir", false),
    ("log-file", false),
];

/// Paths of `(field name, its parents)` with a flag.
fn flagged(
    fields: &'static [Field],
    parents: &mut Vec<&'static str>,
    found: &mut Vec<(Vec<&'static str>, &'static Field)>,
) {
    for field in fields {
        parents.push(field.name);
        if !field.flag.is_empty() {
            found.push((parents.clone(), field));
        }
        if let Kind::Object(inner) = field.kind {
            flagged(inner, parents, found);
        }
        parents.pop();
    }
}

fn fields_with_flags() -> Vec<(Vec<&'static str>, &'static Field)> {
    let mut found = Vec::new();
    flagged(KUBELET_CONFIGURATION, &mut Vec::new(), &mut found);
    found
}

fn text(name: &'static str, value_name: &'static str, help: &'static str) -> Arg {
    Arg::new(name)
        .long(name)
        .value_name(value_name)
        .help(help)
        .action(ArgAction::Set)
        .allow_hyphen_values(true)
        .overrides_with(name)
}

fn path(name: &'static str, help: &'static str) -> Arg {
    text(name, "PATH", help).value_parser(ValueParser::path_buf())
}

/// Adds the agent's flags to a command.
pub fn add_to(command: Command) -> Command {
    let mut command = command
        .arg(path(
            "config",
            "KubeletConfiguration file (YAML or JSON); where nearly all settings belong",
        ))
        .arg(path(
            "config-dir",
            "Directory of drop-ins, *.conf, laid over --config in name order",
        ))
        .arg(path(
            "kubeconfig",
            "How to reach the apiserver: its address, its CA and this node's certificate",
        ))
        .arg(path(
            "bootstrap-kubeconfig",
            "Accepted for the stock tools; this agent needs --kubeconfig with a certificate",
        ))
        .arg(path(
            "runtime-config",
            "Ferrule's own settings: root, runDir, cniConfDir, cniBinDirs, registries",
        ))
        .arg(path(
            "root-dir",
            "Where pods' volumes and our records live [default: /var/lib/kubelet]",
        ))
        .arg(path(
            "cert-dir",
            "Where a serving certificate made by us is kept [default: <root-dir>/pki]",
        ))
        .arg(path(
            "shim-path",
            "The pod-shim program [default: beside this one]",
        ))
        .arg(path(
            "image-credential-provider-config",
            "Which programs give credentials for which images (CredentialProviderConfig)",
        ))
        .arg(path(
            "image-credential-provider-bin-dir",
            "Directory of those programs",
        ))
        .arg(text(
            "hostname-override",
            "NAME",
            "Name of the Node [default: the host's name]",
        ))
        .arg(text(
            "node-ip",
            "IP[,IP]",
            "The node's address, one per family [default: that of the default route]",
        ))
        .arg(text("node-labels", "K=V,…", "Labels the Node gets"))
        .arg(text(
            "cloud-provider",
            "external",
            "Leave addresses to a cloud controller",
        ))
        .arg(
            Arg::new("v")
                .short('v')
                .long("v")
                .value_name("LEVEL")
                .help("How much to log: 0 warnings and news, 2 more, 4 debug, 6 every step")
                .value_parser(clap::value_parser!(u8))
                .overrides_with("v"),
        );
    let heading = "Flags that are fields of the configuration file (deprecated as flags)";
    for (_, field) in fields_with_flags() {
        let help = format!("Sets {}", field.name);
        let arg = text(field.flag, "VALUE", "").help(help);
        command = command.arg(
            optional_if(arg, matches!(field.kind, Kind::Bool))
                .help_heading(heading)
                .hide_short_help(true),
        );
    }
    for (name, boolean) in IGNORED {
        let arg = text(name, "VALUE", "Accepted; means nothing here");
        command = command.arg(optional_if(arg, *boolean).hide(true));
    }
    command
}

/// Boolean flags may stand alone, as with the stock kubelet: `--flag` or `--flag=false`.
fn optional_if(arg: Arg, boolean: bool) -> Arg {
    if boolean {
        arg.num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
    } else {
        arg
    }
}

/// Reads what clap matched.
pub fn read(matches: &ArgMatches) -> Result<Flags, FlagError> {
    let get = |name: &str| matches.get_one::<String>(name).cloned();
    let path = |name: &str| matches.get_one::<PathBuf>(name).cloned();
    let mut flags = Flags {
        config: path("config"),
        config_dir: path("config-dir"),
        kubeconfig: path("kubeconfig"),
        bootstrap_kubeconfig: path("bootstrap-kubeconfig"),
        runtime_config: path("runtime-config"),
        root_dir: path("root-dir"),
        cert_dir: path("cert-dir"),
        shim_path: path("shim-path"),
        credential_provider_config: path("image-credential-provider-config"),
        credential_provider_bin_dir: path("image-credential-provider-bin-dir"),
        hostname_override: get("hostname-override"),
        cloud_provider: get("cloud-provider").filter(|p| !p.is_empty()),
        verbosity: matches.get_one::<u8>("v").copied(),
        ..Flags::default()
    };
    if let Some(text) = get("node-ip").filter(|t| !t.is_empty()) {
        flags.node_ips = addresses("node-ip", &text)?;
    }
    if let Some(text) = get("node-labels") {
        flags.node_labels = pairs("node-labels", &text, '=')?;
    }
    for (path, field) in fields_with_flags() {
        let Some(text) = get(field.flag) else {
            continue;
        };
        let value = field_value(field, &text)?;
        set(&mut flags.fields, &path, value);
        flags.notes.insert(format!(
            "flag --{} is deprecated: set {} in the configuration file",
            field.flag,
            path.join(".")
        ));
    }
    for (name, _) in IGNORED {
        if get(name).is_some() {
            let note = format!("flag --{name} has no effect in this agent");
            flags.notes.insert(note);
        }
    }
    Ok(flags)
}

fn addresses(flag: &str, text: &str) -> Result<Vec<IpAddr>, FlagError> {
    let one = |word: &str| {
        word.trim().parse().map_err(|_| FlagError {
            flag: flag.to_owned(),
            value: text.to_owned(),
            what: format!("{word:?} is not an IP address"),
        })
    };
    let ips: Vec<IpAddr> = text.split(',').map(one).collect::<Result<_, _>>()?;
    let wrong = match ips.as_slice() {
        [_] => false,
        [a, b] => a.is_ipv4() == b.is_ipv4(),
        _ => true,
    };
    if wrong {
        return Err(FlagError {
            flag: flag.to_owned(),
            value: text.to_owned(),
            what: "give one address, or one IPv4 and one IPv6 address".to_owned(),
        });
    }
    Ok(ips)
}

fn pairs(flag: &str, text: &str, sign: char) -> Result<BTreeMap<String, String>, FlagError> {
    let mut found = BTreeMap::new();
    for pair in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let Some((key, value)) = pair.split_once(sign) else {
            return Err(FlagError {
                flag: flag.to_owned(),
                value: text.to_owned(),
                what: format!("{pair:?} is not key{sign}value"),
            });
        };
        found.insert(key.trim().to_owned(), value.trim().to_owned());
    }
    Ok(found)
}

/// A flag's text as the value the file would have. What cannot be read stays text: the check of
/// the whole tree names it then.
fn field_value(field: &Field, text: &str) -> Result<Value, FlagError> {
    let value = match field.kind {
        Kind::Bool => text
            .parse::<bool>()
            .map_or_else(|_| json!(text), |b| json!(b)),
        Kind::Int(..) | Kind::Number(..) => {
            serde_json::from_str(text).unwrap_or_else(|_| json!(text))
        }
        Kind::List(Kind::Object(_)) if field.name == "registerWithTaints" => Value::Array(
            text.split(',')
                .filter(|t| !t.is_empty())
                .map(taint)
                .collect(),
        ),
        Kind::List(_) => Value::Array(
            text.split(',')
                .filter(|t| !t.is_empty())
                .map(|t| json!(t))
                .collect(),
        ),
        // `a:hello,b:again`; a name given twice has two values.
        Kind::Map(Kind::List(_)) => {
            let mut lists: BTreeMap<String, Vec<String>> = BTreeMap::new();
            for pair in text.split(',').filter(|p| !p.trim().is_empty()) {
                for (name, value) in pairs(field.flag, pair, ':')? {
                    lists.entry(name).or_default().push(value);
                }
            }
            json!(lists)
        }
        Kind::Map(inner) => {
            let sign = if field.flag.starts_with("eviction-hard") || field.flag == "eviction-soft" {
                '<'
            } else {
                '='
            };
            let entries = pairs(field.flag, text, sign)?;
            let typed = |v: String| match inner {
                Kind::Bool => v.parse::<bool>().map_or_else(|_| json!(v), |b| json!(b)),
                _ => json!(v),
            };
            Value::Object(entries.into_iter().map(|(k, v)| (k, typed(v))).collect())
        }
        // A bare number of seconds is an old habit of scripts.
        Kind::Duration if duration::parse(text).is_none() && text.parse::<u32>().is_ok() => {
            json!(format!("{text}s"))
        }
        Kind::Duration
        | Kind::Text
        | Kind::Quantity
        | Kind::Ip
        | Kind::OneOf(_)
        | Kind::Any
        | Kind::Object(_) => json!(text),
    };
    Ok(value)
}

/// `key=value:Effect`, `key:Effect`.
fn taint(text: &str) -> Value {
    let (rest, effect) = text.split_once(':').unwrap_or((text, ""));
    let (key, value) = rest.split_once('=').unwrap_or((rest, ""));
    json!({"key": key, "value": value, "effect": effect})
}

fn set(tree: &mut Map<String, Value>, path: &[&str], value: Value) {
    match path {
        [] => {}
        [last] => {
            tree.insert((*last).to_owned(), value);
        }
        [first, rest @ ..] => {
            let below = tree
                .entry((*first).to_owned())
                .or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(below) = below {
                set(below, rest, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Flags, FlagError> {
        let command = add_to(Command::new("kubelet"));
        let all = std::iter::once("kubelet").chain(args.iter().copied());
        read(&command.try_get_matches_from(all).unwrap())
    }

    #[test]
    fn what_kubeadm_and_kind_pass_is_understood() {
        let flags = parse(&[
            "--bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf",
            "--kubeconfig=/etc/kubernetes/kubelet.conf",
            "--config=/var/lib/kubelet/config.yaml",
            "--container-runtime-endpoint=unix:///run/containerd/containerd.sock",
            "--node-ip=172.18.0.2",
            "--node-labels=a=b,node.kubernetes.io/x=",
            "--pod-infra-container-image=registry.k8s.io/pause:3.10",
            "--provider-id=kind://docker/kind/kind-control-plane",
            "--runtime-cgroups=/system.slice/containerd.service",
            "--fail-swap-on=false",
            "--register-with-taints=node-role.kubernetes.io/control-plane:NoSchedule",
            "-v=2",
        ])
        .unwrap();
        assert_eq!(flags.verbosity, Some(2));
        assert_eq!(flags.node_labels["a"], "b");
        assert_eq!(flags.fields["failSwapOn"], json!(false));
        assert_eq!(
            flags.fields["registerWithTaints"],
            json!([{"key": "node-role.kubernetes.io/control-plane", "value": "", "effect": "NoSchedule"}])
        );
        assert!(
            flags
                .notes
                .iter()
                .any(|n| n.contains("--pod-infra-container-image"))
        );
    }

    #[test]
    fn flags_take_the_shape_of_the_file() {
        let flags = parse(&[
            "--max-pods",
            "7",
            "--anonymous-auth",
            "--authorization-webhook-cache-authorized-ttl=1m",
            "--eviction-hard=memory.available<100Mi,nodefs.available<10%",
            "--feature-gates=A=true,B=false",
            "--cluster-dns=10.0.0.10",
        ])
        .unwrap();
        let expected = json!({
            "maxPods": 7,
            "authentication": {"anonymous": {"enabled": true}},
            "authorization": {"webhook": {"cacheAuthorizedTTL": "1m"}},
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "10%"},
            "featureGates": {"A": true, "B": false},
            "clusterDNS": ["10.0.0.10"]
        });
        assert_eq!(Value::Object(flags.fields), expected);
    }

    #[test]
    fn a_bad_address_is_named() {
        let error = parse(&["--node-ip=10.0.0.300"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "--node-ip \"10.0.0.300\": \"10.0.0.300\" is not an IP address"
        );
        assert!(parse(&["--node-ip=10.0.0.3,10.0.0.4"]).is_err());
    }
}
