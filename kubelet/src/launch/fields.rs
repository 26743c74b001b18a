//! Values of fieldRef and resourceFieldRef, for the environment and for downwardAPI volumes.

use super::{LaunchContext, pod_name, pod_namespace, pod_uid};
use crate::quantity::Quantity;
use k8s_openapi::api::core::v1::{Container, Pod, ResourceFieldSelector};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;

/// A field of the pod's metadata as text: what downwardAPI volumes may show.
///
/// # Errors
/// The stock message for a path that is not supported.
pub fn metadata_field(pod: &Pod, path: &str) -> Result<String, String> {
    let empty = BTreeMap::new();
    let labels = pod.metadata.labels.as_ref().unwrap_or(&empty);
    let annotations = pod.metadata.annotations.as_ref().unwrap_or(&empty);
    if let Some((map, key)) = path.strip_suffix("']").and_then(|p| p.split_once("['")) {
        return match map {
            "metadata.labels" => Ok(labels.get(key).cloned().unwrap_or_default()),
            "metadata.annotations" => Ok(annotations.get(key).cloned().unwrap_or_default()),
            _ => Err(format!("fieldPath {path:?} does not support subscript")),
        };
    }
    match path {
        "metadata.name" => Ok(pod_name(pod).to_owned()),
        "metadata.namespace" => Ok(pod_namespace(pod).to_owned()),
        "metadata.uid" => Ok(pod_uid(pod).to_owned()),
        "metadata.labels" => Ok(format_map(labels)),
        "metadata.annotations" => Ok(format_map(annotations)),
        _ => Err(format!("unsupported fieldPath: {path}")),
    }
}

/// Any field the environment may ask for.
///
/// # Errors
/// The stock message for a path that is not supported.
pub fn env_field(
    pod: &Pod,
    path: &str,
    context: &LaunchContext,
    pod_ips: &[IpAddr],
) -> Result<String, String> {
    let spec = pod.spec.as_ref();
    let text = |value: Option<&String>| Ok(value.cloned().unwrap_or_default());
    match path {
        "spec.nodeName" => match spec.and_then(|s| s.node_name.as_ref()) {
            Some(name) => Ok(name.clone()),
            None => Ok(context.node_name.clone()),
        },
        "spec.serviceAccountName" => text(spec.and_then(|s| s.service_account_name.as_ref())),
        "status.hostIP" => Ok(first(&context.host_ips)),
        "status.hostIPs" => Ok(joined(&context.host_ips)),
        "status.podIP" => Ok(first(pod_ips)),
        "status.podIPs" => Ok(joined(pod_ips)),
        _ => metadata_field(pod, path),
    }
}

fn first(ips: &[IpAddr]) -> String {
    ips.first().map(IpAddr::to_string).unwrap_or_default()
}

fn joined(ips: &[IpAddr]) -> String {
    let texts: Vec<String> = ips.iter().map(IpAddr::to_string).collect();
    texts.join(",")
}

/// `key="value"` lines, sorted by key, the value quoted as Go quotes strings.
fn format_map(map: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    for (key, value) in map {
        if !out.is_empty() {
            out.push('\n');
        }
        out.push_str(key);
        out.push('=');
        quote(&mut out, value);
    }
    out
}

/// Quotes as Go's `strconv.Quote`: control and invisible characters are escaped.
fn quote(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\x07' => out.push_str("\\a"),
            '\x08' => out.push_str("\\b"),
            '\x0c' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x0b' => out.push_str("\\v"),
            // Writing to a string cannot fail.
            c if c < ' ' || c == '\x7f' => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c if !c.is_ascii() && is_invisible(c) => {
                let code = c as u32;
                let _ = if code < 0x1_0000 {
                    write!(out, "\\u{code:04x}")
                } else {
                    write!(out, "\\U{code:08x}")
                };
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Not printable in Go's sense: controls, separators other than the ASCII space, formatters and
/// private use, as far as Rust's escaping knows them.
fn is_invisible(c: char) -> bool {
    let mut escaped = c.escape_debug();
    // Combining characters are escaped by Rust at the start of a text, but Go prints them.
    (escaped.len() > 1 && c.is_control())
        || c.is_whitespace()
        || matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e000}'..='\u{f8ff}' | '\u{e0000}'..='\u{10ffff}')
        || (escaped.next() == Some('\\') && c == '\u{fffe}')
}

/// A resource of a container as text, divided and rounded up. Missing limits of cpu, memory and
/// ephemeral storage are the pod's own, or else the node's allocatable.
///
/// # Errors
/// An unknown resource, or an amount that is no quantity.
pub fn resource_field(
    selector: &ResourceFieldSelector,
    pod: &Pod,
    container: &Container,
    context: &LaunchContext,
) -> Result<String, String> {
    let unsupported = || format!("unsupported container resource : {}", selector.resource);
    let (kind, name) = selector.resource.split_once('.').ok_or_else(unsupported)?;
    let plain = matches!(name, "cpu" | "memory" | "ephemeral-storage");
    if !plain && !name.starts_with("hugepages-") {
        return Err(unsupported());
    }
    let resources = container.resources.as_ref();
    let find = |list: Option<&BTreeMap<String, ApiQuantity>>| match list.and_then(|l| l.get(name)) {
        Some(amount) => Quantity::try_from(amount).map_err(|e| e.to_string()),
        None => Ok(Quantity::ZERO),
    };
    let mut amount = match kind {
        "limits" => find(resources.and_then(|r| r.limits.as_ref()))?,
        "requests" => find(resources.and_then(|r| r.requests.as_ref()))?,
        _ => return Err(unsupported()),
    };
    if kind == "limits" && plain && amount.is_zero() {
        let own = pod.spec.as_ref().and_then(|s| s.resources.as_ref());
        if name != "ephemeral-storage" {
            amount = find(own.and_then(|r| r.limits.as_ref()))?;
        }
        if amount.is_zero() {
            amount = find(Some(&context.allocatable))?;
        }
    }
    let divisor = match &selector.divisor {
        Some(divisor) => Quantity::try_from(divisor).map_err(|e| e.to_string())?,
        None => Quantity::ZERO,
    };
    let divisor = if divisor.is_zero() {
        Quantity::from_milli(1000)
    } else {
        divisor
    };
    // cpu is counted in thousandths, everything else in whole units.
    let (amount, divisor) = if name == "cpu" {
        (amount.milli_value(), divisor.milli_value())
    } else {
        (amount.value(), divisor.value())
    };
    if divisor <= 0 {
        return Err(format!("divisor of {} must be positive", selector.resource));
    }
    let (amount, divisor) = (i128::from(amount), i128::from(divisor));
    let quotient = amount.div_euclid(divisor) + i128::from(amount.rem_euclid(divisor) != 0);
    Ok(quotient.to_string())
}

/// Like [`resource_field`], for the container the selector names.
///
/// # Errors
/// Also when the pod has no such container.
pub fn resource_field_of_pod(
    selector: &ResourceFieldSelector,
    pod: &Pod,
    context: &LaunchContext,
) -> Result<String, String> {
    let name = selector.container_name.as_deref().unwrap_or_default();
    let spec = pod.spec.as_ref();
    let container = spec
        .into_iter()
        .flat_map(|s| {
            s.containers
                .iter()
                .chain(s.init_containers.iter().flatten())
        })
        .find(|c| c.name == name)
        .ok_or_else(|| format!("container {name} not found"))?;
    resource_field(selector, pod, container, context)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{pod, pod_of};
    use super::*;
    use serde_json::json;

    fn context() -> LaunchContext {
        LaunchContext {
            node_name: "n1".into(),
            host_ips: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            allocatable: serde_json::from_value(json!({"cpu": "3800m", "memory": "1Gi"})).unwrap(),
            ..LaunchContext::default()
        }
    }

    #[test]
    fn every_field_of_the_downward_api_is_known() {
        let pod = pod(json!({"serviceAccountName": "sa", "nodeName": "n1"}));
        let ips: Vec<IpAddr> = vec!["10.1.0.2".parse().unwrap(), "fd01::2".parse().unwrap()];
        for (path, want) in [
            ("metadata.name", "p"),
            ("metadata.namespace", "ns"),
            ("metadata.uid", "u1"),
            ("metadata.labels['app']", "web"),
            ("metadata.labels['none']", ""),
            ("metadata.annotations['note']", "say \"hi\"\nbye"),
            ("metadata.labels", "a/b=\"c\"\napp=\"web\""),
            ("metadata.annotations", "note=\"say \\\"hi\\\"\\nbye\""),
            ("spec.nodeName", "n1"),
            ("spec.serviceAccountName", "sa"),
            ("status.hostIP", "10.0.0.1"),
            ("status.hostIPs", "10.0.0.1,fd00::1"),
            ("status.podIP", "10.1.0.2"),
            ("status.podIPs", "10.1.0.2,fd01::2"),
        ] {
            assert_eq!(
                env_field(&pod, path, &context(), &ips).unwrap(),
                want,
                "{path}"
            );
        }
        assert_eq!(
            env_field(&pod, "spec.foo", &context(), &ips).unwrap_err(),
            "unsupported fieldPath: spec.foo"
        );
    }

    #[test]
    fn resources_are_divided_rounded_up_and_default_to_the_node() {
        let pod = pod_of(json!({"name": "c", "resources": {
            "requests": {"cpu": "250m", "memory": "32Mi"},
            "limits": {"memory": "64Mi", "hugepages-2Mi": "4Mi"},
        }}));
        for (resource, divisor, want) in [
            ("requests.cpu", "", "1"),
            ("requests.cpu", "1m", "250"),
            ("requests.memory", "1Mi", "32"),
            ("limits.memory", "", "67108864"),
            ("limits.memory", "1Gi", "1"),
            ("limits.cpu", "", "4"),
            ("limits.cpu", "1m", "3800"),
            ("limits.hugepages-2Mi", "1Mi", "4"),
            ("limits.ephemeral-storage", "", "0"),
        ] {
            let mut selector = json!({"resource": resource, "containerName": "c"});
            if !divisor.is_empty() {
                selector["divisor"] = json!(divisor);
            }
            let selector: ResourceFieldSelector = serde_json::from_value(selector).unwrap();
            let got = resource_field_of_pod(&selector, &pod, &context()).unwrap();
            assert_eq!(got, want, "{resource} / {divisor}");
        }
        let selector = ResourceFieldSelector {
            resource: "limits.gpu".into(),
            container_name: Some("c".into()),
            divisor: None,
        };
        assert!(resource_field_of_pod(&selector, &pod, &context()).is_err());
    }

    #[test]
    fn limits_of_the_pod_stand_in_for_those_of_its_containers() {
        let pod = pod(json!({"resources": {"limits": {"memory": "512Mi"}}}));
        for (resource, want) in [("limits.memory", "536870912"), ("limits.cpu", "4")] {
            let selector = ResourceFieldSelector {
                resource: resource.into(),
                container_name: Some("c".into()),
                divisor: None,
            };
            let got = resource_field_of_pod(&selector, &pod, &context()).unwrap();
            assert_eq!(got, want, "{resource}");
        }
    }
}
