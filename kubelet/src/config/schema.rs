//! KubeletConfiguration `kubelet.config.k8s.io/v1beta1` as a table: every documented field with
//! its type, the old flag of the same meaning, and whether it has an effect in this agent.
//!
//! Reference: <https://kubernetes.io/docs/reference/config-api/kubelet-config.v1beta1/>.
//! Pure data; [`super::check`] walks it, [`super::flags`] makes flags of it.

/// What a value must look like.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// A whole number between the two.
    Int(i64, i64),
    /// A number between the two.
    Number(f64, f64),
    /// Text.
    Text,
    /// A Go duration, `1m30s`; not negative.
    Duration,
    /// An amount, `10Mi`.
    Quantity,
    /// An IP address.
    Ip,
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// A list.
    List(&'static Kind),
    /// An object with free keys.
    Map(&'static Kind),
    /// An object with these fields.
    Object(&'static [Field]),
    /// Anything; checked by those who read it.
    Any,
}

/// One field.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// Its name in the file.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// The flag that sets it, without dashes; empty for none.
    pub flag: &'static str,
    /// Whether it changes anything here.
    pub works: bool,
}

const fn field(name: &'static str, kind: Kind, flag: &'static str) -> Field {
    Field {
        name,
        kind,
        flag,
        works: true,
    }
}

/// A field that is understood but changes nothing in this agent (yet).
const fn inert(name: &'static str, kind: Kind, flag: &'static str) -> Field {
    Field {
        name,
        kind,
        flag,
        works: false,
    }
}

use Kind::{Any, Bool, Duration, Int, Ip, List, Map, Number, Object, OneOf, Quantity, Text};

const I32: Kind = Int(i32::MIN as i64, i32::MAX as i64);
const NATURAL: Kind = Int(0, i32::MAX as i64);
const I64: Kind = Int(i64::MIN, i64::MAX);
const PERCENT: Kind = Int(0, 100);
const PORT: Kind = Int(1, 65535);
const PORT_OR_OFF: Kind = Int(0, 65535);

/// The `authentication` object.
const AUTHENTICATION: &[Field] = &[
    field(
        "x509",
        Object(&[field("clientCAFile", Text, "client-ca-file")]),
        "",
    ),
    field(
        "webhook",
        Object(&[
            field("enabled", Bool, "authentication-token-webhook"),
            field(
                "cacheTTL",
                Duration,
                "authentication-token-webhook-cache-ttl",
            ),
        ]),
        "",
    ),
    field(
        "anonymous",
        Object(&[field("enabled", Bool, "anonymous-auth")]),
        "",
    ),
];

/// The `authorization` object.
const AUTHORIZATION: &[Field] = &[
    field(
        "mode",
        OneOf(&["Webhook", "AlwaysAllow"]),
        "authorization-mode",
    ),
    field(
        "webhook",
        Object(&[
            field(
                "cacheAuthorizedTTL",
                Duration,
                "authorization-webhook-cache-authorized-ttl",
            ),
            field(
                "cacheUnauthorizedTTL",
                Duration,
                "authorization-webhook-cache-unauthorized-ttl",
            ),
        ]),
        "",
    ),
];

const TAINT: &[Field] = &[
    field("key", Text, ""),
    field("value", Text, ""),
    field(
        "effect",
        OneOf(&["NoSchedule", "PreferNoSchedule", "NoExecute"]),
        "",
    ),
    field("timeAdded", Any, ""),
];

/// `logging`; the format and verbosity hold, the rest is accepted.
const LOGGING: &[Field] = &[
    field("format", OneOf(&["text", "json"]), "logging-format"),
    inert("flushFrequency", Any, "log-flush-frequency"),
    field("verbosity", Int(0, 100), ""),
    inert("vmodule", Any, "vmodule"),
    inert("options", Any, ""),
];

/// Sections that are whole objects of their own.
const SHUTDOWN_BY_PRIORITY: Kind = List(&Object(&[
    inert("priority", I32, ""),
    inert("shutdownGracePeriodSeconds", I64, ""),
]));
const RESERVED_MEMORY: Kind = List(&Object(&[
    inert("numaNode", NATURAL, ""),
    inert("limits", Map(&Quantity), ""),
]));

/// All fields of the document, grouped as the reference groups them.
pub const KUBELET_CONFIGURATION: &[Field] = &[
    field("apiVersion", Text, ""),
    field("kind", Text, ""),
    // Where pods come from.
    field("staticPodPath", Text, "pod-manifest-path"),
    field("podLogsDir", Text, ""),
    field("syncFrequency", Duration, "sync-frequency"),
    field("fileCheckFrequency", Duration, "file-check-frequency"),
    field("httpCheckFrequency", Duration, "http-check-frequency"),
    field("staticPodURL", Text, "manifest-url"),
    field(
        "staticPodURLHeader",
        Map(&List(&Text)),
        "manifest-url-header",
    ),
    // The HTTPS API.
    field("enableServer", Bool, "enable-server"),
    field("address", Ip, "address"),
    field("port", PORT, "port"),
    field("readOnlyPort", PORT_OR_OFF, "read-only-port"),
    field("tlsCertFile", Text, "tls-cert-file"),
    field("tlsPrivateKeyFile", Text, "tls-private-key-file"),
    inert("tlsCipherSuites", List(&Text), "tls-cipher-suites"),
    inert("tlsCurvePreferences", List(&I32), ""),
    field(
        "tlsMinVersion",
        OneOf(&["", "VersionTLS12", "VersionTLS13"]),
        "tls-min-version",
    ),
    inert("rotateCertificates", Bool, "rotate-certificates"),
    inert("serverTLSBootstrap", Bool, "rotate-server-certificates"),
    field("authentication", Object(AUTHENTICATION), ""),
    field("authorization", Object(AUTHORIZATION), ""),
    field("enableDebuggingHandlers", Bool, "enable-debugging-handlers"),
    inert("enableContentionProfiling", Bool, "contention-profiling"),
    inert("enableProfilingHandler", Bool, ""),
    field("enableDebugFlagsHandler", Bool, ""),
    field("enableSystemLogHandler", Bool, ""),
    inert("enableSystemLogQuery", Bool, ""),
    field("healthzPort", PORT_OR_OFF, "healthz-port"),
    field("healthzBindAddress", Ip, "healthz-bind-address"),
    field(
        "streamingConnectionIdleTimeout",
        Duration,
        "streaming-connection-idle-timeout",
    ),
    // The apiserver.
    inert("contentType", Text, "kube-api-content-type"),
    inert("kubeAPIQPS", NATURAL, "kube-api-qps"),
    inert("kubeAPIBurst", NATURAL, "kube-api-burst"),
    field("eventRecordQPS", NATURAL, "event-qps"),
    field("eventBurst", NATURAL, "event-burst"),
    inert(
        "configMapAndSecretChangeDetectionStrategy",
        OneOf(&["Get", "Cache", "Watch"]),
        "",
    ),
    // The Node.
    field("registerNode", Bool, "register-node"),
    field(
        "registerWithTaints",
        List(&Object(TAINT)),
        "register-with-taints",
    ),
    field("providerID", Text, "provider-id"),
    field(
        "nodeStatusUpdateFrequency",
        Duration,
        "node-status-update-frequency",
    ),
    field("nodeStatusReportFrequency", Duration, ""),
    field("nodeLeaseDurationSeconds", Int(1, 86_400), ""),
    field(
        "nodeStatusMaxImages",
        Int(-1, i32::MAX as i64),
        "node-status-max-images",
    ),
    field("podCIDR", Text, "pod-cidr"),
    field("maxPods", NATURAL, "max-pods"),
    field("podsPerCore", NATURAL, "pods-per-core"),
    // Names in pods.
    field("clusterDomain", Text, "cluster-domain"),
    field("clusterDNS", List(&Ip), "cluster-dns"),
    field("resolvConf", Text, "resolv-conf"),
    // Images.
    field("registryPullQPS", NATURAL, "registry-qps"),
    field("registryBurst", NATURAL, "registry-burst"),
    field("serializeImagePulls", Bool, "serialize-image-pulls"),
    field("maxParallelImagePulls", NATURAL, ""),
    field("imageMinimumGCAge", Duration, "minimum-image-ttl-duration"),
    field("imageMaximumGCAge", Duration, ""),
    field(
        "imageGCHighThresholdPercent",
        PERCENT,
        "image-gc-high-threshold",
    ),
    field(
        "imageGCLowThresholdPercent",
        PERCENT,
        "image-gc-low-threshold",
    ),
    field(
        "imagePullCredentialsVerificationPolicy",
        OneOf(&[
            "NeverVerify",
            "NeverVerifyPreloadedImages",
            "NeverVerifyAllowlistedImages",
            "AlwaysVerify",
        ]),
        "",
    ),
    field("preloadedImagesVerificationAllowlist", List(&Text), ""),
    // Cgroups and resources.
    field("cgroupRoot", Text, "cgroup-root"),
    field("cgroupsPerQOS", Bool, "cgroups-per-qos"),
    field(
        "cgroupDriver",
        OneOf(&["cgroupfs", "systemd"]),
        "cgroup-driver",
    ),
    inert("kubeletCgroups", Text, "kubelet-cgroups"),
    inert("systemCgroups", Text, "system-cgroups"),
    field("oomScoreAdj", Int(-1000, 1000), "oom-score-adj"),
    field("podPidsLimit", I64, "pod-max-pids"),
    field("cpuCFSQuota", Bool, "cpu-cfs-quota"),
    field("cpuCFSQuotaPeriod", Duration, "cpu-cfs-quota-period"),
    inert("maxOpenFiles", Int(0, i64::MAX), "max-open-files"),
    inert(
        "cpuManagerPolicy",
        OneOf(&["none", "static"]),
        "cpu-manager-policy",
    ),
    inert(
        "cpuManagerPolicyOptions",
        Map(&Text),
        "cpu-manager-policy-options",
    ),
    inert(
        "cpuManagerReconcilePeriod",
        Duration,
        "cpu-manager-reconcile-period",
    ),
    inert(
        "memoryManagerPolicy",
        OneOf(&["None", "Static"]),
        "memory-manager-policy",
    ),
    inert(
        "topologyManagerPolicy",
        OneOf(&["none", "best-effort", "restricted", "single-numa-node"]),
        "topology-manager-policy",
    ),
    inert(
        "topologyManagerScope",
        OneOf(&["container", "pod"]),
        "topology-manager-scope",
    ),
    inert(
        "topologyManagerPolicyOptions",
        Map(&Text),
        "topology-manager-policy-options",
    ),
    inert("qosReserved", Map(&Text), "qos-reserved"),
    field("singleProcessOOMKill", Bool, ""),
    field("systemReserved", Map(&Quantity), "system-reserved"),
    field("kubeReserved", Map(&Quantity), "kube-reserved"),
    inert("reservedSystemCPUs", Text, "reserved-cpus"),
    inert("systemReservedCgroup", Text, "system-reserved-cgroup"),
    inert("kubeReservedCgroup", Text, "kube-reserved-cgroup"),
    field(
        "enforceNodeAllocatable",
        List(&OneOf(&[
            "pods",
            "system-reserved",
            "kube-reserved",
            "system-reserved-compressible",
            "kube-reserved-compressible",
            "none",
        ])),
        "enforce-node-allocatable",
    ),
    inert("reservedMemory", RESERVED_MEMORY, ""),
    inert("memoryThrottlingFactor", Number(0.0, 1.0), ""),
    inert(
        "memoryReservationPolicy",
        OneOf(&["None", "TieredReservation"]),
        "",
    ),
    field("failCgroupV1", Bool, "fail-cgroupv1"),
    field("failSwapOn", Bool, "fail-swap-on"),
    inert(
        "memorySwap",
        Object(&[inert(
            "swapBehavior",
            OneOf(&["", "NoSwap", "LimitedSwap"]),
            "",
        )]),
        "",
    ),
    field(
        "userNamespaces",
        Object(&[field("idsPerPod", Int(65_536, 4_294_967_295), "")]),
        "",
    ),
    // Eviction.
    field("evictionHard", Map(&Text), "eviction-hard"),
    field("evictionSoft", Map(&Text), "eviction-soft"),
    field(
        "evictionSoftGracePeriod",
        Map(&Duration),
        "eviction-soft-grace-period",
    ),
    field(
        "evictionPressureTransitionPeriod",
        Duration,
        "eviction-pressure-transition-period",
    ),
    field(
        "evictionMaxPodGracePeriod",
        I32,
        "eviction-max-pod-grace-period",
    ),
    field(
        "evictionMinimumReclaim",
        Map(&Text),
        "eviction-minimum-reclaim",
    ),
    field("mergeDefaultEvictionSettings", Bool, ""),
    inert("kernelMemcgNotification", Bool, "kernel-memcg-notification"),
    field(
        "localStorageCapacityIsolation",
        Bool,
        "local-storage-capacity-isolation",
    ),
    inert("volumeStatsAggPeriod", Duration, "volume-stats-agg-period"),
    // Pods.
    field(
        "crashLoopBackOff",
        Object(&[field("maxContainerRestartPeriod", Duration, "")]),
        "",
    ),
    field("seccompDefault", Bool, "seccomp-default"),
    field(
        "allowedUnsafeSysctls",
        List(&Text),
        "allowed-unsafe-sysctls",
    ),
    field("runtimeRequestTimeout", Duration, "runtime-request-timeout"),
    field("containerLogMaxSize", Quantity, "container-log-max-size"),
    field(
        "containerLogMaxFiles",
        Int(2, 1000),
        "container-log-max-files",
    ),
    inert("containerLogMaxWorkers", Int(1, 1000), ""),
    field("containerLogMonitorInterval", Duration, ""),
    inert("shutdownGracePeriod", Duration, ""),
    inert("shutdownGracePeriodCriticalPods", Duration, ""),
    inert("shutdownGracePeriodByPodPriority", SHUTDOWN_BY_PRIORITY, ""),
    inert(
        "enableControllerAttachDetach",
        Bool,
        "enable-controller-attach-detach",
    ),
    inert("volumePluginDir", Text, "volume-plugin-dir"),
    // Others.
    field("featureGates", Map(&Bool), "feature-gates"),
    field("logging", Object(LOGGING), ""),
    inert("tracing", Any, ""),
    inert(
        "showHiddenMetricsForVersion",
        Text,
        "show-hidden-metrics-for-version",
    ),
    inert(
        "containerRuntimeEndpoint",
        Text,
        "container-runtime-endpoint",
    ),
    inert("imageServiceEndpoint", Text, "image-service-endpoint"),
    inert(
        "hairpinMode",
        OneOf(&["promiscuous-bridge", "hairpin-veth", "none"]),
        "hairpin-mode",
    ),
    inert("runOnce", Bool, "runonce"),
    inert("makeIPTablesUtilChains", Bool, "make-iptables-util-chains"),
    inert("iptablesMasqueradeBit", Int(0, 31), ""),
    inert("iptablesDropBit", Int(0, 31), ""),
    inert("protectKernelDefaults", Bool, "protect-kernel-defaults"),
];

/// Ferrule's own settings of the runtime (`--runtime-config`).
pub const RUNTIME_CONFIGURATION: &[Field] = &[
    field("root", Text, ""),
    field("runDir", Text, ""),
    field("cniConfDir", Text, ""),
    field("cniBinDirs", List(&Text), ""),
    field("shimPath", Text, ""),
    field(
        "registries",
        Object(&[
            field("mirrors", Map(&List(&Text)), ""),
            field("insecure", List(&Text), ""),
            field("onlyMirrors", Bool, ""),
        ]),
        "",
    ),
];

/// Fields of which an other value than the empty one is what the stock tools write by default,
/// so that nobody needs to hear of it.
pub const QUIET: &[&str] = &[
    "rotateCertificates",
    "containerRuntimeEndpoint",
    "imageServiceEndpoint",
    "configMapAndSecretChangeDetectionStrategy",
    "contentType",
    "hairpinMode",
    "enableControllerAttachDetach",
    "cpuManagerPolicy",
    "memoryManagerPolicy",
    "topologyManagerPolicy",
    "topologyManagerScope",
    "cpuManagerReconcilePeriod",
    "volumeStatsAggPeriod",
    "makeIPTablesUtilChains",
    "iptablesMasqueradeBit",
    "iptablesDropBit",
    "enableProfilingHandler",
    "localStorageCapacityIsolation",
];
