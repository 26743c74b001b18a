//! From a checked tree of values to [`Config`]: defaults, conversions, and the rules that concern
//! several fields. Pure.

use super::check::Problem;
use super::eviction::evictions;
use super::flags::Flags;
use super::host::Facts;
use super::load::ConfigError;
use super::shown::effective;
use super::tree::Tree;
use super::{AuthorizationMode, CgroupDriver, Config, ImageSettings, ServerConfig, duration};
use crate::images::access::{Verification, check_listed};
use crate::quantity::Quantity;
use crate::userns::IDS_PER_POD;
use k8s_openapi::api::core::v1::Taint;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Pulls at once when nothing limits them: more only make each other slow.
const PARALLEL_PULLS: usize = 8;

const fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// Makes the configuration.
pub fn resolve(
    flags: &Flags,
    tree: Map<String, Value>,
    runtime: &Map<String, Value>,
    facts: Facts,
    mut notes: BTreeSet<String>,
) -> Result<Config, ConfigError> {
    let mut problems = Vec::new();
    let kubelet = Tree(&tree);
    let runtime = Tree(runtime);
    let node_ips = node_ips(flags, &facts)?;
    let node_name = node_name(flags, &facts)?;
    let root_dir = flags
        .root_dir
        .clone()
        .unwrap_or_else(|| PathBuf::from("/var/lib/kubelet"));
    if flags.bootstrap_kubeconfig.is_some() {
        notes.insert(
            "--bootstrap-kubeconfig has no effect: give --kubeconfig with a node certificate"
                .to_owned(),
        );
    }
    let server = server(&kubelet, &mut problems);
    let mut images = images(&kubelet, &runtime, &mut problems);
    let (providers, programs) = (
        flags.credential_provider_config.clone(),
        flags.credential_provider_bin_dir.clone(),
    );
    // One without the other means nothing, as with the stock kubelet.
    images.credential_providers = providers.zip(programs);
    let evictions = evictions(&kubelet, &mut problems);
    let (update, report) = status_frequencies(&kubelet);
    let config = Config {
        host_name: flags
            .hostname_override
            .clone()
            .unwrap_or_else(|| facts.host_name.clone()),
        node_name,
        node_ips,
        kubeconfig: flags.kubeconfig.clone().unwrap_or_default(),
        cert_dir: flags
            .cert_dir
            .clone()
            .unwrap_or_else(|| root_dir.join("pki")),
        root_dir,
        pod_logs_dir: kubelet.path("podLogsDir", "/var/log/pods"),
        runtime_root: runtime.path("root", "/var/lib/ferrule"),
        runtime_run_dir: runtime.path("runDir", "/run/ferrule"),
        cni_conf_dir: runtime.path("cniConfDir", "/etc/cni/net.d"),
        cni_bin_dirs: cni_bin_dirs(&runtime),
        shim_path: flags
            .shim_path
            .clone()
            .unwrap_or_else(|| runtime.path("shimPath", "")),
        static_pod_path: kubelet.path("staticPodPath", ""),
        file_check_frequency: kubelet.duration("fileCheckFrequency", seconds(20)),
        static_pod_url: kubelet.text("staticPodURL", ""),
        static_pod_url_headers: lists(&kubelet, "staticPodURLHeader"),
        http_check_frequency: kubelet.duration("httpCheckFrequency", seconds(20)),
        register_node: kubelet.bool("registerNode", true),
        register_with_taints: taints(&kubelet),
        node_labels: flags.node_labels.clone(),
        provider_id: kubelet.text("providerID", ""),
        external_cloud_provider: flags.cloud_provider.as_deref() == Some("external"),
        node_status_update_frequency: update,
        node_status_report_frequency: report,
        node_lease_duration: seconds(kubelet.positive("nodeLeaseDurationSeconds", 40)),
        cluster_dns: parsed(kubelet.texts("clusterDNS")),
        cluster_domain: kubelet
            .text("clusterDomain", "")
            .trim_matches('.')
            .to_owned(),
        resolv_conf: resolv_conf(&kubelet),
        pod_cidr: kubelet.text("podCIDR", ""),
        max_pods: max_pods(&kubelet, &facts),
        ids_per_pod: ids_per_pod(&kubelet, &mut problems),
        pod_pids_limit: kubelet.int("podPidsLimit", -1).max(-1),
        sync_frequency: kubelet.duration("syncFrequency", seconds(60)),
        crash_loop_max: kubelet
            .duration("crashLoopBackOff.maxContainerRestartPeriod", seconds(300)),
        allowed_unsafe_sysctls: kubelet.texts("allowedUnsafeSysctls"),
        seccomp_default: kubelet.bool("seccompDefault", false),
        single_process_oom_kill: kubelet.bool("singleProcessOOMKill", false),
        runtime_request_timeout: kubelet.duration("runtimeRequestTimeout", seconds(120)),
        cgroup_root: kubelet.text("cgroupRoot", "/"),
        cgroup_driver: match kubelet.text("cgroupDriver", "cgroupfs").as_str() {
            "systemd" => CgroupDriver::Systemd,
            _ => CgroupDriver::Cgroupfs,
        },
        cgroups_per_qos: kubelet.bool("cgroupsPerQOS", true),
        cpu_cfs_quota: kubelet.bool("cpuCFSQuota", true),
        cpu_cfs_quota_period: kubelet.duration("cpuCFSQuotaPeriod", Duration::from_millis(100)),
        enforce_pods_allocatable: match kubelet.get("enforceNodeAllocatable") {
            None => true,
            Some(_) => kubelet
                .texts("enforceNodeAllocatable")
                .contains(&"pods".to_owned()),
        },
        kube_reserved: kubelet.map("kubeReserved"),
        system_reserved: kubelet.map("systemReserved"),
        eviction_hard: evictions.hard,
        eviction_soft: evictions.soft,
        eviction_soft_grace: evictions.grace,
        eviction_minimum_reclaim: evictions.reclaim,
        local_storage_isolation: kubelet.bool("localStorageCapacityIsolation", true),
        eviction_transition_period: kubelet
            .duration("evictionPressureTransitionPeriod", seconds(300)),
        eviction_max_pod_grace_s: kubelet.int("evictionMaxPodGracePeriod", 0),
        oom_score_adj: kubelet.int("oomScoreAdj", -999),
        fail_cgroup_v1: kubelet.bool("failCgroupV1", false),
        fail_swap_on: kubelet.bool("failSwapOn", true),
        container_log_max_size: log_size(&kubelet, &mut problems),
        container_log_max_files: kubelet.int("containerLogMaxFiles", 5),
        container_log_monitor_interval: kubelet
            .duration("containerLogMonitorInterval", seconds(10)),
        event_qps: kubelet.int("eventRecordQPS", 50),
        event_burst: kubelet.positive("eventBurst", 100),
        feature_gates: feature_gates(&kubelet),
        images,
        server,
        log_json: kubelet.text("logging.format", "text") == "json",
        verbosity: flags
            .verbosity
            .unwrap_or_else(|| kubelet.int("logging.verbosity", 0)),
        effective: Value::Null,
        notes,
    };
    if !problems.is_empty() {
        let origin = flags
            .config
            .as_ref()
            .map_or_else(|| "flags".to_owned(), |p| p.display().to_string());
        return Err(ConfigError::Fields { origin, problems });
    }
    let effective = effective(&config, tree);
    Ok(Config {
        effective,
        ..config
    })
}

fn node_ips(flags: &Flags, facts: &Facts) -> Result<Vec<IpAddr>, ConfigError> {
    let given: Vec<IpAddr> = flags
        .node_ips
        .iter()
        .copied()
        .filter(|ip| !ip.is_unspecified())
        .collect();
    if !given.is_empty() {
        return Ok(given);
    }
    let found = facts.address.map(|ip| vec![ip]);
    found.ok_or_else(|| {
        ConfigError::Host(
            "find this node's address: there is no way out; give --node-ip".to_owned(),
        )
    })
}

/// Node names are DNS names in lower case.
fn node_name(flags: &Flags, facts: &Facts) -> Result<String, ConfigError> {
    let name = flags.hostname_override.as_ref().unwrap_or(&facts.host_name);
    let name = name.trim().to_lowercase();
    let label = |l: &str| {
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        !l.is_empty() && !l.starts_with('-') && !l.ends_with('-') && l.chars().all(inner)
    };
    if name.is_empty() || name.len() > 253 || !name.split('.').all(label) {
        return Err(ConfigError::Host(format!(
            "node name {name:?} is not a DNS name (a-z, 0-9, '-', '.'): give --hostname-override"
        )));
    }
    Ok(name)
}

fn parsed(texts: Vec<String>) -> Vec<IpAddr> {
    texts.iter().filter_map(|t| t.parse().ok()).collect()
}

fn taints(tree: &Tree<'_>) -> Vec<Taint> {
    let items = tree.get("registerWithTaints").and_then(Value::as_array);
    let text = |t: &Value, key: &str| t.get(key).and_then(Value::as_str).map(str::to_owned);
    let one = |t: &Value| Taint {
        key: text(t, "key").unwrap_or_default(),
        value: text(t, "value").filter(|v| !v.is_empty()),
        effect: text(t, "effect").unwrap_or_default(),
        time_added: None,
    };
    items.into_iter().flatten().map(one).collect()
}

fn cni_bin_dirs(runtime: &Tree<'_>) -> Vec<PathBuf> {
    let dirs = runtime.texts("cniBinDirs");
    if dirs.is_empty() {
        return vec![PathBuf::from("/opt/cni/bin")];
    }
    dirs.into_iter().map(PathBuf::from).collect()
}

/// A map of lists of texts.
fn lists(tree: &Tree<'_>, path: &str) -> BTreeMap<String, Vec<String>> {
    let map = tree.get(path).and_then(Value::as_object);
    let list = |values: &Value| {
        let values = values.as_array().into_iter().flatten();
        values
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect()
    };
    map.into_iter()
        .flatten()
        .map(|(name, values)| (name.clone(), list(values)))
        .collect()
}

/// Unset is the usual file; set to nothing means that pods get none of the node's settings.
fn resolv_conf(tree: &Tree<'_>) -> PathBuf {
    match tree.get("resolvConf").and_then(Value::as_str) {
        None => PathBuf::from("/etc/resolv.conf"),
        Some(path) => PathBuf::from(path),
    }
}

fn max_pods(tree: &Tree<'_>, facts: &Facts) -> u32 {
    let most: u32 = tree.positive("maxPods", 110);
    let per_core: u32 = tree.int("podsPerCore", 0);
    if per_core == 0 {
        return most;
    }
    let cpus = u32::try_from(facts.cpus).unwrap_or(u32::MAX);
    most.min(per_core.saturating_mul(cpus))
}

fn ids_per_pod(tree: &Tree<'_>, problems: &mut Vec<Problem>) -> u32 {
    const PATH: &str = "userNamespaces.idsPerPod";
    let ids: u32 = tree.int(PATH, IDS_PER_POD);
    if !ids.is_multiple_of(IDS_PER_POD) {
        let what = format!("must be a multiple of {IDS_PER_POD}");
        problem(problems, PATH, what);
        return IDS_PER_POD;
    }
    ids
}

/// How often status is computed, and sent without a change. Setting only the first sets both.
fn status_frequencies(tree: &Tree<'_>) -> (Duration, Duration) {
    let update = tree.duration("nodeStatusUpdateFrequency", Duration::ZERO);
    let fallback = if update.is_zero() {
        seconds(300)
    } else {
        update
    };
    let report = tree.duration("nodeStatusReportFrequency", fallback);
    let update = if update.is_zero() {
        seconds(10)
    } else {
        update
    };
    (update, report)
}

fn log_size(tree: &Tree<'_>, problems: &mut Vec<Problem>) -> u64 {
    let text = tree.text("containerLogMaxSize", "10Mi");
    let bytes = Quantity::parse(&text).map_or(0, |q| q.value());
    match u64::try_from(bytes) {
        Ok(n) if n > 0 => n,
        Ok(_) | Err(_) => {
            problem(
                problems,
                "containerLogMaxSize",
                format!("{text:?} is not more than zero"),
            );
            0
        }
    }
}

fn feature_gates(tree: &Tree<'_>) -> BTreeMap<String, bool> {
    let map = tree.get("featureGates").and_then(Value::as_object);
    let pairs = map.into_iter().flatten();
    pairs
        .filter_map(|(k, v)| Some((k.clone(), v.as_bool()?)))
        .collect()
}

pub(super) fn problem(problems: &mut Vec<Problem>, path: &str, what: String) {
    problems.push(Problem {
        path: path.to_owned(),
        what,
    });
}

fn server(tree: &Tree<'_>, problems: &mut Vec<Problem>) -> ServerConfig {
    let ip = |path: &str, default: [u8; 4]| {
        let text = tree.text(path, "");
        text.parse().unwrap_or(IpAddr::from(default))
    };
    let cert = tree.path("tlsCertFile", "");
    let key = tree.path("tlsPrivateKeyFile", "");
    if cert.as_os_str().is_empty() != key.as_os_str().is_empty() {
        let what = "give both or neither of tlsCertFile and tlsPrivateKeyFile".to_owned();
        problem(problems, "tlsCertFile", what);
    }
    ServerConfig {
        enabled: tree.bool("enableServer", true),
        address: SocketAddr::new(ip("address", [0, 0, 0, 0]), tree.positive("port", 10250)),
        healthz: SocketAddr::new(
            ip("healthzBindAddress", [127, 0, 0, 1]),
            tree.int("healthzPort", 10248),
        ),
        read_only: SocketAddr::new(ip("address", [0, 0, 0, 0]), tree.int("readOnlyPort", 0)),
        tls_cert_file: cert,
        tls_key_file: key,
        tls13_only: tree.text("tlsMinVersion", "") == "VersionTLS13",
        client_ca_file: tree.path("authentication.x509.clientCAFile", ""),
        anonymous: tree.bool("authentication.anonymous.enabled", false),
        token_review: tree.bool("authentication.webhook.enabled", true),
        token_ttl: tree.duration("authentication.webhook.cacheTTL", seconds(120)),
        authorization: match tree.text("authorization.mode", "Webhook").as_str() {
            "AlwaysAllow" => AuthorizationMode::AlwaysAllow,
            _ => AuthorizationMode::Webhook,
        },
        allowed_ttl: tree.duration("authorization.webhook.cacheAuthorizedTTL", seconds(300)),
        denied_ttl: tree.duration("authorization.webhook.cacheUnauthorizedTTL", seconds(30)),
        debugging_handlers: tree.bool("enableDebuggingHandlers", true),
        system_logs: tree.bool("enableSystemLogHandler", true),
        debug_flags: tree.bool("enableDebugFlagsHandler", true),
        profiling: tree.bool("enableProfilingHandler", true),
        streaming_idle_timeout: tree.duration("streamingConnectionIdleTimeout", seconds(14_400)),
    }
}

fn verification(tree: &Tree<'_>, problems: &mut Vec<Problem>) -> Verification {
    const LIST: &str = "preloadedImagesVerificationAllowlist";
    let list = tree.texts(LIST);
    let policy = tree.text("imagePullCredentialsVerificationPolicy", "");
    if policy != "NeverVerifyAllowlistedImages" && !list.is_empty() {
        let what = "only with imagePullCredentialsVerificationPolicy: NeverVerifyAllowlistedImages";
        problem(problems, LIST, what.to_owned());
    }
    for pattern in &list {
        if let Some(what) = check_listed(pattern) {
            problem(problems, LIST, format!("{pattern:?}: {what}"));
        }
    }
    match policy.as_str() {
        "NeverVerify" => Verification::Never,
        "NeverVerifyAllowlistedImages" => Verification::UnlessListed(list),
        "AlwaysVerify" => Verification::Always,
        _ => Verification::UnlessPreloaded,
    }
}

fn images(tree: &Tree<'_>, runtime: &Tree<'_>, problems: &mut Vec<Problem>) -> ImageSettings {
    let high: u8 = tree.int("imageGCHighThresholdPercent", 85);
    let low: u8 = tree.int("imageGCLowThresholdPercent", 80);
    if low >= high {
        let what = format!("{low} must be less than imageGCHighThresholdPercent ({high})");
        problem(problems, "imageGCLowThresholdPercent", what);
    }
    let minimum_gc_age = tree.duration("imageMinimumGCAge", seconds(120));
    let maximum_gc_age = tree.duration("imageMaximumGCAge", Duration::ZERO);
    if !maximum_gc_age.is_zero() && maximum_gc_age <= minimum_gc_age {
        let [maximum, minimum] = [maximum_gc_age, minimum_gc_age].map(duration::format);
        let what = format!("{maximum} must be greater than imageMinimumGCAge ({minimum})");
        problem(problems, "imageMaximumGCAge", what);
    }
    let serial = tree.bool("serializeImagePulls", false);
    let parallel: usize = tree.positive("maxParallelImagePulls", PARALLEL_PULLS);
    if serial && tree.positive("maxParallelImagePulls", 1) > 1 {
        let what = format!("{parallel} cannot be with serializeImagePulls: true");
        problem(problems, "maxParallelImagePulls", what);
    }
    let mirrors = runtime.get("registries.mirrors").and_then(Value::as_object);
    let urls = |v: &Value| {
        let items = v.as_array().into_iter().flatten();
        items
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    ImageSettings {
        registry_qps: tree.int("registryPullQPS", 5),
        registry_burst: tree.positive("registryBurst", 10),
        max_parallel_pulls: if serial { 1 } else { parallel },
        minimum_gc_age,
        maximum_gc_age,
        gc_high_percent: high,
        gc_low_percent: low,
        status_max_images: tree.int("nodeStatusMaxImages", 50),
        mirrors: mirrors
            .into_iter()
            .flatten()
            .map(|(host, list)| (host.clone(), urls(list)))
            .collect(),
        insecure: runtime.texts("registries.insecure"),
        only_mirrors: runtime.bool("registries.onlyMirrors", false),
        credential_providers: None,
        verification: verification(tree, problems),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Threshold;
    use serde_json::json;

    fn resolved(value: Value) -> Result<Config, ConfigError> {
        let Value::Object(tree) = value else {
            unreachable!()
        };
        let flags = Flags::default();
        let facts = Facts {
            host_name: "Box-7".to_owned(),
            address: Some(IpAddr::from([10, 1, 1, 1])),
            cpus: 2,
        };
        resolve(&flags, tree, &Map::new(), facts, BTreeSet::new())
    }

    #[test]
    fn nothing_given_gives_the_stock_defaults() {
        let config = resolved(json!({})).unwrap();
        assert_eq!(config.node_name, "box-7");
        assert_eq!(config.max_pods, 110);
        assert_eq!(config.server.address.port(), 10250);
        assert_eq!(config.node_lease_duration, seconds(40));
        assert_eq!(config.node_status_report_frequency, seconds(300));
        assert_eq!(config.container_log_max_size, 10 << 20);
        assert_eq!(
            config.eviction_hard["memory.available"],
            Threshold::Amount(100 << 20)
        );
        assert_eq!(
            config.eviction_hard["nodefs.available"],
            Threshold::Share(0.1)
        );
        assert!(!config.server.anonymous);
        assert_eq!(config.effective["maxPods"], json!(110));
    }

    #[test]
    fn rules_between_fields_hold() {
        let check = |value: Value, part: &str| {
            let message = resolved(value).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        };
        check(
            json!({"imageGCHighThresholdPercent": 50, "imageGCLowThresholdPercent": 60}),
            "imageGCLowThresholdPercent: 60 must be less than imageGCHighThresholdPercent (50)",
        );
        check(json!({"tlsCertFile": "/x"}), "tlsCertFile: give both");
        check(
            json!({"evictionHard": {"memory.availible": "1Gi"}}),
            "evictionHard[\"memory.availible\"]: no such signal",
        );
        check(
            json!({"evictionSoft": {"memory.available": "1Gi"}}),
            "evictionSoft[\"memory.available\"]: needs evictionSoftGracePeriod",
        );
        check(
            json!({"evictionHard": {"memory.available": "lots"}}),
            "\"lots\" is neither a quantity",
        );
    }

    #[test]
    fn pods_per_core_lowers_the_number_of_pods() {
        assert_eq!(resolved(json!({"podsPerCore": 10})).unwrap().max_pods, 20);
        assert_eq!(resolved(json!({"podsPerCore": 100})).unwrap().max_pods, 110);
    }

    #[test]
    fn an_update_frequency_alone_sets_both() {
        let config = resolved(json!({"nodeStatusUpdateFrequency": "4s"})).unwrap();
        assert_eq!(config.node_status_report_frequency, seconds(4));
    }
}
