//! The managed `/etc/hosts`.

use super::hostname::hostname_and_domain;
use super::{LaunchContext, LaunchError, host_network};
use k8s_openapi::api::core::v1::{HostAlias, Pod};
use std::fmt::Write as _;
use std::net::IpAddr;

/// Text of the pod's `/etc/hosts`: its addresses and names, or with the node's network the
/// node's own file, then the host aliases.
///
/// # Errors
/// A hostname or subdomain that is no DNS label.
pub fn hosts_file(
    pod: &Pod,
    context: &LaunchContext,
    pod_ips: &[IpAddr],
) -> Result<String, LaunchError> {
    let mut text = if host_network(pod) {
        format!(
            "# Kubernetes-managed hosts file (host network).\n{}",
            context.host_hosts
        )
    } else {
        let (hostname, domain) = hostname_and_domain(pod, context)?;
        managed(pod_ips, &hostname, &domain)
    };
    let aliases = pod.spec.as_ref().and_then(|s| s.host_aliases.as_deref());
    add_aliases(&mut text, aliases.unwrap_or_default());
    Ok(text)
}

fn managed(pod_ips: &[IpAddr], hostname: &str, domain: &str) -> String {
    let mut text = String::from(
        "# Kubernetes-managed hosts file.\n\
         127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\n\
         fe00::0\tip6-mcastprefix\n\
         fe00::1\tip6-allnodes\n\
         fe00::2\tip6-allrouters\n",
    );
    for ip in pod_ips {
        // Writing to a string cannot fail.
        let _ = if domain.is_empty() {
            writeln!(text, "{ip}\t{hostname}")
        } else {
            writeln!(text, "{ip}\t{hostname}.{domain}\t{hostname}")
        };
    }
    text
}

fn add_aliases(text: &mut String, aliases: &[HostAlias]) {
    if aliases.is_empty() {
        return;
    }
    text.push_str("\n# Entries added by HostAliases.\n");
    for alias in aliases {
        let names = alias.hostnames.as_deref().unwrap_or_default().join("\t");
        let _ = writeln!(text, "{}\t{names}", alias.ip);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::pod;
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pod_finds_itself_and_its_aliases() {
        let context = LaunchContext {
            cluster_domain: "cluster.local".into(),
            ..LaunchContext::default()
        };
        let aliases = json!([{"ip": "1.2.3.4", "hostnames": ["a", "b"]}]);
        let pod = pod(json!({"subdomain": "s", "hostAliases": aliases}));
        let text = hosts_file(&pod, &context, &["10.0.0.2".parse().unwrap()]).unwrap();
        assert!(text.starts_with("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n"));
        assert!(text.contains("\n10.0.0.2\tp.s.ns.svc.cluster.local\tp\n"));
        assert!(text.ends_with("\n\n# Entries added by HostAliases.\n1.2.3.4\ta\tb\n"));
    }

    #[test]
    fn the_nodes_network_shows_the_nodes_file() {
        let context = LaunchContext {
            host_hosts: "127.0.0.1 node\n".into(),
            ..LaunchContext::default()
        };
        let pod = pod(json!({"hostNetwork": true}));
        let text = hosts_file(&pod, &context, &[]).unwrap();
        assert_eq!(
            text,
            "# Kubernetes-managed hosts file (host network).\n127.0.0.1 node\n"
        );
    }
}
