//! Environment variables that name the cluster's services (docker-links style).

use k8s_openapi::api::core::v1::Service;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Services of namespace `default` that every pod sees.
const MASTER_SERVICES: [&str; 1] = ["kubernetes"];

/// Variables of the services a pod of `namespace` sees, sorted by name: `kubernetes` of
/// `default` always, those of its own namespace with `enable_links`.
pub fn service_env(
    services: &[Arc<Service>],
    namespace: &str,
    enable_links: bool,
) -> BTreeMap<String, String> {
    let mut chosen: BTreeMap<&str, &Service> = BTreeMap::new();
    for service in services {
        let name = service.metadata.name.as_deref().unwrap_or_default();
        let of = service.metadata.namespace.as_deref().unwrap_or_default();
        if cluster_ip(service).is_none() {
            continue;
        }
        if of == "default" && MASTER_SERVICES.contains(&name) {
            // One of the same name in the pod's own namespace wins.
            chosen.entry(name).or_insert(service);
        } else if of == namespace && enable_links {
            chosen.insert(name, service);
        }
    }
    let mut env = BTreeMap::new();
    for (name, service) in chosen {
        add_service(&mut env, name, service);
    }
    env
}

fn cluster_ip(service: &Service) -> Option<&str> {
    let ip = service.spec.as_ref()?.cluster_ip.as_deref()?;
    (!ip.is_empty() && ip != "None").then_some(ip)
}

fn add_service(env: &mut BTreeMap<String, String>, name: &str, service: &Service) {
    let (Some(ip), Some(spec)) = (cluster_ip(service), service.spec.as_ref()) else {
        return;
    };
    let prefix = variable(name);
    let host = if ip.contains(':') {
        format!("[{ip}]")
    } else {
        ip.to_owned()
    };
    env.insert(format!("{prefix}_SERVICE_HOST"), ip.to_owned());
    for (index, port) in spec.ports.iter().flatten().enumerate() {
        let number = port.port;
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let url = format!("{}://{host}:{number}", protocol.to_lowercase());
        if index == 0 {
            env.insert(format!("{prefix}_SERVICE_PORT"), number.to_string());
            env.insert(format!("{prefix}_PORT"), url.clone());
        }
        if let Some(port_name) = port.name.as_deref().filter(|n| !n.is_empty()) {
            let key = format!("{prefix}_SERVICE_PORT_{}", variable(port_name));
            env.insert(key, number.to_string());
        }
        let key = format!("{prefix}_PORT_{number}_{}", protocol.to_uppercase());
        env.insert(format!("{key}_PROTO"), protocol.to_lowercase());
        env.insert(format!("{key}_PORT"), number.to_string());
        env.insert(format!("{key}_ADDR"), ip.to_owned());
        env.insert(key, url);
    }
}

fn variable(name: &str) -> String {
    name.replace('-', "_").to_uppercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn service(ns: &str, name: &str, ip: &str) -> Arc<Service> {
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": name, "namespace": ns},
                "spec": {"clusterIP": ip, "ports": [
                    {"name": "http-web", "port": 80, "protocol": "TCP"},
                    {"name": "dns", "port": 53, "protocol": "UDP"},
                ]},
            }))
            .unwrap(),
        )
    }

    #[test]
    fn a_service_gives_the_variables_programs_expect() {
        let env = service_env(&[service("ns", "my-db", "10.0.0.9")], "ns", true);
        for (key, want) in [
            ("MY_DB_SERVICE_HOST", "10.0.0.9"),
            ("MY_DB_SERVICE_PORT", "80"),
            ("MY_DB_SERVICE_PORT_HTTP_WEB", "80"),
            ("MY_DB_SERVICE_PORT_DNS", "53"),
            ("MY_DB_PORT", "tcp://10.0.0.9:80"),
            ("MY_DB_PORT_80_TCP", "tcp://10.0.0.9:80"),
            ("MY_DB_PORT_80_TCP_PROTO", "tcp"),
            ("MY_DB_PORT_80_TCP_PORT", "80"),
            ("MY_DB_PORT_80_TCP_ADDR", "10.0.0.9"),
            ("MY_DB_PORT_53_UDP", "udp://10.0.0.9:53"),
        ] {
            assert_eq!(env.get(key).map(String::as_str), Some(want), "{key}");
        }
    }

    #[test]
    fn only_the_own_namespace_and_the_master_service_are_seen() {
        let all = [
            service("default", "kubernetes", "10.0.0.1"),
            service("default", "other", "10.0.0.2"),
            service("ns", "mine", "fd00::5"),
            service("ns", "headless", "None"),
        ];
        let linked = service_env(&all, "ns", true);
        assert!(linked.contains_key("KUBERNETES_SERVICE_HOST"));
        assert_eq!(linked["MINE_PORT"], "tcp://[fd00::5]:80");
        assert!(
            !linked
                .keys()
                .any(|k| k.starts_with("OTHER") || k.starts_with("HEADLESS"))
        );
        let unlinked = service_env(&all, "ns", false);
        assert!(unlinked.keys().all(|k| k.starts_with("KUBERNETES_")));
    }

    #[test]
    fn a_kubernetes_service_of_the_own_namespace_wins() {
        let all = [
            service("ns", "kubernetes", "1.1.1.1"),
            service("default", "kubernetes", "2.2.2.2"),
        ];
        assert_eq!(
            service_env(&all, "ns", true)["KUBERNETES_SERVICE_HOST"],
            "1.1.1.1"
        );
    }
}
