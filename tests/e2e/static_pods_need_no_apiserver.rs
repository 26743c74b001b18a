//! Pods of manifests on the node's disk, and what the apiserver shows of them. Holds what upstream
//! asks of static and mirror pods in its node suite (`mirror_pod_test.go`,
//! `mirror_pod_grace_period_test.go`, `static_pod_test.go`), which cannot run from outside a node.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::time::Duration;
use testkit::scenario::{
    Agent, BUSYBOX, Event, LIMIT, Scenario, Watch, container, is_ready, phase, text,
};

const PAUSE: &str = "registry.k8s.io/pause:3.10.2";

/// A manifest in node-1's directory; it goes with the scenario.
struct Manifest {
    path: PathBuf,
    namespace: String,
    name: String,
}

impl Drop for Manifest {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.path));
    }
}

/// node-1's directory of manifests, as the machine sees it.
fn directory(agent: &Agent) -> Result<PathBuf> {
    let dir = agent.directory("kubernetes").join("manifests");
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

impl Manifest {
    fn new(scenario: &Scenario, name: &str) -> Result<Self> {
        let file = format!("{}-{name}.yaml", scenario.namespace);
        Ok(Self {
            path: directory(&scenario.agent("node-1"))?.join(file),
            namespace: scenario.namespace.clone(),
            name: name.to_owned(),
        })
    }

    /// The name of the pod and its mirror.
    fn pod(&self) -> String {
        format!("{}-node-1", self.name)
    }

    /// Writes the manifest in place, as upstream's tests do.
    fn write(&self, spec: &Value) -> Result<()> {
        let pod = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": self.name, "namespace": self.namespace}, "spec": spec});
        fs::write(&self.path, pod.to_string()).context("write the manifest")
    }

    fn remove(&self) -> Result<()> {
        fs::remove_file(&self.path).context("remove the manifest")
    }
}

fn sleeper(grace: u64, extra: &str) -> Value {
    let script = format!("{extra}; exec sleep 100000");
    json!({"terminationGracePeriodSeconds": grace, "containers": [
        {"name": "main", "image": BUSYBOX, "command": ["sh", "-c", script]}]})
}

fn pause() -> Value {
    json!({"containers": [{"name": "main", "image": PAUSE}]})
}

/// The mirror, once it is Ready and not the one with this UID.
fn ready(scenario: &Scenario, manifest: &Manifest, not: &str) -> Result<Value> {
    let wanted = |event: &Event| {
        event.kind != "DELETED" && is_ready(&event.object) && uid(&event.object) != not
    };
    let (mirror, _) = scenario.watch_pod(&manifest.pod(), "a ready mirror pod", wanted)?;
    is_mirror(scenario, &mirror)?;
    Ok(mirror)
}

fn uid(pod: &Value) -> String {
    text(pod, "/metadata/uid")
}

fn container_id(pod: &Value) -> String {
    text(container(pod, "main"), "/containerID")
}

/// What every mirror pod is.
fn is_mirror(scenario: &Scenario, mirror: &Value) -> Result<()> {
    let annotation = |key: &str| mirror["metadata"]["annotations"][key].clone();
    let hash = annotation("kubernetes.io/config.hash");
    ensure!(hash.as_str().is_some_and(|h| h.len() == 32), "hash {hash}");
    ensure!(
        annotation("kubernetes.io/config.mirror") == hash,
        "{mirror}"
    );
    ensure!(
        annotation("kubernetes.io/config.source") == "file",
        "{mirror}"
    );
    ensure!(
        !annotation("kubernetes.io/config.seen").is_null(),
        "{mirror}"
    );
    let node = scenario.admin.json(&["get", "node", "node-1"])?;
    let owner = json!([{"apiVersion": "v1", "kind": "Node", "name": "node-1",
        "uid": node["metadata"]["uid"], "controller": true}]);
    ensure!(mirror["metadata"]["ownerReferences"] == owner, "{mirror}");
    ensure!(mirror["metadata"]["generation"] == 1, "{mirror}");
    ensure!(mirror["status"]["observedGeneration"].is_null(), "{mirror}");
    Ok(())
}

#[test]
fn a_manifest_runs_and_is_reached_through_its_mirror() -> Result<()> {
    let scenario = Scenario::begin("static-run")?;
    let manifest = Manifest::new(&scenario, "web")?;
    manifest.write(&sleeper(1, "echo hello"))?;
    let mirror = ready(&scenario, &manifest, "")?;
    let pod = manifest.pod();
    let spec = &mirror["spec"];
    ensure!(spec["nodeName"] == "node-1", "{spec}");
    ensure!(
        spec["tolerations"] == json!([{"operator": "Exists", "effect": "NoExecute"}]),
        "{spec}"
    );
    ensure!(spec["serviceAccountName"].is_null(), "{spec}");
    ensure!(!text(&mirror, "/status/podIP").is_empty(), "{mirror}");
    ensure!(scenario.kubectl(&["logs", &pod])? == "hello\n");
    ensure!(scenario.kubectl(&["exec", &pod, "--", "echo", "inside"])? == "inside\n");
    // Upstream: "should be updated when static pod updated".
    manifest.write(&pause())?;
    let next = ready(&scenario, &manifest, &uid(&mirror))?;
    ensure!(next["spec"]["containers"][0]["image"] == PAUSE, "{next}");
    manifest.remove()?;
    scenario.gone(&pod)
}

#[test]
fn a_deleted_mirror_comes_back_and_the_pod_does_not_notice() -> Result<()> {
    let scenario = Scenario::begin("static-mirror")?;
    let manifest = Manifest::new(&scenario, "web")?;
    manifest.write(&sleeper(1, "true"))?;
    let mut mirror = ready(&scenario, &manifest, "")?;
    let id = container_id(&mirror);
    for grace in ["30", "0"] {
        let grace = format!("--grace-period={grace}");
        let mut delete = vec!["delete", "pod", "web-node-1", &grace, "--wait=false"];
        if grace.ends_with("=0") {
            delete.push("--force");
        }
        scenario.kubectl(&delete)?;
        mirror = ready(&scenario, &manifest, &uid(&mirror))?;
        ensure!(container_id(&mirror) == id, "the container was replaced");
        ensure!(container(&mirror, "main")["restartCount"] == 0, "{mirror}");
    }
    Ok(())
}

#[test]
fn a_bad_manifest_names_itself_and_harms_no_other() -> Result<()> {
    let scenario = Scenario::begin("static-bad")?;
    let good = Manifest::new(&scenario, "good")?;
    let bad = Manifest::new(&scenario, "bad")?;
    good.write(&sleeper(1, "true"))?;
    let before = ready(&scenario, &good, "")?;
    fs::write(
        &bad.path,
        "apiVersion: v1\nkind: Pod\nmetadata: {name: bad}\nspec: {}\n",
    )?;
    let file = bad
        .path
        .file_name()
        .context("name")?
        .to_string_lossy()
        .into_owned();
    let selector = "involvedObject.kind=Node,reason=FailedValidation";
    let selection = [
        "get",
        "events",
        "--all-namespaces",
        "--field-selector",
        selector,
    ];
    let told = || {
        let events = scenario.admin.json(&selection)?;
        let mut messages = events["items"].as_array().into_iter().flatten();
        let message = messages.find(|e| text(e, "/message").contains(&file));
        Ok(text(
            message.context("no event names the file")?,
            "/message",
        ))
    };
    let message = testkit::process::until("an event", LIMIT, || Ok(()), told)?;
    ensure!(
        message.contains("spec.containers: Required value"),
        "{message}"
    );
    // Half-written: the pod of the last good content goes on.
    fs::write(&good.path, "apiVersion: v1\nkind: Po")?;
    fs::write(&bad.path, "still: [bad")?;
    let third = Manifest::new(&scenario, "third")?;
    third.write(&pause())?;
    ready(&scenario, &third, "")?;
    let after = scenario.json(&["get", "pod", &good.pod()])?;
    ensure!(uid(&after) == uid(&before) && is_ready(&after), "{after}");
    ensure!(container_id(&after) == container_id(&before), "{after}");
    Ok(())
}

#[test]
fn a_removed_manifest_that_returns_starts_the_pod_again_and_counts() -> Result<()> {
    let scenario = Scenario::begin("static-return")?;
    let manifest = Manifest::new(&scenario, "web")?;
    let spec = sleeper(2, "trap '' TERM");
    manifest.write(&spec)?;
    let first = ready(&scenario, &manifest, "")?;
    manifest.remove()?;
    // The agent has seen it when the container is being ended.
    scenario.event_about(&manifest.pod(), "Killing")?;
    manifest.write(&spec)?;
    let (again, _) = scenario.watch_pod(&manifest.pod(), "one restart", |event| {
        let status = container(&event.object, "main");
        status["restartCount"] == 1 && !status["state"]["running"].is_null()
    })?;
    let hash = |pod: &Value| pod["metadata"]["annotations"]["kubernetes.io/config.hash"].clone();
    ensure!(
        hash(&again) == hash(&first),
        "the same manifest is the same pod"
    );
    manifest.remove()?;
    scenario.gone(&manifest.pod())
}

#[test]
fn a_mirror_stays_running_for_the_grace_of_its_pod_and_the_last_of_many_updates_runs() -> Result<()>
{
    let scenario = Scenario::begin("static-grace")?;
    let manifest = Manifest::new(&scenario, "web")?;
    let slow = "_term() { sleep 100; }; trap _term TERM; while true; do sleep 0.2; done";
    let spec = json!({"terminationGracePeriodSeconds": 6, "containers": [
        {"name": "main", "image": BUSYBOX, "command": ["sh", "-c", slow]}]});
    manifest.write(&spec)?;
    let old = ready(&scenario, &manifest, "")?;
    let watch = Watch::start(&scenario, &["pods"])?;
    for number in 0..30 {
        let image = format!("image-{number}");
        manifest.write(&json!({"containers": [{"name": "main", "image": image}]}))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    manifest.write(&pause())?;
    let new = ready(&scenario, &manifest, &uid(&old))?;
    ensure!(new["spec"]["containers"][0]["image"] == PAUSE, "{new}");
    let mut uids = Vec::new();
    let mut begun = None;
    for event in watch.seen() {
        begun.get_or_insert(event.at);
        if !uids.contains(&uid(&event.object)) {
            uids.push(uid(&event.object));
        }
        if uid(&event.object) == uid(&old) {
            ensure!(
                phase(&event.object) == "Running",
                "{}",
                event.object["status"]
            );
            let lived = begun.map_or(Duration::ZERO, |b| event.at - b);
            ensure!(
                event.kind != "DELETED" || lived >= Duration::from_secs(5),
                "the mirror was gone after {lived:?}"
            );
        }
    }
    // At most one of the updates was taken before the old pod was being ended.
    ensure!(uids.len() <= 3, "{uids:?}");
    Ok(())
}

#[test]
fn a_killed_agent_finds_its_static_pods_again() -> Result<()> {
    let scenario = Scenario::alone("static-kill")?;
    let manifest = Manifest::new(&scenario, "web")?;
    let changed = Manifest::new(&scenario, "changed")?;
    let mut probed = sleeper(1, "true");
    probed["containers"][0]["readinessProbe"] =
        json!({"exec": {"command": ["true"]}, "periodSeconds": 1});
    manifest.write(&probed)?;
    changed.write(&sleeper(1, "true"))?;
    let before = ready(&scenario, &manifest, "")?;
    let old = ready(&scenario, &changed, "")?;
    let agent = scenario.agent("node-1");
    agent.kill()?;
    changed.write(&pause())?;
    agent.start()?;
    // The manifest that changed meanwhile is another pod: the old one is ended first.
    let new = ready(&scenario, &changed, &uid(&old))?;
    ensure!(new["spec"]["containers"][0]["image"] == PAUSE, "{new}");
    let after = ready(&scenario, &manifest, "")?;
    ensure!(uid(&after) == uid(&before), "the mirror was replaced");
    ensure!(
        container_id(&after) == container_id(&before),
        "the container was replaced"
    );
    ensure!(container(&after, "main")["restartCount"] == 0, "{after}");
    Ok(())
}

#[test]
fn links_backups_and_hidden_files_are_treated_as_users_mean_them() -> Result<()> {
    let scenario = Scenario::begin("static-links")?;
    let manifest = Manifest::new(&scenario, "linked")?;
    let agent = scenario.agent("node-1");
    let directory = directory(&agent)?;
    let namespace = &scenario.namespace;
    let place = format!(".{namespace}-target");
    let target = Manifest {
        path: directory.join(&place),
        namespace: namespace.clone(),
        name: "linked".into(),
    };
    target.write(&pause())?;
    let backup = Manifest {
        path: directory.join(format!("{namespace}-backup.yaml~")),
        namespace: namespace.clone(),
        name: "backup".into(),
    };
    backup.write(&pause())?;
    // Relative, so that it leads to the same file inside the node.
    std::os::unix::fs::symlink(&place, &manifest.path)?;
    ready(&scenario, &manifest, "")?;
    let pods = scenario.json(&["get", "pods"])?;
    ensure!(pods["items"].as_array().map(Vec::len) == Some(1), "{pods}");
    // Replaced by name, as configuration management does.
    let next = Manifest {
        path: directory.join(format!(".{namespace}-next")),
        namespace: namespace.clone(),
        name: "linked".into(),
    };
    next.write(&sleeper(1, "true"))?;
    fs::rename(&next.path, &manifest.path)?;
    let (_, _) = scenario.watch_pod(&manifest.pod(), "the replaced manifest", |event| {
        event.kind != "DELETED"
            && is_ready(&event.object)
            && event.object["spec"]["containers"][0]["image"] == BUSYBOX
    })?;
    Ok(())
}

#[test]
fn init_containers_and_ends_show_on_the_mirror() -> Result<()> {
    let scenario = Scenario::begin("static-init")?;
    let manifest = Manifest::new(&scenario, "job")?;
    manifest.write(&json!({
        "restartPolicy": "Never",
        "volumes": [{"name": "shared"}],
        "initContainers": [{"name": "init", "image": BUSYBOX,
            "command": ["sh", "-c", "echo made > /shared/file"],
            "volumeMounts": [{"name": "shared", "mountPath": "/shared"}]}],
        "containers": [{"name": "main", "image": BUSYBOX,
            "command": ["sh", "-c", "cat /shared/file"],
            "volumeMounts": [{"name": "shared", "mountPath": "/shared"}]}],
    }))?;
    let ended = scenario.finished(&manifest.pod())?;
    ensure!(phase(&ended) == "Succeeded", "{ended}");
    let init = &ended["status"]["initContainerStatuses"][0]["state"]["terminated"];
    ensure!(init["reason"] == "Completed", "{ended}");
    ensure!(scenario.kubectl(&["logs", &manifest.pod()])? == "made\n");
    Ok(())
}
