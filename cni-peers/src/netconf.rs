//! net-conf.json with flannel's keys. What concerns other back ends of flannel is accepted and
//! named in a warning; a bad value names its field.

use std::fmt;
use std::path::Path;

use ipnet::IpNet;
use linux::fs::read_file;
use serde_json::{Map, Value};

/// A few hundred bytes; more is another file.
const MAX_BYTES: usize = 64 << 10;
/// The largest VXLAN network identifier.
const MAX_VNI: u64 = (1 << 24) - 1;

/// How peers are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Through VXLAN devices.
    Vxlan,
    /// As next hops of the node's own network.
    HostGw,
}

impl Backend {
    /// Its name in net-conf.json and in flannel's annotation.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::HostGw => "host-gw",
        }
    }

    /// The plugin it belongs to.
    pub(crate) fn plugin(self) -> cni_routed::Routed {
        match self {
            Self::Vxlan => cni_routed::VXLAN,
            Self::HostGw => cni_routed::HOST_GW,
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The cluster's pod network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NetConf {
    /// `Network` and `IPv6Network`, as far as they are enabled: what is in them keeps its source
    /// address.
    pub(crate) networks: Vec<IpNet>,
    /// `Backend.VNI`.
    pub(crate) vni: u32,
    /// `Backend.Port`: UDP port of the outer packets.
    pub(crate) port: u16,
    /// `Backend.MTU` in bytes, instead of what follows from the node's own network.
    pub(crate) mtu_bytes: Option<u32>,
    /// `Backend.DirectRouting`: peers on the node's own network are next hops.
    pub(crate) direct_routing: bool,
    /// `Backend.Learning`.
    pub(crate) learning: bool,
    /// `Backend.GBP`.
    pub(crate) gbp: bool,
    /// Keys that were accepted and mean nothing here.
    pub(crate) ignored: Vec<String>,
}

/// A net-conf.json that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetConfError {
    /// It cannot be read.
    #[error("read the network configuration (--net-conf)")]
    Unreadable(#[source] linux::fs::FsError),
    /// It is not JSON.
    #[error("{0} is no JSON object")]
    Json(String, #[source] Option<serde_json::Error>),
    /// A field.
    #[error("{file}: {field} {problem}")]
    Field {
        /// The file.
        file: String,
        /// Which.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
}

type Object = Map<String, Value>;

/// A field and what is wrong with it.
type Problem = (String, String);

fn wrong<T>(field: impl Into<String>, problem: impl Into<String>) -> Result<T, Problem> {
    Err((field.into(), problem.into()))
}

impl NetConf {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`NetConfError`].
    pub(crate) fn load(path: &Path, backend: Backend) -> Result<Self, NetConfError> {
        let bytes = read_file(path, MAX_BYTES).map_err(NetConfError::Unreadable)?;
        let file = path.display().to_string();
        let value = serde_json::from_slice(&bytes)
            .map_err(|e| NetConfError::Json(file.clone(), Some(e)))?;
        let Value::Object(object) = value else {
            return Err(NetConfError::Json(file, None));
        };
        Self::parse(&object, backend).map_err(|(field, problem)| NetConfError::Field {
            file,
            field,
            problem,
        })
    }

    fn parse(object: &Object, backend: Backend) -> Result<Self, Problem> {
        let empty = Object::new();
        let back = match object.get("Backend") {
            None | Some(Value::Null) => &empty,
            Some(Value::Object(back)) => back,
            Some(other) => return wrong("Backend", format!("is {other}, not an object")),
        };
        match back.get("Type") {
            None | Some(Value::Null) => {}
            Some(Value::String(kind)) if kind == backend.as_str() => {}
            Some(kind) => {
                let problem = format!("is {kind}, but this is the agent for \"{backend}\"");
                return wrong("Backend.Type", problem);
            }
        }
        let number = |key: &str, least: u64, most: u64, default: u64| {
            whole(back, key, least, most).map(|found| found.unwrap_or(default))
        };
        let conf = Self {
            networks: networks(object)?,
            vni: number("VNI", 1, MAX_VNI, 1)? as u32,
            port: number("Port", 1, 65_535, 8472)? as u16,
            mtu_bytes: whole(back, "MTU", 576, 65_535)?.map(|mtu| mtu as u32),
            direct_routing: flag(back, "Backend.", "DirectRouting", false)?,
            learning: flag(back, "Backend.", "Learning", false)?,
            gbp: flag(back, "Backend.", "GBP", false)?,
            ignored: ignored(object, back),
        };
        Ok(conf)
    }
}

fn networks(object: &Object) -> Result<Vec<IpNet>, Problem> {
    let mut networks = Vec::new();
    for (enable, key, default, v4) in [
        ("EnableIPv4", "Network", true, true),
        ("EnableIPv6", "IPv6Network", false, false),
    ] {
        if !flag(object, "", enable, default)? {
            continue;
        }
        let text = match object.get(key) {
            Some(Value::String(text)) => text,
            None | Some(Value::Null) => {
                return wrong(key, format!("is missing ({enable} is true)"));
            }
            Some(other) => {
                return wrong(
                    key,
                    format!("is {other}, not a network like \"10.244.0.0/16\""),
                );
            }
        };
        match text.parse::<IpNet>() {
            Ok(net) if net.addr().is_ipv4() == v4 => networks.push(net.trunc()),
            Ok(net) => return wrong(key, format!("{net} is of the other family")),
            Err(_) => {
                return wrong(
                    key,
                    format!("{text:?} is not a network like \"10.244.0.0/16\""),
                );
            }
        }
    }
    if networks.is_empty() {
        return wrong(
            "EnableIPv4",
            "and EnableIPv6 are both false: there is no network",
        );
    }
    Ok(networks)
}

fn flag(object: &Object, at: &str, key: &str, default: bool) -> Result<bool, Problem> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(value)) => Ok(*value),
        Some(other) => wrong(
            format!("{at}{key}"),
            format!("is {other}, not true or false"),
        ),
    }
}

/// 0 is flannel's "not given".
fn whole(object: &Object, key: &str, least: u64, most: u64) -> Result<Option<u64>, Problem> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64() {
            Some(0) => Ok(None),
            Some(number) if (least..=most).contains(&number) => Ok(Some(number)),
            _ => wrong(
                format!("Backend.{key}"),
                format!("is {value}, not a whole number from {least} to {most}"),
            ),
        },
    }
}

/// Subnets come from each Node's podCIDRs, rules are always nftables'.
fn ignored(object: &Object, back: &Object) -> Vec<String> {
    const KNOWN: [&str; 5] = [
        "Network",
        "IPv6Network",
        "EnableIPv4",
        "EnableIPv6",
        "Backend",
    ];
    const KNOWN_BACK: [&str; 7] = [
        "Type",
        "VNI",
        "Port",
        "MTU",
        "DirectRouting",
        "Learning",
        "GBP",
    ];
    // True is what we do anyway.
    let nft = |key: &str| key == "EnableNFTables" && object.get(key) == Some(&Value::Bool(true));
    let outer = object
        .keys()
        .filter(|key| !KNOWN.contains(&key.as_str()) && !nft(key));
    let inner = back
        .keys()
        .filter(|key| !KNOWN_BACK.contains(&key.as_str()));
    let inner = inner.map(|key| format!("Backend.{key}"));
    outer.cloned().chain(inner).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<NetConf, String> {
        let Ok(Value::Object(object)) = serde_json::from_str(text) else {
            panic!("no object: {text}")
        };
        NetConf::parse(&object, Backend::Vxlan)
            .map_err(|(field, problem)| format!("{field} {problem}"))
    }

    #[test]
    fn flannels_own_example_is_read() {
        let conf = parse(
            r#"{"Network":"10.244.0.0/16","EnableNFTables":false,"SubnetLen":24,
                "Backend":{"Type":"vxlan","MacPrefix":"0E-2A"}}"#,
        )
        .unwrap();
        assert_eq!((conf.vni, conf.port, conf.mtu_bytes), (1, 8472, None));
        assert_eq!(conf.networks, ["10.244.0.0/16".parse().unwrap()]);
        assert_eq!(
            conf.ignored,
            ["EnableNFTables", "SubnetLen", "Backend.MacPrefix"]
        );
    }

    #[test]
    fn both_families_and_every_key_of_the_back_end_are_read() {
        let conf = parse(
            r#"{"Network":"10.0.0.0/8","EnableIPv6":true,"IPv6Network":"fd00::/48",
                "Backend":{"VNI":4096,"Port":4789,"MTU":1400,"DirectRouting":true,"Learning":true,"GBP":true}}"#,
        )
        .unwrap();
        assert_eq!(conf.networks.len(), 2);
        assert_eq!(
            (conf.vni, conf.port, conf.mtu_bytes),
            (4096, 4789, Some(1400))
        );
        assert!(conf.direct_routing && conf.learning && conf.gbp);
    }

    #[test]
    fn a_bad_value_names_its_field() {
        for (text, said) in [
            ("{}", "Network is missing (EnableIPv4 is true)"),
            (
                r#"{"Network":"ten"}"#,
                r#"Network "ten" is not a network like "10.244.0.0/16""#,
            ),
            (
                r#"{"Network":"fd00::/48"}"#,
                "Network fd00::/48 is of the other family",
            ),
            (
                r#"{"EnableIPv4":false}"#,
                "EnableIPv4 and EnableIPv6 are both false: there is no network",
            ),
            (
                r#"{"Network":"10.0.0.0/8","Backend":{"Type":"host-gw"}}"#,
                r#"Backend.Type is "host-gw", but this is the agent for "vxlan""#,
            ),
            (
                r#"{"Network":"10.0.0.0/8","Backend":{"VNI":16777216}}"#,
                "Backend.VNI is 16777216, not a whole number from 1 to 16777215",
            ),
            (
                r#"{"Network":"10.0.0.0/8","Backend":{"Port":"8472"}}"#,
                r#"Backend.Port is "8472", not a whole number from 1 to 65535"#,
            ),
            (
                r#"{"Network":"10.0.0.0/8","Backend":{"Learning":1}}"#,
                "Backend.Learning is 1, not true or false",
            ),
        ] {
            assert_eq!(parse(text).unwrap_err(), said, "{text}");
        }
    }
}
