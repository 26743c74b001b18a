//! Results on the wire: one reader for all versions, one printer per version's fields.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{AttachResult, Dns, Interface, IpConfig, Route, SpecVersion};

/// A result that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ResultError {
    /// Not JSON, or a field of the wrong type; the source names it.
    #[error("decode the result")]
    Decode(#[source] serde_json::Error),
    /// A version without interfaces and address lists.
    #[error("the result's cniVersion {0:?} is not spoken (0.3.0 to 1.1.0 are)")]
    Version(String),
    /// An address points to an interface that is not listed.
    #[error("ips[{ip}].interface is {index}, but the result lists {count} interfaces")]
    Interface {
        /// Position of the address.
        ip: usize,
        /// What it names.
        index: i64,
        /// How many there are.
        count: usize,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireResult {
    #[serde(default)]
    cni_version: String,
    #[serde(default, skip_serializing_if = "no_items")]
    interfaces: Option<Vec<WireInterface>>,
    #[serde(default, skip_serializing_if = "no_items")]
    ips: Option<Vec<WireIp>>,
    #[serde(default, skip_serializing_if = "no_items")]
    routes: Option<Vec<WireRoute>>,
    #[serde(default)]
    dns: Option<WireDns>,
}

fn no_items<T>(list: &Option<Vec<T>>) -> bool {
    list.as_ref().is_none_or(Vec::is_empty)
}

#[derive(Serialize, Deserialize)]
struct WireInterface {
    #[serde(default)]
    name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    mac: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mtu: Option<u32>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    sandbox: String,
    #[serde(
        default,
        rename = "socketPath",
        skip_serializing_if = "String::is_empty"
    )]
    socket_path: String,
    #[serde(default, rename = "pciID", skip_serializing_if = "String::is_empty")]
    pci_id: String,
}

#[derive(Serialize, Deserialize)]
struct WireIp {
    /// "4" or "6", before 1.0.0 only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    address: IpNet,
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "empty_is_none"
    )]
    gateway: Option<IpAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    interface: Option<i64>,
}

#[derive(Serialize, Deserialize)]
struct WireRoute {
    dst: IpNet,
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "empty_is_none"
    )]
    gw: Option<IpAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mtu: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    advmss: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    priority: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    table: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    scope: Option<u8>,
}

#[derive(Serialize, Deserialize, Default)]
struct WireDns {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    nameservers: Vec<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    domain: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    search: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    options: Vec<String>,
}

/// Go prints a missing address as an empty string in some plugins.
fn empty_is_none<'de, D: serde::Deserializer<'de>>(de: D) -> Result<Option<IpAddr>, D::Error> {
    match Option::<String>::deserialize(de)? {
        None => Ok(None),
        Some(text) if text.is_empty() => Ok(None),
        Some(text) => text.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

impl AttachResult {
    /// Reads a result of any spoken version.
    ///
    /// # Errors
    /// [`ResultError`] when it is malformed or of another version.
    pub fn from_value(value: &Value) -> Result<Self, ResultError> {
        let wire = WireResult::deserialize(value).map_err(ResultError::Decode)?;
        wire.into_inner()
    }

    /// As [`AttachResult::from_value`], from text.
    ///
    /// # Errors
    /// As there.
    pub fn from_json(text: &[u8]) -> Result<Self, ResultError> {
        let wire: WireResult = serde_json::from_slice(text).map_err(ResultError::Decode)?;
        wire.into_inner()
    }

    /// The result in the form of `version`; fields it does not know are left out.
    #[must_use]
    pub fn to_value(&self, version: SpecVersion) -> Value {
        // The wire structs hold only strings, numbers and lists: this cannot fail.
        serde_json::to_value(WireResult::from_inner(self, version)).unwrap_or(Value::Null)
    }
}

impl WireResult {
    fn into_inner(self) -> Result<AttachResult, ResultError> {
        if self.cni_version.parse::<SpecVersion>().is_err() {
            return Err(ResultError::Version(self.cni_version));
        }
        let interfaces: Vec<Interface> = self
            .interfaces
            .unwrap_or_default()
            .into_iter()
            .map(WireInterface::into_inner)
            .collect();
        let mut ips = Vec::new();
        for (position, ip) in self.ips.unwrap_or_default().into_iter().enumerate() {
            // Delegated IPAM plugins list no interfaces but may say "interface 0".
            let interface = match ip.interface {
                None => None,
                Some(_) if interfaces.is_empty() => None,
                Some(index) => {
                    let known = usize::try_from(index)
                        .ok()
                        .filter(|i| *i < interfaces.len());
                    let count = interfaces.len();
                    Some(known.ok_or(ResultError::Interface {
                        ip: position,
                        index,
                        count,
                    })?)
                }
            };
            ips.push(IpConfig {
                address: ip.address,
                gateway: ip.gateway,
                interface,
            });
        }
        let dns = self.dns.unwrap_or_default();
        Ok(AttachResult {
            interfaces,
            ips,
            routes: self
                .routes
                .unwrap_or_default()
                .into_iter()
                .map(|r| Route {
                    dst: r.dst,
                    gw: r.gw,
                    mtu: r.mtu,
                    advmss: r.advmss,
                    priority: r.priority,
                    table: r.table,
                    scope: r.scope,
                })
                .collect(),
            dns: Dns {
                nameservers: dns.nameservers,
                domain: dns.domain,
                search: dns.search,
                options: dns.options,
            },
        })
    }

    fn from_inner(result: &AttachResult, version: SpecVersion) -> Self {
        let newest = version >= SpecVersion::V1_1_0;
        let interfaces = result
            .interfaces
            .iter()
            .map(|i| WireInterface::from_inner(i, newest))
            .collect();
        let ips = result.ips.iter().map(|ip| WireIp {
            version: (version < SpecVersion::V1_0_0).then(|| {
                if ip.address.addr().is_ipv4() {
                    "4"
                } else {
                    "6"
                }
                .to_owned()
            }),
            address: ip.address,
            gateway: ip.gateway,
            interface: ip.interface.and_then(|index| i64::try_from(index).ok()),
        });
        let routes = result.routes.iter().map(|r| WireRoute {
            dst: r.dst,
            gw: r.gw,
            mtu: r.mtu.filter(|_| newest),
            advmss: r.advmss.filter(|_| newest),
            priority: r.priority.filter(|_| newest),
            table: r.table.filter(|_| newest),
            scope: r.scope.filter(|_| newest),
        });
        Self {
            cni_version: version.as_str().to_owned(),
            interfaces: Some(interfaces),
            ips: Some(ips.collect()),
            routes: Some(routes.collect()),
            dns: Some(WireDns {
                nameservers: result.dns.nameservers.clone(),
                domain: result.dns.domain.clone(),
                search: result.dns.search.clone(),
                options: result.dns.options.clone(),
            }),
        }
    }
}

impl WireInterface {
    fn into_inner(self) -> Interface {
        Interface {
            name: self.name,
            mac: self.mac,
            mtu: self.mtu.filter(|mtu| *mtu > 0),
            sandbox: self.sandbox,
            socket_path: self.socket_path,
            pci_id: self.pci_id,
        }
    }

    fn from_inner(interface: &Interface, newest: bool) -> Self {
        Self {
            name: interface.name.clone(),
            mac: interface.mac.clone(),
            mtu: interface.mtu.filter(|_| newest),
            sandbox: interface.sandbox.clone(),
            socket_path: if newest {
                interface.socket_path.clone()
            } else {
                String::new()
            },
            pci_id: if newest {
                interface.pci_id.clone()
            } else {
                String::new()
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> AttachResult {
        AttachResult {
            interfaces: vec![
                Interface {
                    name: "cni0".into(),
                    mac: "0a:58:0a:f4:00:01".into(),
                    ..Default::default()
                },
                Interface {
                    name: "eth0".into(),
                    mac: "0a:58:0a:f4:00:02".into(),
                    mtu: Some(1500),
                    sandbox: "/run/netns/a".into(),
                    ..Default::default()
                },
            ],
            ips: vec![IpConfig {
                address: "10.244.0.2/24".parse().unwrap(),
                gateway: Some("10.244.0.1".parse().unwrap()),
                interface: Some(1),
            }],
            routes: vec![Route::new("0.0.0.0/0".parse().unwrap(), None)],
            dns: Dns {
                nameservers: vec!["10.96.0.10".into()],
                ..Default::default()
            },
        }
    }

    #[test]
    fn every_version_reads_back_what_it_printed() {
        for version in SpecVersion::ALL {
            let value = sample().to_value(version);
            assert_eq!(value["cniVersion"], version.as_str());
            let mut expected = sample();
            if version < SpecVersion::V1_1_0 {
                expected.interfaces[1].mtu = None;
            }
            assert_eq!(
                AttachResult::from_value(&value).unwrap(),
                expected,
                "{version}"
            );
        }
    }

    #[test]
    fn the_ip_version_is_printed_before_1_0_0_only() {
        for version in SpecVersion::ALL {
            let value = sample().to_value(version);
            let expected = version < SpecVersion::V1_0_0;
            assert_eq!(
                value["ips"][0].get("version").is_some(),
                expected,
                "{version}"
            );
        }
    }

    #[test]
    fn an_address_on_an_unlisted_interface_is_refused_by_place() {
        let mut value = sample().to_value(SpecVersion::NEWEST);
        value["ips"][0]["interface"] = 7.into();
        let error = AttachResult::from_value(&value).unwrap_err();
        assert_eq!(
            error.to_string(),
            "ips[0].interface is 7, but the result lists 2 interfaces"
        );
    }

    #[test]
    fn container_addresses_leave_out_those_of_the_node() {
        let mut result = sample();
        result.ips.push(IpConfig {
            address: "10.244.0.1/24".parse().unwrap(),
            gateway: None,
            interface: Some(0),
        });
        assert_eq!(
            result.container_addresses(),
            vec!["10.244.0.2/24".parse::<IpNet>().unwrap()]
        );
    }
}
