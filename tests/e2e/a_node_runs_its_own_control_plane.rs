//! etcd and kube-apiserver as static pods of the node that then joins them: first without any
//! apiserver, then as a node of the cluster it carries, without a restart of either.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use testkit::cluster::hosted::{self, Hosted};
use testkit::process::until;
use testkit::scenario::{BUSYBOX, LIMIT, Scenario, is_ready, text};

/// Serves one text to everybody who asks, with the header it was asked with noted.
struct Server {
    url: String,
    body: Arc<Mutex<String>>,
    asked: Arc<Mutex<String>>,
}

fn serve(address: &str) -> Result<Server> {
    let listener = TcpListener::bind((address, 0)).context("listen for the node")?;
    let server = Server {
        url: format!("http://{}/pods", listener.local_addr()?),
        body: Arc::default(),
        asked: Arc::default(),
    };
    let (body, asked) = (server.body.clone(), server.asked.clone());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut request = [0; 4096];
            let read = stream.read(&mut request).unwrap_or(0);
            *asked.lock().expect("nobody panicked") =
                String::from_utf8_lossy(&request[..read]).into_owned();
            let body = body.lock().expect("nobody panicked").clone();
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            drop(stream.write_all(format!("{head}{body}").as_bytes()));
        }
    });
    Ok(server)
}

fn list(names: &[&str]) -> String {
    let item = |name: &&str| {
        json!({"metadata": {"name": name, "namespace": "kube-system"}, "spec": {
            "hostNetwork": true, "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "main", "image": BUSYBOX, "command": ["sleep", "100000"]}]}})
    };
    let items: Vec<Value> = names.iter().map(item).collect();
    json!({"apiVersion": "v1", "kind": "PodList", "items": items}).to_string()
}

/// Pods the agent's own API shows, by name, with their containers' ids when they are Ready.
fn ready_pods(hosted: &Hosted) -> Result<BTreeMap<String, String>> {
    let pods = hosted.pods()?;
    let items = pods["items"].as_array().cloned().unwrap_or_default();
    let ready = items.iter().filter(|pod| is_ready(pod));
    Ok(ready
        .map(|pod| (text(pod, "/metadata/name"), id(pod)))
        .collect())
}

fn wait_for(hosted: &Hosted, wanted: &[&str]) -> Result<BTreeMap<String, String>> {
    let look = || {
        let ready = ready_pods(hosted)?;
        let names: Vec<&str> = ready.keys().map(String::as_str).collect();
        ensure!(names == wanted, "ready: {names:?}");
        Ok(ready)
    };
    until(&format!("pods {wanted:?}"), LIMIT, || Ok(()), look).with_context(|| tail(hosted))
}

#[test]
fn etcd_and_apiserver_are_pods_of_the_node_that_joins_them() -> Result<()> {
    // Its namespace belongs to the lab the programs come from; it also keeps the machine free.
    let scenario = Scenario::alone("hosted")?;
    let hosted = Hosted::new(&scenario.layout)?;
    let server = serve(&hosted.machine_address())?;
    *server.body.lock().expect("nobody panicked") = list(&["one", "two"]);
    let extra = format!(
        "staticPodURL: {}\nstaticPodURLHeader: {{X-Node: [hosted]}}\nhttpCheckFrequency: 500ms\n",
        server.url
    );
    hosted.write_manifest("etcd", &hosted::etcd())?;
    hosted.write_manifest("kube-apiserver", &hosted.apiserver())?;
    // Standalone: no kubeconfig, nobody to ask.
    hosted.start(true, &extra)?;
    let all = [
        "etcd-node-1",
        "kube-apiserver-node-1",
        "one-node-1",
        "two-node-1",
    ];
    let before = wait_for(&hosted, &all)?;
    ensure!(
        server
            .asked
            .lock()
            .unwrap()
            .to_lowercase()
            .contains("x-node: hosted"),
        "the header was not sent"
    );
    let nodes = hosted.kubectl.json(&["get", "nodes"])?;
    ensure!(
        nodes["items"] == json!([]),
        "a standalone agent registered: {nodes}"
    );
    *server.body.lock().expect("nobody panicked") = list(&["one"]);
    let three = ["etcd-node-1", "kube-apiserver-node-1", "one-node-1"];
    wait_for(&hosted, &three)?;
    *server.body.lock().expect("nobody panicked") = "nonsense".to_owned();

    // The agent is killed, and comes back as a node of the cluster it carries.
    hosted.kill()?;
    *server.body.lock().expect("nobody panicked") = list(&["one"]);
    hosted.start(false, &extra)?;
    let mirrors = wait_for_mirrors(&hosted, &three, 0)?;
    for mirror in &mirrors {
        let name = text(mirror, "/metadata/name");
        ensure!(
            before.get(&name) == Some(&id(mirror)),
            "{name} was restarted"
        );
    }
    let etcd = &mirrors[0]["spec"];
    ensure!(etcd["priority"] == 2_000_001_000, "{etcd}");
    hosted.grant_access()?;
    let system = ["--namespace", "kube-system"];
    let logs = [&system[..], &["logs", "kube-apiserver-node-1"]].concat();
    // The grant is a moment older than what the apiserver's authorizer knows.
    let logs = until("its log", LIMIT, || Ok(()), || hosted.kubectl.run(&logs))?;
    ensure!(
        !logs.is_empty(),
        "no log of the apiserver through its mirror"
    );

    // Agent and apiserver die; the agent needs nobody to bring the apiserver back.
    hosted.kill()?;
    hosted.kill_apiserver()?;
    hosted.start(false, &extra)?;
    let after = wait_for_mirrors(&hosted, &three, 1)?;
    ensure!(
        before.get("etcd-node-1") == Some(&id(&after[0])),
        "etcd was restarted"
    );
    ensure!(
        before.get("one-node-1") == Some(&id(&after[2])),
        "one was restarted"
    );
    Ok(())
}

fn id(pod: &Value) -> String {
    text(pod, "/status/containerStatuses/0/containerID")
}

/// The mirrors, once all are Ready and the apiserver was restarted that often.
fn wait_for_mirrors(hosted: &Hosted, wanted: &[&str], restarts: u64) -> Result<Vec<Value>> {
    let look = || {
        let pods = hosted
            .kubectl
            .json(&["get", "pods", "--namespace", "kube-system"])?;
        let items = pods["items"].as_array().cloned().unwrap_or_default();
        let ready = items.iter().filter(|pod| is_ready(pod));
        let names: Vec<String> = ready.map(|pod| text(pod, "/metadata/name")).collect();
        ensure!(names == wanted, "ready mirrors: {names:?}");
        let counted = &items[1]["status"]["containerStatuses"][0]["restartCount"];
        ensure!(*counted == restarts, "restarts of {}: {counted}", names[1]);
        Ok(items)
    };
    until("mirror pods", LIMIT, || Ok(()), look).with_context(|| tail(hosted))
}

/// The end of the agent's log.
fn tail(hosted: &Hosted) -> String {
    let log = hosted.log();
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(25)..].join("\n")
}
