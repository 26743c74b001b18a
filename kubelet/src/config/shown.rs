//! The configuration as `/configz` shows it. Pure.

use super::{AuthorizationMode, CgroupDriver, Config, check, duration};
use serde_json::{Map, Value, json};

/// What `/configz` shows: what was set, over the defaults that hold here.
pub(super) fn effective(config: &Config, tree: Map<String, Value>) -> Value {
    let mut shown = match json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "enableServer": config.server.enabled,
        "podLogsDir": config.pod_logs_dir,
        "syncFrequency": duration::format(config.sync_frequency),
        "address": config.server.address.ip(),
        "port": config.server.address.port(),
        "authentication": {
            "x509": {"clientCAFile": config.server.client_ca_file},
            "webhook": {
                "enabled": config.server.token_review,
                "cacheTTL": duration::format(config.server.token_ttl)
            },
            "anonymous": {"enabled": config.server.anonymous}
        },
        "authorization": {
            "mode": match config.server.authorization {
                AuthorizationMode::Webhook => "Webhook",
                AuthorizationMode::AlwaysAllow => "AlwaysAllow",
            },
            "webhook": {
                "cacheAuthorizedTTL": duration::format(config.server.allowed_ttl),
                "cacheUnauthorizedTTL": duration::format(config.server.denied_ttl)
            }
        },
        "registryPullQPS": config.images.registry_qps,
        "registryBurst": config.images.registry_burst,
        "eventRecordQPS": config.event_qps,
        "eventBurst": config.event_burst,
        "healthzPort": config.server.healthz.port(),
        "healthzBindAddress": config.server.healthz.ip(),
        "oomScoreAdj": config.oom_score_adj,
        "clusterDomain": config.cluster_domain,
        "clusterDNS": config.cluster_dns,
        "nodeStatusUpdateFrequency": duration::format(config.node_status_update_frequency),
        "nodeStatusReportFrequency": duration::format(config.node_status_report_frequency),
        "nodeLeaseDurationSeconds": config.node_lease_duration.as_secs(),
        "imageMinimumGCAge": duration::format(config.images.minimum_gc_age),
        "imageGCHighThresholdPercent": config.images.gc_high_percent,
        "imageGCLowThresholdPercent": config.images.gc_low_percent,
        "cgroupRoot": config.cgroup_root,
        "cgroupsPerQOS": config.cgroups_per_qos,
        "cgroupDriver": match config.cgroup_driver {
            CgroupDriver::Cgroupfs => "cgroupfs",
            CgroupDriver::Systemd => "systemd",
        },
        "maxPods": config.max_pods,
        "podPidsLimit": config.pod_pids_limit,
        "resolvConf": config.resolv_conf,
        "cpuCFSQuota": config.cpu_cfs_quota,
        "cpuCFSQuotaPeriod": duration::format(config.cpu_cfs_quota_period),
        "nodeStatusMaxImages": config.images.status_max_images,
        "failSwapOn": config.fail_swap_on,
        "failCgroupV1": config.fail_cgroup_v1,
        "containerLogMaxSize": config.container_log_max_size.to_string(),
        "containerLogMaxFiles": config.container_log_max_files,
        "registerNode": config.register_node,
        "seccompDefault": config.seccomp_default,
        "enableDebuggingHandlers": config.server.debugging_handlers,
        "runtimeRequestTimeout": duration::format(config.runtime_request_timeout)
    }) {
        Value::Object(map) => map,
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            Map::new()
        }
    };
    // One macro cannot hold all of it.
    for (name, value) in [
        (
            "fileCheckFrequency",
            json!(duration::format(config.file_check_frequency)),
        ),
        (
            "httpCheckFrequency",
            json!(duration::format(config.http_check_frequency)),
        ),
        ("enableSystemLogHandler", json!(config.server.system_logs)),
        ("enableDebugFlagsHandler", json!(config.server.debug_flags)),
        ("enableProfilingHandler", json!(config.server.profiling)),
        ("readOnlyPort", json!(config.server.read_only.port())),
    ] {
        shown.insert(name.to_owned(), value);
    }
    check::merge(&mut shown, tree);
    // Whoever may read the configuration need not read these secrets.
    if let Some(Value::Object(headers)) = shown.get_mut("staticPodURLHeader") {
        headers.values_mut().for_each(|v| *v = json!(["<masked>"]));
    }
    Value::Object(shown)
}
