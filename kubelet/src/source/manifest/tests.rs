//! From text to a complete pod.

use super::*;
use proptest::prelude::*;
use serde_json::json;

const WEB: &str = "apiVersion: v1
kind: Pod
metadata:
  name: web
spec:
  containers:
  - name: a
    image: registry/a:1
";

fn origin(place: &str) -> Origin<'_> {
    Origin {
        source: Source::File,
        place,
        node: "Node-1",
    }
}

fn read(text: &str) -> Result<Pod, ManifestError> {
    pod(text.as_bytes(), &origin("/m/web.yaml"))
}

fn uid(text: &str, place: &str) -> String {
    let pod = pod(text.as_bytes(), &origin(place)).unwrap();
    pod.metadata.uid.unwrap()
}

#[test]
fn a_manifest_gets_the_identity_of_its_node() {
    let pod = read(WEB).unwrap();
    let metadata = &pod.metadata;
    assert_eq!(metadata.name.as_deref(), Some("web-node-1"));
    assert_eq!(metadata.namespace.as_deref(), Some("default"));
    let annotations = metadata.annotations.as_ref().unwrap();
    assert_eq!(annotations["kubernetes.io/config.source"], "file");
    assert_eq!(
        Some(&annotations["kubernetes.io/config.hash"]),
        metadata.uid.as_ref()
    );
    let spec = pod.spec.unwrap();
    assert_eq!(spec.node_name.as_deref(), Some("Node-1"));
    assert_eq!(
        serde_json::to_value(&spec.tolerations).unwrap(),
        json!([{"operator": "Exists", "effect": "NoExecute"}])
    );
}

#[test]
fn the_uid_is_stable_and_changes_with_manifest_place_and_node_only() {
    // Never again: an upgrade must not restart a control plane.
    assert_eq!(uid(WEB, "/m/web.yaml"), "9d55049c570145a15e3ffb0b537b3151");
    let commented = format!("# a comment\n{WEB}    unknownField: 1\n");
    assert_eq!(uid(&commented, "/m/web.yaml"), uid(WEB, "/m/web.yaml"));
    assert_ne!(uid(WEB, "/m/other.yaml"), uid(WEB, "/m/web.yaml"));
    let changed = WEB.replace("a:1", "a:2");
    assert_ne!(uid(&changed, "/m/web.yaml"), uid(WEB, "/m/web.yaml"));
    let given = WEB.replace("name: web\n", "name: web\n  uid: mine\n");
    assert_eq!(uid(&given, "/m/web.yaml"), "mine");
}

#[test]
fn the_apiservers_defaults_are_filled_in() {
    let text = "
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: kube-system}
spec:
  hostNetwork: true
  priorityClassName: system-node-critical
  containers:
  - name: a
    image: a
    ports: [{containerPort: 80}]
    resources: {limits: {cpu: 1, memory: 64Mi}, requests: {cpu: 250m}}
    livenessProbe: {httpGet: {port: 80}, failureThreshold: 8}
    env: [{name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]
  volumes:
  - {name: certs, hostPath: {path: /etc/ssl}}
  - {name: scratch}
  - {name: info, downwardAPI: {items: [{path: name, fieldRef: {fieldPath: metadata.name}}]}}
";
    let spec = serde_json::to_value(read(text).unwrap().spec).unwrap();
    for (pointer, value) in [
        ("/restartPolicy", json!("Always")),
        ("/dnsPolicy", json!("ClusterFirst")),
        ("/schedulerName", json!("default-scheduler")),
        ("/securityContext", json!({})),
        ("/terminationGracePeriodSeconds", json!(30)),
        ("/enableServiceLinks", json!(true)),
        ("/priority", json!(2_000_001_000)),
        ("/containers/0/imagePullPolicy", json!("Always")),
        (
            "/containers/0/terminationMessagePath",
            json!("/dev/termination-log"),
        ),
        ("/containers/0/terminationMessagePolicy", json!("File")),
        ("/containers/0/ports/0/protocol", json!("TCP")),
        ("/containers/0/ports/0/hostPort", json!(80)),
        (
            "/containers/0/resources/requests",
            json!({"cpu": "250m", "memory": "64Mi"}),
        ),
        ("/containers/0/resources/limits/cpu", json!("1")),
        (
            "/containers/0/livenessProbe/httpGet",
            json!({"port": 80, "path": "/", "scheme": "HTTP"}),
        ),
        ("/containers/0/livenessProbe/failureThreshold", json!(8)),
        ("/containers/0/livenessProbe/periodSeconds", json!(10)),
        (
            "/containers/0/env/0/valueFrom/fieldRef/apiVersion",
            json!("v1"),
        ),
        ("/volumes/0/hostPath/type", json!("")),
        ("/volumes/1/emptyDir", json!({})),
        ("/volumes/2/downwardAPI/defaultMode", json!(420)),
        (
            "/volumes/2/downwardAPI/items/0/fieldRef/apiVersion",
            json!("v1"),
        ),
    ] {
        assert_eq!(spec.pointer(pointer), Some(&value), "{pointer}");
    }
    let zero = WEB.replace("spec:\n", "spec:\n  terminationGracePeriodSeconds: 0\n");
    let zero = read(&zero).unwrap().spec.unwrap();
    assert_eq!(zero.termination_grace_period_seconds, Some(0));
}

#[test]
fn a_pod_with_limits_of_its_own_asks_for_what_its_containers_do() {
    let text = WEB.replace(
        "spec:\n",
        "spec:\n  resources: {limits: {cpu: 2, memory: 1Gi}}\n",
    ) + "    resources: {requests: {cpu: 100m}}\n";
    let spec = serde_json::to_value(read(&text).unwrap().spec).unwrap();
    assert_eq!(
        spec["resources"]["requests"],
        json!({"cpu": "100m", "memory": "1Gi"})
    );
}

fn refused(change: (&str, &str), expected: &str) {
    let text = WEB.replace(change.0, change.1);
    assert_ne!(text, WEB, "{change:?}");
    let message = read(&text).unwrap_err().to_string();
    assert!(message.contains(expected), "{message}");
}

#[test]
fn a_refusal_names_the_field() {
    let image = "    image: registry/a:1\n";
    refused(
        (image, ""),
        "invalid pod: spec.containers[0].image: Required value",
    );
    refused(
        (image, "    image: [1]\n"),
        "couldn't parse as pod(spec.containers[0].image: invalid type",
    );
    refused(
        ("  name: web\n", "  labels: {a: b}\n"),
        "invalid pod: name is needed for the pod",
    );
    refused(
        ("name: web", "name: We_b"),
        "metadata.name: Invalid value: \"We_b-node-1\": a lower",
    );
    refused(
        ("kind: Pod", "kind: Service"),
        "kind \"Service\" is not a v1 Pod",
    );
    refused(("kind: Pod\n", ""), "Object 'Kind' is missing");
    refused(
        ("- name: a", "- name: a\n   - name: b"),
        "couldn't parse as pod(",
    );
    refused(
        ("spec:\n", "spec:\n  restartPolicy: Sometimes\n"),
        "spec.restartPolicy: Unsupported value: \"Sometimes\": supported values: \"Always\", \
         \"OnFailure\", \"Never\"",
    );
    refused(
        (
            image,
            "    image: a\n    volumeMounts: [{name: x, mountPath: /x}]\n",
        ),
        "spec.containers[0].volumeMounts[0].name: Not found: \"x\"",
    );
    refused(
        (image, "    image: a\n    livenessProbe: {}\n"),
        "spec.containers[0].livenessProbe: Required value: must specify a handler type",
    );
    refused(
        (image, "    image: a\n    ports: [{containerPort: 70000}]\n"),
        "spec.containers[0].ports[0].containerPort: Invalid value: 70000: must be between 1 and 65535",
    );
    refused(
        (
            image,
            "    image: a\n    resources: {requests: {cpu: 2}, limits: {cpu: 1}}\n",
        ),
        "spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or equal to \
         cpu limit of 1",
    );
    refused(
        (image, "    image: a\n  - {name: a, image: b}\n"),
        "spec.containers[1].name: Duplicate value: \"a\"",
    );
    refused(
        (
            image,
            "    image: a\n  volumes: [{name: v, hostPath: {path: a/../b, type: Dir}}]\n",
        ),
        "[spec.volumes[0].hostPath.path: Invalid value: \"a/../b\": must not contain '..', \
         spec.volumes[0].hostPath.type: Unsupported value: \"Dir\"",
    );
}

#[test]
fn what_needs_an_apiserver_is_refused() {
    let image = "    image: registry/a:1\n";
    let volume = |volume: &str| format!("{image}  volumes: [{{name: v, {volume}}}]\n");
    for (change, resource) in [
        (
            format!("{image}  serviceAccountName: x\n"),
            "serviceaccounts",
        ),
        (format!("{image}  serviceAccount: x\n"), "serviceaccounts"),
        (
            format!("{image}  imagePullSecrets: [{{name: x}}]\n"),
            "secrets",
        ),
        (
            format!("{image}    envFrom: [{{configMapRef: {{name: x}}}}]\n"),
            "configmaps",
        ),
        (volume("secret: {secretName: x}"), "secrets"),
        (volume("configMap: {name: x}"), "configmaps"),
        (
            volume("persistentVolumeClaim: {claimName: x}"),
            "persistentvolumeclaims",
        ),
        (volume("csi: {driver: x}"), "csidrivers (via CSI volumes)"),
        (
            volume("projected: {sources: [{serviceAccountToken: {path: t}}]}"),
            "serviceaccounts (via projected volumes)",
        ),
    ] {
        let message = read(&WEB.replace(image, &change)).unwrap_err().to_string();
        assert_eq!(message, format!("static pods may not reference {resource}"));
    }
    let own = volume("projected: {sources: [{downwardAPI: {}}]}");
    assert!(read(&WEB.replace(image, &own)).is_ok());
}

#[test]
fn a_url_may_serve_a_list_or_json() {
    let origin = Origin {
        source: Source::Http,
        place: "http://x/",
        node: "n",
    };
    let list = json!({"apiVersion": "v1", "kind": "PodList", "items": [
        {"metadata": {"name": "a"}, "spec": {"containers": [{"name": "c", "image": "i"}]}},
        {"metadata": {"name": "b", "namespace": "x"},
         "spec": {"containers": [{"name": "c", "image": "i"}]}},
    ]});
    let pods = pods(list.to_string().as_bytes(), &origin).unwrap();
    let names: Vec<_> = pods
        .iter()
        .map(|p| p.metadata.name.clone().unwrap())
        .collect();
    assert_eq!(names, ["a-n", "b-n"]);
    // Only files are trusted to stay on a node with problems.
    assert!(pods[0].spec.as_ref().unwrap().tolerations.is_none());
    assert!(super::pods(b"", &origin).is_err());
}

#[test]
fn what_a_manifest_says_of_its_own_source_is_not_believed() {
    let text = WEB.replace(
        "name: web\n",
        "name: web\n  annotations: {kubernetes.io/config.source: api, \
         kubernetes.io/config.mirror: x}\n",
    );
    let pod = read(&text).unwrap();
    assert!(crate::source::is_static(&pod) && !crate::source::is_mirror(&pod));
}

/// Any bytes are an error or a pod, never a panic; what is read once is read again alike.
fn never_panics(bytes: &[u8]) {
    if let Ok(all) = pods(bytes, &origin("/m/x")) {
        assert_eq!(all, pods(bytes, &origin("/m/x")).unwrap());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn any_bytes_are_an_error_or_a_pod(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        never_panics(&bytes);
    }

    #[test]
    fn any_change_of_a_manifest_is_an_error_or_a_pod(
        at in 0..WEB.len(), len in 0usize..20, with in "[ -~\n]{0,12}",
    ) {
        let end = (at + len).min(WEB.len());
        never_panics(format!("{}{with}{}", &WEB[..at], &WEB[end..]).as_bytes());
    }
}
