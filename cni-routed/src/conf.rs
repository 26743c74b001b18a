//! The configuration of a call, checked once.

use std::path::PathBuf;

use cni::attach::rules::Rules;
use cni::bandwidth::Bandwidth;
use cni::firewall::HostPorts;
use cni::ipam::{DEFAULT_DIR, HostLocal};
use cni::records::Records;
use cni::skel::Input;
use cni::types::{CniError, ErrorCode};
use linux::netlink::Mac;
use serde_json::{Map, Value, json};

use crate::Routed;
use crate::state::{self, NodeState, StateError};

/// What a veth takes.
const MTU_BYTES: std::ops::RangeInclusive<u64> = 68..=65535;

/// What the plugin was told to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RoutedConf {
    /// Where the peer agent keeps its state.
    pub(crate) state_dir: PathBuf,
    /// Where leases are kept.
    pub(crate) data_dir: PathBuf,
    /// Instead of the agent's, in bytes.
    pub(crate) mtu_bytes: Option<u32>,
    /// Hardware address of the container's end.
    pub(crate) mac: Option<Mac>,
    /// Host ports.
    pub(crate) ports: HostPorts,
    /// Limits both ways.
    pub(crate) bandwidth: Bandwidth,
}

type Object = Map<String, Value>;

fn invalid(field: &str, problem: impl std::fmt::Display) -> CniError {
    CniError::new(ErrorCode::InvalidConfig, format!("{field} {problem}"))
}

fn text<'a>(object: &'a Object, key: &str) -> Result<Option<&'a str>, CniError> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(invalid(key, format!("is {other}, not a string"))),
    }
}

fn directory(object: &Object, key: &str, default: &str) -> Result<PathBuf, CniError> {
    let dir = PathBuf::from(text(object, key)?.unwrap_or(default));
    if dir.is_absolute() {
        Ok(dir)
    } else {
        Err(invalid(key, format!("{dir:?} is not an absolute path")))
    }
}

impl RoutedConf {
    /// Checks the configuration of a call.
    pub(crate) fn parse(plugin: &Routed, input: &Input<'_>) -> Result<Self, CniError> {
        let object = &input.conf.object;
        let mtu_bytes = match object.get("mtu") {
            None | Some(Value::Null) => None,
            Some(value) if value.as_u64() == Some(0) => None,
            Some(value) => {
                let number = value.as_u64().filter(|mtu| MTU_BYTES.contains(mtu));
                let problem = format!("{value} is no whole number from 68 to 65535");
                Some(number.ok_or_else(|| invalid("mtu", problem))? as u32)
            }
        };
        Ok(Self {
            state_dir: directory(object, "stateDir", plugin.state_dir)?,
            data_dir: directory(object, "dataDir", DEFAULT_DIR)?,
            mtu_bytes,
            mac: mac(object, input.args.get("MAC").map(String::as_str))?,
            ports: HostPorts::parse(object)?,
            bandwidth: Bandwidth::parse(object)?,
        })
    }

    /// The packet filter, as far as it concerns attachments of this network.
    pub(crate) fn rules<'a>(
        &'a self,
        input: &'a Input<'_>,
        state: Option<&NodeState>,
    ) -> Rules<'a> {
        Rules {
            network: &input.conf.name,
            records: Records::of(&self.data_dir, &input.conf.name),
            ports: &self.ports,
            admin_chain: None,
            subnets: state
                .map(|state| state.pod_cidrs.clone())
                .unwrap_or_default(),
        }
    }

    /// The agent's state, as ADD needs it: without it, ask again.
    pub(crate) fn state(&self) -> Result<NodeState, CniError> {
        state::read(&self.state_dir).map_err(|e| not_ready(ErrorCode::TryAgain, &e))
    }
}

/// The node cannot serve yet, or its agent's state cannot be used.
pub(crate) fn not_ready(missing: ErrorCode, error: &StateError) -> CniError {
    let code = match error {
        StateError::Missing(_) => missing,
        StateError::Unreadable(_)
        | StateError::Malformed { .. }
        | StateError::BootId(_)
        | StateError::Unwritable(_) => match missing {
            ErrorCode::NotAvailable => ErrorCode::NotAvailable,
            _ => ErrorCode::Io,
        },
    };
    CniError::caused(code, "the node's podCIDR is not known", error)
}

/// From the runtime, else `args`, else the old environment argument, else the configuration.
fn mac(object: &Object, arg_mac: Option<&str>) -> Result<Option<Mac>, CniError> {
    let inner = |outer: &str, key: &str| object.get(outer)?.get(key)?.as_str().map(str::to_owned);
    let by_args = || {
        let cni = object.get("args")?.get("cni")?;
        cni.get("mac")?.as_str().map(str::to_owned)
    };
    let asked = inner("runtimeConfig", "mac")
        .or_else(by_args)
        .or_else(|| arg_mac.map(str::to_owned))
        .or_else(|| object.get("mac")?.as_str().map(str::to_owned));
    match asked.filter(|text| !text.is_empty()) {
        None => Ok(None),
        Some(text) => text
            .parse()
            .map(Some)
            .map_err(|e: linux::netlink::BadMac| invalid("mac", e)),
    }
}

/// The allocator's configuration: the node's podCIDRs as ranges, one address from each.
pub(crate) fn host_local(
    input: &Input<'_>,
    conf: &RoutedConf,
    state: &NodeState,
) -> Result<HostLocal, CniError> {
    let ranges: Vec<Value> = state
        .pod_cidrs
        .iter()
        .map(|net| json!([{"subnet": net}]))
        .collect();
    let own = input.conf.object.get("ipam");
    let of_ipam = |key: &str| own.and_then(|ipam| ipam.get(key)).cloned();
    let mut object = Object::new();
    object.insert(
        "ipam".into(),
        json!({
            "ranges": ranges, "dataDir": conf.data_dir,
            "routes": of_ipam("routes"), "resolvConf": of_ipam("resolvConf"),
        }),
    );
    for key in ["runtimeConfig", "args"] {
        if let Some(mut value) = input.conf.object.get(key).cloned() {
            // Ranges are the node's: what a runtime adds to them would not be routed here.
            if let Value::Object(value) = &mut value {
                value.remove("ipRanges");
            }
            object.insert(key.into(), value);
        }
    }
    let asked = input.args.get("IP").map(String::as_str);
    HostLocal::parse(&object, asked).map_err(|e| invalid(&e.field, e.problem))
}
