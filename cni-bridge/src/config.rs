//! The configuration: keys of containernetworking's `bridge`, `portmap`, `firewall`, `bandwidth`
//! and `tuning`, checked once.

use cni::attach::address::Ipam;
use cni::attach::rules::ADMIN_CHAIN;
use cni::bandwidth::Bandwidth;
use cni::firewall::{HostPorts, Isolation};
use cni::keys::{self, Object};
use cni::records::Backend;
use cni::skel::Input;
use cni::tuning::Tuning;
use cni::types::{CniError, Dns};
use ipnet::IpNet;
use linux::netlink::Mac;
use serde_json::Value;

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
    /// What leaves the network gets the node's address, by this.
    pub(crate) masquerade: Option<Backend>,
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
    /// The container may send from its own hardware address only.
    pub(crate) guarded: bool,
    /// Hardware address of the container's end.
    pub(crate) mac: Option<Mac>,
    /// VLANs of the port.
    pub(crate) vlans: Vlans,
    /// Where addresses come from.
    pub(crate) ipam: Ipam,
    /// Resolver settings that come before those of `ipam`.
    pub(crate) dns: Option<Dns>,
    /// Host ports.
    pub(crate) ports: HostPorts,
    /// Who may connect to the container.
    pub(crate) isolation: Isolation,
    /// The administrator's chain, when iptables is to admit the container's traffic.
    pub(crate) admin_chain: Option<String>,
    pub(crate) bandwidth: Bandwidth,
    pub(crate) tuning: Tuning,
}

/// VLANs of the container's port.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Vlans {
    /// The one it belongs to without tags.
    pub(crate) native: Option<u16>,
    /// Those it may use with tags, in order.
    pub(crate) trunk: Vec<u16>,
    /// It stays in the VLAN that new ports begin with.
    pub(crate) preserve_default: bool,
}

impl Vlans {
    /// The key that asks for VLANs, if one does.
    pub(crate) fn asking(&self) -> Option<&'static str> {
        match (self.native, self.trunk.is_empty()) {
            (Some(_), _) => Some("vlan"),
            (None, false) => Some("vlanTrunk"),
            (None, true) => None,
        }
    }
}

impl BridgeConf {
    /// Checks the configuration of a call.
    pub(crate) fn parse(input: &Input<'_>) -> Result<Self, CniError> {
        let arg_mac = input.args.get("MAC").map(String::as_str);
        Self::of_object(&input.conf.object, arg_mac)
    }

    fn of_object(object: &Object, arg_mac: Option<&str>) -> Result<Self, CniError> {
        let flag = |key| keys::flag(object, key).map(Option::unwrap_or_default);
        let is_default_gateway = flag("isDefaultGateway")?;
        let isolation = Isolation::parse(object)?;
        let ports = HostPorts::parse(object)?;
        let conf = Self {
            bridge: keys::text(object, "bridge")?.unwrap_or("cni0").to_owned(),
            is_gateway: flag("isGateway")? || is_default_gateway,
            is_default_gateway,
            force_address: flag("forceAddress")?,
            masquerade: masquerade(object)?,
            masquerade_except: keys::networks(object, "ipMasqExcept")?,
            mtu_bytes: keys::mtu(object)?,
            hairpin: flag("hairpinMode")?,
            promiscuous: flag("promiscMode")?,
            // Frames between ports never see the packet filter without br_netfilter: the bridge
            // itself keeps the ports apart.
            isolated: flag("portIsolation")? || isolation == Isolation::Isolated,
            detect_duplicates: flag("enabledad")?,
            leave_down: flag("disableContainerInterface")?,
            guarded: flag("macspoofchk")?,
            mac: keys::mac(object, arg_mac)?,
            vlans: vlans(object)?,
            ipam: Ipam::parse(object)?,
            dns: dns(object)?,
            admin_chain: admin_chain(object, ports.backend)?,
            ports,
            isolation,
            bandwidth: Bandwidth::parse(object)?,
            tuning: Tuning::parse(object)?,
        };
        conf.fits_together().map(|()| conf)
    }

    #[cfg(test)]
    pub(crate) fn from_json(text: &str) -> Self {
        let object: Object = serde_json::from_str(text).expect("a test's configuration");
        Self::of_object(&object, None).expect("a test's configuration")
    }

    fn fits_together(&self) -> Result<(), CniError> {
        let bridge = &self.bridge;
        if !bridge.is_ascii() || bridge.len() > 15 || bridge.contains(['/', ' ']) {
            let problem = format!("{bridge:?} is not an interface name");
            return Err(keys::invalid("bridge", problem));
        }
        let with = |key, other| {
            let problem = format!("cannot be combined with {other}");
            Err(keys::invalid(key, problem))
        };
        if self.hairpin && self.promiscuous {
            return with("hairpinMode", "promiscMode");
        }
        if self.leave_down && self.ipam != Ipam::None {
            return with("disableContainerInterface", "ipam");
        }
        Ok(())
    }
}

fn masquerade(object: &Object) -> Result<Option<Backend>, CniError> {
    let backend = match keys::text(object, "ipMasqBackend")? {
        None | Some("nftables") => Backend::Nftables,
        Some("iptables") => Backend::Iptables,
        Some(other) => {
            let problem = format!("{other:?} is neither \"nftables\" nor \"iptables\"");
            return Err(keys::invalid("ipMasqBackend", problem));
        }
    };
    Ok(keys::flag(object, "ipMasq")?
        .unwrap_or(false)
        .then_some(backend))
}

/// `firewall` of containernetworking lets the pods' traffic through a FORWARD chain whose policy
/// is to drop. In a table of our own nothing can be let through that another table drops, so that
/// is iptables' business: done when one of firewall's keys is there and `backend` says so.
fn admin_chain(object: &Object, backend: Backend) -> Result<Option<String>, CniError> {
    let name = keys::text(object, "iptablesAdminChainName")?;
    keys::text(object, "firewalldZone")?;
    let firewall = ["iptablesAdminChainName", "firewalldZone", "ingressPolicy"];
    let asked = firewall
        .iter()
        .any(|key| keys::at(object, &[key]).is_some());
    if !asked || backend != Backend::Iptables {
        return Ok(None);
    }
    Ok(Some(name.unwrap_or(ADMIN_CHAIN).to_owned()))
}

const VLAN_IDS: std::ops::RangeInclusive<u64> = 1..=4094;

fn vlans(object: &Object) -> Result<Vlans, CniError> {
    let native = keys::number(object, "vlan", 0..=4094)?;
    let mut trunk = Vec::new();
    for (index, item) in keys::list(object, "vlanTrunk")?.iter().enumerate() {
        let at = format!("vlanTrunk[{index}]");
        let Value::Object(item) = item else {
            return Err(keys::invalid(&at, "is not an object"));
        };
        let id = |key| keys::number(item, key, VLAN_IDS).map_err(keys::within(&at));
        match (id("minID")?, id("maxID")?) {
            (Some(low), Some(high)) if low > high => {
                let problem = format!("is {low}, more than maxID {high}");
                return Err(keys::invalid(&format!("{at}.minID"), problem));
            }
            (Some(low), Some(high)) => trunk.extend((low..=high).map(|id| id as u16)),
            (None, None) => {}
            (Some(_), None) => return Err(keys::invalid(&format!("{at}.maxID"), "is missing")),
            (None, Some(_)) => return Err(keys::invalid(&format!("{at}.minID"), "is missing")),
        }
        trunk.extend(id("id")?.map(|id| id as u16));
    }
    trunk.sort_unstable();
    trunk.dedup();
    Ok(Vlans {
        native: native.filter(|id| *id > 0).map(|id| id as u16),
        trunk,
        preserve_default: keys::flag(object, "preserveDefaultVlan")?.unwrap_or(false),
    })
}

/// From the runtime (`servers`, `searches`, `options`), else the configuration's own `dns`.
fn dns(object: &Object) -> Result<Option<Dns>, CniError> {
    let runtime = keys::object(object, "runtimeConfig")?;
    if let Some(dns) = runtime
        .map(|r| keys::object(r, "dns"))
        .transpose()?
        .flatten()
    {
        let within = keys::within("runtimeConfig.dns");
        let dns = Dns {
            nameservers: keys::texts(dns, "servers").map_err(&within)?,
            domain: String::new(),
            search: keys::texts(dns, "searches").map_err(&within)?,
            options: keys::texts(dns, "options").map_err(&within)?,
        };
        return Ok(Some(dns).filter(|dns| *dns != Dns::default()));
    }
    let Some(dns) = keys::object(object, "dns")? else {
        return Ok(None);
    };
    let within = keys::within("dns");
    let dns = Dns {
        nameservers: keys::texts(dns, "nameservers").map_err(&within)?,
        domain: keys::text(dns, "domain")
            .map_err(&within)?
            .unwrap_or_default()
            .to_owned(),
        search: keys::texts(dns, "search").map_err(&within)?,
        options: keys::texts(dns, "options").map_err(&within)?,
    };
    Ok(Some(dns).filter(|dns| *dns != Dns::default()))
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
        check("{}", "masquerade: None");
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
        for (conf, expected) in [
            (
                r#"{"isGateway":"yes"}"#,
                r#"7 isGateway is "yes", not true or false"#,
            ),
            (
                r#"{"mtu":12}"#,
                "7 mtu is 12, not a number from 68 to 65535",
            ),
            (r#"{"mtu":"1500"}"#, "7 mtu is"),
            (r#"{"bridge":"a-name-much-too-long"}"#, "7 bridge"),
            (
                r#"{"mac":"01:00:5e:00:00:01"}"#,
                "7 mac \"01:00:5e:00:00:01\" is a group address",
            ),
            (r#"{"runtimeConfig":{"mac":"x"}}"#, "7 runtimeConfig.mac"),
            (
                r#"{"hairpinMode":true,"promiscMode":true}"#,
                "7 hairpinMode cannot be combined",
            ),
            (r#"{"ipMasqExcept":["x"]}"#, r#"7 ipMasqExcept holds "x""#),
            (r#"{"ipMasqBackend":"pf"}"#, "7 ipMasqBackend"),
            (
                r#"{"ipam":{"subnet":"10.0.0.0/8"}}"#,
                "7 ipam.type is missing",
            ),
            (
                r#"{"disableContainerInterface":true,"ipam":{"type":"host-local"}}"#,
                "7 disableContainerInterface cannot be combined with ipam",
            ),
            (
                r#"{"vlan":4095}"#,
                "7 vlan is 4095, not a whole number from 0 to 4094",
            ),
            (
                r#"{"vlanTrunk":[{"minID":5}]}"#,
                "7 vlanTrunk[0].maxID is missing",
            ),
            (
                r#"{"vlanTrunk":[{"id":1},{"minID":9,"maxID":5}]}"#,
                "7 vlanTrunk[1].minID is 9, more than maxID 5",
            ),
            (r#"{"vlanTrunk":[{"id":0}]}"#, "7 vlanTrunk[0].id is 0"),
            (r#"{"ingressPolicy":"shut"}"#, "7 ingressPolicy \"shut\""),
            (r#"{"dns":{"search":"x"}}"#, "7 dns.search is"),
            (
                r#"{"runtimeConfig":{"dns":{"servers":[1]}}}"#,
                "7 runtimeConfig.dns.servers holds 1",
            ),
            (r#"{"firewalldZone":5}"#, "7 firewalldZone is 5"),
            (r#"{"macspoofchk":1}"#, "7 macspoofchk is 1"),
        ] {
            check(conf, expected);
        }
    }

    #[test]
    fn vlans_are_gathered_in_order() {
        check(
            r#"{"vlan":7,"vlanTrunk":[{"minID":10,"maxID":12},{"id":11},{"id":3}]}"#,
            "Vlans { native: Some(7), trunk: [3, 10, 11, 12], preserve_default: false }",
        );
    }

    #[test]
    fn backends_are_taken_where_a_key_asks_for_them() {
        check(r#"{"ipMasq":true}"#, "masquerade: Some(Nftables)");
        check(
            r#"{"ipMasq":true,"ipMasqBackend":"iptables"}"#,
            "masquerade: Some(Iptables)",
        );
        check(
            r#"{"backend":"iptables"}"#,
            "isolation: Open, admin_chain: None",
        );
        check(
            r#"{"backend":"iptables","ingressPolicy":"open"}"#,
            r#"admin_chain: Some("FERRULE-ADMIN")"#,
        );
        check(r#"{"ingressPolicy":"isolated"}"#, "isolated: true");
    }

    proptest::proptest! {
        #[test]
        fn no_object_makes_the_reader_panic(key in "[a-zA-Z]{1,12}", value in ".*") {
            let keys = [
                key.as_str(), "mtu", "mac", "vlan", "ipam", "bridge", "ipMasqExcept", "vlanTrunk",
                "runtimeConfig", "dns", "backend", "conditionsV4", "sysctl", "ingressRate",
            ];
            for key in keys {
                let list = Value::Array(vec![value.clone().into()]);
                for value in [Value::String(value.clone()), list] {
                    let object = Object::from_iter([(key.to_owned(), value)]);
                    let _ = BridgeConf::of_object(&object, Some("02:00:00:00:00:01"));
                }
            }
        }
    }
}
