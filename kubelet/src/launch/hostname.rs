//! Host name and domain of a pod.

use super::{LaunchContext, LaunchError, pod_name, pod_namespace};
use k8s_openapi::api::core::v1::Pod;

/// Longest host name users may have; the kernel takes 64 bytes.
const MAX_HOSTNAME: usize = 63;
/// Longest node name of the kernel.
const MAX_KERNEL_NAME: usize = 64;

fn is_label(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !text.is_empty()
        && text.len() <= 63
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// The pod's short host name and its domain (empty without a subdomain).
///
/// # Errors
/// A hostname or subdomain that is no DNS label.
pub fn hostname_and_domain(
    pod: &Pod,
    context: &LaunchContext,
) -> Result<(String, String), LaunchError> {
    let spec = pod.spec.as_ref();
    let given = |text: Option<&String>| text.cloned().filter(|t| !t.is_empty());
    if let Some(name) = spec.and_then(|s| s.hostname_override.as_ref()) {
        if name.is_empty() || !name.split('.').all(is_label) {
            return Err(LaunchError::Sandbox(format!(
                "pod HostnameOverride {name:?} is not a valid DNS subdomain"
            )));
        }
        return Ok((shorten(pod, name)?, String::new()));
    }
    let hostname = match given(spec.and_then(|s| s.hostname.as_ref())) {
        Some(name) if !is_label(&name) => {
            return Err(LaunchError::Sandbox(format!(
                "pod Hostname {name:?} is not a valid DNS label"
            )));
        }
        Some(name) => name,
        None => pod_name(pod).to_owned(),
    };
    let domain = match given(spec.and_then(|s| s.subdomain.as_ref())) {
        Some(name) if !is_label(&name) => {
            return Err(LaunchError::Sandbox(format!(
                "pod Subdomain {name:?} is not a valid DNS label"
            )));
        }
        Some(name) => format!(
            "{name}.{}.svc.{}",
            pod_namespace(pod),
            context.cluster_domain
        ),
        None => String::new(),
    };
    Ok((shorten(pod, &hostname)?, domain))
}

/// Cuts at 63 bytes; what is cut may not end in `-` or `.`.
fn shorten(pod: &Pod, hostname: &str) -> Result<String, LaunchError> {
    if hostname.len() <= MAX_HOSTNAME {
        return Ok(hostname.to_owned());
    }
    let cut = hostname
        .get(..MAX_HOSTNAME)
        .unwrap_or_default()
        .trim_end_matches(['-', '.']);
    if cut.is_empty() {
        return Err(LaunchError::Sandbox(format!(
            "hostname for pod {:?} was invalid: {hostname:?}",
            pod_name(pod)
        )));
    }
    Ok(cut.to_owned())
}

/// What the kernel is told: the host name, or with setHostnameAsFQDN the full name.
///
/// # Errors
/// A full name longer than 64 bytes.
pub fn kernel_name(pod: &Pod, hostname: &str, domain: &str) -> Result<String, LaunchError> {
    let full = pod.spec.as_ref().and_then(|s| s.set_hostname_as_fqdn) == Some(true);
    if !full || domain.is_empty() {
        return Ok(hostname.to_owned());
    }
    let name = format!("{hostname}.{domain}");
    if name.len() > MAX_KERNEL_NAME {
        return Err(LaunchError::Sandbox(format!(
            "failed to construct FQDN from pod hostname and cluster domain, FQDN {name} is too long ({MAX_KERNEL_NAME} characters is the max, {} characters requested)",
            name.len()
        )));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::super::testing::pod;
    use super::*;
    use serde_json::{Value, json};

    fn of(spec: Value) -> Result<(String, String), LaunchError> {
        let context = LaunchContext {
            cluster_domain: "cluster.local".into(),
            ..LaunchContext::default()
        };
        hostname_and_domain(&pod(spec), &context)
    }

    #[test]
    fn names_come_from_pod_hostname_and_subdomain() {
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(of(json!({})).unwrap(), pair("p", ""));
        let spec = json!({"hostname": "h", "subdomain": "s"});
        assert_eq!(of(spec).unwrap(), pair("h", "s.ns.svc.cluster.local"));
        let spec = json!({"hostnameOverride": "a.b", "subdomain": "s"});
        assert_eq!(of(spec).unwrap(), pair("a.b", ""));
        assert!(of(json!({"hostname": "Bad"})).is_err());
        assert!(of(json!({"subdomain": "a.b"})).is_err());
        let mut long = pod(json!({}));
        long.metadata.name = Some(format!("{}-.{}", "a".repeat(61), "b".repeat(20)));
        let (name, _) = hostname_and_domain(&long, &LaunchContext::default()).unwrap();
        assert_eq!(name, "a".repeat(61));
    }

    #[test]
    fn the_full_name_is_told_on_request_and_refused_when_too_long() {
        let full = pod(json!({"setHostnameAsFQDN": true}));
        assert_eq!(kernel_name(&full, "h", "d").unwrap(), "h.d");
        assert_eq!(kernel_name(&full, "h", "").unwrap(), "h");
        assert_eq!(kernel_name(&pod(json!({})), "h", "d").unwrap(), "h");
        let error = kernel_name(&full, "h", &"d".repeat(70))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("(64 characters is the max, 72 characters requested)"),
            "{error}"
        );
    }
}
