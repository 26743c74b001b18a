//! What a Node object says to its peers, and what ours says of us: podCIDRs, addresses, and
//! annotations, ours and flannel's.
//!
//! A node carries our annotation, flannel's, or both. Where both disagree flannel's counts: our
//! agent always writes them together, so flannel has run there since.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use linux::netlink::Mac;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::netconf::Backend;

/// Our annotation: an [`Announcement`] as JSON.
pub(crate) const ANNOTATION: &str = "peers.ferrule.dev/announcement";
const FLANNEL: &str = "flannel.alpha.coreos.com/";

/// What flannel's nodes read of each other.
const FLANNEL_KEYS: [&str; 6] = [
    "kube-subnet-manager",
    "backend-type",
    "backend-data",
    "backend-v6-data",
    "public-ip",
    "public-ipv6",
];

/// One per address family.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct PerFamily<T> {
    pub(crate) v4: T,
    pub(crate) v6: T,
}

impl<T> PerFamily<T> {
    pub(crate) fn of(&self, family: Family) -> &T {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    pub(crate) fn of_mut(&mut self, family: Family) -> &mut T {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) const BOTH: [Self; 2] = [Self::V4, Self::V6];

    pub(crate) fn of(address: IpAddr) -> Self {
        if address.is_ipv4() {
            Self::V4
        } else {
            Self::V6
        }
    }

    pub(crate) fn of_net(net: &IpNet) -> Self {
        Self::of(net.addr())
    }

    /// As users write it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// Where a node is reached in one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// Outer destination, or next hop.
    pub(crate) address: IpAddr,
    /// Hardware address of its VXLAN device.
    pub(crate) mac: Option<Mac>,
}

/// A node as its peers need it; far smaller than the object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PeerNode {
    pub(crate) name: String,
    pub(crate) pod_cidrs: Vec<IpNet>,
    /// `InternalIP`s in order.
    pub(crate) addresses: Vec<IpAddr>,
    /// Name of the back end it announces; none when it announces nothing.
    pub(crate) backend: Option<String>,
    /// As announced.
    pub(crate) endpoints: PerFamily<Option<Endpoint>>,
    /// Network identifier it announces.
    pub(crate) vni: Option<u32>,
    /// Addresses that an administrator wants announced instead
    /// (`flannel.alpha.coreos.com/public-ip-overwrite`).
    pub(crate) overwrite: PerFamily<Option<IpAddr>>,
    /// Flannel runs or ran there.
    pub(crate) flannel: bool,
    /// Our agent runs or ran there.
    pub(crate) announced: bool,
    /// What could not be read, in words.
    pub(crate) complaint: Option<String>,
}

/// What this node tells its peers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Announcement {
    pub(crate) backend: Backend,
    pub(crate) vni: u32,
    pub(crate) endpoints: PerFamily<Option<Endpoint>>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireAnnouncement {
    backend: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vni: Option<u32>,
    endpoints: Vec<WireEndpoint>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireEndpoint {
    address: IpAddr,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mac: Option<String>,
}

/// Flannel's `backend-data`.
#[derive(Deserialize)]
struct FlannelData {
    #[serde(rename = "VNI", default)]
    vni: Option<u32>,
    #[serde(rename = "VtepMAC", default)]
    mac: Option<String>,
}

type Annotations = BTreeMap<String, String>;

/// What an object says, from its parts.
pub(crate) fn peer_node(
    name: &str,
    annotations: &Annotations,
    pod_cidrs: &[String],
    addresses: &[IpAddr],
) -> PeerNode {
    let mut node = PeerNode {
        name: name.to_owned(),
        pod_cidrs: Vec::new(),
        addresses: addresses.to_vec(),
        backend: None,
        endpoints: PerFamily::default(),
        vni: None,
        overwrite: PerFamily::default(),
        flannel: false,
        announced: annotations.contains_key(ANNOTATION),
        complaint: None,
    };
    for text in pod_cidrs {
        match text.parse::<IpNet>() {
            Ok(net) => node.pod_cidrs.push(net.trunc()),
            Err(_) => node.complaint = Some(format!("podCIDR {text:?} is not a network")),
        }
    }
    if let Some(text) = annotations.get(ANNOTATION)
        && let Err(problem) = node.read_ours(text)
    {
        node.complaint = Some(format!("annotation {ANNOTATION} {problem}"));
    }
    if let Err((key, problem)) = node.read_flannels(annotations) {
        node.complaint = Some(format!("annotation {FLANNEL}{key} {problem}"));
    }
    node
}

impl PeerNode {
    fn read_ours(&mut self, text: &str) -> Result<(), String> {
        let wire: WireAnnouncement =
            serde_json::from_str(text).map_err(|e| format!("cannot be read: {e}"))?;
        for endpoint in wire.endpoints {
            let mac = endpoint.mac.map(|mac| mac.parse::<Mac>()).transpose();
            let mac = mac.map_err(|e| e.to_string())?;
            let address = endpoint.address;
            *self.endpoints.of_mut(Family::of(address)) = Some(Endpoint { address, mac });
        }
        self.backend = Some(wire.backend);
        self.vni = wire.vni;
        Ok(())
    }

    fn read_flannels(&mut self, annotations: &Annotations) -> Result<(), (String, String)> {
        let get = |key: &str| annotations.get(&format!("{FLANNEL}{key}"));
        for (family, key) in [
            (Family::V4, "public-ip-overwrite"),
            (Family::V6, "public-ipv6-overwrite"),
        ] {
            *self.overwrite.of_mut(family) = get(key).map(|text| address(key, text)).transpose()?;
        }
        let Some(backend) = get("backend-type") else {
            return Ok(());
        };
        self.flannel = true;
        self.backend = Some(backend.clone());
        for (family, data, public) in [
            (Family::V4, "backend-data", "public-ip"),
            (Family::V6, "backend-v6-data", "public-ipv6"),
        ] {
            let Some(text) = get(public) else {
                continue;
            };
            let address = address(public, text)?;
            // "null" is what its host-gw writes.
            let text = get(data).map_or("null", String::as_str);
            let parsed: Option<FlannelData> = serde_json::from_str(text)
                .map_err(|e| (data.to_owned(), format!("cannot be read: {e}")))?;
            let mut mac = None;
            if let Some(parsed) = parsed {
                self.vni = parsed.vni.or(self.vni);
                let text = parsed.mac.filter(|mac| !mac.is_empty());
                mac = text
                    .map(|mac| mac.parse::<Mac>())
                    .transpose()
                    .map_err(|e: linux::netlink::BadMac| (data.to_owned(), e.to_string()))?;
            }
            *self.endpoints.of_mut(family) = Some(Endpoint { address, mac });
        }
        Ok(())
    }
}

fn address(key: &str, text: &str) -> Result<IpAddr, (String, String)> {
    let problem = || (key.to_owned(), format!("{text:?} is not an address"));
    text.trim().parse().map_err(|_| problem())
}

impl Announcement {
    /// Changes of annotations that say it: ours; and flannel's, where its nodes must read it. Where
    /// they must not, those that flannel left would contradict us: none means "remove".
    pub(crate) fn changes(&self, for_flannel: bool) -> BTreeMap<String, Option<String>> {
        let said = self.annotations(for_flannel).into_iter();
        let mut all: BTreeMap<_, _> = said.map(|(key, value)| (key, Some(value))).collect();
        for key in FLANNEL_KEYS {
            all.entry(format!("{FLANNEL}{key}")).or_insert(None);
        }
        all
    }

    fn annotations(&self, for_flannel: bool) -> Annotations {
        let endpoints = Family::BOTH.iter().filter_map(|f| *self.endpoints.of(*f));
        let wire = WireAnnouncement {
            backend: self.backend.as_str().to_owned(),
            vni: (self.backend == Backend::Vxlan).then_some(self.vni),
            endpoints: endpoints
                .map(|endpoint| WireEndpoint {
                    address: endpoint.address,
                    mac: endpoint.mac.map(|mac| mac.to_string()),
                })
                .collect(),
        };
        // Plain values always serialise.
        let text = serde_json::to_string(&wire).unwrap_or_default();
        let mut all = Annotations::from([(ANNOTATION.to_owned(), text)]);
        if !for_flannel {
            return all;
        }
        let mut put = |key: &str, value: String| all.insert(format!("{FLANNEL}{key}"), value);
        put("kube-subnet-manager", "true".into());
        put("backend-type", self.backend.as_str().into());
        for (family, data, public) in [
            (Family::V4, "backend-data", "public-ip"),
            (Family::V6, "backend-v6-data", "public-ipv6"),
        ] {
            if let Some(endpoint) = self.endpoints.of(family) {
                put(public, endpoint.address.to_string());
                let said = match endpoint.mac {
                    Some(mac) => json!({"VNI": self.vni, "VtepMAC": mac.to_string()}),
                    None => Value::Null,
                };
                put(data, said.to_string());
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(annotations: &[(&str, &str)]) -> PeerNode {
        let all = annotations.iter();
        let all = all
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        peer_node("n", &all, &["10.244.1.0/24".into()], &[])
    }

    fn announcement() -> Announcement {
        let endpoint = |address: &str, mac: &str| {
            Some(Endpoint {
                address: address.parse().unwrap(),
                mac: Some(mac.parse().unwrap()),
            })
        };
        Announcement {
            backend: Backend::Vxlan,
            vni: 1,
            endpoints: PerFamily {
                v4: endpoint("192.0.2.1", "02:00:00:00:00:01"),
                v6: endpoint("2001:db8::1", "02:00:00:00:00:02"),
            },
        }
    }

    #[test]
    fn what_we_announce_is_read_back_with_and_without_flannels_annotations() {
        for for_flannel in [false, true] {
            let said = announcement();
            let node = peer_node("n", &said.annotations(for_flannel), &[], &[]);
            assert_eq!(node.endpoints, said.endpoints);
            assert_eq!(
                (node.backend.as_deref(), node.vni),
                (Some("vxlan"), Some(1))
            );
            assert_eq!((node.flannel, node.complaint), (for_flannel, None));
        }
    }

    #[test]
    fn a_node_of_flannel_is_read() {
        let node = read(&[
            ("flannel.alpha.coreos.com/backend-type", "vxlan"),
            (
                "flannel.alpha.coreos.com/backend-data",
                r#"{"VNI":1,"VtepMAC":"7a:11:22:33:44:55"}"#,
            ),
            ("flannel.alpha.coreos.com/public-ip", "192.0.2.7"),
            ("flannel.alpha.coreos.com/kube-subnet-manager", "true"),
        ]);
        let endpoint = node.endpoints.v4.unwrap();
        assert_eq!(endpoint.address.to_string(), "192.0.2.7");
        assert_eq!(endpoint.mac.unwrap().to_string(), "7a:11:22:33:44:55");
        assert!(node.flannel && node.complaint.is_none());
    }

    #[test]
    fn where_flannel_ran_last_its_word_counts() {
        let mut all = announcement().annotations(false);
        let mut put = |key: &str, value: &str| all.insert(format!("{FLANNEL}{key}"), value.into());
        put("backend-type", "vxlan");
        put("backend-data", r#"{"VNI":1,"VtepMAC":"7a:11:22:33:44:55"}"#);
        put("public-ip", "192.0.2.9");
        let node = peer_node("n", &all, &[], &[]);
        assert_eq!(node.endpoints.v4.unwrap().address.to_string(), "192.0.2.9");
    }

    #[test]
    fn flannels_host_gw_announces_no_data() {
        let node = read(&[
            ("flannel.alpha.coreos.com/backend-type", "host-gw"),
            ("flannel.alpha.coreos.com/backend-data", "null"),
            ("flannel.alpha.coreos.com/public-ip", "192.0.2.7"),
        ]);
        assert_eq!(node.endpoints.v4.unwrap().mac, None);
        assert_eq!(node.complaint, None);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        for (key, value, said) in [
            (
                ANNOTATION,
                "x",
                "annotation peers.ferrule.dev/announcement cannot be read: expected value at line 1 column 1",
            ),
            (
                "flannel.alpha.coreos.com/public-ip-overwrite",
                "host",
                "annotation flannel.alpha.coreos.com/public-ip-overwrite \"host\" is not an address",
            ),
        ] {
            assert_eq!(read(&[(key, value)]).complaint.as_deref(), Some(said));
        }
    }

    proptest::proptest! {
        #[test]
        fn no_annotation_makes_the_reader_panic(ours: String, data: String, public: String) {
            let _ = read(&[
                (ANNOTATION, &ours),
                ("flannel.alpha.coreos.com/backend-type", "vxlan"),
                ("flannel.alpha.coreos.com/backend-data", &data),
                ("flannel.alpha.coreos.com/public-ip", &public),
            ]);
        }
    }
}
