//! resolv.conf of a pod by dnsPolicy and dnsConfig.

use super::{LaunchContext, host_network, pod_namespace};
use k8s_openapi::api::core::v1::{Pod, PodDNSConfig};
use runtime::service::DnsConfig;
use std::collections::BTreeSet;
use std::net::IpAddr;

const MAX_SERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;
const MAX_SEARCH_CHARS: usize = 2048;
const MAX_DOMAIN: usize = 253;

/// A pod's resolver settings and what users should be told about them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodDns {
    /// The settings.
    pub config: DnsConfig,
    /// Warning events for the pod: (reason, message).
    pub warnings: Vec<(&'static str, String)>,
}

/// Reads a resolv.conf. Servers add up, the last `search` wins, options replace their namesakes;
/// unknown lines are passed over.
pub fn parse_resolv_conf(text: &str) -> DnsConfig {
    let mut config = DnsConfig::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => config.servers.extend(words.next().map(str::to_owned)),
            Some("search") => {
                config.searches = words
                    .filter(|domain| *domain != ".")
                    .map(|domain| domain.strip_suffix('.').unwrap_or(domain).to_owned())
                    .collect();
            }
            Some("options") => words.for_each(|word| set_option(&mut config.options, word)),
            _ => {}
        }
    }
    config
}

fn set_option(options: &mut Vec<String>, word: &str) {
    let name = |option: &str| option.split(':').next().unwrap_or_default().to_owned();
    let wanted = name(word);
    match options.iter_mut().find(|option| name(option) == wanted) {
        Some(option) => *option = word.to_owned(),
        None => options.push(word.to_owned()),
    }
}

fn distinct(list: Vec<String>) -> Vec<String> {
    let mut seen = BTreeSet::new();
    list.into_iter()
        .filter(|item| seen.insert(item.clone()))
        .collect()
}

/// The pod's resolver settings.
pub fn pod_dns(pod: &Pod, context: &LaunchContext) -> PodDns {
    let mut warnings = Vec::new();
    let spec = pod.spec.as_ref();
    let policy = spec.and_then(|s| s.dns_policy.as_deref());
    let cluster = match policy.unwrap_or("ClusterFirst") {
        "None" => None,
        "Default" => Some(false),
        "ClusterFirstWithHostNet" => Some(true),
        _ => Some(!host_network(pod)),
    };
    let mut config = match cluster {
        None => DnsConfig::default(),
        Some(true) if !context.cluster_dns.is_empty() => cluster_config(pod, context),
        Some(true) => {
            warnings.push((
                "MissingClusterDNS",
                format!(
                    "pod: {:?}. kubelet does not have ClusterDNS IP configured and cannot create Pod using \"ClusterFirst\" policy. Falling back to \"Default\" policy.",
                    super::describe(pod)
                ),
            ));
            host_config(context)
        }
        Some(false) => host_config(context),
    };
    if let Some(own) = spec.and_then(|s| s.dns_config.as_ref()) {
        merge(&mut config, own);
    }
    fit(&mut config, &mut warnings);
    PodDns { config, warnings }
}

fn cluster_config(pod: &Pod, context: &LaunchContext) -> DnsConfig {
    let host = context.host_dns.as_ref();
    let mut searches = Vec::new();
    if !context.cluster_domain.is_empty() {
        let domain = &context.cluster_domain;
        searches.push(format!("{}.svc.{domain}", pod_namespace(pod)));
        searches.push(format!("svc.{domain}"));
        searches.push(domain.clone());
    }
    searches.extend(host.iter().flat_map(|h| h.searches.iter().cloned()));
    DnsConfig {
        servers: context.cluster_dns.iter().map(IpAddr::to_string).collect(),
        searches: distinct(searches),
        options: vec!["ndots:5".to_owned()],
    }
}

/// The node's settings; with resolvConf "" a resolver on the pod's own loopback.
fn host_config(context: &LaunchContext) -> DnsConfig {
    if let Some(host) = &context.host_dns {
        return host.clone();
    }
    let mut servers: Vec<String> = context
        .host_ips
        .iter()
        .map(|ip| if ip.is_ipv6() { "::1" } else { "127.0.0.1" }.to_owned())
        .collect();
    if servers.is_empty() {
        servers.push("127.0.0.1".to_owned());
    }
    DnsConfig {
        servers,
        searches: vec![".".to_owned()],
        options: Vec::new(),
    }
}

fn merge(config: &mut DnsConfig, own: &PodDNSConfig) {
    config
        .servers
        .extend(own.nameservers.iter().flatten().cloned());
    config.servers = distinct(std::mem::take(&mut config.servers));
    config
        .searches
        .extend(own.searches.iter().flatten().cloned());
    config.searches = distinct(std::mem::take(&mut config.searches));
    for option in own.options.iter().flatten() {
        let name = option.name.as_deref().unwrap_or_default();
        match option.value.as_deref().filter(|v| !v.is_empty()) {
            Some(value) => set_option(&mut config.options, &format!("{name}:{value}")),
            None => set_option(&mut config.options, name),
        }
    }
}

/// Cuts what resolvers cannot take, and says so.
fn fit(config: &mut DnsConfig, warnings: &mut Vec<(&'static str, String)>) {
    if config.servers.len() > MAX_SERVERS {
        config.servers.truncate(MAX_SERVERS);
        warnings.push((
            "DNSConfigForming",
            format!(
                "Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: {}",
                config.servers.join(" ")
            ),
        ));
    }
    let before = config.searches.len();
    config.searches.truncate(MAX_SEARCHES);
    config.searches.retain(|domain| domain.len() <= MAX_DOMAIN);
    while config.searches.join(" ").len() > MAX_SEARCH_CHARS {
        config.searches.pop();
    }
    if config.searches.len() < before {
        warnings.push((
            "DNSConfigForming",
            format!(
                "Search Line limits were exceeded, some search paths have been omitted, the applied search line is: {}",
                config.searches.join(" ")
            ),
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::pod;
    use super::*;
    use serde_json::{Value, json};

    fn context() -> LaunchContext {
        LaunchContext {
            cluster_dns: vec!["10.96.0.10".parse().unwrap()],
            cluster_domain: "cluster.local".into(),
            host_dns: Some(parse_resolv_conf(
                "# x\nnameserver 1.1.1.1\nsearch old\nsearch lan. .\noptions ndots:1 rotate\noptions ndots:2\n",
            )),
            ..LaunchContext::default()
        }
    }

    fn text(config: &DnsConfig) -> String {
        format!(
            "{}|{}|{}",
            config.servers.join(" "),
            config.searches.join(" "),
            config.options.join(" ")
        )
    }

    fn of(spec: Value) -> String {
        text(&pod_dns(&pod(spec), &context()).config)
    }

    const CLUSTER: &str =
        "10.96.0.10|ns.svc.cluster.local svc.cluster.local cluster.local lan|ndots:5";

    #[test]
    fn the_policy_decides_where_settings_come_from() {
        let node = "1.1.1.1|lan|ndots:2 rotate";
        assert_eq!(of(json!({})), CLUSTER);
        assert_eq!(of(json!({"dnsPolicy": "ClusterFirst"})), CLUSTER);
        assert_eq!(
            of(json!({"dnsPolicy": "ClusterFirst", "hostNetwork": true})),
            node
        );
        assert_eq!(
            of(json!({"dnsPolicy": "ClusterFirstWithHostNet", "hostNetwork": true})),
            CLUSTER
        );
        assert_eq!(of(json!({"dnsPolicy": "Default"})), node);
        let own = json!({"nameservers": ["9.9.9.9"], "searches": ["a"], "options": [{"name": "ndots", "value": "1"}, {"name": "debug"}]});
        assert_eq!(
            of(json!({"dnsPolicy": "None", "dnsConfig": own})),
            "9.9.9.9|a|ndots:1 debug"
        );
        assert_eq!(
            of(json!({"dnsPolicy": "Default", "dnsConfig": own})),
            "1.1.1.1 9.9.9.9|lan a|ndots:1 rotate debug"
        );
    }

    #[test]
    fn without_a_cluster_server_the_node_serves_and_the_pod_is_warned() {
        let context = LaunchContext {
            cluster_dns: vec![],
            host_dns: None,
            ..context()
        };
        let got = pod_dns(&pod(json!({})), &context);
        assert_eq!(text(&got.config), "127.0.0.1|.|");
        assert_eq!(got.warnings[0].0, "MissingClusterDNS");
    }

    #[test]
    fn more_than_resolvers_take_is_cut_and_told() {
        let many: Vec<String> = (0..40).map(|i| format!("d{i}")).collect();
        let servers = ["1.0.0.1", "1.0.0.2", "1.0.0.3", "1.0.0.4"];
        let spec =
            json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": servers, "searches": many}});
        let got = pod_dns(&pod(spec), &context());
        assert_eq!(
            (got.config.servers.len(), got.config.searches.len()),
            (3, 32)
        );
        assert_eq!(got.warnings.len(), 2);
        let long = vec!["x".repeat(254), "ok".to_owned()];
        let spec = json!({"dnsPolicy": "None", "dnsConfig": {"searches": long}});
        assert_eq!(pod_dns(&pod(spec), &context()).config.searches, ["ok"]);
        let wide: Vec<String> = (0..20).map(|i| format!("{i:0200}")).collect();
        let spec = json!({"dnsPolicy": "None", "dnsConfig": {"searches": wide}});
        assert_eq!(pod_dns(&pod(spec), &context()).config.searches.len(), 10);
    }
}
