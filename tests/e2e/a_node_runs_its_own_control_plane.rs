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
            *asked.lock().unwrap() = String::from_utf8_lossy(&request[..read]).into_owned();
            let body = body.lock().unwrap().clone();
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
        .map(|pod| {
            let id = text(pod, "/status/containerStatuses/0/containerID");
            (text(pod, "/metadata/name"), id)
        })
        .collect())
}

fn wait_for(hosted: &Hosted, wanted: &[&str]) -> Result<BTreeMap<String, String>> {
    let look = || {
        let ready = ready_pods(hosted)?;
        let names: Vec<&str> = ready.keys().map(String::as_str).collect();
        ensure!(names == wanted, "ready: {names:?}");
        Ok(ready)
    };
    let found = until(&format!("pods {wanted:?}"), LIMIT, || Ok(()), look);
    found.with_context(|| {
        let log = hosted.log();
        let lines: Vec<&str> = log.lines().rev().take(25).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    })
}

#[test]
fn etcd_and_apiserver_are_pods_of_the_node_that_joins_them() -> Result<()> {
    // Its namespace belongs to the lab the programs come from; it also keeps the machine free.
    let scenario = Scenario::alone("hosted")?;
    let hosted = Hosted::new(&scenario.layout)?;
    let server = serve(&hosted.machine_address())?;
    *server.body.lock().unwrap() = list(&["one", "two"]);
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
    *server.body.lock().unwrap() = list(&["one"]);
    let three = ["etcd-node-1", "kube-apiserver-node-1", "one-node-1"];
    wait_for(&hosted, &three)?;
    *server.body.lock().unwrap() = "nonsense".to_owned();

    // The agent is killed, and comes back as a node of the cluster it carries.
    hosted.kill()?;
    *server.body.lock().unwrap() = list(&["one"]);
    hosted.start(false, &extra)?;
    let mirrors = || {
        let pods = hosted
            .kubectl
            .json(&["get", "pods", "--namespace", "kube-system"])?;
        let items = pods["items"].as_array().cloned().unwrap_or_default();
        let ready = items.iter().filter(|pod| is_ready(pod));
        let names: Vec<String> = ready.map(|pod| text(pod, "/metadata/name")).collect();
        ensure!(names == three, "{names:?}");
        Ok(items)
    };
    let mirrors = until("mirror pods", LIMIT, || Ok(()), mirrors);
    let mirrors = mirrors.with_context(|| hosted.log())?;
    for mirror in &mirrors {
        let name = text(mirror, "/metadata/name");
        let id = text(mirror, "/status/containerStatuses/0/containerID");
        ensure!(before.get(&name) == Some(&id), "{name} was restarted: {id}");
    }
    let etcd = &mirrors[0]["spec"];
    ensure!(etcd["priority"] == 2_000_001_000, "{etcd}");
    // The apiserver dies; the node brings it back, and it still knows everything.
    hosted.kill()?;
    let apiserver = before
        .get("kube-apiserver-node-1")
        .context("no apiserver")?;
    hosted.start(false, &extra)?;
    wait_for(&hosted, &three)?;
    ensure!(ready_pods(&hosted)?.get("kube-apiserver-node-1") == Some(apiserver));
    Ok(())
}
