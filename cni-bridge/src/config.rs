//! The configuration: keys of containernetworking's `bridge` plugin v1.9, checked once.

use cni::skel::Input;
use cni::types::{CniError, ErrorCode};
use ipnet::IpNet;
use linux::netlink::Mac;
use serde_json::{Map, Value};

/// What the plugin was told to do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a key of the configuration and independent of the others"
)]
pub(crate) struct BridgeConf {
    /// Name of the bridge.
    pub(crate) bridge: String,
    /// The bridge gets the gateway's address.
    pub(crate) is_gateway: bool,
    /// The container's default route goes there.
    pub(crate) is_default_gateway: bool,
    /// Other addresses of the bridge in the same family are removed.
    pub(crate) force_address: bool,
    /// What leaves the network gets the node's address.
    pub(crate) masquerade: bool,
    /// Destinations that keep the container's address nonetheless (our own key).
    pub(crate) masquerade_except: Vec<IpNet>,
    /// Of both ends and a new bridge, in bytes.
    pub(crate) mtu_bytes: Option<u32>,
    pub(crate) hairpin: bool,
    pub(crate) promiscuous: bool,
    pub(crate) isolated: bool,
    /// IPv6 duplicate address detection.
    pub(crate) detect_duplicates: bool,
    /// The container's end stays down and without addresses.
    pub(crate) leave_down: bool,
    /// Hardware address of the container's end.
    pub(crate) mac: Option<Mac>,
    /// Where addresses come from.
    pub(crate) ipam: Ipam,
}

/// Where addresses come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ipam {
    /// Nowhere: a link and no more.
    None,
    /// Ranges of the configuration, allocated in this process.
    HostLocal,
    /// Another plugin.
    Delegated(String),
}

type Object = Map<String, Value>;

fn wrong(code: ErrorCode, field: &str, problem: impl std::fmt::Display) -> CniError {
    CniError::new(code, format!("{field} {problem}"))
}

fn invalid(field: &str, problem: impl std::fmt::Display) -> CniError {
    wrong(ErrorCode::InvalidConfig, field, problem)
}

impl BridgeConf {
    /// Checks the configuration of a call.
    pub(crate) fn parse(input: &Input<'_>) -> Result<Self, CniError> {
        let arg_mac = input.args.get("MAC").map(String::as_str);
        Self::of_object(&input.conf.object, arg_mac)
    }

    fn of_object(object: &Object, arg_mac: Option<&str>) -> Result<Self, CniError> {
        refuse_unsupported(object)?;
        let flag = |key| boolean(object, key, false);
        let is_default_gateway = flag("isDefaultGateway")?;
        let conf = Self {
            bridge: text(object, "bridge")?.unwrap_or("cni0").to_owned(),
            is_gateway: flag("isGateway")? || is_default_gateway,
            is_default_gateway,
            force_address: flag("forceAddress")?,
            masquerade: flag("ipMasq")?,
            masquerade_except: networks(object, "ipMasqExcept")?,
            mtu_bytes: mtu(object)?,
            hairpin: flag("hairpinMode")?,
            promiscuous: flag("promiscMode")?,
            isolated: flag("portIsolation")?,
            detect_duplicates: flag("enabledad")?,
            leave_down: flag("disableContainerInterface")?,
            mac: mac(object, arg_mac)?,
            ipam: ipam(object)?,
        };
        if !conf.bridge.is_ascii() || conf.bridge.len() > 15 || conf.bridge.contains(['/', ' ']) {
            return Err(invalid(
                "bridge",
                format!("{:?} is not an interface name", conf.bridge),
            ));
        }
        if conf.hairpin && conf.promiscuous {
            return Err(invalid(
                "hairpinMode",
                "cannot be combined with promiscMode",
            ));
        }
        if conf.leave_down && conf.ipam != Ipam::None {
            return Err(invalid(
                "disableContainerInterface",
                "cannot be combined with ipam",
            ));
        }
        Ok(conf)
    }
}

/// Keys whose silent neglect would be worse than a refusal. Unknown keys are accepted, as the
/// specification asks.
fn refuse_unsupported(object: &Object) -> Result<(), CniError> {
    let unsupported = |field, why: &str| Err(wrong(ErrorCode::UnsupportedField, field, why));
    match object.get("vlan") {
        None | Some(Value::Null) => {}
        Some(Value::Number(n)) if n.as_u64() == Some(0) => {}
        Some(_) => return unsupported("vlan", "is not supported: no VLAN filtering on the bridge"),
    }
    match object.get("vlanTrunk") {
        None | Some(Value::Null) => {}
        Some(Value::Array(items)) if items.is_empty() => {}
        Some(_) => {
            return unsupported(
                "vlanTrunk",
                "is not supported: no VLAN filtering on the bridge",
            );
        }
    }
    if boolean(object, "macspoofchk", false)? {
        return unsupported("macspoofchk", "is not supported");
    }
    match text(object, "ipMasqBackend")? {
        None | Some("nftables") => Ok(()),
        Some("iptables") => unsupported(
            "ipMasqBackend",
            "\"iptables\" is not supported: nftables is",
        ),
        Some(other) => Err(invalid(
            "ipMasqBackend",
            format!("{other:?} is not \"nftables\""),
        )),
    }
}

fn boolean(object: &Object, key: &str, default: bool) -> Result<bool, CniError> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(other) => Err(invalid(key, format!("is {other}, not true or false"))),
    }
}

fn text<'a>(object: &'a Object, key: &str) -> Result<Option<&'a str>, CniError> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(invalid(key, format!("is {other}, not a string"))),
    }
}

/// 0 means "the kernel's own". The least an IPv4 link may have is 68; the kernel's veth takes
/// up to 65535.
fn mtu(object: &Object) -> Result<Option<u32>, CniError> {
    match object.get("mtu") {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64() {
            Some(0) => Ok(None),
            Some(mtu @ 68..=65_535) => Ok(Some(mtu as u32)),
            _ => Err(invalid(
                "mtu",
                format!("is {value}, not a number from 68 to 65535"),
            )),
        },
    }
}

fn networks(object: &Object, key: &str) -> Result<Vec<IpNet>, CniError> {
    let items = match object.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(items)) => items,
        Some(_) => return Err(invalid(key, "is not a list")),
    };
    let parse = |item: &Value| {
        let net: Option<IpNet> = item.as_str().and_then(|text| text.parse().ok());
        net.ok_or_else(|| invalid(key, format!("holds {item}, which is not a network")))
    };
    items.iter().map(parse).collect()
}

/// By the runtime, else by `args`, else by the environment, else by the configuration.
fn mac(object: &Object, arg: Option<&str>) -> Result<Option<Mac>, CniError> {
    let at = |path: &[&str]| {
        let mut value = object.get(path[0])?;
        for key in &path[1..] {
            value = value.get(key)?;
        }
        value.as_str().filter(|text| !text.is_empty())
    };
    let given = [
        ("runtimeConfig.mac", at(&["runtimeConfig", "mac"])),
        ("args.cni.mac", at(&["args", "cni", "mac"])),
        ("CNI_ARGS MAC", arg),
        ("mac", at(&["mac"])),
    ];
    let Some((field, text)) = given.into_iter().find_map(|(f, t)| Some((f, t?))) else {
        return Ok(None);
    };
    match text.parse::<Mac>() {
        // The lowest bit of the first octet marks group addresses.
        Ok(mac) if mac.0[0] & 1 == 0 => Ok(Some(mac)),
        Ok(_) => Err(invalid(field, format!("{text:?} is a group address"))),
        Err(error) => Err(invalid(field, error)),
    }
}

fn ipam(object: &Object) -> Result<Ipam, CniError> {
    let ipam = match object.get("ipam") {
        None | Some(Value::Null) => return Ok(Ipam::None),
        Some(Value::Object(ipam)) => ipam,
        Some(other) => return Err(invalid("ipam", format!("is {other}, not an object"))),
    };
    match ipam.get("type") {
        None if ipam.is_empty() => Ok(Ipam::None),
        None => Err(invalid("ipam.type", "is missing")),
        Some(Value::String(kind)) if kind.is_empty() => Ok(Ipam::None),
        Some(Value::String(kind)) if kind == "host-local" => Ok(Ipam::HostLocal),
        Some(Value::String(kind)) => Ok(Ipam::Delegated(kind.clone())),
        Some(other) => Err(invalid("ipam.type", format!("is {other}, not a string"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        let Value::Object(object) = serde_json::from_str(text).unwrap() else {
            panic!("{text}")
        };
        let said = match BridgeConf::of_object(&object, None) {
            Ok(conf) => format!("{conf:?}"),
            Err(error) => format!("{} {}", error.code.number(), error.msg),
        };
        assert!(said.contains(expected), "{said}\n  lacks {expected}");
    }

    #[test]
    fn defaults_are_those_of_the_reference() {
        check("{}", r#"bridge: "cni0", is_gateway: false"#);
        check("{}", "ipam: None");
        check(
            r#"{"isDefaultGateway":true}"#,
            "is_gateway: true, is_default_gateway: true",
        );
        check(r#"{"vlan":0,"vlanTrunk":[],"unknown":[1]}"#, "cni0");
        check(r#"{"ipam":{"type":"host-local"}}"#, "ipam: HostLocal");
        check(r#"{"ipam":{"type":"dhcp"}}"#, r#"ipam: Delegated("dhcp")"#);
    }

    #[test]
    fn a_bad_value_names_its_key() {
        check(
            r#"{"isGateway":"yes"}"#,
            r#"7 isGateway is "yes", not true or false"#,
        );
        check(
            r#"{"mtu":12}"#,
            "7 mtu is 12, not a number from 68 to 65535",
        );
        check(r#"{"mtu":"1500"}"#, "7 mtu is");
        check(r#"{"bridge":"a-name-much-too-long"}"#, "7 bridge");
        check(
            r#"{"mac":"01:00:5e:00:00:01"}"#,
            "7 mac \"01:00:5e:00:00:01\" is a group address",
        );
        check(r#"{"runtimeConfig":{"mac":"x"}}"#, "7 runtimeConfig.mac");
        check(
            r#"{"hairpinMode":true,"promiscMode":true}"#,
            "7 hairpinMode cannot be combined",
        );
        check(r#"{"ipMasqExcept":["x"]}"#, r#"7 ipMasqExcept holds "x""#);
        check(r#"{"ipMasqBackend":"pf"}"#, "7 ipMasqBackend");
        check(
            r#"{"ipam":{"subnet":"10.0.0.0/8"}}"#,
            "7 ipam.type is missing",
        );
        check(
            r#"{"disableContainerInterface":true,"ipam":{"type":"host-local"}}"#,
            "7 disableContainerInterface cannot be combined with ipam",
        );
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        check(r#"{"vlan":5}"#, "2 vlan is not supported");
        check(
            r#"{"vlanTrunk":[{"id":5}]}"#,
            "2 vlanTrunk is not supported",
        );
        check(r#"{"macspoofchk":true}"#, "2 macspoofchk is not supported");
        check(r#"{"ipMasqBackend":"iptables"}"#, "2 ipMasqBackend");
    }

    proptest::proptest! {
        #[test]
        fn no_object_makes_the_reader_panic(key in "[a-zA-Z]{1,12}", value in ".*") {
            for key in [key.as_str(), "mtu", "mac", "vlan", "ipam", "bridge", "ipMasqExcept"] {
                let object = Map::from_iter([(key.to_owned(), Value::String(value.clone()))]);
                let _ = BridgeConf::of_object(&object, Some(&value));
            }
        }
    }
}
